"""What each modality contributes to the variance of a fused prediction, and how unevenly the modalities contribute."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from lmf_module import LowRankMultimodalFusion
from modality_attribution import parts_about


@torch.no_grad()
def variance_shares(layer: LowRankMultimodalFusion, latents: Sequence[Tensor]) -> dict[tuple[int, ...], float]:
    """Share of each subset of modalities in the variance of the layer's outputs, about the mean latents.

        share_S = sum_o cov(part_So, y_o) / sum_o var(y_o),    y = sum_S part_S

    The parts are those of `modality_attribution.parts_about`.

    Args:
        layer: of M modalities and O outputs; left as it is.
        latents: M tensors (n, d_m).

    Returns:
        2^M - 1 shares keyed by ascending modality indices; they sum to 1 (all are 0 where y is constant), and one is
        negative where its part works against the whole.

    Raises ValueError for latents that do not fit the layer.
    """
    parts = parts_about(deepcopy(layer).double(), [z.double() for z in latents])  # (n, O) each
    parts = {subset: part - part.mean(0) for subset, part in parts.items() if subset}
    whole = sum(parts.values())
    total = whole.square().sum().clamp_min(1e-30)
    return {subset: ((part * whole).sum() / total).item() for subset, part in parts.items()}


def contributions(shares: Mapping[tuple[int, ...], np.ndarray | float], modalities: int) -> np.ndarray:
    """Shares (...) by subset -> (..., M): each subset's share in equal parts to its modalities.

    That is the Shapley value of the game whose worth v(T) is the sum of the shares of all S within T; it sums to what
    the shares sum to.
    """
    return np.stack(
        [sum(np.asarray(share) / len(s) for s, share in shares.items() if m in s) for m in range(modalities)], -1
    )


def imbalance(contribution: np.ndarray) -> np.ndarray:
    """(..., M) -> (...): (largest - 1/M) / (1 - 1/M) of contributions clipped at 0 and normalised to sum 1.

    0 where all contribute alike (or none at all), 1 where one does everything. M is at least 2.
    """
    m = contribution.shape[-1]
    clipped = np.clip(contribution, 0, None)
    total = clipped.sum(-1, keepdims=True)
    share = np.where(total > 0, clipped / np.where(total > 0, total, 1), 1 / m)
    return (share.max(-1) - 1 / m) / (1 - 1 / m)
