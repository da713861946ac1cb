"""Scores and their intervals against scikit-learn and against what is known exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from metrics import binary_scores, bootstrap_counts, weighted_auroc


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
    truth = 0.7602  # Phi(1 / sqrt(2)) for two normals one std apart
    covered = 0
    for trial in range(200):
        target = np.repeat([0, 1], 75)
        scores = rng.normal(size=150) + target
        p = 1 / (1 + np.exp(-scores))
        score = binary_scores(p[None], target, seed=trial)["auroc"]
        covered += score.low <= truth <= score.high
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
