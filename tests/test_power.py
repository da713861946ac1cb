"""Simulated verdicts against closed forms: noncentral t, products of independent tests, errors at the null's edges."""

import time

import numpy as np
import pytest
from scipy.stats import nct
from scipy.stats import t as student_t

from mmfusion.metrics.power import (
    VERDICTS,
    false_support,
    power_curve,
    shrunk_correlation,
    simulate,
    simulated_statistics,
    size_needed,
    verdict_of_statistics,
)

FOLDS, RATIO, DRAWS = 15, 0.25, 10_000
RHO = RATIO / (1 + RATIO)
SUPPORTED = VERDICTS.index("supported")


def verdict_of_folds(values: np.ndarray, *claim: object) -> np.ndarray:
    """Verdict codes (...) of fold values (..., C, J)."""
    return verdict_of_statistics(values.mean(-1), values.std(-1, ddof=1), values.shape[-1], *claim)


def pilot(contrasts: int, correlation: float = 0.0, std: float = 0.02, folds: int = FOLDS) -> np.ndarray:
    """(contrasts, folds) whose sample variances are std^2 exactly, sample correlations as said."""
    rng = np.random.default_rng(3)
    z = np.linalg.qr(np.column_stack([np.ones(folds), rng.standard_normal((folds, contrasts))]))[0][:, 1:]
    sigma = (1 - correlation) * np.eye(contrasts) + correlation
    return std * (folds - 1) ** 0.5 * (z @ np.linalg.cholesky(sigma).T).T


def closed_power(mean: float, std: float = 0.02, level: float = 0.05) -> float:
    """P(supported) of one contrast whose standard deviation within folds is `std`."""
    shift = mean / (std * (1 / FOLDS + RATIO) ** 0.5)
    return float(nct.sf(student_t.ppf(1 - level / 2, FOLDS - 1), FOLDS - 1, shift))


def test_power_of_one_contrast_is_noncentral_t():
    multiples = np.array([0.5, 1, 2, 3])
    found = power_curve(pilot(1), RATIO, ["a"], [0.01], multiples, DRAWS)[:, SUPPORTED]
    expected = np.array([closed_power(0.01 * k) for k in multiples])
    assert np.abs(found - expected).max() < 4 * 0.5 / DRAWS**0.5
    assert expected[-1] - expected[0] > 0.5  # the range is no flat one


def test_not_supported_is_the_closed_form_too():
    """Upper end of the 90 % interval below the effect of interest, at a true mean of 0."""
    effect, error = 0.03, 0.02 * (1 / FOLDS + RATIO) ** 0.5
    found = simulate(pilot(1), RATIO, ["a"], [effect], np.zeros(1), DRAWS)
    expected = nct.cdf(-student_t.ppf(0.95, FOLDS - 1), FOLDS - 1, -effect / error)
    assert found[0] == pytest.approx(expected, abs=4 * 0.5 / DRAWS**0.5)
    assert found.sum() == pytest.approx(1)


def test_an_effect_of_interest_is_refuted_in_five_percent():
    shares = simulate(pilot(1), RATIO, ["a"], [0.03], np.full(1, 0.03), 40_000)
    assert shares[0] == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 40_000) ** 0.5)


def test_two_independent_contrasts_of_a_group_multiply():
    single = closed_power(0.025)
    both = power_curve(pilot(2), RATIO, ["a", "a"], [0.025, 0.025], [1], DRAWS)[0, SUPPORTED]
    assert both == pytest.approx(single**2, abs=4 * 0.5 / DRAWS**0.5)


def test_two_independent_groups_add_at_half_the_level():
    single = closed_power(0.015, level=0.025)
    either = power_curve(pilot(2), RATIO, ["a", "b"], [0.015, 0.015], [1], DRAWS)[0, SUPPORTED]
    assert either == pytest.approx(1 - (1 - single) ** 2, abs=4 * 0.5 / DRAWS**0.5)


def test_contrasts_that_do_not_decide_cost_nothing():
    values = pilot(3)
    alone = simulate(values, RATIO, ["a", None, None], [0.02, 0.02, 0.02], np.array([0.02, -9, 0]), DRAWS)
    assert alone[SUPPORTED] == pytest.approx(closed_power(0.02), abs=4 * 0.5 / DRAWS**0.5)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("routes", [["a"], ["a", "a", "a"], ["a", "b", "c"], ["a", "a", "b", "b"]])
def test_false_support_is_below_its_level(routes, correlation):
    rate = false_support(pilot(len(routes), correlation), RATIO, routes, [0.01] * len(routes), 20_000)
    assert rate <= 0.025 + 4 * (0.025 * 0.975 / 20_000) ** 0.5  # an interval above 0 is one half of a two-sided test
    if routes == ["a", "a", "a"]:  # an edge, where the others are far above: all of the level is used
        assert rate > 0.02


def test_all_at_zero_is_not_the_worst_case_of_a_group():
    at_zero = simulate(pilot(3), RATIO, ["a"] * 3, [0.01] * 3, np.zeros(3), 20_000)[SUPPORTED]
    assert at_zero < 0.002 < 0.02 < false_support(pilot(3), RATIO, ["a"] * 3, [0.01] * 3, 20_000)


def test_power_rises_with_strength():
    curve = power_curve(pilot(3, 0.5), RATIO, ["a", "a", "b"], [0.01] * 3, np.linspace(0, 6, 15), DRAWS)[:, SUPPORTED]
    assert (np.diff(curve) >= 0).all() and curve[0] < 0.05 and curve[-1] > 0.9


def test_folds_are_correlated_as_the_correction_assumes():
    """Var(mean) = sigma^2 (rho + (1 - rho) / J), mean s^2 = (1 - rho) sigma^2: t has its degrees of freedom."""
    means, deviations = simulated_statistics(pilot(2, 0.6), RATIO, 40_000, 0)
    sigma2 = 0.02**2 / (1 - RHO)
    assert means.var(0) == pytest.approx(sigma2 * (RHO + (1 - RHO) / FOLDS), rel=0.03)
    assert (deviations**2).mean(0) == pytest.approx(0.02**2, rel=0.03)
    shrunk = shrunk_correlation(pilot(2, 0.6))[0, 1]
    assert np.corrcoef(means.T)[0, 1] == pytest.approx(shrunk, abs=0.02)


def test_verdicts_of_folds_follow_the_rule_by_hand():
    noise = pilot(1, std=1.0)[0]
    half = student_t.ppf(0.975, FOLDS - 1) * (1 / FOLDS + RATIO) ** 0.5
    half90 = student_t.ppf(0.95, FOLDS - 1) * (1 / FOLDS + RATIO) ** 0.5
    effect = half + half90 - 0.02  # what an interval that just holds 0 cannot exclude
    means = np.array([half + 0.01, half - 0.01, -half + 0.02, -half - 0.01, effect - half90 + 0.01])
    codes = verdict_of_folds(means[:, None, None] + noise, RATIO, ["a"], [effect])
    expected = ["supported", "cannot tell", "not supported", "not supported", "cannot tell"]
    assert [VERDICTS[code] for code in codes] == expected
    small = verdict_of_folds(means[0] + noise[None], RATIO, ["a"], [effect * 10])
    assert VERDICTS[int(small)] == "not supported"  # it exists, and is too small to matter
    assert VERDICTS[int(verdict_of_folds(means[0] + noise[None], RATIO, ["a"], [0.0]))] == "supported"


def test_one_refuted_contrast_refutes_its_group_and_no_other():
    x = np.stack([pilot(1)[0] + shift for shift in (1.0, -1.0)])
    assert VERDICTS[int(verdict_of_folds(x, RATIO, ["a", "a"], [0.1, 0.1]))] == "not supported"
    assert VERDICTS[int(verdict_of_folds(x, RATIO, ["a", "b"], [0.1, 0.1]))] == "supported"
    open_group = np.stack([pilot(1)[0], pilot(1)[0] - 1])
    assert VERDICTS[int(verdict_of_folds(open_group, RATIO, ["a", "b"], [0.01, 0.01]))] == "cannot tell"


def test_size_needed_has_the_power_asked_for():
    values, effects = pilot(1), [0.01]
    size = size_needed(values, RATIO, ["a"], effects, 500)
    shrunk = 0.02 * (500 / size) ** 0.5
    assert closed_power(0.01, shrunk) == pytest.approx(0.8, abs=0.02)
    assert size_needed(values / 2, RATIO, ["a"], effects, 500) == pytest.approx(size / 4, rel=0.02)


def test_a_contrast_without_noise_needs_one_example():
    assert size_needed(np.full((1, FOLDS), 0.3), RATIO, ["a"], [0.01], 500) == 1


def test_shrinkage_makes_more_contrasts_than_folds_positive_definite():
    values = np.random.default_rng(0).standard_normal((30, 10))
    assert np.linalg.eigvalsh(shrunk_correlation(values)).min() > 0.01
    values[3] = 0.2  # never changes
    assert np.isfinite(shrunk_correlation(values)).all() and shrunk_correlation(values)[3, 4] == 0


def test_a_curve_takes_seconds():
    start = time.perf_counter()
    power_curve(pilot(12), RATIO, ["a", "a", "b", "b"] * 3, [0.01] * 12, np.linspace(0, 5, 15), DRAWS)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "change",
    [
        {"fold_values": np.zeros((2, 1))},
        {"fold_values": np.full((2, 5), np.nan)},
        {"ratio": 0.0},
        {"routes": ["a"]},
        {"routes": [None, None]},
        {"effects": [0.1, -0.1]},
        {"true": np.zeros(3)},
    ],
)
def test_bad_designs_are_refused(change):
    arguments = {"fold_values": pilot(2), "ratio": RATIO, "routes": ["a", "a"], "effects": [0.1, 0.1]}
    with pytest.raises(ValueError):
        simulate(**{**arguments, "true": np.zeros(2), **change})
