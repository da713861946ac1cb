"""From paired differences to verdicts, by one rule that is written before any result.

**Two statements about every contrast**, each with an interval of its own. *There is an effect*: the 95 % interval lies
above 0. *It matters*: the 90 % interval, whose ends are one-sided bounds at 95 %, lies above the smallest effect of
interest; it does not where it lies below (two one-sided tests: Schuirmann 1987).

**Verdict** of a contrast. Supported: there is an effect as claimed, and none that is shown to be too small to matter.
Not supported: the effect is shown to be too small to matter, or to have the opposite sign. Cannot tell: neither.

**A claim** holds by one of its routes, and a route where all contrasts on it hold. Where all must hold, each is tested
at the full level: the route's p is the largest of theirs (intersection-union test: Berger 1982). Over several routes
p-values are corrected after Holm. Contrasts that do not decide are controls: they cost nothing and are not corrected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mmfusion.metrics.statistics import LEVEL, Interval, crossed_bootstrap, power_at, resampled_student, student

Verdict = Literal["supported", "not supported", "cannot tell", "not identified"]
Statement = Literal["yes", "no", "cannot tell"]
CODES: dict[int, Verdict] = {1: "supported", 0: "cannot tell", -1: "not supported"}
"""of `judge`: the weakest is the smallest"""
STATEMENTS: dict[int, Statement] = {1: "yes", 0: "cannot tell", -1: "no"}


class Difference(NamedTuple):
    """What a contrast is estimated from."""

    values: np.ndarray
    """(S, N) over seeds and test examples; (S, J) over seeds and folds; or (S,), one number for each seed"""
    claim: str
    """what a positive difference speaks for"""
    decides: bool = True
    """whether the experiment's verdict rests on it"""
    route: str = ""
    """by which the claim may hold: all of a route must, any route will do"""
    sign_only: bool = False
    """no value above 0 is too small to matter: of "no worse than by an effect of interest", which is in the value"""


class Cut(NamedTuple):
    """The test parts of a cross-validation, fold after fold."""

    sizes: tuple[int, ...]
    """(J,) examples of each"""
    ratio: float
    """examples tested over examples trained on, mean over folds"""


@dataclass(frozen=True)
class Contrast:
    """One difference, and what the data say about it."""

    name: str
    claim: str
    """what a positive estimate means"""
    route: str
    estimate: float
    standard_error: float
    freedom: float | None
    """degrees of freedom; None for a bootstrap"""
    low: float
    high: float
    """95 % interval, of "there is an effect"; not corrected"""
    low_90: float
    high_90: float
    """90 % interval, of "it matters" """
    p: float
    p_corrected: float
    """after Holm over the claim's routes"""
    effect: float
    """smallest effect of interest, > 0, in the units of the estimate"""
    sign_only: bool
    """as in `Difference`"""
    exists: Statement
    matters: Statement
    power: float
    """of finding a true effect of that size, by this standard error, without any correction"""
    verdict: Verdict
    decides: bool
    """whether the experiment's verdict rests on it"""
    fold_values: tuple[float, ...] | None
    """(J,) what it is estimated from; None without folds"""
    ratio: float | None
    """as in `Cut`"""


def corrected_contrasts(
    named: Mapping[str, Difference],
    effect: float | Mapping[str, float],
    *,
    cut: Cut | None = None,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Contrast]:
    """Interval of each contrast and its verdict; deciding ones are corrected over the routes of the claim.

    Args:
        named: differences; (S,) for `student`; with `cut` (S, N) or (S, J), and the interval is Nadeau and Bengio's
            over the folds; without it (S, N) for `crossed_bootstrap`.
        effect: smallest effect of interest, > 0, one for all or one per name.
        cut: of a cross-validation.
        clusters: (N,) what each test example is resampled with, where there is no cut.
        seed: of the resampling.

    Returns:
        In the order of `named`.

    Raises ValueError for a name without effect, and as the intervals do, with the name of the contrast.
    """
    effects = dict(effect) if isinstance(effect, Mapping) else dict.fromkeys(named, effect)
    if missing := [name for name in named if name not in effects]:
        raise ValueError(f"no smallest effect of interest for {missing}")
    if wrong := [name for name in named if not effects[name] > 0]:
        raise ValueError(f"the smallest effect of interest is above 0, not so of {wrong}")
    intervals, folds = [], []
    for name, difference in named.items():
        try:
            of_seeds = cut is None or np.ndim(difference.values) == 1
            folds.append(None if of_seeds else fold_means(difference.values, cut))
            intervals.append(_interval(difference.values, folds[-1], cut, clusters, seed))
        except ValueError as error:
            raise ValueError(f"contrast {name!r}: {error}") from error
    deciding = [k for k, difference in enumerate(named.values()) if difference.decides]
    p = np.array([interval.p for interval in intervals])
    positive = np.array([interval.estimate > 0 for interval in intervals])
    corrected = p.copy()
    if deciding:
        routes = [list(named.values())[k].route for k in deciding]
        corrected[deciding] = route_corrected(p[deciding], positive[deciding], routes)
    return [
        _contrast(name, difference, interval, float(one), effects[name], values, cut)
        for (name, difference), interval, one, values in zip(named.items(), intervals, corrected, folds, strict=True)
    ]


def fold_means(values: np.ndarray, cut: Cut) -> np.ndarray:
    """(S, N) or (S, J) -> (J,): mean over seeds and over each fold's test examples.

    Raises ValueError where the values are neither one for each test example nor one for each fold.
    """
    d = np.asarray(values, np.float64)
    if d.shape[1] == len(cut.sizes):
        return d.mean(0)
    if d.shape[1] != sum(cut.sizes):
        raise ValueError(f"differences {d.shape} are of neither {sum(cut.sizes)} examples nor {len(cut.sizes)} folds")
    return np.array([part.mean() for part in np.split(d.mean(0), np.cumsum(cut.sizes)[:-1])])


def route_corrected(p: np.ndarray, positive: np.ndarray, routes: Sequence[str]) -> np.ndarray:
    """P-values of a claim's deciding contrasts, corrected for the number of its routes.

    A route is shown where all its contrasts are positive and their largest p is small enough after Holm; each contrast
    is given the factor of its route, and no less than what the routes before it in Holm's order have.

    Args:
        p: (..., C) two-sided; positive: (..., C) sign of the estimates; routes: C names.

    Returns:
        (..., C), at most 1. All contrasts of a route are below a level if and only if the route is.
    """
    names = list(dict.fromkeys(routes))
    place = np.array([names.index(route) for route in routes])
    against = np.where(positive, p, 1.0)
    largest = np.stack([against[..., place == k].max(-1) for k in range(len(names))], -1)  # (..., K)
    order = np.argsort(largest, -1, kind="stable")
    factors = np.arange(len(names), 0, -1)
    ascending = np.maximum.accumulate(np.minimum(1.0, np.take_along_axis(largest, order, -1) * factors), -1)
    before = np.concatenate([np.zeros_like(ascending[..., :1]), ascending[..., :-1]], -1)
    rank = np.argsort(order, -1, kind="stable")  # of each route in Holm's order
    factor = factors[rank][..., place]
    least = np.take_along_axis(before, rank, -1)[..., place]
    return np.minimum(1.0, np.maximum(p * factor, least))


def judge(
    estimate: np.ndarray, low: np.ndarray, high: np.ndarray, high_90: np.ndarray, p: np.ndarray, effect: np.ndarray
) -> np.ndarray:
    """The rule of the module's docstring, elementwise: 1 supported, 0 cannot tell, -1 not supported (`CODES`).

    Args:
        estimate, low, high, high_90: with the ends of the 95 % interval and the upper end of the 90 % interval.
        p: two-sided, corrected.
        effect: smallest effect of interest; 0 where any effect matters.

    Raises ValueError where an argument is NaN, an interval is reversed, or an effect is negative.
    """
    stacked = np.array(np.broadcast_arrays(estimate, low, high, high_90, p, effect), np.float64)
    if np.isnan(stacked).any() or (stacked[1] > stacked[2]).any() or (stacked[5] < 0).any():
        raise ValueError(f"no verdict from estimate {estimate}, interval [{low}, {high}], p {p}, effect {effect}")
    estimate, low, high, high_90, p, effect = stacked
    against = (high_90 < effect) | (high < 0)
    return np.where(against, -1, ((p < LEVEL) & (estimate > 0)).astype(int))


def claim_code(codes: np.ndarray, routes: Sequence[str]) -> np.ndarray:
    """(..., C) codes of deciding contrasts -> (...): the weakest of each route, of the routes the strongest."""
    names = np.asarray(routes)
    return np.max([codes[..., names == route].min(-1) for route in dict.fromkeys(routes)], axis=0)


def verdict_of(contrasts: Sequence[Contrast]) -> Verdict:
    """Of the claim, from its deciding contrasts. Raises ValueError where none decides."""
    deciding = [c for c in contrasts if c.decides]
    if not deciding:
        raise ValueError("a claim without a contrast that decides has no verdict")
    known = {verdict: code for code, verdict in CODES.items()}
    return CODES[int(claim_code(np.array([known[c.verdict] for c in deciding]), [c.route for c in deciding]))]


def _interval(
    values: np.ndarray, folds: np.ndarray | None, cut: Cut | None, clusters: Sequence[str] | None, seed: int
) -> Interval:
    if folds is not None:
        return resampled_student(folds, cut.ratio)
    d = np.asarray(values)
    if d.ndim == 1 or d.shape[-1] == 1:
        return student(d)
    if clusters is not None and d.shape[1] != len(clusters):
        raise ValueError(f"differences {d.shape} are not of {len(clusters)} clustered examples")
    return crossed_bootstrap(d, seed=seed, clusters=clusters)


def _contrast(
    name: str,
    difference: Difference,
    interval: Interval,
    p_corrected: float,
    effect: float,
    folds: np.ndarray | None,
    cut: Cut | None,
) -> Contrast:
    estimate, low, high, high_90 = interval.estimate, interval.low, interval.high, interval.high_90
    exists = 1 if p_corrected < LEVEL and estimate > 0 else -1 if high < 0 else 0
    floor = 0.0 if difference.sign_only else effect
    matters = 1 if interval.low_90 >= floor else -1 if high_90 < floor else 0
    return Contrast(
        name=name,
        claim=difference.claim,
        route=difference.route,
        estimate=estimate,
        standard_error=interval.standard_error,
        freedom=interval.freedom if np.isfinite(interval.freedom) else None,
        low=low,
        high=high,
        low_90=interval.low_90,
        high_90=high_90,
        p=interval.p,
        p_corrected=p_corrected,
        effect=effect,
        sign_only=difference.sign_only,
        exists=STATEMENTS[exists],
        matters=STATEMENTS[matters],
        power=power_at(effect, interval.standard_error, interval.freedom),
        verdict=CODES[int(judge(estimate, low, high, high_90, p_corrected, floor))],
        decides=difference.decides,
        fold_values=None if folds is None else tuple(folds.tolist()),
        ratio=None if folds is None else cut.ratio,
    )
