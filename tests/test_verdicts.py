"""The rule from intervals to verdicts: two statements, routes of a claim, and what it lets through by chance."""

import numpy as np
import pytest

from mmfusion.metrics.statistics import crossed_bootstrap, resampled_student
from mmfusion.metrics.verdicts import (
    CODES,
    Cut,
    Difference,
    claim_code,
    corrected_contrasts,
    fold_means,
    judge,
    route_corrected,
    verdict_of,
)

VERDICTS = ("not identified", "not supported", "cannot tell", "supported")


@pytest.mark.parametrize(
    "estimate, low, high, high_90, p, verdict",
    [
        (0.05, 0.03, 0.07, 0.065, 0.001, "supported"),
        (0.018, 0.015, 0.022, 0.021, 0.001, "supported"),  # effects that matter are not ruled out
        (-0.05, -0.07, -0.03, -0.035, 0.001, "not supported"),
        (0.01, 0.005, 0.015, 0.014, 0.001, "not supported"),  # certain, and certainly too small to matter
        (0.0, -0.01, 0.01, 0.009, 0.9, "not supported"),  # narrow enough around 0
        (0.004, -0.014, 0.022, 0.019, 0.6, "not supported"),  # one-sided, at 95 %
        (0.01, -0.03, 0.05, 0.045, 0.5, "cannot tell"),
        (0.05, 0.001, 0.1, 0.09, 0.06, "cannot tell"),  # the interval excludes 0, but not after the correction
        (0.01, -0.001, 0.023, 0.02, 0.06, "cannot tell"),  # high_90 == effect is not ruled out
        (0.0, -0.1, 0.1, 0.09, 0.01, "cannot tell"),  # significant in neither direction
    ],
)
def test_verdict_follows_the_written_rule(estimate, low, high, high_90, p, verdict):
    assert CODES[int(judge(estimate, low, high, high_90, p, 0.02))] == verdict
    np.testing.assert_array_equal(
        judge(*(np.full((2, 3), x) for x in (estimate, low, high, high_90, p)), 0.02),
        judge(estimate, low, high, high_90, p, 0.02),
    )


@pytest.mark.parametrize(
    "arguments", [(0, -1, 1, 1, 0.5, -1), (np.nan, -1, 1, 1, 0.5, 1), (0, 1, -1, 1, 0.5, 1), (0, -1, 1, 1, np.nan, 1)]
)
def test_no_verdict_without_numbers(arguments):
    with pytest.raises(ValueError):
        judge(*arguments)


def test_routes_of_one_contrast_each_are_corrected_after_holm():
    p = np.array([0.04, 0.01, 0.03, 0.02])
    every = np.ones(4, bool)
    np.testing.assert_allclose(route_corrected(p, every, list("abcd")), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(route_corrected(p[None], every[None], list("abcd")), [[0.06, 0.04, 0.06, 0.06]])


def test_contrasts_that_must_all_hold_are_not_corrected():
    p = np.array([0.04, 0.01, 0.03])
    np.testing.assert_array_equal(route_corrected(p, np.ones(3, bool), ["x"] * 3), p)


def test_a_route_is_shown_where_its_largest_p_is_small_enough_after_holm():
    rng = np.random.default_rng(0)
    routes = ["a", "a", "b", "b", "b", "c"]
    for _ in range(300):
        p, positive = rng.uniform(0, 0.06, 6), rng.random(6) < 0.8
        made = route_corrected(p, positive, routes)
        largest = [np.where(positive, p, 1.0)[np.array(routes) == r].max() for r in "abc"]
        order, shown = np.argsort(largest), set()
        for k, place in enumerate(order):  # Holm, step by step
            if largest[place] * (3 - k) >= 0.05:
                break
            shown.add("abc"[place])
        assert shown == {r for r in "abc" if all(
            made[i] < 0.05 and positive[i] for i, one in enumerate(routes) if one == r)}  # fmt: skip
        assert (made >= p - 1e-15).all()


def test_a_claim_takes_the_weakest_of_a_route_and_the_strongest_route():
    codes = np.array([[1, 0, -1], [1, 1, -1], [-1, -1, -1], [-1, 1, 0]])
    assert claim_code(codes, ["a", "a", "b"]).tolist() == [0, 1, -1, 0]


def test_two_statements_with_two_intervals():
    rng = np.random.default_rng(1)
    cut = Cut((10,) * 12, 0.25)
    base = np.linspace(-0.004, 0.004, 12)
    made = {
        shift: corrected_contrasts({"x": Difference(base[None] + shift, "better")}, 0.02, cut=cut)[0]
        for shift in (-0.02, 0.0, 0.008, 0.02, 0.05)
    }
    assert [made[s].exists for s in made] == ["no", "cannot tell", "yes", "yes", "yes"]
    assert [made[s].matters for s in made] == ["no", "no", "no", "cannot tell", "yes"]
    assert [made[s].verdict for s in made] == [*["not supported"] * 3, "supported", "supported"]
    one = made[0.02]
    expected = resampled_student(base + 0.02, 0.25)
    assert (one.low, one.high, one.low_90, one.high_90) == (
        expected.low, expected.high, expected.low_90, expected.high_90)  # fmt: skip
    assert one.fold_values == tuple(base + 0.02) and one.ratio == 0.25
    wide = corrected_contrasts({"x": Difference(rng.normal(0, 1, (1, 12)), "better")}, 0.02, cut=cut)[0]
    assert (wide.exists, wide.matters, wide.verdict) == ("cannot tell",) * 3 and wide.power < 0.1 < made[0.0].power


def test_values_of_examples_and_of_folds_are_one_thing():
    cut = Cut((3, 2), 0.3)
    values = np.array([[1.0, 2, 3, 10, 20], [3, 4, 5, 30, 40]])
    np.testing.assert_allclose(fold_means(values, cut), [3, 25])
    np.testing.assert_allclose(fold_means(np.array([[2.0, 15], [4, 35]]), cut), [3, 25])
    with pytest.raises(ValueError, match="neither 5 examples nor 2 folds"):
        fold_means(np.zeros((2, 4)), cut)


def test_controls_cost_nothing_and_decide_nothing():
    rng = np.random.default_rng(2)
    good, bad = rng.normal(0.5, 1, (8, 200)), rng.normal(-0.5, 1, (8, 200))
    named = {"a": Difference(good, "x"), "control": Difference(bad, "y", decides=False)}
    made = corrected_contrasts(named, 0.1, seed=3)
    assert verdict_of(made) == "supported"
    assert made[0].p_corrected == made[0].p == crossed_bootstrap(good, seed=3).p
    assert verdict_of(corrected_contrasts({"a": Difference(good, "x"), "b": Difference(bad, "y")}, 0.1)) == (
        "not supported"
    )
    routes = {"a": Difference(good, "x", route="one"), "b": Difference(bad, "y", route="two")}
    made = corrected_contrasts(routes, 0.1, seed=3)
    assert verdict_of(made) == "supported" and made[0].p_corrected == pytest.approx(2 * made[0].p)
    with pytest.raises(ValueError, match="decides"):
        verdict_of(corrected_contrasts({"c": named["control"]}, 0.1))


def test_contrasts_take_an_effect_per_name_and_one_seed():
    d = np.random.default_rng(10).normal(0.3, 1, (1, 400))
    small, large = corrected_contrasts({"a": Difference(d, "x"), "b": Difference(d, "x")}, {"a": 0.1, "b": 5.0})
    assert (small.verdict, large.verdict) == ("supported", "not supported")
    with pytest.raises(ValueError, match="b"):
        corrected_contrasts({"a": Difference(d, "x"), "b": Difference(d, "x")}, {"a": 0.1})
    with pytest.raises(ValueError, match="above 0"):
        corrected_contrasts({"a": Difference(d, "x")}, 0.0)
    with pytest.raises(ValueError, match=r"'a'.*NaN"):
        corrected_contrasts({"a": Difference(np.array([[np.nan, 1.0]]), "x")}, 0.1)
    with pytest.raises(ValueError, match="clustered"):
        corrected_contrasts({"a": Difference(d, "x")}, 0.1, clusters=["v"] * 7)


@pytest.mark.parametrize("routes", [("",) * 3, ("a", "b", "c")])
def test_a_claim_without_any_effect_is_supported_in_at_most_5_percent(routes):
    rng, cut = np.random.default_rng(4), Cut((1,) * 10, 0.25)
    rho, found = 0.2, 0
    for _ in range(1500):
        values = rho**0.5 * rng.normal(size=(3, 1)) + (1 - rho) ** 0.5 * rng.normal(size=(3, 10))
        named = {str(k): Difference(v[None], "x", route=r) for k, (v, r) in enumerate(zip(values, routes, strict=True))}
        found += verdict_of(corrected_contrasts(named, 0.5, cut=cut)) == "supported"
    assert found / 1500 < 0.05
