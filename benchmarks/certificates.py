"""Time of exact certificates against a Jacobian by autograd, of EMAP's closed form against its definition.

    python -m benchmarks.certificates

Models as `main_hateful_memes.py` trains them (image 2048, text 768, hidden 128, latents of 32, rank 4), weights as
initialised: the time does not depend on them. Certifying is the exact radius in l1, l2 and linf of both latents of
every example and member.

- from latents     `robustness.certified_radius` on latents that are there; beside it the same radii from one Jacobian
                   for all three norms, by torch.func.vmap(jacrev), and by a loop over examples
- from features    the closed form and vmap(jacrev) with standardisation and encoders in the time
- two latents      `robustness.joint_radius`; nothing to compare it with
- features moved   one certified bound, and the radius by bisection, of the standardised image features in l2
- EMAP             `modality_attribution.interventional_values` beside its definition, N^2 passes

Each time is the median over `--repeats` of the wall-clock, with quartiles; the first call is not counted, and the rows
take turns. What is slow runs on fewer examples (the column "n run") and its time is scaled up to all of them, linearly,
or quadratically for EMAP's definition. Both sides' results are compared first.

On a machine that other processes share, set OMP_WAIT_POLICY=PASSIVE: a thread that spins for a descheduled one turns
microseconds into milliseconds.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from mmfusion.models.decomposition import emap, interventional_values, values_by_definition
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.certificates import (
    NORMS,
    certified_change,
    certified_feature_radius,
    certified_radius,
    dual,
    feature_path,
    joint_radius,
)

WIDTHS = {"image": 2048, "text": 768}
GOAL = 1.0  # second, for all certificates from latents
FEW = {"loop": 200, "features moved": 1000, "emap": 400}  # examples of what is slow


@dataclass(frozen=True)
class Timed:
    """Seconds of one side, already scaled up to all examples."""

    what: str
    examples: int
    """on which it ran"""
    seconds: list[float]

    @property
    def median(self) -> float:
        """Of the repeats."""
        return statistics.median(self.seconds)

    def line(self, ratio: float | None = None) -> str:
        """One row of the table."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        beside = "" if ratio is None else f"  {ratio:8.1f} x"
        return f"{self.what:34}  {self.examples:7d}  {self.median:9.3f}  {low:9.3f} - {high:<9.3f}{beside}".rstrip()


@dataclass(frozen=True)
class Side:
    """One row before it is measured."""

    what: str
    call: Callable[[], object]
    examples: int
    scale: float = 1.0
    """what its seconds are multiplied by"""
    most: int = 99
    """repeats, at most"""


def timed(sides: dict[str, Side], repeats: int) -> dict[str, Timed]:
    """Every side once without counting, then all in turn, so that whatever else the machine does hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            if repeat > side.most:
                continue
            start = time.perf_counter()
            side.call()
            if repeat:
                seconds[name].append((time.perf_counter() - start) * side.scale)
    return {name: Timed(side.what, side.examples, seconds[name]) for name, side in sides.items()}


# ---- the two ways to a radius ------------------------------------------------------------------------------------


@torch.no_grad()
def closed_form(model: FusionModel, latents: Sequence[Tensor]) -> list[Tensor]:
    """Radii (N, O) of both latents in all norms."""
    return [certified_radius(model.fusion, latents, m, norm) for m in range(len(latents)) for norm in NORMS]


def by_autograd(model: FusionModel, latents: Sequence[Tensor]) -> list[Tensor]:
    """The same from the Jacobians of all examples at once."""
    with torch.no_grad():
        y = model.fusion(latents)
    radii = []
    for m in range(len(latents)):
        jacobian = vmap(jacrev(lambda *zs: model.fusion(zs), argnums=m))(*latents)  # (N, O, d_m)
        radii += [y.abs() / torch.linalg.vector_norm(jacobian, ord=dual(norm), dim=-1).detach() for norm in NORMS]
    return radii


def by_loop(model: FusionModel, latents: Sequence[Tensor]) -> list[Tensor]:
    """The same with one backward pass per example and output 0 alone, as one would first write it."""
    radii: list[list[Tensor]] = [[] for _ in range(len(latents) * len(NORMS))]
    for example in zip(*latents, strict=True):
        zs = [z.clone().requires_grad_(True) for z in example]
        y = model.fusion(zs)
        gradients = torch.autograd.grad(y[0], zs)
        lengths = [torch.linalg.vector_norm(g, ord=dual(norm)) for g in gradients for norm in NORMS]
        for made, length in zip(radii, lengths, strict=True):
            made.append(y.detach().abs() / length)
    return [torch.stack(made) for made in radii]


@torch.no_grad()
def encoded(model: FusionModel, features: dict[str, Tensor]) -> list[Tensor]:
    """Latents of raw features in head order, without gradients to the encoders."""
    return model.latents(features)


def check_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Raise AssertionError where two ways to the same numbers disagree beyond float32."""
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---- the table ---------------------------------------------------------------------------------------------------


def measure(models: Sequence[FusionModel], features: dict[str, Tensor], repeats: int) -> dict[str, Timed]:
    """All rows, by a short name."""
    n = len(features["image"])
    few = {name: min(n, count) for name, count in FEW.items()}
    latents = [encoded(model, features) for model in models]
    pairs = list(zip(models, latents, strict=True))
    looped = [(model, [z[: few["loop"]] for z in zs]) for model, zs in pairs]
    for way in (by_autograd, by_loop):
        check_equal(closed_form(*looped[0]), way(*looped[0]))

    head, z = models[0].fusion, [x[: few["emap"]] for x in latents[0]]
    check_equal([emap(interventional_values(head, z))], [emap(values_by_definition(head, z))])
    path = feature_path(models[0], {name: x[: few["features moved"]] for name, x in features.items()}, "image")
    direction = -path.output.sign()
    moved = few["features moved"], n / few["features moved"]
    square = (n / few["emap"]) ** 2

    def from_features(way: Callable) -> list:
        return [way(model, encoded(model, features)) for model in models]

    @torch.no_grad()
    def joint() -> list[Tensor]:
        return [joint_radius(model.fusion, zs, 0, 1) for model, zs in pairs]

    @torch.no_grad()
    def bound() -> Tensor:
        return certified_change(path, direction, 1.0, 2)

    @torch.no_grad()
    def definition() -> Tensor:
        return emap(values_by_definition(head, z))

    sides = {
        "latents": Side("from latents: closed form", lambda: [closed_form(*p) for p in pairs], n),
        "latents, vmap": Side("from latents: vmap(jacrev)", lambda: [by_autograd(*p) for p in pairs], n),
        "latents, loop": Side(
            "from latents: loop", lambda: [by_loop(*p) for p in looped], few["loop"], n / few["loop"]
        ),
        "features": Side("from features: closed form", lambda: from_features(closed_form), n),
        "features, vmap": Side("from features: vmap(jacrev)", lambda: from_features(by_autograd), n),
        "joint": Side("two latents together, l2", joint, n),
        "bound": Side("image features moved: one bound *", bound, *moved),
        "radius": Side("image features moved: radius *", lambda: certified_feature_radius(path, 2), *moved, most=3),
        "emap": Side("EMAP: closed form *", lambda: emap(interventional_values(head, latents[0])), n),
        "emap, definition": Side("EMAP: by definition *", definition, few["emap"], square, most=3),
    }
    return timed(sides, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="examples that are certified")
    parser.add_argument("--members", type=int, default=5, help="models that each example is certified for")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each row")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    if min(args.examples, args.members, args.threads) < 1 or args.repeats < 2:
        parser.error("give at least 1 example, member and thread, and 2 repeats")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = [FusionModel(WIDTHS, 32, 128, 4).eval() for _ in range(args.members)]
    features = {name: torch.randn(args.examples, width) for name, width in WIDTHS.items()}

    print(
        f"torch {torch.__version__}, {platform.machine()} CPU, {args.threads} threads, float32; {args.examples} "
        f"examples x {args.members} members x {len(NORMS)} norms x {len(WIDTHS)} latents\n"
        f"median of {args.repeats} and quartiles (of 3: radius, and EMAP by definition); * one member"
    )
    print(f"{'':34}  {'n run':>7}  {'seconds':>9}  {'quartiles':^21}  closed form's")
    rows = measure(models, features, args.repeats)
    beside = {"latents, vmap": "latents", "latents, loop": "latents", "features, vmap": "features"}
    beside["emap, definition"] = "emap"
    for name, row in rows.items():
        print(row.line(row.median / rows[beside[name]].median if name in beside else None))
    each = rows["radius"].median / args.examples
    print(
        f"all certificates from latents: {rows['latents'].median:.3f} s (to reach: under {GOAL:g}); a certified radius "
        f"of image features: {each * 1e6:.0f} us per example and member"
    )


if __name__ == "__main__":
    main()
