"""Planted labels: whoever knows the truth reaches the stated scores, and nobody finds what is not there."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from mmfusion.data.folds import FoldedDataset
from mmfusion.data.planted import PLANTED_KINDS, PlantedConfig, components_of, plant
from mmfusion.data.planted_truth import expected_auroc
from mmfusion.data.registry import DataOptions, check_flags, load_datasets, load_folded
from mmfusion.dataset import Fold, Split
from mmfusion.errors import InputError
from mmfusion.sequences import Sequences

N = 6000
TRAIN, TEST = np.arange(N // 2), np.arange(N // 2, N)
DATA = Path(os.environ.get("FUSION_DATA", ""))


def folded(n: int = N, task: str = "binary", columns: int | None = None, names=("text", "audio"), **changes):
    """Skewed features of modalities that depend on each other, and labels that say nothing."""
    rng = np.random.default_rng(1)
    common = rng.standard_normal((n, 2))
    features = {}
    for width, name in enumerate(names, 12):
        x = np.hstack([common, rng.standard_normal((n, width - 2))]) @ rng.standard_normal((width, width))
        features[name] = torch.from_numpy(np.exp(x / x.std() / 2).astype(np.float32))
    target = torch.from_numpy(rng.integers(0, 2, n if columns is None else (n, columns))).float()
    pool = Split(features, target, [str(i) for i in range(n)])
    train, test = torch.arange(n // 2), torch.arange(n // 2, n)
    return FoldedDataset("own", task, pool, [Fold(train, test, test)], [], {"source": "drawn"}, **changes)


def products(truth) -> np.ndarray:
    """(N, Q + q_1 q_2) true components and the products of two modalities' components."""
    z = list(truth.components.values())
    crossed = (z[0][:, :, None] * z[1][:, None]).reshape(len(z[0]), -1)
    return np.hstack([*z, crossed])


def fitted_auroc(design: np.ndarray, labels: np.ndarray) -> float:
    model = LogisticRegression(C=10.0, max_iter=2000).fit(design[TRAIN], labels[TRAIN])
    return roc_auc_score(labels[TEST], model.decision_function(design[TEST]))


@pytest.mark.parametrize("kind", ["imbalance", "dropout", "calibration"])
def test_logistic_regression_on_the_components_reaches_the_best_auroc(kind):
    data, truth = plant(folded(), PlantedConfig(kind, strength=0.5))
    labels = data.pool.target.numpy()
    reached = fitted_auroc(np.hstack([*truth.components.values()]), labels)
    assert reached == pytest.approx(truth.best(TEST)["auroc"], abs=0.02)  # 3000 labels: standard error .008 at most
    assert reached > 0.65


def test_regression_with_products_reaches_the_best_auroc_of_an_interaction_and_none_without():
    data, truth = plant(folded(), PlantedConfig(strength=0.5, noise=0.2))
    labels, best = data.pool.target.numpy(), truth.best(TEST)["auroc"]
    assert fitted_auroc(products(truth), labels) == pytest.approx(best, abs=0.025)
    assert fitted_auroc(np.hstack([*truth.components.values()]), labels) < best - 0.1


def test_strength_zero_leaves_no_interaction():
    data, truth = plant(folded(), PlantedConfig(strength=0.0))
    z, labels = np.hstack([*truth.components.values()]), data.pool.target.numpy()
    assert np.abs(truth.bilinear).max() == 0
    without, best = fitted_auroc(z, labels), truth.best(TEST)["auroc"]
    assert without == pytest.approx(best, abs=0.02)
    assert fitted_auroc(products(truth), labels) <= without + 0.005


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_interaction_has_the_rank_and_the_share_that_are_planted(rank, strength):
    _, truth = plant(folded(names=("a", "b", "c")), PlantedConfig(rank=rank, strength=strength))
    assert truth.pair == ("a", "b")
    values = np.linalg.svd(truth.bilinear, compute_uv=False)
    assert (values > 1e-9).sum() == rank and values[rank - 1] == pytest.approx(values[0])
    f = truth.logit
    assert f.mean() == pytest.approx(0, abs=1e-9) and f.var() == pytest.approx(1)
    # what no linear function of the components says is I: its share of the variance
    design = np.hstack([np.ones((N, 1)), *truth.components.values()])
    rest = f - design @ np.linalg.lstsq(design, f, rcond=None)[0]
    assert rest.var() == pytest.approx(strength)


def test_components_are_white_and_hold_no_outliers():
    x = np.random.default_rng(0).standard_t(2, (500, 30))
    z = components_of(x)
    assert z.shape == (500, 8)
    np.testing.assert_allclose(z.T @ z / 500, np.eye(8), atol=1e-8)
    assert np.abs(components_of(x)).max() < 10 < np.abs((x - x.mean(0)) / x.std(0)).max()


def test_components_do_not_hang_on_rounding():
    x = np.random.default_rng(0).standard_normal((300, 20)).astype(np.float32)
    for shape in (x, x[:15]):
        noisy = shape * (1 + 1e-7 * np.random.default_rng(1).standard_normal(shape.shape))
        np.testing.assert_allclose(components_of(noisy), components_of(shape), atol=1e-3)


def test_signs_of_components_are_fixed_and_one_wild_value_is_no_component():
    x = np.random.default_rng(0).standard_normal((300, 10)) * np.arange(1, 11)
    x = x @ np.linalg.qr(np.random.default_rng(1).standard_normal((10, 10)))[0]
    loadings = ((x - x.mean(0)) / x.std(0)).T @ components_of(x)
    assert (loadings[np.abs(loadings).argmax(0), np.arange(8)] > 0).all()
    x[:, 3] = 0
    x[7, 3] = 1e6  # of deviation 1 once standardised, all of it in one example
    assert np.abs(components_of(x)).max() < 5


def test_components_of_few_examples_and_of_few_directions():
    rng = np.random.default_rng(0)
    wide = components_of(rng.standard_normal((20, 300)))
    np.testing.assert_allclose(wide.T @ wide / 20, np.eye(8), atol=1e-8)
    assert components_of(np.repeat(rng.standard_normal((50, 1)), 4, 1)).shape == (50, 1)
    assert components_of(np.ones((50, 4))).shape == (50, 0)


def test_stated_scores_are_those_of_the_true_probabilities_over_draws_of_the_labels():
    _, truth = plant(folded(400), PlantedConfig(strength=0.4, noise=0.5))
    p, rng = truth.probability, np.random.default_rng(0)
    draws = [rng.random(400) < p for _ in range(400)]
    best = truth.best()
    for name, score in {
        "auroc": lambda y: roc_auc_score(y, p),
        "accuracy": lambda y: accuracy_score(y, p > 0.5),
        "log loss": lambda y: log_loss(y, p),
    }.items():
        values = np.array([score(y) for y in draws])
        assert best[name] == pytest.approx(values.mean(), abs=4 * values.std() / 20 + 1e-4), name


def test_expected_auroc_of_certain_labels_is_the_plain_one():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200).astype(float), rng.integers(0, 20, 200) / 20  # with ties
    assert expected_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_expected_auroc_counts_pairs_over_all_draws_of_six_labels():
    p, scores = np.array([0.1, 0.3, 0.5, 0.6, 0.8, 0.9]), np.array([1.0, 3, 2, 2, 5, 4])
    ordered = pairs = 0.0
    for labels in itertools.product((0, 1), repeat=6):
        weight = np.where(labels, p, 1 - p).prod()
        for i, j in itertools.product(range(6), repeat=2):
            if labels[i] > labels[j]:
                pairs += weight
                ordered += weight * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    assert expected_auroc(scores, p) == pytest.approx(ordered / pairs)


def test_prediction_without_a_modality_is_the_mean_over_its_residuals():
    """Against two loops, for the first and the second of the multiplied modalities, and a third."""
    own = folded(60, names=("a", "b", "c"))
    features = own.pool.features | {"a": own.pool.features["a"][:, :5]}  # 5 components: B is not square
    _, truth = plant(replace(own, pool=replace(own.pool, features=features)), PlantedConfig(strength=0.6))
    for name in truth.components:
        others = np.hstack([z for other, z in truth.components.items() if other != name])
        z = truth.components[name]
        guess = others @ np.linalg.lstsq(others, z, rcond=None)[0]
        expected = np.empty(60)
        for i in range(60):
            values = []
            for j in range(60):
                there = {n: x[i] for n, x in truth.components.items()} | {name: guess[i] + z[j] - guess[j]}
                f = truth.constant + sum(there[n] @ truth.linear[n] for n in there)
                values.append(expit((f + there["a"] @ truth.bilinear @ there["b"]) / truth.noise))
            expected[i] = np.mean(values)
        np.testing.assert_allclose(truth.prediction_without(name), expected, atol=1e-10)


def test_a_model_without_the_modality_reaches_the_stated_auroc():
    data, truth = plant(folded(), PlantedConfig("dropout", strength=0.6))
    z, labels = truth.components["text"], data.pool.target.numpy()
    assert fitted_auroc(z, labels) == pytest.approx(truth.without("audio", TEST)["auroc"], abs=0.025)
    assert truth.without("audio")["auroc"] < truth.best()["auroc"] - 0.1


def test_dropout_of_strength_zero_costs_nothing_and_of_one_everything():
    _, none = plant(folded(), PlantedConfig("dropout", strength=0.0))
    assert none.without("audio") == pytest.approx(none.best())
    _, all_of_it = plant(folded(), PlantedConfig("dropout", strength=1.0, modality="text"))
    assert all_of_it.without("audio") == pytest.approx(all_of_it.best())
    assert all_of_it.without("text")["accuracy"] < all_of_it.best()["accuracy"] - 0.15


def test_accuracy_is_a_straight_line_in_the_rate_of_missing_examples():
    data, truth = plant(folded(), PlantedConfig("dropout", strength=0.7))
    labels, rng = data.pool.target.numpy() > 0.5, np.random.default_rng(0)
    missing = rng.random(N) < 0.3
    guess = np.where(missing, truth.prediction_without("audio"), truth.probability) > 0.5
    assert truth.accuracy_at(0.3, "audio") == pytest.approx((guess == labels).mean(), abs=4 * 0.5 / N**0.5)
    ends = [truth.accuracy_at(rate, "audio") for rate in (0, 0.5, 1)]
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2) and ends[0] > ends[2] + 0.05


def test_imbalance_moves_the_linear_part_to_one_modality():
    norms = {}
    for strength in (0.0, 0.5, 1.0):
        _, truth = plant(folded(names=("a", "b", "c")), PlantedConfig("imbalance", strength=strength, modality="b"))
        squares = {name: float(b @ b) for name, b in truth.linear.items()}
        norms[strength] = {name: value / sum(squares.values()) for name, value in squares.items()}
        assert truth.logit.var() == pytest.approx(1)
    assert norms[0.0] == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert norms[0.5] == pytest.approx({"a": 1 / 6, "b": 2 / 3, "c": 1 / 6})
    assert norms[1.0] == pytest.approx({"a": 0, "b": 1, "c": 0})


def test_calibration_of_strength_one_is_a_coin():
    best = [plant(folded(), PlantedConfig("calibration", strength=s))[1].best()["log loss"] for s in (0.0, 0.6, 1.0)]
    assert best[0] < best[1] < best[2] == pytest.approx(np.log(2))


def test_regression_scores_are_those_of_draws():
    data, truth = plant(folded(task="regression"), PlantedConfig(strength=0.3, noise=0.5))
    y = data.pool.target.numpy().astype(np.float64)
    assert data.task == "regression" and len(np.unique(y)) > N / 2
    for guess, stated in ((truth.logit, truth.best()), (truth.prediction_without("text"), truth.without("text"))):
        assert stated["mae"] == pytest.approx(np.abs(y - guess).mean(), abs=0.03)
        assert stated["r2"] == pytest.approx(1 - ((y - guess) ** 2).mean() / y.var(), abs=0.03)
    assert truth.best()["mae"] == pytest.approx(0.5 * (2 / np.pi) ** 0.5)
    assert truth.best()["r2"] == pytest.approx(0.8)


@pytest.mark.parametrize("kind", PLANTED_KINDS)
def test_planting_is_reproducible_and_changes_nothing_but_the_target(kind):
    own = folded(500)
    data, truth = plant(own, PlantedConfig(kind))
    again, _ = plant(own, PlantedConfig(kind))
    other, other_truth = plant(own, PlantedConfig(kind, seed=1))
    assert torch.equal(data.pool.target, again.pool.target) and not torch.equal(data.pool.target, other.pool.target)
    assert abs(np.corrcoef(truth.logit, other_truth.logit)[0, 1]) < 0.9  # another function too
    for name, x in own.pool.features.items():
        assert torch.equal(x, data.pool.features[name])
    assert data.folds == own.folds and data.pool.ids == own.pool.ids
    assert data.description["planted"]["kind"] == kind and data.description["source"] == "drawn"
    assert "planted" in data.notes[-1] and f"{truth.best(TEST // 12)['auroc']:.2f}"[:3] in data.notes[-1]


def test_labels_are_planted_over_the_means_of_sequences():
    own = folded(100)
    parts = {name: [row.repeat(3, 1) for row in x] for name, x in own.pool.features.items()}
    pool = replace(own.pool, features={name: Sequences(rows) for name, rows in parts.items()})
    planted = plant(replace(own, pool=pool), PlantedConfig())[0]
    assert torch.equal(planted.pool.target, plant(own, PlantedConfig())[0].pool.target)


@pytest.mark.parametrize(
    "data, config, message",
    [
        (dict(task="regression", columns=3), {}, "regression target of 3 outputs"),
        (dict(task="multilabel", columns=2), {}, "multilabel target"),
        (dict(task="multiclass"), {}, "multiclass target"),
        (dict(labelled=False), {}, "no labels"),
        (dict(names=("text",)), {}, "has text alone"),
        (dict(names=("text",)), {"kind": "dropout"}, "needs two modalities"),
        ({}, {"kind": "imbalance", "modality": "smell"}, "--plant-modality smell: there are audio, text"),
        ({}, {"modality": "text"}, "no use with --plant interaction"),
        ({}, {"rank": 9}, "--plant-rank 9: give a number from 1 to 8"),
        ({}, {"strength": 1.5}, "--plant-strength 1.5"),
        ({}, {"strength": float("nan")}, "--plant-strength nan"),
        ({}, {"noise": 0.0}, "--plant-noise 0.0"),
        ({}, {"kind": "rank"}, "--plant 'rank': give interaction or"),
        ({}, {"seed": -1}, "--plant-seed -1"),
    ],
)
def test_what_cannot_be_planted_is_refused_in_one_line(data, config, message):
    with pytest.raises(InputError, match=r"^[^\n]*$") as raised:
        plant(folded(200, **data), PlantedConfig(**config))
    assert message in str(raised.value)


def test_constant_missing_and_few_directions_are_refused():
    own = folded(200)
    for change, message in (
        (lambda x: torch.zeros_like(x), "audio of own is the same in every example"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("nan")), "audio of own holds missing values"),
        (lambda x: x[:, :1].repeat(1, 5), "vary in 1 and 8 components; give at most 1"),
    ):
        features = own.pool.features | {"audio": change(own.pool.features["audio"])}
        with pytest.raises(InputError) as raised:
            plant(replace(own, pool=replace(own.pool, features=features)), PlantedConfig())
        assert message in str(raised.value)


def test_flags_plant_over_a_data_set_for_experiments_alone():
    options = DataOptions(dataset="synthetic", synthetic_examples=400, plant="interaction", plant_rank=3, plant_seed=4)
    check_flags(options)
    data, own = load_folded(options), load_folded(replace(options, plant=None))
    assert data.provenance["planted"]["rank"] == 3 and "dials" in data.provenance
    assert not torch.equal(data.pool.target, own.pool.target)
    expected = plant(own, PlantedConfig(rank=3, seed=4))[0]
    assert torch.equal(data.pool.target, expected.pool.target)
    with pytest.raises(InputError, match="--plant interaction: labels are planted for experiments alone"):
        load_datasets(options)


def test_flags_of_planting_without_planting_are_refused():
    with pytest.raises(InputError, match="--plant-rank: has no use without --plant"):
        check_flags(DataOptions(plant_rank=3))
    with pytest.raises(InputError, match=r"--plant-strength 2\.0"):
        check_flags(DataOptions(plant="interaction", plant_strength=2.0))


@pytest.mark.skipif(
    not (DATA / "cmu_mosi_utterances.npz").is_file(), reason="FUSION_DATA names no folder with cmu_mosi_utterances.npz"
)
def test_truth_on_real_features_is_reached_by_who_knows_the_components():
    options = DataOptions(dataset="cmu_mosi", data=DATA / "cmu_mosi_utterances.npz", folds=5)
    data, truth = plant(load_folded(options), PlantedConfig("imbalance", strength=0.3))
    labels, z = data.pool.target.numpy(), np.hstack([*truth.components.values()])
    scores = np.empty(len(labels))
    for fold in data.folds:
        rows = torch.cat([fold.train, fold.dev]).numpy()
        model = LogisticRegression(max_iter=1000).fit(z[rows], labels[rows])
        scores[fold.test] = model.decision_function(z[fold.test])
    tested = data.test_rows.numpy()
    reached = roc_auc_score(labels[tested], scores[tested])
    assert reached == pytest.approx(truth.best(tested)["auroc"], abs=0.02)
