"""Transport plans, costs and divergences: against POT, against finite differences, and where tokens are degenerate."""

import shutil

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from mmfusion.losses.optimal_transport import (
    cosine_cost,
    sinkhorn_divergence,
    squared_distance_cost,
    transport_cost,
    transport_loss,
)
from mmfusion.losses.transport_plans import (
    LARGEST_EXPONENT,
    effective_tokens,
    ipot,
    marginal_error,
    marginals,
    sinkhorn,
)

EXACT = {"rtol": 1e-9, "atol": 1e-11}
KERNELS = ["log", "exponential"]
COSTS = {"cosine": cosine_cost, "squared distance": squared_distance_cost}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(*shape: int, seed: int = 0) -> Tensor:
    w = uniform(*shape, seed=seed) + 0.1
    return w / w.sum(-1, keepdim=True)


def prefix(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size) < torch.tensor(lengths)[:, None]


LOSSES = {
    "divergence": sinkhorn_divergence,
    "divergence, exponential": lambda *t, **k: sinkhorn_divergence(*t, kernel="exponential", **k),
    "divergence, squared distance": lambda *t, **k: sinkhorn_divergence(*t, cost=squared_distance_cost, **k),
    "ipot": transport_loss,
    "ipot, debiased": lambda *t, **k: transport_loss(*t, debiased=True, **k),
    "sinkhorn": lambda *t, **k: transport_loss(*t, method="sinkhorn", **k),
}


# ---- costs and masses ------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_costs_are_those_of_a_double_loop(n, m, d, seed):
    x, y = normal(2, n, d, seed=seed), normal(2, m, d, seed=seed + 1)
    angle, distance = cosine_cost(x, y), squared_distance_cost(x, y)
    for k in range(2):
        for i in range(n):
            for j in range(m):
                cosine = torch.nn.functional.cosine_similarity(x[k, i], y[k, j], dim=0)
                torch.testing.assert_close(angle[k, i, j], 1 - cosine, **EXACT)
                torch.testing.assert_close(distance[k, i, j], (x[k, i] - y[k, j]).square().sum(), **EXACT)


@pytest.mark.parametrize("name", COSTS)
def test_costs_have_small_gradients_at_zero_and_at_identical_vectors(name):
    x = torch.cat([torch.zeros(1, 4), normal(2, 4).float()])
    y = torch.cat([torch.zeros(1, 4), x[1:2], normal(1, 4, seed=1).float()])
    for first, second in ((x, y), (y, x), (x, x)):
        found = grad(lambda a, b=second: COSTS[name](a, b).sum())(first)
        assert found.isfinite().all() and found.abs().max() < 100


def test_masses_are_uniform_over_real_tokens_and_0_for_an_empty_sequence():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    expected = torch.tensor([[0.25] * 4, [0, 0.5, 0, 0.5], [0.0] * 4])
    for given_mask in (mask, mask.bool(), mask.float()):
        assert torch.equal(marginals(given_mask), expected)
    assert marginals(mask.bfloat16()).dtype == torch.float32
    assert marginals(mask, torch.float64)[1, 1] == 0.5 and marginals(mask, torch.float64).dtype == torch.float64


# ---- against POT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_plan_potentials_and_value_are_those_of_pot(kernel, epsilon):
    cost, a, b = cosine_cost(normal(6, 5), normal(8, 5, seed=1)), masses(6), masses(8, seed=1)
    plan, f, g = sinkhorn(cost, a, b, epsilon=epsilon, iterations=3000, kernel=kernel)
    oracle = ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-13)
    torch.testing.assert_close(plan, oracle, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(a[:, None] * b * torch.exp((f[:, None] + g - cost) / epsilon), plan, **EXACT)
    kl = (oracle * torch.log(oracle / (a[:, None] * b))).sum()
    value = transport_cost(cost, a, b, epsilon=epsilon, iterations=3000, kernel=kernel)
    torch.testing.assert_close(value, (oracle * cost).sum() + epsilon * kl, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("iterations", [1, 2, 5, 6, 7, 20, 23])
def test_each_iteration_is_the_textbook_one(kernel, iterations):
    cost, a, b = cosine_cost(normal(6, 3), normal(8, 3, seed=1)), masses(6), masses(8, seed=1)
    epsilon = 0.05
    v = torch.ones(8).double()
    for _ in range(iterations):
        u = a / (torch.exp(-cost / epsilon) @ (b * v))
        v = 1 / (torch.exp(-cost / epsilon).T @ u)
    plan = sinkhorn(cost, a, b, epsilon=epsilon, iterations=iterations, kernel=kernel).plan
    torch.testing.assert_close(plan, u[:, None] * torch.exp(-cost / epsilon) * b * v, **EXACT)
    torch.testing.assert_close(plan.sum(0), b, **EXACT)


def test_batched_solver_of_pot_agrees_in_value_and_gradient():
    cost = cosine_cost(normal(4, 7, 5), normal(4, 7, 5, seed=1)).requires_grad_()
    result = ot.solve_batch(cost, reg=0.1, max_iter=400, tol=0.0, method="log_sinkhorn", reg_type="kl", grad="envelope")
    theirs = torch.autograd.grad(result.value_linear.sum(), cost)[0]
    ours = transport_cost(cost, epsilon=0.1, iterations=400)
    torch.testing.assert_close(ours, result.value, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), cost)[0], theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_proximal_points_converge_to_the_exact_value(seed):
    cost, a, b = cosine_cost(normal(9, 6, seed=seed), normal(7, 6, seed=seed + 50)), masses(9), masses(7, seed=1)
    exact = ot.emd2(a, b, cost)
    errors = []
    for iterations in (10, 50, 1500):
        plan = ipot(cost, a, b, iterations=iterations)
        torch.testing.assert_close(plan.sum(0), b, **EXACT)
        errors.append(abs((plan * cost).sum() - exact))
    assert errors[1] < 0.02 * exact and errors[2] < 1e-3 * exact
    entropic = sinkhorn(cost, a, b, epsilon=0.1, iterations=500).plan
    assert abs((entropic * cost).sum() - exact) > 3 * errors[1], "an entropic plan is farther off"


def test_proximal_points_are_those_of_the_published_loop():
    """Algorithm 1 of Xie et al. in the exponential domain, from the plan a b^T in place of 1."""
    cost, a, b = cosine_cost(normal(5, 4), normal(6, 4, seed=1)), masses(5), masses(6, seed=1)
    kernel, plan, sigma = torch.exp(-cost / 0.5), a[:, None] * b, torch.ones(6).double()
    for _ in range(20):
        q = kernel * plan
        delta = a / (q @ sigma)
        sigma = b / (q.T @ delta)
        plan = delta[:, None] * q * sigma
    torch.testing.assert_close(ipot(cost, a, b, beta=0.5, iterations=20), plan, **EXACT)


# ---- gradients -------------------------------------------------------------------------------------------------------


def differences(function, x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function at x."""
    moves = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape) * step
    return ((vmap(function)(x + moves) - vmap(function)(x - moves)) / (2 * step)).reshape(x.shape)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_towards_the_cost_is_the_plan_and_that_of_the_converged_value(kernel):
    cost, a, b = cosine_cost(normal(4, 3), normal(5, 3, seed=1)), masses(4), masses(5, seed=1)

    def value(c: Tensor) -> Tensor:
        return transport_cost(c, a, b, epsilon=0.2, iterations=400, kernel=kernel)

    found = grad(value)(cost)
    assert torch.equal(found, sinkhorn(cost, a, b, epsilon=0.2, iterations=400, kernel=kernel).plan)
    torch.testing.assert_close(found, differences(value, cost), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_the_divergence_is_that_of_its_converged_value(name, side):
    tokens = [normal(4, 3), normal(5, 3, seed=1)]
    masks = prefix([3], 4)[0], prefix([4], 5)[0]

    def value(moved: Tensor) -> Tensor:
        x, y = (moved if k == side else z for k, z in enumerate(tokens))
        return sinkhorn_divergence(x, y, *masks, cost=COSTS[name], epsilon=0.5, iterations=2000)

    found = grad(value)(tokens[side])
    torch.testing.assert_close(found, differences(value, tokens[side]), rtol=1e-5, atol=1e-7)
    assert found.abs().max() > 0.01 and torch.equal(found[-1], torch.zeros(3).double())


@pytest.mark.parametrize("method", ["ipot", "sinkhorn", "random"])
def test_gradient_of_the_loss_takes_the_plan_as_given(method):
    x, y = normal(4, 3), normal(5, 3, seed=1)
    noise = uniform(4, 5) if method == "random" else None
    cost = cosine_cost(x, y)
    if method == "ipot":
        plan = ipot(cost)
    else:
        plan = sinkhorn(cost if noise is None else noise).plan
    torch.testing.assert_close(transport_loss(x, y, method=method, noise=noise), (plan * cost).sum(), **EXACT)
    found = grad(lambda x: transport_loss(x, y, method=method, noise=noise))(x)
    torch.testing.assert_close(found, grad(lambda x: (plan * cosine_cost(x, y)).sum())(x), **EXACT)


# ---- debiasing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["divergence", "divergence, exponential", "ipot, debiased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_sequences_are_exactly_0_apart_and_at_rest(name, dtype):
    x, mask = normal(3, 6, 4).to(dtype), prefix([6, 4, 1], 6)
    for given_masks in ((), (mask, mask)):
        assert torch.equal(LOSSES[name](x, x.clone(), *given_masks), torch.zeros(3, dtype=dtype))
        slopes = grad(lambda x, y, m=given_masks: LOSSES[name](x, y, *m).sum(), argnums=(0, 1))(x, x.clone())
        assert all(slope.abs().max() < 1e-6 for slope in slopes)
    assert (transport_cost(cosine_cost(x, x), epsilon=0.5, iterations=200) > 0.1).all(), "without debiasing it is not"


@given(n=st.integers(1, 7), m=st.integers(1, 7), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_divergence_is_not_negative_symmetric_and_blind_to_the_order_of_tokens(n, m, seed):
    x, y = normal(n, 3, seed=seed), normal(m, 3, seed=seed + 1)
    found = sinkhorn_divergence(x, y, epsilon=0.5, iterations=300)
    assert found > -1e-9
    torch.testing.assert_close(sinkhorn_divergence(y, x, epsilon=0.5, iterations=300), found, rtol=1e-6, atol=1e-8)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(sinkhorn_divergence(x[order], y, epsilon=0.5, iterations=300), found, **EXACT)


def test_divergence_grows_with_a_shift_and_is_its_square_at_large_epsilon():
    x = normal(20, 3)
    shifts = [0.1, 0.5, 2.0]
    found = [sinkhorn_divergence(x, x + s, cost=squared_distance_cost, epsilon=2.0, iterations=500) for s in shifts]
    for s, value in zip(shifts, found, strict=True):
        torch.testing.assert_close(value, torch.tensor(3 * s**2).double(), rtol=1e-6, atol=1e-9)


def test_equal_tokens_everywhere_cost_nothing():
    """The collapse that another term has to prevent."""
    x = torch.ones(5, 3).double()
    for name, loss in LOSSES.items():
        assert loss(x, 2 * x[:4] if "squared" not in name else x[:4]).abs() < 1e-9


# ---- masks -----------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_count_as_absent(name, data):
    n, m, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 99))
    mask_x = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    mask_y = torch.tensor(data.draw(st.lists(st.booleans(), min_size=m, max_size=m)))
    x, y = normal(n, 3, seed=seed), normal(m, 3, seed=seed + 1)
    found = LOSSES[name](x, y, mask_x, mask_y)
    if mask_x.any() and mask_y.any():
        torch.testing.assert_close(found, LOSSES[name](x[mask_x], y[mask_y]), **EXACT)
    else:
        assert found == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filling", [1e4, 1e30, float("inf"), float("nan")])
def test_content_of_padding_never_matters(name, filling):
    x, y = normal(3, 5, 4).float(), normal(3, 6, 4, seed=1).float()
    mask_x, mask_y = prefix([5, 2, 0], 5), prefix([3, 6, 4], 6)
    spoilt = [torch.where(mask[..., None], z, filling) for z, mask in ((x, mask_x), (y, mask_y))]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return LOSSES[name](x, y, mask_x, mask_y)

    assert torch.equal(loss(*spoilt), loss(x, y))
    slopes = [grad(lambda x, y: loss(x, y).sum(), argnums=(0, 1))(*tokens) for tokens in (spoilt, (x, y))]
    for found, expected, mask in zip(*slopes, (mask_x, mask_y), strict=True):
        assert torch.equal(found, expected) and (found[~mask] == 0).all()
    assert slopes[0][0][:2].abs().max() > 0 and (slopes[0][0][2] == 0).all() and (slopes[0][1][2] == 0).all()


@pytest.mark.parametrize("solver", [*KERNELS, "ipot"])
@pytest.mark.parametrize("filling", [0.0, float("inf"), float("nan")])
def test_plan_is_0_at_padding_and_of_empty_problems(solver, filling):
    mask_a, mask_b = prefix([4, 2, 0, 3, 0], 4), prefix([2, 5, 3, 0, 0], 5)
    pairs = mask_a[..., None] & mask_b[:, None]
    cost = torch.where(pairs, 2 * uniform(5, 4, 5), filling).float().requires_grad_()
    a, b = marginals(mask_a), marginals(mask_b)
    if solver == "ipot":
        plan = ipot(cost, a, b)
    else:
        plan, f, g = sinkhorn(cost, a, b, kernel=solver, iterations=300)
        assert (f[~mask_a] == 0).all() and (g[~mask_b] == 0).all() and (f[2:] == 0).all() and (g[2:] == 0).all()
        value = transport_cost(cost, a, b, kernel=solver)
        assert torch.autograd.grad(value.sum(), cost)[0].isfinite().all() and (value[2:] == 0).all()
    assert (plan[~pairs] == 0).all() and (plan[pairs] >= 0).all()
    assert (marginal_error(plan, a, b)[:2] < 1e-3).all()


# ---- degenerate tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["identical", "single", "far apart", "zero", "one far"])
def test_no_nan_in_value_or_gradient(name, case):
    x, y = normal(4, 6, 3).float(), normal(4, 5, 3, seed=1).float()
    if case == "identical":
        x, y = torch.ones(4, 6, 3), torch.ones(4, 5, 3)
    elif case == "single":
        x, y = x[:, :1], y[:, :1]
    elif case == "far apart":
        y = y + 100 / 3**0.5  # squared distance 1e4
    elif case == "zero":
        x = torch.zeros(4, 6, 3)
    else:
        x[:, 0] += 100 / 3**0.5
    found = LOSSES[name](x, y)
    slopes = grad(lambda x, y: LOSSES[name](x, y).sum(), argnums=(0, 1))(x, y)
    assert found.isfinite().all() and all(slope.isfinite().all() for slope in slopes)
    if case == "single" and name in ("ipot", "sinkhorn"):
        torch.testing.assert_close(found, cosine_cost(x, y)[:, 0, 0])


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_log_kernel_keeps_masses_whatever_the_scale_of_costs(iterations):
    """The steps that scale a plan are cut off far from convergence: the dual must rise, the columns must be right."""
    for scale in (1e-6, 1.0, 100.0, 1e4):
        cost = scale * uniform(8, 6, 7)
        plan, f, g = sinkhorn(cost, iterations=iterations)
        torch.testing.assert_close(plan.sum(1), torch.full((8, 7), 1 / 7, dtype=torch.float64), **EXACT)
        assert f.isfinite().all() and g.isfinite().all()
        exact = torch.tensor([ot.emd2(np.full(6, 1 / 6), np.full(7, 1 / 7), c.numpy()) for c in cost])
        values = [transport_cost(cost, iterations=k) for k in (iterations, iterations + 1, iterations + 20)]
        assert (values[0] <= values[1] + 1e-9).all() and (values[1] <= values[2] + 1e-9).all()
        assert (values[2] <= exact + 0.05 * np.log(42) + 1e-9).all()


def test_log_kernel_reaches_the_exact_value_of_far_apart_clusters():
    cost = torch.full((6, 6), 1e4).double() * (1 - torch.eye(6).double()) + uniform(6, 6)
    assert abs(transport_cost(cost, iterations=200) - cost.diagonal().mean() - 0.05 * np.log(6)) < 1e-6


def test_exponential_kernel_holds_at_its_bound_and_refuses_beyond():
    epsilon = 2 / LARGEST_EXPONENT
    for seed in range(20):  # the worst costs are at either end of the range
        cost = 2 * (uniform(30, 20, seed=seed) < 0.05 * (seed + 0.5)).double()
        a, b = masses(30, seed=seed), masses(20, seed=seed + 1)
        options = {"epsilon": epsilon, "iterations": 40}
        exact = sinkhorn(cost, a, b, **options)
        found = sinkhorn(cost.float(), a, b, kernel="exponential", **options)
        torch.testing.assert_close(found.plan.double(), exact.plan, rtol=1e-3, atol=1e-7)
        assert abs(transport_cost(cost.float(), a, b, kernel="exponential", **options) - transport_cost(
            cost, a, b, **options)) < 1e-5  # fmt: skip
    with pytest.raises(ValueError, match=r"needs epsilon of at least cost_bound / 50 = 0\.04, got 0\.039"):
        sinkhorn(cost, epsilon=0.039, kernel="exponential")
    with pytest.raises(ValueError, match="log kernel"):
        sinkhorn(cost, epsilon=1.0, kernel="exponential", cost_bound=51.0)
    sinkhorn(cost, epsilon=0.039)


@pytest.mark.parametrize("tokens", [(20, 20), (3, 40)])
def test_float32_kernels_agree_with_float64(tokens):
    cost = cosine_cost(normal(16, tokens[0], 32), normal(16, tokens[1], 32, seed=1))
    exact = sinkhorn(cost, epsilon=0.05, iterations=50).plan
    for kernel in KERNELS:
        found = sinkhorn(cost.float(), epsilon=0.05, iterations=50, kernel=kernel).plan
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=2e-4, atol=1e-7)
        half = sinkhorn(cost.bfloat16(), epsilon=0.05, iterations=50, kernel=kernel).plan
        assert half.dtype == torch.float32 and (marginal_error(half) < 1e-3).all()


# ---- measures of a plan and the control ------------------------------------------------------------------------------


def test_effective_tokens_of_known_plans():
    uniform_plan, matching = torch.full((4, 6), 1 / 24), torch.eye(5) / 5
    torch.testing.assert_close(effective_tokens(uniform_plan), torch.tensor(6.0))
    torch.testing.assert_close(effective_tokens(matching), torch.tensor(1.0))
    halves = torch.tensor([[0.25, 0.25, 0], [0, 0, 0.5], [0, 0, 0]])
    torch.testing.assert_close(effective_tokens(halves), torch.tensor(2.0**0.5))
    padded = torch.nn.functional.pad(uniform_plan, (0, 3, 0, 2))
    torch.testing.assert_close(effective_tokens(padded), torch.tensor(6.0))
    assert effective_tokens(torch.zeros(2, 3, 4)).equal(torch.zeros(2))
    entropies = [effective_tokens(sinkhorn(uniform(6, 6), epsilon=e).plan) for e in (0.02, 0.1, 1.0)]
    assert entropies[0] < entropies[1] < entropies[2] <= 6


def test_marginal_error_is_the_sum_of_both_sides():
    plan = torch.tensor([[0.5, 0.1], [0.0, 0.4]])
    torch.testing.assert_close(marginal_error(plan), torch.tensor(0.1 + 0.1 + 0.0))
    torch.testing.assert_close(marginal_error(plan, torch.tensor([0.6, 0.4]), torch.tensor([0.3, 0.7])), 
                               torch.tensor(0.4))  # fmt: skip


def test_random_plan_has_the_masses_and_does_not_know_the_tokens():
    mask_x, mask_y, noise = prefix([5, 3], 5), prefix([4, 6], 6), uniform(2, 5, 6)
    x, y = normal(2, 5, 4), normal(2, 6, 4, seed=1)
    plan = sinkhorn(noise, marginals(mask_x, torch.float64), marginals(mask_y, torch.float64)).plan
    assert (marginal_error(plan, marginals(mask_x, torch.float64), marginals(mask_y, torch.float64)) < 1e-2).all()
    found = transport_loss(x, y, mask_x, mask_y, method="random", noise=noise)
    torch.testing.assert_close(found, (plan * cosine_cost(x, y)).sum((-2, -1)), **EXACT)
    assert (found > transport_loss(x, y, mask_x, mask_y)).all()
    other = transport_loss(x, y, mask_x, mask_y, method="random", noise=uniform(2, 5, 6, seed=5))
    assert (found - other).abs().min() > 1e-3


# ---- how they run ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:There is a performance drop")  # vmap, falling back to a loop
@pytest.mark.parametrize("name", LOSSES)
def test_vmap_and_its_gradient_are_those_of_a_loop(name):
    x, y = normal(3, 2, 5, 4), normal(3, 2, 6, 4, seed=1)
    mask_x, mask_y = prefix([5, 3, 1, 4, 2, 0], 5).reshape(3, 2, 5), prefix([6, 2, 5, 1, 0, 3], 6).reshape(3, 2, 6)
    tokens = (x, y, mask_x, mask_y)
    rows = list(zip(*tokens, strict=True))
    torch.testing.assert_close(vmap(LOSSES[name])(*tokens), torch.stack([LOSSES[name](*r) for r in rows]), **EXACT)
    torch.testing.assert_close(vmap(vmap(LOSSES[name]))(*tokens), LOSSES[name](*tokens), **EXACT)
    slope = grad(lambda *t: LOSSES[name](*t).sum(), argnums=(0, 1))
    loops = [torch.stack(side) for side in zip(*[slope(*r) for r in rows], strict=True)]
    for found, loop in zip(vmap(slope)(*tokens), loops, strict=True):
        torch.testing.assert_close(found, loop, **EXACT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_cost_under_many_masks_can_be_mapped(kernel):
    cost, mask = uniform(4, 5), prefix([4, 2, 1], 4)
    found = vmap(lambda a: transport_cost(cost, a, kernel=kernel))(marginals(mask, torch.float64))
    loop = torch.stack([transport_cost(cost, a, kernel=kernel) for a in marginals(mask, torch.float64)])
    torch.testing.assert_close(found, loop, **EXACT)
    torch.testing.assert_close(
        transport_cost(cost.expand(3, 4, 5), marginals(mask, torch.float64), kernel=kernel), loop, **EXACT
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    x, y = normal(2, 5, 4).to(dtype), normal(2, 6, 4, seed=1).to(dtype)
    assert LOSSES[name](x, y).dtype == torch.float32
    torch.testing.assert_close(LOSSES[name](x, y), LOSSES[name](x.float(), y.float()))
    x, y = x.float().requires_grad_(), y.float()
    exact = LOSSES[name](x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](x, y)
    assert torch.equal(found, exact), "autocast rounds nothing"
    slopes = [torch.autograd.grad(value.sum(), x)[0] for value in (found, exact)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)


COMPILED = [("divergence", "aot_eager"), ("divergence, exponential", "aot_eager"), ("ipot, debiased", "aot_eager")]


@pytest.mark.parametrize(("name", "backend"), [*COMPILED, ("sinkhorn", "inductor")])
def test_compiles_without_a_graph_break(name, backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    x, y, mask_x, mask_y = normal(3, 5, 4), normal(3, 6, 4, seed=1), prefix([5, 3, 0], 5), prefix([6, 2, 5], 6)

    def slope(x: Tensor, y: Tensor) -> Tensor:
        def loss(x: Tensor, y: Tensor, mask_x: Tensor, mask_y: Tensor) -> Tensor:
            return LOSSES[name](x, y, mask_x, mask_y, iterations=3)

        return vmap(grad(loss))(x, y, mask_x, mask_y)

    compiled = torch.compile(slope, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, y), slope(x, y), **EXACT)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    cost, x = uniform(4, 5), normal(4, 3)
    for call, message in {
        "shape": (lambda: sinkhorn(cost[0]), r"must be \(\.\.\., n, m\)"),
        "no token": (lambda: sinkhorn(cost[:0]), "a token at least"),
        "a": (lambda: sinkhorn(cost, masses(5)), r"masses must be \(\.\.\., 4\)"),
        "b": (lambda: ipot(cost, None, masses(4)), r"masses must be .* and \(\.\.\., 5\)"),
        "epsilon": (lambda: sinkhorn(cost, epsilon=0.0), "epsilon"),
        "bound": (lambda: sinkhorn(cost, cost_bound=-1.0), "cost_bound"),
        "beta": (lambda: ipot(cost, beta=-0.5), "beta"),
        "iterations": (lambda: ipot(cost, iterations=0), "iterations"),
        "kernel": (lambda: transport_cost(cost, kernel="exp"), "kernel is one of log, exponential"),
        "method": (lambda: transport_loss(x, x, method="emd"), "method is one of ipot, sinkhorn, random"),
        "noise": (lambda: transport_loss(x, x, noise=uniform(4, 4)), "noise goes with the random plan"),
        "no noise": (lambda: transport_loss(x, x, method="random"), "noise goes with the random plan"),
        "debiased": (lambda: transport_loss(x, x, method="random", noise=uniform(4, 4), debiased=True), "itself"),
    }.values():
        with pytest.raises(ValueError, match=message):
            call()
