"""Every way of storing the same picture decodes to the same RGB; what is no whole picture is an error."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from small_memes import picture

from mmfusion.encoders.images import (
    FORMATS,
    IMAGE_BYTES,
    MOST_PIXELS,
    MOST_SIDE,
    ImageBatches,
    Preprocessing,
    crop_box,
    decode_rgb,
    digest_images,
    preprocess,
)

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
    unread = "not an image of a format that is read (PNG, JPEG, GIF, BMP, WEBP, TIFF)"
    assert [bad[tmp_path / name] for name in names] == ["empty file", unread, "Is a directory", "no such file"]


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


def _refused(path: Path) -> str:
    """The reason of a bad file, which digest, decoding and a batch have to agree on."""
    _, bad = digest_images([path])
    _, _, _, reasons = ImageBatches([[path]], [[True]], SQUASH)[0]
    with pytest.raises((OSError, ValueError)):
        decode_rgb(path)
    assert reasons == {0: bad[path]}
    return bad[path]


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "dangling.png").symlink_to("gone.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(IMAGE_BYTES + 1)  # sparse: takes no room
    assert "not a regular file" in _refused(tmp_path / "fifo.png")
    assert "not a regular file" in _refused(tmp_path / "endless.png")
    assert "link to gone.png" in _refused(tmp_path / "dangling.png")
    assert "256 MB, more than the 256 MB" in _refused(tmp_path / "huge.png")


@pytest.mark.parametrize("size", [(8000, MOST_PIXELS // 8000 + 1), (1, MOST_SIDE + 1)])
def test_too_many_pixels_are_a_bad_image_with_the_size_in_the_reason(tmp_path, size):
    path = _saved(Image.new("1", size), tmp_path / "a.png")
    assert path.stat().st_size < 20_000
    assert f"{size[0]} x {size[1]} pixels; at most 40 million" in _refused(path)
    assert digest_images([_saved(Image.new("1", (8000, MOST_PIXELS // 8000)), path)])[0]


def test_formats_that_start_programs_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    PLAIN.save(path, "EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    assert _refused(path) == f"not an image of a format that is read ({', '.join(FORMATS)})"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_named_is_read(tmp_path, kind):
    PLAIN.save(tmp_path / "a", kind)
    assert abs(_pixels(tmp_path / "a") - np.asarray(PLAIN)).mean() < 8  # JPEG, GIF and WEBP lose a little


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P", "CMYK"])
def test_strips_give_the_same_pixels_as_the_whole(tmp_path, monkeypatch, mode):
    stored = Image.fromarray(np.asarray(PLAIN.convert("L")).astype(np.uint16) * 200) if mode == "I;16" else PLAIN
    stored = stored if mode in ("I;16", "CMYK") else PLAIN.convert(mode)
    if mode in ("RGBA", "LA"):
        stored.putalpha(picture(3).convert("L"))
    path = _saved(stored.convert("CMYK") if mode == "CMYK" else stored, tmp_path / "a.tiff")
    whole = _pixels(path)
    monkeypatch.setattr("mmfusion.encoders.images.STRIP_PIXELS", 130)  # three rows of 40
    np.testing.assert_array_equal(_pixels(path), whole)


def _peak(code: str) -> float:
    """Megabytes by which a fresh process grows over its size after the imports, at its largest."""
    program = f"""
import resource
import numpy as np
from pathlib import Path
from PIL import Image
from mmfusion.encoders.images import Preprocessing, decode_rgb, preprocess
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
{code}
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return float(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units elsewhere")
def test_a_narrow_picture_is_cropped_without_its_whole_being_resized(tmp_path):
    path = _saved(Image.new("RGB", (1, 16_000), "red"), tmp_path / "a.png")
    assert path.stat().st_size < 1000
    how = "Preprocessing('crop', 224, 256, (0,) * 3, (1,) * 3)"
    grown = _peak(f"assert preprocess(decode_rgb(Path({str(path)!r})), {how}).shape == (224, 224, 3)")
    assert grown < 50  # 4700 before


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units elsewhere")
@pytest.mark.parametrize(("kind", "most"), [("16-bit", 8), ("RGBA", 10), ("RGB", 6)])
def test_decoding_makes_no_copies_of_the_whole(tmp_path, kind, most):
    path = tmp_path / "a.png"
    if kind == "16-bit":
        Image.fromarray(np.zeros((3000, 4000), np.uint16)).save(path)
    else:
        Image.new(kind, (4000, 3000)).save(path)
    grown = _peak(f"decode_rgb(Path({str(path)!r}))")
    assert grown * 2**20 / 12e6 < most  # bytes a pixel; 20, 16 and 12 before


def _resized_whole(image: Image.Image, how: Preprocessing, one_call: bool) -> np.ndarray:
    """The crop as torchvision takes it: all of the picture is resized, then cut; in Pillow's order, or width first."""
    scale = how.resize / min(image.size)
    width, height = (max(how.resize, int(side * scale)) for side in image.size)
    left, top = round((width - how.size) / 2), round((height - how.size) / 2)
    if not one_call:
        image = image.resize((width, image.height), how.resample)
    whole = image.resize((width, height), how.resample)
    return np.asarray(whole.crop((left, top, left + how.size, top + how.size))).astype(int)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(30, 700),
    height=st.integers(30, 700),
    size=st.sampled_from([32, 112, 224]),
    resample=st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]),
    seed=st.integers(0, 9),
)
def test_crop_of_the_box_is_crop_of_the_whole(width, height, size, resample, seed):
    how = Preprocessing("crop", size, round(size * 256 / 224), (0.5,) * 3, (0.5,) * 3, resample)
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    smooth = picture(seed, (width, height))
    # the box travels as four 32-bit floats: 1 to 3 % of a noise picture's values round the other way
    assert abs(preprocess(noise, how) - _resized_whole(noise, how, one_call=False)).max() <= 2
    assert abs(preprocess(smooth, how) - _resized_whole(smooth, how, one_call=True)).max() <= 2
    if resample == Image.Resampling.BILINEAR:  # the others are clipped between their passes, in Pillow's own order
        assert abs(preprocess(noise, how) - _resized_whole(noise, how, one_call=True)).max() <= 2


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), mode=st.sampled_from(["crop", "squash"]))
def test_the_box_lies_within_the_picture_and_in_its_middle(width, height, mode):
    left, top, right, bottom = crop_box((width, height), Preprocessing(mode, 224, 256, (0,) * 3, (1,) * 3))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    pixel = max(min(width, height) / 256, 1e-9)  # one of the resized picture, whose longer side is rounded down
    assert abs(left - (width - right)) <= 1.01 * pixel and abs(top - (height - bottom)) <= 1.01 * pixel
