"""Time per member and step: S members in one vectorised step, against a plain loop over one model.

    python -m benchmarks.ensemble_training

Both sides train the same jWAE-LMF (widths 100, 73, 100 -> latents of 32, rank 4) with the same objective and AdamW on
batches of 64 that are already in memory. A round times every side once, in turn; the table shows medians over rounds
and, for the ratios, the smallest and largest of the rounds' own ratios.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from mmfusion.models.fusion import FusionModel
from mmfusion.training.feed import Batch, Member
from mmfusion.training.objective import objective
from mmfusion.training.trainer import Schedule, _State, build_members, vectorized_step

WIDTHS = {"text": 100, "audio": 73, "video": 100}
LATENT, RANK, BATCH = 32, 4, 64
WEIGHTS = {"bce": 1.0, "mmd": 1.0, "reconstruction": 0.1, "alignment": 0.1}


def build(member: Member) -> FusionModel:
    return FusionModel(WIDTHS, LATENT, member.settings["hidden"], RANK)


def batch_of(members: int | None) -> Batch:
    """Random data; with a leading members dimension unless None."""
    lead = () if members is None else (members,)
    features = {name: torch.randn(*lead, BATCH, width) for name, width in WIDTHS.items()}
    return Batch(features, (torch.rand(*lead, BATCH) > 0.5).float())


def plain_loop(hidden: int, fused: bool) -> Callable[[], None]:
    """One step of one model, as one would write it; `fused` is the optimiser's fast option."""
    model = build(Member(0, WEIGHTS, settings={"hidden": hidden}))
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    batch = batch_of(None)

    def step() -> None:
        optimizer.zero_grad()
        sum(WEIGHTS[name] * term for name, term in objective(model, batch).items()).backward()
        optimizer.step()

    return step


def stacked(hidden: int, members: int, compile: bool) -> Callable[[], None]:
    """One step of `members` models at once, as `training.train` takes it."""
    group = [Member(seed, WEIGHTS, 0.01, {"hidden": hidden}) for seed in range(members)]
    models = build_members(build, group)
    state = _State(models, group, Schedule(), torch.device("cpu"))
    gradients_of = vectorized_step(models[0], objective, compile)
    weights = {name: torch.full((members,), w) for name, w in WEIGHTS.items()}
    batch = batch_of(members)

    def step() -> None:
        gradients, _ = gradients_of(state.parameters, state.buffers, batch, weights)
        state.apply(gradients, Schedule.learning_rate)

    return step


def floor_seconds(hidden: int) -> tuple[float, float]:
    """Floor per member and step: (FLOPs / measured matmul rate, bytes that Adam must move / measured copy rate)."""
    model: nn.Module = build(Member(0, WEIGHTS, settings={"hidden": hidden}))
    weights = sum(p.numel() for p in model.parameters())
    flops = 3 * 2 * BATCH * weights  # forward, and two products of the same size backward
    moved = 4 * weights * 8  # read parameter, gradient, two moments; write parameter, gradient, two moments
    a = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / min(_timed(lambda: a @ a, 10) for _ in range(5))
    b = torch.empty(64 * 2**20)
    c = torch.empty_like(b)
    copied = 2 * b.numel() * 4 / min(_timed(lambda: c.copy_(b), 2) for _ in range(5))
    return flops / rate, moved / copied


def _timed(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="members at once")
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 128], help="hidden widths of the encoders")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, {options.rounds} rounds, CPU")
    for hidden in options.hidden:
        measure(hidden, options.sizes, options.rounds)


def measure(hidden: int, sizes: list[int], rounds: int) -> None:
    """Time every side and print the table of one hidden width."""
    sides = {("plain loop", 1): plain_loop(hidden, False), ("plain loop, fused AdamW", 1): plain_loop(hidden, True)}
    for members in sizes:
        sides["stacked", members] = stacked(hidden, members, compile=False)
        sides["stacked, compiled", members] = stacked(hidden, members, compile=True)
    for step in sides.values():  # compile, allocate, warm up
        for _ in range(3):
            step()
    # about as much work per side: 64 plain steps against one stacked step of 64 members
    times = np.array(
        [[_timed(step, max(3, 64 // members)) / members for (_, members), step in sides.items()] for _ in range(rounds)]
    )  # (rounds, sides)

    floors = floor_seconds(hidden)
    print(f"\nwidths {tuple(WIDTHS.values())} -> {hidden} -> {LATENT}, rank {RANK}, batch {BATCH}, float32")
    print(f"{'':24} {'S':>4} {'ms / member / step':>20} {'times faster than the plain loop':>34} {'x floor':>8}")
    for i, (name, members) in enumerate(sides):
        ratio = times[:, 0] / times[:, i]
        spread = f"{np.median(ratio):.1f} [{ratio.min():.1f}, {ratio.max():.1f}]"
        median = np.median(times[:, i])
        print(f"{name:24} {members:4} {1e3 * median:20.3f} {spread:>34} {median / max(floors):8.1f}")
    print(
        f"floor per member and step: {1e3 * floors[0]:.3f} ms of arithmetic, {1e3 * floors[1]:.3f} ms of Adam's memory"
    )


if __name__ == "__main__":
    main()
