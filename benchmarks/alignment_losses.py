"""Time of each alignment loss by the number of modalities: all pairs against a hub.

    python -m benchmarks.alignment_losses     M 2 to 6, B 64, L 32, 32 members under vmap(grad)
    python -m benchmarks.alignment_losses --joint     low-rank joint covariance against its hub form
    python -m benchmarks.alignment_losses --formula   Tr(S_V log S_T), which is no divergence, beside Stein's

Milliseconds from latents to their gradients (float32), the smallest of the rounds (other jobs only add to a time), each
of which takes M = 2 to 6 in turn; in brackets all rounds at M = 6. The ratio time(M = 6) / time(M = 2) would be 15 at
one unit for each pair of modalities, 5 for each pair with a hub, 3 for each modality; a fixed cost lowers it.

--joint draws latents of M = 4 modalities that are linear in k shared factors plus noise, and compares the value on all
modalities at once with the mean over the pairs (hub, modality), first where every modality holds all factors, then
where each of the others shares its own k factors with the hub alone.

--formula scales the covariance S_T of one modality (256 rows of 32 dimensions, correlation .7 with S_V's rows) by 1, .1
and .01, and gives the gradient at S_T = I and the value of a covariance of 8 rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, vmap

from mmfusion.losses.alignment import ALIGNMENTS
from mmfusion.losses.covariance import low_rank_joint_covariance, stein_divergence
from mmfusion.losses.modality_pairs import modality_pairs

Loss = Callable[[Mapping[str, Tensor]], Tensor]
NAMES = ("a", "b", "c", "d", "e", "f")
WITH_HUB = ("info_nce", "gram", "multilinear", "bures", "transport", "mmd")


def sides() -> dict[str, Loss]:
    """Every loss at its defaults, and those that take a hub with one."""
    found: dict[str, Loss] = {}
    for name, loss in ALIGNMENTS.items():
        found[name] = loss
        if name in WITH_HUB:
            found[f"{name}, hub"] = partial(loss, hub=NAMES[0])
    return found | {"joint, rank 8": partial(low_rank_joint_covariance, rank=8)}


def draw(modalities: int, members: int, batch: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(members, batch, width, generator=generator)
    return {name: shared + torch.randn(shared.shape, generator=generator) for name in NAMES[:modalities]}


def milliseconds(loss: Loss, latents: dict[str, Tensor]) -> float:
    slope = vmap(grad(loss))
    start = time.perf_counter()
    slope(latents)
    return 1000 * (time.perf_counter() - start)


def compare(options: argparse.Namespace) -> None:
    counts = range(2, len(NAMES) + 1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds, ms")
    print(f"{options.members} members, B {options.batch}, L {options.width}, float32")
    print(f"{'loss':18}" + "".join(f"{f'M = {m}':>9}" for m in counts) + f"{'':20}{'M 6 / M 2':>10}")
    drawn = [draw(m, options.members, options.batch, options.width) for m in counts]
    for name, loss in sides().items():
        rounds = [[milliseconds(loss, latents) for latents in drawn] for _ in range(options.rounds + 1)]
        times = list(zip(*rounds[1:], strict=True))  # the first warms up
        least = [min(t) for t in times]
        spread = f"[{least[-1]:.1f}, {max(times[-1]):.1f}]"
        print(f"{name:18}" + "".join(f"{t:9.1f}" for t in least) + f"{spread:>20}{least[-1] / least[0]:10.1f}")


def joint_against_hub(rank: int = 4, noise: float = 0.3, count: int = 20) -> None:
    """Print both forms' values, mean and standard deviation of `count` draws, with and without what all share."""
    for kind in ("all share", "own pair with hub"):
        rows = []
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)
            normal = partial(torch.randn, generator=generator)
            blocks = [normal(256, rank) for _ in range(3)]
            if kind == "all share":
                blocks = [blocks[0]] * 3
            hub = sum(block @ normal(rank, 32) for block in blocks)
            latents = {"a": hub} | {n: z @ normal(rank, 32) for n, z in zip("bcd", blocks, strict=True)}
            latents = {n: z / z.std() + noise * normal(256, 32) for n, z in latents.items()}
            pairs = [{m: latents[m] for m in ("a", other)} for other in "bcd"]
            by_hub = torch.stack([low_rank_joint_covariance(pair, rank) for pair in pairs]).mean()
            rows.append((low_rank_joint_covariance(latents, rank).item(), by_hub.item()))
        text = [f"{statistics.mean(x):.3f} +- {statistics.stdev(x):.3f}" for x in zip(*rows, strict=True)]
        print(f"{kind:18} joint {text[0]}   hub {text[1]}   ({len(modality_pairs('abcd', 'a'))} pairs, n {count})")


def trace_log(first: Tensor, second: Tensor) -> Tensor:
    """Tr(S_V log S_T) by eigenvectors, as a proposal for geometric alignment has it."""
    values, vectors = torch.linalg.eigh(second)
    return torch.trace(first @ (vectors * values.log()) @ vectors.T)


def formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(256, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    y = 0.7 * x + 0.51**0.5 * noise
    s_v, s_t = torch.cov(x.T), torch.cov(y.T)
    for scale in (1.0, 0.1, 0.01):
        stein = stein_divergence({"v": x, "t": scale**0.5 * y}, shrinkage=1e-3)
        print(f"S_T x {scale:4}: Tr(S_V log S_T) {trace_log(s_v, scale * s_t):8.1f}   Stein {stein:6.2f}")
    equal = stein_divergence({"v": x, "t": x}, shrinkage=1e-3)
    print(f"S_T = S_V  : Tr(S_V log S_T) {trace_log(s_v, s_v):8.1f}   Stein {equal.abs():6.2f}")
    identity = torch.eye(32, dtype=torch.float64, requires_grad=True)
    trace_log(s_v, identity).backward()
    undefined = int(identity.grad.isnan().sum())
    print(f"entries of the gradient at S_T = I that are NaN: {undefined} of {identity.numel()}")
    few = torch.cov(y[:8].T)
    print(f"S_T of 8 rows (rank {torch.linalg.matrix_rank(few)} of 32): Tr(S_V log S_T) {trace_log(s_v, few)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--joint", action="store_true", help="the two forms of the joint covariance alone")
    parser.add_argument("--formula", action="store_true", help="Tr(S_V log S_T) beside Stein's divergence alone")
    options = parser.parse_args()
    if not (options.joint or options.formula):
        compare(options)
    if not options.formula:
        joint_against_hub()
    if not options.joint:
        formula()


if __name__ == "__main__":
    main()
