"""Report of a run: printed tables, rank factors, and report.png."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from torch import Tensor

from mmfusion.dataset import Dataset
from mmfusion.files import write_atomically
from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.scores import BINARY_SCORES, Score
from mmfusion.models.decomposition import recentred_parts, variance_share
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.training.trainer import Trained


@dataclass(frozen=True)
class RankReport:
    """How the logits of S members come about on N examples; ranks in descending order of `share` in each member."""

    weight: np.ndarray
    """(S, R) rank weights w_r; their scale alone is not identified"""
    strength: np.ndarray
    """(S, R) |w_r| prod_m ||[A_m[r], c_m[r]]||, which no rescaling of the factors changes"""
    share: np.ndarray
    """(S, R) cov(term_r, logit) / var(logit): the ranks of a member sum to 1; negative where a term works against"""
    spectrum: np.ndarray
    """(S, R) canonical interaction spectrum, descending: std of each canonical component in logits"""
    part_share: dict[str, np.ndarray]
    """(S,) per subset of modalities: cov(part, logit) / var(logit); sums to 1 over the subsets"""
    bias: np.ndarray
    """(S,) the constant part, in logits: what the model says at the mean latents"""


@torch.inference_mode()
def rank_report(ensemble: FusionEnsemble, features: Mapping[str, Tensor]) -> RankReport:
    """Account for the logits of an ensemble of two-modality LMF members on features (N, d_m)."""
    columns: dict[str, list] = {"weight": [], "strength": [], "share": [], "spectrum": [], "bias": []}
    parts: dict[str, list[float]] = {}
    for member in ensemble.members:
        latents = [z.double() for z in member.latents(features)]  # (N, L) each
        layer = deepcopy(member.fusion).double()
        logit = layer(latents).squeeze(-1)  # (N,)
        terms = layer.rank_terms(latents).squeeze(-1)  # (N, R)
        share = np.array([variance_share(terms[:, r], logit) for r in range(layer.rank)])
        order = np.argsort(-share)
        columns["weight"].append((layer.rank_weights * layer.rank_mask).numpy()[order])
        columns["strength"].append(layer.rank_strength().squeeze(-1).numpy()[order])
        columns["share"].append(share[order])
        columns["spectrum"].append(layer.canonical_factors([z.T.cov() for z in latents]).spectrum.squeeze(0).numpy())
        for subset, part in recentred_parts(layer, latents).items():
            part = part.squeeze(-1)  # (N, 1) -> (N,)
            if subset:
                name = " x ".join(member.modalities[m] for m in subset)
                parts.setdefault(name, []).append(variance_share(part, logit))
            else:
                columns["bias"].append(part.mean().item())
    return RankReport(
        **{k: np.array(v) for k, v in columns.items()}, part_share={k: np.array(v) for k, v in parts.items()}
    )


# ---- printed tables ----------------------------------------------------------------------------------------------


def print_dataset(dataset: Dataset, folder: Path, device: torch.device) -> None:
    """What is trained on, and whatever the reader of the scores must know."""
    for name, split in dataset.splits.items():
        positive = "unlabelled" if split.target is None else f"{split.target.mean():.0%} positive"
        if split.target is not None and len(split.target.unique()) < 2:
            positive += " (one class: not scored)"
        print(f"{name:12} {len(split):6} memes  {positive}")
    widths = ", ".join(f"{name} {width}" for name, width in dataset.input_dims.items())
    print(f"features: {widths}; training on {device}; run in {folder}/")
    for note in dataset.notes:
        print(f"note: {note}")


def print_scores(scores: Mapping[str, Mapping[str, Mapping[str, Score]]], dataset: Dataset) -> None:
    """Scores {row: {split: {score: Score}}} as a fixed-width table."""
    some = next(iter(next(iter(scores.values())).values()))["auroc"]
    of = f"mean +- std over {counted(len(some.members), 'seed')}" if len(some.members) > 1 else "1 seed"
    print(f"\n{of} [95 % bootstrap interval over examples{', of the mean' if len(some.members) > 1 else ''}]")
    width = max(map(len, scores))
    for name in next(iter(scores.values())):
        n = len(dataset.splits[name])
        shared = len(set(dataset.splits[name].ids) & set(dataset.splits[dataset.selection].ids))
        mark = f"  ({shared} of them also in {dataset.selection}, which is selected upon)" if shared else ""
        mark = "  (selected upon: optimistic)" if name == dataset.selection else mark
        print(f"\n{name}, n = {n}{mark}")
        print(f"{'':{width}}" + "".join(f"  {score:^26}" for score in BINARY_SCORES))
        for label, by_split in scores.items():
            columns = (by_split[name][score] for score in BINARY_SCORES)
            cells = "".join(f"  {mean_std(x.members, interval=(x.low, x.high)):26}" for x in columns)
            print(f"{label:{width}}{cells}".rstrip())


def print_ranks(ranks: RankReport, split: str) -> None:
    """The rank factors and the split of the logit's variance, as mean +- std over the members."""
    print(f"\nrank factors on {split} (mean +- std over seeds; in each seed, ranks sorted by their share)")
    print("rank        weight |w|          strength   share of variance   canonical spectrum")
    columns = (np.abs(ranks.weight), ranks.strength, ranks.share, ranks.spectrum)
    for r in range(ranks.weight.shape[1]):
        print(f"{r + 1:4}  " + "  ".join(f"{mean_std(column[:, r]):>16}" for column in columns))
    print("\nwhere the logit's variance comes from (exact: the parts of each prediction sum to its logit)")
    for name, share in ranks.part_share.items():
        kind = "alone" if " x " not in name else "together"
        print(f"{name + ' ' + kind:24} {mean_std(share)}")
    print(f"{'bias (logit, no variance)':24} {mean_std(ranks.bias)}")


# ---- report.png --------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#1f6fb4", "#d9741a", "#8a8a8a"


def draw(
    path: Path,
    dataset: Dataset,
    ensemble: FusionEnsemble,
    trained: Trained,
    probabilities: Mapping[str, Tensor],
    ranks: RankReport,
) -> None:
    """Six panels: losses, dev AUROC, rank factors, ROC, reliability, latents against the prior.

    `trained` holds the history of a stack whose first members are those of `ensemble`; `probabilities` is
    {split: (S, N)}.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of every command's start
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    members = len(ensemble.members)
    _draw_losses(axes[0, 0], trained, members)
    _draw_selection(axes[0, 1], trained, members, dataset.selection)
    _draw_ranks(axes[0, 2], ranks, dataset.selection)
    held_out = [n for n, s in dataset.splits.items() if s.target is not None and n not in ("train", dataset.selection)]
    held_out = [n for n in held_out if len(dataset.splits[n].target.unique()) > 1]
    # dev_unseen shares most of its memes with dev_seen, which is selected on: a test split first
    shown = min(held_out, key=lambda n: not n.startswith("test"), default=dataset.selection)
    target, p = dataset.splits[shown].target.numpy(), probabilities[shown].numpy()
    selected = ", selected upon" if shown == dataset.selection else ""
    _draw_roc(axes[1, 0], target, p, f"{shown}, n = {len(target)}{selected}")
    _draw_reliability(axes[1, 1], target, p, f"{shown}, n = {len(target)}{selected}")
    _draw_latents(axes[1, 2], ensemble.members[0], dataset.splits[dataset.selection].features, dataset.selection)
    figure.suptitle(
        f"jWAE-LMF on {dataset.name}: {counted(members, 'seed')}, rank {ranks.weight.shape[1]}", fontsize=14
    )
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _legend_below(axis, columns: int) -> None:
    """The legend under the axis: inside, some run's curve or point would lie beneath it."""
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=3.6, ncols=columns)


def _draw_losses(axis, trained: Trained, members: int) -> None:
    epochs = [record["epoch"] + 1 for record in trained.history]
    for term, color in zip(("bce", "reconstruction", "mmd", "alignment"), (BLUE, ORANGE, GREY, "#5a9e4b"), strict=True):
        values = np.array([record["loss"][term][:members] for record in trained.history])  # (epochs, S)
        # an unbiased MMD^2 estimate may be below 0, so the axis is symmetric-logarithmic
        axis.plot(epochs, values.mean(1), color=color, label=term)
        axis.fill_between(epochs, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0)
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.locator_params(axis="x", integer=True)
    axis.set(title="training loss terms, unweighted (band: all seeds)", xlabel="epoch")
    _legend_below(axis, 4)


def _draw_selection(axis, trained: Trained, members: int, selection: str) -> None:
    scores = np.array([record["score"][:members] for record in trained.history])  # (epochs, S)
    epochs = np.arange(1, len(scores) + 1)
    for s in range(members):
        axis.plot(epochs, scores[:, s], color=BLUE, alpha=0.45, linewidth=1, label="one seed" if s == 0 else None)
        axis.plot(trained.best_epoch[s] + 1, trained.best_score[s], "o", color=ORANGE, label="kept" if s == 0 else None)
    axis.axhline(0.5, color=GREY, linestyle=":", label="chance")
    axis.locator_params(axis="x", integer=True)
    axis.set(title=f"AUROC on {selection} (the split selected upon)", xlabel="epoch", ylabel="AUROC")
    _legend_below(axis, 3)


def _draw_ranks(axis, ranks: RankReport, selection: str) -> None:
    x = np.arange(ranks.weight.shape[1])
    spread = "mean and std over seeds" if len(ranks.weight) > 1 else "1 seed"
    spectrum = ranks.spectrum / np.maximum(ranks.spectrum.sum(1, keepdims=True), 1e-30)
    for offset, values, color, label in (
        (-0.2, ranks.share, BLUE, "share of the logit's variance (raw ranks, sorted)"),
        (0.2, spectrum, ORANGE, "canonical spectrum / its sum (identified)"),
    ):
        error = values.std(0, ddof=1) if len(values) > 1 else None
        axis.bar(x + offset, values.mean(0), 0.38, yerr=error, color=color, label=label, capsize=3)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(x, [str(r + 1) for r in x])
    axis.set(title=f"rank factors on {selection} ({spread})", xlabel="rank")
    _legend_below(axis, 1)


def _draw_roc(axis, target: np.ndarray, p: np.ndarray, where: str) -> None:
    for s, probabilities in enumerate(p):
        false_positive, true_positive, _ = roc_curve(target, probabilities)
        axis.plot(false_positive, true_positive, color=BLUE, alpha=0.5, label="one seed" if s == 0 else None)
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    axis.set(title=f"ROC on {where}", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    _legend_below(axis, 2)


def _draw_reliability(axis, target: np.ndarray, p: np.ndarray, where: str) -> None:
    for s, probabilities in enumerate(p):
        observed, mean_predicted = calibration_curve(target, probabilities, n_bins=10, strategy="quantile")
        axis.plot(
            mean_predicted, observed, "o-", color=BLUE, alpha=0.5, markersize=4, label="one seed" if s == 0 else None
        )
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    axis.set(
        title=f"reliability on {where}", xlabel="predicted probability (10 equal-mass bins)", ylabel="share positive"
    )
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _legend_below(axis, 2)


@torch.inference_mode()
def _draw_latents(axis, member: FusionModel, features: Mapping[str, Tensor], split: str) -> None:
    """Both modalities on the two axes along which the pooled latents vary most, with the prior's circles."""
    latents = {name: z.numpy() for name, z in member.encode(features).items()}  # (N, L)
    pooled = np.concatenate(list(latents.values()))
    # not centred: the prior's mean is the origin, and a shift of the latents must stay visible
    _, _, axes = np.linalg.svd(pooled, full_matrices=False)
    for (name, z), color in zip(latents.items(), (BLUE, ORANGE), strict=False):
        x, y = (z @ axes[:2].T).T if z.shape[1] > 1 else (z[:, 0], np.zeros(len(z)))  # one axis is all there is
        axis.scatter(x, y, s=9, color=color, alpha=0.5, linewidths=0, label=name)
    angle = np.linspace(0, 2 * np.pi, 200)
    for share in (0.5, 0.95):
        radius = np.sqrt(-2 * np.log(1 - share))  # of a 2-D standard normal
        style = "--" if share > 0.5 else "-"
        circle = radius * np.cos(angle), radius * np.sin(angle)
        axis.plot(*circle, color="black", linestyle=style, linewidth=0.8, label=f"N(0, I) holds {share:.0%}")
    axis.set(title=f"latents on {split}, first seed: two main axes, prior", aspect="equal")
    axis.set(xlabel="first axis", ylabel="second axis")
    _legend_below(axis, 2)
