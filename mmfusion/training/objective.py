"""The named loss terms of one fusion model on one batch; their weighted sum is minimised."""

from collections.abc import Mapping
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
FIT_TERM = {"binary": "bce", "regression": "absolute_error"}


def loss_terms(
    output: FusionOutput,
    target: Tensor,
    task: Task = "binary",
    alignment: Alignment = "margin",
    target_scale: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """The named terms whose weighted sum a fusion model is trained on, as scalars of one batch.

    Args:
        output: of `FusionModel.forward` with reconstructions.
        target: (B,) of 0 and 1, or for a regression (B,) or (B, O).
        task: "binary" gives the term "bce" on logits, "regression" the term "absolute_error".
        alignment: which loss aligns the latents of one example; a single modality has nothing to be aligned with, and
            then there is no such term.
        target_scale: () or (O,), what a regression's errors are divided by: the standard deviation of the targets.
    """
    prediction = output.prediction if target.ndim > 1 else output.prediction.squeeze(-1)
    if task == "binary":
        terms = {FIT_TERM[task]: F.binary_cross_entropy_with_logits(prediction, target)}
    else:
        terms = {FIT_TERM[task]: ((prediction - target) / target_scale).abs().mean()}
    terms["mmd"] = torch.stack([mmd_penalty(z) for z in output.latents.values()]).mean()
    terms["reconstruction"] = reconstruction_error(output.standardised, output.reconstructions)
    if len(output.latents) > 1:
        align = info_nce if alignment == "info_nce" else margin_ranking
        terms["alignment"] = align(output.latents)
    return terms


def objective(
    model: ModelCall, batch: Batch, task: Task = "binary", alignment: Alignment = "margin", scale: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """Loss terms (`loss_terms`) of one model on one batch.

    batch.features holds (B, d_m) per modality, batch.target (B,) or (B, O).
    """
    return loss_terms(model(batch.features, present=batch.present), batch.target, task, alignment, scale)


def predict(model: ModelCall, features: Mapping[str, Tensor]) -> Tensor:
    """Logits, or values of a regression's single target, (N,) of one model."""
    return model(features, reconstruct=False).prediction.squeeze(-1)
