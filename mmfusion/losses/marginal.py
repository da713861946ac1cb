"""Distances between the batches of M modalities as clouds of points: optimal transport, and MMD as its control.

Both are marginal: a permutation of one modality's rows changes nothing, so a term that knows partners belongs beside
them. Both fall where all latents shrink together, unless the cost is the cosine's: keep a prior or a floor of variance.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from mmfusion.losses.modality_pairs import paired, stacked
from mmfusion.losses.optimal_transport import cosine_cost, sinkhorn_divergence, squared_distance_cost
from mmfusion.losses.token_alignment import mmd_between

BatchCost = Literal["cosine", "squared_distance"]


def batch_transport(
    latents: Mapping[str, Tensor],
    hub: str | None = None,
    *,
    cost: BatchCost = "cosine",
    epsilon: float = 0.05,
    iterations: int = 50,
) -> Tensor:
    """Debiased Sinkhorn divergence between the modalities' batches, mean over pairs: 0 where all are the same rows.

    Args:
        latents: (B, L) by modality; each batch is B points of equal mass, in any order.
        hub: compare each modality with this one alone, M - 1 pairs; default all M (M - 1) / 2.
        cost: 1 - cos, or the squared distance.
        epsilon: weight of the entropy. For cosines in units of the cost, [0, 2]; for squared distances in units of the
            mean squared distance between two rows of any modalities (taken without gradient), 2 L under N(0, I).
        iterations: of Sinkhorn, log kernel.

    Returns:
        A scalar in units of the cost; 0 for one modality. Too few iterations leave it slightly negative,
        and dependent on the order of the modalities (by 1e-4 of it at the defaults).

    Raises:
        ValueError: latents that are not (B, L) alike, an unknown cost, a hub that is none of the modalities, or as
            `sinkhorn`.
    """
    if cost not in get_args(BatchCost):
        raise ValueError(f"cost is one of {', '.join(get_args(BatchCost))}, not {cost!r}")
    z = stacked(latents)
    scale = z.new_ones(())
    if cost == "squared_distance":
        z = z - z.detach().mean((0, 1))  # changes no distance, saves rounding
        scale = 2 * z.detach().square().sum(-1).mean().clamp_min(1e-12)  # of two independent rows
        z = z * scale.rsqrt()
    x, y = paired(z, latents, hub)  # (P, B, L)
    if not len(x):
        return z.new_zeros(())
    function = cosine_cost if cost == "cosine" else squared_distance_cost
    return scale * sinkhorn_divergence(x, y, cost=function, epsilon=epsilon, iterations=iterations).mean()


def batch_mmd(latents: Mapping[str, Tensor], hub: str | None = None) -> Tensor:
    """Unbiased squared MMD between the modalities' batches (`token_alignment.mmd_between`), mean over pairs.

    Kernel widths follow the mean squared distance within each pair, without gradient. Being unbiased it is 0 on average
    where the distributions are equal, hence at times negative.

    Args:
        latents: (B, L) by modality, B >= 2.
        hub: as `batch_transport`.

    Returns:
        A scalar; 0 for one modality.

    Raises:
        ValueError: latents that are not (B, L) alike, B < 2, or a hub that is none of the modalities.
    """
    z = stacked(latents, least=2)
    x, y = paired(z, latents, hub)  # (P, B, L)
    if not len(x):
        return z.new_zeros(())
    return torch.vmap(mmd_between)(x, y).mean()
