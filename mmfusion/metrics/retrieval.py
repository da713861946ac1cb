"""Cross-modal retrieval from embeddings: R@K, median rank, mean average precision. Q queries, G gallery, L width.

Gallery items of equal cosine have no order, so every score is its expectation over random orders among equals, exactly:
a space where all vectors are equal scores chance. For one query, a block of n equal items with A items more similar,
m positives among the n and P among the A:

    rank of the best positive   A + (n + 1) / (m + 1)   (m = 1: 1 + A + half of the n - 1 others)
    R@K                         1 - C(n - m, K - A) / C(n, K - A),  0 for A >= K
    AP, a block's part          m / n [(P + 1) h + (m - 1) / (n - 1) (n - (A + 1) h)],  h = 1/(A+1) + ... + 1/(A+n)

Rank and R@K are of the first block that holds a positive; AP is the sum of the parts over the number of positives
(McSherry & Najork 2008, for scores with ties).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from torch import Tensor

CUTOFFS = (1, 5, 10)
TIE = 1e-12
"""sorted cosines that are no further apart are equal: rounding parts equal vectors by some 1e-15"""
CHUNK = 4_000_000
"""similarities held at a time: 32 MB"""


@dataclass(frozen=True)
class QueryScores:
    """Of the n queries that have a positive, in their order; what bootstrap intervals are made of."""

    query: np.ndarray
    """(n,) row numbers"""
    rank: np.ndarray
    """(n,) of the best positive, from 1; expected, so it may be fractional"""
    average_precision: np.ndarray
    """(n,)"""
    recall: dict[int, np.ndarray]
    """{K: (n,)}: probability that a positive is among the first K"""


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the queries that have a positive."""

    recall: dict[int, float]
    """{K: R@K}"""
    median_rank: float
    mean_average_precision: float
    queries: int
    without_positive: int
    """queries left out, since nothing in the gallery is right for them"""
    gallery: int
    per_query: QueryScores


def retrieval_scores(
    queries: np.ndarray | Tensor,
    gallery: np.ndarray | Tensor,
    query_labels: Sequence | np.ndarray | None = None,
    gallery_labels: Sequence | np.ndarray | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
) -> RetrievalScores:
    """Rank the gallery for each query by cosine similarity; ties count as said at the top.

    The best positive counts for R@K and rank, all positives count for the average precision.

    Args:
        queries, gallery: (Q, L) and (G, L).
        query_labels, gallery_labels: (Q,) and (G,) names or numbers of groups; items of an equal label are positives
            (an image and its five captions). Default: row i of the gallery, with Q = G, is the positive of query i.
        cutoffs: the K of R@K.

    Raises ValueError for shapes that do not fit, NaN or infinity, a zero vector (it has no direction), a cutoff below
    1, and where no query has a positive.
    """
    queries, gallery = embedding_matrix(queries, "queries"), embedding_matrix(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape} are not of one width")
    if not cutoffs or min(cutoffs) < 1:
        raise ValueError(f"cutoffs of R@K are whole numbers from 1 up, not {list(cutoffs)}")
    groups, order, bounds = _positives(len(queries), len(gallery), query_labels, gallery_labels)
    asked = np.flatnonzero(bounds[groups + 1] > bounds[groups])
    if not asked.size:
        raise ValueError(f"none of {len(queries)} queries has a positive among the {len(gallery)} of the gallery")
    queries, gallery = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    step = max(1, CHUNK // len(gallery))
    parts = []
    for start in range(0, len(asked), step):
        chunk = asked[start : start + step]
        positives = [order[bounds[g] : bounds[g + 1]] for g in groups[chunk]]
        parts.append(_score_blocks(*_tie_blocks(queries[chunk] @ gallery.T, positives), len(gallery), cutoffs))
    rank, precision, *recalls = np.concatenate(parts, 1)
    recall = dict(zip(cutoffs, recalls, strict=True))
    return RetrievalScores(
        {k: float(r.mean()) for k, r in recall.items()},
        float(np.median(rank)),
        float(precision.mean()),
        len(asked),
        len(queries) - len(asked),
        len(gallery),
        QueryScores(asked, rank, precision, recall),
    )


def cross_retrieval(
    latents: Mapping[str, np.ndarray | Tensor],
    labels: Mapping[str, Sequence | np.ndarray] | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[tuple[str, str], RetrievalScores]:
    """`retrieval_scores` of every ordered pair of modalities, by (name of the queries, name of the gallery).

    Args:
        latents: (N_m, L) by modality.
        labels: (N_m,) by modality; default: row i of every modality belongs to example i.

    Raises ValueError as `retrieval_scores`, and for labels of other modalities or fewer than two modalities.
    """
    if len(latents) < 2 or (labels is not None and labels.keys() != latents.keys()):
        of = "" if labels is None else f", labels of {list(labels)}"
        raise ValueError(f"two modalities at least, and labels of each or of none: got {list(latents)}{of}")
    labels = dict.fromkeys(latents) if labels is None else labels
    return {
        (a, b): retrieval_scores(latents[a], latents[b], labels[a], labels[b], cutoffs)
        for a, b in permutations(latents, 2)
    }


# ---- blocks of equal similarity ----------------------------------------------------------------------------------


def _tie_blocks(similarities: np.ndarray, positives: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The B blocks that hold positives, query by query, the most similar first.

    Args:
        similarities: (C, G); positives: C arrays of columns, none empty.

    Returns:
        (B,) each: query's row, items above the block (A), its items (n), its positives (m).
    """
    size = similarities.shape[1]
    similarities = -similarities  # ascending order is then that of rank
    if all(len(columns) == 1 for columns in positives):
        return _single_blocks(similarities, np.concatenate(positives))
    blocks = []
    for row, (values, columns, ordered) in enumerate(
        zip(similarities, positives, np.sort(similarities, 1), strict=True)
    ):
        edges = np.flatnonzero(np.diff(ordered) > TIE) + 1  # where blocks begin, but for the first
        block, m = np.unique(
            np.searchsorted(edges, np.searchsorted(ordered, values[columns]), "right"), return_counts=True
        )
        first, past = np.r_[0, edges][block], np.r_[edges, size][block]
        blocks.append(np.stack([np.full(len(block), row), first, past - first, m]))
    return tuple(np.concatenate(blocks, 1))


def _single_blocks(distances: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, ...]:
    """`_tie_blocks` of (C, G), least first, where each query has one positive: its column (C,). All rows at once."""
    rows, ordered = np.arange(len(distances)), np.sort(distances, 1)
    place = (ordered < distances[rows, positive][:, None]).sum(1)
    begins = np.diff(ordered, axis=1) > TIE  # (C, G - 1): a block begins at the next column
    columns = np.arange(distances.shape[1])
    first = np.where(np.pad(begins, ((0, 0), (1, 0))) & (columns <= place[:, None]), columns, 0).max(1)
    past = np.where(begins & (columns[1:] > place[:, None]), columns[1:], distances.shape[1])
    past = past.min(1, initial=distances.shape[1])
    return rows, first, past - first, np.ones_like(rows)


def _score_blocks(
    query: np.ndarray, above: np.ndarray, n: np.ndarray, m: np.ndarray, size: int, cutoffs: Sequence[int]
) -> np.ndarray:
    """(2 + K, C): rank of the best positive, average precision, and recall at each cutoff; args of `_tie_blocks`."""
    first = np.flatnonzero(np.diff(query, prepend=-1))  # each query's first block with a positive
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, size + 1))]
    total = np.add.reduceat(m, first)  # (C,) positives
    found = np.cumsum(m) - m
    found = found - found[first][query]  # (B,) positives above, of the same query
    h = harmonic[above + n] - harmonic[above]
    inner = np.where(n > 1, (m - 1) / np.maximum(n - 1, 1), 0) * (n - (above + 1) * h)
    precision = np.add.reduceat(m / n * ((found + 1) * h + inner), first) / total
    above, n, m = above[first], n[first], m[first]
    return np.stack([above + (n + 1) / (m + 1), precision, *(1 - _none_drawn(n, m, k - above) for k in cutoffs)])


def _none_drawn(n: np.ndarray, m: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Probability that k draws without replacement out of n hold none of m: prod_{i < k} (n - m - i) / (n - i)."""
    probability = np.ones(len(n))
    for i in range(max(0, int(k.max()))):
        probability *= np.where(i < k, np.maximum(n - m - i, 0) / np.maximum(n - i, 1), 1.0)
    return probability


def _positives(
    queries: int, gallery: int, query_labels: Sequence | None, gallery_labels: Sequence | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group (Q,) of each query, gallery rows (G,) group by group, and bounds: group g is rows bounds[g]:bounds[g+1]."""
    if (query_labels is None) != (gallery_labels is None):
        raise ValueError("labels of the queries go with labels of the gallery: give both or none")
    if query_labels is None:
        if queries != gallery:
            raise ValueError(f"{queries} queries and {gallery} items of the gallery are no pairs: give labels")
        return np.arange(queries), np.arange(gallery), np.arange(gallery + 1)
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    if query_labels.shape != (queries,) or gallery_labels.shape != (gallery,):
        shapes = f"{query_labels.shape} and {gallery_labels.shape}"
        raise ValueError(f"labels of {queries} queries and a gallery of {gallery} cannot be of shapes {shapes}")
    if (query_labels.dtype.kind in "iufb") != (gallery_labels.dtype.kind in "iufb"):
        raise ValueError(f"labels are of two kinds, {query_labels.dtype} and {gallery_labels.dtype}: none would agree")
    both = np.concatenate([query_labels, gallery_labels])
    if both.dtype.kind == "f" and np.isnan(both).any():
        raise ValueError("labels hold NaN: an item without a group gets a label of its own")
    _, group = np.unique(both, return_inverse=True)
    of_gallery = group[queries:]
    bounds = np.r_[0, np.cumsum(np.bincount(of_gallery, minlength=group.max() + 1))]
    return group[:queries], np.argsort(of_gallery, kind="stable"), bounds


# ---- checks ------------------------------------------------------------------------------------------------------


def embedding_matrix(x: np.ndarray | Tensor, name: str) -> np.ndarray:
    """The embeddings (N, L) in float64; ValueError naming them for another shape, NaN or infinity."""
    x = x.detach().cpu().double().numpy() if isinstance(x, Tensor) else np.asarray(x, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} of shape {x.shape} must be (N, L), and not empty")
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(1))
        raise ValueError(f"{name} of shape {x.shape} holds NaN or infinity in {rows.size} rows, the first is {rows[0]}")
    return x


def unit_rows(x: np.ndarray, name: str) -> np.ndarray:
    """Rows (N, L) divided by their norm; ValueError naming them where one is zero and has no direction."""
    largest = np.abs(x).max(1, keepdims=True)
    if not largest.all():
        rows = np.flatnonzero(largest == 0)
        raise ValueError(f"{name} of shape {x.shape} has {rows.size} zero vectors, the first in row {rows[0]}")
    x = x / largest  # squares neither overflow nor vanish
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x
