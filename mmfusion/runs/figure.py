"""Figure of a run, report.png: losses, selection, rank factors, predictions, latents against the prior."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import chi2
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from mmfusion.dataset import Dataset, Split
from mmfusion.files import write_atomically
from mmfusion.metrics.classes import weighted_average_precision
from mmfusion.metrics.format import counted
from mmfusion.metrics.tasks import SELECTION
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.runs.prior import latents_of_split
from mmfusion.runs.report import RankReport
from mmfusion.runs.tokens import token_cloud
from mmfusion.training.trainer import Trained

BLUE, ORANGE, GREY = "#1f6fb4", "#d9741a", "#8a8a8a"
TERM_COLORS = (BLUE, GREY, ORANGE, "#5a9e4b", "#8b5fb0", "#b0a030", "#3fa7a0", "#b04a5a")


class Shown(NamedTuple):
    """The part of the data that a figure shows predictions of."""

    name: str
    split: Split
    predictions: np.ndarray
    """(S, N) or (S, N, O)"""


def draw(
    path: Path,
    dataset: Dataset,
    ensemble: FusionEnsemble | TokenEnsemble,
    trained: Trained,
    shown: Shown,
    ranks: RankReport | None,
    folds: int = 1,
    label: str = "jWAE-LMF",
) -> None:
    """Eight panels: losses, selection score, rank factors, two of the predictions, three of latents and the prior.

    A model of tokens has no panel of rank factors, and a transformer none of a prior.

    Two classes: ROC and reliability; more: confusion and reliability of the likeliest; labels: average precision and
    reliability of each; values: prediction against target, and the errors.

    `trained` holds the history of a stack whose first members are those of `ensemble`; without `ranks` (one modality)
    that panel stays empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of every command's start
    from matplotlib.figure import Figure

    has_prior = ensemble.shape["fusion"] != "wma"
    columns = 4 if has_prior or ranks is not None else 3  # the third holds ranks and prior
    figure = Figure(figsize=(5 * columns, 9.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns)
    members = len(ensemble.members)
    _draw_losses(axes[0, 0], trained, members)
    _draw_selection(axes[0, 1], trained, members, dataset)
    if ranks is not None:
        _draw_ranks(axes[0, 2], ranks, dataset.selection)
    elif has_prior:
        axes[0, 2].set_axis_off()
    selected = ", selected upon" if shown.name == dataset.selection else ""
    where = f"{shown.name}, n = {len(shown.split)}{selected}"
    if shown.split.target is not None:
        left, right = PANELS[dataset.task]
        left(axes[1, 0], dataset, shown, where)
        right(axes[1, 1], dataset, shown, where)
    selection = dataset.splits[dataset.selection]
    if isinstance(ensemble, TokenEnsemble):
        latents, what = token_cloud(ensemble.members[0], selection), "a token of each example"
        title = f"{label} on {dataset.name}"
    else:
        latents, what = _aggregate_latents(ensemble.members[0], selection), "latents"
        title = f"jWAE-LMF on {dataset.name}"
    first = f"{what} on {dataset.selection},\nfirst seed: two main axes"
    _draw_plane(axes[0, -1], latents, main_axes(latents), first, has_prior)
    _draw_plane(axes[1, -1], latents, random_plane(latents), "the same on a random plane", has_prior)
    if has_prior:
        _draw_norms(axes[1, 2], latents, f"squared norms on {dataset.selection}, first seed")
    of_folds = f", {folds} folds" if folds > 1 else ""
    rank = f", rank {ranks.weight.shape[1]}" if ranks else ""
    figure.suptitle(f"{title}: {counted(members // folds, 'seed')}{of_folds}{rank}", fontsize=14)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _legend_below(axis, columns: int) -> None:
    """The legend under the axis and its label: inside, some run's curve or point would lie beneath it."""
    pad = 3.6 + 1.4 * axis.get_xlabel().count("\n")  # in heights of a letter
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=pad, ncols=columns)


def _draw_losses(axis, trained: Trained, members: int) -> None:
    epochs = [record["epoch"] + 1 for record in trained.history]
    for term, color in zip(trained.history[0]["loss"], itertools.cycle(TERM_COLORS)):
        values = np.array([record["loss"][term][:members] for record in trained.history])  # (epochs, S)
        # an unbiased MMD^2 estimate may be below 0, so the axis is symmetric-logarithmic
        axis.plot(epochs, values.mean(1), color=color, label=term)
        axis.fill_between(epochs, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0)
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.locator_params(axis="x", integer=True)
    axis.set(title="training loss terms, unweighted (band: all seeds)", xlabel="epoch")
    _legend_below(axis, 4)


def _draw_selection(axis, trained: Trained, members: int, dataset: Dataset) -> None:
    scores = np.array([record["score"][:members] for record in trained.history])  # (epochs, S)
    epochs = np.arange(1, len(scores) + 1)
    for s in range(members):
        axis.plot(epochs, scores[:, s], color=BLUE, alpha=0.45, linewidth=1, label="one seed" if s == 0 else None)
        axis.plot(trained.best_epoch[s] + 1, trained.best_score[s], "o", color=ORANGE, label="kept" if s == 0 else None)
    if dataset.task == "binary":
        axis.axhline(0.5, color=GREY, linestyle=":", label="chance")
    axis.locator_params(axis="x", integer=True)
    score = SELECTION[dataset.task]
    axis.set(title=f"{score} on {dataset.selection} (the split selected upon)", xlabel="epoch", ylabel=score)
    _legend_below(axis, 3)


def _draw_ranks(axis, ranks: RankReport, selection: str) -> None:
    x = np.arange(ranks.weight.shape[1])
    series = [(ranks.share, BLUE, "share of the output's variance (raw ranks, sorted)")]
    if len(ranks.spectrum):
        relative = ranks.spectrum / np.maximum(ranks.spectrum.sum(1, keepdims=True), 1e-30)
        series.append((relative, ORANGE, "canonical spectrum / its sum (identified)"))
    spread = "mean and std over seeds" if len(ranks.weight) > 1 else "1 seed"
    for offset, (values, color, label) in zip((-0.2, 0.2) if len(series) > 1 else (0.0,), series, strict=True):
        error = values.std(0, ddof=1) if len(values) > 1 else None
        axis.bar(x + offset, values.mean(0), 0.38, yerr=error, color=color, label=label, capsize=3)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(x, [str(r + 1) for r in x])
    axis.set(title=f"rank factors on {selection} ({spread})", xlabel="rank")
    _legend_below(axis, 1)


def _draw_roc(axis, dataset: Dataset, shown: Shown, where: str) -> None:
    if len(shown.split.target.unique()) > 1:
        for s, probabilities in enumerate(shown.predictions):
            false_positive, true_positive, _ = roc_curve(shown.split.target.numpy(), probabilities)
            axis.plot(false_positive, true_positive, color=BLUE, alpha=0.5, label="one seed" if s == 0 else None)
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    axis.set(title=f"ROC on {where}", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    _legend_below(axis, 2)


def _draw_reliability(axis, dataset: Dataset, shown: Shown, where: str) -> None:
    """Share of what came true against the probability that was given to it, in ten bins of equal mass."""
    target = shown.split.target.numpy()
    for s, p in enumerate(shown.predictions):
        if dataset.task == "multiclass":
            p, came_true = p.max(-1), p.argmax(-1) == target
        else:
            p, came_true = p.reshape(-1), target.reshape(-1)
        observed, mean_predicted = calibration_curve(came_true, p, n_bins=10, strategy="quantile")
        label = "one seed" if s == 0 else None
        axis.plot(mean_predicted, observed, "o-", color=BLUE, alpha=0.5, markersize=4, label=label)
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    of = {"multiclass": " of the likeliest class", "multilabel": ", labels together"}.get(dataset.task, "")
    line_end = "\n" if of else " "
    came_true = {"multiclass": "share right"}.get(dataset.task, "share positive")
    axis.set(title=f"reliability on {where}", ylabel=came_true)
    axis.set(xlabel=f"predicted probability{of}{line_end}(10 equal-mass bins)")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _legend_below(axis, 2)


def _draw_confusion(axis, dataset: Dataset, shown: Shown, where: str) -> None:
    """Where each class goes, by the mean over seeds of the probabilities; rows sum to 1."""
    target, count = shown.split.target.numpy().astype(int), len(dataset.class_names)
    table = np.zeros((count, count))
    np.add.at(table, (target, shown.predictions.mean(0).argmax(-1)), 1)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if count <= 12:
        for row, column in itertools.product(range(count), range(count)):
            if table[row, column]:
                color = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
        names = [name[:12] for name in dataset.class_names]
        axis.set_xticks(range(count), names, rotation=45 if max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(count), names)
    axis.set(title=f"classes on {where}\n(mean of the seeds; counts, shade: share of the row)")
    axis.set(xlabel="predicted", ylabel="true")


def _draw_average_precision(axis, dataset: Dataset, shown: Shown, where: str) -> None:
    """Average precision of every label and seed, and what chance gives: the label's share."""
    target = shown.split.target.numpy()
    names = dataset.target_names or [str(o) for o in range(target.shape[1])]
    ones = np.ones((1, len(target)))
    for o in range(target.shape[1]):
        values = [weighted_average_precision(p[:, o], target[:, o], ones)[0] for p in shown.predictions]
        axis.plot(values, [o] * len(values), "o", color=BLUE, alpha=0.5, label="one seed" if o == 0 else None)
        axis.plot(target[:, o].mean(), o, "|", color=GREY, markersize=14, label="chance" if o == 0 else None)
    axis.set_yticks(range(len(names)), [name[:16] for name in names])
    axis.set(title=f"average precision on {where}", xlabel="average precision", xlim=(-0.02, 1.02))
    _legend_below(axis, 2)


def _standardised_values(shown: Shown) -> tuple[np.ndarray, np.ndarray]:
    """Targets (N, O) and the seeds' mean prediction (N, O), in standard deviations of the target where O > 1."""
    target = shown.split.target.numpy().reshape(len(shown.split), -1)
    values = shown.predictions.mean(0).reshape(target.shape)
    if target.shape[1] == 1:
        return target, values
    mean, std = target.mean(0), np.maximum(target.std(0), 1e-12)
    return (target - mean) / std, (values - mean) / std


def _draw_values(axis, dataset: Dataset, shown: Shown, where: str) -> None:
    target, values = _standardised_values(shown)
    unit = "" if target.shape[1] == 1 else f" ({target.shape[1]} targets, standardised)"
    axis.plot(target, values, "o", color=BLUE, alpha=0.35, markersize=3)
    ends = [min(target.min(), values.min()), max(target.max(), values.max())]
    axis.plot(ends, ends, color=GREY, linestyle=":", label="exact")
    axis.set(title=f"predictions on {where}", xlabel=f"target{unit}", ylabel="mean prediction of the seeds")
    _legend_below(axis, 1)


def _draw_errors(axis, dataset: Dataset, shown: Shown, where: str) -> None:
    target, values = _standardised_values(shown)
    axis.hist((values - target).ravel(), bins=40, color=BLUE, alpha=0.7, label="prediction - target")
    axis.axvline(0, color=GREY, linestyle=":")
    unit = "" if target.shape[1] == 1 else f" ({target.shape[1]} targets, standardised)"
    axis.set(title=f"errors on {where}", xlabel=f"prediction - target{unit}", ylabel="examples")
    _legend_below(axis, 1)


PANELS = {
    "binary": (_draw_roc, _draw_reliability),
    "multiclass": (_draw_confusion, _draw_reliability),
    "multilabel": (_draw_average_precision, _draw_reliability),
    "regression": (_draw_values, _draw_errors),
}
"""the two panels of the predictions, by task"""


def _aggregate_latents(member: FusionModel, split: Split) -> dict[str, np.ndarray]:
    """(N, L) per modality: the mean latent and one draw of its noise for every example."""
    found = {}
    for name, (z, variances) in latents_of_split(member, split).items():
        noise = np.random.default_rng(0).standard_normal(z.shape)
        found[name] = z if variances is None else z + np.sqrt(variances) * noise
    return found


def main_axes(latents: Mapping[str, np.ndarray]) -> np.ndarray:
    """(2, L) the directions along which the pooled latents lie farthest from the origin, the prior's mean."""
    return np.linalg.svd(np.concatenate(list(latents.values())), full_matrices=False)[2][:2]


def random_plane(latents: Mapping[str, np.ndarray]) -> np.ndarray:
    """(2, L) orthonormal, the same for every run of that width; (1, 1) of a single coordinate."""
    width = next(iter(latents.values())).shape[1]
    return np.linalg.qr(np.random.default_rng(width).standard_normal((width, min(2, width))))[0].T


def _draw_plane(axis, latents: Mapping[str, np.ndarray], plane: np.ndarray, title: str, circles: bool = True) -> None:
    """All modalities on two directions, with the circles that the prior fills."""
    for (name, z), color in zip(latents.items(), itertools.cycle((BLUE, ORANGE, *TERM_COLORS[3:]))):
        x, y = (z @ plane.T).T if len(plane) > 1 else (z[:, 0], np.zeros(len(z)))  # one axis is all there is
        axis.scatter(x, y, s=9, color=color, alpha=0.5, linewidths=0, label=name)
    angle = np.linspace(0, 2 * np.pi, 200)
    for share in (0.5, 0.95) if circles else ():
        radius = np.sqrt(-2 * np.log(1 - share))  # of a 2-D standard normal
        style = "--" if share > 0.5 else "-"
        circle = radius * np.cos(angle), radius * np.sin(angle)
        axis.plot(*circle, color="black", linestyle=style, linewidth=0.8, label=f"N(0, I) holds {share:.0%}")
    axis.set(title=title, aspect="equal", xlabel="first axis", ylabel="second axis")
    _legend_below(axis, 2 if len(latents) < 3 else 3)


def _draw_norms(axis, latents: Mapping[str, np.ndarray], title: str) -> None:
    """Sorted squared norms against the quantiles of chi-square with L degrees of freedom, which are the prior's."""
    highest = 0.0
    for (name, z), color in zip(latents.items(), itertools.cycle((BLUE, ORANGE, *TERM_COLORS[3:]))):
        expected = chi2.ppf((np.arange(len(z)) + 0.5) / len(z), z.shape[1])
        axis.plot(expected, np.sort(np.square(z).sum(1)), ".", color=color, alpha=0.6, markersize=4, label=name)
        highest = max(highest, expected[-1])
    axis.plot([0, highest], [0, highest], color="black", linestyle=":", linewidth=0.8, label="N(0, I)")
    axis.set(title=title, xlabel="quantiles of chi-square", ylabel="|z|^2")
    _legend_below(axis, 3)
