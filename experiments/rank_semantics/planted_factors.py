"""Recovery of planted rank factors by trained LMF layers of two and three modalities.

    y = sum_k w_k prod_m (a_k^m . z_m) + noise,        z_m standard normal, |a_k^m| = 1, k = 1 .. 3

Synthetic regressions, one per seed. Two modalities: orthonormal directions and w = 3, 2, 1, so that the singular value
decomposition of sum_k w_k a_k b_k^T is these very terms. Three modalities: random directions, not orthogonal; the CP
decomposition is unique (Kruskal 1977). A layer of the true rank is trained on each; its terms are matched to the
planted ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmf_module import LowRankMultimodalFusion
from mmfusion.dataset import Fold, Split
from mmfusion.models.identifiability import match, similarity
from mmfusion.training.feed import Batch, Member
from mmfusion.training.trainer import Problem as TrainingProblem
from mmfusion.training.trainer import Schedule, TrainingData, train

STRENGTHS = (3.0, 2.0, 1.0)
WIDTH = 8
TRAINING, HELD_OUT = 4000, 1000  # examples
NOISE = 0.1  # standard deviation, of a target of standard deviation 1
NULL_DRAWS = 1000
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

    problem = TrainingProblem(
        lambda member: LowRankMultimodalFusion([WIDTH] * modalities, rank=len(STRENGTHS)),
        objective,
        lambda model, features: model([features[name] for name in names]).squeeze(-1),
        lambda predictions, target: -float(np.square(predictions - target).mean()),
    )
    trained = train(
        problem,
        members,
        TrainingData(pool, pool, folds),
        schedule,
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
