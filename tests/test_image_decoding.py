"""Every way of storing the same picture decodes to the same RGB; what is no whole picture is an error."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from small_memes import picture

from mmfusion.encoders.images import ImageBatches, Preprocessing, decode_rgb, digest_images, preprocess

SQUASH = Preprocessing("squash", 32, 36, (0.5,) * 3, (0.5,) * 3)
PLAIN = picture(1)


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(decode_rgb(path)).astype(int)


def _saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_png_is_returned_as_it_is(tmp_path):
    np.testing.assert_array_equal(_pixels(_saved(PLAIN, tmp_path / "a.png")), np.asarray(PLAIN))


def test_palette_equals_its_plain_twin(tmp_path):
    palette = PLAIN.quantize(16)
    twin = _saved(palette.convert("RGB"), tmp_path / "twin.png")
    np.testing.assert_array_equal(_pixels(_saved(palette, tmp_path / "a.png")), _pixels(twin))


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_and_one_bit_equal_their_plain_twins(tmp_path, mode):
    grey = PLAIN.convert(mode)
    twin = grey.convert("RGB")
    np.testing.assert_array_equal(_pixels(_saved(grey, tmp_path / "a.png")), np.asarray(twin))


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = np.asarray(PLAIN.convert("L"))
    low = np.random.default_rng(0).integers(0, 256, grey.shape, dtype=np.uint16)  # finer than 8 bits can tell
    sixteen = Image.fromarray(grey.astype(np.uint16) * 256 + low)
    np.testing.assert_array_equal(_pixels(_saved(sixteen, tmp_path / "a.png"))[..., 0], grey)
    np.testing.assert_array_equal(_pixels(_saved(sixteen, tmp_path / "a.tiff"))[..., 0], grey)


def test_16_bit_rgb_equals_its_plain_twin(tmp_path):
    # Pillow writes no 16-bit RGB: build the PNG by hand
    rgb = np.asarray(PLAIN).astype(">u2") * 257
    scanlines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", *PLAIN.size, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(scanlines)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), np.asarray(PLAIN))


def test_opaque_rgba_equals_its_plain_twin(tmp_path):
    rgba = PLAIN.convert("RGBA")
    np.testing.assert_array_equal(_pixels(_saved(rgba, tmp_path / "a.png")), np.asarray(PLAIN))


def test_transparency_shows_white_paper(tmp_path):
    rgba = PLAIN.convert("RGBA")
    rgba.putalpha(Image.new("L", PLAIN.size, 0))
    assert (_pixels(_saved(rgba, tmp_path / "rgba.png")) == 255).all()
    palette = Image.new("P", (4, 4), 0)  # index 0 is black, and transparent
    assert (_pixels(_saved(palette, tmp_path / "p.png", transparency=0)) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (abs(_pixels(_saved(half, tmp_path / "half.png")) - 127) <= 1).all()


def test_cmyk_equals_its_plain_twin(tmp_path):
    path = _saved(PLAIN.convert("CMYK"), tmp_path / "a.jpg", quality=100, subsampling=0)
    assert abs(_pixels(path) - np.asarray(PLAIN)).mean() < 2  # JPEG loses a little; inverted inks would differ by 100


def test_animation_shows_its_first_frame(tmp_path):
    frames = [PLAIN.quantize(32), picture(2).quantize(32)]
    path = _saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(_pixels(path), np.asarray(frames[0].convert("RGB")))
    path = _saved(PLAIN, tmp_path / "a.png", save_all=True, append_images=[picture(2)])
    np.testing.assert_array_equal(_pixels(path), np.asarray(PLAIN))


TURNS = Image.Transpose
STORED = {2: TURNS.FLIP_LEFT_RIGHT, 3: TURNS.ROTATE_180, 4: TURNS.FLIP_TOP_BOTTOM, 5: TURNS.TRANSPOSE}
STORED |= {6: TURNS.ROTATE_90, 7: TURNS.TRANSVERSE, 8: TURNS.ROTATE_270}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = PLAIN if orientation == 1 else PLAIN.transpose(STORED[orientation])
    np.testing.assert_array_equal(_pixels(_saved(stored, tmp_path / "a.png", exif=exif)), np.asarray(PLAIN))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cut_file_is_an_error_or_lacks_no_pixel(tmp_path_factory, kind, data):
    stream = io.BytesIO()
    PLAIN.save(stream, kind)
    whole = stream.getvalue()
    path = tmp_path_factory.mktemp("cut") / "a"
    path.write_bytes(whole)
    expected = _pixels(path)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        pixels = _pixels(path)
    except Exception:
        return
    np.testing.assert_array_equal(pixels, expected)


def test_truncation_is_an_error_even_where_another_library_allowed_it(tmp_path, monkeypatch):
    path = _saved(PLAIN, tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:-200])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(OSError):
        decode_rgb(path)


@pytest.mark.parametrize("limit", [700, 1000])  # 1200 pixels: above twice the limit Pillow raises, below it only warns
def test_decompression_bomb_is_an_error(tmp_path, monkeypatch, limit):
    path = _saved(PLAIN, tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit if limit == 1000 else 500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
            decode_rgb(path)
        _, bad = digest_images([path])
    assert "decompression bomb" in bad[path]


def test_digest_names_what_is_wrong(tmp_path):
    (tmp_path / "zero.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    good = _saved(PLAIN, tmp_path / "good.png")
    names = ["zero.png", "text.png", "folder.png", "missing.png"]
    digests, bad = digest_images([good, *(tmp_path / name for name in names)])
    assert list(digests) == [good]
    assert [bad[tmp_path / name] for name in names] == ["empty file", "not an image", "Is a directory", "no such file"]


def test_squash_keeps_the_borders_and_crop_cuts_them(tmp_path):
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste((0, 0, 0), (0, 0, 10, 30))  # a caption at the left border
    crop = Preprocessing("crop", 28, 30, (0.5,) * 3, (0.5,) * 3)
    assert preprocess(wide, SQUASH).min() == 0
    assert preprocess(wide, crop).min() == 255
    assert preprocess(wide, crop).shape == (28, 28, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (32, 32), (31, 33)])
@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_any_aspect_gives_the_encoders_shape(size, mode):
    how = Preprocessing(mode, 32, 37, (0.5,) * 3, (0.5,) * 3)
    assert preprocess(Image.new("RGB", size, "red"), how).shape == (32, 32, 3)


def test_bad_file_leaves_the_batch_without_a_place(tmp_path):
    good, cut = _saved(PLAIN, tmp_path / "good.png"), _saved(PLAIN, tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-200])
    _, places, pixels, reasons = ImageBatches([[cut, good]], [[True, True]], SQUASH)[0]
    assert places == [1] and list(reasons) == [0]
    np.testing.assert_array_equal(pixels, preprocess(PLAIN, SQUASH)[None])
    # where nothing that is still wanted decodes, nothing needs an encoder
    assert ImageBatches([[cut, good]], [[True, False]], SQUASH)[0][2] is None


@pytest.mark.parametrize("numbers", [np.float32([[0.1, 0.9]]), np.int32([[0, 10_000_000]])])
def test_numbers_without_an_agreed_black_and_white_are_refused(tmp_path, numbers):
    path = tmp_path / "measured.tiff"
    Image.fromarray(numbers).save(path)
    with pytest.raises(ValueError, match="no agreed black and white"):
        decode_rgb(path)
