"""Optimal transport between the tokens of two modalities: costs, entropic value, divergence, alignment loss.

    OT_eps(C) = min_P <P, C> + eps KL(P | a b^T),    P 1 = a,  P^T 1 = b,  P >= 0              (Cuturi, 2013)
              = max_{f, g} <a, f> + <b, g>,          P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)

A problem is a pair of token sequences, or a pair of batches of points; leading indices are problems of their own. Plans
come from `mmfusion.losses.transport_plans` and carry no gradient: by the envelope theorem the gradient of the optimal
value towards C is the plan itself, and nothing needs to be differentiated through the iterations.

The content of padding never matters. A problem with an empty sequence has the loss 0.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from jwae_module import products, upcast
from mmfusion.losses.transport_plans import Kernel, checked, ipot, marginals, sinkhorn

Method = Literal["ipot", "sinkhorn", "random"]
Cost = Callable[[Tensor, Tensor], Tensor]


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x_i, y_j), within [0, 2]: x (..., n, d), y (..., m, d) -> (..., n, m).

    A vector shorter than 1e-12 has cosine 0 with everything, and its gradient is that of x_i . y_j.
    """
    return 1 - products(_unit(upcast(x)), _unit(upcast(y)))


def squared_distance_cost(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2: x (..., n, d), y (..., m, d) -> (..., n, m); rounding leaves 1e-7 of |x_i|^2 + |y_j|^2."""
    x, y = upcast(x), upcast(y)
    return x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * products(x, y)


def transport_cost(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 50,
    kernel: Kernel = "log",
    cost_bound: float = 2.0,
) -> Tensor:
    """OT_eps of each problem, (..., n, m) -> (...), as its dual value; the gradient towards the cost is the plan.

    A lower bound that rises with every iteration; its gradient is exact for the potentials reached.

    Args:
        cost, a, b, epsilon, iterations, kernel, cost_bound: as `sinkhorn`.

    Raises:
        ValueError: as `sinkhorn`.
    """
    plan, f, g = sinkhorn(cost, a, b, epsilon=epsilon, iterations=iterations, kernel=kernel, cost_bound=cost_bound)
    cost, a, b = checked(cost, a, b)
    return _with_gradient((a * f).sum(-1) + (b * g).sum(-1), _linear(cost, plan))


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    *,
    cost: Cost = cosine_cost,
    epsilon: float = 0.05,
    iterations: int = 50,
    kernel: Kernel = "log",
    cost_bound: float = 2.0,
) -> Tensor:
    """OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2 of each problem (Feydy et al., 2019): exactly 0 at x = y.

    Not negative for a converged plan and a cost whose exp(-C / eps) is positive definite; nothing is clamped.

    Args:
        x, y: tokens (..., n, d) and (..., m, d); a batch of B points is one problem (B, d).
        mask_x, mask_y: (..., n) and (..., m), non-zero where a token is; default everywhere.
        cost: between tokens.
        epsilon, iterations, kernel, cost_bound: as `sinkhorn`.

    Returns:
        (...), 0 where a sequence is empty.

    Raises:
        ValueError: as `sinkhorn`.
    """

    def loss(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = {"epsilon": epsilon, "iterations": iterations, "cost_bound": cost_bound}
        return transport_cost(cost(u, v), a, b, kernel=kernel, **options)

    return _debiased(loss, x, y, mask_x, mask_y)


def transport_loss(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    *,
    method: Method = "ipot",
    debiased: bool = False,
    cost: Cost = cosine_cost,
    beta: float = 0.5,
    epsilon: float = 0.05,
    iterations: int = 50,
    kernel: Kernel = "log",
    noise: Tensor | None = None,
) -> Tensor:
    """<C, P> of each problem, the plan P taken as given: word-region alignment (Chen et al., UNITER, 2020).

    Tokens that are all equal have loss 0, debiased or not: what keeps their variance must come from another term.

    Args:
        x, y, mask_x, mask_y, cost: as `sinkhorn_divergence`.
        method: where P comes from. "ipot" (beta), "sinkhorn" (epsilon, log kernel), or as a control "random": the
            Sinkhorn plan of `noise` in place of C, which has the right masses and knows nothing of the tokens.
        debiased: less half of the same of x with itself and of y with itself.
        beta, epsilon, iterations, kernel: as `ipot` and `sinkhorn`; the exponential kernel is for the cosine cost.
        noise: uniform numbers in [0, 1), (..., n, m), of the random plan alone.

    Returns:
        (...), 0 where a sequence is empty.

    Raises:
        ValueError: an unknown method, noise without a random plan or the reverse, a random plan debiased, or as
            `sinkhorn`.
    """
    if method not in get_args(Method):
        raise ValueError(f"method is one of {', '.join(get_args(Method))}, not {method!r}")
    if (noise is None) == (method == "random"):
        raise ValueError(f"noise goes with the random plan and with no other, got method {method!r}")
    if debiased and method == "random":
        raise ValueError("a random plan has no plan of a sequence with itself to be debiased by")

    def loss(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        c, a, b = checked(cost(u, v), a, b)
        if method == "ipot":
            plan = ipot(c, a, b, beta=beta, iterations=iterations)
        else:
            plan = sinkhorn(
                c if noise is None else noise, a, b, epsilon=epsilon, iterations=iterations, kernel=kernel
            ).plan
        return _linear(c, plan)

    if debiased:
        return _debiased(loss, x, y, mask_x, mask_y)
    return loss(*_tokens(x, y, mask_x, mask_y))


def _tokens(x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> tuple[Tensor, ...]:
    """x, y with 0 at padding, and their masses."""
    pairs = ((x, mask_x), (y, mask_y))
    tokens = [z if mask is None else torch.where((mask != 0)[..., None], z, 0) for z, mask in pairs]
    real = [z.new_ones(z.shape[-2], dtype=torch.bool) if mask is None else mask for z, mask in pairs]
    return *tokens, *(marginals(mask, upcast(z).dtype) for z, mask in zip(tokens, real, strict=True))


def _debiased(
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
) -> Tensor:
    """loss(x, y) - loss(x, x) / 2 - loss(y, y) / 2, and 0 where x or y is empty.

    The plan of x with itself is symmetric once converged, so both its sides have one gradient, and that of one side is
    taken twice: of x on the left and y on the right, as in loss(x, y), so that at x = y the gradients cancel exactly.
    """
    x, y, a, b = _tokens(x, y, mask_x, mask_y)
    with_x, with_y = loss(x, x.detach(), a, a), loss(y.detach(), y, b, b)
    self_terms = _with_gradient(with_x / 2, with_x) + _with_gradient(with_y / 2, with_y)
    return torch.where((a > 0).any(-1) & (b > 0).any(-1), loss(x, y, a, b) - self_terms, 0)


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one and the gradient of the other."""
    return value.detach() + (surrogate - surrogate.detach())


def _linear(cost: Tensor, plan: Tensor) -> Tensor:
    """<C, P>, (..., n, m) twice -> (...)."""
    return (plan * cost).sum((-2, -1))


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; rows near 0 as they are, where a division would give them a gradient of 1 / |x|."""
    squared = x.square().sum(-1, keepdim=True)
    return x * torch.where(squared > 1e-24, squared, 1).rsqrt()
