"""Padding and values that are not finite take no part in a pooled vector."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfusion.data import pooling as sequence_pooling
from mmfusion.data.pooling import occupied_steps, pool_over_time, pooling_notes, steps_from_lengths


def _sequences(count: int = 5, steps: int = 7, width: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, steps, width)).astype(np.float32)


def _pad(sequences: np.ndarray, before: int, after: int) -> np.ndarray:
    return np.pad(sequences, [(0, 0), (before, after), (0, 0)])


def test_without_padding_it_is_numpys_mean_and_standard_deviation():
    x = _sequences()
    pooled = pool_over_time(x)
    np.testing.assert_allclose(pooled.features, np.concatenate([x.mean(1), x.std(1)], 1), rtol=1e-5)
    assert (pooled.missing, pooled.empty, pooled.features.dtype) == (0, 0, np.float32)


@given(before=st.integers(0, 4), after=st.integers(0, 4), pooling=st.sampled_from(["mean", "mean_std"]))
def test_padding_on_either_side_changes_nothing(before, after, pooling):
    x = _sequences()
    padded = pool_over_time(_pad(x, before, after), None, pooling)
    np.testing.assert_array_equal(padded.features, pool_over_time(x, None, pooling).features)


def test_mean_is_the_first_half_of_mean_and_standard_deviation():
    x = _sequences()
    np.testing.assert_array_equal(pool_over_time(x, None, "mean").features, pool_over_time(x).features[:, :3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_left_out_of_their_coordinate_only(bad):
    x = _sequences(1)
    x[0, 2, 1] = bad
    pooled = pool_over_time(x)
    kept = np.delete(x[0, :, 1], 2)
    assert pooled.missing == 1
    np.testing.assert_allclose(pooled.features[0, [1, 4]], [kept.mean(), kept.std()], rtol=1e-5)
    np.testing.assert_allclose(pooled.features[0, [0, 3]], [x[0, :, 0].mean(), x[0, :, 0].std()], rtol=1e-5)


def test_a_coordinate_without_finite_values_is_zero():
    x = _sequences(1)
    x[0, :, 2] = np.nan
    np.testing.assert_array_equal(pool_over_time(x).features[0, [2, 5]], 0)


def test_beyond_float32_counts_as_infinite():
    x = _sequences(1).astype(np.float64)
    x[0, 0, 0] = 1e300
    pooled = pool_over_time(x)
    assert pooled.missing == 1
    assert np.isfinite(pooled.features).all()


def test_an_example_without_valid_steps_is_zero_and_counted():
    x = _sequences(3)
    x[1] = 0
    pooled = pool_over_time(x)
    assert pooled.empty == 1
    np.testing.assert_array_equal(pooled.features[1], 0)
    assert (pooled.features[[0, 2]] != 0).all()


def test_values_outside_of_valid_steps_are_not_looked_at():
    x = _sequences(2)
    valid = np.ones(x.shape[:2], bool)
    valid[:, 5:] = False
    spoilt = x.copy()
    spoilt[:, 5:] = np.nan
    pooled = pool_over_time(spoilt, valid)
    assert pooled.missing == 0
    np.testing.assert_array_equal(pooled.features, pool_over_time(x[:, :5]).features)


def test_large_offsets_do_not_cancel():
    x = _sequences(1) + np.float32(1000)
    np.testing.assert_allclose(pool_over_time(x).features[0, 3:], x[0].astype(np.float64).std(0), rtol=1e-4)


def test_chunks_do_not_show(monkeypatch):
    x = _sequences()
    whole = pool_over_time(x).features
    monkeypatch.setattr(sequence_pooling, "CHUNK", 1)
    np.testing.assert_array_equal(pool_over_time(x).features, whole)


def test_separate_arrays_pool_like_one_padded_array():
    x = _sequences(3)
    lengths = [7, 2, 4]
    parts = [one[:length] for one, length in zip(x, lengths, strict=True)]
    padded = np.stack([np.pad(part, [(0, 7 - len(part)), (0, 0)]) for part in parts])
    np.testing.assert_array_equal(pool_over_time(parts).features, pool_over_time(padded).features)


@pytest.mark.parametrize("before", [0, 3])
def test_lengths_are_counted_from_the_side_that_is_not_padded(before):
    x = _pad(_sequences(4), before, 3 - before)
    valid, unfit = steps_from_lengths(x, np.full(4, 7))
    assert unfit == 0
    np.testing.assert_array_equal(valid, occupied_steps(x))


def test_lengths_keep_zero_steps_within_the_sequence():
    x = _pad(_sequences(1), 0, 2)
    x[0, 3] = 0
    valid, unfit = steps_from_lengths(x, np.array([7]))
    assert (unfit, valid.sum(), bool(valid[0, 3])) == (0, 7, True)


def test_lengths_that_fit_neither_side_are_counted_and_not_used():
    x = _sequences(2)
    valid, unfit = steps_from_lengths(x, np.array([7, 2]))
    assert unfit == 1
    assert valid.all()


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5, 6)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="must be"):
        pool_over_time(np.ones(shape))


def test_notes_count_what_was_missing_in_all_splits():
    x = _sequences(2)
    x[0], x[1, 0, 0] = 0, np.nan
    notes = pooling_notes("audio", [pool_over_time(x), pool_over_time(x)])
    assert len(notes) == 2
    assert "2 values" in notes[0]
    assert "2 of 4 examples" in notes[1]
    assert pooling_notes("audio", [pool_over_time(_sequences())]) == []
