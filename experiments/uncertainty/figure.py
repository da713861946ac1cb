"""Figure of experiments.uncertainty."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm

from experiments.uncertainty.predictors import ENSEMBLE, MEMBER, RAW, SCALED, ClassPredictor
from experiments.uncertainty.report import UncertaintyResult
from mmfusion.dataset import Task
from mmfusion.metrics import calibration


def colors_of(result: UncertaintyResult) -> dict[str, str]:
    """The main row's colour and the prior-free row's."""
    return dict(zip(result.rows, ("C0", "C1"), strict=False))


def draw(figure: Figure, result: UncertaintyResult) -> None:
    """Calibration, risk against coverage, NLL against the level of corruption, detection of corruption."""
    (upper_left, upper_right), (lower_left, lower_right) = figure.subplots(2, 2)
    (draw_central_intervals if result.targets.task == "regression" else draw_reliability)(upper_left, result)
    draw_risk(upper_right, result)
    draw_levels(lower_left, result)
    draw_detection(lower_right, result)


def legend_below(axis: Axes, columns: int) -> None:
    """The legend under the axis: a row's name is long, and inside it would lie on the curves."""
    axis.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.8, ncols=columns
    )


EVENTS: dict[Task, tuple[str, str]] = {
    "binary": ("mean probability of the positive class", "share of positives"),
    "multiclass": ("mean probability of the likeliest class", "share where it is the right one"),
    "multilabel": ("mean probability of a label, all in one pool", "share of labels that are there"),
}
"""axes of a reliability diagram"""


def bins_for(examples: int) -> int:
    """3 to 15 bins, of 20 test examples at least where there are so many: a bin of a handful says nothing."""
    return min(calibration.BINS, max(3, examples // 20))


def draw_reliability(axis: Axes, result: UncertaintyResult) -> None:
    """Share that comes true against probability, bins of equal mass; the members' examples in one pool."""
    row, outputs = result.rows[result.main], result.outputs[result.main]

    def pooled(predictors: Sequence[tuple[ClassPredictor, np.ndarray]], scaling: str) -> tuple[np.ndarray, np.ndarray]:
        events = [event for predictor, x in predictors for event in predictor.events(predictor.logits(x, scaling))]
        p, true = zip(*events, strict=True)
        return np.concatenate(p), np.concatenate(true)

    alone, together = [(m, outputs[[s]]) for s, m in enumerate(row.members)], [(row.ensemble, outputs)]
    bins = bins_for(len(result.targets.test))
    band = consistency_band(pooled(together, RAW)[0], bins)
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axis.fill_between(*band, color="0.9", label="ensemble, raw: 95 % if right")
    lowest = min(x.min() for x in band)
    for who, predictors, color in ((MEMBER, alone, "C7"), (ENSEMBLE, together, "C0")):
        for scaling, style in ((RAW, "o-"), (SCALED, "s--")):
            curve = calibration.reliability(*pooled(predictors, scaling), bins, kind="mass")
            lowest = min(lowest, curve.predicted.min(), curve.observed.min())
            axis.plot(
                curve.predicted,
                curve.observed,
                style,
                color=color,
                markersize=4,
                linewidth=1.2,
                label=f"{who}, {scaling}",
            )
    # the likeliest of several classes is never unlikely: what lies below would be empty
    low = np.floor(10 * lowest) / 10 if result.targets.task == "multiclass" else 0.0
    predicted, observed = EVENTS[result.targets.task]
    axis.set(
        title=f"reliability of {result.main}, clean ({bins} bins of equal mass)",
        xlabel=predicted,
        ylabel=observed,
        xlim=(low, 1),
        ylim=(low, 1),
    )
    legend_below(axis, 3)


def consistency_band(
    p: np.ndarray, bins: int = calibration.BINS, draws: int = 500, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability of each bin of equal mass, and 95 % limits of its share of positives where p is right."""
    rng = np.random.default_rng(seed)
    drawn = [calibration.reliability(p, rng.random(p.size) < p, bins, kind="mass") for _ in range(draws)]
    low, high = np.quantile([curve.observed for curve in drawn], [0.025, 0.975], axis=0)
    return drawn[0].predicted, low, high


def draw_central_intervals(axis: Axes, result: UncertaintyResult) -> None:
    """How many more targets than promised lie inside the central interval of each level, all outputs in one pool."""
    levels, surplus = np.linspace(0.02, 0.98, 49), []
    axis.axhline(0, color="black", linewidth=0.8)
    for name, row in result.rows.items():
        outputs, target = result.outputs[name], result.targets.test
        by_member = [(m, outputs[[s]]) for s, m in enumerate(row.members)]
        for who, predictors, style in ((MEMBER, by_member, "--"), (ENSEMBLE, [(row.ensemble, outputs)], "-")):
            z = []
            for predictor, x in predictors:
                mean, variance = predictor.moments(x)
                z.append(np.abs(target - mean) / np.sqrt(variance))
            inside = [np.mean(np.stack(z) <= norm.ppf((1 + level) / 2)) for level in levels]
            surplus += [inside - levels]
            axis.plot(levels, surplus[-1], style, color=colors_of(result)[name], label=f"{who}, {name}")
    highest = max(0.02, np.abs(surplus).max())
    axis.set(
        title="central Gaussian intervals, clean",
        xlabel="level of the interval",
        ylabel="share of targets inside - level",
        xlim=(0, 1),
        ylim=(-1.2 * highest, 1.2 * highest),
    )
    legend_below(axis, 2)


RISKS: dict[Task, str] = {
    "binary": "error rate",
    "multiclass": "error rate",
    "multilabel": "error rate, mean over labels",
    "regression": "MAE / std of target",
}


def draw_risk(axis: Axes, result: UncertaintyResult) -> None:
    """Risk of the examples kept, clean; the best order of the ensemble's own errors is dotted."""
    classes, highest = result.targets.task != "regression", 0.0
    size = len(result.targets.test)
    coverage = np.arange(1, size + 1) / size
    shown = slice(max(0, size // 20 - 1), None)  # the risk of a handful of examples is noise
    for name, row in result.rows.items():
        outputs, color = result.outputs[name], colors_of(result)[name]
        curves = [("ensemble", "-", 1.8, calibration.risk_coverage(*row.ensemble.ranking(outputs)))]
        if classes:
            alone = [calibration.risk_coverage(*m.ranking(outputs[[s]])) for s, m in enumerate(row.members)]
            curves.append(("member, mean", "--", 1.2, np.mean(alone, 0)))
        risk = row.ensemble.ranking(outputs)[1]
        curves.append(("best order", ":", 1.0, calibration.risk_coverage(risk, risk)))
        for who, style, width, curve in curves:
            axis.plot(coverage[shown], curve[shown], style, color=color, linewidth=width, label=f"{who}, {name}")
            highest = max(highest, curve[shown].max())
    axis.set(
        title="risk of the examples kept, clean",
        xlabel="coverage: share of examples kept, most certain first",
        ylabel=RISKS[result.targets.task],
        xlim=(0, 1),
        ylim=(0, 1.1 * highest),
    )
    legend_below(axis, 2)


def draw_levels(axis: Axes, result: UncertaintyResult) -> None:
    """The ensembles' NLL against the level of corruption, mean over all kinds; 0 is clean."""
    levels = sorted({level for _, _, level in result.corrupted})
    everything = []
    for name, row in result.rows.items():
        for scaling, style in zip(row.ensemble.scalings, ("o-", "s--"), strict=False):
            values = [result.clean[name][ENSEMBLE][scaling]["NLL"]]
            for level in levels:
                at = [x[name][ENSEMBLE][scaling]["NLL"] for (*_, here), x in result.corrupted.items() if here == level]
                values.append(np.mean(at))
            text = f"{name}, {scaling}" if len(row.ensemble.scalings) > 1 else name
            axis.plot([0, *levels], values, style, color=colors_of(result)[name], markersize=5, label=text)
            everything += values
    low, high = min(everything), max(everything)
    axis.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axis.set_xticks([0, *levels], ["clean", *(f"{level:g}" for level in levels)])
    axis.set(
        title="NLL of the ensemble under corruption, mean over kinds", xlabel="level of corruption", ylabel="NLL, nats"
    )
    legend_below(axis, 2)


def draw_detection(axis: Axes, result: UncertaintyResult) -> None:
    """AUROC of clean against corrupted by the members' disagreement, at the middle level."""
    levels = sorted({level for _, _, level in result.detected})
    if not levels:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no corruption was looked at", ha="center", va="center")
        return
    level = levels[len(levels) // 2]
    curves = [key for key in result.detected if key[2] == level]
    score = next(iter(result.detected[curves[0]][result.main]))
    height = 0.8 / len(result.rows)
    for i, name in enumerate(result.rows):
        aurocs = [result.detected[key][name][score] for key in curves]
        middle = np.array([d.auroc for d in aurocs])
        errors = np.abs(np.array([[d.low for d in aurocs], [d.high for d in aurocs]]) - middle)
        place = np.arange(len(curves)) + (i - (len(result.rows) - 1) / 2) * height
        # bars begin at a coin's AUROC
        axis.barh(
            place, middle - 0.5, height, left=0.5, xerr=errors, color=colors_of(result)[name], label=name, ecolor="0.3"
        )
    axis.axvline(0.5, color="black", linewidth=0.8)
    size = min(8, 220 / len(curves))  # with six modalities there are 35 of them
    axis.set_yticks(range(len(curves)), [curve for _, curve, _ in curves], fontsize=size)
    axis.set_ylim(len(curves) - 0.3, -0.7)  # the first above
    axis.set(title=f"corruption detected by the {score}, level {level:g}", xlabel="AUROC, 95 % interval over examples")
    legend_below(axis, 2)
