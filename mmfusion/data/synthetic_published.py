"""Three published generators whose truth is known, with that truth: see each function.

In all three the label is a function of what the modalities say, except where an exclusive or is left out.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch

from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError

Kind = Literal["redundancy", "uniqueness", "synergy"]
SHARES = {"train": 0.7, "dev": 0.1, "test": 0.2}
SEEN = 100  # width of what FactorCL's modalities show
FACTOR, CHANNELS = 5, 15  # Liang et al.: width of a factor, and of what a modality shows of each


def accuracy_from_share(share: float) -> float:
    """Accuracy of the sign of a Gaussian part of a centred Gaussian score, of that share of its variance.

    1 - arccos(sqrt(share)) / pi. Raises ValueError outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the variance lies in [0, 1], not {share}")
    return 1 - math.acos(math.sqrt(share)) / math.pi


# ---- exclusive or of three -------------------------------------------------------------------------------------------


def xor_of_three(p: float = 0.5, d: int = 3, n: int = 10_000, seed: int = 0) -> Dataset:
    """Which b is it, given a and c? a, b ~ Bern(1/2)^d, i ~ Bern(p), c = a xor b if i, else a (Saporta et al., 2024).

    No two of the three say anything of each other unless the third is known (but that a = c where i is 0).

    Args:
        p: how often the exclusive or is taken.
        d: number of bits, 1 to 8; b is one of 2^d classes, numbered in binary, first bit first.

    Returns:
        Modalities a and c (n, d) of 0 and 1, seven tenths of them in train, one in dev, two in test.

    Raises InputError for p, d or n out of range.
    """
    _check({"p": (p, 0, 1), "d": (d, 1, 8), "n": (n, 20, 10**8)})
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (2, n, d))
    taken = rng.random((n, 1)) < p
    c = np.where(taken, a ^ b, a)
    number = b @ (1 << np.arange(d)[::-1])
    names = tuple(format(k, f"0{d}b") for k in range(2**d))
    return _dataset("xor of three", {"a": a, "c": c}, number, "multiclass", {"p": p, "d": d, "seed": seed}, names)


def xor_accuracy(p: float, d: int = 3) -> float:
    """Best accuracy on `xor_of_three`: 2^-d + p (1 - 2^-d).

    Where c differs from a (probability p (1 - 2^-d)) b is a xor c; where it does not, 0 is the likeliest b, or among
    them, and right with probability 2^-d of all.
    """
    return 2.0**-d + p * (1 - 2.0**-d)


# ---- shared and unique -----------------------------------------------------------------------------------------------


def shared_and_unique(n: int = 30_000, seed: int = 0) -> Dataset:
    """Label by the mean of a shared and two unique factors (FactorCL; Liang et al., 2023).

    w_s in R^10, w_1 and w_2 in R^6 ~ N(0, I / 2), x_i = [w_s, w_i] T_i in R^100, T ~ U(0, 1), y = [mean of all >= 0].
    Everything is in x_1 and x_2 together, so they decide y. Best accuracy from w_s alone:
    `accuracy_from_share(10 / 22)` = .736; from one modality, (10 + 6) / 22: .825.

    Returns:
        Modalities x1 and x2 (n, 100), seven tenths of them in train, one in dev, two in test.

    Raises InputError for n out of range.
    """
    _check({"n": (n, 20, 10**8)})
    rng = np.random.default_rng(seed)
    shared, *own = (rng.normal(0, 0.5**0.5, (n, width)) for width in (10, 6, 6))
    seen = [np.concatenate([shared, one], 1) for one in own]
    features = {f"x{k}": w @ rng.random((w.shape[1], SEEN)) for k, w in enumerate(seen, 1)}
    target = np.concatenate([shared, *own], 1).mean(1) >= 0
    return _dataset("shared and unique", features, target, "binary", {"seed": seed})


# ---- redundant, unique, synergic -------------------------------------------------------------------------------------


def redundant_unique_synergic(kind: Kind, n: int = 10_000, seed: int = 0) -> Dataset:
    """Label by the mean of the factor that both modalities carry, that one carries, or of both unique ones together.

    z_1, z_2, z_c in R^5 ~ N(0, 1.5 I), x_i = [z_i T_i, z_c T_c], T ~ U(0, 1), 5 x 15 (after Liang et al., 2023).
    y = [mean of the relevant z > 0]: of z_c (redundancy), z_1 (uniqueness), z_1 and z_2 (synergy). That synergy needs
    both modalities, and yet it is *additive*: a sum of what each says is enough, and no product takes part.

    Returns:
        Modalities x1 and x2 (n, 30), seven tenths of them in train, one in dev, two in test.

    Raises InputError for another kind, or n out of range.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind {kind!r}: give {' or '.join(get_args(Kind))}")
    _check({"n": (n, 20, 10**8)})
    rng = np.random.default_rng(seed)
    first, second, common = rng.normal(0, 1.5**0.5, (3, n, FACTOR))
    maps = rng.random((3, FACTOR, CHANNELS))
    features = {
        f"x{k}": np.concatenate([own @ mixing, common @ maps[2]], 1)
        for k, (own, mixing) in enumerate(zip((first, second), maps, strict=False), 1)
    }
    relevant = {"redundancy": [common], "uniqueness": [first], "synergy": [first, second]}[kind]
    target = np.concatenate(relevant, 1).mean(1) > 0
    return _dataset(kind, features, target, "binary", {"kind": kind, "seed": seed})


def alone_accuracy(kind: Kind) -> dict[str, float]:
    """Best accuracy from each modality of `redundant_unique_synergic` alone; from both it is 1."""
    shares = {"redundancy": (1.0, 1.0), "uniqueness": (1.0, 0.0), "synergy": (0.5, 0.5)}[kind]
    return {f"x{k}": accuracy_from_share(share) for k, share in enumerate(shares, 1)}


# ---- common ----------------------------------------------------------------------------------------------------------


def _check(values: dict[str, tuple[float, float, float]]) -> None:
    """Raise InputError for the first {name: (value, least, most)} out of range."""
    for name, (value, least, most) in values.items():
        whole = name == "p" or isinstance(value, int)
        if isinstance(value, bool) or not whole or not least <= value <= most:  # NaN too
            raise InputError(f"{name} {value}: give a {'' if name == 'p' else 'whole '}number from {least} to {most}")


def _dataset(
    name: str,
    features: dict[str, np.ndarray],
    target: np.ndarray,
    task: Literal["binary", "multiclass"],
    options: dict[str, object],
    class_names: tuple[str, ...] = Dataset.class_names,
) -> Dataset:
    """Rows in the order of their draw, cut into train, dev and test."""
    splits, start = {}, 0
    ends = {"train": round(SHARES["train"] * len(target)), "test": len(target)}
    ends["dev"] = ends["train"] + round(SHARES["dev"] * len(target))
    for split in SHARES:
        rows = slice(start, ends[split])
        start = rows.stop
        splits[split] = Split(
            {modality: torch.from_numpy(x[rows].astype(np.float32)) for modality, x in features.items()},
            torch.from_numpy(target[rows].astype(np.float32)),
            [f"{split}_{row}" for row in range(rows.stop - rows.start)],
        )
    return Dataset(name, task, splits, "dev", provenance={"options": options}, class_names=class_names)
