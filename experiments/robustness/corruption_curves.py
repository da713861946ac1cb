"""Scores of every method of a run over the severity of each corruption, and summaries of them."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tqdm import tqdm

from experiments.robustness.corruption_grid import KERNEL_MACHINE, LATE_FUSION, Condition, Predictor
from mmfusion.data.folds import targets
from mmfusion.metrics.outcomes import PRIMARY, Outcome, example_outcome
from mmfusion.metrics.scores import example_scores
from mmfusion.metrics.tasks import selection_score
from mmfusion.training.grid import per_example


def curve_area(scores: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Area under scores (..., E) over levels (E,), ascending, divided by their range: a mean score."""
    return np.trapezoid(scores, levels, axis=-1) / (levels[-1] - levels[0])


@dataclass
class Curve:
    """Scores of one row over the severities of one corruption, the clean point first."""

    levels: np.ndarray
    """(E,)"""
    scores: np.ndarray
    """(E, S, draws): mean over test examples"""

    @property
    def area(self) -> np.ndarray:
        """(S,)"""
        return curve_area(self.scores.mean(-1).T, self.levels)

    @property
    def drop(self) -> np.ndarray:
        """(S,)"""
        return (self.scores[0] - self.scores[-1]).mean(-1)

    @property
    def losses(self) -> np.ndarray:
        """(S,): mean over severities of score - clean; the effective robustness is a difference of two of these."""
        return (self.scores[1:] - self.scores[0]).mean((0, 2))


@dataclass
class CorruptionResult:
    """All curves of all rows, and per-example changes by group."""

    clean: dict[str, np.ndarray]
    """{row: (S, n)}"""
    curves: dict[tuple[str, str], dict[str, Curve]]
    """{(group, curve): {row: Curve}}"""
    changes: dict[Outcome, dict[str, dict[str, np.ndarray]]]
    """{primary outcome: {group: {row: (S, n)}}}: mean over curves and severities of the outcome less the clean one, by
    examples; of the kernel machine, whose margins are no logits, there is none"""
    selection: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """{"clean" or group: {row: (S,)}}: what epochs are selected by (mmfusion.metrics.tasks.SELECTION), of all test
    examples together; the mean over curves and severities"""


def measure_corrupted(predictor: Predictor, wanted: Sequence[Condition]) -> CorruptionResult:
    """Score every row under every condition."""
    data = predictor.data

    def scores(predictions: np.ndarray) -> np.ndarray:
        return per_example(data, predictions, "test", example_scores)  # (S, n)

    of_task, target = selection_score(data.task, data.target_scale), targets(data)

    def selection(predictions: np.ndarray) -> np.ndarray:
        return np.array([of_task(member, target) for member in predictions])  # (S,)

    said = {row: predictor.clean(row) for row in predictor.rows}
    clean = {row: scores(x) for row, x in said.items()}
    # a kernel machine's margins have an order, but are no logits that a log loss could be of
    selected = [row for row in predictor.rows if row != KERNEL_MACHINE or data.task in ("binary", "regression")]
    by_group = {"clean": {row: selection(said[row]) for row in selected}}
    collected: dict[tuple[str, str], dict[str, dict[float, list[np.ndarray]]]] = {}
    parts = {name: partial(example_outcome, outcome=name) for name in PRIMARY[data.task]}
    own = [row for row in predictor.rows if row != KERNEL_MACHINE]
    whole = {name: {row: per_example(data, said[row], "test", of) for row in own} for name, of in parts.items()}
    changes: dict[Outcome, dict[str, dict[str, np.ndarray]]] = {name: {} for name in parts}
    # draws are averaged, so that every severity of every curve weighs alike
    draws = Counter((c.group, c.curve, c.level) for c in wanted)
    points = Counter(group for group, _, _ in draws)
    for condition in tqdm(wanted, desc="corruptions", unit="condition", mininterval=0.5):
        for row in predictor.rows:
            predictions = predictor.corrupted(row, condition)
            if predictions is None:
                continue
            values = scores(predictions)
            by_level = collected.setdefault((condition.group, condition.curve), {}).setdefault(row, {})
            by_level.setdefault(condition.level, []).append(values.mean(1))
            weight = draws[condition.group, condition.curve, condition.level] * points[condition.group]
            for name, of in parts.items() if row in own else ():
                here = changes[name].setdefault(condition.group, {})
                here[row] = here.get(row, 0) + (per_example(data, predictions, "test", of) - whole[name][row]) / weight
            if row in selected:
                here = by_group.setdefault(condition.group, {})
                here[row] = here.get(row, 0) + selection(predictions) / weight
    curves = {
        key: {row: _curve(clean[row].mean(1), by_level) for row, by_level in rows.items()}
        for key, rows in collected.items()
    }
    return CorruptionResult(clean, curves, changes, by_group)


def _curve(clean: np.ndarray, by_level: Mapping[float, list[np.ndarray]]) -> Curve:
    draws = max(map(len, by_level.values()))
    levels = sorted(by_level)
    # a level without randomness was measured once
    points = [np.repeat(clean[:, None], draws, 1)]
    points += [np.stack(by_level[x] if len(by_level[x]) == draws else by_level[x] * draws, -1) for x in levels]
    return Curve(np.array([0.0, *levels]), np.stack(points))


def group_summary(result: CorruptionResult, group: str, row: str) -> dict[str, np.ndarray] | None:
    """Area, drop and effective robustness (S,) of one row, mean over the group's curves; None where it has none."""
    curves = [rows for (g, _), rows in result.curves.items() if g == group and row in rows]
    if not curves:
        return None
    summary = {
        "area": np.mean([rows[row].area for rows in curves], 0),
        "drop": np.mean([rows[row].drop for rows in curves], 0),
    }
    if all(LATE_FUSION in rows for rows in curves):
        summary["effective"] = np.mean([rows[row].losses - rows[LATE_FUSION].losses for rows in curves], 0)
    return summary


def curves_csv(result: CorruptionResult) -> str:
    """One line per group, curve, row, severity, seed and draw."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "curve", "row", "severity", "seed", "draw", "score"])
    for (group, curve), rows in result.curves.items():
        for row, c in rows.items():
            for e, level in enumerate(c.levels):
                for s, by_draw in enumerate(c.scores[e]):
                    writer.writerows(
                        [group, curve, row, f"{level:g}", s, k, f"{value:.6f}"] for k, value in enumerate(by_draw)
                    )
    return text.getvalue()
