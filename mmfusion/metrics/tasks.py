"""What a task makes of a model's outputs: probabilities, scores, and the score that epochs are selected by.

S members, N examples, O outputs. Outputs are logits, or values in the units of a regression's target.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mmfusion.dataset import Task
from mmfusion.metrics.classes import MULTICLASS_SCORES, MULTILABEL_SCORES, multiclass_scores, multilabel_scores
from mmfusion.metrics.scores import BINARY_SCORES, RESAMPLES, Score, binary_scores, example_losses, regression_scores

TABLE_SCORES: dict[Task, tuple[str, ...]] = {
    "binary": BINARY_SCORES,
    "multiclass": ("accuracy", "balanced_accuracy", "macro_f1", "auroc"),
    "multilabel": ("map", "auroc", "macro_f1", "subset_accuracy"),
    "regression": ("mae", "correlation"),
}
"""what a printed table shows, the first of them first"""
ALL_SCORES: dict[Task, tuple[str, ...]] = {
    "binary": (*BINARY_SCORES, "balanced_accuracy", "weighted_f1", "log_loss", "brier", "ece"),
    "multiclass": MULTICLASS_SCORES,
    "multilabel": MULTILABEL_SCORES,
    "regression": ("mae", "correlation"),
}
SELECTION: dict[Task, str] = {
    "binary": "AUROC",
    "multiclass": "-log loss",
    "multilabel": "-log loss",
    "regression": "-MAE / std of target",
}
"""what an epoch is selected by, in words"""


def probabilities(outputs: Tensor, task: Task) -> Tensor:
    """What the outputs (..., O) say: (...,) of class 1, (..., C) of classes, (..., O) of labels; a regression's values.

    A regression's single value comes as (...,).
    """
    if task == "multiclass":
        return outputs.softmax(-1)
    if task == "multilabel":
        return outputs.sigmoid()
    if task == "binary":
        return outputs.squeeze(-1).sigmoid()
    return outputs.squeeze(-1) if outputs.shape[-1] == 1 else outputs


def task_scores(
    predictions: np.ndarray,
    target: np.ndarray,
    task: Task,
    names: Sequence[str] | None = None,
    label_range: tuple[float, float] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Score]:
    """Scores of every member with their intervals, of what `probabilities` returns.

    Args:
        predictions: (S, N) or (S, N, O).
        target: as in `mmfusion.dataset.Split`.
        names: default TABLE_SCORES of the task; a regression's are all that `regression_scores` gives.
        label_range: of a regression.
        seed: of the resampling.
        resamples: of the examples, for the interval; 0 leaves it out.
    """
    if task == "regression":
        return regression_scores(predictions, target, seed, label_range, resamples)
    scores = {"binary": binary_scores, "multiclass": multiclass_scores, "multilabel": multilabel_scores}[task]
    return scores(predictions, target, seed, names or TABLE_SCORES[task], resamples)


def can_score(target: np.ndarray | Tensor, task: Task) -> bool:
    """False where a binary target holds one class alone (no AUROC exists), or there is no example."""
    return len(target) > 0 and (task != "binary" or len(np.unique(np.asarray(target))) > 1)


def selection_score(
    task: Task, scale: Tensor | None = None, by_loss: bool = False, class_weights: Tensor | None = None
) -> Callable[[np.ndarray, np.ndarray], float]:
    """(outputs (N,) or (N, O), target) -> float, larger is better: what SELECTION says.

    `scale` (O,) divides a regression's errors; `by_loss`: two classes are scored by -log loss too; `class_weights` (C,)
    weigh the examples of a log loss (those of labels are left unweighed).
    """
    if task == "binary" and not by_loss:
        return lambda logits, target: roc_auc_score(target, logits)
    if task == "regression":
        unit = 1.0 if scale is None else scale.numpy()
        return lambda values, target: -float((np.abs(values - target) / unit).mean())

    def minus_log_loss(logits: np.ndarray, target: np.ndarray) -> float:
        losses = example_losses(logits[None], target, task)[0]
        if class_weights is not None and task != "multilabel":
            losses = losses * class_weights.numpy()[target.astype(int)]
        return -float(losses.mean())

    return minus_log_loss


def balanced_weights(target: Tensor, task: Task, classes: int) -> Tensor:
    """Weight of each class such that all weigh alike in a mean over the examples (scikit-learn's "balanced").

    Args:
        target: of the training examples.
        classes: C of a multiclass target, or the number of labels.

    Returns:
        (C,) of a binary (C = 2) or multiclass target; (O, 2) of a multilabel one: of an absent and a present label. A
        class without examples weighs 0.

    Raises ValueError for a regression.
    """
    if task == "regression":
        raise ValueError("a regression has no classes to balance")
    if task == "multilabel":
        return torch.stack([balanced_weights(column, "binary", 2) for column in target.T])
    counts = torch.bincount(target.long(), minlength=2 if task == "binary" else classes).double()
    present = (counts > 0).sum()
    return torch.where(counts > 0, len(target) / (present * counts.clamp_min(1)), 0.0).float()
