"""Components of trained members: refits of the same function, stability over seeds, ablation."""

import itertools
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.rank_semantics.lexicon import residual, unit_columns
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold
from mmfusion.metrics.scores import example_scores
from mmfusion.models.fusion import FusionModel
from mmfusion.models.identifiability import kruskal_condition, matched_correlation, mix_ranks, refit_perturbed
from mmfusion.training.grid import per_example

MIXINGS = 10  # random G per layer
PERMUTATIONS = 20  # of the examples, for each two seeds


class Parts(NamedTuple):
    """One member's prediction on n test examples of its fold, taken apart; in the units of the prediction."""

    prediction: np.ndarray  # (n, O)
    components: np.ndarray  # (n, O, K), strongest first; they and the rest sum to the prediction
    means: np.ndarray  # (O, K), in training
    share: np.ndarray  # (O, K) cov(component, prediction) / var(prediction), in training
    std: np.ndarray  # (O, K), in training
    raw: np.ndarray  # (n, O, R), the layer's own terms
    smallest: float  # singular value of the factors, all factors being unit functions; 0: linearly dependent
    kruskal: bool


@torch.inference_mode()
def parts_of(model: FusionModel, features: dict[str, Tensor], rows: Fold) -> Parts:
    """Take the predictions of a member with an LMF head of two or more modalities apart, in float64."""
    latents = [z.double() for z in model.latents(features)]  # (N, L) each
    training = [z[rows.train] for z in latents]
    layer, scale = deepcopy(model.fusion).double(), model.rescale.std.double()
    raw = layer.rank_terms(latents).mT  # (N, O, R)
    prediction = model.rescale(layer(latents))  # (N, O)
    if len(latents) == 2:
        means = [z.mean(0) for z in training]
        spectrum, directions = layer.canonical_factors([z.T.cov() for z in training])  # (O, R), (O, R, L)
        along = [
            torch.einsum("nl,okl->nok", z - mean, d) for z, mean, d in zip(latents, means, directions, strict=True)
        ]
        components = spectrum * along[0] * along[1]  # (N, O, K)
    else:
        share = _share(raw[rows.train] * scale[:, None], prediction[rows.train])
        order = share.argsort(-1, descending=True)  # (O, R)
        components = raw.gather(-1, order.expand_as(raw))
    components = components * scale[:, None]
    seen = components[rows.train]
    smallest, kruskal = kruskal_condition(layer, training)
    return Parts(
        prediction[rows.test].numpy(),
        components[rows.test].numpy(),
        seen.mean(0).numpy(),
        _share(seen, prediction[rows.train]).numpy(),
        seen.std(0).numpy(),
        raw[rows.test].numpy(),
        smallest,
        kruskal,
    )


def _share(components: Tensor, prediction: Tensor) -> Tensor:
    """(n, O, K), (n, O) -> (O, K): covariance with the prediction by its variance."""
    y = prediction - prediction.mean(0)
    return torch.einsum("nok,no->ok", components, y) / y.square().sum(0).clamp_min(1e-30)[:, None]


# ---- is the same function to be had with other terms? -----------------------------------------------------------


@torch.inference_mode()
def other_terms(model: FusionModel, features: dict[str, Tensor], rows: Fold, seed: int) -> tuple[float, float]:
    """Look for other rank terms of the same function: mixed by random G, or for three modalities shaken and refitted.

    Returns:
        largest change of the function on the examples trained on, in its standard deviations, and the mean matched
        |correlation| of the terms there. A refit takes the first output alone.
    """
    latents = [z.double() for z in model.latents({name: x[rows.train] for name, x in features.items()})]
    layer, generator = deepcopy(model.fusion).double(), torch.Generator().manual_seed(seed)
    if len(latents) > 2:
        after, before = refit_perturbed(layer, latents, generator)
        pairs = [(after[:, None], before[:, None])]  # (n, 1, R)
    else:
        gs = torch.randn(MIXINGS, layer.rank, layer.rank, generator=generator, dtype=torch.float64)
        pairs = [(mix_ranks(layer, g).rank_terms(latents).mT, layer.rank_terms(latents).mT) for g in gs]  # (n, O, R)
    changes = [((a.sum(-1) - b.sum(-1)).abs().amax(0) / b.sum(-1).std(0).clamp_min(1e-30)).max() for a, b in pairs]
    return float(max(changes)), float(
        np.mean([matched_correlation(unit_columns(a.numpy()), unit_columns(b.numpy())) for a, b in pairs])
    )


# ---- stability over starts ---------------------------------------------------------------------------------------


def stability(members: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Matched |correlation| of every two starts of a fold, and the same with the examples of one of them permuted.

    Args:
        members: components (n_f, O, K) of [seed][fold].

    Returns:
        (F, S, S) and (F, S, S), symmetric, mean over outputs; the diagonals are 0.
    """
    size, folds = len(members), len(members[0])
    own, null = np.zeros((folds, size, size)), np.zeros((folds, size, size))
    rng = np.random.default_rng(0)
    for f in range(folds):
        x = [unit_columns(member[f]) for member in members]
        orders = [rng.permutation(len(x[0])) for _ in range(PERMUTATIONS)]
        for s, t in itertools.combinations(range(size), 2):
            own[f, s, t] = matched_correlation(x[s], x[t])
            null[f, s, t] = np.mean([matched_correlation(x[s], x[t][order]) for order in orders])
    return own + own.mT, null + null.mT


def over_pairs(pairs: np.ndarray) -> np.ndarray | None:
    """(F, S, S) of the pairs of starts -> what a contrast is estimated from; None for one fold and one pair.

    Of several folds (1, F), the mean over each fold's pairs; of one fold `pseudovalues` (S,).
    """
    folds, size, _ = pairs.shape
    if folds > 1:
        return pairs.sum((1, 2))[None] / (size * (size - 1))
    return pseudovalues(pairs[0]) if size > 2 else None


def per_seed(pairs: np.ndarray) -> np.ndarray:
    """(S, S) or (F, S, S) -> (S,): mean over the other seeds, and over folds."""
    return pairs.reshape(-1, *pairs.shape[-2:]).mean(0).sum(1) / (pairs.shape[-1] - 1)


def pseudovalues(pairs: np.ndarray) -> np.ndarray:
    """(S, S) -> (S,) with the same mean, to be treated as independent; S at least 3.

    The means over the other seeds share pairs: a t interval of them would be half as long as it should be. These are
    the jackknife's pseudo-values of the mean over pairs (Arvesen 1969).
    """
    size, mean = len(pairs), per_seed(pairs)
    return (2 * (size - 1) * mean - size * mean.mean()) / (size - 2)


def stabilities(parts: Sequence[Sequence[Parts]], two: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of the components, of what the prediction does not explain of them, and of raw terms where those are others."""
    kinds = {
        "components": [[p.components for p in member] for member in parts],
        "given the prediction": [[residual(p.components, p.prediction) for p in member] for member in parts],
    }
    if two:
        kinds["raw rank terms"] = [[p.raw for p in member] for member in parts]
    return {kind: stability(members) for kind, members in kinds.items()}


# ---- ablation ----------------------------------------------------------------------------------------------------


def ablation(parts: Sequence[Sequence[Parts]], data: FoldedDataset) -> np.ndarray:
    """(K, S, n): score lost where component k of every output is replaced by its training mean."""
    whole = np.stack([np.concatenate([p.prediction for p in member]) for member in parts])  # (S, n, O)
    centred = np.stack([np.concatenate([p.components - p.means for p in member]) for member in parts])  # (S, n, O, K)
    dropped = whole[None] - np.moveaxis(centred, -1, 0)  # (K, S, n, O)
    if data.pool.target.ndim == 1:
        whole, dropped = whole[..., 0], dropped[..., 0]
    return per_example(data, whole, "test", example_scores) - per_example(data, dropped, "test", example_scores)
