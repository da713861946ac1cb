"""POM (Park et al., 2014): how 17 traits of a movie reviewer were rated, from audio and video, in 20 aligned steps.

    dataset = load_pom(Path("pom_audio_video.npz"))
    dataset.splits["train"].target.shape  # (600, 17), in 1 .. 7

The steps are those released with Zadeh et al. (2018, MFN); the names of the traits are not recorded there.
"""

import os
from pathlib import Path

import numpy as np
import torch

from mmfusion.data.pickles import as_numbers, file_identity, load_npz
from mmfusion.data.pooling import Pooled, Pooling, pool_over_time, pooling_notes
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError

TRAITS = 17
LABEL_RANGE = (1.0, 7.0)
SLACK = 1.0  # one released mean of raters is 2/3; anything beyond this is no rating on that scale
MODALITIES = ("audio", "video")
SPLIT_KEYS = {"train": "train", "dev": "valid", "test": "test"}


def load_pom(path: Path, pooling: Pooling = "mean") -> Dataset:
    """Splits train, dev and test; target (N, 17); modalities audio and video (N, d), or (N, 2d) with mean_std.

    The file holds audio_*, video_* (N, T, d) and traits_* (N, 17) for train, valid and test. Steps that are all zero
    are padding. Raises InputError naming the file and the key or shape that is wrong.
    """
    path = Path(os.path.expanduser(path))
    if pooling not in ("mean", "mean_std"):
        raise InputError(f"{path}: pooling {pooling!r} does not exist; choose mean or mean_std")
    arrays = load_npz(path)
    splits, pooled, outside, notes = {}, {}, 0, []
    for name, key in SPLIT_KEYS.items():
        target = _traits(arrays, key, path)
        outside += int(((target < LABEL_RANGE[0]) | (target > LABEL_RANGE[1])).sum())
        pooled[name] = {m: _pool(arrays, f"{m}_{key}", len(target), pooling, path) for m in MODALITIES}
        features = {m: torch.from_numpy(one.features) for m, one in pooled[name].items()}
        splits[name] = Split(features, torch.from_numpy(target), [f"{key}_{row}" for row in range(len(target))])
    for modality in MODALITIES:
        widths = {name: split.features[modality].shape[1] for name, split in splits.items()}
        if len(set(widths.values())) > 1:
            raise InputError(f"{path}: {modality} has different widths in its splits ({widths}); fetch it again")
        notes += pooling_notes(modality, [parts[modality] for parts in pooled.values()])
    if outside:
        notes.append(f"{outside} ratings lie outside of 1 .. 7 by less than 1; they are kept as released")
    provenance: dict[str, object] = file_identity(path) | {
        "shapes": {key: list(array.shape) for key, array in arrays.items()},
        "pooling": f"{pooling} over the steps that are not all zero",
    }
    names = [f"trait_{number}" for number in range(1, TRAITS + 1)]
    return Dataset("pom", "regression", splits, "dev", notes, provenance, LABEL_RANGE, names)


def _find(arrays: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    if key not in arrays:
        raise InputError(f"{path}: has no array {key!r}, its keys are {', '.join(sorted(arrays))[:200] or 'none'}")
    return as_numbers(arrays[key], f"{path}: {key}")


def _traits(arrays: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    """float32 (N, 17), checked."""
    key = f"traits_{key}"
    target = _find(arrays, key, path).astype(np.float32)
    if target.ndim != 2 or target.shape[1] != TRAITS or len(target) == 0:
        raise InputError(f"{path}: {key} has shape {target.shape}; expected (N, {TRAITS})")
    good = np.isfinite(target) & (target >= LABEL_RANGE[0] - SLACK) & (target <= LABEL_RANGE[1] + SLACK)
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise InputError(f"{path}: {key}: trait {column + 1} of row {row} is {target[row, column]:g}; expected 1 to 7")
    return target


def _pool(arrays: dict[str, np.ndarray], key: str, count: int, pooling: Pooling, path: Path) -> Pooled:
    x = _find(arrays, key, path)
    if x.ndim != 3 or len(x) != count or 0 in x.shape:
        raise InputError(f"{path}: {key} has shape {x.shape}; expected ({count}, T, d), as there are traits")
    return pool_over_time(x, None, pooling)
