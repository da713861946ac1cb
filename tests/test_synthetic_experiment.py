"""The experiment on synthetic data: its columns' truth, its additive row, and a verdict that can say yes and no."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from experiments import experiment as frame
from experiments import synthetic as experiment
from experiments.experiment import Run
from experiments.synthetic import (
    ADDITIVE,
    ADDITIVE_FREE,
    ALONE,
    CONCATENATION_FREE,
    LOWEST,
    MAIN,
    MAIN_FREE,
    NO_DROPOUT,
    ROWS,
    SyntheticOptions,
)
from mmfusion.data.folds import targets
from mmfusion.errors import InputError

SMALL = SyntheticOptions(seeds=2, epochs=1, synthetic_examples=80)


def run_in(folder: Path, options: SyntheticOptions = SMALL) -> Run:
    (folder / "run.json").write_text("{}")
    return Run(options, folder, torch.device("cpu"))


def planted(accuracy: dict[tuple[str, str], float]):
    """`scores_on` of rows that are right by chance, but for those named: {(column, row): rate}."""

    def scores_on(column: experiment.Column, run: Run) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(len(column.name))
        shape = (len(run.seeds), len(targets(column.data)))
        uniform = rng.random(shape)  # paired: rows that are as good are right on the same examples
        return {row: (uniform < accuracy.get((column.name, row), 0.5)).astype(float) for row in ROWS}

    return scores_on


def test_columns_move_the_whole_of_the_shares_to_one_kind_of_factor():
    columns = {c.name: c for c in experiment.columns(SMALL)}
    dials = {name: c.data.provenance["dials"] for name, c in columns.items() if name in experiment.PLANTED}
    assert [dials["synergy"][part] for part in ("shared", "unique", "synergy")] == pytest.approx([0, 0, 0.9])
    assert [dials["shared"][part] for part in ("shared", "unique", "synergy")] == pytest.approx([0.9, 0, 0])
    assert columns["shared"].bayes == columns["unique"].bayes == pytest.approx(0.8976, abs=1e-4)
    assert columns["shared"].additive == columns["shared"].bayes
    assert columns["synergy"].additive == 0.5 < columns["mix"].additive < columns["mix"].bayes
    assert (columns["XOR"].bayes, columns["XOR"].chance) == (0.5625, 0.125)
    assert all(len(c.data.folds[0].train) == 80 for c in columns.values())


@pytest.mark.parametrize("name", ["mix", "XOR"])
def test_the_additive_row_is_right_where_the_sum_of_the_single_logits_is(tmp_path, monkeypatch, name):
    column = next(c for c in experiment.columns(SMALL) if c.name == name)
    run, seen, drops, rng = run_in(tmp_path), {}, {}, np.random.default_rng(0)

    class Grid:
        """Of logits that are drawn, not trained."""

        def __init__(self, data, settings, title, **shape):
            outputs = (data.output_dim,) if data.has_columns else ()
            self.logits = rng.normal(size=(len(settings), len(run.seeds), len(targets(data)), *outputs))
            self.settings = settings
            seen[title] = (self.logits, list(data.input_dims), shape)
            drops.update({setting.label: (setting.dropout, setting.feature_dropout) for setting in settings})

        def predictions(self) -> np.ndarray:
            return self.logits

    monkeypatch.setattr(run, "grid", Grid)
    scores = experiment.scores_on(column, run)
    first, second = (seen[f"{name} {row}"] for row in ALONE)
    assert [first[1], second[1]] == [[modality] for modality in column.data.input_dims]
    main, free, lowest = seen[f"{name} LMF"][0]
    expected = {
        ADDITIVE: first[0][0] + second[0][0],
        ADDITIVE_FREE: first[0][1] + second[0][1],
        MAIN: main,
        MAIN_FREE: free,
        LOWEST: lowest,
        CONCATENATION_FREE: seen[f"{name} concatenation"][0][1],
        ALONE[1]: second[0][0],
    }
    for row, logits in expected.items():
        guess = logits.argmax(-1) if name == "XOR" else logits >= 0
        np.testing.assert_array_equal(scores[row], guess == targets(column.data))
    # no dropout at all, or the recipe's
    assert {row.endswith(NO_DROPOUT): values for row, values in drops.items()} == {True: ({}, 0.0), False: (None, None)}
    assert seen[f"{name} concatenation"][2] == {"fusion": "concatenation"}


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        ({("synergy", MAIN_FREE): 0.8, ("shared", MAIN_FREE): 0.9, ("shared", ADDITIVE_FREE): 0.9}, "supported"),
        ({("synergy", MAIN_FREE): 0.4, ("synergy", ADDITIVE_FREE): 0.6}, "not supported"),
        ({}, "not supported"),  # exactly as good, on the same examples
        ({("synergy", MAIN): 0.8}, "not supported"),  # the recipe's row decides nothing
        ({("synergy", MAIN_FREE): 0.8, ("shared", MAIN_FREE): 0.9, ("shared", ADDITIVE_FREE): 0.7}, "cannot tell"),
    ],
)
def test_verdict_follows_the_synergy_contrast_unless_the_control_fails(tmp_path, monkeypatch, accuracy, verdict):
    monkeypatch.setattr(experiment, "scores_on", planted(accuracy))
    outcome = experiment.measure(None, run_in(tmp_path, SyntheticOptions(seeds=3, synthetic_examples=400)))
    assert outcome.verdict == verdict
    assert bool(outcome.notes) == (verdict == "cannot tell")
    json.dumps(outcome.numbers, allow_nan=False)
    outcome.draw(Figure())
    if verdict == "supported":
        row = next(
            line for line in outcome.table.split("share recovered")[1].splitlines() if line.startswith(MAIN_FREE)
        )
        synergy = np.mean(outcome.numbers["synergy"][MAIN_FREE])
        assert f"{(synergy - 0.5) / (outcome.numbers['synergy']['best'] - 0.5):.2f} +-" in row


def test_data_without_a_known_truth_and_shares_that_leave_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match="--dataset demo: its truth is not known"):
        experiment.measure(None, run_in(tmp_path, SyntheticOptions(dataset="demo")))
    nothing = SyntheticOptions(synthetic_shared=0.0, synthetic_unique=0.0, synthetic_synergy=0.0)
    with pytest.raises(InputError, match="the label would be noise"):
        experiment.columns(nothing)


def test_command_trains_every_column_and_ends_in_a_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--seeds", "2", "--epochs", "1", "--synthetic-examples", "40", "--hidden-dim", "8"]
    assert frame.run(experiment.EXPERIMENT, flags) == 0
    said = capsys.readouterr().out
    assert "verdict: " in said and "no accuracy can be above 0.8928" in said
    results = json.loads((tmp_path / "runs/synthetic-synthetic/results.json").read_text())
    assert {*results["numbers"]} >= {*experiment.PLANTED, "PID synergy", "XOR"} and len(results["contrasts"]) == 7
