"""The best accuracy that is possible on synthetic data: of all modalities, of some, of some of the factors alone.

Let g be the mean of the score's Gaussian part given what is seen, V its variance, W the rest of the variance but the
product's, c the product's share. All of x_m = Q_m f_m + Gaussian noise of standard deviation t that matters are three
coordinates, and

    shared part:  Var E[s | n copies] = n r / (n r + 1 - r + t^2),    unique and synergistic: k = 1 / (1 + t^2) each
    no product:            1/2 + arctan(sqrt(V / W)) / pi  =  1/2 + arcsin(sqrt(V / (V + W))) / pi
    product unseen:        E_q[1/2 + arctan(sqrt(V / (W + c q))) / pi],       q = prod_{j < D} v_j^2
    product seen, t = 0:   E_q[1/2 + arctan(sqrt((V + c q) / W)) / pi]
    product seen, t > 0:   E max(P, 1 - P),     P = E Phi((g + sqrt(c) p m_D) / sqrt(W + c p^2 (1 - k))),  p^2 = q

since the product is Gaussian given all its factors but one; v_j ~ N(m_j, 1 - k) given what is seen, m_j ~ N(0, k).
One to three scalars are integrated by the midpoint rule in their quantiles, to 1e-3 or better; beyond, by draws, with
their standard error. Where modalities may be missing it is the mean over which are there.

Noise of the other kinds has no such form: then the figures are upper bounds (`Truth.is_exact`), those of data without
heavy tails and dropout, whose foreign rows are marked as missing.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from scipy.special import ndtr, ndtri

from mmfusion.data.synthetic import SyntheticConfig

Part = Literal["shared", "unique", "synergy"]
PARTS: tuple[Part, ...] = get_args(Part)
Method = Literal["closed form", "quadrature", "Monte Carlo"]
CHANCE = 0.5
NODES = {1: 4001, 2: 401}  # midpoints in each of one or two dimensions of q
OUTER_NODES, INNER_NODES = 41, {1: 101, 2: 31, 3: 15}  # of (g, m_1, m_2), and of the factors but the last
DRAWS, OUTER_DRAWS = 400_000, 20_000
_CHUNK = 2_000_000


@dataclass(frozen=True)
class Accuracy:
    """An accuracy, and how it was had."""

    value: float
    method: Method
    standard_error: float = 0.0
    """of draws; 0 where nothing was drawn"""


@dataclass(frozen=True)
class Truth:
    """What can be known of the labels of a `SyntheticConfig`."""

    bayes: Accuracy
    """the best accuracy from all modalities"""
    alone: dict[str, Accuracy]
    """the best accuracy from each modality alone"""
    parts: dict[Part, Accuracy]
    """the best accuracy from the factors of one kind alone, in all modalities"""
    additive: Accuracy
    """the best accuracy from the shared and unique factors. An additive logit that is fitted to the label's probability
    reaches this (but for the order of |v_m| modulating it); one that is made to be *thresholded* can do better: of a
    pure product of two signs the sum of two functions, f(1) + f(-1) < 0 < f(1), gets three quarters right"""
    explained: float
    """largest share of the score's variance that a prediction of it explains, for a regression"""
    is_exact: bool
    """False where noise of other kinds than Gaussian makes all of these upper bounds"""


def truth(config: SyntheticConfig) -> Truth:
    """What can be known of the labels. Raises InputError naming a dial out of range."""
    config.check()
    return Truth(
        best_accuracy(config),
        {name: best_accuracy(config, [name]) for name in config.modalities},
        {part: best_accuracy(config, parts=[part]) for part in PARTS},
        best_accuracy(config, parts=("shared", "unique")),
        _explained(config),
        config.heavy == config.foreign == config.dropout == 0,
    )


def best_accuracy(
    config: SyntheticConfig, modalities: Sequence[str] | None = None, parts: Sequence[Part] = PARTS
) -> Accuracy:
    """The best accuracy from the factors of these kinds in these modalities (default: all), at the dials' noise.

    Raises ValueError for a modality or a kind that there is not.
    """
    names = config.modalities if modalities is None else tuple(modalities)
    if unknown := ({*names} - {*config.modalities}) | ({*parts} - {*PARTS}):
        raise ValueError(f"no modality and no part of the label: {', '.join(sorted(unknown))}")
    cases = [(weight, _of_present(config, present, parts)) for weight, present in _presence(config, names)]
    methods = [one.method for _, one in cases]
    return Accuracy(
        sum(weight * one.value for weight, one in cases),
        max(methods, key=get_args(Method).index),
        sum((weight * one.standard_error) ** 2 for weight, one in cases) ** 0.5,
    )


def _presence(config: SyntheticConfig, names: Sequence[str]) -> list[tuple[float, tuple[str, ...]]]:
    """(probability, modalities that are there and not foreign) of every case that can be."""
    there = (1 - config.missing) * (1 - config.foreign)
    cases = []
    for size in range(len(names) + 1):
        weight = there**size * (1 - there) ** (len(names) - size)
        cases += [(weight, present) for present in itertools.combinations(names, size) if weight > 0]
    return cases


def _known_variance(config: SyntheticConfig, present: Sequence[str], parts: Sequence[Part]) -> tuple[float, bool]:
    """Variance V of the mean of the score's Gaussian part, and whether the product's factors are all seen."""
    count, r, noise = len(present), config.alignment, config.gaussian**2
    known = 0.0
    if "shared" in parts and count and r > 0:
        known += config.shared * count * r / (count * r + 1 - r + noise)
    if "unique" in parts:
        known += config.unique * count / len(config.widths) / (1 + noise)
    seen = "synergy" in parts and {*config.modalities[: config.order]} <= {*present}
    return known, seen and config.synergy > 0


def _of_present(config: SyntheticConfig, present: Sequence[str], parts: Sequence[Part]) -> Accuracy:
    known, seen = _known_variance(config, present, parts)
    rest = max(0.0, 1 - known - config.synergy)
    if known == 0 and not seen:
        return Accuracy(CHANCE, "closed form")
    return _accuracy(known, rest, config.synergy, seen, 1 / (1 + config.gaussian**2), config.order)


def _explained(config: SyntheticConfig) -> float:
    total = 0.0
    for weight, present in _presence(config, config.modalities):
        known, seen = _known_variance(config, present, PARTS)
        total += weight * (known + seen * config.synergy / (1 + config.gaussian**2) ** config.order)
    return total


@lru_cache(maxsize=256)
def _accuracy(known: float, rest: float, synergy: float, seen: bool, kept: float, order: int) -> Accuracy:
    """Best accuracy for V, W and c of the module's formulas; `kept` is k."""
    if synergy == 0:
        return Accuracy(float(_of_gaussian(known, rest)), "closed form")
    if seen and kept < 1:
        return _of_noisy_product(known, rest, synergy, kept, order)
    squares, method = _products_squared(order - 1)
    values = _of_gaussian(known + synergy * squares, rest) if seen else _of_gaussian(known, rest + synergy * squares)
    error = float(values.std() / len(values) ** 0.5) if method == "Monte Carlo" else 0.0
    return Accuracy(float(np.mean(values)), method, error)


def _of_gaussian(known: float | np.ndarray, rest: float | np.ndarray) -> float | np.ndarray:
    """Accuracy of the sign of a Gaussian of variance `known` as that of its sum with another one of variance `rest`."""
    return 0.5 + np.arctan2(np.sqrt(known), np.sqrt(rest)) / np.pi


def _quantiles(nodes: int) -> np.ndarray:
    """(nodes,) midpoints of as many intervals of N(0, 1), each of the same probability."""
    return ndtri((np.arange(nodes) + 0.5) / nodes)


def _grid(nodes: int, dimensions: int) -> np.ndarray:
    """(nodes ** dimensions, dimensions) of equal weight, of N(0, I)."""
    axes = np.meshgrid(*[_quantiles(nodes)] * dimensions, indexing="ij")
    return np.stack([axis.ravel() for axis in axes], 1)


def _products_squared(factors: int) -> tuple[np.ndarray, Method]:
    """(n,) values of equal weight of the squared product of that many N(0, 1)."""
    if factors in NODES:
        return _grid(NODES[factors], factors).prod(1) ** 2, "quadrature"
    return np.random.default_rng(0).standard_normal((DRAWS, factors)).prod(1) ** 2, "Monte Carlo"


def _of_noisy_product(known: float, rest: float, synergy: float, kept: float, order: int) -> Accuracy:
    """E max(P, 1 - P) over what is seen: the mean g of the Gaussian part and those, m_j, of the product's factors."""
    if order == 2:
        half = ndtri(0.5 + (np.arange(OUTER_NODES) + 0.5) / OUTER_NODES / 2)  # |m|: signs only turn g and P over
        gs = _quantiles(2 * OUTER_NODES) if known > 0 else np.zeros(1)
        g, *means = (axis.ravel() for axis in np.meshgrid(gs, half, half, indexing="ij"))
        method: Method = "quadrature"
    else:
        g, *means = np.random.default_rng(0).standard_normal((order + 1, OUTER_DRAWS))
        method = "Monte Carlo"
    means = np.stack(means, 1) * kept**0.5  # (n, D)
    unit = _grid(INNER_NODES[order - 1], order - 1)  # (i, D - 1)
    best = np.empty(len(g))
    step = max(1, _CHUNK // len(unit))
    for start in range(0, len(g), step):
        here = slice(start, start + step)
        factors = means[here, None, :-1] + (1 - kept) ** 0.5 * unit  # (b, i, D - 1)
        p = synergy**0.5 * factors.prod(-1)
        mean = known**0.5 * g[here, None] + p * means[here, -1:]
        above = ndtr(mean / np.sqrt(rest + p**2 * (1 - kept))).mean(1)
        best[here] = np.maximum(above, 1 - above)
    error = float(best.std() / len(best) ** 0.5) if method == "Monte Carlo" else 0.0
    return Accuracy(float(best.mean()), method, error)
