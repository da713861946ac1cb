"""Sequences of feature vectors -> one vector per example: mean, or mean and standard deviation, over the valid steps.

Released sequences are padded with zeros, at the front (MultiBench, POM) or at the end (MMSA), and COVAREP's audio
holds -inf and NaN. Neither padding nor such values may enter a mean.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Pooling = Literal["mean_std", "mean"]
CHUNK = 1 << 24  # values pooled at a time: the largest released file holds 500 steps of 16,326 examples


@dataclass(frozen=True)
class Pooled:
    """One vector per example, and what had to be put right on the way."""

    features: np.ndarray
    """float32 (N, d), or (N, 2d) with the standard deviations behind the means; all finite"""
    missing: int
    """values within valid steps that were not finite and took no part"""
    empty: int
    """examples without any valid step; their vectors are zero"""


def occupied_steps(sequences: np.ndarray) -> np.ndarray:
    """(N, T, d) -> bool (N, T): steps that are not all zero; a step of NaN is occupied."""
    return (sequences != 0).any(-1)


def steps_from_lengths(sequences: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, int]:
    """(N, T, d) and lengths (N,) -> bool (N, T), and for how many examples the lengths do not fit.

    An example's L steps are the first ones or, where those would leave out steps that are not zero, the last ones:
    released files are padded on either side. Where neither fits, its steps are those that are not all zero.
    """
    occupied = occupied_steps(sequences)
    place, lengths = np.arange(occupied.shape[1]), np.asarray(lengths).reshape(-1, 1)
    valid = place < lengths  # (N, T)
    unfit = (occupied & ~valid).any(1)
    at_end = place >= occupied.shape[1] - lengths
    valid[unfit] = at_end[unfit]
    unfit = (occupied & ~valid).any(1)
    valid[unfit] = occupied[unfit]
    return valid, int(unfit.sum())


def pool_over_time(
    sequences: np.ndarray | Sequence[np.ndarray], valid: np.ndarray | None = None, pooling: Pooling = "mean_std"
) -> Pooled:
    """Pool (N, T, d), or N arrays (T_i, d), over the valid steps.

    `valid` is bool (N, T); None: the steps that are not all zero. Per coordinate, only finite values count; where there
    are none, mean and standard deviation (of the population: one step has 0) are 0. Raises ValueError at other shapes.
    """
    if not isinstance(sequences, np.ndarray):
        if valid is not None:
            raise ValueError("steps of N separate arrays are told by their zeros, not by `valid`")
        parts = [pool_over_time(np.asarray(part)[None], None, pooling) for part in sequences]
        features = np.concatenate([part.features for part in parts])
        return Pooled(features, sum(part.missing for part in parts), sum(part.empty for part in parts))
    if sequences.ndim != 3 or (valid is not None and valid.shape != sequences.shape[:2]):
        shapes = f"{sequences.shape} and {None if valid is None else valid.shape}"
        raise ValueError(f"sequences must be (N, T, d) and valid (N, T); found {shapes}")
    count, steps, width = sequences.shape
    features = np.zeros((count, width * (2 if pooling == "mean_std" else 1)), np.float32)
    missing = empty = 0
    size = max(1, CHUNK // max(1, steps * width))
    for start in range(0, count, size):
        part = slice(start, start + size)
        with np.errstate(over="ignore"):  # beyond float32 is as good as infinite
            x = np.asarray(sequences[part], np.float32)
        kept = occupied_steps(x) if valid is None else valid[part]
        finite = np.isfinite(x)
        usable = finite & kept[..., None]  # (n, T, d)
        missing += int((kept[..., None] & ~finite).sum())
        empty += int((~kept.any(1)).sum())
        values = np.where(usable, x, 0).astype(np.float64)
        number = np.maximum(usable.sum(1), 1)  # (n, d)
        mean = values.sum(1) / number
        features[part, :width] = mean
        if pooling == "mean_std":
            deviation = np.where(usable, values - mean[:, None], 0)  # two passes: E[x^2] - E[x]^2 cancels
            features[part, width:] = np.sqrt((deviation**2).sum(1) / number)
    return Pooled(features, missing, empty)


class Read(Protocol):
    """What was made of the sequences of N examples: `Pooled`, or the steps of `mmfusion.data.steps`."""

    @property
    def features(self) -> Sized: ...
    @property
    def missing(self) -> int: ...
    @property
    def empty(self) -> int: ...


def pooling_notes(modality: str, pooled: Sequence[Read]) -> list[str]:
    """What the reader of a score must know of one modality in all splits: what was missing."""
    missing, empty = sum(one.missing for one in pooled), sum(one.empty for one in pooled)
    total = sum(len(one.features) for one in pooled)
    notes = [f"{modality}: {missing} values that were not finite were taken as missing"] if missing else []
    if empty:
        left = "their vectors are zero" if isinstance(pooled[0], Pooled) else "nothing is there"
        notes.append(f"{modality}: {empty} of {total} examples have no step that is not zero; {left}")
    return notes
