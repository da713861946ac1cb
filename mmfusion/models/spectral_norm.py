"""Spectral normalisation of weight matrices, without a state: a training option, and a control in the experiments."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmf_module import LowRankMultimodalFusion


def normalise_spectrally(module: nn.Module, bound: float) -> None:
    """Give every Linear layer in `module` a weight whose spectral norm is at most `bound`, in place.

    Masked ranks of an LMF layer take no part in the norm, so that it stays exactly the smaller layer. Raises ValueError
    for a bound that is not positive.
    """
    if not bound > 0:
        raise ValueError(f"the bound of a spectral norm is positive, not {bound}")
    rows = {}
    for layer in module.modules():
        if isinstance(layer, LowRankMultimodalFusion):
            for projection in layer.projections:
                # rows are rank-major: every rank has as many as the layer has outputs (or one, of shared factors)
                rows[projection] = layer.rank_mask.repeat_interleave(projection.out_features // layer.rank)
    for layer in [layer for layer in module.modules() if isinstance(layer, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", SpectralNormalisation(bound, rows.get(layer)))


class SpectralNormalisation(nn.Module):
    """Parametrisation of a weight matrix: divided by (an upper bound of) its spectral norm, times `bound`.

    Miyato et al. (2018) estimate the norm by a power iteration with a state, which neither vmap nor a resumed run
    likes. Here it is the Schatten norm of order 2^(k+1) by k squarings of W W^T: at most n^(1/2^(k+1)) times the
    spectral norm, n the smaller side of W, and never below it. No state, no random numbers, differentiable.
    """

    SQUARINGS = 6

    def __init__(self, bound: float = 1.0, rows: Tensor | None = None) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("rows", rows)  # (n,) of 1 and 0: which rows count

    def forward(self, weight: Tensor) -> Tensor:
        seen = weight if self.rows is None else weight * self.rows.unsqueeze(-1)
        return weight * (self.bound / schatten_norm(seen, self.SQUARINGS))


def schatten_norm(weight: Tensor, squarings: int) -> Tensor:
    """(sum_i s_i^p)^(1/p) of the singular values s of a matrix, p = 2^(squarings + 1); a scalar."""
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight  # (n, n)
    logarithm, power = torch.zeros_like(gram[0, 0]), 1.0
    for _ in range(squarings):
        size = gram.diagonal().sum()  # the trace bounds the largest eigenvalue: no power overflows
        logarithm, gram = logarithm + power * size.log(), gram / size
        gram, power = gram @ gram, power / 2
    logarithm = logarithm + power * gram.diagonal().sum().log()
    return (logarithm / 2).exp()
