"""Sequences: read where they are padded, chosen by rows, cut into parts that fit into memory."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfusion.models.heads import Standardise
from mmfusion.sequences import CHUNK_TOKENS, Sequences, chunks, concatenate, from_padded, token_counts
from mmfusion.training.feed import POOLED_BATCHES, alike_in_length, epoch_order

some_lengths = st.lists(st.integers(0, 7), min_size=1, max_size=9)


def sequences(lengths: list[int], width: int = 3, dtype: torch.dtype = torch.float32) -> Sequences:
    generator = torch.Generator().manual_seed(len(lengths))
    return Sequences([torch.randn(n, width, generator=generator).to(dtype) for n in lengths])


@settings(max_examples=30, deadline=None)
@given(some_lengths, st.integers(0, 10**6))
def test_padded_rows_are_the_parts_and_zeros(lengths, seed):
    x = sequences(lengths)
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, len(lengths), (2, 3)))
    values, mask = x.padded(rows)
    assert values.shape == (2, 3, max(1, *(lengths[k] for k in rows.flatten().tolist())), 3)
    for place in np.ndindex(2, 3):
        part = x[int(rows[place])]
        assert torch.equal(values[place][: len(part)], part) and not values[place][len(part) :].any()
        assert mask[place].tolist() == [1.0] * len(part) + [0.0] * (values.shape[-2] - len(part))


@settings(max_examples=20, deadline=None)
@given(some_lengths)
def test_padding_and_back_is_the_same(lengths):
    x = sequences(lengths)
    back = from_padded(*x.padded())
    assert all(torch.equal(a, b) for a, b in zip(x, back, strict=True))


def test_chosen_rows():
    x = sequences([2, 0, 3, 1])
    assert torch.equal(x[2], x.parts[2]) and torch.equal(x[torch.tensor(2)], x.parts[2])
    assert x[np.int64(3)] is x.parts[3]
    for rows in (slice(1, 3), torch.tensor([1, 2]), np.array([1, 2]), [1, 2], torch.tensor([False, True, True, False])):
        assert [len(part) for part in x[rows]] == [0, 3]
    with pytest.raises(IndexError, match="4 sequences, chosen by booleans"):
        x[torch.tensor([True, False])]


def test_no_sequence_at_all_keeps_its_width():
    none = sequences([2, 0])[torch.zeros(0, dtype=torch.long)]
    assert len(none) == 0 and none.shape == (0, 0, 3) and none.pooled().shape == (0, 3)
    assert none[0:0].shape == (0, 0, 3) and sequences([1])[[]].width == 3
    assert concatenate([sequences([2]), none]).lengths.tolist() == [2]


def test_half_precision_is_read_as_single():
    assert sequences([2, 1], dtype=torch.float16).padded().values.dtype == torch.float32
    assert sequences([2, 0], dtype=torch.float16).pooled().dtype == torch.float32


def test_pooled_is_the_mean_of_the_real_tokens():
    x = sequences([2, 0, 5])
    expected = torch.stack([x[0].mean(0), torch.zeros(3), x[2].mean(0)])
    torch.testing.assert_close(x.pooled(), expected)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [torch.zeros(2, 3), torch.zeros(2, 4)],
        [torch.zeros(3)],
        [torch.zeros(2, 3, dtype=torch.long)],
    ],
)
def test_refuses_what_is_no_sequence(parts):
    with pytest.raises(ValueError, match="sequences are floating-point"):
        Sequences(parts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(0, 10**6))
def test_chunks_hold_every_row_once_in_order_and_fit_into_memory(lengths, seed):
    x = Sequences([torch.full((n, 1), float(i)) for i, n in enumerate(lengths)])
    vector = torch.arange(len(lengths), dtype=torch.float32)[:, None]
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(lengths)))
    parts = list(chunks({"text": x, "image": vector}, rows))
    assert torch.equal(torch.cat([part["image"] for part in parts])[:, 0].long(), rows)
    assert torch.equal(torch.cat([part["text"].mask.sum(1) for part in parts]).long(), x.lengths[rows])
    assert all(part["text"].mask.numel() <= CHUNK_TOKENS or len(part["image"]) == 1 for part in parts)


def test_counts_of_tokens_are_of_all_modalities():
    features = {"a": sequences([2, 0]), "b": sequences([1, 4]), "c": torch.zeros(2, 5)}
    assert token_counts(features).tolist() == [3, 4]
    assert token_counts({"c": features["c"]}) is None


def test_concatenated_splits():
    both = concatenate([sequences([2, 0]), sequences([1])])
    assert both.lengths.tolist() == [2, 0, 1]
    assert concatenate([torch.zeros(2, 3), torch.ones(1, 3)]).shape == (3, 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.booleans())
def test_standardisation_is_that_of_all_tokens(lengths, shifted):
    x = Sequences([part * 3 + 1e3 * shifted for part in sequences(lengths)])
    layer, every = Standardise(3), torch.cat(list(x)).double()
    layer.fit(x)
    torch.testing.assert_close(layer.mean.double(), every.mean(0), rtol=1e-6, atol=1e-6)
    if len(every) > 1:
        torch.testing.assert_close(layer.std.double(), every.std(0, correction=0), rtol=1e-3, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 5), st.integers(0, 10**6))
def test_batches_of_like_length_are_the_same_examples_sorted_by_pools(batches, size, epoch, seed):
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 50, batches * size))
    rows = epoch_order(seed, epoch, len(counts))
    found = alike_in_length(rows, counts, size, epoch)
    pool = POOLED_BATCHES * size
    for before, after in zip(rows.split(pool), found.split(pool), strict=True):
        assert sorted(before.tolist()) == sorted(after.tolist())
        spans = sorted((counts[part].min().item(), counts[part].max().item()) for part in after.split(size))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_batches_of_like_length_differ_by_seed_and_epoch_and_draw_nothing():
    counts, state = torch.arange(40) % 7, torch.get_rng_state()
    orders = {
        (seed, epoch): tuple(alike_in_length(epoch_order(seed, epoch, 40), counts, 5, epoch).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9 and torch.equal(state, torch.get_rng_state())
    # of stacked seeds, the batches of one step are of the same rank in length
    ranks = []
    for seed in range(3):
        means = counts[torch.tensor(orders[seed, 1])].view(-1, 5).float().mean(1)
        ranks.append(means[:POOLED_BATCHES].argsort().tolist())
    assert ranks[0] == ranks[1] == ranks[2] and len({tuple(orders[0, e]) for e in range(3)}) == 3
