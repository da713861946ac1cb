"""Split-conformal prediction for every task: sets of labels, abstention, intervals.

Scores of n calibration examples: 1 - p_y of classes (LAC; Sadinle, Lei & Wasserman 2019), |y - prediction| of values
(Lei et al. 2018). With q their ceil((n + 1) coverage)-th smallest, a new example that is exchangeable with them (their
joint distribution does not depend on their order) has a score of at most q with probability at least `coverage`, on
average over draws of calibration and new examples. Not promised: the same coverage in every class or region, nor
anything where the new examples are drawn differently. Several labels or values are covered each on its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmfusion.dataset import Task
from mmfusion.metrics.calibration import conformal_quantile, label_scores


class LabelSets(NamedTuple):
    """Sets of labels on N examples."""

    prediction: np.ndarray
    """(N,) the likeliest class, or (N, O) of labels"""
    sets: np.ndarray
    """bool: (N, C) which classes are in the set; of labels (N, O, 2) whether "absent" and "present" are"""
    abstains: np.ndarray
    """bool, shape of `prediction`: the set does not hold exactly one class, so no single one can be given"""


class Intervals(NamedTuple):
    """Intervals of values on N examples, (N,) or (N, O) each; infinite where too few examples calibrate."""

    prediction: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Conformal:
    """Calibration scores of one task."""

    task: Task
    scores: np.ndarray
    """(n,), or (n, O) of several labels or values"""

    @classmethod
    def fit(cls, predictions: np.ndarray, target: np.ndarray, task: Task) -> "Conformal":
        """Scores of calibration examples.

        Args:
            predictions: (n,) or (n, O), as `mmfusion.metrics.tasks.probabilities` gives them.
            target: as in `mmfusion.dataset.Split`.

        Raises ValueError for shapes that do not fit, no example, or values that are not finite.
        """
        p, y = np.asarray(predictions, np.float64), np.asarray(target, np.float64)
        if y.shape != (p.shape[:1] if task == "multiclass" else p.shape) or not y.size:
            raise ValueError(f"predictions {p.shape} and target {y.shape} do not fit, or are empty")
        if not (np.isfinite(p).all() and np.isfinite(y).all()):
            raise ValueError("predictions or target hold NaN or infinity")
        if task == "regression":
            return cls(task, np.abs(y - p))
        scores = _label_scores(p, task)
        return cls(task, np.take_along_axis(scores, y.astype(int)[..., None], -1)[..., 0])

    def label_sets(self, p: np.ndarray, coverage: float) -> LabelSets:
        """Sets for probabilities p (N,) of class 1, (N, C), or (N, O) of labels.

        With fewer than coverage / (1 - coverage) calibration examples every set holds all labels: nothing less keeps
        the promise. Raises ValueError for a coverage outside (0, 1), and for a regression.
        """
        if self.task == "regression":
            raise ValueError("a regression has intervals, no sets of labels")
        scores = _label_scores(np.asarray(p, np.float64), self.task)  # (..., C)
        sets = scores <= self._quantile(coverage)[..., None]
        return LabelSets(scores.argmin(-1), sets, sets.sum(-1) != 1)

    def intervals(self, values: np.ndarray, coverage: float) -> Intervals:
        """Intervals about a regression's values (N,) or (N, O). Raises ValueError as `label_sets`."""
        if self.task != "regression":
            raise ValueError("classes have sets of labels, no intervals")
        values, quantile = np.asarray(values, np.float64), self._quantile(coverage)
        return Intervals(values, values - quantile, values + quantile)

    def _quantile(self, coverage: float) -> np.ndarray:
        if not 0 < coverage < 1:
            raise ValueError(f"coverage {coverage}: give a share between 0 and 1, such as .9")
        return np.asarray(conformal_quantile(self.scores, 1 - coverage))


def _label_scores(p: np.ndarray, task: Task) -> np.ndarray:
    """(..., C) scores 1 - p of every label; two of a binary or multilabel target, "absent" first."""
    return 1 - p if task == "multiclass" else label_scores(p)
