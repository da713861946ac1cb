"""Geometry of two modalities' latents x and y (N, L), row i of both of one example; `measure_alignment` has them all.

On unit vectors (direction, as retrieval sees it): centroid gap, alignment, uniformity, and the neighbour graphs of
`mmfusion.metrics.neighbourhoods`. On the latents as they are: MMD, CKA, FOSCTTM, effective dimension, curvature.
float64 throughout, nothing of order N^3. docs/geometry.md has formulas, ranges and sources.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from jwae_module import GAUSSIAN_SCALES
from mmfusion.metrics.clusters import cluster_scores
from mmfusion.metrics.neighbourhoods import NEIGHBOURS, PLANE_NEIGHBOURS, NeighbourGraphs, local_curvature
from mmfusion.metrics.prior import carried_dimension
from mmfusion.metrics.retrieval import CHUNK, TIE, embedding_matrix, unit_rows

PERMUTATIONS = 100
TAIL = 0.025


class Measure(NamedTuple):
    """A measure, and what it is where there is no alignment."""

    value: float
    null: str | None = None
    """permuted rows (of y), swapped pairs (x_i and y_i change places, each with probability 1/2), or None"""
    null_mean: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    """2.5 and 97.5 % quantiles"""


def measure_alignment(
    x: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    labels: Sequence | np.ndarray | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    k: int = NEIGHBOURS,
    plane_neighbours: int = PLANE_NEIGHBOURS,
) -> dict[str, Measure]:
    """Every measure of two modalities' latents, by name, each beside its null where it has one.

    Args:
        x, y: (N, L).
        labels: (N,) groups of the examples, for silhouette, NMI and V-measure; 2 to N / 2 different ones.
        permutations: draws of each null; 0 leaves nulls out.
        seed: of the draws, the starts of k-means, and the order of equally near neighbours.
        k: neighbours of the overlap and the graphs' distance.
        plane_neighbours: of the curvature.

    Raises ValueError for shapes that do not fit, NaN, infinity, zero vectors, a modality whose points are all equal,
    and fewer rows than the neighbourhoods need.
    """
    x, y = _pairs(x, y)
    u, v = unit_rows(x, "x"), unit_rows(y, "y")
    for name, z in (("x", x), ("y", y)):
        if not np.ptp(z, axis=0).any():
            raise ValueError(f"{name} of shape {z.shape} is one point N times: it has no geometry")
    if permutations < 0:
        raise ValueError(f"permutations are 0 or more, not {permutations}")
    n, rng = len(x), np.random.default_rng(seed)
    orders = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(permutations))])  # (1 + P, N), truth first
    keeps = rng.random((1 + permutations, n)) < 0.5
    keeps[0] = True
    halves = np.concatenate([keeps, ~keeps], 1)  # (1 + P, 2N): which of all points stand for x, one of each pair
    graphs = NeighbourGraphs(x, y, k, seed)

    measures = {"centroid gap": beside_null("swapped pairs", _gaps(np.concatenate([u, v]), halves))}
    measures["MMD"] = beside_null("swapped pairs", _mmds(np.concatenate([x, y]), halves))
    of_pairs = {
        "alignment": np.array([_alignment(u, v[order]) for order in orders]),
        "CKA": _ckas(x, y, orders),
        "FOSCTTM": _foscttms(x, y, orders),
        "mutual kNN": np.array([graphs.overlap(order) for order in orders]),
        "graph Hausdorff": np.array([graphs.hausdorff(order) for order in orders]),
    }
    if labels is not None:
        of_pairs |= cluster_scores(u, v, labels, orders, seed)
    measures |= {name: beside_null("permuted rows", values) for name, values in of_pairs.items()}
    for name, z in (("x", x), ("y", y)):
        measures[f"uniformity of {name}"] = Measure(uniformity(z))
        measures[f"effective dimension of {name}"] = Measure(carried_dimension(z))
        curvature = local_curvature(z, plane_neighbours)
        measures[f"curvature of {name}"] = Measure(curvature.share)
        measures[f"plane dimension of {name}"] = Measure(float(curvature.dimension))
    return measures


# ---- by distances of points --------------------------------------------------------------------------------------


def centroid_gap(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> float:
    """Distance |mean x - mean y| of unit vectors (N, L) and (N, L), in [0, 2] (Liang et al. 2022).

    Raises ValueError for shapes that do not fit, NaN, infinity or zero vectors.
    """
    x, y = _pairs(x, y)
    return float(np.linalg.norm(unit_rows(x, "x").mean(0) - unit_rows(y, "y").mean(0)))


def alignment(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> float:
    """Mean |x_i - y_i|^2 of unit vectors (N, L) and (N, L), in [0, 4]; small is aligned (Wang & Isola 2020, power 2).

    Raises ValueError as `centroid_gap`.
    """
    x, y = _pairs(x, y)
    return _alignment(unit_rows(x, "x"), unit_rows(y, "y"))


def uniformity(x: np.ndarray | Tensor) -> float:
    """log mean_{i != j} exp(-2 |x_i - x_j|^2) of unit vectors (N, L), N >= 2 (Wang & Isola 2020, t = 2).

    0 where all are equal; about -4 for vectors spread over a sphere of many dimensions.

    Raises ValueError for another shape, NaN, infinity or zero vectors.
    """
    x = unit_rows(embedding_matrix(x, "x"), "x")
    if len(x) < 2:
        raise ValueError(f"x of shape {x.shape} has no pairs of rows")
    total = sum(np.exp(4 * (x[rows] @ x.T) - 4).sum() for rows in _chunks(len(x)))
    return float(np.log((total - len(x)) / (len(x) * (len(x) - 1))))


def mmd(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> float:
    """Unbiased squared MMD of x (N, L) and y (N, L), N >= 2: that of `mmfusion.losses.token_alignment.mmd_between`.

    Gaussian kernels of four bandwidths, relative to the mean squared distance of all 2N points, so that scale does not
    matter; without holding the (2N, 2N) kernel. About 0, of either sign, for draws of one distribution; at most 2.

    Raises ValueError for shapes that do not fit, NaN or infinity.
    """
    x, y = _pairs(x, y)
    if len(x) < 2:
        raise ValueError(f"x and y of shape {x.shape} have no pairs of rows")
    return float(_mmds(np.concatenate([x, y]), np.arange(2 * len(x))[None] < len(x))[0])


def unbiased_cka(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> float:
    """Linear CKA of x (N, L_x) and y (N, L_y), N >= 4, with the unbiased HSIC_1 (Song et al. 2012).

    CKA = HSIC_1(K, M) / sqrt(HSIC_1(K, K) HSIC_1(M, M)),  K = x x^T, M = y y^T (Kornblith et al. 2019). About 0, of
    either sign, for unrelated rows; 1 for rotation, shift and scaling.

    Raises ValueError for shapes that do not fit, NaN, infinity, or where all rows but one are equal.
    """
    x, y = _pairs(x, y, of_one_width=False)
    return float(_ckas(x, y, np.arange(len(x))[None])[0])


def foscttm(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> float:
    """Fraction of samples closer than the true match, mean over rows and over both directions (Liu et al. 2019).

    Euclidean distances between x (N, L) and y (N, L), N >= 2. A tie counts half: 0 at equality, 1/2 at random or where
    all points are equal, 1 at worst.

    Raises ValueError for shapes that do not fit, NaN or infinity.
    """
    x, y = _pairs(x, y)
    if len(x) < 2:
        raise ValueError(f"x and y of shape {x.shape} have no other rows than the match")
    return float(_foscttms(x, y, np.arange(len(x))[None])[0])


# ---- the same for many orders of y, (1 + P, N), or many halves of all points, (1 + P, 2N) ------------------------


def beside_null(null: str, values: np.ndarray) -> Measure:
    """The measure of values (1 + P,), the first of which is the measure itself and the others draws of its null."""
    if len(values) == 1:
        return Measure(float(values[0]))
    low, high = np.quantile(values[1:], [TAIL, 1 - TAIL])
    return Measure(float(values[0]), null, float(values[1:].mean()), float(low), float(high))


def _alignment(u: np.ndarray, v: np.ndarray) -> float:
    return max(0.0, float(2 - 2 * np.vdot(u, v) / len(u)))  # of unit vectors


def _gaps(points: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """(1 + P,) distances between the centroids of each half of the points (2N, L) and of the other."""
    signs = np.where(halves, 1.0, -1.0) / (halves.shape[1] / 2)
    return np.linalg.norm(signs @ points, axis=1)  # (1 + P, 2N) @ (2N, L)


def _mmds(points: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """(1 + P,) unbiased squared MMD between each half of the points (2N, L) and the other."""
    n = halves.shape[1] // 2
    if not np.ptp(points, axis=0).any():
        return np.zeros(len(halves))
    points = points - points.mean(0)
    square = np.square(points).sum(1)
    unit = 2 * square.mean()  # mean squared distance of all pairs
    members = halves.T.astype(np.float64)  # (2N, 1 + P)
    total, row, inside = 0.0, np.zeros(len(halves)), np.zeros(len(halves))
    for rows in _chunks(2 * n):
        distances = (square[rows, None] + square - 2 * points[rows] @ points.T).clip(0) / unit  # (C, 2N)
        kernel = sum(np.exp(distances / (-2 * scale)) for scale in GAUSSIAN_SCALES) / len(GAUSSIAN_SCALES)
        total += kernel.sum()
        row += kernel.sum(1) @ members[rows]  # of kernels with a first point in the half
        inside += ((kernel @ members) * members[rows]).sum(0)  # and the second too
    within = (inside - n) + (total - 2 * row + inside - n)  # less the diagonals, which are 1
    return within / (n * (n - 1)) - 2 * (row - inside) / n**2


class _Kernel(NamedTuple):
    """K = z z^T with a diagonal of 0, never held."""

    z: np.ndarray
    """(N, L)"""
    diagonal: np.ndarray
    """(N,): what was set to 0"""
    sums: np.ndarray
    """(N,): K 1"""

    def reordered(self, order: np.ndarray) -> "_Kernel":
        return _Kernel(*(part[order] for part in self))


def _kernel(z: np.ndarray, name: str) -> _Kernel:
    """Of centred and scaled rows (N, L): neither changes CKA."""
    z = z - z.mean(0)
    z = z / max(np.abs(z).max(), 1e-300)
    diagonal = np.square(z).sum(1)
    kernel = _Kernel(z, diagonal, z @ z.sum(0) - diagonal)
    if _hsic(kernel, kernel) <= 1e-12 * np.square(diagonal.sum()):
        raise ValueError(f"the unbiased CKA is not defined: the rows of {name} {z.shape} are equal, but for one")
    return kernel


def _hsic(a: _Kernel, b: _Kernel) -> float:
    """HSIC_1 (Song et al. 2012) times N (N-3): tr KM + 1'K1 1'M1 / ((N-1)(N-2)) - 2 / (N-2) 1'KM1."""
    n = len(a.z)
    trace = np.square(a.z.T @ b.z).sum() - a.diagonal @ b.diagonal  # (L_x, N) @ (N, L_y)
    return float(trace + a.sums.sum() * b.sums.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sums @ b.sums))


def _ckas(x: np.ndarray, y: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """(1 + P,) `unbiased_cka` of x (N, L_x) and y[order] (N, L_y)."""
    if len(x) < 4:
        raise ValueError(f"{len(x)} rows are too few for the unbiased CKA: 4 at least")
    of_x, of_y = _kernel(x, "x"), _kernel(y, "y")
    norm = np.sqrt(_hsic(of_x, of_x) * _hsic(of_y, of_y))
    return np.array([_hsic(of_x, of_y.reordered(order)) for order in orders]) / norm


def _foscttms(x: np.ndarray, y: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """(1 + P,) `foscttm` of x and y[order], both (N, L)."""
    back = np.argsort(orders, 1)  # row of x that each row of y belongs to
    return (_fractions_closer(x, y, orders) + _fractions_closer(y, x, back)) / 2


def _fractions_closer(x: np.ndarray, y: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """(1 + P,) mean over the rows of x of the share of y closer than row partners[:, i] of y; ties half."""
    middle = (x.mean(0) + y.mean(0)) / 2
    x, y = x - middle, y - middle
    squares = [np.square(z).sum(1) for z in (x, y)]
    tie = TIE * max(squares[0].max(), squares[1].max())
    closer = np.zeros(len(partners))
    for rows in _chunks(len(y)):
        distances = squares[0][rows, None] + squares[1] - 2 * x[rows] @ y.T  # (C, N), squared
        for d, ordered, matches in zip(distances, np.sort(distances, 1), partners[:, rows].T, strict=True):
            match = d[matches]  # (1 + P,)
            below, up_to = (np.searchsorted(ordered, match + s * tie, side) for s, side in ((-1, "left"), (1, "right")))
            closer += below + (up_to - below - 1) / 2
    return closer / (len(x) * (len(y) - 1))


def _chunks(n: int) -> list[slice]:
    """Rows of a matrix (n, n) that are held at a time."""
    step = max(1, CHUNK // n)
    return [slice(start, start + step) for start in range(0, n, step)]


def _pairs(x: np.ndarray | Tensor, y: np.ndarray | Tensor, of_one_width: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64; ValueError for shapes that do not fit, NaN or infinity."""
    x, y = embedding_matrix(x, "x"), embedding_matrix(y, "y")
    if len(x) != len(y) or (of_one_width and x.shape != y.shape):
        raise ValueError(f"x {x.shape} and y {y.shape} are no pairs{' of one width' * of_one_width}")
    return x, y
