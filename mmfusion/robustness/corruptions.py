"""Corruptions of pictures, texts, sequences, features and latents, and missing modalities.

A severity lies in [0, 1]; 0 leaves the input as it is (JPEG excepted, which always loses; and white space of texts
becomes single blanks). Every random choice comes from a generator that the caller
seeds, so a corrupted example is a function of the example, the corruption, the severity and the seed.
"""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from mmfusion.robustness.synonyms import text_synonyms
from mmfusion.sequences import Sequences

# ---- pictures ----------------------------------------------------------------------------------------------------

CUT_OFF = 0.25
"""cycles per pixel, of the radius in the spectrum: half of what a side can carry"""


def image_noise(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise on every pixel, of standard deviation severity / 2 of the whole range."""
    pixels = np.asarray(image, np.float32)
    noisy = pixels + rng.normal(0, 127.5 * severity, pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def image_high_frequencies(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Noise of frequencies above `CUT_OFF` alone, of the energy of `image_noise` at that severity."""
    pixels = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))  # (H, W) cycles per pixel
    spectrum = np.fft.fft2(rng.normal(size=pixels.shape), axes=(0, 1)) * (radius > CUT_OFF)[..., None]
    noise = np.fft.ifft2(spectrum, axes=(0, 1)).real
    if deviation := noise.std():  # a picture of 1 x 1 has no such frequency
        pixels = pixels + 127.5 * severity / deviation * noise
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


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
    "high-frequency noise": image_high_frequencies,
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
    "synonyms": text_synonyms,
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


# ---- sequences ---------------------------------------------------------------------------------------------------

BLOCKS = 2  # masks along each axis, as SpecAugment's larger policies have


def sequence_noise(x: Tensor, snr: float, rng: np.random.Generator) -> Tensor:
    """x (T, d) plus Gaussian noise at a signal-to-noise ratio of `snr` dB; inf is none.

    The ratio is that of mean squares over the steps, channel by channel: channels may be of different units.
    """
    power = x.square().mean(0) if len(x) else x.new_zeros(x.shape[1])  # (d,)
    noise = x.new_tensor(rng.standard_normal(x.shape, dtype=np.float32))
    return x + power.sqrt() * 10 ** (-snr / 20) * noise


def block_masks(shape: tuple[int, int], time: float, channels: float, rng: np.random.Generator) -> np.ndarray:
    """(T, d) of True where SpecAugment masks: these shares of the steps and of the channels, in `BLOCKS` blocks each.

    A share of a step is a chance of one more. The blocks of an axis lie at random and do not overlap, though they may
    touch (Park et al. 2019, without time warping).
    """
    along = [
        _blocks(size, math.floor(share * size + rng.random()), rng)
        for size, share in zip(shape, (time, channels), strict=True)
    ]
    return along[0][:, None] | along[1]


def _blocks(size: int, covered: int, rng: np.random.Generator) -> np.ndarray:
    """(size,) bool, `covered` of them True, in at most `BLOCKS` runs."""
    widths = np.diff([0, *np.sort(rng.integers(0, covered + 1, BLOCKS - 1)), covered])
    starts = np.sort(rng.integers(0, size - covered + 1, BLOCKS)) + np.cumsum(widths) - widths
    masked = np.zeros(size, bool)
    for start, width in zip(starts, widths, strict=True):
        masked[start : start + width] = True
    return masked


def noisy_steps(x: Tensor, severity: float, neutral: Tensor, rng: np.random.Generator) -> Tensor:
    """`sequence_noise` whose amplitude is `severity` times the signal's: -20 log10(severity) dB, 0 dB at 1."""
    return sequence_noise(x, -20 * math.log10(severity) if severity else math.inf, rng)


def dropped_blocks(x: Tensor, severity: float, neutral: Tensor, rng: np.random.Generator) -> Tensor:
    """x (T, d) with blocks of steps and of channels set to `neutral` (d,); they cover a share `severity` of it."""
    share = 1 - math.sqrt(1 - severity)  # of each axis: together 1 - (1 - share)^2
    masked = torch.from_numpy(block_masks(x.shape, share, share, rng)).to(x.device)
    return torch.where(masked, neutral, x)


SEQUENCE_CORRUPTIONS: dict[str, Callable[[Tensor, float, Tensor, np.random.Generator], Tensor]] = {
    "noise": noisy_steps,
    "spectrogram dropout": dropped_blocks,
}
"""(x (T, d), severity, neutral (d,), rng) -> (T, d), for audio and video"""


def corrupt_sequences(sequences: Sequences, name: str, severity: float, neutral: Tensor, seed: int) -> Sequences:
    """Each of N sequences under one of `SEQUENCE_CORRUPTIONS`, with random numbers of its own place and `seed`.

    Padding takes no part: of arrays (N, T, d) with a mask make `mmfusion.sequences.from_padded`. `neutral` (d,) is the
    mean step in training. Raises ValueError for another name.
    """
    if name not in SEQUENCE_CORRUPTIONS:
        raise ValueError(f"no corruption {name!r} of sequences; known are {', '.join(SEQUENCE_CORRUPTIONS)}")
    change = SEQUENCE_CORRUPTIONS[name]
    parts = [change(x.float(), severity, neutral, np.random.default_rng([seed, i])) for i, x in enumerate(sequences)]
    return Sequences(parts, sequences.width)


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
