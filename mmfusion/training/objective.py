"""The named loss terms of one fusion model on one batch; their weighted sum is minimised."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jwae_module import (
    bures_penalty,
    characteristic_penalty,
    mmd_penalty,
    reconstruction_error,
    sliced_wasserstein_penalty,
)
from mmfusion.dataset import Task
from mmfusion.losses.alignment import ALIGNMENTS
from mmfusion.losses.expected import expected_absolute_error, moderated_logits
from mmfusion.losses.token_alignment import TransportTerm, mmd_between
from mmfusion.models.fusion import FusionOutput
from mmfusion.models.tokens import TokenOutput
from mmfusion.sequences import Tokens
from mmfusion.training.feed import Batch
from mmfusion.training.trainer import ModelCall

Alignment = Literal[*ALIGNMENTS]
Prior = Literal["mmd", "bures", "sliced", "characteristic"]
PRIOR_TERMS: dict[Prior, Callable[..., Tensor]] = {
    "mmd": mmd_penalty,
    "bures": bures_penalty,
    "sliced": sliced_wasserstein_penalty,
    "characteristic": characteristic_penalty,
}
DIRECTIONAL: tuple[Prior, ...] = ("sliced", "characteristic")  # look at latents along random directions
DIRECTIONS = 64  # of each step
Term = Callable[[FusionOutput, Batch], Tensor]
"""a further loss term: what one model says of one batch, and the batch -> a scalar"""
FIT_TERM: dict[Task, str] = {
    "binary": "bce",
    "multiclass": "cross_entropy",
    "multilabel": "bce",
    "regression": "absolute_error",
}


def fit_loss(
    output: FusionOutput,
    target: Tensor,
    task: Task = "binary",
    target_scale: Tensor | float = 1.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean over the batch of how far a prediction is from its target: cross-entropy, or absolute error.

    Where the prediction is uncertain: the cross-entropy of the expected probability, the expected absolute error.

    Args:
        output: whose `prediction` (B, O) are logits or values, with their `covariance` (B, O, O) or None.
        target: (B,) or (B, O), as in `mmfusion.dataset.Split`.
        target_scale: () or (O,), what a regression's errors are divided by: the standard deviation of the targets.
        class_weights: (C,) of a binary or multiclass target, (O, 2) of a multilabel one: what an example of that class
            weighs (`mmfusion.metrics.tasks.balanced_weights`); default 1.
    """
    if task == "regression":
        error = (output.prediction - target.reshape(output.prediction.shape)) / target_scale
        if output.covariance is None:
            return error.abs().mean()
        variance = output.covariance.diagonal(dim1=-2, dim2=-1)
        return expected_absolute_error(error, variance / target_scale**2).mean()
    logits = moderated_logits(output.prediction, output.covariance, task)
    if task == "multiclass":
        losses, weights = F.cross_entropy(logits, target.long(), reduction="none"), class_weights
    else:
        logits = logits if target.ndim > 1 else logits.squeeze(-1)
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
    prior: Collection[Prior] = ("mmd",),
    directions: Tensor | None = None,
) -> dict[str, Tensor]:
    """The named terms whose weighted sum a fusion model is trained on, as scalars of one batch.

    Args:
        output: of `FusionModel.forward` with reconstructions.
        target, target_scale, class_weights: as for `fit_loss`.
        task: names the first term: "bce", "cross_entropy" or "absolute_error".
        alignment: which loss aligns the latents of one example; a single modality has nothing to be aligned with, and
            then there is no such term.
        prior: the penalties towards N(0, I), each a term, mean over modalities.
        directions: (K, L), which some of them need.
    """
    terms = {FIT_TERM[task]: fit_loss(output, target, task, target_scale, class_weights)}
    latents = torch.stack(list(output.latents.values()))  # (M, B, L): one call for all modalities
    variances = torch.stack([output.variances[m] for m in output.latents]) if output.variances else None
    for name in prior:
        term = partial(PRIOR_TERMS[name], directions=directions) if name in DIRECTIONAL else PRIOR_TERMS[name]
        distances = torch.vmap(term, in_dims=(0, None if variances is None else 0))
        terms[name] = distances(latents, variances).mean()
    terms["reconstruction"] = reconstruction_error(output.standardised, output.reconstructions)
    if len(output.latents) > 1:
        terms["alignment"] = ALIGNMENTS[alignment](output.latents)
    return terms


def objective(
    model: ModelCall,
    batch: Batch,
    task: Task = "binary",
    alignment: Alignment = "margin",
    scale: Tensor | float = 1.0,
    class_weights: Tensor | None = None,
    further: Mapping[str, Term] | None = None,
    prior: Collection[Prior] = ("mmd",),
) -> dict[str, Tensor]:
    """Loss terms (`loss_terms`) of one model on one batch, and the `further` ones by their names.

    batch.features holds (B, d_m) per modality, batch.target (B,) or (B, O).
    """
    output = model(batch.features, present=batch.present, kept=batch.kept, joint=task == "multiclass")
    directions = batch.directions[0] if batch.directions else None
    terms = loss_terms(output, batch.target, task, alignment, scale, class_weights, prior, directions)
    return terms | {name: term(output, batch) for name, term in (further or {}).items()}


def token_terms(
    output: TokenOutput,
    target: Tensor,
    task: Task = "binary",
    target_scale: Tensor | float = 1.0,
    class_weights: Tensor | None = None,
    prior: Collection[Prior] = ("mmd",),
    transport: TransportTerm | None = None,
    phase: Tensor | None = None,
    wanted: Collection[str] | None = None,
    directions: Tensor | None = None,
) -> dict[str, Tensor]:
    """The named terms that a model of token sequences is trained on, as scalars of one batch.

    "transport" is the Wasserstein distance between the tokens of two modalities, "token_mmd" the MMD between one token
    of each, both mean over pairs of modalities. Where the model has a jWAE, the terms of its prior and its
    reconstructions follow, for one token of each example.

    Args:
        output: with drawn tokens.
        target, target_scale, class_weights: as for `fit_loss`.
        transport, phase: the alignment, default as its class, and what it is called with.
        wanted: terms beside the fit; default: all that the model has.
        directions: (K, L), which some of the prior's penalties need.
    """
    terms = {FIT_TERM[task]: fit_loss(output, target, task, target_scale, class_weights)}

    def wants(name: str) -> bool:
        return wanted is None or name in wanted

    if len(output.latents) > 1 and wants("transport"):
        terms["transport"] = (transport or TransportTerm())(output.layers, phase)
    if len(output.latents) > 1 and wants("token_mmd"):
        pairs = list(itertools.combinations(output.latents.values(), 2))
        terms["token_mmd"] = torch.stack([mmd_between(x, y) for x, y in pairs]).mean()
    if output.reconstructions:
        latents = torch.stack(list(output.latents.values()))  # (M, B, L)
        for name in filter(wants, prior):
            term = partial(PRIOR_TERMS[name], directions=directions) if name in DIRECTIONAL else PRIOR_TERMS[name]
            terms[name] = torch.vmap(term)(latents).mean()
        if wants("reconstruction"):
            terms["reconstruction"] = reconstruction_error(output.standardised, output.reconstructions)
    return terms


def token_objective(
    model: ModelCall,
    batch: Batch,
    task: Task = "binary",
    scale: Tensor | float = 1.0,
    class_weights: Tensor | None = None,
    prior: Collection[Prior] = ("mmd",),
    transport: TransportTerm | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """`token_terms` of one model of sequences on one batch."""
    uniforms = batch.uniforms[0]
    output = model(batch.features, present=batch.present, kept=batch.kept, uniforms=uniforms)
    directions = batch.directions[0] if batch.directions else None
    shared = (task, scale, class_weights, prior, transport)
    return token_terms(output, batch.target, *shared, uniforms[:, 0], wanted, directions)


def predict_tokens(model: ModelCall, features: Mapping[str, Tokens], task: Task = "binary") -> Tensor:
    """Logits or values of one model of sequences: (N,) of a single output, else (N, O)."""
    prediction = model(features).prediction
    return prediction.squeeze(-1) if task != "multiclass" and prediction.shape[-1] == 1 else prediction


def predict(
    model: ModelCall,
    features: Mapping[str, Tensor],
    task: Task = "binary",
    missing: Sequence[str] = (),
    kept: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits or values of one model: (N,) of a single output, else (N, O); a multiclass model's are always (N, C).

    features holds (N, d_m) per modality; the head sees 0 in place of the latents of those in `missing`; `kept`
    (N, d_m) multiplies the standardised features.
    """
    present = {name: features[name].new_zeros(len(features[name])) for name in missing}
    output = model(features, reconstruct=False, present=present, kept=kept, joint=task == "multiclass")
    prediction = moderated_logits(output.prediction, output.covariance, task)
    return prediction.squeeze(-1) if task != "multiclass" and prediction.shape[-1] == 1 else prediction
