"""Intervals against SciPy, a simulated two-way model, simulated folds and what is known exactly."""

import warnings

import numpy as np
import pytest
from scipy import stats

from mmfusion.metrics.statistics import (
    crossed_bootstrap,
    grouped,
    power_at,
    resampled_student,
    seeds_needed,
    student,
    variance_components,
)


def two_way(rng, seeds, examples, mean=0.0, seed_std=1.0, example_std=1.0, interaction_std=1.0):
    """(seeds, examples) of the model that the module's docstring writes down."""
    a = seed_std * rng.normal(size=(seeds, 1))
    b = example_std * rng.normal(size=(1, examples))
    return mean + a + b + interaction_std * rng.normal(size=(seeds, examples))


@pytest.mark.parametrize("shape", [(1, 400), (40,), (40, 1)])
def test_one_way_interval_equals_scipy_and_normal_theory(shape):
    d = np.random.default_rng(0).normal(0.2, 1.0, size=shape)
    ours = crossed_bootstrap(d, seed=5)
    theirs = stats.bootstrap((d.ravel(),), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(5))
    np.testing.assert_allclose(ours.distribution, theirs.bootstrap_distribution, atol=1e-12)
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, atol=1e-12)
    assert ours.standard_error == pytest.approx(float(theirs.standard_error))
    error = d.std() / np.sqrt(d.size)
    assert ours.standard_error == pytest.approx(error, rel=0.03)
    assert ours.high - ours.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert ours.estimate == pytest.approx(d.mean())


def test_crossed_resample_is_the_mean_over_drawn_rows_and_columns():
    d = np.random.default_rng(1).normal(size=(3, 5))
    # every mean that some choice of rows and columns can give, by plain indexing
    rows = np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)
    columns = np.stack(np.meshgrid(*[range(5)] * 5), -1).reshape(-1, 5)
    means = d[rows].mean(1)[:, columns].mean(-1).ravel()
    ours = crossed_bootstrap(d, resamples=2000).distribution
    nearest = np.sort(means)[np.clip(np.searchsorted(np.sort(means), ours), 1, means.size - 1)[:, None] - [0, 1]]
    assert np.abs(nearest - ours[:, None]).min(1).max() < 1e-12
    # the exact distribution is uniform over the choices: mean and spread agree within Monte-Carlo error
    assert ours.mean() == pytest.approx(means.mean(), abs=4 * means.std() / np.sqrt(2000))
    assert ours.std() == pytest.approx(means.std(), rel=0.08)


def test_crossed_variance_is_owens_and_larger_than_either_one_way_bootstrap():
    rng = np.random.default_rng(2)
    seeds, examples = 20, 300
    d = two_way(rng, seeds, examples, seed_std=0.3)
    crossed = crossed_bootstrap(d).standard_error
    v = variance_components(d)
    owen = v.seed / seeds + v.example / examples + 3 * v.interaction / (seeds * examples)
    assert crossed == pytest.approx(np.sqrt(owen), rel=0.06)
    assert crossed > crossed_bootstrap(d.mean(0, keepdims=True)).standard_error
    assert crossed > crossed_bootstrap(d.mean(1)).standard_error


def test_interval_of_a_null_covers_it_about_95_times_in_100():
    rng = np.random.default_rng(3)
    covered = rejected = 0
    for trial in range(150):
        d = two_way(rng, 20, 40, seed_std=0.5)
        result = crossed_bootstrap(d, resamples=999, seed=trial)
        covered += result.low <= 0 <= result.high
        rejected += result.p < 0.05
    assert 133 <= covered <= 150  # binomial(150, .95): mean 142.5, std 2.7; percentile intervals are a little short
    assert abs(rejected - (150 - covered)) <= 3  # p and interval say the same, up to the + 1


def test_few_seeds_alone_reject_a_null_too_often_and_many_do_not():
    """What the docstring of `crossed_bootstrap` warns of; a reader of verdicts must know it."""
    rng = np.random.default_rng(11)

    def rejected(seeds):
        return np.mean([crossed_bootstrap(rng.normal(size=seeds), 999, trial).p < 0.05 for trial in range(400)])

    assert rejected(5) == pytest.approx(0.16, abs=0.06)  # three standard errors
    assert rejected(50) == pytest.approx(0.055, abs=0.035)


def test_p_counts_ties_on_both_sides_and_is_never_zero():
    assert crossed_bootstrap(np.array([1.0, -1.0] * 5)).p > 0.9
    clear = crossed_bootstrap(np.random.default_rng(0).normal(10, 1, size=(5, 50)), resamples=999)
    assert clear.p == pytest.approx(2 / 1000)
    mostly_ties = np.zeros((1, 50))
    mostly_ties[0, 0] = 1.0
    # the one win is left out of a resample with probability (49 / 50)^50 = .364, and then d* is 0: a tie
    assert crossed_bootstrap(mostly_ties).p == pytest.approx(2 * 0.364, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3])
@pytest.mark.parametrize("shape", [(10, 30), (1, 30), (10,)])
def test_equal_differences_have_an_interval_of_no_width(value, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = crossed_bootstrap(np.full(shape, value))
    assert result.low == result.high == result.estimate == value
    assert result.standard_error == 0
    assert result.p == (1.0 if value == 0 else pytest.approx(2 / 10_000))


def test_seed_decides_the_resampling():
    d = np.random.default_rng(4).normal(size=(4, 20))
    assert crossed_bootstrap(d, seed=1).low == crossed_bootstrap(d, seed=1).low
    assert crossed_bootstrap(d, seed=1).low != crossed_bootstrap(d, seed=2).low


@pytest.mark.parametrize(
    "differences, message",
    [
        (np.array([[0.0, np.nan], [1.0, 2.0]]), "NaN"),
        (np.array([1.0, np.inf]), "infinity"),
        (np.zeros((2, 2, 2)), "shape"),
        (np.zeros((1, 1)), "at least two"),
    ],
)
def test_unfit_differences_are_an_error(differences, message):
    with pytest.raises(ValueError, match=message):
        crossed_bootstrap(differences)


def test_variance_components_are_those_of_the_simulated_model():
    rng = np.random.default_rng(6)
    found = [variance_components(two_way(rng, 12, 60, 0.4, seed_std=0.5, interaction_std=1.5)) for _ in range(300)]
    # unbiased; the estimate of V_seed varies most, about .11 in one table and .007 in the mean of 300
    assert np.mean([v.seed for v in found]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([v.example for v in found]) == pytest.approx(1.0, abs=0.05)
    assert np.mean([v.interaction for v in found]) == pytest.approx(2.25, rel=0.02)


def test_variance_components_split_an_exact_table():
    v = variance_components(np.array([[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]]))  # additive: no interaction
    assert (v.seed, v.example, v.interaction) == pytest.approx((8.0, 1.0, 0.0))
    # pure interaction: both main effects' estimates are negative and set to 0
    v = variance_components(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert (v.seed, v.example, v.interaction) == (0.0, 0.0, 4.0)


def test_seeds_needed_for_seeds_alone_is_the_usual_formula():
    d = np.array([1.0, -1.0, 2.0, -2.0, 0.5])
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    expected = int(np.ceil(d.var(ddof=1) * (z / 0.5) ** 2))
    assert seeds_needed(d, 0.5) == seeds_needed(d[:, None], 0.5) == expected
    assert seeds_needed(d, 1e6) == 1


def test_that_many_seeds_have_the_power_asked_for():
    rng = np.random.default_rng(7)
    shape = {"seed_std": 1.0, "example_std": 0.5, "interaction_std": 2.0}
    effect, examples = 0.5, 50
    needed = seeds_needed(two_way(rng, 1000, examples, **shape), effect)
    error = np.sqrt(1.0 / needed + 0.25 / examples + 4.0 / (needed * examples))
    means = [two_way(rng, needed, examples, effect, **shape).mean() for _ in range(1000)]
    assert np.mean(np.abs(means) > 1.96 * error) == pytest.approx(0.8, abs=0.05)
    fewer = np.sqrt(1.0 / (needed / 2) + 0.25 / examples + 4.0 / (needed / 2 * examples))
    assert stats.norm.cdf(effect / fewer - 1.96) < 0.7  # and half of them have not


def test_no_number_of_seeds_replaces_examples():
    d = two_way(np.random.default_rng(8), 10, 25, seed_std=0.1, example_std=5.0, interaction_std=0.1)
    assert seeds_needed(d, 0.5) is None
    assert seeds_needed(d, 20.0) == 1


@pytest.mark.parametrize("differences, effect", [(np.ones((1, 9)), 1.0), (np.ones(3), 0.0), (np.ones(3), np.nan)])
def test_seeds_needed_refuses_one_seed_and_no_effect(differences, effect):
    with pytest.raises(ValueError):
        seeds_needed(differences, effect)


def test_student_is_scipys_t_test_and_keeps_its_level_for_few_seeds():
    d = np.random.default_rng(11).normal(0.2, 1, 6)
    test = stats.ttest_1samp(d, 0.0)
    made = student(d)
    np.testing.assert_allclose((made.p, made.low, made.high), (test.pvalue, *test.confidence_interval(0.95)))
    nulls = np.random.default_rng(12).normal(0, 1, (2000, 5))
    assert np.mean([student(d).p < 0.05 for d in nulls]) == pytest.approx(0.05, abs=0.015)
    assert (student(np.zeros(3)).p, student(np.ones(3)).p) == (1.0, 0.0)
    with pytest.raises(ValueError, match="one difference per seed"):
        student(np.zeros((3, 2)))


def test_groups_keep_the_mean_and_widen_the_interval_of_examples_that_are_alike():
    rng = np.random.default_rng(13)
    groups = np.repeat([f"video {g}" for g in range(20)], rng.integers(3, 30, 20))
    per_group = dict(zip(np.unique(groups), rng.normal(0, 1, 20), strict=True))
    d = np.array([per_group[g] for g in groups]) + rng.normal(0, 0.3, (6, len(groups)))
    pooled = grouped(d, groups)
    assert pooled.shape == (6, 20)
    np.testing.assert_allclose(pooled.mean(1), d.mean(1))
    alone, by_group = crossed_bootstrap(d), crossed_bootstrap(pooled)
    assert by_group.high - by_group.low > 2 * (alone.high - alone.low)
    assert grouped(d, None) is d


@pytest.mark.parametrize("seeds", [1, 6])
def test_clusters_are_drawn_whole_and_weigh_by_their_size(seeds):
    rng = np.random.default_rng(14)
    sizes = rng.integers(1, 40, 25)
    clusters = np.repeat([f"video {g}" for g in range(25)], sizes)
    d = np.repeat(rng.normal(0, 1, 25), sizes) + rng.normal(0, 0.3, (seeds, len(clusters)))
    made = crossed_bootstrap(d, clusters=clusters)
    assert made.estimate == pytest.approx(d.mean())
    # the ratio of two sums, by hand
    sums, drawn = np.add.reduceat(d.mean(0), np.r_[0, np.cumsum(sizes)[:-1]]), rng.integers(0, 25, (4000, 25))
    by_hand = sums[drawn].sum(1) / sizes[drawn].sum(1)
    assert made.distribution.std() == pytest.approx(by_hand.std(), rel=0.1)
    assert crossed_bootstrap(d, clusters=list(range(d.shape[1]))).standard_error == pytest.approx(
        crossed_bootstrap(d).standard_error
    )


def test_resampled_student_is_the_published_formula():
    d = np.random.default_rng(15).normal(0.3, 1, 15)
    made = resampled_student(d, 0.25)
    error = d.std(ddof=1) * (1 / 15 + 0.25) ** 0.5
    wide, narrow = stats.t.ppf([0.975, 0.95], 14) * error
    np.testing.assert_allclose(
        (made.low, made.high, made.low_90, made.high_90),
        (d.mean() - wide, d.mean() + wide, d.mean() - narrow, d.mean() + narrow),
    )
    assert made.p == pytest.approx(2 * stats.t.sf(abs(d.mean()) / error, 14))
    for values, ratio in ((np.zeros((2, 3)), 0.2), (np.zeros(3), 0.0)):
        with pytest.raises(ValueError, match="one difference per fold"):
            resampled_student(values, ratio)


def test_resampled_student_keeps_its_level_where_folds_go_together_and_student_does_not():
    rng, ratio, folds = np.random.default_rng(16), 0.25, 15
    rho = ratio / (1 + ratio)
    nulls = rho**0.5 * rng.normal(size=(2000, 1)) + (1 - rho) ** 0.5 * rng.normal(size=(2000, folds))
    assert np.mean([resampled_student(d, ratio).p < 0.05 for d in nulls]) == pytest.approx(0.05, abs=0.015)
    assert np.mean([student(d).p < 0.05 for d in nulls]) > 0.25


def test_power_is_that_of_simulated_t_tests():
    rng = np.random.default_rng(17)
    draws = rng.normal(0.8, 1, (4000, 10))
    found = np.mean([student(d).low > 0 for d in draws])
    assert power_at(0.8, 10**-0.5, 9) == pytest.approx(found, abs=0.025)
    assert power_at(1.96, 1.0, np.inf) == pytest.approx(0.5, abs=1e-3)
    for freedom in (1, 2, 9):
        assert power_at(1e6, 1.0, freedom) == pytest.approx(1.0) and power_at(0.0, 1.0, freedom) == pytest.approx(
            0.025, abs=1e-3
        )
    assert (power_at(0.1, 0.0, 9), power_at(0.0, 0.0, 9)) == (1.0, 0.0)
