"""Intervals of paired differences: crossed bootstrap over seeds and clusters, Student's t, and t of resampled folds.

A claim ("A does better than B") is tested on differences d[s, n] = score of A - score of B, of seed s on example n,
both settings with the same seeds and the same examples. With

    d[s, n] = mu + a_s + b_n + e_sn,    Var = V_seed, V_example, V_interaction
    Var(mean of d) = V_seed / S + V_example / N + V_interaction / (S N)

more seeds lower only the first and the last term: on a fixed test set no number of seeds takes the second away.
Verdicts are in mmfusion.metrics.verdicts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit
from scipy.stats import bootstrap, chi2, nct, norm

LEVEL = 0.05
RESAMPLES = 9999
_DRAWS_AT_ONCE = 2_000_000
"""indices that scipy draws at a time: 16 MB of them, whatever the number of examples"""


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences with its uncertainty."""

    estimate: float
    standard_error: float
    low: float
    high: float
    """95 % interval"""
    low_90: float
    high_90: float
    """90 % interval: its ends are one-sided bounds at 95 %"""
    p: float
    """two-sided, of no difference"""
    freedom: float
    """degrees of freedom of the standard error; infinite for a bootstrap"""


@dataclass(frozen=True)
class Bootstrap(Interval):
    """Percentile interval; p = 2 min(P(d* <= 0), P(d* >= 0)), each P as (count + 1) / (resamples + 1), at most 1."""

    distribution: np.ndarray
    """(resamples,) means d* of the resamples"""


@dataclass(frozen=True)
class VarianceComponents:
    """Of one difference d[s, n]: what its seed, its example, and neither alone add to its variance."""

    seed: float
    example: float
    interaction: float


def crossed_bootstrap(
    differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, clusters: Sequence[str] | None = None
) -> Bootstrap:
    """Mean difference with the uncertainty from seeds and from examples together.

    Seeds and examples are resampled independently of each other, and every drawn seed meets every drawn example: the
    crossed or pigeonhole bootstrap (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007). It is
    conservative: its variance holds V_interaction / (S N) three times instead of once.

    Few seeds make it the opposite: like every percentile interval it is too short where what is resampled is few.
    Normal differences of seeds alone without any effect have p < .05 in 17 % of cases at S = 5, 10 % at S = 10, 8 % at
    S = 20, 6 % at S = 50; where 200 examples add as much to the variance of the mean as the seeds do, in 6 % at S = 5
    (simulated, 1500 each).

    Args:
        differences: (S, N), row s and column n with the same seed and example in both settings. (S,) or (S, 1)
            resamples seeds alone, (1, N) examples alone: what is not resampled is held fixed, and the interval says
            nothing about it.
        resamples: size of the distribution; the smallest p that can be had is 2 / (resamples + 1).
        seed: of the resampling.
        clusters: (N,) what each example belongs to: utterances of one video are alike, and are drawn together. Each
            resample's mean is a ratio, the sum over the drawn clusters by their number of examples.

    Raises ValueError for another number of dimensions, fewer than two differences, NaN or infinity.
    """
    d = _checked(differences)
    if d.min() == d.max():  # exactly, which a mean of rounded products would miss
        return _summary(float(d.flat[0]), np.full(resamples, d.flat[0]))
    estimate, sizes = float(d.mean()), np.ones(d.shape[1])
    if clusters is not None:
        members = _memberships(clusters)
        d, sizes = d @ members, members.sum(0)  # sums (S, G), sizes (G,)
    seeds, examples = d.shape
    batch = max(1, _DRAWS_AT_ONCE // (seeds + examples))
    settings = {"n_resamples": resamples, "batch": batch, "vectorized": True, "method": "percentile"}
    rng = np.random.default_rng(seed)
    if min(seeds, examples) == 1:
        whole = np.broadcast_to(sizes, d.shape) if seeds == 1 else np.full(d.shape, sizes.sum())

        def ratio(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
            return values.sum(axis) / weights.sum(axis)

        result = bootstrap((d.ravel(), whole.ravel()), ratio, paired=True, rng=rng, **settings)
    else:

        def mean(example_draws: np.ndarray, seed_draws: np.ndarray, axis: int) -> np.ndarray:
            w, v = _counts(example_draws, examples), _counts(seed_draws, seeds)  # (B, N), (B, S)
            return ((w @ d.T) * v).sum(axis) / (seeds * (w @ sizes))  # (B, G) @ (G, S) -> (B, S) -> (B,)

        result = bootstrap((np.arange(examples), np.arange(seeds)), mean, paired=False, rng=rng, **settings)
    return _summary(estimate, result.bootstrap_distribution)


def student(differences: np.ndarray) -> Interval:
    """Mean of one difference per seed with Student's t interval.

    For seeds alone, in place of the bootstrap, whose percentile interval is too short for the five to twenty seeds of
    an experiment (see `crossed_bootstrap`).

    Args:
        differences: (S,) or (S, 1), S at least 2.

    Raises ValueError for other shapes, NaN or infinity.
    """
    d = _checked(differences)
    if d.shape[1] != 1:
        raise ValueError(f"one difference per seed is (S,) or (S, 1), not {d.shape}")
    d = d.ravel()
    return _student(d, float(d.std(ddof=1)) / len(d) ** 0.5)


def resampled_student(values: np.ndarray, ratio: float) -> Interval:
    """Mean of one difference per fold of a (repeated) cross-validation, with the interval of Nadeau and Bengio.

    Folds share most of their training examples, and their differences go together: the variance of the mean is taken as
    (1 / J + ratio) times that of a difference (Nadeau and Bengio, Inference for the generalization error, Machine
    Learning 2003, eq. 6), with J - 1 degrees of freedom. It speaks of other training sets of that size, too.

    Args:
        values: (J,), J at least 2, of all repeats and folds.
        ratio: number of examples tested over number trained on.

    Raises ValueError for other shapes, NaN or infinity, or a ratio that is not positive.
    """
    d = _checked(values)
    if d.shape[1] != 1 or not ratio > 0:
        raise ValueError(f"one difference per fold is (J,), not {d.shape}, with a ratio above 0, not {ratio}")
    d = d.ravel()
    return _student(d, float(d.std(ddof=1)) * (1 / len(d) + ratio) ** 0.5)


def power_at(effect: float, standard_error: float, freedom: float, level: float = LEVEL) -> float:
    """Probability that a two-sided t test finds a true difference of `effect` with its sign; 1 if nothing varies."""
    if not standard_error > 0:
        return float(effect > 0)
    if not np.isfinite(freedom):
        return float(norm.sf(ndtri(1 - level / 2) - effect / standard_error))
    threshold, shift = stdtrit(freedom, 1 - level / 2), effect / standard_error
    if freedom == 1 or shift > 37:  # where SciPy's non-central t has no number, by its definition over chi
        chi = chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom
        return float(norm.cdf(shift - threshold * np.sqrt(chi)).mean())
    return float(nct.sf(threshold, freedom, shift))


def grouped(differences: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Differences (S, N) of examples that come in groups -> (S, G) with the same mean, to be resampled by group.

    Utterances of one video are alike: resampled one by one they would pass for more evidence than they are. Column g
    is the sum over group g times G / N, so groups weigh by their size. None leaves the differences as they are.
    """
    if groups is None:
        return differences
    members = _memberships(groups)
    return differences @ members * (members.shape[1] / members.shape[0])  # (S, N) @ (N, G)


def variance_components(differences: np.ndarray) -> VarianceComponents:
    """Two-way random effects without replication, by the ANOVA method, negative estimates set to 0.

        V_interaction = MS_interaction,  V_seed = (MS_seed - MS_interaction) / N,
        V_example = (MS_example - MS_interaction) / S

    Args:
        differences: (S, N), both at least 2; or (S,) or (S, 1): all of the variance is then the seeds'.

    Raises ValueError for one seed alone, which has no spread, and as `crossed_bootstrap`.
    """
    d = _checked(differences)
    seeds, examples = d.shape
    if seeds == 1:
        raise ValueError(f"differences of shape {d.shape} hold one seed: the variance over seeds needs two")
    if examples == 1:
        return VarianceComponents(float(d.var(ddof=1)), 0.0, 0.0)
    rows, columns = d.mean(1), d.mean(0)
    residual = d - rows[:, None] - columns + d.mean()
    interaction = float((residual**2).sum() / ((seeds - 1) * (examples - 1)))
    return VarianceComponents(
        seed=max(0.0, float(rows.var(ddof=1)) - interaction / examples),
        example=max(0.0, float(columns.var(ddof=1)) - interaction / seeds),
        interaction=interaction,
    )


def seeds_needed(differences: np.ndarray, effect: float, power: float = 0.8, level: float = LEVEL) -> int | None:
    """Number of seeds with which a mean paired difference of `effect` would be seen on these N examples.

    The smallest S with (V_seed + V_interaction / N) / S + V_example / N <= (effect / (z_{1-level/2} + z_power))^2; for
    (S,) that is the usual S = V ((z_{1-level/2} + z_power) / effect)^2. A plan for a single two-sided z-test: Holm's
    correction and the crossed bootstrap, which is conservative, ask for somewhat more.

    Args:
        differences: pilot differences (S, N), or (S,) or (S, 1); at least two seeds.
        effect: smallest effect of interest, > 0.
        power: probability of seeing it.
        level: of the two-sided test.

    Returns:
        At least 1; None where even infinitely many seeds do not suffice, V_example / N alone being too large.

    Raises ValueError for an effect that is not positive, and as `variance_components`.
    """
    _check_effect(effect)
    examples = _checked(differences).shape[1]
    v = variance_components(differences)
    allowed = (effect / (ndtri(1 - level / 2) + ndtri(power))) ** 2 - v.example / examples
    if allowed <= 0:
        return None
    return max(1, math.ceil((v.seed + v.interaction / examples) / allowed))


def _checked(differences: np.ndarray) -> np.ndarray:
    d = np.asarray(differences, np.float64)
    if d.ndim not in (1, 2) or d.size < 2:
        raise ValueError(f"differences are (S, N) or (S,), at least two of them, not of shape {d.shape}")
    if not np.isfinite(d).all():
        raise ValueError(f"differences of shape {d.shape} hold NaN or infinity")
    return d.reshape(len(d), -1)


def _check_effect(effect: float) -> None:
    if not effect > 0:
        raise ValueError(f"the smallest effect of interest is positive, not {effect}")


def _counts(draws: np.ndarray, n: int) -> np.ndarray:
    """How often each of 0 .. n - 1 is drawn in each row: (B, k) -> (B, n)."""
    rows = len(draws)
    flat = draws.astype(np.int64) + n * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _memberships(groups: Sequence[str]) -> np.ndarray:
    """(N, G) of 0 and 1: which group each example is of."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.eye(index.max() + 1)[index]


def _student(d: np.ndarray, standard_error: float) -> Interval:
    estimate, freedom = float(d.mean()), len(d) - 1
    if d.min() == d.max():
        # equal to the last bit: a number that no seed moves, or too few seeds to tell
        p = 1.0 if estimate == 0 or len(d) < 3 else 0.0
        return Interval(estimate, 0.0, *[estimate] * 4, p, freedom)
    wide, narrow = (stdtrit(freedom, 1 - level / 2) * standard_error for level in (LEVEL, 2 * LEVEL))
    p = 2 * float(stdtr(freedom, -abs(estimate) / standard_error))
    ends = (estimate - wide, estimate + wide, estimate - narrow, estimate + narrow)
    return Interval(estimate, standard_error, *map(float, ends), p, freedom)


def _summary(estimate: float, distribution: np.ndarray) -> Bootstrap:
    # ties with 0 count on both sides; + 1 for the sample itself, so that p is never 0
    tails = [(np.count_nonzero(side) + 1) / (distribution.size + 1) for side in (distribution <= 0, distribution >= 0)]
    low, high, low_90, high_90 = np.percentile(distribution, [2.5, 97.5, 5, 95]).tolist()
    return Bootstrap(
        estimate=estimate,
        standard_error=float(distribution.std(ddof=1)) if low < high else 0.0,
        low=low,
        high=high,
        low_90=low_90,
        high_90=high_90,
        p=min(1.0, 2 * min(tails)),
        freedom=math.inf,
        distribution=distribution,
    )
