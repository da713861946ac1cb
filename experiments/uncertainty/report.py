"""Table and numbers of experiments.uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.uncertainty.predictors import (
    ENSEMBLE,
    MEMBER,
    RAW,
    SCALED,
    ClassPredictor,
    HeldOutTargets,
    Measures,
    MethodPredictors,
)
from mmfusion.metrics.calibration import Detection
from mmfusion.metrics.format import mean_std


@dataclass
class UncertaintyResult:
    """What table, figure and results.json show; rows are called as in the run, the main one first."""

    targets: HeldOutTargets
    rows: dict[str, MethodPredictors]
    outputs: dict[str, np.ndarray]
    """{row: clean test predictions (S, n[, O])}"""
    clean: dict[str, dict] = field(default_factory=dict)
    """{row: Row.measures}"""
    corrupted: dict[tuple[str, str, float], dict[str, dict]] = field(default_factory=dict)
    """{(group, curve, level): {row: Row.measures, mean over draws}}"""
    detected: dict[tuple[str, str, float], dict[str, dict[str, Detection]]] = field(default_factory=dict)
    """{(group, curve, level): {row: {score: AUROC of clean against corrupted}}}"""
    orders: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """{row: {score: (n,) share of every example in the AURC of the ensemble's errors in the score's order, clean}}"""
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """{row: {"NLL, clean" and the like: (S, n)}}; "corrupted" is the mean over all conditions"""

    @property
    def main(self) -> str:
        """The row whose uncertainty is asked about."""
        return next(iter(self.rows))

    @property
    def label_width(self) -> int:
        """Of a table's first column, the longest line in mind: "one member, ROW, scaled"."""
        return max(30, max(map(len, self.rows)) + len(MEMBER) + 12)


def averaged(nested: Sequence[dict]) -> dict:
    """Dictionaries of the same shape -> their mean, leaf by leaf."""
    first = nested[0]
    return {
        key: averaged([x[key] for x in nested])
        if isinstance(first[key], dict)
        else np.mean([x[key] for x in nested], axis=0)
        for key in first
    }


def table(result: UncertaintyResult) -> str:
    """Fixed-width: clean and corrupted measures, conformal prediction, then one line per corruption and level."""
    unit = "; in units of the target's standard deviation" if result.targets.task == "regression" else ""
    title = f"clean test examples; of members mean +- std over seeds{unit}"
    lines = [*measures_table(result, result.clean, title), *temperature_lines(result), "", *conformal_table(result)]
    lines += ["", *orders_table(result)]
    if result.corrupted:
        everything = averaged(list(result.corrupted.values()))
        lines += ["", *measures_table(result, everything, "mean over all corruptions and levels")]
        lines += ["", *detection_table(result), "", *corruption_table(result)]
    return "\n".join(lines)


def measures_table(result: UncertaintyResult, by_row: dict[str, dict], title: str) -> list[str]:
    """Rows: one member and the ensemble, raw and scaled, with and without; ECEs beside their floors where known."""
    classes = result.targets.task != "regression"
    names = ["NLL", "Brier" if classes else "MAE", "AURC", "excess AURC"]
    eces = [f"ECE, equal {kind}" for kind in ("width", "mass")] if classes else []
    floors = f"{eces[0]}, floor" in by_row[result.main][ENSEMBLE][RAW] if eces else False
    if floors:
        title += " (in brackets, ECE of a predictor whose probabilities are right: mean, 95 % quantile)"
    width = 30 if floors else 17
    wide = result.label_width
    lines = [title, f"{'':{wide}}" + "".join(f"{x:>17}" for x in names) + "".join(f"{x:>{width}}" for x in eces)]
    for who in (MEMBER, ENSEMBLE):
        for scaling in result.rows[result.main].ensemble.scalings:
            for row, measures in by_row.items():
                values = measures[who][scaling]
                text = f"{who}, {row}" + (", scaled" if scaling == SCALED else "")
                line = f"{text:{wide}}" + "".join(f"{_cell(values.get(name)):>17}" for name in names)
                for name in eces:
                    line += f"{_cell(values[name]):>17}"
                    if floors:
                        drawn = [np.mean(values[f"{name}, {which}"]) for which in ("floor", "floor 95 %")]
                        line += f" [{drawn[0]:.3f} {drawn[1]:.3f}]".rjust(width - 17)
                lines.append(line.rstrip())
    return lines


def orders_table(result: UncertaintyResult) -> list[str]:
    """AURC of the ensemble's errors, ordered by each score."""
    lines = ["AURC of the ensemble's risk, clean, the examples in the order of"]
    width = max(len(score) for by_score in result.orders.values() for score in by_score)
    lines.append(f"{'':{width}}" + "".join(f"  {row:>24}" for row in result.orders))
    for score in result.orders[result.main]:
        cells = [by_score[score].mean() if score in by_score else None for by_score in result.orders.values()]
        lines.append(f"{score:{width}}" + "".join(f"  {_cell(cell, 4):>24}" for cell in cells))
    return lines


def temperature_lines(result: UncertaintyResult) -> list[str]:
    """What dev makes of the logits: above 1, they were too sure."""
    lines = []
    for name, row in result.rows.items():
        if isinstance(row.ensemble, ClassPredictor):
            alone = np.array([m.temperature.mean() for m in row.members])
            text = f"{_cell(alone, 2)} of a member, {row.ensemble.temperature.mean():.2f} of the ensemble"
            lines.append(
                f"temperature {name}: {text}" + (", means over folds" if result.targets.dev_fold.any() else "")
            )
    return lines


def conformal_table(result: UncertaintyResult) -> list[str]:
    """Split-conformal prediction, calibrated on dev: coverage and size."""
    if result.targets.task in ("binary", "multilabel"):
        kinds = ("class 0", "class 1") if result.targets.task == "binary" else ("absent", "present")
        names = {"coverage": "coverage", "coverage_0": f"of {kinds[0]}", "coverage_1": f"of {kinds[1]}"}
        names |= {"size": "mean size", "empty": "empty", "both": "both"}
        lines = ["split-conformal sets of labels, calibrated on dev"]
        if result.targets.task == "multilabel":
            lines[0] += ": absent, present or both, means over labels"
    elif result.targets.task == "multiclass":
        names = {"coverage": "coverage", "least": "of worst class", "size": "mean size"}
        names |= {"empty": "empty", "single": "one class"}
        lines = ["split-conformal sets of classes, calibrated on dev"]
    else:
        names = {"coverage": "coverage", "width": "width"}
        lines = ["split-conformal intervals, calibrated on dev, means over outputs"]
    wide = result.label_width + 8
    lines.append(f"{'':{wide}}" + "".join(f"{title:>17}" for title in names.values()))
    for alpha in result.targets.alphas:
        for who in (MEMBER, ENSEMBLE):
            for row, measures in result.clean.items():
                values = measures[who][RAW]
                cells = "".join(f"{_cell(values[f'{name} at {1 - alpha:g}']):>17}" for name in names)
                lines.append(f"{f'{1 - alpha:g} wanted: {who}, {row}':{wide}}{cells}")
    return lines


def detection_table(result: UncertaintyResult) -> list[str]:
    """Every score's AUROC of clean against corrupted, mean over kinds of corruption."""
    levels = sorted({level for _, _, level in result.detected})
    lines = ["AUROC of clean against corrupted examples, mean over kinds"]
    wide = result.label_width + 8
    lines.append(f"{'':{wide}}" + "".join(f"{f'level {level:g}':>14}" for level in levels))
    for score in next(iter(result.detected.values()))[result.main]:
        for row in result.rows:
            by_level = [np.mean([d[row][score].auroc for k, d in result.detected.items() if k[2] == x]) for x in levels]
            lines.append(f"{f'{score}, {row}':{wide}}" + "".join(f"{value:14.3f}" for value in by_level))
    return lines


def corruption_table(result: UncertaintyResult) -> list[str]:
    """Ensembles under corruption: with / without in each cell."""
    level = f"{1 - result.targets.alphas[0]:g}"
    columns = {"NLL": (RAW, "NLL"), "AURC": (RAW, "AURC"), f"coverage at {level}": (RAW, f"coverage at {level}")}
    if result.targets.task != "regression":
        columns["NLL, scaled"] = (SCALED, "NLL")
        columns["ECE"] = (RAW, "ECE, equal width")
    rows = list(result.rows)
    score = next(iter(next(iter(result.detected.values()))[result.main]))
    lines = [f"ensemble under corruption, mean over draws: {' / '.join(rows)}"]
    lines.append(f"(last: AUROC of clean against corrupted by the {score}, 95 % interval over examples)")
    width = max(len(curve) for _, curve, _ in result.corrupted) + 6
    lines.append(f"{'':{width}}" + "".join(f"{title:>18}" for title in columns) + f"  {'detected':^44}")
    clean = {row: {ENSEMBLE: result.clean[row][ENSEMBLE]} for row in rows}
    for key, measures in {("", "clean", 0.0): clean, **result.corrupted}.items():
        cells = [
            " / ".join(f"{measures[row][ENSEMBLE][scaling][name]:.3f}" for row in rows)
            for scaling, name in columns.values()
        ]
        detected = result.detected.get(key, {})
        shown = " / ".join(f"{d[score].auroc:.3f} [{d[score].low:.3f}, {d[score].high:.3f}]" for d in detected.values())
        text = f"{key[1]} {key[2]:.2f}" if key[0] else key[1]
        lines.append((f"{text:{width}}" + "".join(f"{cell:>18}" for cell in cells) + f"  {shown}").rstrip())
    return lines


def _cell(value: float | np.ndarray | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return mean_std(value, digits)


def numbers_of(result: UncertaintyResult) -> dict[str, object]:
    """Everything in table and figure, JSON-able; no number (an infinite interval, an absent class) is None."""
    temperature = {
        name: {MEMBER: [m.temperature for m in row.members], ENSEMBLE: row.ensemble.temperature}
        for name, row in result.rows.items()
        if isinstance(row.ensemble, ClassPredictor)
    }
    corrupted = []
    for key, measures in result.corrupted.items():
        condition = dict(zip(("group", "curve", "level"), key, strict=True))
        short = {name: {who: _short(found_of) for who, found_of in by.items()} for name, by in measures.items()}
        corrupted.append(condition | {"measures": short, "detected": result.detected[key]})
    orders = {name: {score: x.mean() for score, x in by_score.items()} for name, by_score in result.orders.items()}
    return _plain({"clean": result.clean, "AURC by order": orders, "temperature": temperature, "corrupted": corrupted})


def _short(by_how: dict[str, Measures]) -> dict[str, dict]:
    """Members as mean and standard deviation, nothing output by output: sixty conditions would fill megabytes."""
    return {
        scaling: {
            name: x if np.ndim(x) == 0 else {"mean": x.mean(), "std": x.std(ddof=1)}
            for name, x in measures.items()
            if "by output" not in name
        }
        for scaling, measures in by_how.items()
    }


def _plain(value: object) -> object:
    if isinstance(value, Detection):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value
