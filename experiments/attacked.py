"""Which test examples worst cases are computed on: the same of every row, few enough to attack."""

import numpy as np
from torch import Tensor

from mmfusion.data.folds import FoldedDataset

ATTACKED = 200
"""test examples at most, of all folds together, that worst cases are computed on"""


def attacked_rows(data: FoldedDataset, most: int = ATTACKED) -> list[Tensor]:
    """Rows of the pool, fold by fold: the test parts, or a random share of each that makes `most` in all."""
    rng, share = np.random.default_rng(0), min(1.0, most / len(data.test_rows))
    return [
        fold.test[np.sort(rng.permutation(len(fold.test))[: max(1, round(share * len(fold.test)))])]
        for fold in data.folds
    ]
