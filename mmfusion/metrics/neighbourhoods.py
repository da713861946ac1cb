"""Nearest neighbours of latents: whether two modalities agree on them, and how flat they lie. N rows, L width.

Two modalities' graphs have the same N nodes, the examples, each with edges to its k nearest by cosine; they are
compared node by node, so that a gap between the modalities, or a graph in several parts, leaves the measures finite.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmfusion.metrics.retrieval import CHUNK, TIE, embedding_matrix, unit_rows

NEIGHBOURS = 10
PLANE_NEIGHBOURS = 20


def mutual_knn_overlap(x: np.ndarray | Tensor, y: np.ndarray | Tensor, k: int = NEIGHBOURS, seed: int = 0) -> float:
    """Mean share of a row's k nearest rows by cosine that x (N, L_x) and y (N, L_y) have in common.

    In [0, 1]; about k / (N - 1) for unrelated rows. `seed` draws who comes first among equally near rows. (Huh et al.
    2024, "mutual nearest-neighbour metric".)

    Raises ValueError for shapes that do not fit, NaN, infinity, zero vectors, or k outside 1 .. N - 1.
    """
    return float(NeighbourGraphs(x, y, k, seed).overlap(np.arange(len(x))))


def graph_hausdorff(x: np.ndarray | Tensor, y: np.ndarray | Tensor, k: int = NEIGHBOURS, seed: int = 0) -> float:
    """Hausdorff distance between a row's neighbours in x (N, L_x) and in y (N, L_y), mean over rows.

        H = 1/2N sum_i [ h_x(N_x(i), N_y(i)) + h_y(N_x(i), N_y(i)) ]
        h_x(A, B) = max( max_{a in A} min_{b in B} |x_a - x_b|, max_{b in B} min_{a in A} |x_a - x_b| ),  |x_a| = 1

    In [0, 2], 0 iff every row has the same neighbours, up to equal vectors: the soft counterpart of the overlap, since
    a neighbour missed by little costs little. Arguments and errors as `mutual_knn_overlap`; takes 16 N^2 bytes.
    """
    return float(NeighbourGraphs(x, y, k, seed).hausdorff(np.arange(len(x))))


class NeighbourGraphs:
    """The k-nearest-neighbour graphs of x and y, made once and compared under many orders of y's rows.

    Args and errors as `mutual_knn_overlap`.
    """

    def __init__(self, x: np.ndarray | Tensor, y: np.ndarray | Tensor, k: int, seed: int) -> None:
        x, y = embedding_matrix(x, "x"), embedding_matrix(y, "y")
        if len(x) != len(y):
            raise ValueError(f"rows of x {x.shape} and y {y.shape} are no pairs")
        x, y = unit_rows(x, "x"), unit_rows(y, "y")
        generators = [np.random.default_rng([seed, i]) for i in range(2)]  # ties fall differently in x and y
        # (k, N): slots first, so that minima over them run along memory
        self._of_x, self._of_y = (nearest_rows(z, k, g).T.copy() for z, g in zip((x, y), generators, strict=True))
        self._latents = (x, y)
        self._distances: list[np.ndarray] = []

    def overlap(self, order: np.ndarray) -> float:
        """`mutual_knn_overlap` where row i of y is row order[i] (N,) of the y given."""
        return float((self._of_x[:, None] == self._reordered(order)).any(1).mean())

    def hausdorff(self, order: np.ndarray) -> float:
        """`graph_hausdorff` where row i of y is row order[i] (N,) of the y given."""
        if not self._distances:
            self._distances = [_chords(z).ravel() for z in self._latents]
        of_x, of_y, n = self._of_x, self._reordered(order), len(order)
        in_x, in_y = self._distances  # (N^2,) each
        both = [in_x.take(of_x[:, None] * n + of_y), in_y.take(order[of_x][:, None] * n + order[of_y])]  # (k, k, N)
        return float(np.mean([np.maximum(d.min(1).max(0), d.min(0).max(0)) for d in both]))

    def _reordered(self, order: np.ndarray) -> np.ndarray:
        """Neighbours (k, N) among the rows y[order]."""
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return place[self._of_y[:, order]]


class Curvature(NamedTuple):
    """Of a cloud of points, and the dimension d of the planes it was compared with."""

    share: float
    """of a neighbourhood's variance outside its best-fitting d-dimensional plane, mean over points: 0 is flat"""
    dimension: int
    """d"""
    intrinsic_dimension: float
    """as estimated from the distances to the k nearest"""


def local_curvature(x: np.ndarray | Tensor, k: int = PLANE_NEIGHBOURS, dimension: int | None = None) -> Curvature:
    """How far each point and its k nearest lie from their tangent plane, by a principal component analysis of them.

    The rule for d: the intrinsic dimension m, rounded, and within 1 .. min(L, k // 2) (k + 1 points fill a plane of k
    dimensions whatever their shape),

        1 / m = mean over points and over j < k of log(T_k / T_j),   T_j the distance to the j-th nearest

    (Levina & Bickel 2004; mean of the inverses, MacKay & Ghahramani 2005). Shares are comparable at one d and one k. Of
    points that occur several times one is taken.

    Args:
        x: (N, L), more than k different points.
        k: neighbours of a point, at least 3.
        dimension: d; default: by the rule.

    Raises ValueError for other shapes, NaN, infinity, too few different points, or d outside 1 .. k - 1.
    """
    points = np.unique(embedding_matrix(x, "x"), axis=0)
    if k < 3 or len(points) <= k:
        raise ValueError(f"{len(points)} different points in {len(x)} rows have no neighbourhoods of k = {k}: k >= 3")
    if dimension is not None and not 1 <= dimension < k:
        raise ValueError(f"planes of dimension {dimension} do not fit neighbourhoods of k = {k}")
    points = (points - points.mean(0)) / np.ptp(points)
    neighbours = nearest_rows(points, k, np.random.default_rng(0))
    spectra, logs = [], []
    step = max(1, CHUNK // (k + 1) // points.shape[1])
    for start in range(0, len(points), step):
        around = np.arange(start, min(start + step, len(points)))
        cloud = points[np.c_[around, neighbours[around]]]  # (C, k + 1, L)
        distances = np.sort(np.linalg.norm(cloud[:, 1:] - cloud[:, :1], axis=2), 1)  # (C, k), all positive
        logs.append(np.log(distances[:, -1:] / distances[:, :-1]).mean(1))
        cloud = cloud - cloud.mean(1, keepdims=True)
        spectra.append(np.linalg.eigvalsh(cloud @ cloud.mT).clip(0))  # (C, k + 1) ascending
    spectrum, inverse = np.concatenate(spectra), np.concatenate(logs).mean()
    intrinsic = float(1 / inverse) if inverse > 0 else float(points.shape[1])  # all k equally far
    if dimension is None:
        dimension = int(np.clip(round(intrinsic), 1, min(points.shape[1], k // 2)))
    outside = spectrum[:, :-dimension].sum(1) / spectrum.sum(1)
    return Curvature(float(outside.mean()), dimension, intrinsic)


def nearest_rows(x: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """Row numbers (N, k) of each row's k nearest others by Euclidean distance, in no order; x (N, L).

    Who is taken among equally near ones is drawn, row by row, and does not follow their place: else two modalities of
    many equal rows would seem to agree. Raises ValueError for k outside 1 .. N - 1.
    """
    n = len(x)
    if not 1 <= k < n:
        raise ValueError(f"{n} rows have no k = {k} neighbours each: k is from 1 to {n - 1}")
    x = x - x.mean(0)
    square = np.square(x).sum(1)
    tie = TIE * (square.mean() if square.any() else 1.0)
    nearest = np.empty((n, k), np.int64)
    step = max(1, CHUNK // n)
    for start in range(0, n, step):
        rows = np.arange(start, min(start + step, n))
        distances = square[rows, None] + square - 2 * x[rows] @ x.T  # (C, N), squared
        distances += tie * generator.random(distances.shape)  # the order of what rounding alone parts
        distances[rows - start, rows] = np.inf
        nearest[rows] = np.argpartition(distances, k - 1, axis=1)[:, :k]
    return nearest


def _chords(x: np.ndarray) -> np.ndarray:
    """Distances (N, N) between unit vectors (N, L)."""
    distances = np.sqrt((2 - 2 * x @ x.T).clip(0))
    np.fill_diagonal(distances, 0)
    return distances
