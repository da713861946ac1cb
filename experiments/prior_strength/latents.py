"""Latents beside the prior: as trained, and in coordinates of mean 0 and covariance I on the training part."""

from collections.abc import Callable

import numpy as np
import torch

from mmfusion.metrics.prior import PriorCheck, check_prior
from mmfusion.models.fusion import FusionModel
from mmfusion.models.whitening import whiten_latents
from mmfusion.training.grid import Grid


def latent_columns(grid: Grid, place: int) -> dict[str, np.ndarray]:
    """{column: (S,)} of one setting, means over folds and modalities; whitens its models (`latent_checks`)."""
    as_trained, whitened = latent_checks(grid, place)
    return {
        "eigenvalue": _of(as_trained, lambda check: check.follows["largest eigenvalue"].value),
        "eigenvalue whitened": _of(whitened, lambda check: check.follows["largest eigenvalue"].value),
        "in the ball whitened": _of(whitened, lambda check: check.follows["share in the 95 % ball"].value),
        "dimension of means": _of(whitened, lambda check: check.dimension_of_means),
        "share no noise": _of(whitened, lambda check: check.share_of_means),
        "enforced": _of(whitened, lambda check: float(check.enforced)),
    }


def latent_checks(grid: Grid, place: int) -> tuple[list[list[PriorCheck]], list[list[PriorCheck]]]:
    """Per seed, the checks on test of every fold and modality: as trained, and whitened on the fold's training part.

    The models of the grid stay whitened, which changes no prediction of whole examples.
    """
    as_trained, whitened = [], []
    for s in range(len(grid.seeds)):
        before, after = [], []
        for f, fold in enumerate(grid.data.folds):
            model, pool = grid.model(place, s, f), grid.data.pool.features
            before += checks(model, {name: x[fold.test] for name, x in pool.items()})
            whiten_latents(model, {name: x[fold.train] for name, x in pool.items()})
            after += checks(model, {name: x[fold.test] for name, x in pool.items()})
        as_trained.append(before)
        whitened.append(after)
    return as_trained, whitened


@torch.inference_mode()
def checks(model: FusionModel, features: dict[str, torch.Tensor]) -> list[PriorCheck]:
    """One per modality, on raw features (n, d_m)."""
    latents, variances = model.latents(features), model.latent_variances() or [None] * len(model.modalities)
    return [
        check_prior(z.double().numpy(), None if v is None else v.double().numpy())
        for z, v in zip(latents, variances, strict=True)
    ]


@torch.inference_mode()
def latent_distances(grid: Grid, place: int) -> np.ndarray:
    """(S, n): |mu|^2 of the latents on test, sum over modalities; of whitened models Mahalanobis' from training."""
    pool = grid.data.pool.features
    seeds = []
    for s in range(len(grid.seeds)):
        folds = []
        for f, fold in enumerate(grid.data.folds):
            latents = grid.model(place, s, f).latents({name: x[fold.test] for name, x in pool.items()})
            folds.append(sum(z.double().square().sum(-1) for z in latents).numpy())  # (n_f,)
        seeds.append(np.concatenate(folds))
    return np.stack(seeds)


def _of(checks_of_seeds: list[list[PriorCheck]], what: Callable[[PriorCheck], float]) -> np.ndarray:
    """(S,) mean over folds and modalities."""
    return np.array([np.mean([what(check) for check in one]) for one in checks_of_seeds])
