"""Sinkhorn on batches of token sequences against POT's batched solver, and how accurate plans are.

    python -m benchmarks.optimal_transport             32 members x 64 examples x (20 x 20 tokens), 20 iterations
    python -m benchmarks.optimal_transport --accuracy  the table of values and marginal errors alone

Both sides start from the same costs 1 - cos (float32, 32 dimensions) and end at the gradient of the summed OT_eps
towards them: ours in one call, POT's `ot.solve_batch` (torch backend, log_sinkhorn, envelope gradient, tolerance 0) in
one per member. They do the same updates and leave the same marginal error, which is printed. The sides run in turn; the
ratio is the median of the rounds' own ratios, with the smallest and largest of them.

The accuracy is that of `<C, P>` against the exact value of a linear program, mean over 64 pairs of sequences.
"""

import argparse
import statistics
import time

import numpy as np
import ot
import torch
from torch import Tensor

from mmfusion.losses.optimal_transport import cosine_cost, transport_cost
from mmfusion.losses.transport_plans import effective_tokens, ipot, marginal_error, sinkhorn

DIM = 32
EPSILONS = (0.2, 0.1, 0.05, 0.02)
BETAS = (1.0, 0.5, 0.2)
LENGTHS = (10, 20, 50, 200)


def token_costs(*shape: int, tokens: int) -> Tensor:
    """Cosine costs (*shape, tokens, tokens) between normal vectors."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, tokens, DIM, generator=generator) for _ in range(2))
    return cosine_cost(x, y)


def our_gradient(cost: Tensor, epsilon: float, iterations: int, kernel: str) -> Tensor:
    cost = cost.detach().requires_grad_()
    transport_cost(cost, epsilon=epsilon, iterations=iterations, kernel=kernel).sum().backward()
    return cost.grad


def pot_gradient(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    cost = cost.detach().requires_grad_()
    options = {"reg": epsilon, "max_iter": iterations, "tol": 0.0, "method": "log_sinkhorn", "grad": "envelope"}
    for member in cost.unbind():
        ot.solve_batch(member, **options).value.sum().backward()
    return cost.grad


def compare(options: argparse.Namespace) -> None:
    cost = token_costs(options.members, options.batch, tokens=options.tokens)
    given = (options.epsilon, options.iterations)
    sides = {
        "POT, a loop over members": lambda: pot_gradient(cost, *given),
        "log": lambda: our_gradient(cost, *given, "log"),
        "exponential": lambda: our_gradient(cost, *given, "exponential"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(options.rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    problems = f"{options.members} x {options.batch} problems of {options.tokens} x {options.tokens}"
    print(f"torch {torch.__version__}, POT {ot.__version__}, {torch.get_num_threads()} threads")
    print(f"{problems}, epsilon {options.epsilon}, {options.iterations} iterations, {options.rounds} rounds")
    base = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratios = sorted(b / t for t, b in zip(times, base, strict=True))
        error = marginal_error(plan_of(name, cost, *given)).mean()
        print(
            f"{name:26} {statistics.median(times) * 1000:7.1f} ms   {statistics.median(ratios):5.1f} times as fast "
            f"[{ratios[0]:.1f}, {ratios[-1]:.1f}]   marginal error {error:.2e}"
        )


def plan_of(name: str, cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The plans (S, B, n, m) of one side."""
    if name in ("log", "exponential"):
        return sinkhorn(cost, epsilon=epsilon, iterations=iterations, kernel=name).plan
    solved = [ot.solve_batch(c, reg=epsilon, max_iter=iterations, tol=0.0, method="log_sinkhorn") for c in cost]
    return torch.stack([result.plan for result in solved])


def accuracy(tokens: int) -> None:
    cost = token_costs(64, tokens=tokens)
    masses = np.full(tokens, 1 / tokens)
    exact = np.mean([ot.emd2(masses, masses, c.double().numpy()) for c in cost])
    print(f"<C, P> (marginal error) [effective tokens], mean of {len(cost)} problems; exact {exact:.4f}, random plan 1")
    print(f"{'iterations':18}" + "".join(f"{n:>26}" for n in LENGTHS))
    settings = {f"Sinkhorn, eps {e}": lambda n, e=e: sinkhorn(cost, epsilon=e, iterations=n).plan for e in EPSILONS}
    settings |= {f"IPOT, beta {b}": lambda n, b=b: ipot(cost, beta=b, iterations=n) for b in BETAS}
    for name, solve in settings.items():
        cells = []
        for n in LENGTHS:
            plan = solve(n)
            value, error, spread = (plan * cost).sum((-2, -1)), marginal_error(plan), effective_tokens(plan)
            cells.append(f"{value.mean():.4f} ({error.mean():.0e}) [{spread.mean():.1f}]")
        print(f"{name:18}" + "".join(f"{cell:>26}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--accuracy", action="store_true", help="the table alone")
    options = parser.parse_args()
    if not options.accuracy:
        compare(options)
    accuracy(options.tokens)


if __name__ == "__main__":
    main()
