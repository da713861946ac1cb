"""The terms that align tokens: what they are 0 at, what they ignore, and that the control knows no token."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmfusion.losses.optimal_transport import cosine_cost
from mmfusion.losses.token_alignment import TransportTerm, _scattered, mmd_between
from mmfusion.losses.transport_plans import sinkhorn
from mmfusion.sequences import Tokens


def tokens(batch: int, length: int, width: int = 4, seed: int = 0, lengths: list[int] | None = None) -> Tokens:
    values = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.tensor(lengths or [length] * batch)[:, None]).float()
    return Tokens(values, mask)


def phase(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, generator=torch.Generator().manual_seed(seed))


def term_of(method: str, x: Tokens, y: Tokens, **more) -> Tensor:
    return TransportTerm(method, **more)([{"a": x, "b": y}], phase(len(x.mask)))


def test_ipot_is_near_the_best_assignment():
    x, y = tokens(3, 6), tokens(3, 6, seed=1)
    cost = cosine_cost(x.values, y.values)
    expected = sum(c[linear_sum_assignment(c)].mean() for c in cost.numpy()) / 3
    assert term_of("ipot", x, y, iterations=200).item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("method", ["ipot", "sinkhorn"])
def test_a_permutation_of_the_same_tokens_is_no_distance(method):
    x = tokens(3, 6, width=32)
    turned = Tokens(x.values.flip(1), x.mask)
    far = term_of(method, x, tokens(3, 6, width=32, seed=1))
    assert term_of(method, x, turned).item() < 0.05 < far.item()


def test_random_plan_does_not_match_tokens():
    x = tokens(8, 6, width=32)
    turned = Tokens(x.values.flip(1), x.mask)
    found = term_of("random", x, turned).item()
    independent = cosine_cost(x.values, turned.values).mean().item()
    assert found == pytest.approx(independent, abs=0.1) and found > 0.5
    plans = [
        sinkhorn(_scattered(phase(8, seed), 6, 6), epsilon=0.05, iterations=20).plan for seed in range(2)
    ]  # another one for every phase, with the masses of the tokens
    assert (plans[0] - plans[1]).abs().max() > 0.02
    torch.testing.assert_close(plans[0].sum(-2), torch.full((8, 6), 1 / 6))


def test_random_plan_changes_with_the_phase_alone():
    x, y = tokens(8, 6), tokens(8, 6, seed=1)
    found = [TransportTerm("random")([{"a": x, "b": y}], phase(8, seed)).item() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_scattered_numbers_are_uniform_and_without_a_pattern():
    noise = _scattered(phase(64), 20, 20)
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.003)
    flat = noise - noise.mean()
    for shifted in (flat.roll(1, 1), flat.roll(1, 2), flat.roll(1, 0)):
        assert abs((flat * shifted).mean().item()) < 0.01


@pytest.mark.parametrize("method", ["ipot", "sinkhorn", "random"])
@settings(max_examples=8, deadline=None)
@given(junk=st.sampled_from([5.0, 1e30, float("inf"), float("nan")]))
def test_padding_and_empty_sequences_do_not_count(method, junk):
    x, y = tokens(3, 5, lengths=[5, 2, 0]), tokens(3, 4, seed=1, lengths=[3, 4, 4])
    found = term_of(method, x, y)
    spoilt = [Tokens(z.values.masked_fill(z.mask[..., None] == 0, junk), z.mask) for z in (x, y)]
    assert torch.equal(term_of(method, *spoilt), found)
    first_two = [Tokens(z.values[:2], z.mask[:2]) for z in (x, y)]
    by_hand = TransportTerm(method)([dict(zip("ab", first_two, strict=True))], phase(3)[:2])
    torch.testing.assert_close(found, by_hand)
    nothing = Tokens(x.values, torch.zeros_like(x.mask))
    assert term_of(method, nothing, y).item() == 0


def test_layers_and_pairs_are_averaged():
    layers = [{name: tokens(2, 3, seed=10 * k + j) for j, name in enumerate("abc")} for k in range(2)]
    pairs = [
        [TransportTerm()([{"x": layer[a], "y": layer[b]}]) for a, b in itertools.combinations("abc", 2)]
        for layer in layers
    ]
    torch.testing.assert_close(TransportTerm()(layers), torch.stack(pairs[1]).mean())
    every = TransportTerm(layers="all")(layers)
    torch.testing.assert_close(every, torch.stack([*pairs[0], *pairs[1]]).mean())


def test_gradient_is_that_of_the_cost_under_the_plan():
    x, y = tokens(2, 4), tokens(2, 3, seed=1)
    values = x.values.clone().requires_grad_()
    term_of("ipot", Tokens(values, x.mask), y).backward()
    moved = [term_of("ipot", Tokens(x.values - step * values.grad, x.mask), y) for step in (0.0, 0.5)]
    assert moved[1] < moved[0] - 1e-3
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("method", ["ipot", "sinkhorn"])
def test_equal_and_zero_tokens_have_finite_gradients(method):
    for values in (torch.zeros(2, 3, 4), torch.ones(2, 3, 4)):
        values.requires_grad_()
        mask = torch.ones(2, 3)
        loss = term_of(method, Tokens(values, mask), Tokens(values, mask), debiased=True)
        loss.backward()
        assert values.grad.isfinite().all() and abs(loss.item()) < 1e-6


# ---- MMD between modalities


def test_mmd_is_unbiased_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    same = [mmd_between(*torch.randn(2, 32, 4, generator=generator)).item() for _ in range(200)]
    mean, error = torch.tensor(same).mean().item(), torch.tensor(same).std().item() / 200**0.5
    assert abs(mean) < 4 * error and min(same) < 0
    x, y = torch.randn(2, 32, 4, generator=generator)
    assert mmd_between(x, y + 1).item() > 10 * max(map(abs, same)) / 2


@settings(max_examples=15, deadline=None)
@given(st.floats(-6, 6), st.integers(0, 1000))
def test_mmd_needs_no_unit(exponent, seed):
    x, y = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    torch.testing.assert_close(mmd_between(x * 10**exponent, y * 10**exponent), mmd_between(x, y), rtol=1e-6, atol=1e-9)


def test_mmd_of_equal_points_is_finite():
    x = torch.zeros(8, 4, requires_grad=True)
    loss = mmd_between(x, x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
