"""Random-effects estimates: a published meta-analysis, closed cases, and the rate of false positives."""

import numpy as np
import pytest
from scipy.stats import t as student_t

from mmfusion.metrics.pooled import pooled, pooled_traits, reml_variance

# Colditz et al. 1994, thirteen trials of the BCG vaccine: ill and well with the vaccine, ill and well without
BCG = np.array([
    [4, 119, 11, 128], [6, 300, 29, 274], [3, 228, 11, 209], [62, 13536, 248, 12619], [33, 5036, 47, 5761],
    [180, 1361, 372, 1079], [8, 2537, 10, 619], [505, 87886, 499, 87892], [29, 7470, 45, 7232],
    [17, 1699, 65, 1600], [186, 50448, 141, 27197], [5, 2493, 3, 2338], [27, 16886, 29, 17825],
])  # fmt: skip


def bcg() -> tuple[np.ndarray, np.ndarray]:
    """Log relative risks with their standard errors."""
    a, b, c, d = BCG.T.astype(float)
    return np.log(a / (a + b)) - np.log(c / (c + d)), np.sqrt(1 / a - 1 / (a + b) + 1 / c - 1 / (c + d))


def test_bcg_trials_give_the_published_estimate():
    estimates, errors = bcg()
    found = pooled(estimates, errors)
    assert found.tau**2 == pytest.approx(0.3132, abs=5e-5)
    assert found.estimate == pytest.approx(-0.7145, abs=5e-5)
    assert (found.low, found.high) == pytest.approx((-1.1084, -0.3206), abs=1e-4)  # metafor's rma(test = "knha")
    assert found.p == pytest.approx(0.0019, abs=5e-5)


def test_reml_variance_is_where_the_restricted_score_vanishes():
    estimates, errors = bcg()
    tau2 = reml_variance(estimates, errors**2)
    w = 1 / (errors**2 + tau2)
    mean = w @ estimates / w.sum()
    score = w**2 @ (estimates - mean) ** 2 - w.sum() + (w**2).sum() / w.sum()
    assert abs(score) < 1e-5


def test_equal_errors_give_the_closed_form():
    y = np.array([0.0, 1.0, 2.0, 5.0])
    found = pooled(y, np.full(4, 0.5))
    half = student_t.ppf(0.975, 3) * (y.var(ddof=1) / 4) ** 0.5
    assert found.tau**2 == pytest.approx(y.var(ddof=1) - 0.25, rel=1e-6)  # variance of the estimates less their errors'
    assert (found.estimate, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)
    width = student_t.ppf(0.975, 2) * (found.tau**2 + y.var(ddof=1) / 4) ** 0.5
    assert (found.prediction_low, found.prediction_high) == pytest.approx((2 - width, 2 + width), rel=1e-6)


def test_estimates_that_agree_keep_the_width_of_their_errors():
    found = pooled([0.1, 0.1 + 1e-9, 0.1], [0.02, 0.03, 0.04])
    error = (1 / sum(1 / s**2 for s in (0.02, 0.03, 0.04))) ** 0.5
    assert found.tau == 0
    assert found.high - found.low == pytest.approx(2 * student_t.ppf(0.975, 2) * error)


def test_two_corpora_predict_no_third():
    found = pooled([0.0, 0.1], [0.02, 0.03])
    assert found.prediction_low is None and found.prediction_high is None


@pytest.mark.parametrize("tau", [0.0, 0.02])
def test_a_mean_of_zero_is_found_significant_in_five_percent_at_most(tau):
    """Five corpora of unequal size. With 2000 draws a rate of .05 has a standard error of .005; three of them: .065."""
    rng = np.random.default_rng(0)
    errors = np.array([0.008, 0.01, 0.015, 0.02, 0.03])
    draws = rng.standard_normal((2000, 5)) * np.sqrt(errors**2 + tau**2)
    rate = np.mean([pooled(y, errors).p < 0.05 for y in draws])
    assert rate <= 0.065
    if tau:  # a fixed-effect z-test of the same draws, for comparison, is wrong four times as often
        w = errors**-2
        assert np.mean(np.abs(draws @ w) / w.sum() ** 0.5 > 1.96) > 0.2


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_traits_with_common_errors_are_not_found_significant_too_often(common):
    """As above; errors that all traits of a corpus share would make plain pooling wrong in half of the cases."""
    rng = np.random.default_rng(1)
    traits, folds, ratio, draws = 17, 15, 0.25, 2000
    rho = ratio / (1 + ratio)

    def noise(*shape: int) -> np.ndarray:  # (draws, traits, ...), correlated by `common` over traits
        shared = rng.standard_normal((draws, 1, *shape))
        return common**0.5 * shared + (1 - common) ** 0.5 * rng.standard_normal((draws, traits, *shape))

    x = rho**0.5 * noise(1) + (1 - rho) ** 0.5 * noise(folds)
    found = [pooled_traits(values, ratio) for values in x]
    assert np.mean([one.p < 0.05 for one in found]) <= 0.065
    if common:
        errors = x.std(-1, ddof=1) * (1 / folds + ratio) ** 0.5
        plain = [pooled(values.mean(-1), e).p < 0.05 for values, e in zip(x[:300], errors[:300], strict=True)]
        assert np.mean(plain) > 0.3


def test_traits_that_differ_are_told_apart_from_noise():
    rng = np.random.default_rng(2)
    values = 0.05 * rng.standard_normal((17, 1)) + 0.001 * rng.standard_normal((17, 15))
    assert pooled_traits(values, 0.25).tau == pytest.approx(values.mean(1).std(ddof=1), rel=0.01)
    assert pooled_traits(values - values.mean(1, keepdims=True), 0.25).tau == 0


def test_spread_of_traits_is_unbiased_by_errors_in_common():
    """Mean of tau^2 over 300 corpora whose traits differ by .02; errors of .012 are nine tenths in common."""
    rng = np.random.default_rng(4)
    traits, folds, ratio = 17, 15, 0.25
    found = []
    for _ in range(300):
        parts = rng.standard_normal((1, folds + 1)), rng.standard_normal((traits, folds + 1))
        noise = 0.02 * (0.9**0.5 * parts[0] + 0.1**0.5 * parts[1])
        values = 0.02 * rng.standard_normal((traits, 1)) + ratio**0.5 * noise[:, :1] + noise[:, 1:]
        found.append(pooled_traits(values, ratio).tau ** 2)
    assert np.mean(found) == pytest.approx(0.02**2, abs=4 * np.std(found) / 300**0.5)


@pytest.mark.parametrize(
    "estimates, errors",
    [([0.1], [0.1]), ([0.1, 0.2], [0.1]), ([0.1, np.nan], [0.1, 0.1]), ([0.1, 0.2], [0.1, 0.0]), ([0, 1], [0.1, -0.1])],
)
def test_what_cannot_be_pooled_is_refused(estimates, errors):
    with pytest.raises(ValueError, match="standard errors"):
        pooled(estimates, errors)


def test_traits_of_wrong_shape_or_ratio_are_refused():
    with pytest.raises(ValueError, match=r"\(T, J\)"):
        pooled_traits(np.zeros((1, 5)), 0.25)
    with pytest.raises(ValueError, match="ratio"):
        pooled_traits(np.zeros((2, 5)), 0.0)
