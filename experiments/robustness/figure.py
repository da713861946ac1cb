"""Figure of experiments.robustness: curves of every method, and the main method's worst case."""

import itertools
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from experiments.robustness.corruption_curves import CorruptionResult
from experiments.robustness.corruption_grid import ONE_OF_SEVERAL
from experiments.robustness.worst_cases import WorstCases
from mmfusion.robustness.worst_case import SIZES
from mmfusion.runs.load import TrainedRun

# rows have matplotlib's own colours C0 to C9, and these where there are more; a modality has one that none of them is
FURTHER_ROWS = ("black", "#8c6d31", "#ad494a", "#393b79", "#a55194")
MODALITIES = ("#00441b", "#b8860b", "#4b0055", "#555555")


def row_colors(rows: Iterable[str]) -> dict[str, str]:
    """A colour of its own for each of at most 15 rows; then they begin anew."""
    return dict(zip(rows, itertools.cycle([*(f"C{k}" for k in range(10)), *FURTHER_ROWS])))


def panels(result: CorruptionResult) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, curves to average) of at most five panels: inputs where they were measured, else latents."""
    keys = list(result.curves)
    several = [(g, c) for g, c in keys if c.endswith((", all", ", either", f", {ONE_OF_SEVERAL}"))] or keys
    chosen = [(c, [(g, c)]) for g, c in several if g in ("features", "missing")]
    modalities = sorted({c.split()[0] for g, c in keys if g == "input"})
    for name in modalities:
        mine = [(g, c) for g, c in keys if g == "input" and c.split()[0] == name]
        chosen.append((f"{name} corrupted (mean of {len(mine)} kinds)", mine))
    chosen += [(c, [(g, c)]) for g, c in several if g == "latents"]
    return chosen[:5]


def draw(figure: Figure, run: TrainedRun, result: CorruptionResult, worst: WorstCases) -> None:
    """Curves of every row over severity, and the worst case of the main row between certificate and attack."""
    chosen = panels(result)
    rows = 2 if len(chosen) > 2 else 1  # an empty second row would take half of the figure
    figure.set_figheight(figure.get_figheight() * (1 + rows) / 3)
    axes = figure.subplots(rows, 3).ravel()
    colors = row_colors(result.clean)
    for axis, (title, keys) in zip(axes, chosen, strict=False):
        for row, color in colors.items():
            curves = [result.curves[key][row] for key in keys if row in result.curves[key]]
            if not curves:
                continue
            values = np.mean([c.scores.mean(-1) for c in curves], 0)  # (E, S)
            mean, levels = values.mean(1), curves[0].levels
            wide = 2.4 if row == run.main_row else 1.2
            axis.plot(levels, mean, "o-", color=color, markersize=3, linewidth=wide, label=row)
            if values.shape[1] > 1:
                std = values.std(1, ddof=1)
                axis.fill_between(levels, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        missing = keys[0][0] == "missing"
        axis.set(title=title, xlabel="share of incomplete examples" if missing else "severity")
        axis.set_ylabel(run.data.score_name)
    last, keys = axes[len(chosen)], [key for key in worst.certified if key[0] == run.main_row and key[2] == "l2"]
    # as many as there are colours: those that an attack hurts most, in their own order
    hurt = sorted(keys, key=lambda key: worst.attacked[key].mean())[: len(MODALITIES)]
    shown = [key for key in keys if key in hurt]
    places = range(len(SIZES) + 1)  # the clean score of the members that were attacked comes first
    for key, color in zip(shown, MODALITIES, strict=False):
        clean = worst.clean[run.main_row][: worst.seeds].mean()
        low, high = ([clean, *of[key].mean(-1)] for of in (worst.certified, worst.attacked))
        last.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        last.plot(places, high, "o-", color=color, markersize=3, label=f"{key[1]}: attacked")
        last.plot(places, low, "s--", color=color, markersize=3, label=f"{key[1]}: certified")
    last.set_xticks(places, ["clean", *(f"{size:g}" for size in SIZES)])
    last.set(xlabel="size rho", ylabel=run.data.score_name)
    seeds = "1 seed" if worst.seeds == 1 else f"first {worst.seeds} seeds"
    left_out = f", the {len(shown)} hurt most" if len(shown) < len(keys) else ""
    last.set_title(f"worst change of one modality{left_out} (l2)\n{run.main_row}, {seeds}", fontsize=10)
    if shown:  # below: an attacked and a certified curve leave no corner free
        last.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5.0)
    for axis in axes[len(chosen) + 1 :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    figure.suptitle(f"{run.data.name}: what corruption, missing modalities and attacks cost (band: std over seeds)")
