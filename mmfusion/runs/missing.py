"""What a missing modality costs: the scores where its latent is integrated out, and by how much the answer widens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmfusion.data.folds import tested_split
from mmfusion.dataset import Dataset, Split, Task
from mmfusion.metrics.tasks import task_scores
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.models.missing import DRAWS

SCORES: dict[Task, tuple[str, ...]] = {
    "binary": ("auroc", "log_loss"),
    "multiclass": ("accuracy", "log_loss"),
    "multilabel": ("map", "log_loss"),
    "regression": ("mae", "correlation"),
}
"""what is compared: the score that epochs are selected by, and the log loss (of values: their correlation)"""
MOST_LOGITS = 100_000_000  # a second or two on two cores; the demo has 2.5 million
LEAST_REFERENCE = 256


@dataclass(frozen=True)
class MissingReport:
    """Scores of S members on one part of the data, whole and without each modality."""

    part: str
    examples: int
    """N of that part"""
    reference: int
    """training examples (of each fold, at most) whose latents stand in for a missing one, each as likely"""
    whole: dict[str, list[float]]
    """{score: (S,)}"""
    without: dict[str, dict[str, list[float]]]
    """{modality: the same scores} of the expected probabilities, or values, over its training latents"""
    std: dict[str, list[float]]
    """{modality: (S,)} mean over examples and outputs of the exact standard deviation that the missing latent adds to
    the logit, or value"""


def missing_report(
    datasets: Sequence[Dataset], ensemble: FusionEnsemble, part: str, split: Split, predictions: Tensor
) -> MissingReport:
    """What each modality's absence costs LMF members on a labelled part of the data.

    A missing latent follows its distribution in training, independently of the others (`mmfusion.models.missing`): as
    in all training examples, or in so many drawn ones as keep the number of logits below `MOST_LOGITS`.

    Args:
        datasets: one, or the folds of one.
        ensemble: all members, seed-major, then fold; of two modalities or more.
        part: name of `split`.
        split: what is predicted; with several folds the tested examples of all, fold after fold.
        predictions: (S, N) or (S, N, O) of the whole examples, as `FusionEnsemble.predict`.

    Raises ValueError where the heads are not LMF.
    """
    first, modalities = datasets[0], list(ensemble.shape["input_dims"])
    parts = [split] if len(datasets) == 1 else [dataset.splits[tested_split(dataset)] for dataset in datasets]
    references = [_reference(dataset, len(split) * predictions.shape[0] * len(modalities)) for dataset in datasets]
    target = split.target.numpy()

    def scores(p: Tensor) -> dict[str, list[float]]:
        found = task_scores(p.numpy(), target, first.task, SCORES[first.task], resamples=0)
        return {name: found[name].members for name in SCORES[first.task]}

    without, std = {}, {}
    for name in modalities:
        p, spread = [], []
        for fold, (tested, reference) in enumerate(zip(parts, references, strict=True)):
            given = {other: x for other, x in tested.features.items() if other != name}
            found = ensemble.part(fold, len(datasets)).predict_missing(given, "training", reference)
            p.append(found.prediction)
            spread.append(found.std)  # (S, n, O)
        without[name] = scores(torch.cat(p, 1))
        std[name] = torch.cat(spread, 1).mean((1, 2)).tolist()
    count = max(len(next(iter(reference.values()))) for reference in references)
    return MissingReport(part, len(split), count, scores(predictions), without, std)


def _reference(dataset: Dataset, predicted: int) -> Mapping[str, Tensor]:
    """Raw training features, of all examples or, of classes, of as many drawn ones as the work allows.

    `predicted`: for how many predictions the outputs of every reference are averaged.
    """
    train = dataset.splits["train"]
    most = min(DRAWS, max(LEAST_REFERENCE, MOST_LOGITS // (predicted * dataset.output_dim)))  # beyond, it is drawn
    if dataset.task == "regression" or len(train) <= most:  # values are linear in the latent: nothing is averaged
        return train.features
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(train))[:most])
    return {name: x[rows] for name, x in train.features.items()}
