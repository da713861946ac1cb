"""Do latents of two modalities gather by their examples' labels? k-means and silhouette of all 2N points together.

Where modalities lie apart, k-means finds them and not the labels: that is what these numbers are for.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score, silhouette_score, v_measure_score

SILHOUETTE_PAIRS = 500
STARTS = 5


def cluster_scores(
    x: np.ndarray, y: np.ndarray, labels: Sequence | np.ndarray, orders: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """Silhouette of the labels, NMI and V-measure of k-means clusters, for each order of the rows of y.

    As many clusters as labels. NMI is by the geometric mean of both entropies (Strehl & Ghosh 2002); by the arithmetic
    mean it would be the V-measure (Rosenberg & Hirschberg 2007).

    Args:
        x, y: (N, L).
        labels: (N,), at least two different ones, and not more than N / 2.
        orders: (P, N), 0 .. N - 1 first: y[order] takes the place of y. Silhouettes of a sample draw their own.
        seed: of k-means' starts and of the 500 pairs that a silhouette is taken of.

    Returns:
        {name: (P,)}.

    Raises ValueError for other labels.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(x),):
        raise ValueError(f"labels of shape {labels.shape} do not fit {len(x)} rows")
    names, labels = np.unique(labels, return_inverse=True)
    if not 2 <= len(names) <= len(x) / 2:
        raise ValueError(
            f"{len(names)} different labels of {len(x)} rows make no groups: 2 to {len(x) // 2} are needed"
        )
    clusters = KMeans(len(names), n_init=STARTS, random_state=seed).fit_predict(np.concatenate([x, y]))
    of_x, of_y = clusters[: len(x)], clusters[len(x) :]
    twice = np.r_[labels, labels]
    found = [np.r_[of_x, of_y[order]] for order in orders]
    return {
        "silhouette": _silhouettes(x, y, labels, orders, seed),
        "NMI": np.array([normalized_mutual_info_score(twice, c, average_method="geometric") for c in found]),
        "V-measure": np.array([v_measure_score(twice, c) for c in found]),
    }


def _silhouettes(x: np.ndarray, y: np.ndarray, labels: np.ndarray, orders: np.ndarray, seed: int) -> np.ndarray:
    """(P,) silhouettes of the labels, of at most 500 pairs."""
    if len(x) > SILHOUETTE_PAIRS:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(x))
        _, first = np.unique(labels[rows], return_index=True)  # one of each label, then whoever is drawn
        rows = np.r_[rows[first], np.delete(rows, first)][:SILHOUETTE_PAIRS]
        x, y, labels = x[rows], y[rows], labels[rows]
        orders = np.stack([np.arange(len(x)), *(rng.permutation(len(x)) for _ in orders[1:])])
    points = np.concatenate([x, y])
    square = np.square(points).sum(1)
    distances = np.sqrt((square[:, None] + square - 2 * points @ points.T).clip(0))
    np.fill_diagonal(distances, 0)
    scores = []
    for order in orders:
        of_y = np.empty_like(labels)
        of_y[order] = labels  # row order[i] of y takes the label of row i of x
        scores.append(silhouette_score(distances, np.r_[labels, of_y], metric="precomputed"))
    return np.array(scores)
