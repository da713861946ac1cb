"""Calibration and selective prediction: ECE, temperature, risk-coverage, conformal sets, disagreement.

Binary predictions come as logits: l = log p / (1 - p) of the positive class, natural logarithm everywhere. NLL per
example is `mmfusion.metrics.scores.example_losses`, Brier score and AUROC are scikit-learn's; here is what it lacks.

    ECE  = sum_b n_b / n |mean p in bin b - share of positives in bin b|              (Naeini et al. 2015)
    AURC = 1/n sum_k mean loss of the k most confident examples                       (Geifman & El-Yaniv 2017, 2019)
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, softmax

from mmfusion.metrics.scores import RESAMPLES, bootstrap_counts

BINS = 15
FLOOR_DRAWS = 1000
TEMPERATURES = (0.05, 20.0)
"""where a temperature is looked for: at the ends the logits are all but signs, or all but nothing"""

Bins = Literal["width", "mass"]


# ---- ensembles ---------------------------------------------------------------------------------------------------


def ensemble_logits(logits: np.ndarray) -> np.ndarray:
    """Log-odds (N,) of the members' mean probability, from their logits (S, N); exact where p rounds to 0 or 1.

    Of several labels, (S, N, O) -> (N, O), each by itself.
    """
    logits = np.asarray(logits, np.float64)
    positive = np.logaddexp.reduce(-np.logaddexp(0.0, -logits), axis=0)  # log of S times the mean of p
    negative = np.logaddexp.reduce(-np.logaddexp(0.0, logits), axis=0)
    return positive - negative


def binary_entropy(logits: np.ndarray) -> np.ndarray:
    """Entropy of Bernoulli(sigmoid(logit)) in nats, of the same shape."""
    logits = np.asarray(logits, np.float64)
    return expit(logits) * np.logaddexp(0.0, -logits) + expit(-logits) * np.logaddexp(0.0, logits)


def mutual_information(logits: np.ndarray) -> np.ndarray:
    """Of prediction and member, H(mean p) - mean H(p), in nats: (S, N[, O]) -> (N[, O]), in [0, log 2].

    It is what the members disagree about, apart from what they agree to be uncertain (BALD; Houlsby et al. 2011).
    """
    information = binary_entropy(ensemble_logits(logits)) - binary_entropy(logits).mean(0)
    return np.maximum(information, 0.0)  # rounding leaves -1e-17


# ---- calibration -------------------------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """The bins that hold examples, in the order of p."""

    predicted: np.ndarray
    """(B,) mean p"""
    observed: np.ndarray
    """(B,) share of positives"""
    count: np.ndarray
    """(B,) examples"""


def reliability(p: np.ndarray, target: np.ndarray, bins: int = BINS, kind: Bins = "width") -> Reliability:
    """What is predicted and what comes true, bin by bin, of the positive class's probability.

    The bins are those of scikit-learn's `calibration_curve`, which gives no counts.

    Args:
        p: (N,) in [0, 1]; target: (N,) of 0 and 1.
        kind: "width": [0, 1] in equal parts; "mass": between quantiles of p, equal p in one bin.

    Raises ValueError for other values or shapes.
    """
    p, target = _checked(p, target)
    index = _bin_of(p, bins, kind)
    count = np.bincount(index, minlength=bins)
    held = count > 0
    sums = [np.bincount(index, weights=x, minlength=bins)[held] for x in (p, target)]
    return Reliability(sums[0] / count[held], sums[1] / count[held], count[held])


def calibration_error(p: np.ndarray, target: np.ndarray, bins: int = BINS, kind: Bins = "width") -> float:
    """Expected calibration error of the positive class's probability; args as for `reliability`.

    It is biased upwards, the more the fewer the examples: read it beside `calibration_error_floor`.
    """
    predicted, observed, count = reliability(p, target, bins, kind)
    return float((count * np.abs(predicted - observed)).sum() / count.sum())


def calibration_error_floor(
    p: np.ndarray, bins: int = BINS, kind: Bins = "width", draws: int = FLOOR_DRAWS, seed: int = 0
) -> np.ndarray:
    """ECE (draws,) that these very probabilities (N,) have where they are right: labels are drawn from them.

    Their mean is the ECE to expect of a perfectly calibrated predictor, their 95 % quantile what only one in twenty
    exceeds (the consistency test of Broecker & Smith 2007, for one number).
    """
    p, _ = _checked(p, np.zeros(np.shape(p)))
    rng = np.random.default_rng(seed)
    members = np.eye(bins)[_bin_of(p, bins, kind)]  # (N, B)
    surplus = (rng.random((draws, p.size)) < p) - p  # (draws, N): label less probability
    return np.abs(surplus @ members).sum(1) / p.size  # (draws, N) @ (N, B)


def fit_temperature(logits: np.ndarray, target: np.ndarray) -> float:
    """The T > 0 that makes logits / T likeliest on these examples (Guo et al. 2017); dev, never test.

    The NLL is convex in 1 / T, so the root of its derivative is the minimum. T stays in [0.05, 20]: where the logits
    separate the classes the likelihood would have T -> 0, and where they say nothing, or the opposite, T -> infinity.
    T = 1 is allowed, so the NLL on these examples never rises. One T for all classes, or all labels.

    Args:
        logits: (N,) with target (N,) of 0 and 1; (N, O) of labels with target (N, O); or (N, C) of classes, up to a
            constant in each row, with target (N,) class numbers.

    Raises ValueError for other values or shapes.
    """
    logits, target = np.asarray(logits, np.float64), np.asarray(target, np.float64)
    if logits.ndim == target.ndim + 1:
        if target.shape != logits.shape[:1] or not np.isin(target, np.arange(logits.shape[1])).all():
            raise ValueError(
                f"logits {logits.shape} and target {target.shape} do not fit: (N, C) and class numbers (N,)"
            )
        logits = logits - np.take_along_axis(logits, target.astype(int)[:, None], 1)  # minus the true class's margins

        def slope(inverse: float) -> float:
            return float((softmax(inverse * logits, -1) * logits).sum(-1).mean())  # d NLL / d (1 / T), increasing
    else:
        _checked(expit(logits).ravel(), target.ravel())
        signed = (2 * target - 1) * logits  # margins

        def slope(inverse: float) -> float:
            return float(-(signed * expit(-inverse * signed)).mean())

    if not logits.any():
        return 1.0  # every temperature is the same
    coldest, hottest = TEMPERATURES
    if slope(1 / hottest) >= 0:
        return hottest
    if slope(1 / coldest) <= 0:
        return coldest
    return 1 / float(brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12))


def gaussian_nll(target: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """-log N(target; mean, variance), elementwise, in nats; a density, so it may be negative."""
    return 0.5 * (np.log(2 * np.pi * variance) + np.square(target - mean) / variance)


# ---- selective prediction ----------------------------------------------------------------------------------------


def risk_coverage(uncertainty: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Risk (N,) at the coverages 1/N, 2/N, ..., 1: mean loss of the k least uncertain examples.

    For classification: uncertainty -max(p, 1 - p), loss 1 for an error and else 0. Examples of equal uncertainty come
    in random order, in expectation: each counts their mean loss.

    Args:
        uncertainty, loss: (N,).

    Raises ValueError for other shapes, NaN or infinity.
    """
    uncertainty, loss = _checked_losses(uncertainty, loss)
    _, group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    mean = np.bincount(group, weights=loss) / size
    ordered = np.repeat(mean, size)  # (N,), least uncertain first
    return np.cumsum(ordered) / np.arange(1, loss.size + 1)


def aurc(uncertainty: np.ndarray, loss: np.ndarray) -> float:
    """Area under the risk-coverage curve: its mean over the N coverages; smaller is better."""
    return float(risk_coverage(uncertainty, loss).mean())


def excess_aurc(uncertainty: np.ndarray, loss: np.ndarray) -> float:
    """AURC less that of the best order of these very losses (Geifman et al. 2019): 0 where all errors come last."""
    return aurc(uncertainty, loss) - aurc(loss, loss)


def aurc_parts(uncertainty: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """AURC as a mean over examples (N,), so that paired differences of it can be resampled like those of a loss.

    The jackknife's pseudo-values, moved to have the AURC itself as mean: A + (N - 1) (mean_j A_-j - A_-i), where A_-i
    leaves example i out. Their variance over N is the jackknife's of the AURC. With H_k = 1 + 1/2 + ... + 1/k and
    losses l_r by rank, A = 1/N sum_r l_r (H_N - H_{r-1}), so all A_-i come from running sums over groups of equal
    uncertainty.
    """
    uncertainty, loss = _checked_losses(uncertainty, loss)
    n = loss.size
    if n < 2:
        raise ValueError("one example alone cannot be left out")
    _, group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    total = np.bincount(group, weights=loss)  # (G,) losses, least uncertain group first
    last = np.cumsum(size) - 1
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, n + 1))]  # H_0 .. H_N
    weight = harmonic[n - 1] - harmonic[:n]  # of ranks 1 .. N among N - 1 examples; the last is 0 and never held
    stays = np.add.reduceat(weight, last + 1 - size)  # (G,) summed over a group's ranks
    moves_up = stays - weight[last] + np.r_[0.0, weight[last[:-1]]]  # each rank one less, as an example before it left
    smaller = np.divide(stays - weight[last], size - 1, out=np.zeros(len(size)), where=size > 1)  # mean without one
    before, after = total * stays / size, total * moves_up / size
    outside = np.cumsum(before) - before + after.sum() - np.cumsum(after)  # (G,) of all other groups
    left_out = (outside[group] + (total[group] - loss) * smaller[group]) / (n - 1)  # (N,)
    return aurc(uncertainty, loss) + (n - 1) * (left_out.mean() - left_out)


# ---- split-conformal prediction ----------------------------------------------------------------------------------


def conformal_quantile(scores: np.ndarray, alpha: float) -> np.ndarray:
    """The ceil((n + 1)(1 - alpha))-th smallest of n calibration scores (n, ...) -> (...); infinity where n is less.

    A new score, exchangeable with these, is at most that with probability at least 1 - alpha, and, without ties, less
    than 1 - alpha + 1 / (n + 1) (Vovk et al. 2005; Lei et al. 2018).
    """
    scores = np.asarray(scores, np.float64)
    if not 0 < alpha < 1 or not scores.size:
        raise ValueError(f"alpha {alpha} is not inside (0, 1), or scores {scores.shape} are empty")
    n = len(scores)
    k = int(np.ceil(round((n + 1) * (1 - alpha), 9)))  # rounded: 10 * (1 - .3) is not 7 in binary
    return np.sort(scores, axis=0)[k - 1] if k <= n else np.full(scores.shape[1:], np.inf)


def label_scores(p: np.ndarray) -> np.ndarray:
    """Conformal score 1 - p_y of both labels: (N,) -> (N, 2), label 0 first."""
    p = np.asarray(p, np.float64)
    return np.stack([p, 1 - p], -1)


class SetSummary(NamedTuple):
    """Of prediction sets on N examples."""

    coverage: float
    coverage_0: float
    """among the examples of class 0; NaN where there are none"""
    coverage_1: float
    size: float
    """mean number of labels in the set"""
    empty: float
    """share of sets without a label"""
    both: float


def set_summary(p: np.ndarray, target: np.ndarray, quantile: np.ndarray | float) -> SetSummary:
    """Of the sets {y: 1 - p_y <= quantile}; p, target (N,), quantile one number or (N,).

    A temperature changes no such set: it keeps the order of the margins, and the quantile moves with them.
    """
    p, target = _checked(p, target)
    sets = label_scores(p) <= np.broadcast_to(quantile, p.shape)[:, None]  # (N, 2)
    covered = sets[np.arange(p.size), target.astype(int)]
    by_class = [float(covered[target == y].mean()) if (target == y).any() else float("nan") for y in (0, 1)]
    size = sets.sum(1)
    return SetSummary(
        float(covered.mean()), *by_class, float(size.mean()), float((size == 0).mean()), float((size == 2).mean())
    )


# ---- detection ---------------------------------------------------------------------------------------------------


class Detection(NamedTuple):
    """AUROC of telling corrupted examples from clean ones, with its 95 % bootstrap interval."""

    auroc: float
    low: float
    high: float


def detection(
    clean: np.ndarray,
    corrupted: np.ndarray,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    affected: np.ndarray | None = None,
) -> Detection:
    """AUROC of a score that should be larger on corrupted copies of the same examples, over all draws of them.

    Clean and corrupted are copies of the same N examples, so it is examples that are resampled, each with all its
    copies: resampling copies would take them for independent. With M_ij the number of copies of j that score above
    clean i (a tie counts half), c_j the number of copies of j and counts w_i,
    AUROC = sum_ij w_i w_j M_ij / (sum_i w_i sum_j w_j c_j); running sums of w over the sorted clean scores give
    sum_i w_i M_ij without the matrix.

    Args:
        clean: (N,); corrupted: (D, N), or (N,) for one draw.
        groups: N names of what is resampled together (utterances of one video).
        affected: (D, N) bool, or (N,): which copies really differ; the others do not count. Default: all.

    Raises ValueError where no copy is affected.
    """
    clean, corrupted = np.asarray(clean, np.float64), np.atleast_2d(np.asarray(corrupted, np.float64))
    affected = np.ones(corrupted.shape, bool) if affected is None else np.broadcast_to(affected, corrupted.shape)
    if not affected.any():
        raise ValueError("no copy is affected: there is nothing to detect")
    n = clean.size
    copies = affected.sum(0)  # (N,)
    if groups is None:
        counts = bootstrap_counts(n, seed, resamples)
    else:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        counts = bootstrap_counts(int(index.max()) + 1, seed, resamples)[:, index]
    order, drawn = np.argsort(clean), counts.T.copy()  # (N, K): rows are taken whole
    below = np.zeros((n + 1, len(counts)))  # how often one of the r lowest clean ones is drawn
    np.cumsum(drawn[order], 0, out=below[1:])
    twice, hits = 0, np.zeros(len(counts))  # halves, doubled: whole numbers, whose sums are exact
    for copy, counted in zip(corrupted, affected, strict=True):
        lower, not_above = (np.searchsorted(clean[order], copy[counted], side) for side in ("left", "right"))
        twice += int(lower.sum() + not_above.sum())
        hits += np.einsum("jk,jk->k", below[lower] + below[not_above], drawn[counted])
    pairs = counts.sum(1) * (counts @ copies)
    resampled = np.divide(hits / 2, pairs, out=np.full(len(hits), np.nan), where=pairs > 0)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Detection(twice / 2 / (n * int(copies.sum())), float(low), float(high))


# ---- checks ------------------------------------------------------------------------------------------------------


def _bin_of(p: np.ndarray, bins: int, kind: Bins) -> np.ndarray:
    edges = np.linspace(0, 1, bins + 1)
    if kind == "mass":
        edges = np.quantile(p, edges)
    elif kind != "width":
        raise ValueError(f'bins are of equal "width" or "mass", not {kind!r}')
    return np.searchsorted(edges[1:-1], p)  # (N,) of 0 .. bins - 1


def _checked(p: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, target = np.asarray(p, np.float64), np.asarray(target, np.float64)
    if p.ndim != 1 or p.shape != target.shape or not p.size:
        raise ValueError(f"probabilities {p.shape} and target {target.shape} are (N,) both, and not empty")
    if not ((p >= 0) & (p <= 1)).all() or not np.isin(target, (0, 1)).all():
        raise ValueError("probabilities are in [0, 1] and a target is 0 or 1; these are not")
    return p, target


def _checked_losses(uncertainty: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    uncertainty, loss = np.asarray(uncertainty, np.float64), np.asarray(loss, np.float64)
    if loss.ndim != 1 or uncertainty.shape != loss.shape or not loss.size:
        raise ValueError(f"uncertainty {uncertainty.shape} and loss {loss.shape} are (N,) both, and not empty")
    if not (np.isfinite(uncertainty).all() and np.isfinite(loss).all()):
        raise ValueError(f"uncertainty or loss of shape {loss.shape} holds NaN or infinity")
    return uncertainty, loss
