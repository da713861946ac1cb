"""experiments.power: what is read of a run's contrasts, and planted effects against the simulation."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from experiments import power
from experiments.experiment import Experiment, Outcome
from experiments.results_summary import planted_table, with_tables
from mmfusion.metrics.power import VERDICTS, power_curve
from tests.test_power import verdict_of_folds

FOLDS, RATIO = 15, 0.25


@dataclass(frozen=True)
class FoldContrast:
    """A contrast as far as power reads it."""

    fold_values: list[float]
    ratio: float = RATIO
    route: str = "a"
    decides: bool = True
    effect: float = 0.01
    sign_only: bool = False


def contrast(seed: int = 0, **changes) -> dict:
    values = 0.02 * np.random.default_rng(seed).standard_normal(FOLDS)
    found = {
        "fold_values": values.tolist(),
        "ratio": RATIO,
        "route": "a",
        "decides": True,
        "effect": 0.01,
        "sign_only": False,
    }
    return found | changes


def write_run(folder, contrasts) -> str:
    folder.mkdir()
    results = {
        "experiment": folder.name,
        "dataset": "own",
        "verdict": "cannot tell",
        "examples": {"train": 400, "dev": 100, "test": 125},
        "contrasts": contrasts,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_report_prints_the_power_of_the_deciding_contrasts_and_draws_it(tmp_path, capsys):
    contrasts = [contrast(0), contrast(1, decides=False, fold_values=None)]
    runs = [write_run(tmp_path / name, contrasts) for name in ("one", "two")]
    assert power.run([*runs, "--figure", str(tmp_path / "p.png"), "--draws", "2000"]) == 0
    printed = capsys.readouterr().out
    expected = power_curve([contrast(0)["fold_values"]], RATIO, ["a"], [0.01], power.STRENGTHS, 2000)[:, 2]
    line = next(line for line in printed.splitlines() if line.startswith("one on own"))
    assert "".join(f"{value:7.2f}" for value in expected) in line and "   625  " in line and "cannot tell" in line
    assert expected[0] < 0.8 < expected[-1] + 0.3 and int(line.split()[-3]) > 625
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fold_values": None}, "no values over two folds"),
        ({"fold_values": [0.1]}, "no values over two folds"),
        ({"fold_values": [float("nan")] * FOLDS}, "no values over two folds"),
        ({"decides": False}, "no contrast decides"),
        ({"ratio": -1}, "no values over two folds"),
        ({"effect": "much"}, "no values over two folds"),
    ],
)
def test_runs_without_values_over_folds_are_refused_in_one_line(tmp_path, capfd, change, message):
    run = write_run(tmp_path / "old", [contrast(**change)])
    with pytest.raises(SystemExit) as stop:
        power.run([run, "--figure", str(tmp_path / "p.png")])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere"),
        ([], "RUN"),
        (["--check"], "--check : is no experiment"),
        (["--check", "reproduce"], "is no experiment"),
        (["--check", "robustness"], "is no experiment"),
        (["--check", "rank_ablation"], "--plant: --check needs a planted effect"),
        (["--check", "rank_ablation", "--plant", "interaction", "--replicates", "1"], "--replicates 1: give 2 to 1000"),
        (["--check", "rank_ablation", "--plant", "nothing"], "plant"),
    ],
)
def test_commands_that_cannot_be_are_refused_in_one_line(arguments, message, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        power.run(arguments)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("effect, expected", [(0.0, 0.1), (0.03, 1.0)])
def test_check_counts_the_verdicts_on_other_plantings(effect, expected, capsys, monkeypatch, tmp_path):
    """An experiment whose folds have this mean by construction, correlated as the corrected interval assumes."""
    targets = []

    def measure(data, run) -> Outcome:
        targets.append(data.pool.target.numpy())
        rng = np.random.default_rng([run.options.plant_seed, 7])
        noise = 0.01 * (RATIO**0.5 * rng.standard_normal() + rng.standard_normal(FOLDS))
        values = effect + noise
        verdict = VERDICTS[int(verdict_of_folds(values[None], RATIO, ["a"], [0.01]))]
        return Outcome("", [FoldContrast(values.tolist())], verdict, "", {}, lambda figure: None)

    experiment = Experiment("toy", "claim", "question", measure)
    monkeypatch.setattr(power, "experiment_named", lambda name: experiment)
    flags = ["--dataset", "synthetic", "--synthetic-examples", "60", "--device", "cpu", "--plant", "interaction"]
    kept = tmp_path / "plantings.csv"
    assert power.run(["--check", "toy", "--replicates", "8", *flags, "--keep", str(kept)]) == 0
    assert len(targets) == 8 and len({target.tobytes() for target in targets}) == 8
    last = capsys.readouterr().out.splitlines()[-2]
    share = float(last.split("plantings: ")[1].split()[0])
    assert abs(share - expected) <= 0.15
    simulated = float(last.split("mean estimates ")[1].split(",")[0])
    assert abs(simulated - expected) <= 0.2 and float(last.split()[-1]) <= 0.03
    more = ["--replicates", "2", "--keep", str(kept)]
    for strength in ("0.5", "0.9"):  # the first are the flags that stand there, given by name
        assert power.run(["--check", "toy", *more, *flags, "--plant-strength", strength]) == 0
    lines = planted_table(kept)[2:]
    assert [line.split("`")[1] for line in lines] == [
        f"--dataset synthetic --plant interaction{given}" for given in ("", " --plant-strength 0.9")
    ]
    assert all(" of 2 [" in line for line in lines), "the same flags: in place of what stood there"


def test_tables_are_put_between_their_marks_and_nowhere_else():
    text = "a\n<!-- begin verdicts -->\nold\n<!-- end verdicts -->\nb\n<!-- begin other -->\nx\n<!-- end other -->\n"
    once = with_tables(text, {"verdicts": ["| 1 |"], "missing": ["no"]})
    assert once == text.replace("old\n", "\n| 1 |\n\n") == with_tables(once, {"verdicts": ["| 1 |"]})


def test_summary_says_where_the_simulation_is_contradicted():
    design = power.Design(
        0.02 * np.random.default_rng(0).standard_normal((1, FOLDS)), RATIO, ["a"], np.array([0.01]), np.array([0.01])
    )
    always = power.said(power.planted_summary(["supported"] * 10, [design] * 10))
    assert "10 of 10 plantings: 1.00 [0.69, 1.00]" in always and always.endswith("outside the interval")
    assert power.said(power.planted_summary(["cannot tell"] * 10, [design] * 10)).endswith("inside the interval")


def test_every_experiment_that_trains_is_found():
    for name in ("rank_ablation", "jwae_ablation", "rank_semantics", "temporal"):
        assert power.experiment_named(name).name == name
