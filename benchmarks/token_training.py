"""Training on tokens: members stacked against one at a time, with and without alignment; an epoch as on MUStARD.

    python -m benchmarks.token_training

One member is the transformer of `mmfusion.models.wma` (width 128, 2 layers, 8 heads) over two modalities of 384-d
tokens. "One at a time" is a plain PyTorch loop over one model (autograd, AdamW), "in turn" the trainer's own step
member by member, "stacked" one call of each operation for all members. The epoch is what `fit_methods` does, five
seeds of 441 examples whose lengths are ragged (gamma, utterances of 17 and contexts of 60 tokens on average). Wall
clock beside the processor's time: other jobs lengthen the former.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from mmfusion.dataset import Dataset, Split
from mmfusion.losses.token_alignment import TransportTerm
from mmfusion.models.fusion import ModelConfig
from mmfusion.models.token_ensemble import TokenConfig
from mmfusion.models.wma import TokenTransformer
from mmfusion.sequences import Sequences, Tokens
from mmfusion.training import feed
from mmfusion.training.feed import Batch, Member
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.objective import token_objective
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig
from mmfusion.training.trainer import Schedule, _State, build_members, vectorized_step

WIDTHS, LENGTHS, BATCH = {"context": 384, "utterance": 384}, {"context": 60, "utterance": 20}, 64
EXAMPLES, SEEDS = 441, 5


def batch_of(members: int | None, uniforms: int) -> Batch:
    """Random data of B examples, the longest as long as LENGTHS; with a leading members dimension unless None."""
    lead, generator = () if members is None else (members,), torch.Generator().manual_seed(0)
    features = {}
    for name, width in WIDTHS.items():
        length = LENGTHS[name]
        counts = torch.randint(length // 3, length + 1, (*lead, BATCH, 1), generator=generator)
        mask = (torch.arange(length) < counts).float()
        features[name] = Tokens(torch.randn(*mask.shape, width, generator=generator) * mask[..., None], mask)
    target = (torch.rand(*lead, BATCH, generator=generator) > 0.5).float()
    return Batch(features, target, uniforms=(torch.rand(*lead, BATCH, uniforms, generator=generator),))


def build(_member: Member) -> TokenTransformer:
    return TokenTransformer(WIDTHS, width=128, places=max(LENGTHS.values()))


def objective_of(method: str | None) -> tuple[Callable, dict[str, float]]:
    """The objective with tokens aligned by a method, or with the fit alone; and the weights of its terms."""
    weights = {"bce": 1.0} | ({"transport": 0.1} if method else {})
    transport = TransportTerm(method) if method else None
    return lambda model, batch: token_objective(model, batch, transport=transport, wanted=weights), weights


def plain_loop(method: str | None) -> Callable[[], None]:
    """One step of one model, as one would write it."""
    objective, weights = objective_of(method)
    model = build(Member(0, weights))
    optimizer, batch = torch.optim.AdamW(model.parameters(), fused=True), batch_of(None, model.uniforms)

    def step() -> None:
        optimizer.zero_grad()
        sum(weights[name] * term for name, term in objective(model, batch).items()).backward()
        optimizer.step()

    return step


def many(members: int, is_stacked: bool, method: str | None) -> Callable[[], None]:
    """One step of `members` models, as `training.train` takes it."""
    objective, weights = objective_of(method)
    group = [Member(seed, weights) for seed in range(members)]
    models = build_members(build, group)
    state = _State(models, group, Schedule(), torch.device("cpu"))
    gradients_of = vectorized_step(models[0], objective, stacked=is_stacked)
    of_members = {name: torch.full((members,), weight) for name, weight in weights.items()}
    batch = batch_of(members, models[0].uniforms)

    def step() -> None:
        gradients, _ = gradients_of(state.parameters, state.buffers, batch, of_members)
        state.apply(gradients, Schedule.learning_rate)

    return step


def mustard_like() -> Dataset:
    """Random tokens of MUStARD's size: the lengths matter here, what is learned does not."""
    rng = np.random.default_rng(0)
    lengths = {
        "context": np.clip(rng.gamma(2.5, 60 / 2.5, EXAMPLES).round(), 4, 250).astype(int),
        "utterance": np.clip(rng.gamma(4.0, 17 / 4, EXAMPLES).round(), 2, 80).astype(int),
    }
    features = {
        name: Sequences([torch.from_numpy(rng.standard_normal((n, 384), dtype=np.float32)).half() for n in counts])
        for name, counts in lengths.items()
    }
    target = torch.from_numpy(rng.integers(0, 2, EXAMPLES)).float()
    train = Split(features, target, [str(i) for i in range(EXAMPLES)])
    dev = Split({name: x[:32] for name, x in features.items()}, target[:32], train.ids[:32])
    return Dataset("like MUStARD", "binary", {"train": train, "dev": dev}, "dev")


def epoch_seconds(dataset: Dataset, objectives: ObjectiveConfig) -> tuple[float, float]:
    """(wall clock, processor) seconds of the second and last epoch of two, five seeds at once."""
    marks = []
    training = TrainingConfig(seeds=SEEDS, epochs=2, keep="last", device="cpu")
    fit_methods(
        dataset,
        [Method("wma", ("context", "utterance"), "wma")],
        ModelConfig(),
        objectives,
        training,
        tokens=TokenConfig("wma"),
        on_epoch=lambda _record: marks.append((time.perf_counter(), time.process_time())),
    )
    (wall, cpu), (wall_after, cpu_after) = marks
    return wall_after - wall, cpu_after - cpu


def _timed(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    start = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start[0]) / repeats, (time.process_time() - start[1]) / repeats


def print_steps(members: int, rounds: int) -> None:
    """Milliseconds per member and step of every side, and how it compares with one model at a time."""
    sides = {
        f"{name}{', ' + method if method else ''}": (step, count)
        for method in (None, "ipot", "sinkhorn")
        for name, step, count in (
            ("one at a time", plain_loop(method), 1),
            (f"{members} in turn", many(members, False, method), members),
            (f"{members} stacked", many(members, True, method), members),
        )
    }
    for step, _ in sides.values():  # allocate, warm up
        step()
    times = np.array(
        [[np.divide(_timed(step, max(1, 4 // count)), count) for step, count in sides.values()] for _ in range(rounds)]
    )  # (rounds, sides, 2)
    print(f"\n{'':26} {'wall ms':>9} {'CPU ms':>9} {'CPU time over one at a time':>34}")
    for i, name in enumerate(sides):
        ratio = times[:, i, 1] / times[:, i - i % 3, 1]
        wall, cpu = 1e3 * np.median(times[:, i], axis=0)
        print(f"{name:26} {wall:9.0f} {cpu:9.0f} {np.median(ratio):14.2f} [{ratio.min():.2f}, {ratio.max():.2f}]")


def print_epochs(rounds: int) -> None:
    """Seconds of an epoch, aligned and not, with batches of like length and as they come."""
    dataset, pooled = mustard_like(), feed.POOLED_BATCHES
    settings = {
        "plain transformer": (0.0, "ipot"),
        "aligned, ipot": (0.1, "ipot"),
        "aligned, sinkhorn": (0.1, "sinkhorn"),
    }
    rows = {name: (weight, method, pooled) for name, (weight, method) in settings.items()}
    rows["aligned, ipot, any lengths"] = (0.1, "ipot", 1)
    times = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (weight, method, feed.POOLED_BATCHES) in rows.items():
            objectives = replace(ObjectiveConfig(), transport_weight=weight, transport_method=method)
            times[name].append(epoch_seconds(dataset, objectives))
    feed.POOLED_BATCHES = pooled
    plain = np.array(times["plain transformer"])
    print(f"\nan epoch of {EXAMPLES} examples, {SEEDS} seeds")
    print(f"{'':26} {'wall s':>9} {'CPU s':>9} {'CPU time over plain':>34}")
    for name, values in times.items():
        ratio = np.array(values)[:, 1] / plain[:, 1]
        wall, cpu = np.median(values, axis=0)
        print(f"{name:26} {wall:9.1f} {cpu:9.1f} {np.median(ratio):14.2f} [{ratio.min():.2f}, {ratio.max():.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=16, help="members at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs-alone", action="store_true", help="leave out the comparison of single steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, {options.rounds} rounds, CPU")
    if not options.epochs_alone:
        print_steps(options.members, options.rounds)
    print_epochs(options.rounds)


if __name__ == "__main__":
    main()
