"""LMF over pairs of steps: exact sums, plans of the right masses, and what must not matter."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from lmf_module import LowRankMultimodalFusion
from mmfusion.losses.optimal_transport import cosine_cost
from mmfusion.losses.transport_plans import sinkhorn
from mmfusion.models.temporal_lmf import EPSILON, ITERATIONS, TemporalFusion, TemporalLMF, coupling_range
from mmfusion.sequences import Tokens

PLANS = ("transport", "diagonal", "banded", "uniform")
DIMS = (4, 4, 4)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))


def layer_of(
    count: int, plan: str = "transport", outputs: int = 2, rank: int = 3, seed: int = 0, **more
) -> TemporalLMF:
    torch.manual_seed(seed)
    layer = TemporalLMF(DIMS[:count], outputs, rank, plan=plan, **more).double()
    with torch.no_grad():
        layer.bias.normal_()
    return layer


def sequences(lengths: list[list[int]], seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Latents (B, T_m, d_m), random at padding too, and masks, of B lengths for each modality."""
    generator = torch.Generator().manual_seed(seed)
    latents, masks = [], []
    for dim, of_examples in zip(DIMS, lengths, strict=False):
        longest = max(1, *of_examples)
        latents.append(torch.randn(len(of_examples), longest, dim, generator=generator, dtype=torch.double))
        masks.append((torch.arange(longest) < torch.tensor(of_examples)[:, None]).double())
    return latents, masks


def means_of(latents: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    return [
        (x * mask[..., None]).sum(-2) / mask.sum(-1, keepdim=True).clamp_min(1)
        for x, mask in zip(latents, masks, strict=True)
    ]


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from(PLANS))
def test_contributions_of_all_pairs_sum_to_the_output(shape, plan):
    n, m, outputs, rank, seed = shape
    layer = layer_of(2, plan, outputs, rank, seed)
    latents, masks = sequences([[n, 1, n], [m, m, 0]], seed)
    contributions = layer.contributions(latents, masks)
    assert contributions.shape == (3, latents[0].shape[1], latents[1].shape[1], outputs)
    torch.testing.assert_close(contributions.sum((1, 2)), layer(latents, masks), rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_uniform_plan_is_lmf_of_the_means(count):
    layer = layer_of(count, "uniform")
    latents, masks = sequences([[4, 2], [3, 5], [1, 6]][:count])
    expected = LowRankMultimodalFusion.forward(layer, means_of(latents, masks))
    torch.testing.assert_close(layer(latents, masks), expected, rtol=0, atol=1e-10)


def test_one_modality_is_lmf_of_the_mean_whatever_the_plan():
    latents, masks = sequences([[4, 2]])
    for plan in PLANS:
        layer = layer_of(1, plan)
        expected = LowRankMultimodalFusion.forward(layer, means_of(latents, masks))
        torch.testing.assert_close(layer(latents, masks), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [2, 3])
def test_diagonal_plan_is_the_mean_of_lmf_step_by_step(count):
    layer = layer_of(count, "diagonal")
    latents, masks = sequences([[4, 2], [3, 5], [5, 6]][:count])
    shared = [min(2 if k else 4, *rest) for k, rest in ((0, (3, 5)[: count - 1]), (1, (5, 6)[: count - 1]))]
    for k, steps in enumerate(shared):
        expected = LowRankMultimodalFusion.forward(layer, [x[k, :steps] for x in latents]).mean(0)
        torch.testing.assert_close(layer(latents, masks)[k], expected, rtol=0, atol=1e-10)


def test_diagonal_plan_without_a_common_step_is_the_uniform_one():
    latents, _ = sequences([[3], [3]])
    masks = [torch.tensor([[1.0, 0, 0]]).double(), torch.tensor([[0.0, 1, 1]]).double()]
    torch.testing.assert_close(layer_of(2, "diagonal")(latents, masks), layer_of(2, "uniform")(latents, masks))


@pytest.mark.parametrize("plan", PLANS)
def test_hub_sums_over_glued_triples(plan):
    """y = sum_ijk a_i P_ij Q_ik / (rows of both) LMF(x_i, y_j, z_k), one triple after the other."""
    layer = layer_of(3, plan)
    latents, _ = sequences([[4], [3], [5]])
    first, second = (p[0] for p in layer.plans(latents))
    expected = torch.zeros(2).double()
    for i, j, k in itertools.product(range(4), range(3), range(5)):
        if first[i].sum() == 0 or second[i].sum() == 0:
            continue
        mass = second[i].sum() * first[i, j] / first[i].sum() * second[i, k] / second[i].sum()
        expected += mass * LowRankMultimodalFusion.forward(
            layer, [latents[0][0, i], latents[1][0, j], latents[2][0, k]]
        )
    torch.testing.assert_close(layer(latents)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", PLANS)
def test_hub_meets_the_other_two_in_any_order(plan):
    """Row sums of the two plans differ by the error of the iterations alone, so which of them is the mass matters no
    more than that."""
    layer, (latents, masks) = layer_of(3, plan, outputs=1), sequences([[4], [3], [5]])
    swapped = TemporalLMF([DIMS[k] for k in (0, 2, 1)], 1, 3, plan=plan).double()
    state = layer.state_dict()
    moved = {name: state[name.replace("projections.1", "P").replace("projections.2", "projections.1").replace("P", "projections.2")] for name in state}  # noqa: E501  # fmt: skip
    swapped.load_state_dict(moved)
    other = swapped([latents[k] for k in (0, 2, 1)], [masks[k] for k in (0, 2, 1)])
    torch.testing.assert_close(layer(latents, masks), other, rtol=0, atol=2e-3 if plan in PLANS[::2] else 1e-12)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_parts_sum_to_the_output_and_those_of_one_modality_need_no_plan(plan, count):
    layer, uniform = layer_of(count, plan), layer_of(count, "uniform")
    latents, masks = sequences([[4, 4], [4, 4], [4, 4]][:count])
    centres = [torch.randn(d).double() for d in DIMS[:count]]
    parts, expected = layer.parts(latents, masks, centres), uniform.parts(latents, masks, centres)
    torch.testing.assert_close(sum(parts.values()), layer(latents, masks), rtol=0, atol=1e-10)
    exact = plan in ("uniform", "diagonal")  # at equal lengths
    for subset in parts:
        if len(subset) == 1:
            torch.testing.assert_close(parts[subset], expected[subset], rtol=0, atol=1e-10 if exact else 0.02)
    if plan != "uniform":
        assert (parts[0, 1] - expected[0, 1]).abs().max() > 0.02


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_step_gradient_is_autograd_at_a_given_plan(plan, count):
    layer = layer_of(count, plan)
    latents, masks = sequences([[4, 2], [3, 5], [6, 1]][:count])
    latents = [x.requires_grad_() for x in latents]
    for m, output in itertools.product(range(count), range(2)):
        (expected,) = torch.autograd.grad(layer(latents, masks)[:, output].sum(), latents[m])
        with torch.no_grad():
            found = layer.step_gradient(latents, m, masks)[:, output]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("junk", [7.0, 1e30, float("inf"), float("nan")])
def test_what_stands_at_padding_never_matters(plan, junk):
    layer = layer_of(3, plan)
    latents, masks = sequences([[4, 2], [3, 0], [2, 5]])
    spoilt = [x.masked_fill(mask[..., None] == 0, junk) for x, mask in zip(latents, masks, strict=True)]
    assert torch.equal(layer(spoilt, masks), layer(latents, masks))
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 3), value=1.0) for x in latents]
    further = [torch.nn.functional.pad(mask, (0, 3)) for mask in masks]
    torch.testing.assert_close(layer(longer, further), layer(latents, masks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_empty_sequence_counts_as_one_step_at_zero(plan):
    layer = layer_of(2, plan)
    (x, _), (x_mask, _) = sequences([[4], [3]])
    empty = layer([x, torch.randn(1, 3, 4).double()], [x_mask, torch.zeros(1, 3).double()])
    zero = layer([x, torch.zeros(1, 1, 4).double()], [x_mask, torch.ones(1, 1).double()])
    if plan == "diagonal":  # then only the first step has a partner
        zero = LowRankMultimodalFusion.forward(layer, [x[:, 0], torch.zeros(1, 4).double()])
    torch.testing.assert_close(empty, zero, rtol=0, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_plans_have_the_masses_of_the_steps(plan):
    (latents, masks), layer = sequences([[4, 2, 5], [4, 2, 5]]), layer_of(2, plan)
    (found,) = layer.plans(latents, masks)
    masses = [mask / mask.sum(-1, keepdim=True) for mask in masks]
    torch.testing.assert_close(found.sum(-2), masses[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.sum(-1), masses[0], rtol=0, atol=5e-3)
    assert (found >= 0).all() and not found.requires_grad


def test_transport_plan_is_that_of_the_cosine_distance():
    layer, (latents, masks) = layer_of(2), sequences([[4], [3]])
    latents[1] = latents[0][:, :3] + 0.1  # each near its partner
    (found,) = layer.plans(latents, masks)
    cost = cosine_cost(*latents)
    expected = sinkhorn(cost, epsilon=EPSILON, iterations=ITERATIONS).plan
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found[0, :3].argmax(-1) == torch.arange(3)).all()


@pytest.mark.parametrize(("band", "least"), [(0.02, 0.95), (0.1, 0.5), (100.0, 0.0)])
def test_band_says_how_far_from_the_diagonal_steps_meet(band, least):
    layer, (latents, masks) = layer_of(2, "banded", band=band), sequences([[8], [8]])
    on_diagonal = layer.plans(latents, masks)[0][0].diagonal().sum().item()
    assert least <= on_diagonal <= (0.13 if band == 100 else 1.0 + 1e-9)


def test_masked_rank_equals_smaller_model():
    layer = layer_of(2, outputs=1, active_rank=2)
    smaller = layer_of(2, outputs=1, rank=2)
    state = layer.state_dict()
    smaller.load_state_dict({k: state[k] if v.shape == state[k].shape else state[k][tuple(slice(n) for n in v.shape)] for k, v in smaller.state_dict().items()})  # noqa: E501  # fmt: skip
    latents, masks = sequences([[4, 2], [3, 5]])
    torch.testing.assert_close(layer(latents, masks), smaller(latents, masks), rtol=0, atol=1e-12)


def test_refuses_unknown_plan_band_and_pairs_of_three():
    with pytest.raises(ValueError, match="plan is one of"):
        TemporalLMF([2, 2], plan="dtw")
    with pytest.raises(ValueError, match="band must be positive"):
        TemporalLMF([2, 2], band=0.0)
    with pytest.raises(ValueError, match="one width"):
        TemporalLMF([2, 3])
    latents, masks = sequences([[2], [2], [2]])
    with pytest.raises(ValueError, match="pairs are of two"):
        layer_of(3).contributions(latents, masks)


# ---- transformations


@pytest.mark.parametrize("plan", PLANS)
def test_vmap_over_members_and_its_gradient_are_those_of_each_member(plan):
    layers = [layer_of(2, plan, seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(layers)
    latents, masks = sequences([[4, 2], [3, 0]])

    def loss(p: dict, b: dict) -> Tensor:
        return functional_call(layers[0], (p, b), (latents, masks)).square().sum()

    gradients = vmap(grad(loss))({k: v.detach() for k, v in parameters.items()}, buffers)
    for s, layer in enumerate(layers):
        expected = torch.autograd.grad(layer(latents, masks).square().sum(), list(layer.parameters()))
        for (name, _), own in zip(layer.named_parameters(), expected, strict=True):
            torch.testing.assert_close(gradients[name][s], own, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("plan", ["transport", "diagonal"])
def test_compiled_layer_says_the_same(plan):
    layer, (latents, masks) = layer_of(2, plan), sequences([[4, 2], [3, 5]])
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(latents, masks), layer(latents, masks), rtol=0, atol=1e-9)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_stays_finite_and_near(plan):
    layer, (latents, masks) = layer_of(2, plan).float(), sequences([[4, 2], [3, 5]])
    latents, masks = [x.float() for x in latents], [mask.float() for mask in masks]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(latents, masks)
    torch.testing.assert_close(found.float(), layer(latents, masks), rtol=0.1, atol=0.1)


# ---- the range of all plans


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_coupling_range_of_equal_masses_is_that_of_assignments(n, seed):
    scores = np.random.default_rng(seed).standard_normal((n, n))
    masses = np.full(n, 1 / n)
    expected = [scores[linear_sum_assignment(sign * scores)].mean() * 1 for sign in (1, -1)]
    assert coupling_range(scores, masses, masses) == pytest.approx(tuple(expected), abs=1e-8)


def test_coupling_range_contains_the_value_of_every_plan():
    (latents, masks), spread = sequences([[5], [5]]), []
    for plan in PLANS:
        layer = layer_of(2, plan, outputs=1)
        scores = layer.pair_scores(latents)[0, :, :, 0].detach().numpy()
        low, high = coupling_range(scores, *(np.full(5, 0.2),) * 2)
        value = layer(latents, masks).item()
        assert low - 5e-3 <= value <= high + 5e-3  # a transport plan's rows have their masses nearly
        spread.append((low, high))
    assert np.ptp([low for low, _ in spread]) < 1e-9 and spread[0][1] - spread[0][0] > 0.1


def test_coupling_range_refuses_masses_of_different_sums():
    with pytest.raises(ValueError, match="no coupling"):
        coupling_range(np.zeros((2, 2)), np.full(2, 0.5), np.full(2, 0.4))


# ---- the model


def raw(lengths: dict[str, list[int]], seed: int = 0) -> dict[str, Tokens]:
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, of_examples in lengths.items():
        mask = (torch.arange(max(1, *of_examples)) < torch.tensor(of_examples)[:, None]).float()
        found[name] = Tokens(torch.randn(*mask.shape, 6, generator=generator) * mask[..., None], mask)
    return found


def test_hidden_modality_is_an_empty_sequence():
    torch.manual_seed(0)
    model = TemporalFusion({"image": 6, "text": 6}, latent_dim=4, hidden_dim=8, rank=2)
    tokens = raw({"image": [4, 3], "text": [2, 5]})
    hidden = model(tokens, present={"text": torch.tensor([0.0, 1.0])}).prediction
    emptied = dict(tokens, text=Tokens(tokens["text"].values, tokens["text"].mask * torch.tensor([[0.0], [1.0]])))
    assert torch.equal(hidden, model(emptied).prediction)
    assert not torch.allclose(hidden[0], model(tokens).prediction[0])
    assert torch.equal(hidden[1], model(tokens).prediction[1])


def test_dropped_features_are_those_of_all_tokens():
    torch.manual_seed(0)
    model = TemporalFusion({"image": 6, "text": 6}, latent_dim=4, hidden_dim=8, rank=2)
    tokens = raw({"image": [4, 3], "text": [2, 5]})
    kept = {name: torch.ones(2, 6) for name in tokens}
    kept["text"][1, 2] = 0
    spoilt = dict(tokens, text=Tokens(tokens["text"].values.clone(), tokens["text"].mask))
    spoilt["text"].values[1, :, 2] = 0  # the mean of an untrained standardisation
    torch.testing.assert_close(model(tokens, kept=kept).prediction, model(spoilt).prediction)


def test_gradient_reaches_every_parameter_and_nothing_is_drawn():
    torch.manual_seed(0)
    model = TemporalFusion({"image": 6, "text": 6}, latent_dim=4, hidden_dim=8, rank=2)
    tokens, state = raw({"image": [4, 3], "text": [2, 5]}), torch.get_rng_state()
    output = model(tokens, uniforms=torch.tensor([[0.1, 0.9], [0.5, 0.2]]))
    loss = output.prediction.square().sum() + sum(x.square().sum() for x in output.reconstructions.values())
    loss.backward()
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_drawn_tokens_are_those_at_the_uniform_numbers():
    torch.manual_seed(0)
    model = TemporalFusion({"image": 6, "text": 6}, latent_dim=4, hidden_dim=8, rank=2)
    tokens = raw({"image": [4, 3], "text": [2, 5]})
    output = model(tokens, uniforms=torch.tensor([[0.26, 0.99], [0.0, 0.61]]))
    expected = {"image": (1, 0), "text": (1, 3)}  # floor of number times length
    for name, places in expected.items():
        for row, place in enumerate(places):
            assert torch.equal(output.standardised[name][row], tokens[name].values[row, place])
            torch.testing.assert_close(output.latents[name][row], output.layers[0][name].values[row, place])
