"""Scores with their spread: over seeds (training noise) and over examples (sampling noise).

The two answer different questions. The standard deviation over seeds says how much the training varies on these very
examples; the bootstrap interval over examples says how far the score may be from that of the population (Efron &
Tibshirani 1993, percentile interval). Examples are resampled once for all members together, so that the interval is
that of the members' mean score. Per-example scores and losses are what paired differences between two settings are
made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
from scipy.special import logsumexp
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from mmfusion.dataset import Task

RESAMPLES = 1000
ECE_BINS = 15
BINARY_SCORES = ("auroc", "accuracy", "f1")
SENTIMENT = (-3.0, 3.0)
"""label range of CMU-MOSI and CMU-MOSEI sentiment: the one for which the field counts classes as well"""


@dataclass(frozen=True)
class Score:
    """One score of S members on N examples."""

    mean: float
    std: float | None
    """standard deviation over the members (n - 1 in the denominator); None for one member"""
    low: float
    high: float
    """95 % bootstrap interval over examples, of the members' mean"""
    members: list[float]
    examples: int


def binary_scores(
    probabilities: np.ndarray,
    target: np.ndarray,
    seed: int = 0,
    names: Sequence[str] = BINARY_SCORES,
    resamples: int = RESAMPLES,
) -> dict[str, Score]:
    """AUROC, accuracy and F1 (of the positive class, threshold 1/2) of every member.

    Args:
        probabilities: (S, N) in [0, 1].
        target: (N,) of 0 and 1.
        seed: of the resampling.
        names: which scores, in the order of the result: "auroc", "accuracy", "f1", also "weighted_f1" (mean of both
            classes' F1 by their share of the target, scikit-learn's average="weighted"), "balanced_accuracy", and,
            smaller is better, "log_loss" (natural logarithm), "brier" and "ece".
        resamples: 0 leaves out the interval, which takes most of the time: it is NaN.

    Raises ValueError for an unknown name, and where AUROC is asked for and target holds one class alone: it does not
    exist then.
    """
    probabilities, target = np.atleast_2d(np.asarray(probabilities, np.float64)), np.asarray(target).astype(int)
    if unknown := set(names) - set(_BINARY):
        raise ValueError(f"no binary score is called {sorted(unknown)}: there are {list(_BINARY)}")
    if "auroc" in names and len(np.unique(target)) < 2:
        raise ValueError(f"target of {target.size} examples holds one class alone: AUROC is not defined")
    counts = bootstrap_counts(target.size, seed, resamples)  # (resamples, N)
    scores = {}
    for name in names:
        value, resampled = _BINARY[name]
        values = [value(p, target) for p in probabilities]
        scores[name] = summarise_score(
            values, np.mean([resampled(p, target, counts) for p in probabilities], 0), target.size
        )
    return scores


def regression_scores(
    predictions: np.ndarray,
    target: np.ndarray,
    seed: int = 0,
    label_range: tuple[float, float] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Score]:
    """Mean absolute error and Pearson correlation of every member; for sentiment also the field's class scores.

    "mae" is the mean over examples and outputs, "correlation" the mean over outputs of each output's Pearson
    correlation, where an output whose prediction or target is constant counts 0.

    With label_range (-3, 3), CMU-MOSI's and CMU-MOSEI's sentiment, as in Zadeh et al. (2017) and after them:
    "accuracy_7" (both clipped to [-3, 3] and rounded, halves to even), "accuracy_2_has0" and "f1_has0" (negative
    against the rest: >= 0), "accuracy_2_non0" and "f1_non0" (negative against positive, examples whose target is
    exactly 0 left out; a prediction of 0 counts as negative). F1 is the mean of both classes' by their share of the
    target. Any other range adds nothing.

    Args:
        predictions: (S, N) or (S, N, O).
        target: (N,) or (N, O).
        seed: of the resampling; the same examples are drawn for all members and all scores.
        label_range: lowest and highest label that the annotation allows.
        resamples: 0 leaves out the interval: it is NaN.

    Raises ValueError where the shapes do not fit, a value is not finite, sentiment has more than one output, or every
    sentiment is 0.
    """
    predictions, target = _fitting(predictions, target)
    members, examples = predictions.shape[:2]
    x, y = predictions.reshape(members, examples, -1), target.reshape(examples, -1)  # (S, N, O), (N, O)
    # one row of ones for the score itself, and one per resample
    weights = np.vstack([np.ones(examples), bootstrap_counts(examples, seed, resamples)])  # (1 + resamples, N)
    errors = np.abs(x - y).mean(-1)  # (S, N)
    columns = {  # (S, 1 + resamples) each, and on how many examples
        "mae": (errors @ weights.T / examples, examples),
        "correlation": (np.stack([weighted_correlation(p, y, weights).mean(1) for p in x]), examples),
    }
    if label_range is not None and tuple(label_range) == SENTIMENT:
        columns |= _sentiment_columns(x, y, weights)
    return {name: summarise_score(list(c[:, 0]), c[:, 1:].mean(0), n) for name, (c, n) in columns.items()}


def example_scores(predictions: np.ndarray, target: np.ndarray, task: Task) -> np.ndarray:
    """Every example's share of an additive score, larger is better: their mean is the accuracy, or minus the MAE.

    Args:
        predictions: binary: logits (S, N); multiclass: logits (S, N, C); multilabel: logits (S, N, O); regression:
            (S, N) or (S, N, O).
        target: binary: (N,) of 0 and 1; multiclass: (N,) class numbers; multilabel: (N, O) of 0 and 1; regression:
            (N,) or (N, O).
        task: one of `mmfusion.dataset.Task`.

    Returns:
        (S, N): 1 where the sign of the logit is right (a logit of 0 says 1), or the largest logit is that of the class,
        and else 0; the share of the labels that are right; or minus the absolute error, mean over outputs.

    Raises ValueError for an unknown task, shapes that do not fit, or values that are not finite or no classes.
    """
    predictions, target = _for_task(predictions, target, task)
    if task == "multiclass":
        return (predictions.argmax(-1) == target).astype(np.float64)
    if task in ("binary", "multilabel"):
        right = ((predictions >= 0) == (target == 1)).astype(np.float64)
        return right if task == "binary" else right.mean(-1)
    return -np.abs(predictions - target).reshape(*predictions.shape[:2], -1).mean(-1)


def example_losses(predictions: np.ndarray, target: np.ndarray, task: Task) -> np.ndarray:
    """Every example's loss: cross-entropy of the logits (mean over labels), or squared error, mean over outputs.

    Args and errors as for `example_scores`. Returns (S, N), natural logarithm.
    """
    predictions, target = _for_task(predictions, target, task)
    if task == "multiclass":
        own = np.take_along_axis(predictions, target.astype(int)[None, :, None], -1)[..., 0]
        return logsumexp(predictions, axis=-1) - own
    if task in ("binary", "multilabel"):
        # log(1 + exp(-m)) of the margin m: exact for any logit, where log(sigmoid) would underflow
        losses = np.logaddexp(0.0, (1 - 2 * target) * predictions)
        return losses if task == "binary" else losses.mean(-1)
    return np.square(predictions - target).reshape(*predictions.shape[:2], -1).mean(-1)


@lru_cache(maxsize=1)  # drawing takes longer than what is done with the draws, and many scores ask for the same
def bootstrap_counts(examples: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each example is drawn in each resample: (resamples, examples), read-only; rows sum to `examples`."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(examples, np.full(examples, 1 / examples), size=resamples).astype(np.float64)
    counts.setflags(write=False)
    return counts


def weighted_auroc(scores: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of one member under many weightings of the examples at once, ties counted half.

    One sort for all weightings: scikit-learn's `roc_auc_score(..., sample_weight=w)` sorts anew for each.

    Args:
        scores: (N,); target: (N,) of 0 and 1; weights: (K, N), not negative.

    Returns:
        (K,); NaN where a weighting leaves one class without weight.
    """
    order = np.argsort(scores, kind="stable")
    _, group = np.unique(scores[order], return_inverse=True)  # equal scores form one group
    starts = np.flatnonzero(np.r_[True, np.diff(group) > 0])
    w, y = weights[:, order], target[order]
    positive = np.add.reduceat(w * y, starts, axis=1)  # (K, groups)
    negative = np.add.reduceat(w * (1 - y), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2  # negatives below each group, plus half of those level with it
    pairs = positive.sum(1) * negative.sum(1)
    return np.divide((positive * below).sum(1), pairs, out=np.full(len(w), np.nan), where=pairs > 0)


def weighted_correlation(predictions: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation of every output under many weightings of the examples at once.

    Args:
        predictions: (N, O); target: (N, O); weights: (K, N), not negative, every row with a positive sum.

    Returns:
        (K, O); 0 where a weighting leaves a constant prediction or target.
    """
    x, y = predictions - predictions.mean(0), target - target.mean(0)  # else the moments below would cancel
    w = weights / weights.sum(1, keepdims=True)
    xx, yy = w @ x**2, w @ y**2  # (K, N) @ (N, O) -> (K, O)
    mean_x, mean_y = w @ x, w @ y
    variance_x, variance_y = xx - mean_x**2, yy - mean_y**2
    varies = (variance_x > 1e-12 * xx) & (variance_y > 1e-12 * yy)  # relative: rounding leaves about 1e-16
    scale = np.sqrt(np.where(varies, variance_x * variance_y, 1.0))
    return np.where(varies, np.clip((w @ (x * y) - mean_x * mean_y) / scale, -1, 1), 0.0)


def _sentiment_columns(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    if y.shape[1] != 1:
        raise ValueError(f"sentiment is one number per example, not target of shape {y.shape}")
    x, y = x[..., 0], y[:, 0]  # (S, N), (N,)
    signed = y != 0
    if not signed.any():
        raise ValueError(f"every one of the {y.size} sentiments is 0: positive against negative has no examples")
    classes = np.round(np.clip(x, *SENTIMENT)) == np.round(np.clip(y, *SENTIMENT))
    return {
        "accuracy_7": (classes @ weights.T / y.size, y.size),
        **_two_classes("has0", x >= 0, y >= 0, weights),
        **_two_classes("non0", x[:, signed] > 0, y[signed] > 0, weights[:, signed]),
    }


def _two_classes(
    suffix: str, guesses: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> dict[str, tuple[np.ndarray, int]]:
    guesses, target = guesses.astype(int), target.astype(int)
    total = weights.sum(1)
    hits = (guesses == target) @ weights.T  # (S, N) @ (N, K) -> (S, K)
    accuracy = np.divide(hits, total, out=np.full(hits.shape, np.nan), where=total > 0)
    f1 = np.stack([_mean_f1(g, target, weights) for g in guesses])
    return {f"accuracy_2_{suffix}": (accuracy, target.size), f"f1_{suffix}": (f1, target.size)}


def _fitting(predictions: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predictions, target = np.asarray(predictions, np.float64), np.asarray(target, np.float64)
    if target.ndim not in (1, 2) or predictions.shape[1:] != target.shape or not predictions.size:
        raise ValueError(
            f"predictions {predictions.shape} and target {target.shape} do not fit: "
            "(S, N) goes with (N,), (S, N, O) with (N, O), none of them empty"
        )
    if not (np.isfinite(predictions).all() and np.isfinite(target).all()):
        raise ValueError(f"predictions {predictions.shape} or target {target.shape} hold NaN or infinity")
    return predictions, target


def _for_task(predictions: np.ndarray, target: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    if task not in get_args(Task):
        raise ValueError(f"task is one of {', '.join(get_args(Task))}, not {task!r}")
    if task == "multiclass":
        predictions, target = np.asarray(predictions, np.float64), np.asarray(target, np.float64)
        if predictions.ndim != 3 or predictions.shape[1:2] != target.shape or not predictions.size:
            raise ValueError(f"logits {predictions.shape} and target {target.shape} do not fit: (S, N, C) with (N,)")
        if not np.isfinite(predictions).all() or not np.isin(target, np.arange(predictions.shape[2])).all():
            raise ValueError(f"logits {predictions.shape} hold NaN or infinity, or target holds no class numbers")
        return predictions, target
    predictions, target = _fitting(predictions, target)
    if task == "binary" and (target.ndim != 1 or not np.isin(target, (0, 1)).all()):
        raise ValueError(f"a binary target is (N,) of 0 and 1; this one of shape {target.shape} is not")
    if task == "multilabel" and (target.ndim != 2 or not np.isin(target, (0, 1)).all()):
        raise ValueError(f"a multilabel target is (N, O) of 0 and 1; this one of shape {target.shape} is not")
    return predictions, target


def _guess(p: np.ndarray) -> np.ndarray:
    return (p >= 0.5).astype(int)


def _f1(guess: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits = weights @ (guess * target)
    total = weights @ (guess + target)
    return np.divide(2 * hits, total, out=np.zeros(len(weights)), where=total > 0)


def _mean_f1(guess: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of both classes' F1 by their share of the target; NaN where there is no weight at all."""
    total = weights.sum(1)
    share = np.divide(weights @ target, total, out=np.full(len(weights), np.nan), where=total > 0)
    return share * _f1(guess, target, weights) + (1 - share) * _f1(1 - guess, 1 - target, weights)


def _balanced_accuracy(guess: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of both classes' recall; NaN where a weighting leaves one class without weight."""
    recall = []
    for label in (0, 1):
        there = weights @ (target == label)
        hits = weights @ ((target == label) & (guess == label))
        recall.append(np.divide(hits, there, out=np.full(len(weights), np.nan), where=there > 0))
    return np.mean(recall, 0)


def weighted_ece(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error in 15 bins of equal width, under many weightings of the examples at once.

    Args:
        confidence: (N,) in [0, 1]; right: (N,) of 0 and 1: what came true; weights: (K, N), not negative.

    Returns:
        (K,): mean over bins of |sum of (confidence - right)|.
    """
    place = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = weights @ (np.eye(ECE_BINS)[place] * (confidence - right)[:, None])  # (K, bins)
    return np.abs(gaps).sum(1) / weights.sum(1)


def _log_losses(p: np.ndarray, target: np.ndarray) -> np.ndarray:
    edge = np.finfo(np.float64).eps  # as scikit-learn clips: a certain error costs 36, not infinity
    return -np.log(np.clip(np.where(target == 1, p, 1 - p), edge, 1 - edge))


_Value = Callable[[np.ndarray, np.ndarray], float]
_Resampled = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
_BINARY: dict[str, tuple[_Value, _Resampled]] = {  # of p (N,) and target (N,); and under weights (K, N)
    "auroc": (lambda p, y: roc_auc_score(y, p), weighted_auroc),
    "accuracy": (lambda p, y: accuracy_score(y, _guess(p)), lambda p, y, w: w @ (_guess(p) == y) / y.size),
    "f1": (lambda p, y: f1_score(y, _guess(p), zero_division=0.0), lambda p, y, w: _f1(_guess(p), y, w)),
    "weighted_f1": (
        lambda p, y: f1_score(y, _guess(p), average="weighted", zero_division=0.0),
        lambda p, y, w: _mean_f1(_guess(p), y, w),
    ),
    "balanced_accuracy": (
        lambda p, y: balanced_accuracy_score(y, _guess(p)),
        lambda p, y, w: _balanced_accuracy(_guess(p), y, w),
    ),
    "brier": (lambda p, y: np.square(p - y).mean(), lambda p, y, w: w @ np.square(p - y) / y.size),
    "ece": (
        lambda p, y: float(weighted_ece(p, y, np.ones((1, y.size)))[0]),
        lambda p, y, w: weighted_ece(p, y, w),
    ),
    "log_loss": (lambda p, y: _log_losses(p, y).mean(), lambda p, y, w: w @ _log_losses(p, y) / y.size),
}


def summarise_score(values: list[float], resampled: np.ndarray, examples: int) -> Score:
    """The Score of members' values (S,) and of their mean in every resample (K,); resamples without one are NaN."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5]) if resampled.size else (np.nan, np.nan)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Score(float(np.mean(values)), std, float(low), float(high), [float(v) for v in values], examples)
