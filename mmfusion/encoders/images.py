"""Any image file that Pillow reads -> plain RGB, as a person sees it, or an error: never zeros, never half of it."""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError


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
    """Pillow only warns between one and two times its pixel limit; here that is an error too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_rgb(path: Path) -> Image.Image:
    """Decode one file to 8-bit RGB: first frame, EXIF orientation applied, transparency composited on white.

    Raises whatever Pillow raises on a file that is missing, truncated, no image, or a decompression bomb.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries switch it on for the whole process
    with _bombs_are_errors(), Image.open(path) as image:
        image.load()  # the whole file, so that a truncation shows here and not as a grey band
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or (image.mode == "I" and np.asarray(image).max(initial=0) > 65535):
            raise ValueError("its numbers have no agreed black and white")
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
            grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
            image = Image.fromarray(grey.astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image)
        return image.convert("RGB")


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize an RGB picture (and crop it) to uint8 (S, S, 3)."""
    if preprocessing.mode == "squash":
        return np.asarray(image.resize((preprocessing.size, preprocessing.size), preprocessing.resample))
    scale = preprocessing.resize / min(image.size)
    width, height = (max(preprocessing.resize, int(side * scale)) for side in image.size)
    left, top = round((width - preprocessing.size) / 2), round((height - preprocessing.size) / 2)
    resized = image.resize((width, height), preprocessing.resample)
    return np.asarray(resized.crop((left, top, left + preprocessing.size, top + preprocessing.size)))


def reason_unreadable(error: Exception) -> str:
    """What is wrong with an image file, in a few words."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case UnidentifiedImageError():
            return "not an image"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"more than {Image.MAX_IMAGE_PIXELS} pixels, a decompression bomb"
        case OSError() if error.strerror:
            return error.strerror
    return " ".join(str(error).split())[:80] or type(error).__name__


def _digest(path: Path) -> tuple[str | None, str | None]:
    """(SHA-256 of the bytes, None), or (None, reason) where the file is missing, empty or has no image header."""
    try:
        content = path.read_bytes()
        if not content:
            return None, "empty file"
        Image.open(io.BytesIO(content)).close()  # the header alone: what is no image at all shows in seconds
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
