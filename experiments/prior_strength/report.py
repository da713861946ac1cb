"""Table and figure of `experiments.prior_strength`."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.prior_strength.damage import DAMAGES, RHO
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std

Columns = dict[str, dict[str, np.ndarray]]
ENSEMBLE = "ensemble "


class Block(NamedTuple):
    """Columns of the table that stand side by side."""

    title: str
    names: tuple[str, ...]


BLOCKS = (
    Block(
        "whole examples; latents on test, whitened: mean 0 and covariance I on train, in which the model says the same",
        (
            "test score", "test loss", "eigenvalue", "eigenvalue whitened", "in the ball whitened",
            "dimension of means", "share no noise", "enforced",
        ),
    ),
    Block(
        "one modality damaged, mean over modalities: latent missing, or noise in standard deviations of each feature",
        tuple(f"{damage} {what}" for what in ("score", "loss") for damage in DAMAGES),
    ),
    Block(
        f"score under the worst l_2 change of one modality of {RHO:g} standard deviations, mean over modalities: of "
        "the whitened latent, exact (deviations of the means, or with the noise); of features, between two bounds",
        ("latent, means", "latent, total", "certified", "attacked"),
    ),
    Block(
        "single members: ECE; AURC in a random order, by confidence, by the latents' distance from the mean of "
        "training, by Var[y]",
        ("ECE", "AURC random", "AURC confidence", "AURC distance", "AURC Var[y]"),
    ),
    Block(
        "ensemble of all seeds, one number: ECE; AURC in a random order, by confidence, by the members' disagreement, "
        "by their mean Var[y]",
        tuple(ENSEMBLE + x for x in ("ECE", "AURC random", "AURC confidence", "AURC disagreement", "AURC Var[y]")),
    ),
)  # fmt: skip


def table(data: FoldedDataset, columns: Columns) -> str:
    """A block for each question, in it one line per kind and weight, mean +- std over seeds; "-": there is none."""
    width = max(map(len, columns))
    lines = [f"score: {data.score_name}; loss: {data.loss_name}; mean +- std over seeds"]
    for title, names in BLOCKS:
        lines += ["", title, f"{'':{width}}" + "".join(f"  {name.removeprefix(ENSEMBLE):>20}" for name in names)]
        for label, cells in columns.items():
            texts = [mean_std(cells[name]) if name in cells else "-" for name in names]
            lines.append(f"{label:{width}}" + "".join(f"  {text:>20}" for text in texts))
    return "\n".join(lines)


# ---- figure ------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """Columns over the weight."""

    title: str
    lines: dict[str, str]
    """{name in the legend: column}; a style of line for each"""
    scale: Literal["linear", "log", "share"] = "linear"
    """share: from 0 to 1"""


STYLES = ("-", "--", ":", "-.")


def panels(data: FoldedDataset, columns: Columns) -> list[Panel]:
    """Those of which there is something, lines that nothing is known of left out."""
    score, loss = data.score_name, data.loss_name
    every = [
        Panel(f"test {score}", {"": "test score"}),
        Panel(f"test {loss}", {"": "test loss"}),
        Panel(f"{score},\none modality damaged", {name: f"{name} score" for name in DAMAGES}),
        Panel(f"{loss},\none modality damaged", {name: f"{name} loss" for name in DAMAGES}),
        Panel("calibration error (ECE)", {"members": "ECE", "ensemble": "ensemble ECE"}),
        Panel("AURC of members", {name: f"AURC {name}" for name in ("Var[y]", "confidence", "distance", "random")}),
        Panel(
            "AURC of the ensemble",
            {name: f"ensemble AURC {name}" for name in ("Var[y]", "confidence", "disagreement", "random")},
        ),
        Panel(
            f"{score}, worst change of {RHO:g} std\nof a latent (means, total) or of features",
            {"means": "latent, means", "total": "latent, total", "attacked": "attacked", "certified": "certified"},
        ),
        Panel("largest eigenvalue, as trained", {"": "eigenvalue"}, "log"),
        Panel("largest eigenvalue, whitened", {"": "eigenvalue whitened"}),
        Panel("share of the latents' variance\nthat is no noise", {"": "share no noise"}, "share"),
        Panel("share of seeds, folds, modalities\nin which the prior holds (whitened)", {"": "enforced"}, "share"),
    ]
    there = {name for cells in columns.values() for name in cells}
    kept = [panel._replace(lines={k: name for k, name in panel.lines.items() if name in there}) for panel in every]
    return [panel for panel in kept if panel.lines]


def draw(figure: Figure, data: FoldedDataset, columns: Columns, kinds: Sequence[str], weights: Sequence[float]) -> None:
    """Panels over the weight: a colour for each kind, a style for each column; band: standard deviation over seeds."""
    axes = list(figure.subplots(3, 4).flat)
    shown = panels(data, columns)
    for axis in axes[len(shown) :]:
        axis.remove()
    colours = {kind: f"C{k}" for k, kind in enumerate(kinds)}
    places = range(len(weights))
    for axis, panel in zip(axes, shown, strict=False):
        for style, name in zip(STYLES, panel.lines.values(), strict=False):
            for kind, colour in colours.items():
                cells = [columns[f"{kind}, {weight:g}"].get(name) for weight in weights]
                if any(cell is None for cell in cells):
                    continue
                values = np.array(cells)  # (weights, S), of an ensemble (weights, 1)
                mean = values.mean(1)
                axis.plot(places, mean, style, color=colour, marker="o", markersize=3)
                if values.shape[1] > 1:
                    std = values.std(1, ddof=1)
                    axis.fill_between(places, mean - std, mean + std, color=colour, alpha=0.12, lw=0)
        if len(panel.lines) > 1:
            handles = [Line2D([], [], color="0.3", linestyle=style) for style in STYLES[: len(panel.lines)]]
            place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.98), "ncols": len(handles)}  # hides no line
            space = {"handlelength": 2.2, "columnspacing": 1.0, "handletextpad": 0.5}
            axis.legend(handles, list(panel.lines), frameon=False, fontsize=8, **place, **space)
        axis.set_xticks(places, [f"{weight:g}" for weight in weights])
        axis.set_xlabel("weight of the MMD")
        axis.set_title(panel.title, fontsize=11, pad=20 if len(panel.lines) > 1 else 6)  # above the legend
        if panel.scale == "log":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        elif panel.scale == "share":
            axis.set_ylim(-0.05, 1.05)
    handles = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in colours.values()]
    figure.legend(handles, [f"{kind} latents" for kind in kinds], loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{data.name}: strength of the prior (mean and standard deviation over seeds)")
