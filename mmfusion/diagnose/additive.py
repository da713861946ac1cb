"""Two additive models beside a trained fusion model: its EMAP, and a linear readout of its latents."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from mmfusion.dataset import Task
from mmfusion.models.decomposition import recentred
from mmfusion.models.exact import exact_layer, latents_of
from mmfusion.training.grid import Grid


@torch.no_grad()
def emap_outputs(grid: Grid, place: int) -> np.ndarray:
    """(S, n[, O]): the EMAP of every member of a setting on the tested examples, about their own mean latents.

    M + 1 passes: y is affine in each latent, so the others' average is their mean (`mmfusion.models.decomposition`).
    """
    data, seeds = grid.data, []
    for s in range(len(grid.seeds)):
        outputs = []
        for f, fold in enumerate(data.folds):
            member = grid.model(place, s, f)
            latents = latents_of(member, {name: x[fold.test] for name, x in data.pool.features.items()})
            layer = recentred(exact_layer(member), [z.mean(0) for z in latents])
            centred = [z - z.mean(0) for z in latents]
            zeros = [torch.zeros_like(z) for z in latents]
            base = layer(zeros)  # (n, O)
            alone = [layer([*zeros[:m], z, *zeros[m + 1 :]]) - base for m, z in enumerate(centred)]
            outputs.append((base + sum(alone)).numpy())
        seeds.append(np.concatenate(outputs))
    stacked = np.stack(seeds)
    return stacked if data.has_columns else stacked[..., 0]


@torch.no_grad()
def readout_outputs(grid: Grid, place: int) -> np.ndarray:
    """(S, n[, O]): a linear readout of every member's latents, fitted anew on each inner training part.

    The EMAP says what the trained model makes of interactions, this whether they are needed: of modalities that repeat
    each other a model may take products that it could do without. Logistic regression, or ridge regression of values,
    on the standardised latents side by side, penalty 1.
    """
    data, seeds = grid.data, []
    for s in range(len(grid.seeds)):
        outputs = []
        for f, fold in enumerate(data.folds):
            member = grid.model(place, s, f)
            z = torch.cat(latents_of(member, data.pool.features), -1)  # (N, M L)
            std, mean = torch.std_mean(z[fold.train], 0)
            z = ((z - mean) / std.clamp_min(1e-6)).numpy()
            target = data.pool.target[fold.train].numpy()
            outputs.append(_linear(z[fold.train], target, z[fold.test], data.task, data.output_dim))
        seeds.append(np.concatenate(outputs))
    stacked = np.stack(seeds)
    return stacked if data.has_columns else stacked[..., 0]


def _linear(x: np.ndarray, y: np.ndarray, new: np.ndarray, task: Task, outputs: int) -> np.ndarray:
    """(n, O) logits or values."""
    if task == "regression":
        return Ridge(1.0).fit(x, y).predict(new).reshape(len(new), -1)
    if task == "multiclass":
        model = LogisticRegression(max_iter=1000).fit(x, y)
        logits = np.full((len(new), outputs), -1e3)  # of classes that this part lacks
        found = model.decision_function(new)
        classes = model.classes_.astype(int)
        logits[:, classes] = found if found.ndim == 2 else np.stack([-found / 2, found / 2], 1)
        return logits
    columns = []
    for labels in y.reshape(len(y), -1).T:
        if labels.min() == labels.max():
            columns.append(np.full(len(new), 2 * labels[0] - 1))
        else:
            columns.append(LogisticRegression(max_iter=1000).fit(x, labels).decision_function(new))
    return np.stack(columns, 1)
