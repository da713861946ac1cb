"""Scores and their intervals against scikit-learn and against what is known exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_absolute_error, roc_auc_score

from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.scores import (
    binary_scores,
    bootstrap_counts,
    example_losses,
    example_scores,
    regression_scores,
    weighted_auroc,
    weighted_correlation,
)


@given(st.integers(0, 10_000), st.integers(4, 60), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_weighted_auroc_equals_scikit_learn_also_with_ties(seed, n, levels):
    rng = np.random.default_rng(seed)
    target = np.r_[0, 1, rng.integers(0, 2, n - 2)]
    scores = rng.integers(0, levels, n) / levels
    weights = np.r_[np.ones((1, n)), rng.integers(0, 4, (3, n))].astype(float)
    weights[:, :2] += 1  # both classes keep some weight
    expected = [roc_auc_score(target, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(weighted_auroc(scores, target, weights), expected, atol=1e-12)


def test_weighting_without_one_class_has_no_auroc():
    assert np.isnan(weighted_auroc(np.array([0.1, 0.9]), np.array([0, 1]), np.array([[1.0, 0.0]])))[0]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_scores_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    target = np.r_[0, 1, rng.integers(0, 2, 38)]
    p = rng.random((2, 40))
    scores = binary_scores(p, target)
    assert scores["auroc"].members == pytest.approx([roc_auc_score(target, q) for q in p])
    assert scores["accuracy"].mean == pytest.approx(np.mean([accuracy_score(target, q >= 0.5) for q in p]))
    assert scores["f1"].mean == pytest.approx(np.mean([f1_score(target, q >= 0.5) for q in p]))
    assert scores["auroc"].std == pytest.approx(np.std(scores["auroc"].members, ddof=1))
    for score in scores.values():
        assert score.low <= score.high
        assert score.examples == 40


def test_interval_of_accuracy_has_the_width_that_theory_gives():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 1000)
    right = rng.random(1000) < 0.7
    score = binary_scores(np.where(right, target, 1 - target)[None] * 1.0, target)["accuracy"]
    theory = 2 * 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert score.high - score.low == pytest.approx(theory, rel=0.1)


def test_interval_of_auroc_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    criterion = 0.7602  # Phi(1 / sqrt(2)) for two normals one std apart
    covered = 0
    for trial in range(200):
        target = np.repeat([0, 1], 75)
        scores = rng.normal(size=150) + target
        p = 1 / (1 + np.exp(-scores))
        score = binary_scores(p[None], target, seed=trial)["auroc"]
        covered += score.low <= criterion <= score.high
    # binomial(200, .95): mean 190, std 3.1; the percentile interval is a little short at this n
    assert 178 <= covered <= 199


def test_interval_is_that_of_the_members_mean():
    rng = np.random.default_rng(2)
    target = rng.integers(0, 2, 200)
    good, bad = target + rng.normal(size=200) / 4, rng.normal(size=200)
    together = binary_scores(1 / (1 + np.exp(-np.array([good, bad]))), target)
    counts = bootstrap_counts(200)
    for name, by_hand in (
        ("auroc", (weighted_auroc(good, target, counts) + weighted_auroc(bad, target, counts)) / 2),
        ("accuracy", counts @ (((good >= 0) == target) * 1.0 + ((bad >= 0) == target)) / 400),
    ):
        expected = np.percentile(by_hand, [2.5, 97.5])
        np.testing.assert_allclose([together[name].low, together[name].high], expected, atol=1e-9)


def test_one_member_has_no_spread_over_seeds():
    assert binary_scores(np.array([[0.2, 0.8]]), np.array([0, 1]))["auroc"].std is None


def test_one_class_alone_is_an_error():
    with pytest.raises(ValueError, match="one class alone"):
        binary_scores(np.array([[0.2, 0.8]]), np.array([1, 1]))


def test_resamples_have_the_size_of_the_sample():
    counts = bootstrap_counts(37, seed=3)
    assert (counts.sum(1) == 37).all()
    assert not (counts == 1).all()


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_scores_by_name_equal_scikit_learn_and_leave_the_others_as_they_are(seed):
    rng = np.random.default_rng(seed)
    target = np.r_[0, 1, rng.integers(0, 2, 38)]
    p = rng.random((2, 40))
    p[0, :2] = 0, 1
    named = binary_scores(p, target, seed, names=("log_loss", "weighted_f1", "auroc"))
    assert list(named) == ["log_loss", "weighted_f1", "auroc"]
    assert named["log_loss"].members == pytest.approx([log_loss(target, q) for q in p])
    assert named["weighted_f1"].members == pytest.approx([f1_score(target, q >= 0.5, average="weighted") for q in p])
    default = binary_scores(p, target, seed)
    assert list(default) == ["auroc", "accuracy", "f1"]
    assert named["auroc"] == default["auroc"]


def resampled(draws, score):
    """2.5 and 97.5 % of a score, computed example list by example list: the slow reference."""
    lists = (np.repeat(np.arange(draws.shape[1]), row.astype(int)) for row in draws)
    return np.percentile([score(rows) for rows in lists], [2.5, 97.5])


def test_intervals_by_name_equal_a_loop_over_resamples():
    rng = np.random.default_rng(3)
    target = rng.integers(0, 2, 60)
    p = expit(target + rng.normal(size=(2, 60)))
    draws = bootstrap_counts(60, seed=4)
    scores = binary_scores(p, target, 4, names=("weighted_f1", "log_loss"))
    for name, one in (
        ("weighted_f1", lambda y, q: f1_score(y, q >= 0.5, average="weighted", zero_division=0.0)),
        ("log_loss", lambda y, q: log_loss(y, q, labels=[0, 1])),
    ):
        expected = resampled(draws, lambda rows, one=one: np.mean([one(target[rows], q[rows]) for q in p]))
        np.testing.assert_allclose([scores[name].low, scores[name].high], expected, atol=1e-12)


def test_one_class_alone_still_has_scores_other_than_auroc():
    score = binary_scores(np.array([[0.2, 0.8]]), np.array([1, 1]), names=("accuracy", "weighted_f1"))
    assert score["accuracy"].mean == 0.5
    assert score["weighted_f1"].mean == pytest.approx(2 / 3)


def test_unknown_score_is_an_error():
    with pytest.raises(ValueError, match="recall"):
        binary_scores(np.array([[0.2, 0.8]]), np.array([0, 1]), names=("auroc", "recall"))


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_regression_scores_equal_scikit_learn_and_scipy(seed, members, outputs):
    rng = np.random.default_rng(seed)
    target = 100 + rng.normal(size=(30, outputs))
    x = target + rng.normal(size=(members, 30, outputs))
    scores = regression_scores(x, target, seed)
    assert list(scores) == ["mae", "correlation"]
    assert scores["mae"].members == pytest.approx([mean_absolute_error(target, p) for p in x])
    expected = [np.mean([pearsonr(p[:, o], target[:, o]).statistic for o in range(outputs)]) for p in x]
    assert scores["correlation"].members == pytest.approx(expected)
    assert scores["correlation"].std == (pytest.approx(np.std(expected, ddof=1)) if members > 1 else None)
    if outputs == 1:  # (S, N) is (S, N, 1)
        assert regression_scores(x[..., 0], target[:, 0], seed) == scores


def test_regression_intervals_equal_a_loop_over_resamples():
    rng = np.random.default_rng(5)
    target = rng.normal(size=(40, 2))
    x = target + rng.normal(size=(2, 40, 2))
    scores = regression_scores(x, target, 6)
    draws = bootstrap_counts(40, seed=6)

    def correlation(rows):
        return np.mean([pearsonr(p[rows, o], target[rows, o]).statistic for p in x for o in range(2)])

    for name, one in (("mae", lambda rows: np.abs(x - target)[:, rows].mean()), ("correlation", correlation)):
        np.testing.assert_allclose([scores[name].low, scores[name].high], resampled(draws, one), atol=1e-9)


def test_interval_of_correlation_has_the_width_that_theory_gives():
    rng = np.random.default_rng(7)
    target = rng.normal(size=2000)
    score = regression_scores(0.6 * target[None] + 0.8 * rng.normal(size=(1, 2000)), target)["correlation"]
    assert score.high - score.low == pytest.approx(2 * 1.96 * (1 - 0.6**2) / np.sqrt(2000), rel=0.1)


def test_constant_output_counts_zero_in_the_correlation():
    target = np.random.default_rng(8).normal(size=(20, 2))
    x = target.copy()
    x[:, 1] = 0.1  # not exact in binary: centring leaves rounding
    assert regression_scores(x[None], target)["correlation"].mean == pytest.approx(0.5)
    assert regression_scores(target[None], x)["correlation"].mean == pytest.approx(0.5)
    # resamples of two examples alone, level in x: constant, but their weighted variance rounds to 1e-16, not to 0
    x = target.copy()
    x[1] = x[0]
    draws = np.zeros((19, 20))
    draws[:, 0] = np.arange(1, 20)
    draws[:, 1] = 20 - draws[:, 0]
    np.testing.assert_array_equal(weighted_correlation(x, target, draws), np.zeros((19, 2)))
    np.testing.assert_array_equal(weighted_correlation(target, x, draws), np.zeros((19, 2)))


def test_sentiment_scores_equal_an_example_worked_by_hand():
    target = np.array([-3.0, -0.5, 0.0, 0.0, 1.4, 2.5])
    x = np.array([[-4.0, -1.2, -0.2, 0.3, 0.0, 1.8]])
    scores = regression_scores(x, target, label_range=(-3.0, 3.0))
    # rounded: target -3 0 0 0 1 2 (halves to even), prediction -3 -1 0 0 0 2
    assert scores["accuracy_7"].mean == pytest.approx(4 / 6)
    # >= 0: target 0 0 1 1 1 1, prediction 0 0 0 1 1 1
    assert scores["accuracy_2_has0"].mean == pytest.approx(5 / 6)
    assert scores["f1_has0"].mean == pytest.approx(2 / 6 * 4 / 5 + 4 / 6 * 6 / 7)
    # without the two zeros, > 0: target 0 0 1 1, prediction 0 0 0 1
    assert scores["accuracy_2_non0"].mean == pytest.approx(3 / 4)
    assert scores["f1_non0"].mean == pytest.approx(1 / 2 * 4 / 5 + 1 / 2 * 2 / 3)
    assert [scores[name].examples for name in ("mae", "f1_has0", "accuracy_2_non0", "f1_non0")] == [6, 6, 4, 4]


def test_sentiment_intervals_equal_a_loop_over_resamples():
    rng = np.random.default_rng(9)
    target = np.clip(np.round(2 * rng.normal(size=50)), -3, 3)
    x = target + rng.normal(size=(2, 50))
    scores = regression_scores(x, target, 10, (-3, 3))
    draws = bootstrap_counts(50, seed=10)

    def without_zeros(rows):
        rows = rows[target[rows] != 0]
        return np.mean([f1_score(target[rows] > 0, p[rows] > 0, average="weighted") for p in x])

    def with_zeros(rows):
        return np.mean([accuracy_score(target[rows] >= 0, p[rows] >= 0) for p in x])

    for name, one in (("f1_non0", without_zeros), ("accuracy_2_has0", with_zeros)):
        np.testing.assert_allclose([scores[name].low, scores[name].high], resampled(draws, one), atol=1e-12)
    assert list(regression_scores(x, target, label_range=(1, 7))) == ["mae", "correlation"]


@pytest.mark.parametrize(
    "predictions, target, label_range, message",
    [
        (np.zeros((2, 5)), np.zeros(4), None, r"\(2, 5\).*\(4,\)"),
        (np.zeros(5), np.zeros(5), None, r"\(5,\)"),
        (np.zeros((1, 5, 2)), np.zeros(5), None, "do not fit"),
        (np.full((1, 5), np.nan), np.zeros(5), None, "NaN"),
        (np.zeros((1, 5)), np.zeros(5), (-3.0, 3.0), "is 0"),
        (np.zeros((1, 5, 2)), np.ones((5, 2)), (-3.0, 3.0), "one number"),
    ],
)
def test_unfit_predictions_are_an_error(predictions, target, label_range, message):
    with pytest.raises(ValueError, match=message):
        regression_scores(predictions, target, label_range=label_range)


def test_example_scores_average_to_the_score_of_every_member():
    rng = np.random.default_rng(11)
    target, logits = rng.integers(0, 2, 50), rng.normal(size=(3, 50))
    by_example = example_scores(logits, target, "binary")
    assert by_example.shape == (3, 50)
    assert by_example.mean(1) == pytest.approx(binary_scores(expit(logits), target)["accuracy"].members)
    for shape in ((50,), (50, 4)):
        y, x = rng.normal(size=shape), rng.normal(size=(3, *shape))
        by_example = example_scores(x, y, "regression")
        assert by_example.shape == (3, 50)
        assert by_example.mean(1) == pytest.approx(-np.array(regression_scores(x, y)["mae"].members))


def test_example_losses_average_to_the_loss_and_stay_finite_at_any_logit():
    rng = np.random.default_rng(12)
    target, logits = rng.integers(0, 2, 50), 3 * rng.normal(size=(3, 50))
    losses = example_losses(logits, target, "binary")
    assert losses.mean(1) == pytest.approx(
        binary_scores(expit(logits), target, names=("log_loss",))["log_loss"].members
    )
    extreme = example_losses(np.array([[1e4, -1e4, 40.0]]), np.array([0, 0, 1]), "binary")
    np.testing.assert_allclose(extreme, [[1e4, 0.0, np.exp(-40)]])
    y, x = rng.normal(size=(50, 2)), rng.normal(size=(3, 50, 2))
    np.testing.assert_allclose(example_losses(x, y, "regression"), ((x - y) ** 2).mean(-1))
    np.testing.assert_allclose(example_losses(x[..., 0], y[:, 0], "regression"), (x - y)[..., 0] ** 2)


@pytest.mark.parametrize("function", [example_scores, example_losses])
@pytest.mark.parametrize(
    "predictions, target, task, message",
    [
        (np.zeros((1, 3)), np.array([0, 1, 2]), "binary", "0 and 1"),
        (np.zeros((1, 3, 1)), np.zeros((3, 1)), "binary", r"\(3, 1\)"),
        (np.zeros((1, 3)), np.zeros(4), "regression", "do not fit"),
        (np.zeros((1, 3)), np.zeros(3), "ranking", "ranking"),
    ],
)
def test_example_scores_refuse_what_the_task_does_not_allow(function, predictions, target, task, message):
    with pytest.raises(ValueError, match=message):
        function(predictions, target, task)


def test_mean_has_its_spread_over_seeds_and_one_seed_has_none():
    assert mean_std([0.9, 1.0, 1.1]) == "1.000 +- 0.100"
    assert mean_std(np.array([0.5])) == "0.500"
    assert mean_std([0.9, 1.1], 2, (0.8, 1.25)) == "1.00 +- 0.14 [0.80, 1.25]"
    assert mean_std([0.5], interval=(0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert mean_std(np.float64(2)) == "2.000"


def test_one_of_a_thing_is_singular():
    assert [counted(n, "seed") for n in (0, 1, 2)] == ["0 seeds", "1 seed", "2 seeds"]
