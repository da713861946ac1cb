"""What a weighting of alignment losses scores on dev: the objectives of a search, all settings trained as one stack.

Objectives, on dev, mean over seeds:

    retrieval        R@1, mean over all ordered pairs of modalities                                             larger
    classification   logistic regression on all latents, fitted on train: AUROC of two classes, else accuracy   larger
    alignment        centroid gap, mean over pairs of modalities                                                smaller
    unique           what one modality says and the others do not: R^2 of its features by ridge regression on all
                     latents, less that on the other modalities' latents; fitted on train, mean over modalities  larger
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from mmfusion.data.array_cuts import cut_dev
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, take
from mmfusion.errors import NonFiniteLoss
from mmfusion.metrics.geometry import centroid_gap
from mmfusion.metrics.probes import probe_score, unique_share
from mmfusion.metrics.shared_retrieval import shared_retrieval
from mmfusion.models.alignment import AlignmentModel
from mmfusion.training.align import AlignmentTraining, Weighting, align
from mmfusion.training.search import Direction, Setting

DIRECTIONS: dict[str, Direction] = {
    "retrieval": "maximize",
    "classification": "maximize",
    "alignment": "minimize",
    "unique": "maximize",
}


def development(data: FoldedDataset) -> FoldedDataset:
    """The train and dev parts of the first fold, and nothing else; where dev is tested on, one is cut from train.

    Raises InputError where train is too small for that.
    """
    first, notes = data.folds[0], []
    rows, dev = first.train, first.dev
    if first.test is not None and torch.isin(dev, first.test).any():
        split = replace(take(data.pool, rows), ids=[str(int(row)) for row in rows])
        by_class = data.labelled and data.task in ("binary", "multiclass")
        train, cut, note = cut_dev(split, by_class, 0, data.name, data.class_names)
        rows, dev = (torch.tensor([int(key) for key in part.ids]) for part in (train, cut))
        notes.append(note)
    fold = Fold(torch.arange(len(rows)), torch.arange(len(rows), len(rows) + len(dev)))
    return replace(data, pool=take(data.pool, torch.cat([rows, dev])), folds=[fold], notes=notes)


def evaluation(
    data: FoldedDataset, objectives: Sequence[str], unit: str, training: AlignmentTraining, device: str | torch.device
) -> Callable[[list[Setting]], list[np.ndarray]]:
    """settings -> objectives (K,) of each on dev, mean over seeds: one training of all. NaN of one that diverges.

    `data` is that of `development`; the term `unit` has weight 1.
    """

    def evaluate(settings: list[Setting]) -> list[np.ndarray]:
        rows = [Weighting(str(i), {unit: 1.0, **setting}) for i, setting in enumerate(settings)]
        try:
            ensembles = align(data, rows, training, device=device)
        except NonFiniteLoss:  # of which one? those beside it are innocent
            if len(settings) == 1:
                return [np.full(len(objectives), np.nan)]
            half = len(settings) // 2
            return evaluate(settings[:half]) + evaluate(settings[half:])
        return [
            np.mean([objectives_of(data, member, objectives) for member in ensembles[row.label].members], axis=0)
            for row in rows
        ]

    return evaluate


@torch.inference_mode()
def objectives_of(data: FoldedDataset, member: AlignmentModel, objectives: Sequence[str]) -> list[float]:
    """The objectives (K,) of one trained member on dev; NaN where a latent is zero and has no direction."""
    fold = data.folds[0]
    latents = {name: z.double().numpy() for name, z in member.encode(data.pool.features).items()}  # (N, L) each
    features = {name: x.numpy() for name, x in data.pool.features.items()}
    train, dev, train_x, dev_x = (
        {name: values[rows.numpy()] for name, values in part.items()}
        for part, rows in itertools.product((latents, features), (fold.train, fold.dev))
    )
    if not all(z.any(-1).all() for z in dev.values()):
        return [np.nan] * len(objectives)
    target, shared = data.pool.target.numpy().astype(int), take(data.pool, fold.dev.tolist()).shared
    measures = {
        "retrieval": lambda: np.mean([one.recall[1] for one in shared_retrieval(dev, shared, (1,)).values()]),
        "classification": lambda: probe_score(train, target[fold.train.numpy()], dev, target[fold.dev.numpy()]),
        "alignment": lambda: np.mean([centroid_gap(x, y) for x, y in itertools.combinations(dev.values(), 2)]),
        "unique": lambda: unique_share(train_x, train, dev_x, dev),
    }
    return [float(measures[name]()) for name in objectives]
