"""Joint Wasserstein autoencoder (Mahajan, Botschen, Gurevych, Roth, 2019): an autoencoder per modality, one prior.

The latents of every modality are pulled to N(0, I) by an MMD penalty (`mmd_penalty`) and kept informative by
`reconstruction_error`; what ties them to each other is in `mmfusion.losses.contrastive`. B batch, L latent width, d_m
width of modality m.

No forward pass here draws random numbers, works in place or branches on values, so that all of it runs under
`torch.func` (vmap, functional_call) and `torch.compile(fullgraph=True)`: hence no batch norm and no dropout.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bandwidths v = scale * L. For latents of std 0.1 to 0.8 and 1.25 to 10, and L 2 to 128, these keep the expected
# d MMD^2 / d log(std) between 0.02 and 0.3 in size, and towards std 1: 0.25 sees collapse and shape, 0.5 has the most
# power near the prior, 4 and 32 still see latents of std 3 and 10. (A single bandwidth v = L leaves 7e-15 at std 10.)
GAUSSIAN_SCALES = (0.25, 0.5, 4.0, 32.0)

Noise = Literal["none", "dimension"]
START_STD = 0.5
# a std by dimension is one number that Adam moves by its learning rate a step, a weight of an encoder acts with many
RAW_STD_SPEED = 10.0
_RAW_START = math.log(math.expm1(START_STD))


class JWAE(nn.Module):
    """An encoder d_m -> hidden -> L and a mirrored decoder for each modality.

    Args:
        input_dims: width d_m of each modality, by name; this order is the order of every returned dict.
        latent_dim: shared latent width L.
        hidden_dim: width of the one hidden layer of each encoder and decoder; 0: there is none, they are affine.
        noise: an encoder's latent is N(mu(x), diag s^2) with s 0 ("none": it is deterministic) or learned for each
            "dimension". Decoders see the mean.

    Raises:
        ValueError: no modality, another width below 1, or an unknown noise.
    """

    def __init__(
        self, input_dims: Mapping[str, int], latent_dim: int, hidden_dim: int = 128, noise: Noise = "none"
    ) -> None:
        super().__init__()
        self.input_dims = dict(input_dims)
        self.latent_dim = latent_dim
        self.hidden_dim = hidden_dim
        self.noise = noise
        if not self.input_dims or min(latent_dim, hidden_dim + 1, *self.input_dims.values()) < 1:
            sizes = f"{self.input_dims}, latent_dim {latent_dim}, hidden_dim {hidden_dim}"
            raise ValueError(f"at least one modality and widths of at least 1 are needed, got {sizes}")
        if noise not in get_args(Noise):
            raise ValueError(f"noise is one of {', '.join(get_args(Noise))}, not {noise!r}")
        self.encoders = nn.ModuleDict({name: _mlp(d, hidden_dim, latent_dim) for name, d in self.input_dims.items()})
        self.decoders = nn.ModuleDict({name: _mlp(latent_dim, hidden_dim, d) for name, d in self.input_dims.items()})
        if noise == "dimension":
            self.raw_stds = nn.ParameterDict({name: nn.Parameter(torch.zeros(latent_dim)) for name in self.input_dims})

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map features (..., d_m), standardised by the caller, to (mean) latents (..., L) of each modality.

        Raises:
            ValueError: other modalities, or other widths, than the model's.
        """
        return self.posterior(features)[0]

    def posterior(self, features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Map features (..., d_m) to the means (..., L) and variances of their latents.

        Returns:
            means, and variances (L,) of noise by dimension, none at all of deterministic latents.

        Raises:
            ValueError: as `encode`.
        """
        _check(features, self.input_dims, "features")
        return {name: encoder(features[name]) for name, encoder in self.encoders.items()}, self.noise_variances()

    def noise_variances(self) -> dict[str, Tensor]:
        """Variances (L,) of the latents' noise, by modality; none of deterministic latents."""
        if self.noise == "none":
            return {}
        return {name: F.softplus(RAW_STD_SPEED * raw + _RAW_START).square() for name, raw in self.raw_stds.items()}

    @torch.no_grad()
    def set_noise(self, name: str, variances: Tensor) -> None:
        """Let the noise of one modality have these variances (L,); one below 1e-12 becomes that."""
        std = variances.double().clamp_min(1e-12).sqrt()
        self.raw_stds[name].copy_((torch.log(torch.expm1(std)) - _RAW_START) / RAW_STD_SPEED)

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


def mmd_penalty(z: Tensor, variances: Tensor | None = None, *, scales: Sequence[float] = GAUSSIAN_SCALES) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy between the latents and N(0, I), without draws of it.

    Gaussian kernels exp(-|a - b|^2 / (2 v)), v = scale * L, integrated over the prior (Rustamov, 2019); mean over v:

        mean_{i != j} k(z_i, z_j) - 2 (v / (v + 1))^(L/2) mean_i exp(-|z_i|^2 / (2 (v + 1))) + (v / (v + 2))^(L/2)

    Of Gaussian latents N(z_i, diag s^2) the kernels are integrated over the noise too: coordinate d is then seen at
    v + 2 s_d^2 among the latents and at v + 1 + s_d^2 against the prior, in place of v and v + 1, and each exponential
    is multiplied by prod_d (v / that)^(1/2).

    Being unbiased it is 0 on average under the prior, hence at times negative. Its noise is half that of the same
    estimate from as many draws of the prior.

    What it cannot see: in a wide space isotropic kernels hardly notice the shape of single coordinates. With B = 128,
    independent exponential coordinates lie 15 null standard deviations away at L = 2, 6 at L = 16, but 0.6 at L = 128;
    a std of 0.9 or a mean of 0.2 is the more visible, the wider the space. Bounded kernels also forgive rare
    outliers: heavy tails of the inputs survive in the latents' kurtosis longer than any error of mean or covariance.

    Args:
        z: latents, or their means (B, L), B >= 2.
        variances: of the noise of every latent, s^2 (L,); default 0.
        scales: bandwidths, in units of L.

    Returns:
        A scalar, in float32 for half-precision latents.

    Raises:
        ValueError: z is not (B, L) with B >= 2, variances do not fit it, or a scale is not positive.
    """
    z, variances = _checked(z, variances)
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be one or more positive numbers, got {tuple(scales)}")
    v = torch.stack([z.new_full((1,), scale * z.shape[1]) for scale in scales])  # (K, 1), made on the device
    noise = torch.zeros_like(z[0]) if variances is None else variances  # (L,)
    scaled = z * (v + 2 * noise).rsqrt()[:, None]  # (K, B, L)
    norms = scaled.square().sum(-1) / 2  # (K, B)
    kernel = torch.exp(products(scaled, scaled) - norms[:, :, None] - norms[:, None])  # (K, B, B)
    # U-statistic: the diagonal would bias it by 1/B
    k_zz = _shrinkage(v, 2 * noise) * off_diagonal_mean(kernel, 1.0)  # (K,)
    to_prior = products((v + 1 + noise).reciprocal(), z.square())  # (K, B)
    k_zp = _shrinkage(v, 1 + noise) * torch.exp(-to_prior / 2).mean(-1)
    k_pp = _shrinkage(v, torch.full_like(noise, 2))
    return (k_zz - 2 * k_zp + k_pp).mean()


def bures_penalty(z: Tensor, variances: Tensor | None = None) -> Tensor:
    """Squared 2-Wasserstein distance between N(m, S) and N(0, I), by L; m and S mean and covariance of the latents.

        (|m|^2 + sum_d (lambda_d^1/2 - 1)^2) / L,    lambda the eigenvalues of S = Cov(z) + diag(s^2)

    It bounds the distance of the latents' own distribution to N(0, I) from below (Gelbrich, 1990) and sees moments
    alone, but these at any distance: its derivative by the std of a direction is 2 (std - 1) / L, near 0 as far out.
    Exactly at 0 a direction of z has no gradient, that of s has.

    Bias: as an estimate from B latents it is positive under the prior, L^-1 (L / B + L (L + 1) / (4 (B - 1))) to first
    order where s = 0, and least at a std a little below 1 (L = 32, B = 64: .92); noise adds to neither.

    Args:
        z, variances: as for `mmd_penalty`.

    Returns:
        A scalar, in float32 for half-precision latents; the eigenvalues are those of a float64 matrix.

    Raises:
        ValueError: as `mmd_penalty`.
    """
    z, variances = _checked(z, variances)
    centred = (z - z.mean(0)).double()
    covariance = products(centred.T, centred.T) / (len(z) - 1)
    if variances is not None:
        covariance = covariance + torch.diag(variances.double())
    # what rounding leaves of 0 has no root with a gradient; 1e-12 is a std of 1e-6
    stds = torch.linalg.eigvalsh(covariance).clamp_min(1e-12).sqrt()
    return ((z.mean(0).square().sum() + (stds - 1).square().sum()) / z.shape[1]).to(z.dtype)


def sliced_wasserstein_penalty(
    z: Tensor, variances: Tensor | None = None, *, directions: Tensor, nodes: int = 8
) -> Tensor:
    """Squared 2-Wasserstein distance to N(0, 1) of the latents along each direction, mean over directions.

    In one dimension it is the mean squared difference of sorted values and the normal quantiles at (i - 1/2) / n
    (Rabin et al., 2011; Kolouri et al., 2018). A Gaussian latent counts as `nodes` equally likely values, its own
    quantiles at (j - 1/2) / nodes, scaled to its variance, so nothing is drawn.

    Bias: positive under the prior, about (log log B) / B where s = 0. Equal latents are moved apart, each its own way,
    by the order in which they stand: it alone of the penalties leaves an exact collapse.

    Args:
        z, variances: as for `mmd_penalty`.
        directions: (K, L), of any length but 0; they are normalised. Drawn anew for each step by the caller.

    Raises:
        ValueError: as `mmd_penalty`, or directions that are not (K, L).
    """
    z, variances = _checked(z, variances)
    values, spread = _projected(z, directions, variances)  # (B, K)
    if spread is not None:
        own = _normal_quantiles(nodes, z)
        own = own / own.square().mean().sqrt()  # 8 quantiles have a variance of .85
        values = (values[:, None] + spread.clamp_min(1e-12).sqrt() * own[:, None]).flatten(0, 1)  # (B * n, K)
    return (values.sort(0).values - _normal_quantiles(len(values), z)[:, None]).square().mean()


def characteristic_penalty(z: Tensor, variances: Tensor | None = None, *, directions: Tensor) -> Tensor:
    """Distance of characteristic functions to that of N(0, 1) along each direction, mean over directions; unbiased.

        2 sum_t h_t w(t) |phi(t) - exp(-t^2/2)|^2,    phi(t) = mean_i exp(i t p.z_i - t^2 p^T diag(s^2) p / 2)

    after Epps and Pulley (1983), as SIGReg has it (Balestriero & LeCun, 2025), with three differences. |phi|^2 is taken
    over pairs i != j: it is 0 on average under the prior (there 1/B is left, and the whole is multiplied by B). The
    nodes t are geometric from 1/32 to 4, h_t their trapezoids, in place of an even grid, at which latents of std 10
    have a phi of 0 but for t = 0, and no gradient. And w(t) = exp(-t^2/2) / t^2 in place of exp(-t^2/2): for small t
    that of the energy distance, which grows with the distance; without it far latents are moved by the noise of large
    t. The noise of the latents is integrated, not drawn.

    Args:
        z, variances: as for `mmd_penalty`.
        directions: as for `sliced_wasserstein_penalty`.

    Raises:
        ValueError: as `sliced_wasserstein_penalty`.
    """
    z, variances = _checked(z, variances)
    values, spread = _projected(z, directions, variances)  # (B, K)
    size = len(z)
    total = z.new_zeros(())
    for t, weight in _CHARACTERISTIC_NODES:
        damping = torch.ones_like(values) if spread is None else torch.exp(-(t**2) / 2 * spread)  # (K,)
        damping = damping.expand(values.shape)
        real, imaginary = (damping * torch.cos(t * values)).mean(0), (damping * torch.sin(t * values)).mean(0)  # (K,)
        square = (size * (real.square() + imaginary.square()) - damping.square().mean(0)) / (size - 1)
        expected = math.exp(-(t**2) / 2)
        total = total + weight * (square - 2 * expected * real + expected**2).mean()
    return total


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


_TIMES = [2 ** (k / 2 - 5) for k in range(15)]  # 1/32 to 4
_CHARACTERISTIC_NODES = [
    (t, (after - before) * math.exp(-(t**2) / 2) / t**2)  # twice the half that a trapezoid gives it: t and -t
    for before, t, after in zip([0.0, *_TIMES[:-1]], _TIMES, [*_TIMES[1:], _TIMES[-1]], strict=True)
]


def _checked(z: Tensor, variances: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in at least float32."""
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"latents must be (B, L) with B of at least 2, got {tuple(z.shape)}")
    if variances is None:
        return upcast(z), None
    if variances.shape != z.shape[1:]:
        raise ValueError(f"variances must be (L,) for latents {tuple(z.shape)}, got {tuple(variances.shape)}")
    return upcast(z), upcast(variances)


def _shrinkage(v: Tensor, further: Tensor) -> Tensor:
    """prod_d (v / (v + further_d))^(1/2), (K,) of v (K, 1) and further (L,)."""
    return torch.exp(-torch.log1p(further / v).sum(-1) / 2)


def _projected(z: Tensor, directions: Tensor, variances: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Latents along unit directions, (B, K), and the variances of their noise there, (K,)."""
    if directions.ndim != 2 or directions.shape[1] != z.shape[1]:
        raise ValueError(f"directions must be (K, {z.shape[1]}), got {tuple(directions.shape)}")
    unit = F.normalize(directions.to(z.dtype), dim=1)
    spread = None if variances is None else products(unit.square(), variances[None])[:, 0]
    return products(z, unit), spread


def _normal_quantiles(count: int, like: Tensor) -> Tensor:
    """Quantiles of N(0, 1) at (i - 1/2) / count, (count,)."""
    shares = (torch.arange(count, device=like.device, dtype=torch.float64) + 0.5) / count
    return (torch.erfinv(2 * shares - 1) * 2**0.5).to(like.dtype)


def _mlp(d_in: int, d_hidden: int, d_out: int) -> nn.Module:
    if not d_hidden:
        return nn.Linear(d_in, d_out)
    return nn.Sequential(nn.Linear(d_in, d_hidden), nn.GELU(), nn.Linear(d_hidden, d_out))


def _check(tensors: Mapping[str, Tensor], widths: Mapping[str, int], what: str) -> None:
    if tensors.keys() != widths.keys() or any(tensors[name].shape[-1:] != (d,) for name, d in widths.items()):
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        raise ValueError(f"expected {what} of widths {dict(widths)}, got shapes {found}")


def upcast(x: Tensor) -> Tensor:
    """float32 in place of half precision; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, (..., A, B), in the dtype of its arguments: autocast would round it to half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def off_diagonal_mean(matrix: Tensor, diagonal: float) -> Tensor:
    """Mean (...) of matrices (..., B, B) without their diagonal, all of whose entries are known; 0 for B = 1.

    Subtracted from the sum, since a mask is slow in a compiled step. What rounding leaves is 1e-7 of the mean.
    """
    size = matrix.shape[-1]
    if size < 2:
        return matrix.new_zeros(matrix.shape[:-2])
    return (matrix.sum((-2, -1)) - size * diagonal) / (size * (size - 1))
