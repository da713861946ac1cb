"""Sets and intervals with promised coverage: it holds on drawn data, and fails where examples are drawn otherwise."""

import numpy as np
import pytest

from mmfusion.data.arrays import ArraysConfig
from mmfusion.estimators import FusionClassifier, FusionRegressor
from mmfusion.metrics.conformal import Conformal
from mmfusion.models.fusion import ModelConfig
from mmfusion.runs.folder import RunConfig
from mmfusion.train import Config, fit
from mmfusion.training.recipe import TrainingConfig

REPEATS, N = 400, 60


def draw(task: str, count: int, rng: np.random.Generator, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of a model that is wrong, and targets; `shift` moves the targets from what it says."""
    x = rng.normal(size=(count, 3))
    if task == "regression":
        return x[:, 0], x[:, 0] + (1 + shift) * rng.normal(size=count)
    logits = 2 * x
    if task == "multiclass":
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        y = (x + (0.7 + shift) * rng.gumbel(size=x.shape)).argmax(1)
        return p, y
    p = 1 / (1 + np.exp(-logits))
    y = (rng.random(x.shape) < 1 / (1 + np.exp(-(1 - shift) * x))).astype(float)
    return (p, y) if task == "multilabel" else (p[:, 0], y[:, 0])


def covered(task: str, coverage: float, shift: float = 0.0) -> float:
    rng, shares = np.random.default_rng(0), []
    for _ in range(REPEATS):
        conformal = Conformal.fit(*draw(task, N, rng), task)
        p, y = draw(task, N, rng, shift)
        if task == "regression":
            found = conformal.intervals(p, coverage)
            shares.append(((found.low <= y) & (y <= found.high)).mean())
        else:
            sets = conformal.label_sets(p, coverage).sets
            shares.append(np.take_along_axis(sets, y.astype(int)[..., None], -1).mean())
    return float(np.mean(shares))


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("coverage", [0.6, 0.9])
def test_coverage_holds_over_draws_and_is_not_bought_with_more(task, coverage):
    noise = 4 * (coverage * (1 - coverage) * 2 / N / REPEATS) ** 0.5
    assert coverage - noise < covered(task, coverage) < coverage + 1 / (N + 1) + noise


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_coverage_is_lost_where_examples_are_drawn_otherwise(task):
    assert covered(task, 0.9, shift=3.0) < 0.85


def test_too_few_examples_promise_by_saying_nothing():
    p, y = np.array([[0.7, 0.2, 0.1]] * 5), np.zeros(5)
    found = Conformal.fit(p, y, "multiclass").label_sets(p, 0.9)
    assert found.sets.all() and found.abstains.all()
    assert np.isinf(Conformal.fit(p[:, 0], y, "regression").intervals(p[:, 0], 0.9).high).all()


def test_mistakes_of_conformal_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Conformal.fit(np.zeros((3, 2)), np.zeros((3, 2)), "multiclass")
    with pytest.raises(ValueError, match="NaN"):
        Conformal.fit(np.full(3, np.nan), np.zeros(3), "regression")
    conformal = Conformal.fit(np.full(3, 0.5), np.zeros(3), "binary")
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal.label_sets(np.full(3, 0.5), 90)
    with pytest.raises(ValueError, match="no intervals"):
        conformal.intervals(np.full(3, 0.5), 0.9)


# ---- estimators and runs -------------------------------------------------------------------------------------------

SMALL = {
    "n_members": 2,
    "epochs": 15,
    "learning_rate": 0.01,
    "latent_dim": 4,
    "hidden_dim": 8,
    "rank": 2,
    "random_state": 0,
    "device": "cpu",
}


def data(count: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    x = {"audio": rng.normal(size=(count, 5)), "text": rng.normal(size=(count, 4))}
    return x, x["audio"][:, 0] + x["text"][:, 0] + 0.5 * rng.normal(size=count)


def test_a_classifier_covers_new_examples_with_sets_of_its_own_labels():
    (x, v), (new, w), (third, u) = data(300), data(500, 1), data(2000, 2)
    labels = np.array(["high", "low", "middle"])  # sorted, as scikit-learn has them
    model = FusionClassifier(**SMALL).fit(x, labels[np.digitize(v, [-0.7, 0.7])])
    assert model.predict(new, coverage=0.9).sets.shape == (500, 3)  # of the validation examples of fit
    y = labels[np.digitize(u, [-0.7, 0.7])]
    found = model.calibrate(new, labels[np.digitize(w, [-0.7, 0.7])]).predict(third, coverage=0.8)
    inside = found.sets[np.arange(2000), np.searchsorted(model.classes_, y)].mean()
    assert 0.74 < inside < 0.86
    np.testing.assert_array_equal(found.prediction, model.predict(third))
    np.testing.assert_array_equal(found.abstains, found.sets.sum(1) != 1)
    assert 0 < found.abstains.mean() < 1
    with pytest.raises(ValueError, match="did not see"):
        model.calibrate(new, np.array(["other"] * 500))


def test_a_regressor_without_validation_examples_must_be_calibrated():
    (x, y), (new, w), (third, u) = data(300), data(500, 1), data(2000, 2)
    model = FusionRegressor(**SMALL, keep="last").fit(x, y)
    with pytest.raises(ValueError, match="call calibrate"):
        model.predict(new, coverage=0.9)
    found = model.calibrate(new, w).predict(third, coverage=0.9)
    assert 0.86 < ((found.low <= u) & (u <= found.high)).mean() < 0.94
    with pytest.raises(ValueError, match="whole examples"):
        model.predict({"audio": x["audio"]}, missing="prior", coverage=0.9)


@pytest.mark.parametrize("kind", ["prior", "training"])
def test_estimators_take_absent_keys_none_and_rows_of_nan(kind):
    x, v = data(120)
    y = (v > 0).astype(int)
    nan = np.full_like(x["text"], np.nan)
    model = FusionClassifier(**SMALL).fit(x, y)
    p = model.predict_proba({"audio": x["audio"]}, missing=kind)
    np.testing.assert_allclose(p, model.predict_proba(x | {"text": nan}, missing=kind))
    np.testing.assert_array_equal(model.predict({"audio": x["audio"]}, missing=kind), p.argmax(1))
    found = model.predict_missing({"audio": x["audio"]}, kind)
    np.testing.assert_allclose(found.prediction, p[:, 1], rtol=1e-6)
    assert found.std.shape == (120, 1) and (found.std > 0).all()
    with pytest.raises(ValueError, match="lacks the modalities"):
        model.predict({"audio": x["audio"]})
    listed = FusionClassifier(**SMALL).fit(list(x.values()), y)
    np.testing.assert_allclose(listed.predict_proba([x["audio"], None], missing=kind), p, rtol=1e-5)
    one = np.hstack(list(x.values()))
    sliced = FusionClassifier(**SMALL, modalities={"audio": slice(0, 5), "text": slice(5, 9)}).fit(one, y)
    np.testing.assert_allclose(sliced.predict_proba(np.hstack([x["audio"], nan]), missing=kind), p, rtol=1e-5)
    with pytest.raises(ValueError, match="NaN"):
        sliced.predict(np.hstack([x["audio"], nan]))


@pytest.mark.parametrize("folds", [None, 3])
def test_a_run_covers_and_integrates(folds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (x, v), (new, w) = data(240), data(400, 1)
    config = Config(
        data=ArraysConfig(folds=folds, hold_out=None if folds else 0.2),
        training=TrainingConfig(seeds=2, epochs=4, device="cpu"),
        model=ModelConfig(4, 8, 2),
        run=RunConfig(name="small"),
    )
    run = fit(x | {"target": (v > 0).astype(int)}, config)
    y = (w > 0).astype(int)
    by_default = run.predict(new, coverage=0.9)
    assert by_default.sets.shape == (400, 2)
    found = run.calibrate(new, y).predict(new, coverage=0.9)
    assert found.sets[np.arange(400), y].mean() >= 0.9  # on the very examples it was calibrated on
    for kind in ("prior", "training"):
        part = run.predict_missing({"text": new["text"]}, kind)
        np.testing.assert_allclose(run.predict({"text": new["text"]}, kind), part.prediction, rtol=1e-5)
        assert (part.std > 0).all()
    with pytest.raises(ValueError, match="whole examples"):
        run.predict(new, "prior", 0.9)
