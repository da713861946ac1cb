"""Expected probabilities and errors of an uncertain output, against quadrature and draws."""

import pytest
import torch
from torch.func import vmap

from mmfusion.losses.expected import expected_absolute_error, moderated_logits
from mmfusion.models.fusion import FusionOutput
from mmfusion.training.objective import fit_loss


@pytest.mark.parametrize("variance", [0.1, 1.0, 9.0, 100.0])
def test_moderated_probability_is_the_expected_one_to_a_hundredth_and_a_half(variance):
    mean = torch.linspace(-8, 8, 33, dtype=torch.float64)[:, None]
    t = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-t.square() / 2) / (2 * torch.pi) ** 0.5
    exact = torch.trapezoid(torch.sigmoid(mean + variance**0.5 * t) * density, t)
    found = moderated_logits(mean, torch.full((33, 1, 1), variance).double(), "binary").sigmoid().squeeze(-1)
    assert (found - exact).abs().max() < 0.02
    assert (torch.sigmoid(mean.squeeze(-1)) - exact).abs().max() > (0.02 if variance >= 1 else 0), "more than nothing"


def test_two_classes_are_the_binary_case_and_a_shift_common_to_all_classes_is_none():
    mean = torch.tensor([[0.3, -1.2], [2.0, 5.0]]).double()
    root = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double()
    covariance = (root @ root.T).expand(2, 2, 2)
    spread = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    binary = moderated_logits((mean[:, 1] - mean[:, 0])[:, None], spread[:, None, None], "binary").sigmoid().squeeze(-1)
    torch.testing.assert_close(moderated_logits(mean, covariance, "multiclass").softmax(-1)[:, 1], binary)
    common = torch.full((2, 3, 3), 50.0).double()
    three = torch.tensor([[1.0, 0.0, -2.0], [0.0, 4.0, 3.0]]).double()
    torch.testing.assert_close(moderated_logits(three, common, "multiclass").softmax(-1), three.softmax(-1))


def test_several_classes_are_near_the_mean_over_draws():
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(20, 4, generator=generator).double() * 2
    root = torch.randn(20, 4, 4, generator=generator).double()
    covariance = root @ root.mT
    drawn = mean + (root @ torch.randn(20_000, 20, 4, 1, generator=generator).double()).squeeze(-1)
    exact = drawn.softmax(-1).mean(0)
    found = moderated_logits(mean, covariance, "multiclass").softmax(-1)
    assert (found - exact).abs().mean() < 0.6 * (mean.softmax(-1) - exact).abs().mean()


def test_expected_absolute_error_is_that_of_draws_and_of_certainty():
    error, variance = torch.tensor([0.0, 0.5, -3.0]).double(), torch.tensor([1.0, 4.0, 0.25]).double()
    generator = torch.Generator().manual_seed(0)
    drawn = error + variance.sqrt() * torch.randn(1_000_000, 3, generator=generator).double()
    torch.testing.assert_close(expected_absolute_error(error, variance), drawn.abs().mean(0), rtol=5e-3, atol=0)
    torch.testing.assert_close(expected_absolute_error(error, torch.zeros(3).double()), error.abs(), rtol=0, atol=1e-5)
    assert torch.equal(expected_absolute_error(error, None), error.abs())


@pytest.mark.parametrize(
    ("task", "target"),
    [
        ("binary", torch.tensor([0.0, 1, 1, 0])),
        ("multiclass", torch.tensor([0.0, 2, 1, 1])),
        ("multilabel", torch.tensor([[0.0, 1, 1]] * 4)),
        ("regression", torch.tensor([[0.5, 1, -1]] * 4)),
    ],
)
def test_every_task_is_fitted_on_what_is_expected_and_doubt_has_a_gradient(task, target):
    outputs = 1 if task == "binary" else 3
    mean = torch.randn(4, outputs, generator=torch.Generator().manual_seed(2))
    spread = torch.full((4, outputs), 2.0, requires_grad=True)
    covariance = torch.diag_embed(spread)
    certain = fit_loss(FusionOutput(mean, {}, {}, {}), target, task)
    doubtful = fit_loss(FusionOutput(mean, {}, {}, {}, {}, covariance), target, task)
    assert not torch.isclose(certain, doubtful)
    doubtful.backward()
    assert spread.grad.isfinite().all() and spread.grad.abs().min() > 0
    still = fit_loss(FusionOutput(mean, {}, {}, {}, {}, torch.zeros_like(covariance)), target, task)
    torch.testing.assert_close(still, certain, rtol=1e-4, atol=1e-5)
    many = vmap(lambda m, c: fit_loss(FusionOutput(m, {}, {}, {}, {}, c), target, task))
    torch.testing.assert_close(many(mean[None], covariance[None].detach()), doubtful.detach()[None])
