"""Cross-decoding against scikit-learn, matrix square roots and slow loops."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.metrics import r2_score

from mmfusion.metrics.cross_decoding import LEAST, frechet_distance, measure_cross_decoding, r_squared


def drawn(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Correlated features (n, d), away from the origin."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def toy(n: int = 60) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Two modalities of different width; each is decoded well from itself, less so from the other."""
    rng = np.random.default_rng(1)
    features = {"a": drawn(n, 4, 2), "b": drawn(n, 7, 3)}
    noise = {("a", "a"): 0.1, ("b", "a"): 0.5, ("b", "b"): 0.2, ("a", "b"): 1.0}
    decoded = {
        (source, name): features[name] + scale * rng.normal(size=features[name].shape)
        for (source, name), scale in noise.items()
    }
    return features, decoded


# ---- R^2 ---------------------------------------------------------------------------------------------------------


def test_r_squared_about_the_own_mean_is_scikit_learns_weighted_by_variance():
    x, decoded = drawn(50, 6), drawn(50, 6, 1)
    expected = r2_score(x, decoded, multioutput="variance_weighted")
    assert r_squared(x, decoded, x.mean(0)) == pytest.approx(expected, abs=1e-12)


def test_r_squared_of_the_reference_itself_is_zero_and_of_the_truth_one():
    x, reference = drawn(30, 3), np.array([1.0, -2.0, 0.5])
    assert r_squared(x, np.tile(reference, (30, 1)), reference) == pytest.approx(0, abs=1e-12)
    assert r_squared(x, x, reference) == 1


@pytest.mark.parametrize(
    ("x", "decoded", "reference", "message"),
    [
        (np.ones((5, 2)), np.ones((5, 3)), np.zeros(2), r"features \(5, 2\) and decoded \(5, 3\)"),
        (np.eye(5), np.eye(5), np.zeros(2), r"reference \(2,\) does not fit features \(5, 5\)"),
        (np.ones((5, 2)), np.ones((5, 2)), np.ones(2), "nothing to explain"),
        (np.full((5, 2), np.nan), np.ones((5, 2)), np.zeros(2), "NaN or infinity"),
    ],
)
def test_features_that_have_no_r_squared_are_an_error(x, decoded, reference, message):
    with pytest.raises(ValueError, match=message):
        r_squared(x, decoded, reference)


# ---- Frechet distance --------------------------------------------------------------------------------------------


def slow_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """By square roots of matrices."""
    s, t = np.cov(x.T), np.cov(y.T)
    root = sqrtm(s)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(s + t - 2 * np.real(sqrtm(root @ t @ root))))


@pytest.mark.parametrize("rows", [(200, 90), (12, 200), (200, 12)])
def test_frechet_distance_equals_the_formula_with_square_roots_of_matrices(rows):
    x, y = drawn(rows[0], 6), drawn(rows[1], 6, 1)
    assert frechet_distance(x, y) == pytest.approx(slow_frechet(x, y), rel=1e-8)


def test_frechet_distance_with_fewer_rows_than_features_is_finite_and_right():
    x, y = drawn(5, 40), drawn(9, 40, 1)
    s, t = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # sqrtm itself fails on singular matrices
    inner = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s + t) - 2 * inner
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_shifted_and_scaled_features_is_known():
    x = drawn(80, 5)
    shift = np.arange(5.0)
    assert frechet_distance(x, x + shift) == pytest.approx(30)
    away = x.mean(0) + 3 * (x - x.mean(0))
    assert frechet_distance(x, away) == pytest.approx(4 * np.trace(np.cov(x.T)))  # (3 - 1)^2 tr S
    assert all(0 <= frechet_distance(z, z[::-1]) < 1e-9 for z in (drawn(80, 5, seed) for seed in range(20)))


def test_frechet_distance_is_symmetric_and_sees_neither_order_nor_rotation():
    x, y = drawn(40, 5), drawn(30, 5, 1)
    turn = np.linalg.qr(drawn(5, 5, 2))[0]
    value = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(value)
    assert frechet_distance((x @ turn)[::-1], y @ turn) == pytest.approx(value)


def test_frechet_distance_of_constant_features_is_their_distance_from_the_others():
    x = drawn(50, 4)
    expected = np.square(x.mean(0)).sum() + np.trace(np.cov(x.T))
    assert frechet_distance(np.zeros((50, 4)), x) == pytest.approx(expected)


def test_features_of_two_widths_or_one_row_have_no_frechet_distance():
    for x, y in ((np.ones((5, 2)), np.ones((5, 3))), (np.ones((1, 2)), np.ones((5, 2)))):
        with pytest.raises(ValueError, match="have a Frechet distance"):
            frechet_distance(x, y)


# ---- both, of every pair -----------------------------------------------------------------------------------------


def test_every_ordered_pair_is_measured_beside_its_ceiling_and_nulls():
    features, decoded = toy()
    reference = {"a": np.ones(4), "b": np.zeros(7)}
    found = measure_cross_decoding(features, decoded, reference, permutations=50)
    assert set(found) == {("a", "b"), ("b", "a")}
    for (source, name), one in found.items():
        x, mean = features[name], reference[name]
        assert one.r2.value == pytest.approx(r_squared(x, decoded[source, name], mean))
        assert one.own_r2 == pytest.approx(r_squared(x, decoded[name, name], mean))
        assert one.own_r2 > one.r2.value > one.r2.null_high >= one.r2.null_mean >= one.r2.null_low
        assert one.own_frechet < one.frechet < one.mean_frechet and one.floor_frechet > 0
    far = measure_cross_decoding(features, decoded, {"a": np.full(4, 1e4), "b": np.zeros(7)})
    assert far["b", "a"].mean_frechet == pytest.approx(1e8, rel=0.01)


def test_null_is_what_loops_over_permuted_partners_give():
    features, decoded = toy(25)
    found = measure_cross_decoding(features, decoded, permutations=7, halvings=1, seed=4)["a", "b"].r2
    rng, x = np.random.default_rng(4), features["b"]
    draws = [r_squared(x, decoded["a", "b"][rng.permutation(25)], np.zeros(7)) for _ in range(7)]
    assert found.null_mean == pytest.approx(np.mean(draws))
    assert (found.null_low, found.null_high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_a_perfect_decoder_reaches_the_floor_and_one_that_makes_up_others_does_too():
    both = drawn(400, 7)
    features = {"a": drawn(200, 4), "b": both[:200]}
    decoded = {("a", "a"): features["a"], ("b", "a"): features["a"], ("b", "b"): features["b"]}
    found = measure_cross_decoding(features, decoded | {("a", "b"): features["b"]})["a", "b"]
    assert found.r2.value == 1 and found.frechet == pytest.approx(found.floor_frechet) == found.own_frechet
    found = measure_cross_decoding(features, decoded | {("a", "b"): both[200:]}, {"a": np.zeros(4), "b": both.mean(0)})
    assert found["a", "b"].r2.value == pytest.approx(-1, abs=0.3)
    assert found["a", "b"].frechet < 2 * found["a", "b"].floor_frechet < 0.1 * found["a", "b"].mean_frechet


def test_a_decoder_of_the_mean_explains_nothing_and_is_as_far_as_the_mean():
    features, decoded = toy()
    decoded["a", "b"] = np.zeros_like(features["b"])
    found = measure_cross_decoding(features, decoded)["a", "b"]
    assert found.r2.value == pytest.approx(0, abs=1e-12) and found.frechet == pytest.approx(found.mean_frechet)


def test_distances_are_over_the_width_of_the_features_and_between_disjoint_halves():
    features, decoded = toy(11)
    found = measure_cross_decoding(features, decoded, permutations=3, halvings=1, seed=2)["b", "a"]
    rng = np.random.default_rng(2)
    for _ in range(3):
        rng.permutation(11)
    order = rng.permutation(11)
    first, second = order[:6], order[6:]
    x, y = features["a"], decoded["b", "a"]
    expected = (frechet_distance(y[first], x[second]) + frechet_distance(y[second], x[first])) / 2 / 4
    assert found.frechet == pytest.approx(expected)
    assert found.floor_frechet == pytest.approx(frechet_distance(x[first], x[second]) / 4)


def test_a_seed_gives_the_same_and_another_gives_others():
    same = [measure_cross_decoding(*toy(), seed=seed)["a", "b"] for seed in (0, 0, 1)]
    assert same[0] == same[1] and same[0].frechet != same[2].frechet and same[0].r2.value == same[2].r2.value


def test_the_fewest_examples_are_measured_and_fewer_refused():
    found = measure_cross_decoding(*toy(LEAST), permutations=0)
    assert all(np.isfinite([one.frechet, one.floor_frechet, one.r2.value]).all() for one in found.values())
    assert found["a", "b"].r2.null is None
    with pytest.raises(ValueError, match="3 examples"):
        measure_cross_decoding(*toy(3))
    features, decoded = toy()
    del decoded["b", "b"]
    with pytest.raises(ValueError, match="b is not decoded from its own latent"):
        measure_cross_decoding(features, decoded)
