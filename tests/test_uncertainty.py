"""The uncertainty of trained runs: what is fitted on dev, what is compared, and what the command leaves or refuses."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import expit

from experiments.robustness.corruption_grid import Condition
from experiments.uncertainty import measure as uncertainty
from experiments.uncertainty.figure import bins_for
from experiments.uncertainty.measure import Options
from experiments.uncertainty.orders import orders_of
from experiments.uncertainty.predictors import (
    PARTS,
    BinaryPredictor,
    GaussianPredictor,
    HeldOutTargets,
    MethodPredictors,
    fold_aurc_parts,
    held_out_targets,
)
from mmfusion.cli import run_command
from mmfusion.data.folds import fold_datasets
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError
from mmfusion.metrics import calibration
from mmfusion.metrics.scores import example_losses

SEEDS = 4


def toy_study(task="binary", outputs=None, folds=1, n=90, shift=0.0):
    """Splits whose first feature is the logit, or the target's mean; `folds` of them, tested apart."""
    rng = np.random.default_rng(0)
    datasets = []
    for f in range(folds):
        splits = {}
        for part in ("train", "dev", "test"):
            x = rng.normal(size=n)
            noise = rng.normal(size=n if outputs is None else (n, outputs))
            target = rng.random(n) < expit(2 * x) if task == "binary" else 3 + (x if outputs is None else x[:, None])
            target = target if task == "binary" else target + (noise + shift * (part == "test"))
            splits[part] = Split(
                {"text": torch.tensor(x, dtype=torch.float32).unsqueeze(1), "audio": torch.zeros(n, 1)},
                torch.tensor(np.asarray(target), dtype=torch.float32),
                [f"{part}{f}-{i}" for i in range(n)],
            )
        datasets.append(Dataset("toy", task, splits, "dev"))
    return fold_datasets(datasets)


@dataclass
class FakeRun:
    """What uncertainty needs of a trained run."""

    data: object = field(default_factory=toy_study)
    folder: Path = Path("runs/fake")
    identity: str = "0" * 64
    trained_on_dev: bool = False
    seeds: tuple[int, ...] = tuple(range(SEEDS))
    main_row: str = "jWAE-LMF, rank 4"
    prior_free_row: str | None = "LMF without jWAE"
    settings: dict = field(default_factory=lambda: {"hold_out_dev": True})


class FakePredictor:
    """Members that know the logit (or mean) but for noise; without the prior too sure; corruption adds noise."""

    def __init__(self, run, device="cpu"):
        self.data = run.data

    def clean(self, row, part="test"):
        rows = torch.cat([getattr(fold, part) for fold in self.data.folds])
        x = self.data.pool.features["text"][rows, 0].numpy()
        rng = np.random.default_rng(len(x) + (part == "dev"))
        said = 2 * x + 0.4 * rng.normal(size=(SEEDS, len(x)))
        if self.data.task == "binary":
            return said * (3 if "without" in row else 1)
        said = 3 + said / 2
        return said if self.data.pool.target.ndim == 1 else np.repeat(said[..., None], self.data.output_dim, -1)

    def corrupted(self, row, condition):
        clean = self.clean(row)
        return clean + 2 * condition.level * condition.rng().normal(size=clean.shape)

    def affected(self, condition):
        return np.ones(len(self.data.test_rows), bool)

    def variances(self, row):
        """Of certain latents where there is no prior, else largest for the examples that are hardest."""
        return (
            None if "without" in row else 1 / (0.1 + np.abs(self.clean(row) - (3 if self.data.task != "binary" else 0)))
        )


CONDITIONS = [
    Condition("features", "feature noise", where, level, draw)
    for where in ("text", "all")
    for level in (0.25, 0.5)
    for draw in range(2)
]


def measured(run, made=CONDITIONS, alpha=0.1):
    return uncertainty.measure(run, FakePredictor(run), made, alpha)


# ---- predictors --------------------------------------------------------------------------------------------------


def test_temperature_and_quantile_of_a_fold_come_from_its_own_dev_part():
    data = toy_study(folds=3)
    targets = held_out_targets(data, (0.1,))
    dev = FakePredictor(FakeRun(data)).clean("row", "dev")
    predictor = BinaryPredictor(dev, targets)
    logits = calibration.ensemble_logits(dev)
    for f in range(3):
        rows = slice(90 * f, 90 * (f + 1))
        assert predictor.temperature[f] == calibration.fit_temperature(logits[rows], targets.dev[rows])
        right = np.where(targets.dev[rows] == 1, logits[rows], -logits[rows])
        assert predictor.quantile[0.1][f] == pytest.approx(np.sort(1 - expit(right))[int(np.ceil(91 * 0.9)) - 1])
    outputs = FakePredictor(FakeRun(data)).clean("row")
    scaled = predictor.logits(outputs, "scaled") * np.repeat(predictor.temperature, 90)
    np.testing.assert_allclose(scaled, predictor.logits(outputs))


def test_conformal_intervals_cover_exchangeable_targets():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        error = rng.standard_t(4, size=(120, 2))  # not Gaussian: coverage does not mind
        zeros = np.zeros(60, int)
        targets = HeldOutTargets("regression", error[:60], error[60:], zeros, zeros, np.ones(2), (0.1,))
        predictor = GaussianPredictor(np.zeros((1, 60, 2)), targets)
        covered.append(predictor.measures(np.zeros((1, 60, 2)))["coverage at 0.9"])
    exact = np.ceil(61 * 0.9) / 61
    assert exact >= 0.9
    assert np.mean(covered) == pytest.approx(exact, abs=4 * np.std(covered) / 300**0.5)


def test_variance_of_the_gaussian_is_the_error_that_dev_showed():
    rng = np.random.default_rng(2)
    mean, zeros = rng.normal(size=2000), np.zeros(2000, int)
    target = (mean + 0.5 * rng.normal(size=2000))[:, None]
    outputs = (mean + 0.3 * rng.normal(size=(5, 2000)))[..., None]
    predictor = GaussianPredictor(
        outputs, HeldOutTargets("regression", target, target, zeros, zeros, np.ones(1), (0.1,))
    )
    square = np.square(target - outputs.mean(0)).mean()
    assert predictor.moments(outputs)[1].mean() == pytest.approx(square)
    alone = GaussianPredictor(
        outputs[:1], HeldOutTargets("regression", target, target, zeros, zeros, np.ones(1), (0.1,))
    )
    assert alone.moments(outputs[:1])[1] == pytest.approx(np.square(target - outputs[0]).mean())


def test_parts_by_seed_have_the_ensembles_measure_as_mean():
    for task, outputs in (("binary", None), ("regression", 2)):
        data = toy_study(task, outputs)
        targets, fake = held_out_targets(data, (0.1,)), FakePredictor(FakeRun(data))
        row = MethodPredictors(targets.in_units(fake.clean("row", "dev")), targets)
        test = targets.in_units(fake.clean("row"))
        measures = row.ensemble.measures(test)
        for name, of in PARTS.items():
            parts = row.by_seed(test, of)
            assert parts.shape == (SEEDS, 90)
            assert parts.mean() == pytest.approx(measures[name])
        whole, s = row.ensemble.losses(test).mean(), 2
        lacking = [p.losses(np.delete(test, k, 0)).mean() for k, p in enumerate(row.lacking)]
        by_seed = row.by_seed(test, PARTS["NLL"]).mean(1)
        assert by_seed[s] == pytest.approx(whole + (SEEDS - 1) * (np.mean(lacking) - lacking[s]))


def test_spread_of_parts_over_seeds_is_that_of_ensembles_of_other_seeds():
    data = toy_study()
    targets = held_out_targets(data, (0.1,))
    rng, x = np.random.default_rng(3), data.pool.features["text"][:, 0].numpy()
    dev, test = (x[getattr(data.folds[0], part)] for part in ("dev", "test"))
    losses, errors = [], []
    for _ in range(60):
        bias, slope = 0.5 * rng.normal(size=(2, 6, 1))  # of six members
        row = MethodPredictors((2 + slope) * dev + bias, targets)
        outputs = (2 + slope) * test + bias
        parts = row.by_seed(outputs, PARTS["NLL"])
        losses.append(parts.mean())
        errors.append(parts.mean(1).var(ddof=1) / 6)
    # a standard deviation of 60 draws is known to 9 %, and the jackknife errs on the long side
    assert 0.8 < np.mean(errors) ** 0.5 / np.std(losses) < 1.5


def test_ensemble_is_the_mean_probability_and_never_loses_to_the_mean_member():
    data = toy_study()
    targets, fake = held_out_targets(data, (0.1,)), FakePredictor(FakeRun(data))
    row = MethodPredictors(fake.clean("row", "dev"), targets)
    test = fake.clean("row")
    np.testing.assert_allclose(expit(row.ensemble.logits(test)), expit(test).mean(0))
    np.testing.assert_allclose(row.member_losses(test), example_losses(test, targets.test, "binary"))
    assert row.ensemble.losses(test).mean() <= row.member_losses(test).mean()


def test_aurc_of_several_folds_is_that_of_each_by_itself():
    data = toy_study(folds=3)
    targets, rng = held_out_targets(data, (0.1,)), np.random.default_rng(0)
    loss = rng.random(270)
    uncertainty = loss + np.repeat([0.0, 10.0, 20.0], 90)  # each fold in its best order, folds far apart
    parts = fold_aurc_parts(targets, uncertainty, loss)
    for f in range(3):
        rows = slice(90 * f, 90 * (f + 1))
        assert parts[rows].mean() == pytest.approx(calibration.aurc(uncertainty[rows], loss[rows]))
    assert parts.mean() == pytest.approx(fold_aurc_parts(targets, loss, loss).mean())  # and not that of one pool
    assert calibration.aurc(uncertainty, loss) > parts.mean() + 0.05


# ---- the experiment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "outputs", "folds"), [("binary", None, 3), ("regression", None, 1), ("regression", 2, 1)]
)
def test_outcome_is_complete_and_json(task, outputs, folds):
    outcome = measured(FakeRun(toy_study(task, outputs, folds)))
    json.dumps(outcome.numbers, allow_nan=False)
    assert outcome.verdict in ("supported", "not supported", "cannot tell")
    names = [c.name for c in outcome.contrasts]
    assert set(uncertainty.DECIDING) <= set(names) and "ensemble over member, NLL" in names
    assert len(outcome.numbers["corrupted"]) == 4  # two kinds, two levels; draws are averaged
    figure = Figure(figsize=outcome.size, layout="constrained")
    FigureCanvasAgg(figure)
    outcome.draw(figure)
    assert len(figure.axes) == 4


def test_overconfident_row_without_prior_loses_in_nll_and_temperature_undoes_it():
    outcome = measured(FakeRun())
    found = {c.name: c for c in outcome.contrasts}
    assert found["NLL, clean"].verdict == "supported"
    assert abs(found["NLL after scaling, clean"].estimate) < 0.1 * found["NLL, clean"].estimate
    assert abs(found["AURC, clean"].estimate) < 0.01  # the order is nearly the same
    assert outcome.verdict != "supported"  # all four must hold


@pytest.mark.parametrize("other", ["jWAE-LMF, no prior", "LMF without jWAE"])
def test_rows_are_called_what_they_are_in_the_run_and_legends_leave_the_curves_free(other):
    outcome = measured(FakeRun(prior_free_row=other))
    assert list(outcome.numbers["clean"]) == ["jWAE-LMF, rank 4", other]
    for who in ("one member", "ensemble"):
        assert f"{who}, {other}, scaled " in outcome.table and f"{who}, jWAE-LMF, rank 4, scaled " in outcome.table
    assert ("none of the jWAE" in " ".join(outcome.notes)) == (other == "LMF without jWAE")
    figure = Figure(figsize=outcome.size, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    outcome.draw(figure)
    canvas.draw()
    assert f"({bins_for(len(toy_study().test_rows))} bins of equal mass)" in figure.axes[0].get_title()
    labels = {text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()}
    assert f"ensemble, {other}" in labels and not any("with jWAE" in label for label in labels)
    for axis in figure.axes:
        assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent())


def test_errors_are_ordered_by_the_exact_variance_too_where_latents_have_one():
    run = FakeRun(toy_study(folds=5))
    outcome = measured(run)
    by_order = outcome.numbers["AURC by order"]
    assert "Var[y], exact" in by_order["jWAE-LMF, rank 4"] and "Var[y], exact" not in by_order["LMF without jWAE"]
    own = outcome.numbers["clean"]["jWAE-LMF, rank 4"]["ensemble"]["raw"]["AURC"]
    assert by_order["jWAE-LMF, rank 4"]["expected probability"] == pytest.approx(own, abs=1e-6)
    # the fake's variance is largest at the smallest logits: nearly the order of the expected probability
    assert by_order["jWAE-LMF, rank 4"]["Var[y], exact"] == pytest.approx(own, abs=0.02)
    assert by_order["jWAE-LMF, rank 4"]["std of logits"] > own + 0.03
    found = {c.name: c for c in outcome.contrasts}
    assert not found["AURC, by Var[y] over std of logits"].decides
    assert found["AURC, by Var[y] over std of logits"].estimate > 0.03
    assert len(found["AURC, by Var[y] over std of logits"].fold_values) == 5 == len(found["NLL, clean"].fold_values)
    assert "Var[y], exact" in outcome.table


def test_relative_order_is_of_the_mean_logit_before_the_probit_over_the_root_of_the_variance():
    data, rng = toy_study(), np.random.default_rng(0)
    targets, fake = held_out_targets(data, (0.1,)), FakePredictor(FakeRun(data))
    row = MethodPredictors(fake.clean("row", "dev"), targets)
    mean, variance = rng.normal(size=90), rng.uniform(0.1, 4, size=90)
    outputs = np.repeat((mean / np.sqrt(1 + np.pi / 8 * variance))[None], SEEDS, 0)
    found = orders_of(row, outputs, np.repeat(variance[None], SEEDS, 0))
    wrong = ((mean >= 0) != (data.pool.target[data.test_rows].numpy() == 1)).astype(float)
    by_hand = calibration.aurc(-np.abs(mean) / variance**0.5, wrong)
    assert found["sd of y over |E[y]|, exact"].mean() == pytest.approx(by_hand)
    assert found["Var[y], exact"].mean() == pytest.approx(calibration.aurc(variance, wrong))
    assert "Var[y], exact" not in orders_of(row, outputs, None)


def test_few_examples_are_cut_into_few_bins():
    assert [bins_for(n) for n in (10, 80, 200, 5000)] == [3, 4, 10, 15]


def test_undisturbed_copies_are_detected_by_no_disagreement():
    class Undisturbed(FakePredictor):
        def corrupted(self, row, condition):
            return self.clean(row)

    run = FakeRun()
    outcome = uncertainty.measure(run, Undisturbed(run), CONDITIONS, 0.1)
    for condition in outcome.numbers["corrupted"]:
        for scores in condition["detected"].values():
            assert {score["auroc"] for score in scores.values()} == {0.5}
    strong = measured(run).numbers["corrupted"][1]["detected"]["jWAE-LMF, rank 4"]["mutual information"]
    assert strong["low"] > 0.5


@pytest.mark.parametrize(
    ("change", "made", "said"),
    [({"prior_free_row": None}, CONDITIONS, "no row without the prior"), ({}, [], "no corruption was looked at")],
)
def test_without_its_comparison_the_claim_is_not_judged(change, made, said):
    outcome = measured(replace(FakeRun(), **change), made)
    assert outcome.verdict == "cannot tell"
    assert any(said in note for note in outcome.notes)
    figure = Figure(figsize=outcome.size, layout="constrained")
    outcome.draw(figure)


def test_dev_that_is_not_like_test_is_said():
    alike, shifted = (measured(FakeRun(toy_study("regression", shift=s)), []) for s in (0.0, 2.0))
    assert not any("dev is not like test" in note for note in alike.notes)
    assert any("dev is not like test" in note for note in shifted.notes)
    level = f"coverage at {0.9:g}"
    coverage = [x.numbers["clean"]["jWAE-LMF, rank 4"]["ensemble"]["raw"][level] for x in (alike, shifted)]
    assert coverage[0] == pytest.approx(0.9, abs=0.1) and coverage[1] < 0.7


def test_temperature_that_harms_is_said():
    class Separated(FakePredictor):
        def clean(self, row, part="test"):
            if part == "test":
                return super().clean(row, part)
            target = self.data.pool.target[self.data.folds[0].dev].numpy()
            return np.tile(2 * target - 1, (SEEDS, 1))  # no error on dev: nothing bounds how sure to be

    run = FakeRun()
    said = "the temperature fitted on dev (90 examples) raises the ensemble's NLL on test, LMF without jWAE"
    assert not any(said in note for note in measured(run).notes)
    notes = uncertainty.measure(run, Separated(run), [], 0.1).notes
    assert any(said in note for note in notes)
    assert any("at its bound in the one fold: 0.05" in note for note in notes)


def test_run_selected_on_dev_is_said():
    assert any("selected on dev" in note for note in measured(FakeRun(settings={}), []).notes)


# ---- command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The command finds this run, whatever folder it is given."""
    run = FakeRun()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(uncertainty, "load_run", lambda folder, device: run)
    monkeypatch.setattr(uncertainty, "conditions", lambda run, groups, draws: CONDITIONS)
    monkeypatch.setattr(uncertainty, "Predictor", FakePredictor)
    return run


def command(*arguments: str) -> int:
    return run_command(uncertainty.execute, Options, list(arguments))


def test_command_leaves_table_figure_and_results(fake, tmp_path, capsys):
    assert command("runs/fake", "--device", "cpu") == 0
    folder = tmp_path / "runs" / "uncertainty-fake"
    results = json.loads((folder / "results.json").read_text())
    assert results["experiment"] == "uncertainty" and results["seeds"] == SEEDS
    assert [c["name"] for c in results["contrasts"] if c["decides"]] == list(uncertainty.DECIDING)
    assert (folder / "figure.png").stat().st_size > 10_000
    assert "verdict: " in (folder / "table.txt").read_text()
    assert command("runs/fake", "--device", "cpu", "--resume") == 0
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trained_on_dev": True}, "--hold-out-dev"),
        ({"seeds": (0,)}, "one seed"),
    ],
)
def test_run_trained_on_dev_or_of_one_seed_is_refused_with_exit_code_2(fake, change, said, tmp_path, capsys):
    vars(fake).update(change)
    with pytest.raises(SystemExit) as stop:
        command("runs/fake", "--device", "cpu")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert said in message and "runs/fake" in message and message.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_dev_that_is_tested_on_is_refused():
    fold = SimpleNamespace(dev=torch.tensor([1, 2]), test=torch.tensor([2, 3]))
    with pytest.raises(InputError, match="dev is what is tested on"):
        uncertainty.refuse(FakeRun(SimpleNamespace(folds=[fold], name="toy")))


@pytest.mark.parametrize(
    ("flags", "said"), [(("--draws", "0"), "--draws"), (("--alpha", "1"), "--alpha"), (("--groups", "x"), "groups")]
)
def test_flags_out_of_range_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        command("runs/none", *flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err
