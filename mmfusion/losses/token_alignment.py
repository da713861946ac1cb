"""Alignment of the tokens of several modalities: by a Wasserstein distance, and by the MMD as its control.

Both are marginal: they see the two sets of tokens, not which example's image belongs to which text beyond that the
sets are of one example; and both are 0 where all tokens are equal, so that something else must keep their variance.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jwae_module import GAUSSIAN_SCALES, off_diagonal_mean, products
from mmfusion.losses.optimal_transport import transport_loss
from mmfusion.sequences import Tokens

Layers = Literal["last", "all"]


@dataclass(frozen=True)
class TransportTerm:
    """Mean over examples, pairs of modalities and layers of <C, P>, C the cosine distance of tokens, P transport.

    P is taken as given (no gradient), as in the word-region alignment of UNITER (Chen et al., 2020), whose published
    equations are the nearest to those of Wasserstein modality alignment (Zhi et al., 2025).
    """

    method: Literal["ipot", "sinkhorn", "random"] = "ipot"
    """where the plan comes from; "random" is a control: the right masses, and no knowledge of the tokens"""
    layers: Layers = "last"
    """which layers' tokens are aligned"""
    debiased: bool = False
    """less half of the same of each modality with itself"""
    iterations: int = 20

    def __call__(self, layers: Sequence[Mapping[str, Tokens]], phase: Tensor | None = None) -> Tensor:
        """Scalar of one batch; an example counts where both modalities have tokens.

        Args:
            layers: tokens (B, T_m, W) of each modality after each layer.
            phase: uniform numbers (B,) that a random plan is made of.
        """
        losses = []
        for tokens in layers if self.layers == "all" else layers[-1:]:
            for x, y in itertools.combinations(tokens.values(), 2):
                noise = None
                if self.method == "random":
                    noise = _scattered(phase, x.values.shape[-2], y.values.shape[-2])
                both = x.mask.any(-1) & y.mask.any(-1)
                of_examples = transport_loss(
                    x.values,
                    y.values,
                    x.mask,
                    y.mask,
                    method=self.method,
                    debiased=self.debiased,
                    iterations=self.iterations,
                    kernel="exponential",  # of Sinkhorn alone; cosine costs are bounded
                    noise=noise,
                )
                losses.append(torch.where(both, of_examples, 0).sum() / both.sum().clamp_min(1))
        return torch.stack(losses).mean()


def _scattered(phase: Tensor, n: int, m: int) -> Tensor:
    """(B, n, m) numbers in [0, 1) without a pattern, other ones for every phase (B,) in [0, 1) and every place."""
    i = torch.arange(1, n + 1, device=phase.device, dtype=torch.float32)[:, None]
    j = torch.arange(1, m + 1, device=phase.device, dtype=torch.float32)
    return (torch.sin(12.9898 * i + 78.233 * j + 1000 * phase[:, None, None]) * 43758.5453).remainder(1.0)


def mmd_between(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared MMD between x (B, W) and y (B, W), Gaussian kernels of the scales of `jwae_module.mmd_penalty`.

    Scales are relative to the tokens' own mean squared distance (no gradient), so that no width or norm is presumed.
    """
    both = torch.cat([x, y])
    squared = both.square().sum(-1)
    distances = (squared[:, None] + squared - 2 * products(both, both)).clamp_min(0)
    unit = distances.detach().mean().clamp_min(1e-12)
    count, total = len(x), 0.0
    for scale in GAUSSIAN_SCALES:
        kernel = torch.exp(-distances / (2 * scale * unit))
        within = off_diagonal_mean(kernel[:count, :count], 1.0) + off_diagonal_mean(kernel[count:, count:], 1.0)
        total = total + within - 2 * kernel[:count, count:].mean()
    return total / len(GAUSSIAN_SCALES)
