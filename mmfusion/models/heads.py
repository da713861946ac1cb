"""Scalings and coordinates that travel with a model, and the heads that LMF is compared with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmf_module import LowRankMultimodalFusion, Moments
from mmfusion.sequences import Sequences


class Standardise(nn.Module):
    """(x - mean) / std per coordinate; mean and std are buffers, so they travel with the weights.

    A coordinate that is constant in training is mapped to 0 there and divided by 1 elsewhere.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, x: Tensor | Sequences) -> None:
        """Take mean and standard deviation from x (N, d), of sequences over tokens; in float64: N may be large."""
        if isinstance(x, Sequences):
            mean, std = _moments_of(x)
        else:
            std, mean = torch.std_mean(x.double(), dim=0, correction=0)
        # relative to the coordinate's size: a constant column has a rounding-error std, not 0
        constant = std <= 1e-6 * mean.abs().clamp_min(1e-12)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, torch.ones_like(std), std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).div_(self.std)  # in place: of token sequences a copy more is felt


def _moments_of(x: Sequences) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) over all tokens of N sequences, of which one is in memory at a time."""
    count, total, squares = 0, torch.zeros(x.shape[-1], dtype=torch.double), 0.0
    centre = next((part[0].double() for part in x if len(part)), total)  # sums of squares about it cancel less
    for part in x:
        away = part.double() - centre
        count, total, squares = count + len(part), total + away.sum(0), squares + away.square().sum(0)
    mean = total / max(count, 1)
    return centre + mean, (squares / max(count, 1) - mean.square()).clamp_min(0).sqrt()


class Rescale(nn.Module):
    """x * std + mean per output, so that a regression learns a standardised target; the identity unless fitted."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @property
    def is_fitted(self) -> bool:
        """True unless it is the identity."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    @torch.no_grad()
    def fit(self, target: Tensor) -> None:
        """Take mean and standard deviation from a regression's training targets, (N,) or (N, O)."""
        std, mean = torch.std_mean(target.double().reshape(len(target), -1), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


class Frame(nn.Module):
    """matrix z + shift: latents in the coordinates they were trained in, which modalities share; the identity at first.

    matrix (L, L) and shift (L,) are buffers, so they travel with the weights.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(dim))
        self.register_buffer("shift", torch.zeros(dim))

    @torch.no_grad()
    def compose(self, matrix: Tensor, shift: Tensor) -> None:
        """Take note of new coordinates z' of the latents, z = matrix z' + shift; (L, L) and (L,), in float64."""
        self.shift.copy_(self.matrix.double() @ shift + self.shift.double())  # of the matrix as it was
        self.matrix.copy_(self.matrix.double() @ matrix)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (..., L) of the model's own coordinates in those of training."""
        return z @ self.matrix.mT + self.shift  # (..., L) (L, L) -> (..., L)

    def inverse(self, z: Tensor) -> Tensor:
        """Latents (..., L) of the coordinates of training in the model's own."""
        rows = (z - self.shift).reshape(-1, z.shape[-1])
        return torch.linalg.solve(self.matrix.mT, rows, left=False).reshape(z.shape)


class ConcatenationHead(nn.Module):
    """The usual alternative to LMF: concatenated latents through one hidden layer.

    Takes the same list of latents (..., d_m) and returns (..., O).
    """

    def __init__(self, input_dims: list[int], output_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(sum(input_dims), hidden_dim), nn.GELU(), nn.Linear(hidden_dim, output_dim)
        )

    def forward(self, latents: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(latents, dim=-1))


class TensorHead(nn.Module):
    """Tensor fusion (TFN; Zadeh et al., EMNLP 2017) with a linear readout: a free weight for every entry of the outer
    product of the [z_m; 1]. LMF is this head with its weight tensor, (d_1 + 1) x ... x (d_M + 1) per output, at rank R.

    Takes a list of latents (..., d_m) and returns (..., O).
    """

    def __init__(self, input_dims: list[int], output_dim: int) -> None:
        super().__init__()
        self.readout = nn.Linear(math.prod(d + 1 for d in input_dims), output_dim)

    def forward(self, latents: list[Tensor]) -> Tensor:
        product = F.pad(latents[0], (0, 1), value=1.0)
        for z in latents[1:]:
            product = (product.unsqueeze(-1) * F.pad(z, (0, 1), value=1.0).unsqueeze(-2)).flatten(-2)
        return self.readout(product)  # (..., prod_m (d_m + 1)) -> (..., O)


class FusedWidthHead(nn.Module):
    """LMF into `fused_dim` outputs and a linear layer over them, as the published models have it.

    The prediction's CP rank is then bounded by rank * fused_dim, not by the rank. Takes a list of latents (..., d_m)
    and returns (..., O).
    """

    def __init__(self, layer: LowRankMultimodalFusion, output_dim: int) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(layer.output_dim, output_dim)

    def forward(self, latents: list[Tensor]) -> Tensor:
        return self.readout(self.layer(latents))

    def moments(self, means: list[Tensor], variances: list[Tensor], *, joint: bool = True) -> Moments:
        """Exact mean and covariance of the output, as `LowRankMultimodalFusion.moments`."""
        mean, covariance = self.layer.moments(means, variances)  # joint: the readout mixes the fused outputs
        weight = self.readout.weight  # (O, D)
        spread = weight @ covariance  # (..., O, D)
        return Moments(self.readout(mean), spread @ weight.T if joint else (spread * weight).sum(-1).diag_embed())
