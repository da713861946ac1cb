"""Contribution of each modality and each set of modalities on a whole split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmfusion.dataset import Split, Task
from mmfusion.explain.account import margin_weights, subset_name
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.scores import Score
from mmfusion.metrics.tasks import probabilities, task_scores
from mmfusion.models.decomposition import (
    emap,
    interventional_values,
    relevance_scores,
    shapley_values,
    values_by_definition,
    variance_shares,
)
from mmfusion.models.exact import exact_layer, latents_of
from mmfusion.models.fusion import FusionModel

MOST_PAIRED = 1000  # examples whose N^2 pairings are gone through
SHOWN: dict[Task, tuple[str, ...]] = {
    "binary": ("auroc", "accuracy"),
    "multiclass": ("accuracy", "log_loss"),
    "multilabel": ("auroc", "accuracy"),  # of one label
    "regression": ("mae", "correlation"),
}


@dataclass(frozen=True)
class Summary:
    """S members on N examples of one split; in logits, or in units of a regression's target."""

    split: str
    examples: int
    output: str
    """what the Shapley values are of: "logit", "logit of LABEL", "margin (...)", or a regression's target"""
    scores: dict[str, dict[str, Score]]
    """{"full model": {score: Score}, "EMAP: additive in the modalities": ...}; empty for an unlabelled split"""
    shapley: dict[str, np.ndarray]
    """(S,) per modality: mean |Shapley value| over the examples"""
    relevance: dict[str, np.ndarray]
    """(S,) per set of modalities, sums to 1: InTense's (`mmfusion.models.decomposition.relevance_scores`)"""
    variance: dict[str, np.ndarray]
    """(S,) per set of modalities, sums to 1: share of the prediction's variance"""
    notes: list[str] = field(default_factory=list)
    """what the reader of the scores must know"""
    label: str = ""
    """of several labels: the one that is scored"""


@torch.no_grad()
def summarise(
    members: Sequence[FusionModel],
    split: Split,
    name: str,
    task: Task,
    output: int,
    output_name: str,
    others: Mapping[str, Sequence[FusionModel]] | None = None,
    notes: Sequence[str] = (),
    label: str = "",
) -> Summary:
    """EMAP, Shapley values, relevance and shares of variance of all members on a split, each about the split's means.

    Relevance and shares are those of all outputs together, everything else of `output` (`label`, of labels) alone. Of
    classes the EMAP is that of every logit, and what is scored the softmax of them all; Shapley values are then of each
    example's margin, the logit of the likeliest class by the mean probability less that of the runner-up. `others` are
    models of two modalities with any head, whose scores and EMAP, by its definition in N^2 passes, are set beside; they
    are left out where N is above `MOST_PAIRED`.
    """
    modalities = members[0].modalities
    whole, additive, games = [], [], []
    columns: dict[str, dict[str, list]] = {"shapley": {}, "relevance": {}, "variance": {}}
    for member in members:
        layer, latents = exact_layer(member), latents_of(member, split.features)
        values = interventional_values(layer, latents)
        whole.append(layer(latents))  # (N, O)
        additive.append(emap(values))
        games.append(values)
        for column, shares in (
            ("relevance", relevance_scores(layer, latents)),
            ("variance", variance_shares(layer, latents)),
        ):
            for subset, share in shares.items():
                columns[column].setdefault(subset_name(subset, modalities), []).append(share)
    weights = torch.eye(whole[0].shape[-1])[output]  # (O,), or (N, C): each example's own contrast
    if task == "multiclass":
        weights = margin_weights(probabilities(torch.stack(whole), task).mean(0))
    for values in games:
        phi = shapley_values({known: (value * weights.double()).sum(-1) for known, value in values.items()})  # (N, M)
        for m, modality in enumerate(modalities):
            columns["shapley"].setdefault(modality, []).append(phi[:, m].abs().mean().item())
    scores = {}
    if split.target is not None:
        for row, outputs in (("full model", whole), ("its EMAP: additive in the modalities", additive)):
            scores[row] = _scores(outputs, split.target, task, output)
        for row, models in (others or {}).items():
            if len(split) <= MOST_PAIRED and len(models[0].modalities) == 2:
                both = [_by_definition(model, split) for model in models]
                scores[row] = _scores([full for full, _ in both], split.target, task, output)
                scores["its EMAP, " + row] = _scores([projected for _, projected in both], split.target, task, output)
    arrays = {key: {name: np.array(values) for name, values in column.items()} for key, column in columns.items()}
    return Summary(name, len(split), output_name, scores, **arrays, notes=list(notes), label=label)


def _by_definition(model: FusionModel, split: Split) -> tuple[Tensor, Tensor]:
    """Outputs and their EMAP (N, O) of a model with any head."""
    values = values_by_definition(lambda latents: model.rescale(model.fusion(latents)), model.latents(split.features))
    return values[(0, 1)].double(), emap(values).double()


def _scores(outputs: Sequence[Tensor], target: Tensor, task: Task, output: int) -> dict[str, Score]:
    """Scores of S members' outputs (N, O): of the choice between classes, else of one output."""
    stacked, names = torch.stack(list(outputs)), SHOWN[task]  # (S, N, O)
    if task != "multiclass":
        stacked = stacked[..., [output]]
        target = target.reshape(len(target), -1)[:, output]
        task = "binary" if task == "multilabel" else task
    if task == "binary" and len(target.unique()) < 2:
        names = ("accuracy",)  # no AUROC exists
    found = task_scores(probabilities(stacked, task).numpy(), target.numpy(), task, names)
    return {name: found[name] for name in names}


def summary_rows(summary: Summary) -> list[tuple[str, list[str], list[list[str]]]]:
    """The summary as tables (caption, head, rows) of text."""
    tables = []
    several = len(next(iter(summary.shapley.values()))) > 1
    what = "mean +- std over seeds [95 % bootstrap interval]" if several else "1 seed [95 % bootstrap interval]"
    if summary.scores:
        names = list(next(iter(summary.scores.values())))
        rows = [
            [label, *(mean_std(s.members, interval=(s.low, s.high)) for s in scores.values())]
            for label, scores in summary.scores.items()
        ]
        of = f" of {summary.label}" if summary.label else ""
        caption = (
            f"scores{of} on {summary.split}, n = {summary.examples}: {what}; "
            "EMAP (Hessel & Lee, 2020) is the model without its interactions"
        )
        tables.append((caption, ["", *names], rows))
    total = sum(summary.shapley.values())
    rows = [[name, mean_std(x), f"{(x / total).mean():.0%}"] for name, x in summary.shapley.items()]
    caption = f"Shapley values of the {summary.output} on {summary.split}: mean over examples of their absolute value"
    tables.append((caption, ["modality", "mean |value|", "share"], rows))
    rows = [[name, mean_std(summary.variance[name]), mean_std(x)] for name, x in summary.relevance.items()]
    together = "" if summary.output == "logit" else " (of all outputs together)"
    caption = (
        f"sets of modalities{together}: share of the prediction's variance, and relevance "
        "(norm of the weights, after InTense)"
    )
    tables.append((caption, ["set", "share of variance", "relevance"], rows))
    return tables


def print_summary(summary: Summary) -> None:
    """Notes, then the summary as fixed-width tables."""
    for note in summary.notes:
        print(f"note: {note}")
    for caption, head, rows in summary_rows(summary):
        widths = [max(len(cells[i]) for cells in (head, *rows)) for i in range(len(head))]
        print(f"\n{caption}")
        for cells in (head, *rows):
            print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
