"""Uncertainty of several classes and labels: against scikit-learn, against definitions, and a run to its end."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import entropy
from sklearn.metrics import log_loss

from experiments.uncertainty import measure as uncertainty
from experiments.uncertainty.measure import Options
from experiments.uncertainty.predictors import PARTS, PREDICTORS, HeldOutTargets, MethodPredictors
from mmfusion.cli import run_command
from mmfusion.data.arrays import ArraysConfig
from mmfusion.losses.expected import moderated_logits
from mmfusion.metrics.calibration import aurc, fit_temperature, set_summary
from mmfusion.metrics.classes import (
    class_entropy,
    class_mutual_information,
    class_set_summary,
    ensemble_log_probabilities,
    likeliest_log_odds,
    multiclass_scores,
    multilabel_scores,
)
from mmfusion.train import Config, fit
from mmfusion.training.fit import Method
from mmfusion.training.recipe import TrainingConfig

K, N, C = 3, 120, 4
TASKS = ("multiclass", "multilabel")
PROBABILITIES = {"multiclass": lambda logits: softmax(logits, -1), "multilabel": expit}


def drawn(task: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, HeldOutTargets]:
    """Logits (K, N, C) of dev and test that are twice too large, and targets drawn from what is right; two folds."""
    rng, outputs, drawn_targets = np.random.default_rng(seed), [], []
    for _ in ("dev", "test"):
        logits = 1.5 * rng.normal(size=(N, C))
        if task == "multiclass":
            target = (logits + rng.gumbel(size=logits.shape)).argmax(1)
        else:
            target = rng.random((N, C)) < expit(logits)
        drawn_targets.append(target.astype(float))
        outputs.append(2 * (logits + 0.3 * rng.normal(size=(K, N, C))))
    folds = np.repeat([0, 1], [50, N - 50])
    return *outputs, HeldOutTargets(task, *drawn_targets, folds, folds, np.ones(1), (0.1,))


# ---- ensembles of classes ----------------------------------------------------------------------------------------


def test_ensemble_of_classes_is_the_mean_probability_and_stays_finite():
    logits = drawn("multiclass")[1]
    np.testing.assert_allclose(np.exp(ensemble_log_probabilities(logits)), softmax(logits, -1).mean(0))
    far = ensemble_log_probabilities(np.array([[[900.0, 0.0, -900.0]], [[900.0, 0.0, -900.0]]]))
    np.testing.assert_allclose(far, [[0.0, -900.0, -1800.0]])


def test_entropy_and_mutual_information_of_classes_equal_their_definitions():
    logits = drawn("multiclass")[1]
    p = softmax(logits, -1)
    np.testing.assert_allclose(class_entropy(np.log(p)), entropy(p, axis=-1))
    np.testing.assert_allclose(
        class_mutual_information(logits), entropy(p.mean(0), axis=-1) - entropy(p, axis=-1).mean(0)
    )
    assert class_mutual_information(logits[[0, 0]]).max() < 1e-12
    apart = class_mutual_information(100 * np.eye(3)[:, None])  # three sure members, each of another class
    np.testing.assert_allclose(apart, np.log(3))


def test_log_odds_of_the_likeliest_class_keep_the_order_of_its_probability_where_that_rounds_to_one():
    logits = drawn("multiclass")[1]
    np.testing.assert_allclose(expit(likeliest_log_odds(logits)), softmax(logits, -1).max(-1))
    assert np.diff(likeliest_log_odds(np.array([[60.0, 0, 0], [90.0, 0, 0]])))[0] == pytest.approx(30)


def test_sets_of_classes_are_counted_as_by_hand():
    p = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.5, 0.5, 0.0], [0.34, 0.33, 0.33]])
    found = class_set_summary(p, np.array([0, 2, 1, 0]), np.array([0.31, 0.7, 0.51, 0.1]))
    # {0} holds 0; {0, 1} lacks 2; {0, 1} holds 1; {} lacks 0
    assert found == pytest.approx((0.5, 0.0, 5 / 4, 1 / 4, 1 / 4))


# ---- predictors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_measures_of_an_ensemble_equal_the_tasks_scores_of_its_mean_probability(task):
    dev, test, targets = drawn(task)
    predictor = PREDICTORS[task](dev, targets)
    found, p = predictor.measures(test), PROBABILITIES[task](test).mean(0)
    scores = {"multiclass": multiclass_scores, "multilabel": multilabel_scores}[task](
        p[None], targets.test, names=("log_loss", "brier", "ece")
    )
    for ours, theirs in (("NLL", "log_loss"), ("Brier", "brier"), ("ECE, equal width", "ece")):
        assert found[ours] == pytest.approx(scores[theirs].mean), ours
    if task == "multiclass":
        wrong = p.argmax(1) != targets.test
        assert found["NLL"] == pytest.approx(log_loss(targets.test, p))
        uncertainty = -p.max(1)
    else:
        wrong = ((p >= 0.5) != targets.test).mean(1)
        uncertainty = -np.maximum(p, 1 - p).mean(1)
    parts = [targets.test_fold == f for f in range(2)]
    by_fold = [(rows.sum(), aurc(uncertainty[rows], wrong[rows])) for rows in parts]
    assert found["AURC"] == pytest.approx(sum(size * value for size, value in by_fold) / len(wrong))


@pytest.mark.parametrize("task", TASKS)
def test_one_temperature_of_each_fold_comes_from_its_dev_part_and_mends_what_is_too_sure(task):
    dev, test, targets = drawn(task)
    predictor = PREDICTORS[task](dev, targets)
    logits = predictor.combine(dev)
    for fold in (0, 1):
        rows = targets.dev_fold == fold
        assert predictor.temperature[fold] == fit_temperature(logits[rows], targets.dev[rows])
    assert (predictor.temperature > 1.3).all()  # they are twice too large, and the mean over members softens them
    scaled = predictor.logits(test, "scaled") * predictor.temperature[targets.test_fold][:, None]
    np.testing.assert_allclose(scaled, predictor.logits(test))
    raw, mended = (predictor.measures(test, how) for how in ("raw", "scaled"))
    assert mended["NLL"] < raw["NLL"] and mended["ECE, equal width"] < raw["ECE, equal width"]


@pytest.mark.parametrize("task", TASKS)
def test_conformal_sets_of_each_fold_and_label_have_its_own_quantile(task):
    dev, test, targets = drawn(task)
    predictor, p = PREDICTORS[task](dev, targets), PROBABILITIES[task](test).mean(0)
    dev_p, found = PROBABILITIES[task](dev).mean(0), predictor.measures(test)
    quantile = np.empty((2, C))
    for fold in (0, 1):
        rows = targets.dev_fold == fold
        n = int(rows.sum())
        for c in range(C):
            if task == "multiclass":
                scores = 1 - dev_p[rows][np.arange(n), targets.dev[rows].astype(int)]
            else:
                scores = np.where(targets.dev[rows, c] == 1, 1 - dev_p[rows, c], dev_p[rows, c])
            quantile[fold, c] = np.sort(scores)[int(np.ceil((n + 1) * 0.9)) - 1]
    of_test = quantile[targets.test_fold]
    if task == "multiclass":
        expected = class_set_summary(p, targets.test, of_test[:, 0])._asdict()
    else:
        summaries = [set_summary(p[:, c], targets.test[:, c], of_test[:, c]) for c in range(C)]
        expected = dict(zip(summaries[0]._fields, np.mean(summaries, 0), strict=True))
    assert {name: found[f"{name} at 0.9"] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS)
def test_parts_by_seed_have_the_ensembles_measure_as_mean_and_its_floor_bounds_what_is_right(task):
    dev, test, targets = drawn(task)
    row = MethodPredictors(dev, targets)
    measures = row.measures(test, floor=True)["ensemble"]
    for name, of in PARTS.items():
        parts = row.by_seed(test, of)
        assert parts.shape == (K, N) and parts.mean() == pytest.approx(measures["raw"][name])
    for kind in ("width", "mass"):
        assert measures["raw"][f"ECE, equal {kind}"] > measures["raw"][f"ECE, equal {kind}, floor 95 %"]
        assert measures["scaled"][f"ECE, equal {kind}"] < 2 * measures["scaled"][f"ECE, equal {kind}, floor"]


@pytest.mark.parametrize("task", TASKS)
def test_disagreement_is_what_the_probabilities_know_and_grows_with_noise(task):
    dev, test, targets = drawn(task)
    predictor = PREDICTORS[task](dev, targets)
    clean = predictor.disagreement(test)
    noisy = predictor.disagreement(test + 3 * np.random.default_rng(0).normal(size=test.shape))
    assert all(x.shape == (N,) for x in clean.values())
    for name in ("mutual information", "std of logits"):
        assert (noisy[name] > clean[name]).mean() > 0.8
    if task == "multiclass":  # a constant that one member adds to all its logits changes nothing
        shifted = predictor.disagreement(test + np.array([0.0, 5.0, -7.0])[:, None, None])
        for name, values in clean.items():
            np.testing.assert_allclose(shifted[name], values)


# ---- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_run_of_classes_or_labels_is_measured_to_the_end(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(150, 4)), rng.normal(size=(150, 3))
    target = (np.stack([a[:, 0], b[:, 0], a[:, 1] - b[:, 1]], 1) > 0).astype(int)
    if task == "multiclass":
        target = target.sum(1)  # 0 .. 3
    stacks = [[Method("jWAE-LMF", ("a", "b")), Method("jWAE-LMF, no prior", ("a", "b"), prior=False)]]
    run = fit(
        {"a": a, "b": b, "target": target}, Config(ArraysConfig(folds=3), TrainingConfig(seeds=2, epochs=2)), stacks
    )
    flags = [str(run.folder), "--groups", "missing", "--draws", "1", "--device", "cpu", "--name", "measured"]
    assert run_command(uncertainty.execute, Options, flags) == 0
    results = json.loads(Path("runs/measured/results.json").read_text())
    assert [c["name"] for c in results["contrasts"] if c["decides"]] == list(uncertainty.DECIDING)
    # the members of a fold predict its test part; their mean probability is the ensemble's
    p, y = [], []
    for f, fold in enumerate(run.trained.data.folds):
        test = {name: x[fold.test] for name, x in run.trained.data.pool.features.items()}
        members = run.trained.members("jWAE-LMF", f)
        outputs = [m(test, reconstruct=False) for m in members]
        said = [moderated_logits(x.prediction, x.covariance, task).detach().double().numpy() for x in outputs]
        said = np.stack(said)
        p.append(PROBABILITIES[task](said).mean(0))
        y.append(run.trained.data.pool.target[fold.test].numpy())
    p, y = np.concatenate(p), np.concatenate(y)
    scores = {"multiclass": multiclass_scores, "multilabel": multilabel_scores}[task](
        p[None], y, names=("log_loss", "ece")
    )
    ensemble = results["numbers"]["clean"]["jWAE-LMF"]["ensemble"]["raw"]
    assert ensemble["NLL"] == pytest.approx(scores["log_loss"].mean, abs=1e-5)
    assert ensemble["ECE, equal width"] == pytest.approx(scores["ece"].mean, abs=1e-5)
    assert ensemble["coverage at 0.9"] > 0.75
    assert len(results["numbers"]["temperature"]["jWAE-LMF"]["ensemble"]) == 3
    assert Path("runs/measured/figure.png").stat().st_size > 10_000
