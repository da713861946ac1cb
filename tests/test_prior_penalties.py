"""Penalties towards N(0, I) of Gaussian latents: against draws of the noise, definitions, and where they pull."""

import math

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torch.func import grad, vmap

from jwae_module import bures_penalty, characteristic_penalty, mmd_penalty, sliced_wasserstein_penalty

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DIRECTIONS = normal(64, 32, seed=9)
PENALTIES = {
    "mmd": mmd_penalty,
    "bures": bures_penalty,
    "sliced": lambda z, variances=None: sliced_wasserstein_penalty(
        z, variances, directions=DIRECTIONS[:, : z.shape[-1]]
    ),
    "characteristic": lambda z, variances=None: characteristic_penalty(
        z, variances, directions=DIRECTIONS[:, : z.shape[-1]]
    ),
}
UNBIASED = ["mmd", "characteristic"]


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNBIASED)
def test_noise_is_integrated_as_the_mean_over_its_draws(name):
    z, variances = normal(6, 4) * 1.5, uniform(4, seed=1) * 2
    noise = normal(20_000, 6, 4, seed=2)
    drawn = vmap(PENALTIES[name])(z + noise * variances.sqrt())
    error = drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - PENALTIES[name](z, variances)) < 4 * error
    assert error < 0.05 * abs(drawn.mean() - PENALTIES[name](z)), "and that of the means alone is far from it"


@pytest.mark.parametrize("name", ["mmd", "bures", "characteristic"])  # the sliced one then sees its own quantiles
def test_noise_of_variance_0_is_none(name):
    z, penalty = normal(6, 4), PENALTIES[name]
    torch.testing.assert_close(penalty(z, torch.zeros(4).double()), penalty(z), **EXACT)


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("noise", [0.0, 0.6, 1.0])
def test_unbiased_under_the_prior(name, noise):
    z = normal(4000, 16, 4) * (1 - noise) ** 0.5
    values = vmap(lambda z: PENALTIES[name](z, torch.full((4,), noise).double()))(z)
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5 + 1e-12


def test_bures_is_the_distance_of_gaussians():
    z, variances = normal(9, 4) @ normal(4, 4, seed=1), uniform(4, seed=2)
    mean, covariance = z.mean(0).numpy(), z.T.cov().numpy() + torch.diag(variances).numpy()
    cross = sqrtm(covariance)  # of S^1/2 I S^1/2
    expected = (mean @ mean + (covariance + 1.0 * torch.eye(4).numpy() - 2 * cross.real).trace()) / 4
    assert math.isclose(bures_penalty(z, variances), expected, rel_tol=1e-9)
    exact = torch.linalg.qr(torch.cat([torch.ones(9, 1).double(), normal(9, 4)], 1)).Q[:, 1:] * 8**0.5
    assert bures_penalty(exact) < 1e-20
    # the bias that the docstring states, at a batch of the default size
    null = vmap(bures_penalty)(normal(400, 64, 32)).mean() * 32
    assert abs(null / (32 / 64 + 32 * 33 / (4 * 63)) - 1) < 0.25


def test_sliced_is_the_distance_of_sorted_values():
    z, direction = normal(7, 4), torch.tensor([[0.0, 3.0, 0.0, 0.0]]).double()
    shares = (torch.arange(7).double() + 0.5) / 7
    expected = (z[:, 1].sort().values - torch.special.ndtri(shares)).square().mean()
    torch.testing.assert_close(sliced_wasserstein_penalty(z, directions=direction), expected, **EXACT)
    # with noise: the distance of the mixture, up to the nodes
    z, variances = normal(50, 4) * 0.7, torch.full((4,), 0.5).double()
    drawn = (z[:, 1] + 0.5**0.5 * normal(4000, 50)).flatten()
    shares = (torch.arange(len(drawn)).double() + 0.5) / len(drawn)
    expected = (drawn.sort().values - torch.special.ndtri(shares)).square().mean()
    found = sliced_wasserstein_penalty(z, variances, directions=direction, nodes=200)
    assert abs(found - expected) < 0.02 * expected + 1e-3


def test_characteristic_is_the_integral_over_all_pairs():
    z, variances = normal(12, 4), uniform(4, seed=1)
    direction = torch.tensor([[0.6, 0.8, 0.0, 0.0]]).double()
    x, v = z @ direction[0], (direction[0].square() * variances).sum()
    t = torch.linspace(1e-3, 12, 20_001).double()
    pairs = torch.cos(t[:, None, None] * (x[:, None] - x)) * torch.exp(-t.square() * v)[:, None, None]
    square = (pairs.sum((1, 2)) - 12 * torch.exp(-t.square() * v)) / (12 * 11)
    real = (torch.cos(t[:, None] * x) * torch.exp(-t.square() * v / 2)[:, None]).mean(1)
    expected = (-t.square() / 2).exp()
    integral = 2 * torch.trapezoid(expected / t.square() * (square - 2 * expected * real + expected.square()), t)
    assert abs(characteristic_penalty(z, variances, directions=direction) - integral) < 0.05 * integral.abs() + 1e-3


# ---- where latents are pulled ----------------------------------------------------------------------------------------


def pulled(penalty, z: Tensor, raw: Tensor | None = None, steps: int = 200) -> tuple[Tensor, Tensor | None]:
    """Free latents (and stds, exp(raw)) after steps of Adam, whose step is the same at every size of the gradient."""
    z = z.clone().requires_grad_()
    given = [z] if raw is None else [z, raw.clone().requires_grad_()]
    optimizer = torch.optim.Adam(given, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty(z, *(raw.exp().square() for raw in given[1:])).backward()
        assert all(x.grad.isfinite().all() for x in given)
        optimizer.step()
    return z.detach(), given[1].detach().exp() if raw is not None else None


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("scale", [10.0, 0.1])
def test_latents_of_a_wrong_scale_are_pulled_back(name, scale):
    start = normal(64, 4, seed=5) * scale
    z, _ = pulled(PENALTIES[name], start)
    before, after = (abs(x.std(0).log()).mean() for x in (start, z))
    assert after < before - 0.15, f"mean |log std| {before:.2f} -> {after:.2f}"


@pytest.mark.parametrize("name", PENALTIES)
def test_a_thin_line_is_widened_tenfold(name):
    start = normal(64, 4, seed=5) * torch.tensor([1.0, 1e-3, 1e-3, 1e-3]).double()
    z, _ = pulled(PENALTIES[name], start)
    assert (z.std(0)[1:] > 1e-2).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_exact_collapse_is_left_through_the_noise_alone(name):
    start = torch.zeros(64, 4).double()
    z, _ = pulled(PENALTIES[name], start)
    if name != "sliced":  # which orders equal values somehow
        assert z.std(0).max() < 1e-6, "a point has no direction to leave in"
    z, std = pulled(PENALTIES[name], start, torch.full((4,), -3.0).double())
    assert (std > 0.2).all(), "from .05"


def test_thin_directions_have_a_gradient_that_does_not_vanish_with_them():
    """Of the Bures distance alone: d/d std is 2 (std - 1) / L at every std."""
    base = torch.linalg.qr(torch.cat([torch.ones(64, 1).double(), normal(64, 4)], 1)).Q[:, 1:] * 63**0.5
    for std in (1e-3, 0.1, 10.0, 100.0):
        slope = grad(lambda s: bures_penalty(base * torch.cat([s, torch.ones(3).double()])))(
            torch.tensor([std]).double()
        )
        torch.testing.assert_close(slope, torch.tensor([2 * (std - 1) / 4]).double(), rtol=1e-6, atol=0)


# ---- how they run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PENALTIES)
def test_vmap_and_float32_and_half_precision_agree_with_one_at_a_time(name):
    z, variances, penalty = normal(3, 8, 5), uniform(3, 5) + 0.1, PENALTIES[name]
    alone = torch.stack([penalty(a, b) for a, b in zip(z, variances, strict=True)])
    torch.testing.assert_close(vmap(penalty)(z, variances), alone, **EXACT)
    torch.testing.assert_close(vmap(penalty)(z.float(), variances.float()), alone.float(), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty(z[0].float(), variances[0].float()).dtype == torch.float32
        torch.testing.assert_close(penalty(z[0].float(), variances[0].float()), alone[0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_compiles_without_a_graph_break(name):
    z, variances, penalty = normal(8, 5), uniform(5) + 0.1, PENALTIES[name]
    calls = {"sliced": sliced_wasserstein_penalty, "characteristic": characteristic_penalty}
    given = {"directions": normal(64, 5, seed=9)} if name in calls else {}
    call = calls.get(name, penalty)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, variances, **given), call(z, variances, **given), **EXACT)


@pytest.mark.parametrize("name", PENALTIES)
def test_what_does_not_fit_is_refused(name):
    penalty = PENALTIES[name]
    wrong = ((normal(5), None), (normal(1, 4), None), (normal(5, 4), normal(5)), (normal(5, 4), normal(5, 4)))
    for z, variances in wrong:
        with pytest.raises(ValueError, match=r"must be \("):
            penalty(z, variances)


def test_directions_that_do_not_fit_are_refused():
    for call in (sliced_wasserstein_penalty, characteristic_penalty):
        with pytest.raises(ValueError, match="directions"):
            call(normal(5, 4), directions=normal(3, 5))
