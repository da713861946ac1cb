"""How often an experiment's verdict comes out as it does, given the true effects: power, false support, size needed.

The model is the one under which Nadeau and Bengio's corrected resampled t (Machine Learning 2003) is right: contrast c
on fold j of J = R K has the value

    x_cj = mu_c + a_c + e_cj,    Cov(a) = rho S,    Cov(e_j) = (1 - rho) S,
    rho = r / (1 + r),    r = n_test / n_train

a is what all folds share because their training sets overlap. The sample variance s^2 over folds estimates (1 - rho)
of the diagonal of S, the mean has the variance S (rho + (1 - rho) / J), and (mean - mu) / (s sqrt(1/J + r)) is
Student's t with J - 1 degrees of freedom. S is estimated from the fold values of a run, its correlations shrunk towards
0 (Schaefer and Strimmer 2005), since J is about the number of contrasts.

The rule that is simulated is the one that judges experiments: mmfusion.metrics.verdicts.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

from mmfusion.metrics.statistics import LEVEL
from mmfusion.metrics.verdicts import CODES, Verdict, claim_code, judge, route_corrected

VERDICTS: tuple[Verdict, ...] = tuple(CODES[code] for code in (-1, 0, 1))
DRAWS = 10_000
MOST_EDGES = 256
"""edges of the null at which false support is simulated; where there are more, as many of them at random"""
_NUMBERS_AT_ONCE = 4_000_000  # 32 MB of normal draws


# ---- the rule ----------------------------------------------------------------------------------------------------


def verdict_of_statistics(
    means: np.ndarray,
    deviations: np.ndarray,
    folds: int,
    ratio: float,
    routes: Sequence[str | None],
    floors: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """Verdict of a claim from the mean and spread of its contrasts over folds.

    Args:
        means, deviations: (..., C) mean and sample standard deviation over J folds; they broadcast.
        folds: J, at least 2.
        ratio: n_test / n_train, > 0.
        routes: (C,) route of each contrast; None: it does not decide.
        floors: (C,) smallest effect of interest, or 0 where a contrast is about its sign alone.

    Returns:
        (...) places in VERDICTS.

    Raises ValueError for shapes or numbers out of range.
    """
    routes, floors = checked_claim(folds, ratio, routes, floors)
    means, deviations = np.broadcast_arrays(means, deviations)
    if means.shape[-1:] != floors.shape:
        raise ValueError(f"means of shape {means.shape} of {len(floors)} contrasts")
    own = [c for c, route in enumerate(routes) if route is not None]
    means, deviations, names = means[..., own], deviations[..., own], [routes[c] for c in own]
    error = deviations * (1 / folds + ratio) ** 0.5
    wide, narrow = (stdtrit(folds - 1, 1 - level / 2) * error for level in (LEVEL, 2 * LEVEL))
    t = np.divide(np.abs(means), error, out=np.where(means == 0, 0.0, np.inf), where=error > 0)
    p = route_corrected(2 * stdtr(folds - 1, -t), means > 0, names)
    codes = judge(means, means - wide, means + wide, means + narrow, p, floors[own])
    return claim_code(codes, names) + 1


def checked_claim(
    folds: int, ratio: float, routes: Sequence[str | None], effects: Sequence[float] | np.ndarray
) -> tuple[list[str | None], np.ndarray]:
    """Routes and effects (C,); raises ValueError where a number is out of range or nothing decides."""
    routes, effects = list(routes), np.asarray(effects, np.float64)
    if folds < 2 or not 0 < ratio < np.inf:
        raise ValueError(f"{folds} folds with a ratio of {ratio}: give at least 2 folds, a ratio above 0")
    if effects.shape != (len(routes),) or not (np.isfinite(effects) & (effects >= 0)).all():
        raise ValueError(
            f"smallest effects of interest {effects.tolist()} of {len(routes)} contrasts: one >= 0 for each"
        )
    if all(route is None for route in routes):
        raise ValueError("no contrast decides: a claim has at least one route")
    return routes, effects


# ---- simulation --------------------------------------------------------------------------------------------------


def simulate(
    fold_values: np.ndarray,
    ratio: float,
    routes: Sequence[str | None],
    effects: Sequence[float] | np.ndarray,
    true: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
    floors: Sequence[float] | None = None,
) -> np.ndarray:
    """Probability of each verdict if the contrasts' true means were `true`.

    All rows of `true` meet the same draws, so that a curve over strengths has no noise of its own.

    Args:
        fold_values: (C, J) of a finished run; from them the covariance, never the mean.
        ratio, routes, effects: as `verdict_of_statistics`.
        true: (..., C) true means.
        floors: (C,) 0 where a contrast is about its sign alone; default: `effects`.
        draws: simulated runs; a probability p has a standard error of sqrt(p (1 - p) / draws).
        seed: of the draws.

    Returns:
        (..., 3) in the order of VERDICTS.

    Raises ValueError for shapes or numbers out of range, NaN or infinity.
    """
    x = checked_values(fold_values)
    routes, effects = checked_claim(x.shape[1], ratio, routes, effects)
    true = np.asarray(true, np.float64)
    if true.shape[-1:] != (len(x),) or len(routes) != len(x) or draws < 1:
        raise ValueError(f"true means {true.shape}, {len(routes)} routes, {draws} draws for {len(x)} contrasts")
    means, deviations = simulated_statistics(x, ratio, draws, seed)  # (draws, C) each
    deciding = [c for c, route in enumerate(routes) if route is not None]
    floors = effects if floors is None else np.asarray(floors, np.float64)
    rule = (x.shape[1], ratio, [routes[c] for c in deciding], floors[deciding])
    rows = true.reshape(-1, len(x))[:, deciding]
    codes = [verdict_of_statistics(means[:, deciding] + row, deviations[:, deciding], *rule) for row in rows]
    shares = np.stack([np.bincount(one, minlength=len(VERDICTS)) / draws for one in codes])
    return shares.reshape(*true.shape[:-1], len(VERDICTS))


def simulated_statistics(fold_values: np.ndarray, ratio: float, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over J folds, (draws, C) each, of contrasts (C, J) whose true means are 0."""
    contrasts, folds = fold_values.shape
    root = np.linalg.cholesky(shrunk_correlation(fold_values) + 1e-12 * np.eye(contrasts))  # within folds
    root *= fold_values.std(1, ddof=1)[:, None]  # (C, C)
    rng = np.random.default_rng(seed)
    means, deviations = np.empty((2, draws, contrasts))
    step = max(1, _NUMBERS_AT_ONCE // (contrasts * folds))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        shared = ratio**0.5 * rng.standard_normal((size, contrasts)) @ root.T  # rho / (1 - rho) = r
        own = rng.standard_normal((size, folds, contrasts)) @ root.T  # (size, J, C) @ (C, C)
        means[start : start + size] = shared + own.mean(1)
        deviations[start : start + size] = own.std(1, ddof=1)
    return means, deviations


def shrunk_correlation(values: np.ndarray) -> np.ndarray:
    """(C, C) correlation of the rows (C, J), off its diagonal times 1 - l, positive definite for l > 0.

        l = sum Var^(r_ab) / sum r_ab^2, over a != b, within [0, 1]             (Schaefer and Strimmer 2005, Table 1)

    Rows that never change correlate with nothing.
    """
    contrasts, folds = values.shape
    centred = values - values.mean(1, keepdims=True)
    spread = centred.std(1, ddof=1, keepdims=True)
    z = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    products = z[:, None] * z[None]  # (C, C, J)
    off = ~np.eye(contrasts, dtype=bool)
    r = products.sum(-1) / (folds - 1)
    noise = folds / (folds - 1) ** 3 * ((products - products.mean(-1, keepdims=True)) ** 2).sum(-1)
    total = float((r[off] ** 2).sum())
    shrinkage = min(1.0, float(noise[off].sum()) / total) if total > 0 else 1.0
    return np.where(off, (1 - shrinkage) * r, 1.0)


# ---- what is asked of an experiment ------------------------------------------------------------------------------


def power_curve(
    fold_values: np.ndarray,
    ratio: float,
    routes: Sequence[str | None],
    effects: Sequence[float] | np.ndarray,
    multiples: Sequence[float] | np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
    floors: Sequence[float] | None = None,
) -> np.ndarray:
    """(K, 3) probability of each verdict where every true mean is that multiple (K,) of its effect of interest."""
    true = np.asarray(multiples, np.float64)[:, None] * np.asarray(effects, np.float64)
    return simulate(fold_values, ratio, routes, effects, true, draws, seed, floors)


def false_support(
    fold_values: np.ndarray,
    ratio: float,
    routes: Sequence[str | None],
    effects: Sequence[float] | np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
    floors: Sequence[float] | None = None,
) -> float:
    """Largest probability of "supported" where the claim does not hold.

    It does not hold where every route has a contrast whose true mean is at most 0. The worst of these is at an edge: in
    each route one contrast at 0, the others far above; all at 0 beside. A maximum over simulated probabilities, so up
    to two or three of their standard errors too large.
    """
    x = checked_values(fold_values)
    routes, effects = checked_claim(x.shape[1], ratio, routes, effects)
    far = 1e3 * (float(x.std(1, ddof=1).max()) + float(effects.max()))
    names = sorted({route for route in routes if route is not None})
    members = [[c for c, route in enumerate(routes) if route == name] for name in names]
    if math.prod(map(len, members)) <= MOST_EDGES:
        edges = list(itertools.product(*members))
    else:
        rng = np.random.default_rng(seed)
        edges = [tuple(int(rng.choice(own)) for own in members) for _ in range(MOST_EDGES)]
    true = np.full((len(edges) + 1, len(x)), far)
    true[-1] = 0
    for row, edge in zip(true, edges, strict=False):
        row[list(edge)] = 0
    return float(simulate(x, ratio, routes, effects, true, draws, seed, floors)[:, 2].max())


def size_needed(
    fold_values: np.ndarray,
    ratio: float,
    routes: Sequence[str | None],
    effects: Sequence[float] | np.ndarray,
    examples: int,
    power: float = 0.8,
    draws: int = DRAWS,
    seed: int = 0,
    floors: Sequence[float] | None = None,
) -> int | None:
    """Number of examples in the pool with which the true effects of interest would be supported, same R and K.

    The variance over folds is scaled by `examples` / N. That is right for what the test examples add to it; what the
    seeds add falls more slowly, and where the mean itself changes with the size of training nothing is said of it.

    Args:
        fold_values, ratio, routes, effects, draws, seed: as `simulate`.
        examples: of the pool that the fold values come from.
        power: probability of "supported" that is asked for, < 1.

    Returns:
        Least N with that power; None beyond a million times `examples`.

    Raises ValueError as `simulate`, and for a power outside (0, 1) or less than one example.
    """
    if not 0 < power < 1 or examples < 1:
        raise ValueError(f"power {power} with {examples} examples: give a power between 0 and 1, at least one example")
    x = checked_values(fold_values)
    routes, effects = checked_claim(x.shape[1], ratio, routes, effects)

    def reached(size: int) -> bool:  # a mean in units of its error is what counts, so the mean is scaled instead
        scale = (size / examples) ** 0.5
        least = (effects if floors is None else np.asarray(floors, np.float64)) * scale
        return bool(simulate(x, ratio, routes, effects, scale * effects, draws, seed, least)[2] >= power)

    low, high = 0, 1
    while not reached(high):
        low, high = high, 2 * high
        if high > 1_000_000 * examples:
            return None
    while high - low > max(1, high // 200):  # to half a percent: the variance is not known better
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def checked_values(fold_values: np.ndarray) -> np.ndarray:
    """(C, J) as float64; raises ValueError for another shape, fewer than two folds, NaN or infinity."""
    x = np.asarray(fold_values, np.float64)
    if x.ndim != 2 or x.shape[1] < 2 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"fold values are (C, J), finite, of at least two folds, not of shape {x.shape}")
    return x
