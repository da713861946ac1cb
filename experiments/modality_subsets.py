"""Subsets of the modalities, each trained with the others always hidden and tested without them.

Same shapes, same initial values, same batches. The pair alignment is off: it would let a left-out modality shape the
encoders of the others in training.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.metrics.outcomes import PRIMARY, example_outcome
from mmfusion.metrics.outcomes import Outcome as Score
from mmfusion.training.grid import Grid, Setting, by_fold

RANK = 4
TERMS = ("mmd", "reconstruction")
Scores = dict[Score, dict[str, np.ndarray]]
"""{outcome: {subset: (S, F)}}, larger is better"""


def label(subset: Sequence[str]) -> str:
    """Name of a subset of the modalities."""
    return "+".join(subset)


def subset_settings(names: Sequence[str], subsets: Mapping[str, tuple[str, ...]]) -> list[Setting]:
    """One setting for each of the subsets, called as they are."""
    return [
        Setting(text, RANK, TERMS, dropout={name: 1.0 for name in names if name not in subset})
        for text, subset in subsets.items()
    ]


def subset_scores(grid: Grid, subsets: Mapping[str, tuple[str, ...]], part: str) -> Scores:
    """Of the members that saw that subset alone, tested on it alone, on that part of every fold."""
    names, found = grid.data.input_dims, {}
    for outcome in PRIMARY[grid.data.task]:
        of_outcome: dict[str, np.ndarray] = {}
        for text, subset in subsets.items():
            others = [name for name in names if name not in subset]
            of_outcome[text] = by_fold(grid.data, without(grid, others, grid.index(text), outcome, part), part)
        found[outcome] = of_outcome
    return found


def without(grid: Grid, missing: Sequence[str], place: int, outcome: Score, part: str = "test") -> np.ndarray:
    """(S, n): an outcome by examples of one setting's members, tested without these modalities."""
    return grid.without(missing, [place], part, lambda *members: example_outcome(*members, outcome))[0]


def on_dev(dev: Mapping[str, np.ndarray], subsets: Sequence[str], best: bool = True) -> np.ndarray:
    """(F,) places of the subset that scores best, or worst, on each fold's own dev part, mean over seeds."""
    scores = np.stack([dev[text].mean(0) for text in subsets])  # (K, F)
    return (scores if best else -scores).argmax(0)


def chosen(test: Mapping[str, np.ndarray], subsets: Sequence[str], places: np.ndarray) -> np.ndarray:
    """(S, F): test score of the subset at that place (F,) of each fold."""
    on_test = np.stack([test[text] for text in subsets])  # (K, S, F)
    return np.stack([on_test[place, :, f] for f, place in enumerate(places)], -1)
