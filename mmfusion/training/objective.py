"""The named loss terms of one fusion model on one batch; their weighted sum is minimised."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jwae_module import mmd_penalty, reconstruction_error
from mmfusion.dataset import Task
from mmfusion.losses.contrastive import info_nce, margin_ranking
from mmfusion.models.fusion import FusionOutput
from mmfusion.training.trainer import Batch, ModelCall

Alignment = Literal["margin", "info_nce"]
Term = Callable[[FusionOutput, Batch], Tensor]
"""a further loss term: what one model says of one batch, and the batch -> a scalar"""
FIT_TERM: dict[Task, str] = {
    "binary": "bce",
    "multiclass": "cross_entropy",
    "multilabel": "bce",
    "regression": "absolute_error",
}


def fit_loss(
    prediction: Tensor,
    target: Tensor,
    task: Task = "binary",
    target_scale: Tensor | float = 1.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean over the batch of how far a prediction is from its target: cross-entropy, or absolute error.

    Args:
        prediction: (B, O), logits or values.
        target: (B,) or (B, O), as in `mmfusion.dataset.Split`.
        target_scale: () or (O,), what a regression's errors are divided by: the standard deviation of the targets.
        class_weights: (C,) of a binary or multiclass target, (O, 2) of a multilabel one: what an example of that class
            weighs (`mmfusion.metrics.tasks.balanced_weights`); default 1.
    """
    if task == "regression":
        values = prediction if target.ndim > 1 else prediction.squeeze(-1)
        return ((values - target) / target_scale).abs().mean()
    if task == "multiclass":
        losses, weights = F.cross_entropy(prediction, target.long(), reduction="none"), class_weights
    else:
        logits = prediction if target.ndim > 1 else prediction.squeeze(-1)
        if class_weights is None:
            return F.binary_cross_entropy_with_logits(logits, target)
        losses, weights = F.binary_cross_entropy_with_logits(logits, target, reduction="none"), class_weights
        if task == "multilabel":
            return (losses * torch.where(target > 0, weights[:, 1], weights[:, 0])).mean()
    return losses.mean() if weights is None else (losses * weights[target.long()]).mean()


def loss_terms(
    output: FusionOutput,
    target: Tensor,
    task: Task = "binary",
    alignment: Alignment = "margin",
    target_scale: Tensor | float = 1.0,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The named terms whose weighted sum a fusion model is trained on, as scalars of one batch.

    Args:
        output: of `FusionModel.forward` with reconstructions.
        target, target_scale, class_weights: as for `fit_loss`.
        task: names the first term: "bce", "cross_entropy" or "absolute_error".
        alignment: which loss aligns the latents of one example; a single modality has nothing to be aligned with, and
            then there is no such term.
    """
    terms = {FIT_TERM[task]: fit_loss(output.prediction, target, task, target_scale, class_weights)}
    terms["mmd"] = torch.stack([mmd_penalty(z) for z in output.latents.values()]).mean()
    terms["reconstruction"] = reconstruction_error(output.standardised, output.reconstructions)
    if len(output.latents) > 1:
        align = info_nce if alignment == "info_nce" else margin_ranking
        terms["alignment"] = align(output.latents)
    return terms


def objective(
    model: ModelCall,
    batch: Batch,
    task: Task = "binary",
    alignment: Alignment = "margin",
    scale: Tensor | float = 1.0,
    class_weights: Tensor | None = None,
    further: Mapping[str, Term] | None = None,
) -> dict[str, Tensor]:
    """Loss terms (`loss_terms`) of one model on one batch, and the `further` ones by their names.

    batch.features holds (B, d_m) per modality, batch.target (B,) or (B, O).
    """
    output = model(batch.features, present=batch.present)
    terms = loss_terms(output, batch.target, task, alignment, scale, class_weights)
    return terms | {name: term(output, batch) for name, term in (further or {}).items()}


def predict(
    model: ModelCall, features: Mapping[str, Tensor], task: Task = "binary", missing: Sequence[str] = ()
) -> Tensor:
    """Logits or values of one model: (N,) of a single output, else (N, O); a multiclass model's are always (N, C).

    features holds (N, d_m) per modality; the head sees 0 in place of the latents of those in `missing`.
    """
    present = {name: features[name].new_zeros(len(features[name])) for name in missing}
    prediction = model(features, reconstruct=False, present=present).prediction
    return prediction.squeeze(-1) if task != "multiclass" and prediction.shape[-1] == 1 else prediction
