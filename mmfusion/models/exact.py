"""A trained member's head, readout and rescaling as one LMF layer in float64, and the latents that it takes."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn

from lmf_module import LowRankMultimodalFusion
from mmfusion.models.heads import FusedWidthHead, Rescale


class Member(Protocol):
    """What is asked of a `mmfusion.models.fusion.FusionModel`, which stands above this module."""

    modalities: tuple[str, ...]
    fusion: nn.Module
    rescale: Rescale

    def latents(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Latents (N, L) of raw features (N, d_m), in the order of `modalities`."""
        ...

    def latent_variances(self) -> list[Tensor]:
        """Variances (L,) of their noise, in the same order; none of certain latents."""
        ...


@torch.no_grad()
def exact_layer(member: Member) -> LowRankMultimodalFusion:
    """The member's head, readout and rescaling as one LMF layer in float64: latents -> prediction.

    A readout over a fused width D makes it a layer of R * D ranks. Raises ValueError where the head is not LMF.
    """
    head = deepcopy(member.fusion).double()
    std, mean = member.rescale.std.double(), member.rescale.mean.double()  # (O,)
    if not isinstance(head, FusedWidthHead | LowRankMultimodalFusion):
        raise ValueError(f"an exact account needs an LMF head, not {type(head).__name__}")
    inner = head.layer if isinstance(head, FusedWidthHead) else head
    mask = inner.rank_mask[:, None] if inner.shared_factors else inner.rank_mask
    weights, bias = inner.rank_weights * mask, inner.bias  # (R,), or (R, O) of shared factors
    if isinstance(head, FusedWidthHead):
        if not inner.shared_factors:  # row (r, d) of the projections becomes a rank of its own
            weights = (weights[:, None, None] * torch.eye(inner.output_dim).double()).flatten(0, 1)  # (R * D, D)
        weights = weights @ head.readout.weight.T  # (..., D) (D, O) -> (..., O)
        bias = head.readout(bias)
    shared = weights.ndim == 2
    with torch.random.fork_rng(devices=[]):  # a new layer draws values that are overwritten here
        layer = LowRankMultimodalFusion(inner.input_dims, len(std), len(weights), shared_factors=shared).double()
    # values and not modules are copied: a weight may be computed from others (`torch.nn.utils.parametrize`)
    layer.rank_weights.copy_(weights * std if shared else weights)
    layer.bias.copy_(bias * std + mean)
    for k, (new, old) in enumerate(zip(layer.projections, inner.projections, strict=True)):
        scale = std.repeat(layer.rank) if k == 0 and not shared else torch.ones(())  # one row per rank and output
        new.weight.copy_(old.weight * scale.reshape(-1, 1))
        new.bias.copy_(old.bias * scale)
    return layer.requires_grad_(False)


@torch.no_grad()
def latents_of(member: Member, features: Mapping[str, Tensor]) -> list[Tensor]:
    """float64 latents (N, L) of raw features (N, d_m), in the head's order."""
    return [z.double() for z in member.latents(features)]


@torch.no_grad()
def noise_of(member: Member) -> list[Tensor]:
    """float64 variances (L,) of the noise of a member's latents, in the head's order; none of certain latents."""
    return [v.double() for v in member.latent_variances()]
