"""Examples without labels, for alignment and retrieval: one array (N, d_m) of each modality, cut at random.

datasets = load_pairs(Path("clip_coco_pairs.npz"), ("image", "text"), splits=10, hold_out=0.5)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mmfusion.data.array_files import read_arrays
from mmfusion.data.array_values import feature_vectors
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError, printable

UNLABELLED = "no labels: the target is 0 for every example"
DEV_SHARE = 0.1  # of what is not held out


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

    Raises InputError naming file and key.
    """
    arrays, identity = read_arrays(path)
    names = list(modalities) or [key for key, x in arrays.items() if x.ndim == 2 and x.dtype.kind in "fiu"]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"{path}: has no array {missing[0]!r}; it holds {', '.join(map(printable, arrays))}")
    if len(names) < 2:
        raise InputError(f"{path}: pairs are of two modalities or more, found {', '.join(names) or 'none'}")
    features = {name: torch.from_numpy(feature_vectors(arrays[name], f"{path}: {name}")) for name in sorted(names)}
    counts = {name: len(x) for name, x in features.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} has {count} rows" for name, count in counts.items())
        raise InputError(f"{path}: {said}; row i of every array is one example")
    n = next(iter(counts.values()))
    held = round(hold_out * n)
    dev = max(2, round(DEV_SHARE * (n - held)))
    if held < 2 or n - held - dev < 2:
        raise InputError(f"{path}: has {n} examples, too few to hold out {hold_out:g} of them")
    datasets = []
    for k in range(splits):
        order = np.random.default_rng([seed, k]).permutation(n)
        rows = {"train": order[held + dev :], "dev": order[held : held + dev], "test": order[:held]}
        datasets.append(
            Dataset(
                printable(path.stem),
                "regression",
                {
                    part: Split(
                        {name: x[np.sort(of)] for name, x in features.items()},
                        torch.zeros(len(of)),
                        [f"{i} of cut {k}" for i in np.sort(of)],
                        {"group": [str(i) for i in np.sort(of)]},
                    )
                    for part, of in rows.items()
                },
                "dev",
                notes=[UNLABELLED],
                provenance={**identity, "splits": splits, "hold_out": hold_out, "seed": seed},
            )
        )
    return datasets
