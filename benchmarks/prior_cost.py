"""What a training step costs, per member, with Gaussian latents and with further penalties, against certain latents.

    python -m benchmarks.prior_cost                     64 members, batches of 64, image 2048 and text 768

One process, the variants in turn, several rounds; the median of each round's ratio to the first variant.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from mmfusion.models.fusion import FusionModel
from mmfusion.training.feed import Batch, Member
from mmfusion.training.objective import objective
from mmfusion.training.recipe import ObjectiveConfig
from mmfusion.training.trainer import build_members, vectorized_step

DIMS = {"image": 2048, "text": 768}
VARIANTS = {
    "certain latents, MMD": ("none", 0.0, 0.0),
    "certain latents, MMD and Bures": ("none", 1.0, 0.0),
    "Gaussian latents, MMD": ("dimension", 0.0, 0.0),
    "Gaussian latents, MMD and Bures": ("dimension", 1.0, 0.0),
    "Gaussian latents, MMD, features dropped": ("dimension", 0.0, 0.5),
}


def step_of(noise: str, bures: float, dropout: float, members: int, batch: int):
    """A function that takes one step's gradients of all members."""
    objectives = ObjectiveConfig(bures_weight=bures)
    group = [Member(seed, {}) for seed in range(members)]
    models = build_members(lambda member: FusionModel(DIMS, noise=noise), group)
    parameters, buffers = torch.func.stack_module_state(models)
    step = vectorized_step(models[0], partial(objective, prior=objectives.prior))
    weights = {name: torch.full((members,), w) for name, w in objectives.loss_weights("binary", tuple(DIMS)).items()}
    features = {name: torch.randn(members, batch, d) for name, d in DIMS.items()}
    kept = {name: (torch.rand_like(x) > dropout).float() for name, x in features.items()} if dropout else {}
    data = Batch(features, torch.randint(0, 2, (members, batch)).float(), kept=kept)
    return lambda: step(parameters, buffers, data, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    steps = {name: step_of(*variant, options.members, options.batch) for name, variant in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    base = seconds[next(iter(steps))]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.members} members, {options.batch} each"
    )
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, base, strict=True))
        median = statistics.median(times) / options.members * 1000
        print(
            f"{name:42} {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]   {median:.2f} ms a member"
        )


if __name__ == "__main__":
    main()
