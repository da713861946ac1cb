"""Table and figure."""

import numpy as np
from matplotlib.figure import Figure

from experiments.rank_robustness.members import NOISE, RHO, Measures
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import PRIMARY, WORDS
from mmfusion.training.grid import by_repeat


def columns_of(data: FoldedDataset, result: Measures) -> dict[str, dict[str, np.ndarray]]:
    """{setting: {column: (S * repeats,)}}."""
    word = WORDS[PRIMARY[data.task][0]]
    columns = {
        "clean": result.clean,
        "certified": result.certified,
        "attacked": result.attacked,
        "latent worst": result.latent,
        word: result.outcome,
        "leading noise": result.leading,
        "trailing noise": result.trailing,
        "test loss": result.loss,
        "log train loss": result.training,
        "gradient/margin": result.gradient,
        "|B|/margin": result.interaction,
        "|B|_2": result.norm,
    }
    return {label: {name: by_repeat(data, x[label]) for name, x in columns.items()} for label in result.clean}


def table(data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> str:
    """One line per setting: mean +- std over seeds and repeats."""
    names = list(next(iter(columns.values())))
    width = max(map(len, columns))
    scaled = "" if data.task == "regression" else " after temperature scaling"
    lines = [
        f"score: {data.score_name}; test loss: {data.loss_name}{scaled}; mean +- std over seeds and repeats; worst "
        f"cases at rho = {RHO:g}; {WORDS[PRIMARY[data.task][0]]} under noise of {NOISE:g} std, larger is better",
        f"{'':{width}}" + "".join(f"  {name:>16}" for name in names),
    ]
    for label, row in columns.items():
        lines.append(f"{label:{width}}" + "".join(f"  {mean_std(row[name]):>16}" for name in names))
    return "\n".join(lines)


def draw(
    figure: Figure, data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]], ranks: tuple[int, ...]
) -> None:
    """Over the rank: clean, attacked and certified scores; loss; gradient and interaction relative to the margin."""
    panels = {
        "clean (-), attacked (--), certified (:)": ("clean", "attacked", "certified"),
        "noise: none (-), leading (--), trailing (:)": (
            WORDS[PRIMARY[data.task][0]],
            "leading noise",
            "trailing noise",
        ),
        f"test {data.loss_name}": ("test loss",),
        "gradient / margin": ("gradient/margin",),
        "|B|_2 / margin, relative": ("|B|/margin",),
    }
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, style in zip(names, ("-", "--", ":"), strict=False):
            values = np.array([columns[f"jWAE, rank {rank}"][name] for rank in ranks])  # (ranks, S)
            mean, std = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0.0
            axis.plot(ranks, mean, style, marker="o", color="C0", markersize=3)
            axis.fill_between(ranks, mean - std, mean + std, color="C0", alpha=0.12, linewidth=0)
        others = [label for label in columns if not label.startswith("jWAE")]
        for k, label in enumerate(others):
            rank = int(label.split()[-1])
            axis.plot(rank, columns[label][names[-1]].mean(), f"C{k + 1}^", markersize=5, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("rank R")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(f"{data.name}: rank and worst cases (rho = {RHO:g}; line: jWAE; triangles: the last of each panel)")
