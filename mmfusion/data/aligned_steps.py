"""Audio and video in aligned steps, as released with Zadeh et al. (2018, MFN): one .npz for each corpus.

The file holds audio_*, video_* (N, T, d) and a target for train, dev (or valid) and test. Steps that are all zero are
padding.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mmfusion.data.pickles import as_numbers, file_identity, load_npz
from mmfusion.data.pooling import Pooled, Pooling, pool_over_time, pooling_notes
from mmfusion.data.steps import Steps, keep_steps
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError

MODALITIES = ("audio", "video")
SPLIT_KEYS = {"train": ("train",), "dev": ("valid", "dev"), "test": ("test",)}

Manner = Pooling | Literal["steps"]
"""what becomes of the steps: one vector of each example, or all of them, as `mmfusion.sequences.Sequences`"""


@dataclass(frozen=True)
class Release:
    """What differs between corpora."""

    name: str
    target: str
    """key of the target, without the split"""
    label_range: tuple[float, float]
    target_names: tuple[str, ...] = ()
    """of the columns of a target (N, O); empty: it is (N,)"""
    slack: float = 0.0
    """how far outside the range a released value may lie; beyond, it is no value on that scale"""
    unmeasured: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """(modality, values that stand for what was not measured)"""


def load_release(path: Path, release: Release, manner: Manner) -> Dataset:
    """Splits train, dev and test, a regression; modalities audio and video: (N, d), (N, 2d) with mean_std, or steps.

    Raises InputError naming the file and the key or shape that is wrong.
    """
    path = Path(os.path.expanduser(path))
    if manner not in ("mean", "mean_std", "steps"):
        raise InputError(f"{path}: pooling {manner!r} does not exist; choose mean, mean_std or steps")
    arrays = load_npz(path)
    splits, read, outside, notes = {}, {}, 0, []
    unmeasured = dict.fromkeys(MODALITIES, 0)
    low, high = release.label_range
    for name, keys in SPLIT_KEYS.items():
        key = next((key for key in keys if f"{release.target}_{key}" in arrays), keys[0])
        target = _target(arrays, key, release, path)
        outside += int(((target < low) | (target > high)).sum())
        features = {}
        for modality in MODALITIES:
            x = _find_steps(arrays, f"{modality}_{key}", len(target), release.target, path)
            gone = np.isin(x, dict(release.unmeasured).get(modality, ()))
            unmeasured[modality] += int(gone.sum())
            kept = _taken(np.where(gone, np.nan, x) if gone.any() else x, manner)
            features[modality] = replace(kept, missing=kept.missing - int(gone.sum()))  # those have a note of their own
        read[name] = features
        splits[name] = Split(
            {m: x.features if isinstance(x, Steps) else torch.from_numpy(x.features) for m, x in features.items()},
            torch.from_numpy(target),
            [f"{key}_{row}" for row in range(len(target))],
        )
    for modality in MODALITIES:
        widths = {name: split.features[modality].shape[-1] for name, split in splits.items()}
        if len(set(widths.values())) > 1:
            raise InputError(f"{path}: {modality} has different widths in its splits ({widths}); fetch it again")
        notes += pooling_notes(modality, [features[modality] for features in read.values()])
        if unmeasured[modality]:
            values = " or ".join(f"{value:g}" for value in dict(release.unmeasured)[modality])
            taken = f"{unmeasured[modality]} values of {values}, which stand for not measured, were taken as missing"
            notes.append(f"{modality}: {taken}")
    if outside:
        by = f"by less than {release.slack:g}; they are kept as released"
        notes.append(f"{outside} ratings lie outside of {low:g} .. {high:g} {by}")
    steps = "the steps that are not all zero"
    provenance: dict[str, object] = file_identity(path) | {
        "shapes": {key: list(array.shape) for key, array in arrays.items()},
        "pooling": f"none: {steps}" if manner == "steps" else f"{manner} over {steps}",
    }
    names = list(release.target_names)
    return Dataset(release.name, "regression", splits, "dev", notes, provenance, release.label_range, names)


def _taken(x: np.ndarray, manner: Manner) -> Pooled | Steps:
    return keep_steps(x) if manner == "steps" else pool_over_time(x, None, manner)


def _find(arrays: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    if key not in arrays:
        raise InputError(f"{path}: has no array {key!r}, its keys are {', '.join(sorted(arrays))[:200] or 'none'}")
    return as_numbers(arrays[key], f"{path}: {key}")


def _target(arrays: dict[str, np.ndarray], key: str, release: Release, path: Path) -> np.ndarray:
    """float32 (N,), or (N, O) of a target with names, checked."""
    key, columns = f"{release.target}_{key}", len(release.target_names)
    target = _find(arrays, key, path).astype(np.float32)
    target = target[:, 0] if not columns and target.ndim == 2 and target.shape[1] == 1 else target
    if target.shape[1:] != ((columns,) if columns else ()) or target.size == 0:
        raise InputError(f"{path}: {key} has shape {target.shape}; expected {f'(N, {columns})' if columns else '(N,)'}")
    low, high = release.label_range
    good = np.isfinite(target) & (target >= low - release.slack) & (target <= high + release.slack)
    if not good.all():
        place = tuple(np.argwhere(~good)[0])
        where = (
            f"{release.target_names[place[1]].replace('_', ' ')} of row {place[0]}" if columns else f"row {place[0]}"
        )
        raise InputError(f"{path}: {key}: {where} is {target[place]:g}; expected {low:g} to {high:g}")
    return target


def _find_steps(arrays: dict[str, np.ndarray], key: str, count: int, target: str, path: Path) -> np.ndarray:
    x = _find(arrays, key, path)
    if x.ndim != 3 or len(x) != count or 0 in x.shape:
        raise InputError(f"{path}: {key} has shape {x.shape}; expected ({count}, T, d), as there are {target}")
    return x
