"""What is left under damage: noise on features, a missing modality, and the worst change of a given size.

P settings, S seeds, n test examples of all folds. Everything is done to one modality at a time, and columns are means
over modalities; noise is drawn once, and is the same for all models and levels.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experiments.attacked import attacked_rows
from experiments.robustness.corruption_grid import Condition
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import take
from mmfusion.metrics.scores import example_losses, example_scores
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.certificates import Norm
from mmfusion.robustness.corruptions import add_noise
from mmfusion.robustness.worst_case import (
    Criterion,
    attacked_scores,
    feature_certificates,
    latent_scores,
    latent_stds,
)
from mmfusion.training.grid import Grid, outputs_of, per_example

NOISE = (0.5, 1.0)
"""standard deviations of each feature in training"""
MISSING = "missing"
DAMAGES: dict[str, float | None] = {MISSING: None} | {f"noise {level:g}": level for level in NOISE}
"""level of noise; None: the modality is missing"""
NORM: Norm = 2
RHO = 0.1
"""l_2 size of a worst change, in standard deviations (mmfusion.robustness.worst_case)"""
STEPS, RESTARTS = 5, 1


def damaged(grid: Grid) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{damage: (scores, losses)}, (P, S, n) each, mean over modalities; of models as they were trained.

    Whitening would move a missing latent, which is set to 0.
    """
    found = {}
    for label, level in DAMAGES.items():
        outputs = [outputs_under(grid, name, level) for name in grid.data.input_dims]
        found[label] = tuple(
            np.mean([per_example(grid.data, x, "test", of) for x in outputs], axis=0)
            for of in (example_scores, example_losses)
        )
    return found


def outputs_under(grid: Grid, modality: str, level: float | None) -> np.ndarray:
    """(P, S, n[, O]): outputs on test under noise of a level on the features of a modality, or without it (None)."""
    data, folds = grid.data, []
    rng = Condition("features", "feature noise", modality, 0.0, 0).rng()  # of no level
    for f, fold in enumerate(data.folds):
        test, missing = take(data.pool, fold.test), [modality]
        if level is not None:
            std = data.pool.features[modality][fold.train].std(0)
            noisy = {modality: add_noise(test.features[modality], level, std, rng)}
            test, missing = replace(test, features=test.features | noisy), []
        models = grid.models[f :: len(data.folds)]  # setting-major, then seed
        folds.append(outputs_of(replace(data, pool=test), models, missing))
    outputs = np.concatenate(folds, axis=1)
    return outputs.reshape(len(grid.settings), len(grid.seeds), *outputs.shape[1:])


def worst_columns(grid: Grid, place: int) -> dict[str, np.ndarray]:
    """{column: (S,)} of one setting: score under the worst change of one modality of l_2 size RHO.

    Of features the score lies between "certified" and "attacked". Of a latent it is exact, but a matter of coordinates
    and units, so that it compares the two kinds only where both columns agree: the models must be whitened, and a
    change is measured by the standard deviations of the means mu ("latent, means", as in experiments.robustness), or of
    the latents with their noise ("latent, total", 1 in every coordinate), which are the same where latents are certain.

    Scores are those of the output's mean; of more than two classes another may have the largest expected probability.
    """
    found: dict[str, list[float]] = {}
    for s in range(len(grid.seeds)):
        folds = [
            _worst_scores(grid.model(place, s, f), grid.data, fold.train, rows)
            for f, (fold, rows) in enumerate(zip(grid.data.folds, attacked_rows(grid.data), strict=True))
        ]
        for name in folds[0]:
            found.setdefault(name, []).append(torch.cat([scores[name] for scores in folds]).mean().item())
    return {name: np.array(values) for name, values in found.items()}


def _worst_scores(model: FusionModel, data: FoldedDataset, train: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """{column: (n,)} of these rows of the pool, mean over modalities."""
    x, fitted = ({name: x[part] for name, x in data.pool.features.items()} for part in (rows, train))
    criterion = Criterion(data.pool.target[rows].reshape(len(rows), -1), data.task, data.target_scale)
    means = latent_stds(model, fitted)
    noise = model.jwae.noise_variances()
    total = {name: (std.square() + noise[name]).sqrt() if noise else std for name, std in means.items()}
    effort = {"steps": STEPS, "restarts": RESTARTS}
    by = {
        "latent, means": latent_scores(model, x, criterion, means, NORM, (RHO,)).values(),
        "latent, total": latent_scores(model, x, criterion, total, NORM, (RHO,)).values(),
        "certified": [feature_certificates(model, x, criterion, name, NORM, (RHO,)) for name in model.modalities],
        "attacked": [attacked_scores(model, x, criterion, name, NORM, (RHO,), **effort) for name in model.modalities],
    }
    return {column: torch.cat(list(scores)).double().mean(0) for column, scores in by.items()}  # of (1, n) each
