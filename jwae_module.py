"""Joint Wasserstein autoencoder (Mahajan, Botschen, Gurevych, Roth, 2019): an autoencoder per modality, one prior.

The latents of every modality are pulled to N(0, I) by an MMD penalty (`mmd_penalty`) and kept informative by
`reconstruction_error`; what ties them to each other is in `mmfusion.losses.contrastive`. B batch, L latent width, d_m
width of modality m.

No forward pass here draws random numbers, works in place or branches on values, so that all of it runs under
`torch.func` (vmap, functional_call) and `torch.compile(fullgraph=True)`: hence no batch norm and no dropout.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bandwidths v = scale * L. For latents of std 0.1 to 0.8 and 1.25 to 10, and L 2 to 128, these keep the expected
# d MMD^2 / d log(std) between 0.02 and 0.3 in size, and towards std 1: 0.25 sees collapse and shape, 0.5 has the most
# power near the prior, 4 and 32 still see latents of std 3 and 10. (A single bandwidth v = L leaves 7e-15 at std 10.)
GAUSSIAN_SCALES = (0.25, 0.5, 4.0, 32.0)


class JWAE(nn.Module):
    """An encoder d_m -> hidden -> L and a mirrored decoder for each modality.

    Args:
        input_dims: width d_m of each modality, by name; this order is the order of every returned dict.
        latent_dim: shared latent width L.
        hidden_dim: width of the one hidden layer of each encoder and decoder.

    Raises:
        ValueError: no modality, or a width below 1.
    """

    def __init__(self, input_dims: Mapping[str, int], latent_dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.input_dims = dict(input_dims)
        self.latent_dim = latent_dim
        self.hidden_dim = hidden_dim
        if not self.input_dims or min(latent_dim, hidden_dim, *self.input_dims.values()) < 1:
            sizes = f"{self.input_dims}, latent_dim {latent_dim}, hidden_dim {hidden_dim}"
            raise ValueError(f"at least one modality and widths of at least 1 are needed, got {sizes}")
        self.encoders = nn.ModuleDict({name: _mlp(d, hidden_dim, latent_dim) for name, d in self.input_dims.items()})
        self.decoders = nn.ModuleDict({name: _mlp(latent_dim, hidden_dim, d) for name, d in self.input_dims.items()})

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map features (..., d_m), standardised by the caller, to latents (..., L) of each modality.

        Raises:
            ValueError: other modalities, or other widths, than the model's.
        """
        _check(features, self.input_dims, "features")
        return {name: encoder(features[name]) for name, encoder in self.encoders.items()}

    def decode(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map latents (..., L) back to features (..., d_m) of each modality.

        Raises:
            ValueError: other modalities, or another latent width, than the model's.
        """
        _check(latents, dict.fromkeys(self.input_dims, self.latent_dim), "latents")
        return {name: decoder(latents[name]) for name, decoder in self.decoders.items()}

    def forward(self, features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the latents (..., L) and the reconstructions (..., d_m) of features (..., d_m)."""
        latents = self.encode(features)
        return latents, self.decode(latents)


def mmd_penalty(z: Tensor, *, scales: Sequence[float] = GAUSSIAN_SCALES) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy between the rows of z and N(0, I), without draws of it.

    Gaussian kernels exp(-|a - b|^2 / (2 v)), v = scale * L, integrated over the prior (Rustamov, 2019); mean over v:

        mean_{i != j} k(z_i, z_j) - 2 (v / (v + 1))^(L/2) mean_i exp(-|z_i|^2 / (2 (v + 1))) + (v / (v + 2))^(L/2)

    Being unbiased it is 0 on average under the prior, hence at times negative. Its noise is half that of the same
    estimate from as many draws of the prior.

    What it cannot see: in a wide space isotropic kernels hardly notice the shape of single coordinates. With B = 128,
    independent exponential coordinates lie 15 null standard deviations away at L = 2, 6 at L = 16, but 0.6 at L = 128;
    a std of 0.9 or a mean of 0.2 is the more visible, the wider the space. Bounded kernels also forgive rare
    outliers: heavy tails of the inputs survive in the latents' kurtosis longer than any error of mean or covariance.

    Args:
        z: latents (B, L), B >= 2.
        scales: bandwidths, in units of L.

    Returns:
        A scalar, in float32 for half-precision latents.

    Raises:
        ValueError: z is not (B, L) with B >= 2, or a scale is not positive.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"latents must be (B, L) with B of at least 2, got {tuple(z.shape)}")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be one or more positive numbers, got {tuple(scales)}")
    z, width = upcast(z), z.shape[1]
    norms = z.square().sum(-1)  # (B,)
    # |z_i - z_j|^2 (B, B); rounding may leave a 0 negative, which no kernel minds. Norms anew: their gradients would
    # else be added in another order, and runs of before not be repeated to the bit
    distances = z.square().sum(-1)[:, None] + z.square().sum(-1) - 2 * products(z, z)
    total = z.new_zeros(())
    for scale in scales:
        v = scale * width
        k_zz = off_diagonal_mean(torch.exp(-distances / (2 * v)), 1.0)  # U-statistic: the diagonal would bias it by 1/B
        k_zp = (v / (v + 1)) ** (width / 2) * torch.exp(-norms / (2 * (v + 1))).mean()
        k_pp = (v / (v + 2)) ** (width / 2)
        total = total + k_zz - 2 * k_zp + k_pp
    return total / len(scales)


def reconstruction_error(features: Mapping[str, Tensor], reconstructions: Mapping[str, Tensor]) -> Tensor:
    """Mean over the modalities of the mean squared error per coordinate: 1 is what predicting the mean costs.

    Args:
        features: standardised inputs (..., d_m) by modality.
        reconstructions: the decoder's outputs, same names and shapes.

    Returns:
        A scalar.

    Raises:
        ValueError: other names or shapes.
    """
    shapes = [{name: tuple(x.shape) for name, x in group.items()} for group in (features, reconstructions)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"features {shapes[0]} and reconstructions {shapes[1]} differ")
    errors = [F.mse_loss(upcast(reconstructions[name]), upcast(x)) for name, x in features.items()]
    return torch.stack(errors).mean()


def _mlp(d_in: int, d_hidden: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_hidden), nn.GELU(), nn.Linear(d_hidden, d_out))


def _check(tensors: Mapping[str, Tensor], widths: Mapping[str, int], what: str) -> None:
    if tensors.keys() != widths.keys() or any(tensors[name].shape[-1:] != (d,) for name, d in widths.items()):
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        raise ValueError(f"expected {what} of widths {dict(widths)}, got shapes {found}")


def upcast(x: Tensor) -> Tensor:
    """float32 in place of half precision; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, (A, B), in the dtype of its arguments: autocast would round it to half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def off_diagonal_mean(matrix: Tensor, diagonal: float) -> Tensor:
    """Mean of a (B, B) matrix without its diagonal, every entry of which is known to be `diagonal`; 0 for B = 1.

    Subtracted from the sum, since a mask is slow in a compiled step. What rounding leaves is 1e-7 of the mean.
    """
    size = len(matrix)
    if size < 2:
        return matrix.new_zeros(())
    return (matrix.sum() - size * diagonal) / (size * (size - 1))
