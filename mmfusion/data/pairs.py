"""Examples without labels, for alignment and retrieval: one array (N, d_m) of each modality, cut at random.

datasets = load_pairs(Path("clip_coco_pairs.npz"), ("image", "text"), splits=10, hold_out=0.5)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.data.array_files import read_arrays
from mmfusion.data.array_values import check_modality_name, feature_vectors
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError, printable

UNLABELLED = "no labels: the target is 0 for every example"
DEV_SHARE = 0.1  # of what is not held out
BOUNDS = {"folds": (1, 1000), "hold_out": (0.01, 0.99), "split_seed": (0, 2**31 - 1)}
"""of the flags"""


def load_pairs(
    path: Path, modalities: Sequence[str], splits: int = 1, hold_out: float = 0.5, seed: int = 0
) -> list[Dataset]:
    """One dataset for each of several random cuts into train, dev (a tenth of the rest) and test.

    Args:
        path: .npz, folder of .npy files, or .safetensors; row i of every array is one example.
        modalities: keys of the arrays; none: all of them that are (N, d).
        splits: how many cuts. Their test parts overlap: an example has a number of its own in each, and one group.
        hold_out: share of the examples that is tested.
        seed: of the cuts.

    Raises InputError naming file and key; ValueError for less than one cut, or a share outside (0, 1).
    """
    if splits < 1 or not 0 < hold_out < 1:
        raise ValueError(f"{splits} cuts that hold out {hold_out}: give at least 1, and a share between 0 and 1")
    features, identity = _paired_features(path, modalities)
    n = len(next(iter(features.values())))
    held = round(hold_out * n)
    dev = max(2, round(DEV_SHARE * (n - held)))
    if held < 2 or n - held - dev < 2:
        raise InputError(f"{path}: has {n} examples, too few to hold out {hold_out:g} of them; change --hold-out")
    provenance = {**identity, "splits": splits, "hold_out": hold_out, "seed": seed}
    datasets = []
    for k in range(splits):
        order = np.random.default_rng([seed, k]).permutation(n)
        rows = {"train": order[held + dev :], "dev": order[held : held + dev], "test": order[:held]}
        parts = {part: _split(features, np.sort(of), k) for part, of in rows.items()}
        datasets.append(
            Dataset(
                printable(path.stem),
                "regression",
                parts,
                "dev",
                notes=[UNLABELLED],
                provenance=provenance,
                labelled=False,
            )
        )
    return datasets


def _paired_features(path: Path, modalities: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(N, d_m) of each modality, and the file's identity."""
    arrays, identity = read_arrays(path)
    names = list(modalities) or [key for key, x in arrays.items() if x.ndim == 2 and x.dtype.kind in "fiu"]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(
            f"{path}: has no array {printable(missing[0])!r}; it holds {', '.join(map(printable, arrays))}"
        )
    if len(set(names)) < len(names):
        raise InputError(f"--modalities {printable(' '.join(names))}: name each once")
    if len(names) < 2:
        found = ", ".join(map(printable, names)) or "none"
        raise InputError(f"{path}: pairs are of two modalities or more, found {found}")
    for name in names:
        check_modality_name(name, str(path))
    features = {name: torch.from_numpy(feature_vectors(arrays[name], f"{path}: {name}")) for name in sorted(names)}
    counts = {name: len(x) for name, x in features.items()}
    if len(set(counts.values())) > 1:
        message = ", ".join(f"{name} has {count} rows" for name, count in counts.items())
        raise InputError(f"{path}: {message}; row i of every array is one example")
    return features, identity


def _split(features: dict[str, Tensor], rows: np.ndarray, cut: int) -> Split:
    """Those rows as a part of one cut."""
    ids, groups = [f"{i} of cut {cut}" for i in rows], [str(i) for i in rows]
    return Split({name: x[rows] for name, x in features.items()}, torch.zeros(len(rows)), ids, {"group": groups})
