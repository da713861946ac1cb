"""Projected gradient descent and random changes of a given size, on any tensor: latents, features or pixels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfusion.robustness.certificates import Norm


@dataclass(frozen=True)
class Attack:
    """The worst that was found within the ball, per example."""

    change: Tensor
    """(N, d)"""
    value: Tensor
    """(N,) of the objective there: the margin, if that is what was minimised"""


# nine parameters: those that define the attack, the last five with defaults
def pgd(
    objective: Callable[[Tensor], Tensor],
    like: Tensor,
    epsilon: Tensor | float,
    norm: Norm,
    *,
    steps: int = 40,
    restarts: int = 3,
    step_size: float = 2.5,
    generator: torch.Generator | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> Attack:
    """Minimise an objective over changes of l_p norm at most epsilon by projected gradient descent (Madry et al. 2018).

    The first start is no change at all, the others are uniform in the ball's cube or sphere; steps are along the sign
    (l_inf) or the normalised gradient (l_2), of `step_size` * epsilon / steps; the best of all steps is kept.

    Args:
        objective: changes (N, d) -> (N,), one number per example that depends on that example's change alone.
        like: (N, d), or any (N, ...): shape, dtype and device of the changes.
        epsilon: a number, or (N,).
        norm: 2 or infinity.
        steps, restarts, step_size: see above.
        generator: of the starts; default: seed 0 on the CPU.
        bounds: least and largest change (N, ...) that is allowed at all, such as those that keep a pixel in [0, 255].

    Raises ValueError for another norm.
    """
    if norm not in (2, math.inf):
        raise ValueError(f"PGD is written for the norms 2 and infinity, got {norm!r}")
    generator = generator or torch.Generator().manual_seed(0)
    column = (len(like), *[1] * (like.ndim - 1))
    epsilon = torch.as_tensor(epsilon, dtype=like.dtype, device=like.device).expand(len(like)).reshape(column)
    best_value, best = like.new_full((len(like),), math.inf), torch.zeros_like(like)
    for restart in range(restarts):
        change = torch.zeros_like(like)
        if restart:
            change = _ball_start(like, norm, generator) * epsilon
        for step in range(steps + 1):
            change = _project(change, epsilon, norm, bounds).detach().requires_grad_(True)
            value = objective(change)
            with torch.no_grad():
                better = value < best_value
                best_value = torch.where(better, value, best_value)
                best = torch.where(better.reshape(column), change, best)
            if step == steps:
                break
            (gradient,) = torch.autograd.grad(value.sum(), change)
            with torch.no_grad():
                length = step_size * epsilon / steps
                change = change - length * (gradient.sign() if norm != 2 else _unit(gradient))
    return Attack(best.detach(), best_value.detach())


def random_change(like: Tensor, epsilon: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """A random change of the shape of `like` (N, d) on the surface of the ball: the cube's corners, or the sphere."""
    x = torch.randn(like.shape, generator=generator).to(like)
    return epsilon * (_unit(x) if norm == 2 else x.sign())


def _ball_start(like: Tensor, norm: Norm, generator: torch.Generator) -> Tensor:
    if norm == 2:
        return random_change(like, 1.0, norm, generator)
    return (2 * torch.rand(like.shape, generator=generator) - 1).to(like)


def _unit(x: Tensor) -> Tensor:
    """Rows of l_2 norm 1; rows of zeros stay."""
    return F.normalize(x.flatten(1), dim=1, eps=1e-30).view_as(x)


def _project(change: Tensor, epsilon: Tensor, norm: Norm, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    with torch.no_grad():
        if norm == 2:
            length = torch.linalg.vector_norm(change.flatten(1), dim=1).reshape(epsilon.shape)
            change = change * (epsilon / length.clamp_min(1e-30)).clamp_max(1.0)
        else:
            change = torch.maximum(torch.minimum(change, epsilon), -epsilon)
        if bounds is not None:  # shrinking coordinates towards 0 keeps the norm within epsilon
            change = torch.maximum(torch.minimum(change, bounds[1]), bounds[0])
        return change
