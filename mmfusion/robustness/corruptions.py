"""Corruptions of pictures, texts, features and latents, and missing modalities.

A severity lies in [0, 1]; 0 leaves the input as it is (JPEG excepted, which always loses; and white space of texts
becomes single blanks). Every random choice comes from a generator that the caller
seeds, so a corrupted example is a function of the example, the corruption, the severity and the seed.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

# ---- pictures ----------------------------------------------------------------------------------------------------


def image_noise(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise on every pixel, of standard deviation severity / 2 of the whole range."""
    pixels = np.asarray(image, np.float32)
    noisy = pixels + rng.normal(0, 127.5 * severity, pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def image_blur(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur of standard deviation severity x 5 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(0.05 * severity * min(image.size)))


def image_jpeg(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """JPEG of quality 30 (1 - severity) + 1."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(30 * (1 - severity)) + 1)
    return Image.open(buffer).convert("RGB")


def image_occlusion(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """A grey rectangle of the picture's proportions, over a share `severity` of its area, at a random place."""
    width, height = (round(side * severity**0.5) for side in image.size)
    left, top = (int(rng.integers(0, side - part + 1)) for side, part in zip(image.size, (width, height), strict=True))
    covered = image.copy()
    covered.paste((128, 128, 128), (left, top, left + width, top + height))
    return covered


def image_contrast(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Contrast reduced to 1 - severity of what it was, about the mean grey."""
    return ImageEnhance.Contrast(image).enhance(1 - severity)


def image_rotation(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Turned by severity x 90 degrees, left or right at random; the corners are filled with grey."""
    angle = 90 * severity * rng.choice((-1, 1))
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))


IMAGE_CORRUPTIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "noise": image_noise,
    "blur": image_blur,
    "jpeg": image_jpeg,
    "occlusion": image_occlusion,
    "contrast": image_contrast,
    "rotation": image_rotation,
}

WITHOUT_CHANCE = ("blur", "jpeg", "contrast")
"""corruptions that draw no random numbers"""

# ---- texts -------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text_typos(text: str, severity: float, rng: np.random.Generator, mask: str) -> str:
    """One typing error in each word with probability `severity`: a letter swapped, left out, doubled or replaced."""
    return " ".join(_typo(word, rng) if rng.random() < severity else word for word in text.split())


def text_drop(text: str, severity: float, rng: np.random.Generator, mask: str) -> str:
    """Each word left out with probability `severity`; where none would be left, one stays."""
    words = text.split()
    kept = [word for word in words if rng.random() >= severity]
    return " ".join(kept or words[:1])


def text_shuffle(text: str, severity: float, rng: np.random.Generator, mask: str) -> str:
    """A share `severity` of the words, chosen at random, in a random order among their own places."""
    words = text.split()
    places = np.sort(rng.choice(len(words), round(severity * len(words)), replace=False)) if words else []
    shuffled = list(words)
    for place, origin in zip(places, rng.permutation(places), strict=True):
        shuffled[place] = words[origin]
    return " ".join(shuffled)


def text_mask(text: str, severity: float, rng: np.random.Generator, mask: str) -> str:
    """Each word replaced by the tokenizer's mask token with probability `severity`."""
    return " ".join(mask if rng.random() < severity else word for word in text.split())


TEXT_CORRUPTIONS: dict[str, Callable[[str, float, np.random.Generator, str], str]] = {
    "typos": text_typos,
    "word drop": text_drop,
    "word shuffle": text_shuffle,
    "word mask": text_mask,
}


def _typo(word: str, rng: np.random.Generator) -> str:
    place, kind = int(rng.integers(len(word))), int(rng.integers(4))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    if kind == 0 and after:
        return before + after[0] + letter + after[1:]
    if kind == 1 and len(word) > 1:
        return before + after
    if kind == 2:
        return before + letter * 2 + after
    return before + LETTERS[int(rng.integers(len(LETTERS)))] + after


# ---- features and latents ----------------------------------------------------------------------------------------


def add_noise(x: Tensor, severity: float, scale: Tensor, rng: np.random.Generator) -> Tensor:
    """x (N, d) plus Gaussian noise of standard deviation severity x scale; scale (d,) or a number, of training."""
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    return x + severity * scale * x.new_tensor(noise)


def drop_coordinates(x: Tensor, severity: float, neutral: Tensor, rng: np.random.Generator) -> Tensor:
    """Each coordinate of x (N, d) replaced by `neutral` (d,), its training mean, with probability `severity`."""
    kept = x.new_tensor(rng.random(x.shape, dtype=np.float32) >= severity)
    return x * kept + neutral * (1 - kept)


# ---- missing modalities ------------------------------------------------------------------------------------------


def missing_masks(
    modalities: Sequence[str], where: str, rate: float, examples: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Which examples have which modality: {modality: (N,) of 1 and 0}, exactly round(rate x N) examples incomplete.

    Args:
        modalities: all M of them.
        where: the modality that the incomplete examples lack; or "either": equal parts of them lack each (with two
            modalities, half lack the one and half the other).
        rate: share of incomplete examples.

    Raises ValueError for a name that is neither.
    """
    if where != "either" and where not in modalities:
        raise ValueError(f"{where!r} is neither 'either' nor one of {list(modalities)}")
    incomplete = rng.permutation(examples)[: round(rate * examples)]
    present = {name: np.ones(examples, np.float32) for name in modalities}
    lacking = modalities if where == "either" else [where]
    for k, name in enumerate(lacking):
        present[name][incomplete[k :: len(lacking)]] = 0
    return present
