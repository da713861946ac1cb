"""Cross-decoding: features of one modality, decoded from the latent of another. N examples, d features.

It stands for generation where features are all there is. Two questions, and what each answer is read beside:

    R^2      = 1 - sum |x - x'|^2 / sum |x - mean of train|^2      is it this example's?   own latent; permuted partners
    Frechet  = |m - m'|^2 + tr S + tr S' - 2 tr (S^1/2 S' S^1/2)^1/2    are they like real ones, whoever's?    own
               latent; two halves of the real ones; the mean of train alone

R^2 is scikit-learn's, averaged over features weighted by their variance, but about the mean of *train*: 0 is what
knowing nothing costs. Decoders that give everyone the mean have R^2 = 0 and a large Frechet distance; decoders that
give everyone a real example of someone else have R^2 = -1 and a small one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmfusion.metrics.geometry import PERMUTATIONS, Measure, beside_null
from mmfusion.metrics.retrieval import embedding_matrix

HALVINGS = 2
LEAST = 4  # examples: halves of two have a covariance


class CrossDecoding(NamedTuple):
    """Features of one modality from the latents of another. Frechet distances are divided by d."""

    r2: Measure
    """beside it: latents of other examples' partners"""
    own_r2: float
    """from the modality's own latent: the ceiling that the bottleneck leaves"""
    frechet: float
    own_frechet: float
    floor_frechet: float
    """of real features from other real features"""
    mean_frechet: float
    """of real features from the mean of train, given to everyone"""


def r_squared(features: np.ndarray | Tensor, decoded: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """1 - sum |x - x'|^2 / sum |x - reference|^2 over examples and features.

    With the mean of `features` itself for reference it is scikit-learn's `r2_score(..., "variance_weighted")`.

    Args:
        features, decoded: (N, d).
        reference: (d,), the mean of train.

    Raises ValueError for shapes that do not fit, NaN or infinity, and features that all equal the reference.
    """
    x, decoded = _matrices(features, decoded)
    reference = np.asarray(reference, np.float64)
    if reference.shape != x.shape[1:]:
        raise ValueError(f"reference {reference.shape} does not fit features {x.shape}")
    total = np.square(x - reference).sum()
    if not total > 0:
        raise ValueError(f"features {x.shape} all equal the reference: there is nothing to explain")
    return float(1 - np.square(x - decoded).sum() / total)


def frechet_distance(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the means and covariances of x (N, d) and y (K, d).

        |m - m'|^2 + tr S + tr S' - 2 |X Y^T|_*,    X and Y the centred rows over sqrt(N - 1) and sqrt(K - 1)

    The nuclear norm is tr (S^1/2 S' S^1/2)^1/2 (Dowson & Landau 1982; as a distance of features Heusel et al. 2017)
    without the square root of a matrix: N < d, and directions without variance, are no special case.

    Raises ValueError for shapes that do not fit, NaN or infinity, and fewer than two rows.
    """
    x, y = embedding_matrix(x, "x"), embedding_matrix(y, "y")
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"x {x.shape} and y {y.shape}: of one width, and two rows or more, have a Frechet distance")
    shift, (x, y) = x.mean(0) - y.mean(0), (_root(x), _root(y))
    common = np.linalg.svd(x @ y.T, compute_uv=False).sum()  # (min(N, d), min(K, d))
    return max(0.0, float(shift @ shift + np.square(x).sum() + np.square(y).sum() - 2 * common))


def measure_cross_decoding(
    features: Mapping[str, np.ndarray | Tensor],
    decoded: Mapping[tuple[str, str], np.ndarray | Tensor],
    reference: Mapping[str, np.ndarray | Tensor] | None = None,
    permutations: int = PERMUTATIONS,
    halvings: int = HALVINGS,
    seed: int = 0,
) -> dict[tuple[str, str], CrossDecoding]:
    """R^2 and Frechet distance of every ordered pair of modalities, (whose latent, whose features).

    Frechet distances are between one half of the examples and the other, both ways: decoded and real ones are then
    never of the same examples, and a perfect decoder reaches the floor, which has the same bias by the number of rows.

    Args:
        features: (N, d_n) by modality, N >= 4, in whatever units R^2 and distance are to weigh them by.
        decoded: (N, d_n) by (whose latent, whose features); (n, n) is the ceiling of every (m, n).
        reference: (d_n,) mean of train by modality; default 0, of standardised features.
        permutations: draws of the null; 0 leaves it out.
        halvings: how many random halves the distances are averaged over.
        seed: of permutations and halves.

    Raises ValueError as `r_squared` and `frechet_distance`, for too few examples, and where (n, n) is missing.
    """
    rng = np.random.default_rng(seed)
    n = len(next(iter(features.values())))
    if n < LEAST or halvings < 1 or permutations < 0:
        raise ValueError(f"{n} examples, {halvings} halvings, {permutations} permutations: give {LEAST}, 1, 0 or more")
    orders = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(permutations))])  # (1 + P, N), truth first
    halves = [np.array_split(rng.permutation(n), 2) for _ in range(halvings)]
    found = {}
    for name, given in features.items():
        if (name, name) not in decoded:
            raise ValueError(f"{name} is not decoded from its own latent: the ceiling is missing")
        x = embedding_matrix(given, name)
        mean = np.zeros(x.shape[1]) if reference is None else np.asarray(reference[name], np.float64)
        own = embedding_matrix(decoded[name, name], name)
        ceiling, own_distance = r_squared(x, own, mean), _between_halves(own, x, halves)
        floor = float(np.mean([frechet_distance(x[a], x[b]) for a, b in halves]) / x.shape[1])  # the same both ways
        of_mean = float(np.mean([_from_point(mean, x[half]) for both in halves for half in both]) / x.shape[1])
        for source in (source for source, target in decoded if target == name and source != name):
            y = embedding_matrix(decoded[source, name], name)
            r2 = beside_null("permuted rows", _r_squares(x, y, mean, orders))
            distance = _between_halves(y, x, halves)
            found[source, name] = CrossDecoding(r2, ceiling, distance, own_distance, floor, of_mean)
    return found


def _r_squares(x: np.ndarray, decoded: np.ndarray, reference: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """(1 + P,) `r_squared` of x and decoded[order], both (N, d)."""
    first = r_squared(x, decoded, reference)
    total = np.square(x - reference).sum()
    # |x_i - x'_j|^2 = |x_i|^2 + |x'_j|^2 - 2 x_i . x'_j: the last alone sees the order
    inner = (x - reference) @ (decoded - reference).T  # (N, N)
    change = np.array([np.trace(inner) - inner[np.arange(len(x)), order].sum() for order in orders])
    return first - 2 * change / total


def _between_halves(x: np.ndarray, real: np.ndarray, halves: list[list[np.ndarray]]) -> float:
    """Frechet distance over d, mean over halves, of x from one half and real features of the other."""
    pairs = [pair for a, b in halves for pair in ((a, b), (b, a))]
    return float(np.mean([frechet_distance(x[a], real[b]) for a, b in pairs]) / real.shape[1])


def _from_point(point: np.ndarray, x: np.ndarray) -> float:
    """`frechet_distance` of x (N, d) from a single point (d,)."""
    return float(np.square(x.mean(0) - point).sum() + x.var(0, ddof=1).sum())


def _root(x: np.ndarray) -> np.ndarray:
    """(min(N, d), d) matrix R whose R^T R is the covariance of x (N, d)."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred


def _matrices(x: np.ndarray | Tensor, y: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64. Raises ValueError unless they are of one shape and finite."""
    x, y = embedding_matrix(x, "features"), embedding_matrix(y, "decoded")
    if x.shape != y.shape:
        raise ValueError(f"features {x.shape} and decoded {y.shape} are not of one shape")
    return x, y
