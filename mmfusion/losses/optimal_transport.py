"""Optimal transport between the tokens of two modalities: Sinkhorn and IPOT plans, their costs and divergence.

    OT_eps(C) = min_P <P, C> + eps KL(P | a b^T),    P 1 = a,  P^T 1 = b,  P >= 0              (Cuturi, 2013)
              = max_{f, g} <a, f> + <b, g>,          P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)

Costs C are (..., n, m): one problem for each leading index, be it a pair of token sequences or a pair of batches of
points. a (..., n) and b (..., m) are the masses of the tokens, 0 at padding, and None is uniform. All solvers run for a
fixed number of iterations, draw nothing and never branch on values, so that they work under `torch.func.vmap`, `grad`
and `torch.compile(fullgraph=True)`. What they return carries no gradient: by the envelope theorem the gradient of the
optimal value towards C is the plan itself, and nothing needs to be differentiated through the iterations.

The content of padding never matters. A problem whose a or b is all 0 has the plan 0, and every loss of it is 0.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from jwae_module import products, upcast

Kernel = Literal["log", "exponential"]
Method = Literal["ipot", "sinkhorn", "random"]
Cost = Callable[[Tensor, Tensor], Tensor]

# cost_bound / epsilon up to which the scaling vectors of the exponential kernel stay within float32: the kernel is
# within exp(+-r/2) and, Sinkhorn being non-expansive, they are within exp(+-3r/2), of which float32 holds 88
LARGEST_EXPONENT = 50.0
_LOG_OF_ZERO = -1e20  # finite, so that an all-padding sequence gives no inf - inf
_BLOCK = 5  # iterations of the log kernel to one with exponentials, which take most of its time
_LARGEST_SCALING = 1e15  # what float32 flushes to 0 in a plan then stays below 1e-8 of any sum


class Coupling(NamedTuple):
    """A plan (..., n, m) and the dual potentials f (..., n), g (..., m) that it follows from; 0 at padding."""

    plan: Tensor
    f: Tensor
    g: Tensor


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x_i, y_j), within [0, 2]: x (..., n, d), y (..., m, d) -> (..., n, m).

    A vector shorter than 1e-12 has cosine 0 with everything, and its gradient is that of x_i . y_j.
    """
    return 1 - products(_unit(upcast(x)), _unit(upcast(y)))


def squared_distance_cost(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2: x (..., n, d), y (..., m, d) -> (..., n, m); rounding leaves 1e-7 of |x_i|^2 + |y_j|^2."""
    x, y = upcast(x), upcast(y)
    return x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * products(x, y)


def marginals(mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform masses over the real tokens: mask (..., n), non-zero where a token is -> (..., n), 0 at padding.

    They sum to 1, or to 0 in an empty sequence. The dtype (default: torch's) should be that of the cost.
    """
    real = (mask != 0).to(dtype or torch.get_default_dtype())
    return real / real.sum(-1, keepdim=True).clamp_min(1)


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 50,
    kernel: Kernel = "log",
    cost_bound: float = 2.0,
) -> Coupling:
    """Entropic plans by Sinkhorn's iterations, ending on g: columns have their mass exactly, rows nearly.

    Args:
        cost: (..., n, m).
        a, b: masses (..., n) and (..., m), of sum 1 (`marginals`); default uniform.
        epsilon: weight of the entropy, in units of the cost.
        iterations: updates of f and of g.
        kernel: "log" takes any cost (a stabilised log-sum-exp per update). "exponential" multiplies by exp(-C / eps),
            which is several times faster, where cost_bound / epsilon is at most 50.
        cost_bound: costs lie within [0, cost_bound], the default being that of `cosine_cost`; read by the exponential
            kernel alone, which takes a larger cost as this one.

    Returns:
        Plan and potentials without gradient, in at least float32.

    Raises:
        ValueError: shapes that do not fit, epsilon, iterations or cost_bound that is not positive, an unknown kernel,
            or an exponential kernel that float32 cannot hold.
    """
    cost, a, b = _checked(cost, a, b, iterations, epsilon=epsilon, cost_bound=cost_bound)
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel is one of {', '.join(get_args(Kernel))}, not {kernel!r}")
    if kernel == "log":
        return _log_iterations(cost, a, b, [1 / epsilon] * iterations, block=_BLOCK)
    if cost_bound > LARGEST_EXPONENT * epsilon:
        raise ValueError(
            f"the exponential kernel needs epsilon of at least cost_bound / {LARGEST_EXPONENT:g} = "
            f"{cost_bound / LARGEST_EXPONENT:g}, got {epsilon:g}: take the log kernel"
        )
    return _exponential_iterations(cost, a, b, epsilon, iterations, cost_bound)


def ipot(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """Plan (..., n, m) of the unregularised problem by proximal points (Xie et al., 2020), one inner step each.

    Step t projects exp(-C / beta) * P_{t-1}, from P_0 = a b^T. That is exp(-t C / beta) scaled by row and column, hence
    Sinkhorn at epsilon beta / t whose g starts from its last value and change: done on potentials, nothing underflows.

    Args:
        cost, a, b: as `sinkhorn`.
        beta: weight of the proximal term, in units of the cost; smaller is sharper and needs more steps.
        iterations: steps.

    Raises:
        ValueError: shapes that do not fit, or beta or iterations that is not positive.
    """
    cost, a, b = _checked(cost, a, b, iterations, beta=beta)
    return _log_iterations(cost, a, b, [t / beta for t in range(1, iterations + 1)], speed=1.0).plan


def transport_cost(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, epsilon: float = 0.05, **solver: object
) -> Tensor:
    """OT_eps of each problem, (..., n, m) -> (...), as its dual value; the gradient towards the cost is the plan.

    A lower bound that rises with every iteration; its gradient is exact for the potentials reached.

    Args:
        cost, a, b, epsilon, solver: as `sinkhorn`.

    Raises:
        ValueError: as `sinkhorn`.
    """
    cost, a, b = _checked(cost, a, b)
    plan, f, g = sinkhorn(cost, a, b, epsilon=epsilon, **solver)
    return _with_gradient((a * f).sum(-1) + (b * g).sum(-1), _linear(cost, plan))


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    *,
    cost: Cost = cosine_cost,
    epsilon: float = 0.05,
    **solver: object,
) -> Tensor:
    """OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2 of each problem (Feydy et al., 2019): exactly 0 at x = y.

    Not negative for a converged plan and a cost whose exp(-C / eps) is positive definite; nothing is clamped.

    Args:
        x, y: tokens (..., n, d) and (..., m, d); a batch of B points is one problem (B, d).
        mask_x, mask_y: (..., n) and (..., m), non-zero where a token is; default everywhere.
        cost: between tokens.
        epsilon, solver: as `sinkhorn`.

    Returns:
        (...), 0 where a sequence is empty.

    Raises:
        ValueError: as `sinkhorn`.
    """
    return _debiased(
        lambda u, v, a, b: transport_cost(cost(u, v), a, b, epsilon=epsilon, **solver), x, y, mask_x, mask_y
    )


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
    noise: Tensor | None = None,
) -> Tensor:
    """<C, P> of each problem, the plan P taken as given: word-region alignment (Chen et al., UNITER, 2020).

    Tokens that are all equal have loss 0, debiased or not: what keeps their variance must come from another term.

    Args:
        x, y, mask_x, mask_y, cost: as `sinkhorn_divergence`.
        method: where P comes from. "ipot" (beta), "sinkhorn" (epsilon, log kernel), or as a control "random": the
            Sinkhorn plan of `noise` in place of C, which has the right masses and knows nothing of the tokens.
        debiased: less half of the same of x with itself and of y with itself.
        beta, epsilon, iterations: as `ipot` and `sinkhorn`.
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
        c, a, b = _checked(cost(u, v), a, b)
        if method == "ipot":
            plan = ipot(c, a, b, beta=beta, iterations=iterations)
        else:
            plan = sinkhorn(c if noise is None else noise, a, b, epsilon=epsilon, iterations=iterations).plan
        return _linear(c, plan)

    if debiased:
        return _debiased(loss, x, y, mask_x, mask_y)
    return loss(*_tokens(x, y, mask_x, mask_y))


def marginal_error(plan: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """sum_i |P 1 - a|_i + sum_j |P^T 1 - b|_j of each plan: (..., n, m) -> (...)."""
    plan, a, b = _checked(plan, a, b)
    return (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)


def effective_tokens(plan: Tensor) -> Tensor:
    """How many y tokens a token of x is spread over: exp of the mean row entropy, rows weighted by their mass.

    1 for a plan that matches one to one, m for the uniform one, 0 for the empty plan: (..., n, m) -> (...).
    """
    plan = upcast(plan.detach())
    rows = plan.sum(-1)  # (..., n)
    mass = rows.sum(-1)
    entropy = torch.xlogy(rows, rows).sum(-1) - torch.xlogy(plan, plan).sum((-2, -1))
    tiny = torch.finfo(plan.dtype).tiny
    return torch.where(mass > 0, torch.exp(entropy / mass.clamp_min(tiny)), 0)


# ---- solvers ---------------------------------------------------------------------------------------------------------


def _log_iterations(
    cost: Tensor, a: Tensor, b: Tensor, scales: Sequence[float], speed: float = 0.0, block: int = 1
) -> Coupling:
    """Updates in the log domain, at 1 / eps = scale one after the other; g starts at its last value + speed * change.

    Of a block of iterations one takes exponentials, the others scale the plan that it left, by at most e^+-34 (beyond,
    the update stops there: still ascent of the dual, in a box). The first and the last one are never of those.
    """
    # problems last: every reduction is over an outer dimension and runs along contiguous memory, where rows of 20
    # tokens would not fill a vector register
    lead, (n, m) = cost.shape[:-2], cost.shape[-2:]
    c = cost.detach().reshape(lead.numel(), n, m).permute(1, 2, 0).contiguous()  # (n, m, P)
    a_last, b_last = (w.detach().expand(*lead, -1).reshape(lead.numel(), -1).T.contiguous() for w in (a, b))
    log_a, log_b, tiny = _log(a_last), _log(b_last), torch.finfo(cost.dtype).tiny  # (n, P), (m, P)
    k, change, v, plan = log_b, torch.zeros_like(log_b), torch.ones_like(log_b), c  # no plan before the first pass
    for t, scale in enumerate(scales):
        if t % block and t < len(scales) - 1:
            u = (a_last / (plan * v).sum(1).clamp_min(tiny)).clamp(1 / _LARGEST_SCALING, _LARGEST_SCALING)
            v = (b_last / (plan * u[:, None]).sum(0).clamp_min(tiny)).clamp(1 / _LARGEST_SCALING, _LARGEST_SCALING)
            continue
        # h = log a + f / eps and k = log b + g / eps, so that P = exp(h + k - C / eps)
        k = k + v.log()
        _, total, top = _exponentials(torch.add(k + speed * change, c, alpha=-scale), 1)
        h = log_a - total.log() - top
        plan, total, top = _exponentials(torch.add(h[:, None], c, alpha=-scale), 0)
        k, last = log_b - total.log() - top, k
        plan, change, v = plan.mul_(b_last / total), k - last, torch.ones_like(v)
    plan = plan.mul_((a_last > 0).any(0)).permute(2, 0, 1).reshape(cost.shape)  # all b of 0 have done the same
    f, g = ((w - log_w).T.reshape(*lead, -1) / scales[-1] for w, log_w in ((h, log_a), (k, log_b)))
    return Coupling(plan, *_without_padding(f, g, a, b))


def _exponentials(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x - top), its sum over one dimension, and top, the maximum; x is overwritten, to move less memory."""
    top = x.amax(dim, keepdim=True)
    x = x.sub_(top).exp_()
    return x, x.sum(dim), top.squeeze(dim)


def _exponential_iterations(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int, cost_bound: float
) -> Coupling:
    """u = 1 / (K (b v)), v = 1 / (K^T (a u)), K = exp((bound / 2 - C) / eps): centred, it uses all of float32."""
    a, b, ratio = a.detach(), b.detach(), cost_bound / epsilon
    forth = (cost.detach() / -epsilon).clamp_(-ratio, 0).add_(ratio / 2).exp_()  # (..., n, m)
    back = forth.mT.contiguous()  # row vector times contiguous matrix is ten times as fast as matrix times column
    tiny = torch.finfo(forth.dtype).tiny
    v = torch.ones_like(b)
    with torch.autocast(cost.device.type, enabled=False):
        for _ in range(iterations):
            u = ((b * v)[..., None, :] @ back).squeeze(-2).clamp_min(tiny).reciprocal()  # (..., n)
            v = ((a * u)[..., None, :] @ forth).squeeze(-2).clamp_min(tiny).reciprocal()  # (..., m)
    left, right = _without_padding(a * u, b * v, a, b)
    plan = (forth * left[..., None]).mul_(right[..., None, :])
    return Coupling(plan, *_without_padding(epsilon * u.log() + cost_bound / 2, epsilon * v.log(), a, b))


def _without_padding(f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """f (..., n) and g (..., m) with 0 at padding, and everywhere in an empty problem."""
    real_a, real_b = a > 0, b > 0
    return (
        torch.where(real_a & real_b.any(-1, keepdim=True), f, 0),
        torch.where(real_b & real_a.any(-1, keepdim=True), g, 0),
    )


# ---- what they share -------------------------------------------------------------------------------------------------


def _checked(
    cost: Tensor, a: Tensor | None, b: Tensor | None, iterations: int = 1, **positive: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cost, with 0 at padding, and masses (uniform for None), in one dtype of at least float32."""
    if min(iterations, *positive.values(), 1) <= 0:
        raise ValueError(f"iterations and {', '.join(positive)} must be positive, got {iterations}, {positive}")
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"costs must be (..., n, m) with a token at least on each side, got {tuple(cost.shape)}")
    cost = upcast(cost)
    (n, m), sizes = cost.shape[-2:], [None if w is None else tuple(w.shape) for w in (a, b)]
    if any(size is not None and size[-1:] != (count,) for size, count in zip(sizes, (n, m), strict=True)):
        raise ValueError(f"masses must be (..., {n}) and (..., {m}) for costs {tuple(cost.shape)}, got {sizes}")
    weights = [cost.new_full((k,), 1 / k) if w is None else w.to(cost.dtype) for w, k in ((a, n), (b, m))]
    if a is not None or b is not None:
        # where, not a product: what stands at padding may be infinite, and gets the gradient 0
        cost = torch.where((weights[0] > 0)[..., None] & (weights[1] > 0)[..., None, :], cost, 0)
    return cost, weights[0], weights[1]


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


def _log(masses: Tensor) -> Tensor:
    return torch.where(masses > 0, masses.clamp_min(torch.finfo(masses.dtype).tiny).log(), _LOG_OF_ZERO)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; rows near 0 as they are, where a division would give them a gradient of 1 / |x|."""
    squared = x.square().sum(-1, keepdim=True)
    return x * torch.where(squared > 1e-24, squared, 1).rsqrt()
