"""Sequences of feature vectors as they are: the valid steps of each example, in their order, with nothing missing.

The same rules as of `mmfusion.data.pooling`, which makes one vector of them: steps that are all zero, or beyond an
example's length, are padding; values that are not finite are missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmfusion.data.pooling import occupied_steps
from mmfusion.sequences import Sequences


@dataclass(frozen=True)
class Steps:
    """The valid steps of N examples, and what had to be put right on the way; `pooling_notes` says it."""

    features: Sequences
    """N sequences float32 (T_i, d), all finite; T_i = 0 without any valid step"""
    missing: int
    """values within valid steps that were not finite"""
    empty: int
    """examples without any valid step"""


def keep_steps(sequences: np.ndarray | Sequence[np.ndarray], valid: np.ndarray | None = None) -> Steps:
    """The valid steps of (N, T, d), or of N arrays (T_i, d).

    `valid` is bool (N, T); None: the steps that are not all zero. A value that is not finite becomes the mean of its
    coordinate over the example's other valid steps, 0 where there is none: so the mean over the steps is that of
    `pool_over_time`. Raises ValueError at other shapes.
    """
    widths = {array.shape[-1] for array in sequences}
    if len(widths) != 1 or any(array.ndim != 2 for array in sequences):
        raise ValueError(f"sequences must be (N, T, d), or N times (T, d); found widths {sorted(widths)}")
    if valid is not None and valid.shape != np.shape(sequences)[:2]:
        raise ValueError(f"valid must be (N, T) = {np.shape(sequences)[:2]}; found {valid.shape}")
    parts, missing = [], 0
    for row, array in enumerate(sequences):
        with np.errstate(over="ignore"):  # beyond float32 is as good as infinite
            x = np.asarray(array, np.float32)
        x = x[occupied_steps(x) if valid is None else valid[row]]  # a copy (T_i, d)
        finite = np.isfinite(x)
        if not finite.all():
            missing += int((~finite).sum())
            mean = np.where(finite, x, 0).sum(0, dtype=np.float64) / np.maximum(finite.sum(0), 1)  # (d,)
            x = np.where(finite, x, mean.astype(np.float32))
        parts.append(torch.from_numpy(x))
    return Steps(Sequences(parts), missing, sum(len(part) == 0 for part in parts))
