"""Outcomes of a study as one number for each example, whose mean is the score: so that every score has one inference.

Accuracy, log loss and absolute error are means over examples as they stand. AUROC and Pearson's correlation are not;
their linearisation about the sample is (DeLong, DeLong and Clarke-Pearson, Biometrics 1988: placement values; for the
correlation Devlin, Gnanadesikan and Kettenring, Biometrika 1975). Its mean is the score exactly, its spread over
examples that of the score to first order.
"""

from typing import Literal, get_args

import numpy as np
from scipy.stats import rankdata

from mmfusion.dataset import Task
from mmfusion.metrics.scores import example_losses, example_scores

Outcome = Literal["auroc", "log_loss", "accuracy", "mae", "correlation", "squared_error"]
PRIMARY: dict[Task, tuple[Outcome, Outcome]] = {
    "binary": ("auroc", "log_loss"),
    "multiclass": ("auroc", "log_loss"),
    "multilabel": ("auroc", "log_loss"),
    "regression": ("mae", "correlation"),
}
"""what a study's claims are tested on"""
EFFECTS: dict[Outcome, float] = {
    "auroc": 0.01,
    "log_loss": 0.01,
    "accuracy": 0.01,
    "mae": 0.01,
    "correlation": 0.02,
    "squared_error": 0.01,
}
"""smallest difference of interest; errors in standard deviations of the target, losses in nats"""
WORDS: dict[Outcome, str] = {
    "auroc": "AUROC",
    "log_loss": "log loss",
    "accuracy": "accuracy",
    "mae": "MAE / std",
    "correlation": "correlation",
    "squared_error": "squared error / variance",
}


def as_reported(values: np.ndarray, outcome: Outcome) -> np.ndarray:
    """Values of which the larger are better in the sign that they are reported in: losses and errors positive."""
    return -values if outcome in ("log_loss", "mae", "squared_error") else values


def example_outcome(predictions: np.ndarray, target: np.ndarray, task: Task, outcome: Outcome) -> np.ndarray:
    """Each example's share of an outcome, larger is better: losses and errors are negative.

    Args:
        predictions: logits (S, N), (S, N, C) of classes or (S, N, O) of labels, or a regression's values.
        target: as in `mmfusion.dataset.Split`.
        outcome: auroc, log_loss and accuracy of classes (AUROC of several: each against the rest, mean over classes or
            labels); mae, correlation and squared_error of a regression (mean over its outputs).

    Returns:
        (S, N); the mean over examples is the score.

    Raises ValueError for an outcome that the task does not have, and where the AUROC meets one class alone.
    """
    of_values = outcome in ("mae", "correlation", "squared_error")
    if outcome not in get_args(Outcome) or of_values != (task == "regression"):
        raise ValueError(f"a {task} target has no outcome {outcome!r}")
    if outcome in ("accuracy", "mae"):
        return example_scores(predictions, target, task)
    if outcome in ("log_loss", "squared_error"):
        return -example_losses(predictions, target, task)
    predictions, target = np.asarray(predictions, np.float64), np.asarray(target, np.float64)
    if outcome == "correlation":
        columns = target.reshape(len(target), -1).T
        values = predictions.reshape(*predictions.shape[:2], -1)
        return np.mean([example_correlation(values[..., k], column) for k, column in enumerate(columns)], axis=0)
    if task == "binary":
        return example_auroc(predictions, target)
    if task == "multilabel":
        return np.mean([example_auroc(predictions[..., k], column) for k, column in enumerate(target.T)], axis=0)
    # log odds of a class against the rest keep the order of its probability
    largest = predictions.max(-1, keepdims=True)
    shares = np.exp(predictions - largest)
    shares /= shares.sum(-1, keepdims=True)
    classes = np.unique(target)
    return np.mean([example_auroc(shares[..., int(c)], (target == c).astype(float)) for c in classes], axis=0)


def example_auroc(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """AUROC by examples: A + (V_i - A) / share of the class of i, V_i the placement value of example i.

    V_i is the share of the other class that example i is on the right side of, ties counted half; its mean over either
    class is A, the AUROC.

    Args:
        scores: (S, N); target: (N,) of 0 and 1.

    Returns:
        (S, N), whose mean over examples is the AUROC of each member.

    Raises ValueError where one class is absent.
    """
    positive = np.asarray(target) == 1
    count, size = int(positive.sum()), positive.size
    if count in (0, size):
        raise ValueError(f"target of {size} examples holds one class alone: AUROC is not defined")
    ranks = rankdata(scores, axis=-1)  # among all
    placement = np.empty(ranks.shape)
    for own, others in ((positive, size - count), (~positive, count)):
        below = ranks[..., own] - rankdata(scores[..., own], axis=-1)  # of the other class, ties half
        placement[..., own] = below / others
    placement[..., ~positive] = 1 - placement[..., ~positive]
    auroc = placement[..., positive].mean(-1, keepdims=True)
    share = np.where(positive, count / size, 1 - count / size)
    return auroc + (placement - auroc) / share


def example_correlation(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson's r by examples: r + x y - r (x^2 + y^2) / 2, x and y standardised; its mean is r.

    Args:
        values: (S, N); target: (N,).

    Returns:
        (S, N); 0 throughout for a member whose values, or a target which, are constant.
    """
    y = target - target.mean()
    x = values - values.mean(-1, keepdims=True)
    spread_x, spread_y = x.std(-1, keepdims=True), y.std()
    varies = (spread_x > 1e-12) & (spread_y > 1e-12)
    x, y = x / np.where(varies, spread_x, 1.0), y / (spread_y if spread_y > 1e-12 else 1.0)
    r = (x * y).mean(-1, keepdims=True)
    return np.where(varies, r + x * y - r * (x**2 + y**2) / 2, 0.0)
