"""The transformer over tokens: what must not matter to it, and where its only randomness comes from."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state

from mmfusion.models.wma import TokenTransformer
from mmfusion.sequences import Tokens
from mmfusion.training.trainer import _at_once, _in_turn

DIMS = {"image": 5, "text": 7}


def model_of(seed: int = 0, **more) -> TokenTransformer:
    torch.manual_seed(seed)
    return TokenTransformer(DIMS, **({"width": 16, "layers": 2, "heads": 4, "places": 8} | more))


def tokens_of(lengths: dict[str, list[int]], seed: int = 0, extra: int = 0, junk: float = 0.0) -> dict[str, Tokens]:
    """Random tokens of B lengths for each modality, `extra` further places, and `junk` at padding."""
    found = {}
    for name, of_examples in lengths.items():
        longest = max(1, *of_examples)
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(len(of_examples), longest, DIMS[name], generator=generator)
        mask = (torch.arange(longest + extra) < torch.tensor(of_examples)[:, None]).float()
        values = torch.nn.functional.pad(values, (0, 0, 0, extra)).masked_fill(mask[..., None] == 0, junk)
        found[name] = Tokens(values, mask)
    return found


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=2, max_size=4),
    st.integers(0, 4),
    st.sampled_from([0.0, 3.0, -1e3]),
)
def test_padding_never_matters(lengths, extra, junk):
    lengths = {"image": [n for n, _ in lengths], "text": [m for _, m in lengths]}
    model = model_of()
    expected = model(tokens_of(lengths)).prediction
    found = model(tokens_of(lengths, extra=extra, junk=junk)).prediction
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_padding_gets_no_gradient():
    model, lengths = model_of(), {"image": [3, 1], "text": [2, 4]}
    gradients = []
    for junk in (0.0, 3.0):
        model.zero_grad()
        model(tokens_of(lengths, extra=2, junk=junk)).prediction.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_batch_companions_never_matter():
    model = model_of()
    alone = model(tokens_of({"image": [3], "text": [2]})).prediction
    both = tokens_of({"image": [3, 5], "text": [2, 6]})
    both = {name: Tokens(x.values.clone(), x.mask) for name, x in both.items()}
    for name, x in tokens_of({"image": [3], "text": [2]}).items():
        both[name].values[0, : x.values.shape[1]] = x.values[0]
    torch.testing.assert_close(model(both).prediction[:1], alone, rtol=0, atol=1e-6)


def test_order_of_tokens_matters_through_places_alone():
    model, tokens = model_of(), tokens_of({"image": [4], "text": [3]})
    turned = {name: Tokens(x.values.flip(1), x.mask) for name, x in tokens.items()}
    assert (model(turned).prediction - model(tokens).prediction).abs().max() > 1e-6
    with torch.no_grad():
        for table in model.places.values():
            table.zero_()
    torch.testing.assert_close(model(turned).prediction, model(tokens).prediction, rtol=0, atol=1e-6)


def test_tokens_beyond_the_table_share_its_last_place():
    model = model_of(places=2)
    tokens = tokens_of({"image": [6], "text": [1]})
    swapped = dict(tokens, image=Tokens(tokens["image"].values[:, [0, 4, 2, 3, 1, 5]], tokens["image"].mask))
    torch.testing.assert_close(model(swapped).prediction, model(tokens).prediction, rtol=0, atol=1e-6)
    first = dict(tokens, image=Tokens(tokens["image"].values[:, [5, 1, 2, 3, 4, 0]], tokens["image"].mask))
    assert (model(first).prediction - model(tokens).prediction).abs().max() > 1e-6


def test_hidden_modality_is_an_empty_sequence():
    model = model_of()
    tokens = tokens_of({"image": [4, 3], "text": [2, 5]})
    hidden = model(tokens, present={"text": torch.tensor([0.0, 1.0])}).prediction
    emptied = model(tokens_of({"image": [4, 3], "text": [0, 5]})).prediction
    torch.testing.assert_close(hidden, emptied, rtol=0, atol=1e-6)
    assert not torch.allclose(hidden[0], model(tokens).prediction[0])


def test_nothing_but_hidden_modalities_gives_the_bias():
    model = model_of()
    none = {name: torch.zeros(2) for name in DIMS}
    for dtype in (None, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            found = model(tokens_of({"image": [4, 3], "text": [2, 5]}), present=none).prediction
        torch.testing.assert_close(found.float(), model.readout.bias.expand(2, 1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near(dtype):
    model, tokens = model_of(), tokens_of({"image": [4, 0], "text": [2, 5]})
    with torch.autocast("cpu", dtype=dtype):
        found = model(tokens).prediction
    torch.testing.assert_close(found.float(), model(tokens).prediction, rtol=0, atol=0.05)


# ---- dropout


def test_dropout_is_a_function_of_its_uniforms_and_nothing_is_drawn():
    model, tokens = model_of(dropout=0.5), tokens_of({"image": [4, 3], "text": [2, 5]})
    first, second = torch.rand(2, 2, model.uniforms, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    found = model(tokens, uniforms=first).prediction
    assert torch.equal(found, model(tokens, uniforms=first).prediction)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.allclose(found, model(tokens, uniforms=second).prediction)
    assert not torch.allclose(found, model(tokens).prediction)
    everything = torch.ones(2, model.uniforms)
    # nothing is below the rate: all is kept, at 1 / (1 - rate) of its size
    model.dropout = 1e-9
    torch.testing.assert_close(model(tokens, uniforms=everything * 0.999).prediction, model(tokens).prediction)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_keeps_the_mean(rate):
    model = model_of(dropout=rate)
    uniforms = torch.rand(4000, model.uniforms, generator=torch.Generator().manual_seed(0))
    kept = torch.cat([part for pair in model._dropped(uniforms) for part in pair], 1)  # (B, 2 layers, W)
    assert (kept == 0).float().mean().item() == pytest.approx(rate, abs=0.005)
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    assert kept.unique().numel() == 2


def test_uniforms_of_the_drawn_tokens_are_not_those_of_the_dropout():
    model, tokens = model_of(dropout=0.5), tokens_of({"image": [4, 3], "text": [2, 5]})
    uniforms = torch.rand(2, model.uniforms, generator=torch.Generator().manual_seed(0))
    other = uniforms.clone()
    other[:, :2] = 1 - other[:, :2]
    found, expected = model(tokens, uniforms=other), model(tokens, uniforms=uniforms)
    assert torch.equal(found.prediction, expected.prediction)
    assert not torch.allclose(found.latents["image"], expected.latents["image"])
    assert model_of(dropout=0.0).uniforms == 2


# ---- members


def loss_of(skeleton: TokenTransformer, tokens: dict[str, Tokens]):
    def loss(parameters: dict, buffers: dict, uniforms: Tensor) -> Tensor:
        output = functional_call(skeleton, (parameters, buffers), (tokens,), {"uniforms": uniforms})
        return output.prediction.square().sum() + sum(x.square().mean() for x in output.latents.values())

    return loss


@pytest.mark.parametrize("size", [1, 5])
def test_stack_equals_members_in_turn_without_a_fallback(size):
    models = [model_of(seed, dropout=0.3) for seed in range(5)]
    tokens = tokens_of({"image": [4, 0, 2], "text": [2, 5, 1]})
    uniforms = torch.rand(5, 3, models[0].uniforms, generator=torch.Generator().manual_seed(0))[:size]
    parameters, buffers = stack_module_state(models[:size])
    parameters = {name: p.detach() for name, p in parameters.items()}
    one = grad(loss_of(models[0], tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = _at_once(one, parameters, buffers, uniforms)
    expected = _in_turn(one, parameters, buffers, uniforms)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_parameter():
    model = model_of(places=4)
    output = model(tokens_of({"image": [4, 3], "text": [2, 5]}), uniforms=torch.full((2, model.uniforms), 0.5))
    output.prediction.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width 128 is no multiple of heads 7"):
        TokenTransformer(DIMS, heads=7)


def test_one_modality_and_three():
    for dims in ({"text": 7}, DIMS | {"audio": 3}):
        torch.manual_seed(0)
        model = TokenTransformer(dims, width=16, heads=4, output_dim=3)
        tokens = {name: Tokens(torch.randn(2, 4, dim), torch.ones(2, 4)) for name, dim in dims.items()}
        assert model(tokens).prediction.shape == (2, 3)
        assert list(model(tokens).layers[-1]) == sorted(dims)


def test_huge_and_equal_tokens_stay_finite():
    for value in (1e30, 0.0):
        tokens = {name: Tokens(torch.full((2, 3, dim), value), torch.ones(2, 3)) for name, dim in DIMS.items()}
        model = model_of()
        for name, x in tokens.items():
            model.standardise[name].std.fill_(max(value, 1.0))
            assert x.values.isfinite().all()
        assert model(tokens).prediction.isfinite().all()
