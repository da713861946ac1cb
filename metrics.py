"""Scores with their spread: over seeds (training noise) and over examples (sampling noise).

The two answer different questions. The standard deviation over seeds says how much the training varies on these very
examples; the bootstrap interval over examples says how far the score may be from that of the population (Efron &
Tibshirani 1993, percentile interval). Examples are resampled once for all members together, so that the interval is
that of the members' mean score.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

RESAMPLES = 1000
BINARY_SCORES = ("auroc", "accuracy", "f1")


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


def binary_scores(probabilities: np.ndarray, target: np.ndarray, seed: int = 0) -> dict[str, Score]:
    """AUROC, accuracy and F1 (of the positive class, threshold 1/2) of every member.

    Args:
        probabilities: (S, N) in [0, 1].
        target: (N,) of 0 and 1.
        seed: of the resampling.

    Raises ValueError where target holds one class alone: then AUROC does not exist.
    """
    probabilities, target = np.atleast_2d(np.asarray(probabilities, np.float64)), np.asarray(target).astype(int)
    if len(np.unique(target)) < 2:
        raise ValueError(f"target of {target.size} examples holds one class alone: AUROC is not defined")
    guesses = (probabilities >= 0.5).astype(int)
    values = {
        "auroc": [roc_auc_score(target, p) for p in probabilities],
        "accuracy": [accuracy_score(target, g) for g in guesses],
        "f1": [f1_score(target, g, zero_division=0.0) for g in guesses],
    }
    counts = bootstrap_counts(target.size, seed)  # (RESAMPLES, N)
    resampled = {
        "auroc": np.mean([weighted_auroc(p, target, counts) for p in probabilities], axis=0),
        "accuracy": np.mean([counts @ (g == target) / target.size for g in guesses], axis=0),
        "f1": np.mean([_weighted_f1(g, target, counts) for g in guesses], axis=0),
    }
    return {name: _score(values[name], resampled[name], target.size) for name in BINARY_SCORES}


def bootstrap_counts(examples: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each example is drawn in each resample: (resamples, examples), every row sums to `examples`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(examples, np.full(examples, 1 / examples), size=resamples).astype(np.float64)


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


def _weighted_f1(guess: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits = weights @ (guess * target)
    total = weights @ (guess + target)
    return np.divide(2 * hits, total, out=np.zeros(len(weights)), where=total > 0)


def _score(values: list[float], resampled: np.ndarray, examples: int) -> Score:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Score(float(np.mean(values)), std, float(low), float(high), [float(v) for v in values], examples)
