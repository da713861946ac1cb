"""What models of token sequences have in common: their output, and sequences of which parts are hidden."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmfusion.sequences import Tokens


class TokenOutput(NamedTuple):
    """What one model says of one batch of sequences."""

    prediction: Tensor  # (B, O): logits, or values in the units of a regression's target
    layers: list[dict[str, Tokens]]  # tokens (B, T_m, W) of each modality after each layer that can be aligned
    latents: dict[str, Tensor] = {}  # noqa: RUF012 (B, L) of one token of each example, where one was asked for
    standardised: dict[str, Tensor] = {}  # noqa: RUF012 (B, d_m) of the same tokens
    reconstructions: dict[str, Tensor] = {}  # noqa: RUF012 (B, d_m) of the same tokens
    covariance: Tensor | None = None  # of the prediction: these models are certain of their latents


def hide(tokens: Mapping[str, Tokens], present: Mapping[str, Tensor] | None) -> dict[str, Tokens]:
    """The tokens without those of modalities that are not `present` (B,) in an example."""
    present = present or {}
    return {
        name: Tokens(x.values, x.mask * present[name].unsqueeze(-1)) if name in present else x
        for name, x in tokens.items()
    }


def draw_tokens(tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor], uniforms: Tensor) -> dict[str, Tensor]:
    """One token of each example, (B, d_m) of (B, T_m, d_m): the one at `uniforms` (B, M) of its length.

    Whatever is true of such a token on average is true of all tokens, each example weighing alike. Of an empty
    sequence it is its first place, which holds zeros.
    """
    chosen = {}
    for m, (name, x) in enumerate(tokens.items()):
        place = (uniforms[:, m] * masks[name].sum(-1)).long()  # (B,)
        chosen[name] = x.gather(1, place[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1)
    return chosen


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(..., T, d) and mask (..., T) -> (..., d): mean over the tokens, 0 where there is none."""
    return (x * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True).clamp_min(1)


def uniform_mass(mask: Tensor) -> Tensor:
    """(..., T) -> (..., T): the same mass for every token, 0 at padding, 1 altogether or 0 of an empty sequence."""
    return mask / mask.sum(-1, keepdim=True).clamp_min(1)


def step_times(mask: Tensor) -> Tensor:
    """(..., T) -> (..., T): when each step is, from 0 at an example's first to 1 at its last."""
    place = torch.cumsum(mask, -1) - 1
    return place / (mask.sum(-1, keepdim=True) - 1).clamp_min(1)
