"""What is identified of rank factors, and does an LMF layer recover those that are known to be there?

    y = sum_k w_k prod_m (a_k^m . z_m) + noise,        z_m standard normal, |a_k^m| = 1, k = 1 .. 3

Synthetic regressions, one per seed. Two modalities: orthonormal directions and w = 3, 2, 1, so that the singular value
decomposition of sum_k w_k a_k b_k^T is these very terms. Three modalities: random directions, not orthogonal; the CP
decomposition is unique (Kruskal 1977). A layer of the true rank is trained on each; its terms are matched to the
planted ones.
"""

import itertools
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from corpus import Split
from lmf_module import LowRankMultimodalFusion
from training import Batch, Fold, Member, Schedule, train

STRENGTHS = (3.0, 2.0, 1.0)
WIDTH = 8
TRAINING, HELD_OUT = 4000, 1000  # examples
NOISE = 0.1  # standard deviation, of a target of standard deviation 1
NULL_DRAWS = 1000
EXACT = 1e-4  # relative change of a function below which it is the same; singular values below it are 0
SCHEDULE = Schedule(epochs=40, batch_size=64, learning_rate=1e-2, keep="last")


class Problem(NamedTuple):
    """One planted regression."""

    directions: list[Tensor]  # (K, d) per modality, unit rows
    latents: list[Tensor]  # (n, d) per modality
    signal: Tensor  # (n,) without noise, standard deviation 1 in expectation
    target: Tensor  # (n,)


class Recovery(NamedTuple):
    """How well S layers of M modalities recovered what was planted; similarity is a product of M |cosines|."""

    r2: np.ndarray
    """(S,) share of the noiseless signal's variance that is predicted, on held-out examples"""
    raw: np.ndarray
    """(S,) mean similarity of the layer's own rows A_m to the planted directions, best matched"""
    canonical: np.ndarray | None
    """(S,) the same of the canonical factors; two modalities only"""
    null: float
    """mean of the same of random directions"""
    null95: float
    """its 95th percentile"""


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


# ---- what is identified -----------------------------------------------------------------------------------------


def matched(a: np.ndarray, b: np.ndarray) -> float:
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


def mixed(layer: LowRankMultimodalFusion, g: Tensor) -> LowRankMultimodalFusion:
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
def refitted(
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


# ---- planted factors ---------------------------------------------------------------------------------------------


def plant(modalities: int, seed: int, examples: int = TRAINING + HELD_OUT) -> Problem:
    """One regression with rank-1 terms that are known."""
    generator = torch.Generator().manual_seed(seed)
    weights, rank = torch.tensor(STRENGTHS), len(STRENGTHS)
    directions = []
    for _ in range(modalities):
        rows = torch.randn(rank, WIDTH, generator=generator)
        orthonormal = torch.linalg.qr(rows.T).Q.T  # (K, d)
        directions.append(orthonormal if modalities == 2 else F.normalize(rows, dim=1))
    # the variance of the signal: its terms are uncorrelated where directions are orthogonal
    gram = torch.stack([a @ a.T for a in directions]).prod(0)  # (K, K)
    weights = weights / (weights @ gram @ weights).sqrt()
    latents = [torch.randn(examples, WIDTH, generator=generator) for _ in range(modalities)]
    products = torch.stack([z @ a.T for z, a in zip(latents, directions, strict=True)]).prod(0)  # (n, K)
    signal = products @ weights
    return Problem(directions, latents, signal, signal + NOISE * torch.randn(examples, generator=generator))


def fit(
    problems: Sequence[Problem],
    seeds: Sequence[int],
    schedule: Schedule = SCHEDULE,
    held_out: int = HELD_OUT,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
) -> list[LowRankMultimodalFusion]:
    """A layer of the true rank for each problem, all trained at once; the last `held_out` examples are not seen."""
    modalities, size = len(problems[0].latents), len(problems[0].target)
    names = [f"z{m + 1}" for m in range(modalities)]
    pool = Split(
        {name: torch.cat([problem.latents[m] for problem in problems]) for m, name in enumerate(names)},
        torch.cat([problem.target for problem in problems]),
        [str(i) for i in range(size * len(problems))],
    )
    # each seed has its own problem: a fold of the common pool
    rows = torch.arange(len(pool)).view(len(problems), size)
    folds = [Fold(r[:-held_out], r[-held_out:]) for r in rows]
    members = [Member(seed, {"squared_error": 1.0}, fold=f) for f, seed in enumerate(seeds)]

    def objective(model, batch: Batch) -> dict[str, Tensor]:
        error = model([batch.features[name] for name in names]).squeeze(-1) - batch.target
        return {"squared_error": error.square().mean()}

    trained = train(
        lambda member: LowRankMultimodalFusion([WIDTH] * modalities, rank=len(STRENGTHS)),
        members,
        objective,
        lambda model, features: model([features[name] for name in names]).squeeze(-1),
        pool,
        pool,
        lambda predictions, target: -float(np.square(predictions - target).mean()),
        schedule,
        folds=folds,
        device=device,
        checkpoint=checkpoint,
    )
    return trained.models


@torch.inference_mode()
def recovery(
    problems: Sequence[Problem], layers: Sequence[LowRankMultimodalFusion], held_out: int = HELD_OUT
) -> Recovery:
    """Match the layers' factors to the planted ones. The bias rows c_m have no planted counterpart and stay out."""
    modalities = len(problems[0].latents)
    r2, raw, canonical = [], [], []
    for problem, layer in zip(problems, layers, strict=True):
        signal = problem.signal[-held_out:]
        error = layer([z[-held_out:] for z in problem.latents]).squeeze(-1) - signal
        r2.append(1 - (error.square().mean() / signal.var()).item())
        rows = [projection.weight for projection in layer.projections]
        raw.append(match(similarity(rows, problem.directions))[1])
        if modalities == 2:
            directions = layer.canonical_factors([torch.eye(WIDTH)] * 2).directions
            canonical.append(match(similarity([d[0] for d in directions], problem.directions))[1])
    generator = torch.Generator().manual_seed(0)
    draws = []
    for k in range(NULL_DRAWS):
        planted = problems[k % len(problems)].directions
        random = [torch.randn(a.shape, generator=generator) for a in planted]
        draws.append(match(similarity(random, planted))[1])
    return Recovery(
        np.array(r2),
        np.array(raw),
        np.array(canonical) if modalities == 2 else None,
        float(np.mean(draws)),
        float(np.percentile(draws, 95)),
    )


def planted_recoveries(
    seeds: Sequence[int], device: str | torch.device = "cpu", folder: Path | None = None
) -> dict[int, Recovery]:
    """Plant, train and match for two and for three modalities: {M: Recovery}; checkpoints go into `folder`."""
    result = {}
    for modalities in (2, 3):
        problems = [plant(modalities, seed) for seed in seeds]
        checkpoint = None if folder is None else folder / f"planted-{modalities}.safetensors"
        result[modalities] = recovery(problems, fit(problems, seeds, device=device, checkpoint=checkpoint))
    return result
