"""Calibration against scikit-learn, against slow references, and against what is known exactly."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, softmax
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from mmfusion.metrics.calibration import (
    TEMPERATURES,
    aurc,
    aurc_parts,
    binary_entropy,
    calibration_error,
    calibration_error_floor,
    conformal_quantile,
    detection,
    ensemble_logits,
    excess_aurc,
    fit_temperature,
    gaussian_nll,
    label_scores,
    mutual_information,
    reliability,
    risk_coverage,
    set_summary,
)
from mmfusion.metrics.scores import example_losses, weighted_auroc

SEEDS = st.integers(0, 10_000)


def binary(seed: int, n: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n,) and targets (n,) of both classes."""
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=n), np.r_[0, 1, rng.integers(0, 2, n - 2)]


# ---- ensembles ---------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_nll_and_brier_of_the_ensemble_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    logits, (_, target) = 3 * rng.normal(size=(4, 80)), binary(seed)
    p = expit(logits).mean(0)
    together = ensemble_logits(logits)
    assert example_losses(together[None], target, "binary").mean() == pytest.approx(log_loss(target, p))
    assert np.square(expit(together) - target).mean() == pytest.approx(brier_score_loss(target, p))


def test_ensemble_of_extreme_logits_stays_finite():
    np.testing.assert_allclose(ensemble_logits(np.array([[800.0], [800.0]])), [800.0])
    # half of the probability is 1, half is 0
    np.testing.assert_allclose(ensemble_logits(np.array([[800.0], [-800.0]])), [0.0])
    assert mutual_information(np.array([[800.0], [-800.0]]))[0] == pytest.approx(np.log(2))


def test_mutual_information_is_zero_where_members_agree_and_equals_its_definition():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(5, 60))
    p = expit(logits)

    def entropy(q):
        return -q * np.log(q) - (1 - q) * np.log(1 - q)

    np.testing.assert_allclose(mutual_information(logits), entropy(p.mean(0)) - entropy(p).mean(0), atol=1e-12)
    np.testing.assert_allclose(binary_entropy(logits), entropy(p), atol=1e-12)
    np.testing.assert_allclose(mutual_information(np.repeat(logits[:1], 5, 0)), 0, atol=1e-12)


# ---- calibration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "strategy"), [("width", "uniform"), ("mass", "quantile")])
@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_reliability_equals_scikit_learn_and_ece_a_loop_over_bins(kind, strategy, seed):
    logits, target = binary(seed)
    p = np.round(expit(logits), 2)  # ties, and values on the edges
    found = reliability(p, target, 10, kind)
    observed, predicted = calibration_curve(target, p, n_bins=10, strategy=strategy)
    np.testing.assert_allclose(found.observed, observed)
    np.testing.assert_allclose(found.predicted, predicted)
    assert found.count.sum() == 80
    edges = np.linspace(0, 1, 11) if kind == "width" else np.quantile(p, np.linspace(0, 1, 11))
    edges[0], total = -1, 0.0
    for low, high in pairwise(edges):
        inside = (p > low) & (p <= high)
        total += abs((p[inside] - target[inside]).sum())
    assert calibration_error(p, target, 10, kind) == pytest.approx(total / 80)


@pytest.mark.parametrize("kind", ["width", "mass"])
def test_ece_of_perfectly_calibrated_draws_is_at_its_floor(kind):
    rng = np.random.default_rng(1)
    p = expit(2 * rng.normal(size=300))
    floor = calibration_error_floor(p, kind=kind)
    drawn = np.array([calibration_error(p, rng.random(300) < p, kind=kind) for _ in range(300)])
    error = np.hypot(floor.std() / len(floor) ** 0.5, drawn.std() / len(drawn) ** 0.5)
    assert abs(drawn.mean() - floor.mean()) < 4 * error
    overconfident = calibration_error(expit(3 * logit(p)), rng.random(300) < p, kind=kind)
    assert overconfident > np.quantile(calibration_error_floor(expit(3 * logit(p)), kind=kind), 0.99)


@pytest.mark.parametrize(("n", "expected"), [(100, 0.121), (500, 0.054), (1000, 0.038)])
def test_floor_of_uniform_probabilities_is_what_theory_gives(n, expected):
    # sum over 15 bins of n_b / n sqrt(2 / pi) sqrt(E p(1 - p) / n_b), E sqrt(p(1 - p)) = pi / 8
    assert np.sqrt(2 / np.pi) * np.pi / 8 * np.sqrt(15 / n) == pytest.approx(expected, abs=6e-4)
    p = (np.arange(n) + 0.5) / n
    assert calibration_error_floor(p).mean() == pytest.approx(expected, rel=0.04)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_temperature_never_raises_the_nll_it_was_fitted_on_and_is_the_minimum(seed):
    logits, target = binary(seed, 40)
    temperature = fit_temperature(logits, target)

    def nll(t):
        return example_losses(logits[None] / t, target, "binary").mean()

    assert nll(temperature) <= nll(1.0) + 1e-12
    slow = minimize_scalar(lambda b: nll(1 / b), bounds=(1 / TEMPERATURES[1], 1 / TEMPERATURES[0]), method="bounded")
    assert nll(temperature) <= slow.fun + 1e-9


def test_temperature_that_was_planted_is_recovered():
    rng = np.random.default_rng(2)
    logits = 1.5 * rng.normal(size=50_000)
    target = rng.random(50_000) < expit(logits)
    for planted in (0.4, 1.0, 2.5):
        assert fit_temperature(planted * logits, target) == pytest.approx(planted, rel=0.04)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_temperature_of_classes_is_the_minimum_of_the_log_loss(seed):
    rng = np.random.default_rng(seed)
    logits, target = 3 * rng.normal(size=(80, 4)), rng.integers(0, 4, 80)
    target[:50] = logits[:50].argmax(1)

    def loss(t: float) -> float:
        return log_loss(target, softmax(logits / t, -1), labels=range(4))

    best = minimize_scalar(loss, bounds=TEMPERATURES, method="bounded", options={"xatol": 1e-9})
    found = fit_temperature(logits, target)
    assert found == pytest.approx(best.x, rel=1e-4) and loss(found) < loss(1.0)
    # the softmax does not know a constant in each row
    assert fit_temperature(logits + rng.normal(size=(80, 1)), target) == pytest.approx(found)


def test_two_classes_and_several_labels_have_the_temperature_of_their_margins():
    logits, target = binary(3)
    assert fit_temperature(np.stack([0 * logits, logits], 1), target) == pytest.approx(fit_temperature(logits, target))
    labels, there = logits.reshape(-1, 4), target.reshape(-1, 4)
    assert fit_temperature(labels, there) == fit_temperature(logits, target)


def test_temperature_stays_within_its_bounds():
    separable = np.array([-1.0, -2.0, 1.0, 2.0])
    target = np.array([0, 0, 1, 1])
    assert fit_temperature(separable, target) == TEMPERATURES[0]
    assert fit_temperature(-separable, target) == TEMPERATURES[1]
    assert fit_temperature(np.zeros(4), target) == 1.0


def test_gaussian_nll_equals_scipy():
    rng = np.random.default_rng(3)
    y, mean, variance = rng.normal(size=20), rng.normal(size=20), rng.random(20) + 0.1
    np.testing.assert_allclose(gaussian_nll(y, mean, variance), -norm.logpdf(y, mean, variance**0.5))


# ---- selective prediction ----------------------------------------------------------------------------------------


def slow_aurc(uncertainty, loss):
    order = np.argsort(uncertainty)
    return np.mean([loss[order[: k + 1]].mean() for k in range(len(loss))])


@given(SEEDS, st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_aurc_equals_brute_force(seed, n):
    rng = np.random.default_rng(seed)
    uncertainty, loss = rng.normal(size=n), rng.integers(0, 2, n).astype(float)
    assert aurc(uncertainty, loss) == pytest.approx(slow_aurc(uncertainty, loss))
    assert risk_coverage(uncertainty, loss)[-1] == pytest.approx(loss.mean())
    best = min(slow_aurc(rng.normal(size=n), loss) for _ in range(20))
    assert 0 <= excess_aurc(uncertainty, loss) + 1e-12
    assert aurc(loss, loss) <= best + 1e-12
    assert excess_aurc(loss, loss) == 0


def test_aurc_of_ties_is_the_mean_over_their_orders():
    rng = np.random.default_rng(4)
    uncertainty, loss = rng.integers(0, 3, 12), rng.integers(0, 2, 12).astype(float)
    orders = [slow_aurc(uncertainty + 0.1 * rng.random(12), loss) for _ in range(4000)]
    assert aurc(uncertainty, loss) == pytest.approx(np.mean(orders), abs=4 * np.std(orders) / 4000**0.5)
    assert aurc(np.zeros(12), loss) == pytest.approx(loss.mean())


def test_parts_of_aurc_have_it_as_mean_and_equal_a_jackknife_in_a_loop():
    rng = np.random.default_rng(5)
    loss = rng.random(30)
    for uncertainty in (rng.normal(size=30), rng.integers(0, 6, 30), np.zeros(30)):  # without ties, with, ties alone
        parts = aurc_parts(uncertainty, loss)
        left_out = np.array([aurc(np.delete(uncertainty, i), np.delete(loss, i)) for i in range(30)])
        whole = aurc(uncertainty, loss)
        np.testing.assert_allclose(parts, whole + 29 * (left_out.mean() - left_out))
        assert parts.mean() == pytest.approx(whole)


def test_parts_of_aurc_have_the_spread_of_its_bootstrap():
    rng = np.random.default_rng(6)
    uncertainty = rng.random(400)
    loss = (rng.random(400) < 0.5 * uncertainty).astype(float)
    rows = rng.integers(0, 400, (1500, 400))
    resampled = [aurc(uncertainty[r], loss[r]) for r in rows]
    assert aurc_parts(uncertainty, loss).std() / 20 == pytest.approx(np.std(resampled), rel=0.12)


# ---- split-conformal prediction ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "alpha", "k"), [(9, 0.1, 9), (10, 0.1, 10), (19, 0.05, 19), (99, 0.1, 90), (9, 0.3, 7), (4, 0.5, 3)]
)
def test_conformal_quantile_has_the_exact_finite_sample_index(n, alpha, k):
    scores = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert conformal_quantile(scores, alpha) == k
    np.testing.assert_array_equal(conformal_quantile(np.stack([scores, 2 * scores], 1), alpha), [k, 2 * k])


def test_conformal_quantile_of_too_few_scores_is_infinite():
    assert conformal_quantile(np.arange(8.0), 0.1) == np.inf
    np.testing.assert_array_equal(conformal_quantile(np.zeros((8, 3)), 0.1), np.full(3, np.inf))


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_conformal_sets_cover_exchangeable_data_as_promised_and_no_more(alpha):
    rng = np.random.default_rng(7)
    covered = []
    for _ in range(600):
        logits = 2 * rng.normal(size=149)
        target = (rng.random(149) < expit(0.5 * logits)).astype(int)  # overconfident: coverage does not mind
        p = expit(logits)
        scores = label_scores(p)[np.arange(149), target]
        covered.append(set_summary(p[49:], target[49:], conformal_quantile(scores[:49], alpha)).coverage)
    exact = np.ceil(50 * (1 - alpha)) / 50  # no ties
    assert np.mean(covered) == pytest.approx(exact, abs=4 * np.std(covered) / 600**0.5)
    assert exact >= 1 - alpha


def test_prediction_sets_are_counted_as_by_hand():
    p, target = np.array([0.9, 0.2, 0.5, 0.6]), np.array([1, 1, 0, 0])
    sets = set_summary(p, target, 0.45)  # {1}, {0}, {}, {1}
    assert sets == (0.25, 0.0, 0.5, 0.75, 0.25, 0.0)
    assert set_summary(p, target, np.array([0.95, 0.45, 0.5, 0.45])).both == 0.5
    assert np.isnan(set_summary(p, np.ones(4), 0.45).coverage_0)


def test_temperature_changes_no_conformal_set():
    logits, target = binary(8, 200)
    for t in (0.3, 4.0):
        summaries = []
        for scaled in (logits, logits / t):
            p = expit(scaled)
            quantile = conformal_quantile(label_scores(p[:100])[np.arange(100), target[:100]], 0.2)
            summaries.append(set_summary(p[100:], target[100:], quantile))
        assert summaries[0] == summaries[1]


# ---- detection ---------------------------------------------------------------------------------------------------


def test_detection_is_a_coin_where_nothing_is_corrupted():
    score = np.random.default_rng(9).normal(size=50)
    assert detection(score, score).auroc == 0.5
    found = detection(score, np.stack([score, score]))
    assert found.low <= 0.5 <= found.high and found.high - found.low < 1e-6  # pairs: no sampling noise is left


def test_detection_equals_scikit_learn_and_a_loop_over_resamples():
    rng = np.random.default_rng(10)
    clean = np.round(rng.normal(size=40), 1)
    corrupted = np.round(clean + 0.5 + rng.normal(size=(3, 40)), 1)
    found = detection(clean, corrupted, seed=1)
    label = np.repeat([0, 1], 40)
    each = [roc_auc_score(label, np.r_[clean, copy]) for copy in corrupted]
    assert found.auroc == pytest.approx(np.mean(each))
    counts = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=1000).astype(float)
    slow = np.mean([weighted_auroc(np.r_[clean, copy], label, np.tile(counts, 2)) for copy in corrupted], 0)
    np.testing.assert_allclose([found.low, found.high], np.percentile(slow, [2.5, 97.5]), atol=1e-6)


def test_detection_resamples_groups_together():
    rng = np.random.default_rng(11)
    clean = np.repeat(rng.normal(size=20), 10)
    corrupted = np.repeat(clean[::10] + 0.5 + rng.normal(size=20), 10)
    groups = [f"{i // 10}" for i in range(200)]
    alone, together = detection(clean, corrupted), detection(clean, corrupted, groups)
    assert alone.auroc == together.auroc
    assert together.high - together.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: calibration_error(np.array([0.5, 1.1]), np.array([0, 1])), r"\[0, 1\]"),
        (lambda: reliability(np.zeros(3), np.zeros(4)), r"\(3,\).*\(4,\)"),
        (lambda: reliability(np.zeros(3), np.full(3, 2)), "0 or 1"),
        (lambda: reliability(np.zeros(3), np.zeros(3), 15, "equal"), "equal"),
        (lambda: aurc(np.zeros(3), np.array([0, np.nan, 1])), "NaN"),
        (lambda: aurc_parts(np.zeros(1), np.zeros(1)), "left out"),
        (lambda: conformal_quantile(np.zeros(3), 1.0), "alpha"),
    ],
)
def test_what_does_not_fit_is_an_error(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_only_affected_copies_count_in_detection():
    rng = np.random.default_rng(0)
    clean, spoiled = rng.normal(size=200), rng.normal(size=(2, 200)) + 3
    affected = rng.random((2, 200)) < 0.25
    mixed = np.where(affected, spoiled, clean)
    alone = detection(clean, mixed, affected=affected)
    by_hand = np.mean([value > clean for value in spoiled[affected]])
    assert alone.auroc == pytest.approx(by_hand, abs=1e-6) and alone.low < by_hand < alone.high
    assert detection(clean, mixed).auroc < 0.7 < alone.auroc
    with pytest.raises(ValueError, match="no copy is affected"):
        detection(clean, mixed, affected=np.zeros(200, bool))
