"""Worst cases, geometry and noise along principal components, of every trained member."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.outcomes import PRIMARY, example_outcome
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.certificates import feature_path, gelu_slope, pair_norm
from mmfusion.robustness.worst_case import (
    Criterion,
    attacked_scores,
    change_size,
    feature_certificates,
    latent_scores,
    latent_stds,
)
from mmfusion.training.grid import Grid, by_fold, outputs_of, per_example, select

RHO = 0.05
RESTARTS = 2  # of the attack: more change nothing (experiments.robustness checks that), and there are many members
NOISE = 0.5  # length of the noise on each modality over sqrt(d), in standard deviations
SHARE = 0.25  # of the components that vary: the leading and the trailing ones
LEAST_VARIANCE = 1e-6  # of the largest component: what is smaller is rounding
ENDS = ("leading", "trailing")
GEOMETRY = ("gradient", "interaction", "norm")


@dataclass
class Measures:
    """Of every setting: per example (S, n), larger is better, or per member (S, F)."""

    clean: dict[str, np.ndarray] = field(default_factory=dict)
    certified: dict[str, np.ndarray] = field(default_factory=dict)
    attacked: dict[str, np.ndarray] = field(default_factory=dict)
    latent: dict[str, np.ndarray] = field(default_factory=dict)
    outcome: dict[str, np.ndarray] = field(default_factory=dict)
    """the first primary outcome"""
    leading: dict[str, np.ndarray] = field(default_factory=dict)
    """the same outcome under noise along the leading components"""
    trailing: dict[str, np.ndarray] = field(default_factory=dict)
    loss: dict[str, np.ndarray] = field(default_factory=dict)
    """(S, n) on test: of classes at the temperature of dev; smaller is better"""
    training: dict[str, np.ndarray] = field(default_factory=dict)
    """(S, F) logarithm of the training loss"""
    gradient: dict[str, np.ndarray] = field(default_factory=dict)
    """(S, F) median over examples of |dy/dx|_2 sqrt(d) / |y| (regression: / std of target), mean over modalities"""
    interaction: dict[str, np.ndarray] = field(default_factory=dict)
    """(S, F) median over examples of |B|_2 |s_1| |s_2| / |y|, mean over pairs; s: stds of the latents in training"""
    norm: dict[str, np.ndarray] = field(default_factory=dict)
    """(S, F) mean over examples and pairs of |B|_2, raw"""


def measure_members(grid: Grid, components: list[dict[str, "Components"]], result: Measures) -> None:
    """Add every setting of a grid to the result, under its label; components are those of its data."""
    data = grid.data
    outcome = PRIMARY[data.task][0]

    def of(predictions: np.ndarray) -> np.ndarray:
        return per_example(data, predictions, "test", lambda *given: example_outcome(*given, outcome))

    noisy = {end: of(noisy_predictions(grid, components, end)) for end in ENDS}
    scores, clean = grid.scores(), of(grid.predictions())
    training = np.log(by_fold(data, grid.losses("train"), "train"))
    tempered = grid.predictions() if data.task == "regression" else grid.tempered()
    loss = "squared_error" if data.task == "regression" else "log_loss"
    losses = -per_example(data, tempered, "test", lambda *given: example_outcome(*given, loss))
    for p, setting in enumerate(grid.settings):
        label = setting.label
        result.clean[label], result.outcome[label], result.loss[label] = scores[p], clean[p], losses[p]
        result.leading[label], result.trailing[label] = noisy["leading"][p], noisy["trailing"][p]
        result.training[label] = training[p]
        seeds = [_measure_seed(data, grid, p, s) for s in range(len(grid.seeds))]
        for name in ("certified", "attacked", "latent", *GEOMETRY):
            getattr(result, name)[label] = np.array([seed[name] for seed in seeds])


def _measure_seed(data: FoldedDataset, grid: Grid, p: int, s: int) -> dict[str, np.ndarray]:
    """Worst-case scores (n,) over all folds' test parts, and the geometry (F,), of one setting and seed."""
    worst: dict[str, list] = {"certified": [], "attacked": [], "latent": []}
    shape: dict[str, list] = {name: [] for name in GEOMETRY}
    for f, fold in enumerate(data.folds):
        model = grid.model(p, s, f)
        features = {name: x[fold.test] for name, x in data.pool.features.items()}
        train = {name: x[fold.train] for name, x in data.pool.features.items()}
        target = data.pool.target[fold.test].reshape(len(fold.test), -1)
        criterion = Criterion(target, data.task, data.target_scale)
        stds, given = latent_stds(model, train), (model, features, criterion)
        found = {
            "certified": [feature_certificates(*given, m, 2, (RHO,)) for m in model.modalities],
            "attacked": [attacked_scores(*given, m, 2, (RHO,), restarts=RESTARTS) for m in model.modalities],
            "latent": list(latent_scores(*given, stds, 2, (RHO,)).values()),
        }
        for name, values in found.items():
            worst[name].append(torch.stack(values).mean(0)[0].numpy())
        for name, value in geometry(model, features, stds, criterion).items():
            shape[name].append(value)
    return {name: np.concatenate(x) for name, x in worst.items()} | {name: np.array(x) for name, x in shape.items()}


@torch.no_grad()
def geometry(model: FusionModel, features: dict, stds: dict, criterion: Criterion) -> dict[str, float]:
    """Gradient and interaction relative to the margin, and the raw spectral norm of the interaction."""
    latents = model.latents(features)
    gradients, interactions, norms = [], [], []
    for m, name in enumerate(model.modalities):
        path = feature_path(model, features, name)
        contrasts = criterion.contrasts(path.output)
        path = path.contrast(contrasts)
        margins = path.output  # (n, K)
        size = criterion.scale.expand_as(margins) if criterion.task == "regression" else margins.abs()
        gradient = (path.coefficient * gelu_slope(path.activation).unsqueeze(1)) @ path.weight  # (n, K, H) (H, d)
        length = torch.linalg.vector_norm(gradient, dim=-1) * gradient.shape[-1] ** 0.5
        gradients.append((length / size).median().item())
        for n in range(m + 1, len(latents)):
            b = pair_norm(model.fusion, latents, m, n) * model.rescale.std  # (n, O)
            norms.append(b.mean().item())
            b = (contrasts.abs() @ b.unsqueeze(-1)).squeeze(-1)  # (n, K), of a margin at most that
            units = change_size(stds[name], 2) * change_size(stds[model.modalities[n]], 2)
            interactions.append((b * units / size).median().item())
    return {
        "gradient": float(np.mean(gradients)),
        "interaction": float(np.mean(interactions)),
        "norm": float(np.mean(norms)),
    }


# ---- noise along principal components ----------------------------------------------------------------------------


class Components(NamedTuple):
    """The outermost principal components of standardised training rows: as many of the first as of the last."""

    std: Tensor
    """(d,) that the rows were divided by"""
    leading: Tensor
    """(C, d), orthonormal"""
    trailing: Tensor


def components_of(x: Tensor, rows: Tensor) -> Components:
    """Of the rows of x (N, d): at either end `SHARE` of the components that vary, at least one."""
    std, mean = torch.std_mean(x[rows].double(), 0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    _, values, directions = torch.linalg.svd((x[rows].double() - mean) / std, full_matrices=False)
    directions = directions[values.square() > LEAST_VARIANCE * values[0].square()]  # (V, d), leading first
    count = max(1, int(SHARE * len(directions)))
    return Components(std, directions[:count].clone(), directions[-count:].clone())  # without the others' memory


def components_by_fold(data: FoldedDataset) -> list[dict[str, Components]]:
    """Of every fold's training rows, by modality."""
    return [{name: components_of(x, fold.train) for name, x in data.pool.features.items()} for fold in data.folds]


def principal_noise(x: Tensor, components: Components, end: str, generator: torch.Generator) -> Tensor:
    """x with noise in the span of its leading or its trailing components, of length `NOISE` sqrt(d) in every example.

    The counterpart, for vectors, of low and high frequencies of a picture.

    Args:
        x: (N, d) raw features; end: of `ENDS`.

    Returns:
        (N, d) in the units of x.
    """
    span = components.leading if end == "leading" else components.trailing
    noise = torch.randn(len(x), len(span), generator=generator, dtype=torch.float64)
    noise = NOISE * x.shape[1] ** 0.5 * noise / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    return (x.double() + noise @ span * components.std).to(x.dtype)


def noisy_predictions(grid: Grid, components: list[dict[str, Components]], end: str) -> np.ndarray:
    """(P, S, n[, O]): predictions on test where all modalities carry that noise, the same for every member."""
    data, folds = grid.data, []
    for f, of_fold in enumerate(components):
        generator = torch.Generator().manual_seed(f)
        features = {
            name: principal_noise(x, of_fold[name], end, generator) for name, x in sorted(data.pool.features.items())
        }
        probed = replace(data, pool=replace(data.pool, features=features))
        outputs = outputs_of(probed, grid.models[f :: len(data.folds)])  # members are fold by fold within a seed
        folds.append(outputs.reshape(len(grid.settings), len(grid.seeds), *outputs.shape[1:]))
    return select(data, np.stack(folds, 2), "test")
