"""Transport plans between two sets of tokens: Sinkhorn of fixed length in two kernels, and IPOT.

    P = argmin <P, C> + eps KL(P | a b^T),   P 1 = a,  P^T 1 = b,  P >= 0              (Cuturi, 2013)
    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)

Costs C are (..., n, m): one problem for each leading index. a (..., n) and b (..., m) are the masses of the tokens, 0
at padding, and None is uniform. All solvers run for a fixed number of iterations, draw nothing and never branch on
values, so that they work under `torch.func.vmap`, `grad` and `torch.compile(fullgraph=True)`. What they return carries
no gradient: the losses are in `mmfusion.losses.optimal_transport`.

What a cost is at padding never matters. A problem whose a or b is all 0 has the plan 0.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from jwae_module import upcast

Kernel = Literal["log", "exponential"]

# cost_bound / epsilon up to which the scaling vectors of the exponential kernel stay within float32: the kernel is
# within exp(+-r/2) and, Sinkhorn being non-expansive, they are within exp(+-3r/2), of which float32 holds 88
LARGEST_EXPONENT = 50.0
_LOG_OF_ZERO = -1e20  # finite, so that an all-padding sequence gives no inf - inf
_BLOCK = 10  # iterations of the log kernel to one with exponentials, which take most of its time
_LARGEST_SCALING = 1e15  # what float32 flushes to 0 in a plan then stays below 1e-8 of any sum


class Coupling(NamedTuple):
    """A plan (..., n, m) and the dual potentials f (..., n), g (..., m) that it follows from; 0 at padding."""

    plan: Tensor
    f: Tensor
    g: Tensor


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
    cost, a, b = checked(cost, a, b, iterations, epsilon=epsilon, cost_bound=cost_bound)
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
    cost, a, b = checked(cost, a, b, iterations, beta=beta)
    return _log_iterations(cost, a, b, [t / beta for t in range(1, iterations + 1)], speed=1.0).plan


def marginal_error(plan: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """sum_i |P 1 - a|_i + sum_j |P^T 1 - b|_j of each plan: (..., n, m) -> (...)."""
    plan, a, b = checked(plan, a, b)
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


def checked(
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
    forth = (cost.detach() / -epsilon).clamp(-ratio, 0).add_(ratio / 2).exp_()  # (..., n, m)
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


def _log(masses: Tensor) -> Tensor:
    return torch.where(masses > 0, masses.clamp_min(torch.finfo(masses.dtype).tiny).log(), _LOG_OF_ZERO)
