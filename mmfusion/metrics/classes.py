"""Scores of multiclass and multilabel predictions with their bootstrap intervals over examples; ensembles of classes.

S members, N examples, C classes or labels, K weightings of the examples. Each score is defined under weights, so that
a resample of the examples is one row of weights; at equal weights it is scikit-learn's of the same name.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

from mmfusion.metrics.scores import RESAMPLES, Score, bootstrap_counts, summarise_score, weighted_auroc, weighted_ece

MULTICLASS_SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "auroc", "log_loss", "brier", "ece")
MULTILABEL_SCORES = ("map", "auroc", "macro_f1", "subset_accuracy", "log_loss", "brier", "ece")
EDGE = np.finfo(np.float64).eps  # as scikit-learn clips: a certain error costs 36, not infinity


def multiclass_scores(
    probabilities: np.ndarray,
    target: np.ndarray,
    seed: int = 0,
    names: Sequence[str] = MULTICLASS_SCORES,
    resamples: int = RESAMPLES,
) -> dict[str, Score]:
    """Scores of every member's class probabilities.

    "auroc" is the mean over classes of one class against the rest, "macro_f1" that of F1, "weighted_f1" weighs each
    class by its share of the target; classes that a resample lacks are left out of a mean. "brier" is the sum over
    classes of squared errors, "ece" the expected calibration error of the likeliest class (15 bins of equal width).

    Args:
        probabilities: (S, N, C), rows sum to 1.
        target: (N,) class numbers 0 .. C - 1.
        seed: of the resampling; the same examples are drawn for all members and all scores.
        names: which scores, in the order of the result.
        resamples: 0 leaves out the interval, which takes most of the time: it is NaN.

    Raises ValueError for an unknown name, shapes that do not fit, or class numbers that are not there.
    """
    p, target = np.asarray(probabilities, np.float64), np.asarray(target)
    if p.ndim != 3 or target.shape != p.shape[1:2] or not target.size:
        raise ValueError(f"probabilities {p.shape} and target {target.shape} do not fit: (S, N, C) goes with (N,)")
    classes = target.astype(int)
    if (classes != target).any() or classes.min() < 0 or classes.max() >= p.shape[2]:
        raise ValueError(f"target holds values that are no class numbers from 0 to {p.shape[2] - 1}")
    hot = np.eye(p.shape[2])[classes]  # (N, C)
    weights = _weightings(len(hot), seed, resamples)
    return _scores(p, hot, weights, names, _MULTICLASS)


def multilabel_scores(
    probabilities: np.ndarray,
    target: np.ndarray,
    seed: int = 0,
    names: Sequence[str] = MULTILABEL_SCORES,
    resamples: int = RESAMPLES,
) -> dict[str, Score]:
    """Scores of every member's label probabilities, each label's own threshold 1/2.

    "map" is the mean over labels of average precision; "auroc", "macro_f1", "log_loss", "brier" and "ece" are means
    over labels of the binary scores; labels that a resample has no positive (or no negative) example of are left out
    of "map" and "auroc". "subset_accuracy" counts the examples of which every label is right.

    Args:
        probabilities: (S, N, C) in [0, 1].
        target: (N, C) of 0 and 1.
        seed, names, resamples: as for `multiclass_scores`.

    Raises ValueError for an unknown name, shapes that do not fit, or other labels.
    """
    p, target = np.asarray(probabilities, np.float64), np.asarray(target, np.float64)
    if p.ndim != 3 or target.shape != p.shape[1:] or not target.size:
        raise ValueError(f"probabilities {p.shape} and target {target.shape} do not fit: (S, N, C) goes with (N, C)")
    if not np.isin(target, (0, 1)).all():
        raise ValueError("a multilabel target is of 0 and 1")
    weights = _weightings(len(target), seed, resamples)
    return _scores(p, target, weights, names, _MULTILABEL)


_Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # p (N, C), hot (N, C), weights (K, N) -> (K,)


def _weightings(examples: int, seed: int, resamples: int) -> np.ndarray:
    """(1 + resamples, N): a row of ones for the score itself, and one row for each resample."""
    return np.vstack([np.ones(examples), bootstrap_counts(examples, seed, resamples)])


def _scores(
    p: np.ndarray, hot: np.ndarray, weights: np.ndarray, names: Sequence[str], table: dict[str, _Weighted]
) -> dict[str, Score]:
    if unknown := set(names) - set(table):
        raise ValueError(f"no score is called {sorted(unknown)}: there are {list(table)}")
    scores = {}
    for name in names:
        columns = np.stack([table[name](member, hot, weights) for member in p])  # (S, 1 + resamples)
        scores[name] = summarise_score(list(columns[:, 0]), columns[:, 1:].mean(0), len(hot))
    return scores


# ---- under weights -----------------------------------------------------------------------------------------------


def weighted_average_precision(scores: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of one member under many weightings of the examples at once, equal scores as one threshold.

    Args:
        scores: (N,); target: (N,) of 0 and 1; weights: (K, N), not negative.

    Returns:
        (K,); NaN where a weighting leaves no positive example.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    w, y = weights[:, order], target[order]
    positive = np.add.reduceat(w * y, starts, axis=1)  # (K, thresholds)
    found, seen = positive.cumsum(1), np.add.reduceat(w, starts, axis=1).cumsum(1)
    precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
    total = found[:, -1]
    return np.divide((positive * precision).sum(1), total, out=np.full(len(w), np.nan), where=total > 0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _mean_of_columns(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over classes (C of (K,)), those that are not defined left out; NaN where none is."""
    values = np.stack(columns)
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(0), defined.sum(0))


def _chosen(p: np.ndarray) -> np.ndarray:
    return np.eye(p.shape[1])[p.argmax(1)]  # (N, C)


def _f1(guess: np.ndarray, hot: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(K, C); NaN where a class is neither guessed nor there."""
    return _ratio(2 * weights @ (guess * hot), weights @ (guess + hot))


def _macro_f1(guess: np.ndarray, hot: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean_of_columns(_f1(guess, hot, weights).T)


def _weighted_f1(guess: np.ndarray, hot: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights @ hot * np.nan_to_num(_f1(guess, hot, weights))).sum(1) / weights.sum(1)


def _recall(guess: np.ndarray, hot: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean_of_columns(_ratio(weights @ (guess * hot), weights @ hot).T)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(1)


def _per_label(score: _Weighted) -> _Weighted:
    """The mean over labels of a score of one label, of (N,) and (N,)."""
    return lambda p, hot, w: _mean_of_columns([score(p[:, c], hot[:, c], w) for c in range(p.shape[1])])


def _log_losses(p: np.ndarray, hot: np.ndarray) -> np.ndarray:
    return -np.log(np.clip(np.where(hot == 1, p, 1 - p), EDGE, 1 - EDGE)).mean(1)


_MULTICLASS: dict[str, _Weighted] = {
    "accuracy": lambda p, hot, w: _mean((_chosen(p) * hot).sum(1), w),
    "balanced_accuracy": lambda p, hot, w: _recall(_chosen(p), hot, w),
    "macro_f1": lambda p, hot, w: _macro_f1(_chosen(p), hot, w),
    "weighted_f1": lambda p, hot, w: _weighted_f1(_chosen(p), hot, w),
    "auroc": _per_label(weighted_auroc),
    "log_loss": lambda p, hot, w: _mean(-np.log(np.clip((p * hot).sum(1), EDGE, 1)), w),
    "brier": lambda p, hot, w: _mean(np.square(p - hot).sum(1), w),
    "ece": lambda p, hot, w: weighted_ece(p.max(1), (_chosen(p) * hot).sum(1), w),
}
_MULTILABEL: dict[str, _Weighted] = {
    "map": _per_label(weighted_average_precision),
    "auroc": _per_label(weighted_auroc),
    "macro_f1": lambda p, hot, w: _macro_f1((p >= 0.5).astype(float), hot, w),
    "subset_accuracy": lambda p, hot, w: _mean(((p >= 0.5) == hot).all(1).astype(float), w),
    "log_loss": lambda p, hot, w: _mean(_log_losses(p, hot), w),
    "brier": lambda p, hot, w: _mean(np.square(p - hot).mean(1), w),
    "ece": _per_label(weighted_ece),
}


# ---- ensembles of classes ----------------------------------------------------------------------------------------


def ensemble_log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Logarithm (N, C) of the members' mean probabilities, from their logits (S, N, C); no probability underflows."""
    logits = np.asarray(logits, np.float64)
    return logsumexp(log_softmax(logits, -1), axis=0) - np.log(len(logits))


def likeliest_log_odds(logits: np.ndarray) -> np.ndarray:
    """Log-odds (...) of the largest of the probabilities softmax(logits (..., C)), without its ties at 1."""
    logits = np.asarray(logits, np.float64)
    others = np.arange(logits.shape[-1]) != logits.argmax(-1)[..., None]
    return logits.max(-1) - logsumexp(np.where(others, logits, -np.inf), axis=-1)


def class_entropy(log_probabilities: np.ndarray) -> np.ndarray:
    """Entropy (...) in nats of log-probabilities (..., C)."""
    return -(np.exp(log_probabilities) * log_probabilities).sum(-1)


def class_mutual_information(logits: np.ndarray) -> np.ndarray:
    """H(mean p) - mean H(p) in nats, (S, N, C) -> (N,), in [0, log C]: what the members disagree about (BALD)."""
    alone = class_entropy(log_softmax(np.asarray(logits, np.float64), -1)).mean(0)
    return np.maximum(class_entropy(ensemble_log_probabilities(logits)) - alone, 0.0)  # rounding leaves -1e-17


class ClassSetSummary(NamedTuple):
    """Of sets of classes on N examples."""

    coverage: float
    least: float
    """coverage among the examples of the class that is covered least"""
    size: float
    """mean number of classes in the set"""
    empty: float
    """share of sets without a class"""
    single: float
    """share of sets of one class"""


def class_set_summary(p: np.ndarray, target: np.ndarray, quantile: np.ndarray | float) -> ClassSetSummary:
    """Of the sets {c: 1 - p_c <= quantile}; p (N, C), target (N,) class numbers, quantile one number or (N,)."""
    target = np.asarray(target).astype(int)
    sets = 1 - p <= np.broadcast_to(quantile, target.shape)[:, None]  # (N, C)
    covered, size = sets[np.arange(target.size), target], sets.sum(1)
    least = min(covered[target == c].mean() for c in np.unique(target))
    values = covered.mean(), least, size.mean(), (size == 0).mean(), (size == 1).mean()
    return ClassSetSummary(*map(float, values))
