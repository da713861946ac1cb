"""Image decoding and preprocessing: any supported file -> RGB pixels of the encoder's size, or the reason why not."""

import contextlib
import errno
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmfusion.files import reason_unreadable_path

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")  # Pillow opens forty more, EPS by starting Ghostscript
IMAGE_BYTES = 256_000_000  # a TIFF of 40 megapixels, RGBA at 8 bits and uncompressed, has 160 MB
MOST_PIXELS = 40_000_000  # photographs end near 24 to 48 megapixels; each of 16 workers decodes one at a time
MOST_SIDE = 32_767  # pixels; resized, a picture first becomes (its height, S): 4 GB for one of 1 x 4 million at S = 224
STRIP_PIXELS = 1 << 20  # pictures are converted in strips, so that none stands in memory three times


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB picture becomes the encoder's (S, S) input."""

    mode: str
    """squash: the whole picture, captions included; crop: shorter side to `resize`, then its centre, as for ImageNet"""
    size: int
    """S, in pixels"""
    resize: int
    """shorter side before a crop, in pixels"""
    mean: tuple[float, float, float]
    """per channel, of pixels in [0, 1]"""
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BILINEAR
    """Pillow's filter; all of them are antialiased"""


@contextlib.contextmanager
def _bombs_are_errors() -> Iterator[None]:
    """Pillow only warns between one and two times its pixel limit; here that is an error too.

    What it says of tags that it skips, in several lines a file, is of no use to anybody.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _open(path: Path) -> Image.Image:
    """The header of one file, checked for what would cost more memory or time than a picture is worth."""
    reason = reason_unreadable_path(path, IMAGE_BYTES)
    if reason is not None:
        raise OSError(errno.EINVAL, reason)
    return _check_size(Image.open(path, formats=FORMATS))


def _check_size(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        most = f"{MOST_PIXELS // 10**6} million pixels and sides of {MOST_SIDE} are read"
        raise ValueError(f"{width} x {height} pixels; at most {most}")
    return image


def decode_rgb(path: Path) -> Image.Image:
    """Decode one file to 8-bit RGB: first frame, EXIF orientation applied, transparency composited on white.

    Bytes a pixel at the peak, the decoder's own included, measured at 30 megapixels: BMP, RGB PNG and baseline JPEG 4,
    GIF 5, 16-bit PNG 6, turned JPEG 8, RGBA PNG and TIFF 9, progressive JPEG 10, WebP 16.
    Raises whatever Pillow raises on a file that is missing, truncated, no image, or a decompression bomb, and OSError
    or ValueError on what is no regular file, too large, or of another format.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries switch it on for the whole process
    with _bombs_are_errors(), _open(path) as image:
        image.load()  # the whole file, so that a truncation shows here and not as a grey band
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "RGB" and not image.has_transparency_data:
            return image
        if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):
            raise ValueError("its numbers have no agreed black and white")
        rgb = Image.new("RGB", image.size)
        rows = max(1, STRIP_PIXELS // max(image.width, 1))
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            rgb.paste(_to_rgb(strip), (0, top))
        return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """A picture, or a strip of it, in any mode but F -> RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of a picture of (width, height) that the encoder sees, in its pixels."""
    if preprocessing.mode == "squash":
        return 0.0, 0.0, float(size[0]), float(size[1])
    shorter = min(size)
    box = []
    for side in size:  # of the resized picture, whose pixels are whole; torchvision rounds in the same way
        resized = max(preprocessing.resize, int(side * (preprocessing.resize / shorter)))
        start = round((resized - preprocessing.size) / 2)
        box.append((start * side / resized, min((start + preprocessing.size) * side / resized, side)))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize an RGB picture, or the part of it that a crop keeps, to uint8 (S, S, 3)."""
    size, resample = preprocessing.size, preprocessing.resample
    if preprocessing.mode == "squash":
        return np.asarray(image.resize((size, size), resample))
    # the box alone: the whole of a picture of 1 x 16000, its shorter side at 256, would have 4.7 GB
    left, top, right, bottom = crop_box(image.size, preprocessing)
    # width first, as for a whole picture: in one call Pillow may choose the other order, worth 46 of 255 with Lanczos
    columns = image.resize((size, image.height), resample, (left, 0, right, image.height))
    return np.asarray(columns.resize((size, size), resample, (0, top, size, bottom)))


def reason_unreadable(error: Exception) -> str:
    """What is wrong with an image file, in a few words."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case UnidentifiedImageError():
            return f"not an image of a format that is read ({', '.join(FORMATS)})"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            count = re.search(r"\d+", str(error))  # Pillow says the size in words of its own
            return f"{count[0] if count else 'too many'} pixels, a decompression bomb"
        case OSError() if error.strerror:
            return error.strerror
    return " ".join(str(error).split())[:80] or type(error).__name__


def _digest(path: Path) -> tuple[str | None, str | None]:
    """(SHA-256 of the bytes, None), or (None, reason) where the file is missing, empty or has no image header."""
    try:
        reason = reason_unreadable_path(path, IMAGE_BYTES)
        if reason is not None:
            return None, reason
        content = path.read_bytes()
        if not content:
            return None, "empty file"
        # the header alone: what is no image at all shows in seconds
        _check_size(Image.open(io.BytesIO(content), formats=FORMATS)).close()
    except Exception as error:  # a hostile header may raise nearly anything inside Pillow
        return None, reason_unreadable(error)
    return hashlib.sha256(content).hexdigest(), None


def digest_images(paths: list[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Content digests of the readable files, and the reasons of the others."""
    with _bombs_are_errors(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        results = dict(zip(paths, pool.map(_digest, paths), strict=True))
    digests = {path: digest for path, (digest, _) in results.items() if digest}
    return digests, {path: reason for path, (_, reason) in results.items() if reason}


class ImageBatches:
    """Fixed batches of files, decoded by whichever worker process asks for them: a map-style data set of batches."""

    def __init__(
        self,
        batches: list[list[Path]],
        wanted: list[list[bool]],
        preprocessing: Preprocessing,
        keys: list[list[str]] | None = None,
        change: Callable[[Image.Image, str], Image.Image] | None = None,
    ) -> None:
        """`change` (picture, key) -> picture is applied to every decoded picture of that key."""
        self.batches, self.wanted, self.preprocessing = batches, wanted, preprocessing
        self.keys, self.change = keys, change

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[int, list[int], np.ndarray | None, dict[int, str]]:
        """Batch number, places within it that decoded, uint8 (b, S, S, 3), and the reasons of the places that failed.

        Pixels are None where nothing that is wanted decoded: there is nothing to encode then.
        """
        paths, wanted = self.batches[index], self.wanted[index]
        pixels: dict[int, np.ndarray] = {}
        reasons: dict[int, str] = {}
        for place in sorted(range(len(paths)), key=lambda place: not wanted[place]):
            if not wanted[place] and not any(wanted[done] for done in pixels):
                return index, [], None, reasons
            try:
                picture = decode_rgb(paths[place])
                if self.change is not None:
                    picture = self.change(picture, self.keys[index][place])
                pixels[place] = preprocess(picture, self.preprocessing)
            except Exception as error:  # a hostile file may raise nearly anything inside Pillow
                reasons[place] = reason_unreadable(error)
        good = sorted(pixels)
        return index, good, np.stack([pixels[place] for place in good]) if good else None, reasons
