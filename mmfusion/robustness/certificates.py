"""Certificates: how far an input may move before the prediction changes, in closed form or as a bound.

On a latent. LMF is affine in each z_m, so a change of one latent by at most eps in l_p moves y by at most
eps ||dy/dz_m||_q, q dual to p, and this is attained: certificate and attack are one closed form. Two latents at once:
|dy| <= eps ||g_1||_2 + eps ||g_2||_2 + eps^2 ||B||_2 with B = sum_r w_r a_r b_r^T.

On a standardised feature x_m, through its encoder z_m = W_2 gelu(W_1 x_m + b_1) + b_2. For fixed other modalities

    y(x_m) = const + v . gelu(W_1 x_m + b_1),    v = W_2^T dy/dz_m,

a network of one hidden layer. Three upper bounds on its change hold for every l_p: the interval bound, the Lipschitz
product, and the mean value form, whose slopes are those that GELU can have on the interval (Moore 1966); the least of
the three is the certificate. Projected gradient descent (Madry et al. 2018) bounds the same from the other side.

N examples, O outputs, d width of the modality, H of the hidden layer. No I/O.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lmf_module import LowRankMultimodalFusion
from mmfusion.models.fusion import FusionModel

Norm = Literal[1, 2] | float
NORMS: tuple[Norm, ...] = (1, 2, math.inf)
# gelu'' = phi(x) (2 - x^2): the slope is extreme at +-sqrt(2); gelu itself is least where its slope is 0
STEEPEST = 2**0.5
GELU_LEAST_AT = -0.7517915246935645
GELU_LIPSCHITZ = 0.5 * (1 + math.erf(1.0)) + math.exp(-1.0) / math.pi**0.5  # its slope at sqrt(2)
BISECTIONS = 30


def dual(norm: Norm) -> float:
    """q with 1/p + 1/q = 1. Raises ValueError for a norm other than 1, 2 and infinity."""
    try:
        return {1: math.inf, 2: 2.0, math.inf: 1.0}[norm]
    except KeyError:
        raise ValueError(f"norm must be 1, 2 or infinity, got {norm!r}") from None


# ---- one latent, two latents: closed forms -------------------------------------------------------------------------


def certified_radius(layer: LowRankMultimodalFusion, latents: Sequence[Tensor], m: int, norm: Norm) -> Tensor:
    """Least l_p change of latent m that brings an output to 0: |y| / ||dy/dz_m||_q, exact.

    Args:
        layer: the head.
        latents: M tensors (..., d_m).
        m: which latent moves.
        norm: p, one of 1, 2 and infinity.

    Returns:
        (..., O); infinite where the output does not depend on the latent.
    """
    return least_change(layer(latents), layer.modality_gradient(latents, m), norm)


def certified_class_radius(layer: LowRankMultimodalFusion, latents: Sequence[Tensor], m: int, norm: Norm) -> Tensor:
    """Least l_p change of latent m after which another class has the largest logit, exact.

    The margin between two classes is a difference of outputs, so it is affine in each latent as they are.

    Args:
        layer, latents, m, norm: as for `certified_radius`; the layer's outputs are logits of classes.

    Returns:
        (...); infinite where no other class can be reached.
    """
    logits, gradient = layer(latents), layer.modality_gradient(latents, m)  # (..., C), (..., C, d)
    first = logits.argmax(-1, keepdim=True)  # (..., 1)
    margins = logits.gather(-1, first) - logits
    own = gradient.gather(-2, first.unsqueeze(-1).expand(*first.shape, gradient.shape[-1]))  # (..., 1, d)
    return least_change(margins, own - gradient, norm).scatter(-1, first, math.inf).amin(-1)


def class_contrasts(first: Tensor, classes: int) -> Tensor:
    """Weights of the logits whose sums are the margins of one class over every other: 1 of the one, -1 of the other.

    Args:
        first: (...) class numbers; classes: C.

    Returns:
        (..., C - 1, C), the others in ascending order.
    """
    others = torch.arange(classes - 1, device=first.device)
    others = others + (others >= first.unsqueeze(-1))  # (..., C - 1), `first` left out
    eye = torch.eye(classes, device=first.device)
    return eye[first].unsqueeze(-2) - eye[others]


def least_change(value: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """|value| / ||gradient||_q: least l_p change that brings an affine function with that value and gradient to 0.

    Args:
        value: (...); gradient: (..., d).

    Returns:
        (...); infinite where the gradient is 0 and the value is not.
    """
    size = torch.linalg.vector_norm(gradient, ord=dual(norm), dim=-1)
    return torch.where(value == 0, 0.0, value.abs() / size)


def worst_change(
    layer: LowRankMultimodalFusion, latents: Sequence[Tensor], m: int, epsilon: float, norm: Norm
) -> Tensor:
    """A change of latent m of l_p norm `epsilon` that moves each output furthest towards 0 and beyond.

    Returns:
        (..., O, d_m), one change per output: y falls by epsilon ||dy/dz_m||_q in the direction of its sign.
    """
    q = dual(norm)
    gradient = layer.modality_gradient(latents, m)  # (..., O, d)
    if q == 2:
        steepest = F.normalize(gradient, dim=-1, eps=1e-30)
    elif q == 1:
        steepest = gradient.sign()
    else:
        largest = F.one_hot(gradient.abs().argmax(-1), gradient.shape[-1])
        steepest = gradient.sign() * largest
    return -epsilon * layer(latents).sign().unsqueeze(-1) * steepest


def pair_norm(layer: LowRankMultimodalFusion, latents: Sequence[Tensor], m: int, n: int) -> Tensor:
    """Spectral norm of B with y = ... + z_m^T B z_n, the other latents held fixed: (..., O).

    With two modalities it is a constant of the layer. B (d_m, d_n) is never formed: its rank is at most R.
    """
    coefficient = layer.rank_weights if layer.shared_factors else layer.rank_weights[:, None]
    coefficient = (coefficient * layer.rank_mask[:, None]).expand(layer.rank, layer.output_dim)
    for k, (z, projection) in enumerate(zip(latents, layer.projections, strict=True)):
        if k not in (m, n):
            coefficient = coefficient * _split(layer, projection(z))  # (..., R, O)
    triangles = []
    for k in (m, n):
        rows = _split(layer, layer.projections[k].weight.T)  # (d, R, O)
        triangles.append(torch.linalg.qr(rows.permute(2, 0, 1), mode="r").R)  # (O, min(d, R), R)
    core = (triangles[0] * coefficient.mT.unsqueeze(-2)) @ triangles[1].mT  # (..., O, k_m, k_n)
    norm = torch.linalg.matrix_norm(core, ord=2)
    return norm.expand(*latents[0].shape[:-1], layer.output_dim)


def joint_radius(
    layer: LowRankMultimodalFusion, latents: Sequence[Tensor], m: int, n: int, contrast: Tensor | None = None
) -> Tensor:
    """Certified l_2 radius when latents m and n may each move by that much: a lower bound of the exact one.

    The positive root of eps ||g_m|| + eps ||g_n|| + eps^2 ||B||_2 = |y|.

    Args:
        layer, latents: as for `certified_radius`.
        contrast: (..., K, O), weights of the outputs: y is then each of these K sums, and ||B||_2 at most the sum of
            the outputs' own by the weights' size. Default: every output by itself.

    Returns:
        (..., O), or (..., K).
    """
    y, b = layer(latents), pair_norm(layer, latents, m, n)
    gradients = [layer.modality_gradient(latents, k) for k in (m, n)]  # (..., O, d)
    if contrast is not None:
        gradients = [contrast @ gradient for gradient in gradients]  # (..., K, O) (..., O, d) -> (..., K, d)
        y, b = ((weights @ x.unsqueeze(-1)).squeeze(-1) for weights, x in ((contrast, y), (contrast.abs(), b)))
    y, linear = y.abs(), sum(torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients)
    # 2 |y| / (l + sqrt(l^2 + 4 b |y|)): the root without cancellation, and |y| / l where b is 0
    return torch.where(y == 0, 0.0, 2 * y / (linear + (linear.square() + 4 * b * y).sqrt()))


def _split(layer: LowRankMultimodalFusion, x: Tensor) -> Tensor:
    """(..., R * O), or (..., R) of shared factors -> (..., R, O)."""
    outputs = 1 if layer.shared_factors else layer.output_dim
    return x.unflatten(-1, (layer.rank, outputs)).expand(*x.shape[:-1], layer.rank, layer.output_dim)


# ---- through an encoder: certified bounds --------------------------------------------------------------------------


@dataclass(frozen=True)
class FeaturePath:
    """An LMF model as a function of one modality's standardised features alone, the other modalities held fixed.

    y(x + change) = y + v . (gelu(a + W change) - gelu(a))
    """

    weight: Tensor
    """W (H, d) of the encoder's first layer"""
    activation: Tensor
    """a (N, H), its values before GELU"""
    coefficient: Tensor
    """v (N, O, H)"""
    output: Tensor
    """y (N, O)"""

    def __call__(self, change: Tensor) -> Tensor:
        """Outputs (N, O) after the features have changed by (N, d)."""
        moved = F.gelu(self.activation + change @ self.weight.T) - F.gelu(self.activation)  # (N, d) (d, H) -> (N, H)
        return self.output + torch.einsum("noh,nh->no", self.coefficient, moved)

    def take(self, rows: Tensor) -> "FeaturePath":
        """The same of some of the examples, rows (n,)."""
        return FeaturePath(self.weight, self.activation[rows], self.coefficient[rows], self.output[rows])

    def contrast(self, weights: Tensor) -> "FeaturePath":
        """Weighted sums of the outputs, weights (N, K, O), as K outputs: margins between classes (`class_contrasts`).

        Bounded so, a margin falls less than its two logits bounded apart: what moves both alike cancels.
        """
        output = (weights @ self.output.unsqueeze(-1)).squeeze(-1)
        return FeaturePath(self.weight, self.activation, weights @ self.coefficient, output)


@torch.no_grad()
def feature_path(model: FusionModel, features: Mapping[str, Tensor], name: str) -> FeaturePath:
    """What stands between one modality's features and the output.

    Args:
        model: with an LMF head.
        features: raw (N, d_m).
        name: the modality.

    Raises ValueError where the head is not LMF: the closed form is LMF's.
    """
    if not isinstance(model.fusion, LowRankMultimodalFusion):
        raise ValueError(f"certificates need an LMF head, not {type(model.fusion).__name__}")
    standardised = {key: module(features[key]) for key, module in model.standardise.items()}
    encoded = model.jwae.encode(standardised)
    latents = [encoded[key] for key in model.modalities]
    gradient = model.fusion.modality_gradient(latents, model.modalities.index(name))  # (N, O, L)
    first, _, second = model.jwae.encoders[name]
    scale = model.rescale.std.unsqueeze(-1)  # (O, 1)
    coefficient = gradient @ second.weight * scale  # (N, O, L) (L, H) -> (N, O, H)
    return FeaturePath(first.weight, first(standardised[name]), coefficient, model.rescale(model.fusion(latents)))


def change_bounds(path: FeaturePath, direction: Tensor, epsilon: Tensor | float, norm: Norm) -> dict[str, Tensor]:
    """Upper bounds on direction * (y(x + change) - y(x)) over all changes of l_p norm at most epsilon.

    Args:
        path: of N examples.
        direction: (N, O) of +1 and -1: which way each output is pushed.
        epsilon: a number, or (N, 1) or (N, O), in units of the standardised features.
        norm: p.

    Returns:
        {"interval", "lipschitz", "mean value"}: (N, O) each. The first two also bound what single neurons do; the third
        is the gradient's own bound for small epsilon.
    """
    q = dual(norm)
    rows = torch.linalg.vector_norm(path.weight, ord=q, dim=1)  # (H,)
    v = path.coefficient * direction.unsqueeze(-1)  # (N, O, H)
    epsilon = torch.as_tensor(epsilon, dtype=v.dtype, device=v.device).expand(direction.shape)
    a, reach = path.activation.unsqueeze(1), epsilon.unsqueeze(-1) * rows  # (N, 1, H), (N, O, H)
    low, high = a - reach, a + reach

    values = F.gelu(a), F.gelu(low), F.gelu(high)
    inside = (low < GELU_LEAST_AT) & (high > GELU_LEAST_AT)
    least = torch.where(inside, F.gelu(a.new_tensor(GELU_LEAST_AT)), torch.minimum(values[1], values[2]))
    most = torch.maximum(values[1], values[2])  # GELU falls, then rises: it is largest at an end
    interval = torch.maximum(v * (most - values[0]), v * (least - values[0])).sum(-1)

    lipschitz = (v.abs() * rows).sum(-1)
    if norm == 2:
        lipschitz = torch.minimum(
            lipschitz, torch.linalg.vector_norm(v, dim=-1) * torch.linalg.matrix_norm(path.weight, ord=2)
        )
    lipschitz = GELU_LIPSCHITZ * epsilon * lipschitz

    slope_low, slope_high = _slope_range(low, high)
    middle, spread = (slope_high + slope_low) / 2, (slope_high - slope_low) / 2  # (N, O, H)
    common = torch.linalg.vector_norm((v * middle) @ path.weight, ord=q, dim=-1)  # (N, O, H) (H, d) -> (N, O)
    mean_value = epsilon * (common + (v.abs() * spread * rows).sum(-1))
    return {"interval": interval, "lipschitz": lipschitz, "mean value": mean_value}


def certified_change(path: FeaturePath, direction: Tensor, epsilon: Tensor | float, norm: Norm) -> Tensor:
    """The least of the bounds of `change_bounds`, (N, O)."""
    return torch.stack(list(change_bounds(path, direction, epsilon, norm).values())).amin(0)


@torch.no_grad()
def certified_feature_radius(path: FeaturePath, norm: Norm, largest: float = 1e4) -> Tensor:
    """Lower bound on the l_p change of the features that brings an output to 0, by bisection: (N, O).

    In units of the standardised features, at most `largest`. Every bound grows with epsilon, so bisection is sound:
    what is returned is the last epsilon at which the bound was checked to be below |y|, or 0.
    """
    direction = torch.where(path.output >= 0, -1.0, 1.0).to(path.output.dtype)
    target = path.output.abs()
    low = torch.zeros_like(target)
    high = torch.full_like(target, 1e-2)
    for _ in range(math.ceil(math.log2(largest / 1e-2)) + 1):  # doubling: the order of magnitude is not known
        grows = (certified_change(path, direction, high, norm) < target) & (low < largest)
        if not grows.any():
            break
        low = torch.where(grows, high, low)
        high = torch.where(grows, (2 * high).clamp_max(largest), high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        safe = certified_change(path, direction, middle, norm) < target
        low, high = torch.where(safe, middle, low), torch.where(safe, high, middle)
    return low


def _slope_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest slope of GELU on [low, high], exact."""
    ends = gelu_slope(low), gelu_slope(high)
    least, most = torch.minimum(*ends), torch.maximum(*ends)
    top, bottom = gelu_slope(low.new_tensor(STEEPEST)), gelu_slope(low.new_tensor(-STEEPEST))
    least = torch.where((low < -STEEPEST) & (high > -STEEPEST), bottom, least)
    return least, torch.where((low < STEEPEST) & (high > STEEPEST), top, most)


def gelu_slope(x: Tensor) -> Tensor:
    """Phi(x) + x phi(x)."""
    density = torch.exp(-x.square() / 2) / (2 * math.pi) ** 0.5
    return torch.special.ndtr(x) + x * density
