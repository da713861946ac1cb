"""Certificates against exact worst cases, autograd and dense search; attacks against closed forms."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lmf_module import draw_latents, layers, trained_looking
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

from lmf_module import LowRankMultimodalFusion
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness import certificates as robustness
from mmfusion.robustness.attacks import pgd, random_change
from mmfusion.robustness.certificates import (
    GELU_LEAST_AT,
    GELU_LIPSCHITZ,
    NORMS,
    FeaturePath,
    _slope_range,
    certified_change,
    certified_feature_radius,
    certified_radius,
    change_bounds,
    dual,
    feature_path,
    joint_radius,
    pair_norm,
    worst_change,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
robustness_property = settings(max_examples=30, deadline=None, derandomize=True)
norms = st.sampled_from(NORMS)


def moved(latents: list[Tensor], m: int, change: Tensor) -> list[Tensor]:
    return [z + change if k == m else z for k, z in enumerate(latents)]


def rounding_scale(layer: LowRankMultimodalFusion, *points: list[Tensor]) -> Tensor:
    """What the rounding error of an output is relative to: everything added up without signs."""
    absolute = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in absolute.parameters():
            parameter.abs_()
    return absolute([torch.stack([z.abs() for z in zs]).amax(0) for zs in zip(*points, strict=True)])


def of_norm(x: Tensor, norm: float) -> Tensor:
    """The rows of x at l_p length 1."""
    return x / torch.linalg.vector_norm(x, ord=norm, dim=-1, keepdim=True)


def jacobian(layer: LowRankMultimodalFusion, latents: list[Tensor], m: int) -> Tensor:
    """(N, O, d_m) by autograd, example by example."""
    return vmap(lambda z, *rest: jacrev(lambda x: layer(moved(list(rest), m, x - rest[m])))(z))(latents[m], *latents)


# ---- one latent ------------------------------------------------------------------------------------------------------


@robustness_property
@given(layers(4), st.data(), norms, st.sampled_from(list(TOLERANCE)))
def test_worst_change_of_the_certified_size_brings_the_output_to_zero(layer, data, norm, dtype):
    m = data.draw(st.integers(0, len(layer.input_dims) - 1))
    layer, latents = layer.to(dtype), [z.to(dtype) for z in draw_latents(layer, 5)]
    radius = certified_radius(layer, latents, m, norm)
    change_size = worst_change(layer, latents, m, 1.0, norm)
    assert radius.shape == (5, layer.output_dim) and change_size.shape == (5, layer.output_dim, layer.input_dims[m])
    torch.testing.assert_close(torch.linalg.vector_norm(change_size, ord=norm, dim=-1), torch.ones_like(radius))
    torch.testing.assert_close(worst_change(layer, latents, m, 0.3, norm), 0.3 * change_size)
    for o in range(layer.output_dim):
        there = moved(latents, m, change_size[:, o] * radius[:, o, None])
        y, scale = layer(there)[:, o], rounding_scale(layer, latents, there)[:, o]
        assert (y.abs() <= TOLERANCE[dtype] * scale).all()


@robustness_property
@given(layers(4), st.data(), norms)
def test_no_smaller_change_of_a_latent_changes_a_sign(layer, data, norm):
    m = data.draw(st.integers(0, len(layer.input_dims) - 1))
    latents = draw_latents(layer, 4)
    y, radius = layer(latents), certified_radius(layer, latents, m, norm)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(100, 4, layer.input_dims[m], generator=generator, dtype=torch.float64)
    corners = torch.eye(layer.input_dims[m], dtype=torch.float64).unsqueeze(1).expand(-1, 4, -1)
    directions = torch.cat([directions, directions.sign(), corners, -corners])
    for o in range(layer.output_dim):
        change = of_norm(directions, norm) * (1 - 1e-9) * radius[:, o, None]
        many = [z.expand(len(change), *z.shape) for z in latents]
        assert (layer(moved(many, m, change))[..., o] * y[:, o].sign() > 0).all()


@robustness_property
@given(layers(4), st.data(), norms)
def test_certified_radius_is_the_margin_over_the_dual_norm_of_the_jacobian(layer, data, norm):
    m = data.draw(st.integers(0, len(layer.input_dims) - 1))
    latents = draw_latents(layer, 5)
    length = torch.linalg.vector_norm(jacobian(layer, latents, m), ord={1: math.inf, 2: 2, math.inf: 1}[norm], dim=-1)
    torch.testing.assert_close(
        certified_radius(layer, latents, m, norm), layer(latents).abs() / length, rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("norm", NORMS)
def test_radius_is_infinite_along_a_latent_that_the_output_does_not_depend_on_and_zero_at_the_boundary(norm):
    layer = trained_looking(LowRankMultimodalFusion((4, 3), 2, 3), seed=0)
    layer.projections[1].weight.data.zero_()
    latents = draw_latents(layer, 5)
    assert certified_radius(layer, latents, 1, norm).isposinf().all()
    assert certified_radius(layer, latents, 0, norm).isfinite().all()
    layer.rank_weights.data.zero_()
    layer.bias.data.zero_()
    assert not certified_radius(layer, latents, 0, norm).any()
    assert not joint_radius(layer, latents, 0, 1).any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("modalities", [2, 3])
def test_masked_ranks_change_no_certificate(modalities, shared):
    dims = [4, 3, 2][:modalities]
    large = trained_looking(LowRankMultimodalFusion(dims, 2, 5, active_rank=2, shared_factors=shared), seed=0)
    small = LowRankMultimodalFusion(dims, 2, 2, shared_factors=shared).double()
    own = {n: v[: p.shape[0]] for (n, v), p in zip(large.named_parameters(), small.parameters(), strict=True)}
    small.load_state_dict(own, strict=False)
    latents = draw_latents(large, 5)
    for norm in NORMS:
        torch.testing.assert_close(certified_radius(large, latents, 1, norm), certified_radius(small, latents, 1, norm))
    torch.testing.assert_close(pair_norm(large, latents, 0, 1), pair_norm(small, latents, 0, 1))
    torch.testing.assert_close(joint_radius(large, latents, 0, 1), joint_radius(small, latents, 0, 1))


def test_norm_other_than_one_two_and_infinity_is_refused():
    assert [dual(norm) for norm in NORMS] == [math.inf, 2, 1]
    layer = LowRankMultimodalFusion((4, 3))
    with pytest.raises(ValueError, match=r"1, 2 or infinity, got 1\.5"):
        certified_radius(layer, [torch.ones(4), torch.ones(3)], 0, 1.5)


# ---- two latents -----------------------------------------------------------------------------------------------------


@robustness_property
@given(layers(4).filter(lambda layer: len(layer.input_dims) > 1), st.data())
def test_pair_norm_is_the_spectral_norm_of_the_cross_derivative(layer, data):
    m, n = data.draw(st.permutations(range(len(layer.input_dims))))[:2]
    latents = draw_latents(layer, 3)

    def cross(*zs: Tensor) -> Tensor:
        def output(a: Tensor, b: Tensor) -> Tensor:
            return layer([a if k == m else b if k == n else z for k, z in enumerate(zs)])

        return jacfwd(jacrev(output, 0), 1)(zs[m], zs[n])  # (O, d_m, d_n)

    expected = torch.linalg.matrix_norm(vmap(cross)(*latents), ord=2)
    torch.testing.assert_close(pair_norm(layer, latents, m, n), expected, rtol=1e-10, atol=1e-10)
    if len(layer.input_dims) == 2:
        constant = torch.linalg.matrix_norm(layer.bilinear_map(), ord=2).expand(3, -1)
        torch.testing.assert_close(pair_norm(layer, latents, m, n), constant, rtol=1e-10, atol=1e-10)


@robustness_property
@given(layers(4).filter(lambda layer: len(layer.input_dims) > 1), st.data())
def test_joint_radius_solves_the_quadratic_and_is_below_both_single_ones(layer, data):
    m, n = data.draw(st.permutations(range(len(layer.input_dims))))[:2]
    latents = draw_latents(layer, 4)
    radius = joint_radius(layer, latents, m, n)
    lengths = [torch.linalg.vector_norm(jacobian(layer, latents, k), dim=-1) for k in (m, n)]
    drop = radius * sum(lengths) + radius.square() * pair_norm(layer, latents, m, n)
    torch.testing.assert_close(drop, layer(latents).abs(), rtol=1e-10, atol=1e-10)
    for k in (m, n):
        assert (radius <= certified_radius(layer, latents, k, 2) * (1 + 1e-12)).all()


def alternating_attack(layer, latents: list[Tensor], m: int, n: int, o: int, epsilon: Tensor, seed: int) -> Tensor:
    """y_o (N,) after each latent in turn has moved as far against y_o's sign as epsilon (N,) in l_2 allows."""
    generator = torch.Generator().manual_seed(seed)
    sign, there = layer(latents)[:, o].sign(), list(latents)
    for k in (m, n):
        start = torch.randn(latents[k].shape, generator=generator, dtype=torch.float64)
        there[k] = latents[k] + of_norm(start, 2) * epsilon[:, None]
    for step in range(20):
        k = (m, n)[step % 2]
        gradient = layer.modality_gradient(there, k)[:, o]
        there[k] = latents[k] - (sign * epsilon)[:, None] * F.normalize(gradient, dim=-1, eps=1e-300)
    return layer(there)[:, o]


@robustness_property
@given(layers(4).filter(lambda layer: len(layer.input_dims) > 1), st.data())
def test_no_change_of_two_latents_within_the_joint_radius_changes_a_sign(layer, data):
    m, n = data.draw(st.permutations(range(len(layer.input_dims))))[:2]
    latents = draw_latents(layer, 4)
    y, radius = layer(latents), joint_radius(layer, latents, m, n) * (1 - 1e-9)
    generator = torch.Generator().manual_seed(1)
    for o in range(layer.output_dim):
        many = [z.expand(100, *z.shape) for z in latents]
        for k in (m, n):
            noise = torch.randn(many[k].shape, generator=generator, dtype=torch.float64)
            many = moved(many, k, of_norm(noise, 2) * radius[:, o, None])
        assert (layer(many)[..., o] * y[:, o].sign() > 0).all()
        for seed in range(3):
            assert (alternating_attack(layer, latents, m, n, o, radius[:, o], seed) * y[:, o].sign() > 0).all()


def test_joint_radius_is_attained_where_all_parts_push_the_same_way():
    # y = (a z_1 + 1) (b z_2 + 1) - 9 < 0: raising either factor, and both together, raises y
    layer = LowRankMultimodalFusion((3, 2), 1, 1).double()
    with torch.no_grad():
        for projection in layer.projections:
            projection.bias.fill_(1.0)
        layer.rank_weights.fill_(1.0)
        layer.bias.fill_(-9.0)
    latents = [torch.zeros(1, d, dtype=torch.float64) for d in layer.input_dims]
    radius = joint_radius(layer, latents, 0, 1)[:, 0]
    beyond, within = (
        max(alternating_attack(layer, latents, 0, 1, 0, radius * factor, seed).item() for seed in range(8))
        for factor in (1 + 1e-6, 1 - 1e-6)
    )  # some starts lead to the other corner, where both factors are negative
    assert within < 0 < beyond


# ---- one modality's features as a function by itself -----------------------------------------------------------------


def model_of(dims: dict[str, int], seed: int, **shape: object) -> FusionModel:
    """A float64 model with no parameter, mean or scale at a special value."""
    torch.manual_seed(seed)
    model = FusionModel(dims, **({"latent_dim": 3, "hidden_dim": 5, "rank": 2} | shape)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for buffers in (*model.standardise.values(), model.rescale):
            buffers.mean.normal_()
            buffers.std.uniform_(0.5, 2)
    return model.eval()


@robustness_property
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), st.none() | st.just(1.0), st.sampled_from(list(TOLERANCE))
)
def test_feature_path_is_the_models_own_output_under_a_change_of_features(modalities, outputs, seed, spectral, dtype):
    dims = dict(zip(("video", "audio", "text"), (4, 3, 5), strict=True))
    dims = dict(list(dims.items())[:modalities])
    model = model_of(dims, seed, output_dim=outputs, spectral_norm=spectral).to(dtype)
    features = {name: torch.randn(6, d, dtype=dtype) for name, d in dims.items()}
    for name, d in dims.items():
        path, change = feature_path(model, features, name), torch.randn(6, d, dtype=dtype)
        raw = features | {name: features[name] + change * model.standardise[name].std}
        expected = model(raw).prediction
        # relative to the size of what is added up: outputs of a product may cancel
        scale = path.coefficient.abs().sum(-1) * 5 + path.output.abs() + 1
        assert ((path(change) - expected).abs() <= TOLERANCE[dtype] * scale).all()
        torch.testing.assert_close(path(torch.zeros_like(change)), model(features).prediction)


def test_feature_path_of_another_head_is_refused():
    model = FusionModel({"a": 3, "b": 4}, 2, 3, fusion="concatenation")
    with pytest.raises(ValueError, match="LMF head, not ConcatenationHead"):
        feature_path(model, {"a": torch.ones(2, 3), "b": torch.ones(2, 4)}, "a")


# ---- bounds on what a change of features does ------------------------------------------------------------------------


def path_of(seed: int, hidden: int, width: int, outputs: int = 1, examples: int = 4) -> FeaturePath:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return FeaturePath(
        normal(hidden, width),
        2 * normal(examples, hidden),
        normal(examples, outputs, hidden),
        normal(examples, outputs),
    )


def directions_of(path: FeaturePath) -> Tensor:
    return torch.where(torch.arange(path.output.numel()).view_as(path.output) % 2 == 0, 1.0, -1.0).double()


def largest_found(path: FeaturePath, direction: Tensor, epsilon: float, norm: float) -> Tensor:
    """(N, O): the most that random changes, the ball's extreme points and gradient ascent find."""
    (n, width), outputs = (len(path.activation), path.weight.shape[1]), path.output.shape[1]
    generator = torch.Generator().manual_seed(2)
    inside = of_norm(torch.randn(300, width, generator=generator, dtype=torch.float64), norm)
    inside = torch.cat([inside, inside * torch.linspace(0, 1, 300, dtype=torch.float64)[:, None]])
    if norm == 1:
        extreme = torch.cat([torch.eye(width), -torch.eye(width)]).double()
    else:
        extreme = of_norm(torch.tensor(list(itertools.product((-1.0, 1.0), repeat=width)), dtype=torch.float64), norm)
    changes = epsilon * torch.cat([inside, extreme])
    rise = torch.stack([direction * (path(c.expand(n, -1)) - path.output) for c in changes]).amax(0)
    if norm != 1:
        for o in range(outputs):
            attack = pgd(
                lambda c, o=o: direction[:, o] * (path.output - path(c))[:, o],
                torch.zeros(n, width, dtype=torch.float64),
                epsilon,
                norm,
                steps=20,
            )
            rise[:, o] = torch.maximum(rise[:, o], -attack.value)
    return rise


@robustness_property
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 3), norms, st.sampled_from([0.01, 0.3, 2.0, 20.0]))
def test_each_bound_is_above_all_that_search_and_ascent_find(seed, hidden, width, norm, epsilon):
    path = path_of(seed, hidden, width, outputs=2)
    direction = directions_of(path)
    found = largest_found(path, direction, epsilon, norm)
    bounds = change_bounds(path, direction, epsilon, norm)
    assert set(bounds) == {"interval", "lipschitz", "mean value"}
    for name, bound in bounds.items():
        assert bound.shape == (4, 2) and (bound >= found - 1e-10).all(), name
    torch.testing.assert_close(
        certified_change(path, direction, epsilon, norm),
        torch.minimum(torch.minimum(bounds["interval"], bounds["lipschitz"]), bounds["mean value"]),
    )


@robustness_property
@given(st.integers(0, 999), norms)
def test_bounds_grow_with_epsilon_and_an_epsilon_per_example_is_the_same(seed, norm):
    path = path_of(seed, 6, 4, outputs=2)
    direction = directions_of(path)
    sizes = (0.0, 1e-3, 0.1, 0.5, 1.0, 3.0, 30.0)
    by_size = [change_bounds(path, direction, size, norm) for size in sizes]
    assert all(bound.abs().max() < 1e-14 for bound in by_size[0].values())
    for smaller, larger in itertools.pairwise(by_size):
        assert all((larger[name] >= smaller[name] - 1e-12).all() for name in smaller)
    each = change_bounds(path, direction, torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)[:, None], norm)
    for row, size in enumerate((0.1, 0.5, 1.0, 3.0)):
        for name, bound in by_size[sizes.index(size)].items():
            torch.testing.assert_close(each[name][row], bound[row])


@robustness_property
@given(st.integers(0, 999), norms)
def test_mean_value_bound_of_a_small_change_is_the_gradient_norm(seed, norm):
    path = path_of(seed, 6, 4)
    direction = directions_of(path)
    change = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(path(change).sum(), change)
    length = torch.linalg.vector_norm(gradient, ord=dual(norm), dim=-1, keepdim=True)
    bound = change_bounds(path, direction, 1e-8, norm)["mean value"] / 1e-8
    # the slopes' spread, 1e-8 of curvature, comes on top of it
    assert (bound >= length * (1 - 1e-9)).all() and (bound - length <= 1e-5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_interval_bound_of_one_neuron_is_exact(norm):
    # one neuron and one feature: a dense grid over the interval is the truth
    steps = torch.linspace(-1, 1, 401, dtype=torch.float64)
    for seed, epsilon in itertools.product(range(12), (0.2, 1.0, 4.0)):
        path = path_of(seed, 1, 1, examples=3)
        for direction in (torch.ones(3, 1).double(), -torch.ones(3, 1).double()):
            rise = torch.stack([direction * (path(s.expand(3, 1)) - path.output) for s in steps * epsilon])
            ends_and_grid = rise.amax(0)
            bound = change_bounds(path, direction, epsilon, norm)["interval"]
            assert (bound >= ends_and_grid - 1e-12).all()
            assert (
                bound - ends_and_grid
                <= 1e-4 * epsilon**2 * path.weight.abs().max() ** 2 * path.coefficient.abs().squeeze(-1)
            ).all()


def test_slope_range_is_that_of_a_dense_grid_over_the_interval():
    generator = torch.Generator().manual_seed(0)
    ends = torch.sort(6 * torch.randn(400, 2, generator=generator, dtype=torch.float64), dim=1).values
    ends[:100] = torch.sort(2 * torch.rand(100, 2, generator=generator, dtype=torch.float64) - 2, dim=1).values
    low, high = ends.unbind(1)
    grid = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 5001, dtype=torch.float64)
    grid = grid.requires_grad_(True)
    (slopes,) = torch.autograd.grad(F.gelu(grid).sum(), grid)
    least, most = _slope_range(low, high)
    for exact, found in ((most - slopes.amax(1), most), (slopes.amin(1) - least, least)):
        assert (exact >= -1e-12).all() and (exact <= 1e-4).all(), found


def test_constants_of_gelu_are_its_own():
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(x).sum(), x)
    assert slope.max() <= GELU_LIPSCHITZ and slope.max() == pytest.approx(GELU_LIPSCHITZ, abs=1e-8)
    least = torch.tensor(GELU_LEAST_AT, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(F.gelu(least), least)[0] == pytest.approx(0, abs=1e-12)
    assert F.gelu(x).min() >= F.gelu(least)


# ---- certified radius of features ------------------------------------------------------------------------------------


def margin_of(path: FeaturePath, o: int):
    return lambda change: path.output[:, o].sign() * path(change)[:, o]


@pytest.mark.parametrize("norm", [2, math.inf])
def test_nothing_is_found_within_the_certified_feature_radius_and_something_not_far_beyond(norm):
    # inputs wide enough, and outputs small enough, that a radius means something
    path = path_of(0, 8, 10, outputs=2, examples=200)
    radius = certified_feature_radius(path, norm)
    assert radius.shape == (200, 2) and (radius > 0).all()
    like = torch.zeros(200, 10, dtype=torch.float64)
    for o in range(2):
        reached = radius[:, o] < 1e4
        inside = pgd(margin_of(path, o), like, radius[:, o], norm, steps=40)
        assert (inside.value > 0).all()
        shares = []
        for factor in (1.1, 1.5, 4.0):
            outside = pgd(margin_of(path, o), like, factor * radius[:, o], norm, steps=40)
            shares.append((outside.value <= 0)[reached].double().mean().item())
        assert shares[0] < shares[1] < shares[2] and shares[2] > 0.8, shares


@pytest.mark.parametrize("norm", NORMS)
def test_certified_feature_radius_was_checked_to_be_below_the_margin(norm):
    path = path_of(1, 6, 5, outputs=2, examples=50)
    radius = certified_feature_radius(path, norm)
    direction = -path.output.sign()
    assert (certified_change(path, direction, radius, norm) < path.output.abs()).all()
    beyond = certified_change(path, direction, radius * (1 + 1e-6), norm) >= path.output.abs()
    assert (beyond | (radius >= 1e4 * (1 - 1e-6))).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_margin_is_no_radius(norm):
    path = path_of(2, 6, 5, outputs=2)
    path.output[1, 0] = 0
    radius = certified_feature_radius(path, norm)
    assert radius[1, 0] == 0 and (radius.flatten()[[0, 1, 3, 4, 5, 6, 7]] > 0).all()


def test_radius_of_what_no_change_can_flip_is_the_largest(monkeypatch):
    counted = []

    def counting(*arguments) -> Tensor:
        counted.append(1)
        assert len(counted) < 500, "does not come to an end"
        return certified_change(*arguments)

    monkeypatch.setattr(robustness, "certified_change", counting)
    path = path_of(3, 6, 5)
    path.coefficient[0] = 0
    path.coefficient[1] = -path.output[1].sign() * path.coefficient[1].abs()  # this one can be flipped
    radius = certified_feature_radius(path, 2)
    assert radius[0] == 1e4 and 0 < radius[1] < 1e3


# ---- attacks ---------------------------------------------------------------------------------------------------------


@robustness_property
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99), st.sampled_from([2, math.inf]))
def test_pgd_on_an_affine_objective_is_the_closed_form(examples, width, seed, norm):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(examples, width, generator=generator, dtype=torch.float64)
    epsilon = 0.1 + torch.rand(examples, generator=generator, dtype=torch.float64)
    attack = pgd(lambda c: (g * c).sum(1) + 3, torch.zeros_like(g), epsilon, norm, steps=20)
    expected = 3 - epsilon * torch.linalg.vector_norm(g, ord=dual(norm), dim=1)
    torch.testing.assert_close(attack.value, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((g * attack.change).sum(1) + 3, attack.value)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 4, 4)])
def test_pgd_stays_in_ball_and_bounds_and_is_never_worse_than_no_change(norm, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    low, high = -0.3 * torch.rand(shape, generator=generator), 0.3 * torch.rand(shape, generator=generator)

    def objective(change: Tensor) -> Tensor:
        return torch.sin(5 * weight * change).flatten(1).sum(1) + change.square().flatten(1).sum(1)

    like, epsilon = torch.zeros(shape), torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0])
    attack = pgd(objective, like, epsilon, norm, steps=15, bounds=(low, high))
    length = torch.linalg.vector_norm(attack.change.flatten(1), ord=norm, dim=1)
    assert (length <= epsilon * (1 + 1e-6)).all() and length[0] == 0
    assert (attack.change >= low).all() and (attack.change <= high).all()
    assert (attack.value <= objective(like)).all() and (attack.value[2:] < objective(like)[2:] - 1e-3).all()
    torch.testing.assert_close(objective(attack.change), attack.value)
    free = pgd(objective, like, epsilon, norm, steps=15)
    assert (free.change.flatten(1) < low.flatten(1)).any(), "the bounds must have been active"


@pytest.mark.parametrize("norm", [2, math.inf])
def test_attack_on_one_example_does_not_depend_on_the_others_and_restarts_never_hurt(norm):
    path, other = path_of(4, 8, 5, examples=6), path_of(5, 8, 5, examples=6)
    mixed = FeaturePath(
        path.weight,
        torch.cat([path.activation[:3], other.activation[3:]]),
        torch.cat([path.coefficient[:3], other.coefficient[3:]]),
        torch.cat([path.output[:3], other.output[3:]]),
    )
    like = torch.zeros(6, 5, dtype=torch.float64)
    one, two = (pgd(margin_of(p, 0), like, 1.0, norm) for p in (path, mixed))
    torch.testing.assert_close(one.change[:3], two.change[:3], rtol=0, atol=0)
    assert not torch.equal(one.change[3:], two.change[3:])
    values = [pgd(margin_of(path, 0), like, 3.0, norm, restarts=k).value for k in (1, 2, 5)]
    assert (values[1] <= values[0]).all() and (values[2] <= values[1]).all()
    assert (values[2] < values[0] - 1e-6).any(), "some restart must have found more"


def test_attack_without_a_gradient_stays_where_it_is():
    for norm in (2, math.inf):
        attack = pgd(lambda c: (0 * c).sum(1) + 1, torch.zeros(3, 4), 1.0, norm, restarts=1)
        assert not attack.change.any() and attack.value.tolist() == [1, 1, 1]


def test_same_generator_same_attack_and_random_changes_lie_on_the_surface():
    path, like = path_of(6, 8, 5), torch.zeros(4, 5, dtype=torch.float64)
    attacks = [pgd(margin_of(path, 0), like, 1.0, 2, steps=5) for _ in range(2)]
    assert torch.equal(attacks[0].change, attacks[1].change)
    for norm in (2, math.inf):
        x = random_change(like, 0.7, norm, torch.Generator().manual_seed(0))
        torch.testing.assert_close(torch.linalg.vector_norm(x, ord=norm, dim=1), torch.full((4,), 0.7).double())
        assert len(x.unique()) > 1


def test_pgd_of_another_norm_is_refused():
    with pytest.raises(ValueError, match="2 and infinity, got 1"):
        pgd(lambda c: c.sum(1), torch.zeros(2, 3), 1.0, 1)
