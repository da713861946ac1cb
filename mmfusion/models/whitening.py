"""The prior's first two moments, given to the latents of a trained model without changing what it says.

LMF is affine in each latent, so any invertible affine map of a latent, z -> G (z - m), can be undone in the layer's
factors, A -> A G^-1 and c -> c + A m, and in the first layer of the decoder. Mean and covariance of the latents are
thus a choice of coordinates: no loss on predictions or reconstructions can see them. Here they are chosen such that on
the training examples

    mean mu = 0,    Cov(mu) + diag(s^2) = I,    Cov(mu) diagonal, largest entry first.

With C = Cov(mu) and D = diag(s^2), G = V^T (C + D)^-1/2, V the eigenvectors of (C + D)^-1/2 D (C + D)^-1/2, whose
eigenvalues are the new s^2: noise stays independent by coordinate. What is not a choice of coordinates, the shape of
the distribution beyond its moments and how much of each coordinate is noise, only training decides.

Each modality gets coordinates of its own, in which its latents no longer lie beside another's: the model's `Frame`s
lead back to those that all were trained in.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmf_module import LowRankMultimodalFusion
from mmfusion.models.heads import FusedWidthHead

SINGULAR = 1e-10  # of the largest eigenvalue: what lies below is rounding, and keeps its scale


@torch.no_grad()
def whiten_latents(model: nn.Module, features: Mapping[str, Tensor]) -> None:
    """Give the latents of a `mmfusion.models.fusion.FusionModel` mean 0 and covariance I on raw features (n, d_m).

    Predictions, their covariances and reconstructions of whole examples stay as they are, up to rounding. A missing
    latent is 0, which now is its mean in training. A direction in which certain latents do not vary keeps its scale.
    `model.frames` leads back to the latents that were trained.

    Raises ValueError: fewer than 2 examples, a head other than LMF, or weights that are computed from others.
    """
    layer = model.fusion.layer if isinstance(model.fusion, FusedWidthHead) else model.fusion
    if not isinstance(layer, LowRankMultimodalFusion) or hasattr(layer.projections[0], "parametrizations"):
        raise ValueError("latents are whitened under an LMF head of free weights")
    standardised = {name: module(features[name]) for name, module in model.standardise.items()}
    means, variances = model.jwae.posterior(standardised)
    if len(next(iter(means.values()))) < 2:
        raise ValueError("a covariance needs 2 examples")
    for name, projection in zip(model.modalities, layer.projections, strict=True):
        shift, matrix, inverse, noise = _coordinates(means[name].double(), variances.get(name))
        encoder, decoder = model.jwae.encoders[name][-1], model.jwae.decoders[name][0]
        encoder.bias.copy_(matrix @ (encoder.bias.double() - shift))
        encoder.weight.copy_(matrix @ encoder.weight.double())
        for reader in (decoder, projection):
            reader.bias.copy_(reader.bias.double() + reader.weight.double() @ shift)
            reader.weight.copy_(reader.weight.double() @ inverse)
        model.frames[name].compose(inverse, shift)
        if noise is not None:
            model.jwae.set_noise(name, noise)


def _coordinates(means: Tensor, variances: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """m (L,), G (L, L), its inverse and the new variances (L,) of latents with means (n, L) and variances (L,)."""
    covariance = means.T.cov().reshape(means.shape[1], -1)
    noise = torch.zeros_like(covariance) if variances is None else torch.diag(variances.double())
    values, vectors = torch.linalg.eigh(covariance + noise)
    scale = torch.where(values > values[-1].clamp_min(0) * SINGULAR, values, 1).sqrt()
    root, inverse_root = (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
    if variances is None:
        order, share = vectors.flip(1), None  # largest variance first
    else:
        share, order = torch.linalg.eigh(inverse_root @ noise @ inverse_root)  # least noise first
        share = share.clamp_min(0)
    return means.mean(0), order.T @ inverse_root, root @ order, share
