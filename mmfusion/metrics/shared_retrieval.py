"""Retrieval among rows of which several have one item of a modality in common: an image and its five captions.

N rows have I distinct items. An item is asked with, and looked for, once: as published, 1000 images x 5000 captions and
not 5000 x 5000. All of an item's rows are right for it, and it is for each of them.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from torch import Tensor

from mmfusion.metrics.retrieval import CUTOFFS, TIE, RetrievalScores, cross_retrieval, embedding_matrix, unit_rows


def shared_retrieval(
    latents: Mapping[str, np.ndarray | Tensor],
    shared: Mapping[str, Sequence | np.ndarray],
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[tuple[str, str], RetrievalScores]:
    """`cross_retrieval` of distinct items.

    Args:
        latents: {modality: (N, L)}.
        shared: {modality: names (N,) of the rows' items}, of one modality at most (`Split.shared`); empty: row i of
            each modality is the one partner of row i of every other.

    Raises ValueError as `cross_retrieval`, and where several modalities share items.
    """
    if not shared:
        return cross_retrieval(latents, None, cutoffs)
    return cross_retrieval(*_distinct(latents, shared), cutoffs)


def shared_precision(latents: Mapping[str, np.ndarray | Tensor], shared: Mapping[str, Sequence | np.ndarray]) -> float:
    """Mean average precision over all ordered pairs of modalities: that of `shared_retrieval`, without sorting.

    Of a positive in a block of n equal items, m of them positives, with A items and P positives above it, the part is

        1 / n [(P + 1) h + (m - 1) / (n - 1) (n - (A + 1) h)],  h = 1/(A+1) + ... + 1/(A+n).

    Raises ValueError as `shared_retrieval`.
    """
    items, labels = latents, {name: np.arange(len(z)) for name, z in latents.items()}
    if shared:
        items, labels = _distinct(latents, shared)
    units = {name: unit_rows(embedding_matrix(z, name), name) for name, z in items.items()}
    found = []
    for a, b in combinations(units, 2):
        similarities = units[a] @ units[b].T
        for table, asked, searched in ((similarities, labels[a], labels[b]), (similarities.T, labels[b], labels[a])):
            found.append(_average_precision(table, asked, searched).mean())
    return float(np.mean(found))


def distinct_items(names: Sequence | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row (I,) of each of I distinct names, in order of appearance, and the number (N,) of each row's name."""
    _, first, inverse = np.unique(np.asarray(names), return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[inverse]


def _distinct(
    latents: Mapping[str, np.ndarray | Tensor], shared: Mapping[str, Sequence | np.ndarray]
) -> tuple[dict[str, np.ndarray | Tensor], dict[str, np.ndarray]]:
    """Latents with each item of the shared modality once, and the number of the item of all that is left."""
    if len(shared) != 1:
        raise ValueError(f"items are shared in one modality, not in {', '.join(shared) or 'none'}")
    ((modality, names),) = shared.items()
    first, item = distinct_items(names)
    items = {name: z[first] if name == modality else z for name, z in latents.items()}
    return items, {name: item[first] if name == modality else item for name in latents}


def _average_precision(similarities: np.ndarray, asked: np.ndarray, searched: np.ndarray) -> np.ndarray:
    """(Q,) of similarities (Q, G), of the items (Q,) that ask and those (G,) that the gallery is of."""
    order, counts = np.argsort(searched, kind="stable"), np.bincount(searched)
    ends = np.cumsum(counts)
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, similarities.shape[1] + 1))]
    rank = np.arange(counts.max())  # K, the most positives that an item has
    there = rank < counts[asked][:, None]  # (Q, K)
    columns = order[np.where(there, (ends - counts)[asked][:, None] + rank, 0)]
    own = np.where(there, np.take_along_axis(similarities, columns, 1), -np.inf)  # (Q, K)
    total = np.zeros(len(similarities))
    for k in rank:
        here, of_own = own[:, k, None], own[there[:, k]]
        rows = there[:, k]
        table, here = similarities if rows.all() else similarities[rows], here[rows]  # a copy costs as much again
        above, past = (table > here + TIE).sum(1), (table >= here - TIE).sum(1)
        p, m = (of_own > here + TIE).sum(1), (np.abs(of_own - here) <= TIE).sum(1)
        n, h = past - above, harmonic[past] - harmonic[above]
        total[rows] += ((p + 1) * h + (m - 1) / np.maximum(n - 1, 1) * (n - (above + 1) * h)) / n
    return total / counts[asked]
