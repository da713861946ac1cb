"""Identifiability of rank terms: matching, Kruskal's condition, other factors of the same function."""

import itertools
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmf_module import LowRankMultimodalFusion

EXACT = 1e-4  # relative change of a function below which it is the same; singular values below it are 0


def match(similarity: np.ndarray) -> tuple[np.ndarray, float]:
    """Pair rows with columns so that the mean similarity is largest (Hungarian method; Kuhn 1955).

    Args:
        similarity: (K, L), K <= L.

    Returns:
        column (K,) of each row, and the mean similarity of the pairs.
    """
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return columns, float(similarity[rows, columns].mean())


def similarity(estimated: Sequence[Tensor], planted: Sequence[Tensor]) -> np.ndarray:
    """Product over modalities of |cosine| of two sets of directions.

    Args:
        estimated, planted: (R, d_m) and (K, d_m) per modality, of any length; a direction of length 0 is like none.

    Returns:
        (R, K) in [0, 1].
    """
    product = torch.ones(())
    for a, b in zip(estimated, planted, strict=True):
        product = product * (F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T).abs()  # (R, K)
    return product.numpy()


def matched_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |correlation| of the best matched components (n, O, K) of two members, centred and of norm 1."""
    correlation = np.abs(np.einsum("nok,nol->okl", a, b))
    return float(np.mean([match(c)[1] for c in correlation]))


def kruskal_condition(layer: LowRankMultimodalFusion, latents: Sequence[Tensor]) -> tuple[float, bool]:
    """Are the rank terms of a layer (and its bias, one more term) a unique CP decomposition?

    Factors are functions A_m[r] z_m + c_m[r] of the latents (n, L), scaled to mean square 1 on them.

    Returns:
        The smallest singular value of a modality's factors over modalities and outputs, and whether the k-ranks
        (the largest k for which any k factors are linearly independent) suffice for every output.
    """
    terms = layer.rank + 1
    gram = []  # (O, R + 1, R + 1) per modality: mean products of the factors
    for projection, z in zip(layer.projections, latents, strict=True):
        f = projection(z).unflatten(-1, (layer.rank, layer.output_dim))  # (n, R, O)
        f = torch.cat([f, torch.ones_like(f[:, :1])], 1)
        f = f / f.square().mean(0).sqrt().clamp_min(1e-30)
        gram.append(torch.einsum("nro,nqo->orq", f, f) / len(z))
    least = min(torch.linalg.eigvalsh(g)[:, 0].min().item() for g in gram)
    total = sum(torch.stack([_k_rank(g[o]) for o in range(layer.output_dim)]) for g in gram)  # (O,)
    return max(least, 0.0) ** 0.5, bool((total >= 2 * terms + len(gram) - 1).all())


def _k_rank(gram: Tensor) -> Tensor:
    for size in range(1, len(gram) + 1):
        for subset in itertools.combinations(range(len(gram)), size):
            index = torch.tensor(subset)
            if torch.linalg.eigvalsh(gram[index[:, None], index])[0] < EXACT**2:
                return torch.tensor(size - 1)
    return torch.tensor(len(gram))


def mix_ranks(layer: LowRankMultimodalFusion, g: Tensor) -> LowRankMultimodalFusion:
    """The same function of two modalities with other rank terms: [A_1, c_1] w -> G [A_1, c_1] w, [A_2, c_2] -> G^-T.

    `g` is invertible, (R, R), of the layer's dtype. Raises ValueError where the layer has not two modalities.
    """
    if len(layer.projections) != 2:
        raise ValueError(f"ranks can be mixed for two modalities, this layer has {len(layer.projections)}")
    other = deepcopy(layer)
    weights = (layer.rank_weights * layer.rank_mask).view(-1, *[1] * 2)
    for projection, by, w in zip(other.projections, (g, torch.linalg.inv(g).T), (weights, 1), strict=True):
        rows = torch.cat([projection.weight, projection.bias[:, None]], 1).unflatten(0, (layer.rank, -1))
        rows = torch.einsum("qr,rod->qod", by, rows * w).flatten(0, 1)  # (R * O, L + 1)
        projection.weight.data, projection.bias.data = rows[:, :-1], rows[:, -1]
    other.rank_weights.data = torch.ones_like(layer.rank_weights)
    other.rank_mask.fill_(1)
    return other


@torch.no_grad()
def refit_perturbed(
    layer: LowRankMultimodalFusion, latents: Sequence[Tensor], generator: torch.Generator, steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Shake the factors of the first output, by their own norm, and fit them to the same function on the latents.

    Where the decomposition is unique the terms come back; where it is not, others give the same function. By
    Levenberg-Marquardt, for any number of modalities.

    Args:
        latents: float64 (n, d_m) per modality, of a layer in float64.

    Returns:
        the terms (n, R) after the fit, whose sum the function is to be compared with, and those of the layer (n, R).
    """
    before = layer.rank_terms(latents)[..., 0]  # (n, R)
    target, scale = before.sum(-1), before.sum(-1).std()
    bases, factors = [], []
    for m, (projection, z) in enumerate(zip(layer.projections, latents, strict=True)):
        f = projection(z).unflatten(-1, (layer.rank, layer.output_dim))[..., 0]  # (n, R)
        f = f * (layer.rank_weights * layer.rank_mask).reshape(layer.rank) if m == 0 else f
        u, s, _ = torch.linalg.svd(F.pad(z, (0, 1), value=1.0), full_matrices=False)
        basis = u[:, s > EXACT**2 * s[0]] * len(z) ** 0.5  # columns of mean square 1
        noise = torch.randn(layer.rank, basis.shape[1], generator=generator, dtype=f.dtype)
        own = f.T @ basis / len(z)  # (R, k_m)
        bases.append(basis)
        factors.append(own + own.norm(dim=1, keepdim=True) * F.normalize(noise, dim=1))
    sizes, damping = [c.numel() for c in factors], 1e-2

    def terms_of(vector: Tensor) -> tuple[list[Tensor], Tensor]:
        pieces = [v.view_as(c) for v, c in zip(vector.split(sizes), factors, strict=True)]
        values = [basis @ c.T for basis, c in zip(bases, pieces, strict=True)]  # (n, R) per modality
        return values, torch.stack(values).prod(0)

    x = torch.cat([c.flatten() for c in factors])
    values, terms = terms_of(x)
    for _ in range(steps):
        error = (terms.sum(-1) - target) / scale
        if error.abs().max() < EXACT / 10:
            break
        columns = []
        for m, basis in enumerate(bases):
            others = torch.stack([v for n, v in enumerate(values) if n != m]).prod(0) / scale  # (n, R)
            columns.append((others[:, :, None] * basis[:, None]).flatten(1))  # (n, R * k_m)
        jacobian = torch.cat(columns, 1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ error
        ridge = damping * normal.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)
        step = torch.linalg.solve(normal + ridge, gradient)
        new_values, new_terms = terms_of(x - step)
        if (new_terms.sum(-1) - target).square().sum() < (terms.sum(-1) - target).square().sum():
            x, values, terms, damping = x - step, new_values, new_terms, max(damping / 4, 1e-12)
        else:
            damping = min(damping * 8, 1e6)
    return terms, before
