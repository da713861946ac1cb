"""One figure of all verdicts: claims x data sets, each contrast that decides in units of its effect of interest."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLORS = {"supported": "#2b7a3d", "not supported": "#b5362f", "cannot tell": "#8a8a8a", "not identified": "#c9a227"}
REACH = 6.0  # effects of interest to either side; what lies beyond is cut, and marked
ROW = 0.21  # inches


def draw_forest(figure: Figure, rows: Sequence[Mapping[str, str]]) -> None:
    """Rows of contrasts.csv: for each run the deciding contrasts, a thin line each, its verdict as colour."""
    runs: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        if row["decides"] == "1":
            runs.setdefault((row["experiment"], row["dataset"]), []).append(row)
    experiments = list(dict.fromkeys(experiment for experiment, _ in runs))
    columns = 3
    lines = -(-len(experiments) // columns)
    tallest = max((sum(own == experiment for own, _ in runs) for experiment in experiments), default=1)
    figure.set_size_inches(5.2 * columns, lines * (ROW * 2 * tallest + 0.9))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axis, experiment in zip(axes, experiments, strict=False):
        own = {dataset: found for (name, dataset), found in runs.items() if name == experiment}
        _draw_claim(axis, own)
        axis.set_title(experiment, fontsize=10, loc="left")
    for axis in axes[len(experiments) :]:
        axis.set_axis_off()
    marks = [Line2D([], [], color=color, marker="o", label=verdict) for verdict, color in COLORS.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.suptitle(
        "Every contrast that decides: estimate and 95 % interval in smallest effects of interest (dashed: 1), positive "
        "as claimed; colour: the claim's verdict",
        fontsize=10,
    )


def _draw_claim(axis: object, runs: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    for place, own in enumerate(runs.values()):
        color = COLORS[own[0]["verdict"]]
        offsets = np.linspace(-0.32, 0.32, len(own)) if len(own) > 1 else [0.0]
        for offset, row in zip(offsets, own, strict=True):
            effect = float(row["effect"])
            low, value, high = (float(row[name]) / effect for name in ("low", "estimate", "high"))
            y = place + offset
            axis.plot(np.clip([low, high], -REACH, REACH), [y, y], color=color, linewidth=1)
            marker = "<" if value < -REACH else ">" if value > REACH else "o"
            axis.plot(np.clip(value, -REACH, REACH), y, marker, color=color, markersize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(1, color="black", linewidth=0.6, linestyle="--")
    axis.set_yticks(range(len(runs)), list(runs), fontsize=8)
    axis.set_ylim(len(runs) - 0.4, -0.6)
    axis.set_xlim(-REACH * 1.05, REACH * 1.05)
