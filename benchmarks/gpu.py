"""All that must be known of a GPU: agreement with the CPU, rates, an epoch's time, runs read on the other device.

    python -m benchmarks.gpu --json gpu.json

One command of at most 8 minutes: every part has a budget of seconds, and one that fails or runs out of it is marked
FAILED while the others go on. Exit code 1 where a part failed or the two devices disagree, 2 without CUDA. Times and
rates have targets that are printed beside them and do not change the exit code. Both sides of a ratio are measured in
turn in the same run; a value is the median over repeats, with the smallest and the largest behind it.
"""

import argparse
import csv
import functools
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.feature_extraction import write_folder
from hateful_memes_loader import read_annotations
from lmf_module import LowRankMultimodalFusion
from mmfusion.dataset import Split
from mmfusion.distributed import Processes
from mmfusion.encoders.cache import FeatureCache
from mmfusion.encoders.extract import BATCH_CUDA, encode_images, encode_texts
from mmfusion.encoders.frozen import EncoderConfig, ImageEncoder, TextEncoder, find_image_encoder, find_text_encoder
from mmfusion.encoders.frozen import image_preprocessing as preprocessing_of
from mmfusion.encoders.images import decode_rgb, preprocess
from mmfusion.files import write_json
from mmfusion.models.fusion import FusionModel
from mmfusion.runs.load import load_run
from mmfusion.training.feed import Batch, Member
from mmfusion.training.objective import objective, predict
from mmfusion.training.recipe import ObjectiveConfig
from mmfusion.training.trainer import Problem, Schedule, Trained, TrainingData, build_members, train

ROOT = Path(__file__).parent.parent
AGREEMENT = 1e-4  # of float32 on two devices: largest difference over the largest value
BFLOAT16_ERROR, BFLOAT16_COSINE = 0.02, 0.999  # autocast to bfloat16 on a CPU: .005 and .99999, both encoders
PREDICTIONS = 1e-4  # of one model's probabilities of the same features, read on the other device
EPOCH_MS, EPOCH_RATIO = 50.0, 10.0
WIDTHS = {"image": 2048, "text": 768}


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are those of the one command."""

    widths: tuple[int, int] = (2048, 768)
    train: int = 8500
    dev: int = 500
    members: tuple[int, ...] = (5, 1, 64)
    repeats: int = 5
    photos: int = 48  # distinct ones, each encoded many times over: drawing takes longer than encoding
    images: int = 4096
    texts: int = 4096
    image_size: int = 224
    bert: Path | None = None  # a folder without weights; default: BERT-base, as in the demo, over the captions' words
    steps: int = 20
    compile: bool = True
    run_flags: tuple[str, ...] = ("--epochs", "3", "--seeds", "2")


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    part: str
    name: str
    value: str
    target: str = ""
    verdict: str = ""
    """"ok" or "FAILED"; empty for what is only reported"""


@dataclass(frozen=True)
class Pair:
    """The two devices, the GPU first, and a folder for what is written."""

    device: str
    reference: str
    sizes: Sizes
    folder: Path


# ---- a. agreement ------------------------------------------------------------------------------------------------


def difference(value: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the reference."""
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    return float((value - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def agreement(part: str, name: str, found: float, bound: float = AGREEMENT) -> Line:
    """A difference beside its bound; NaN fails."""
    return Line(part, name, f"{found:.1e}", f"<= {bound:.0e}", "ok" if found <= bound else "FAILED")


@contextmanager
def float32_alone() -> Iterator[None]:
    """Convolutions and products without TF32, whose 10 bits of mantissa are no float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def layer_agreement(pair: Pair) -> Iterator[Line]:
    """Output and gradients of the LMF layer."""
    results = []
    for device in (pair.device, pair.reference):
        torch.manual_seed(0)
        layer = LowRankMultimodalFusion(pair.sizes.widths, rank=4)
        latents = [torch.randn(64, width) for width in pair.sizes.widths]
        layer.to(device)
        latents = [z.to(device).requires_grad_() for z in latents]
        output = layer(latents)  # (64, 1)
        gradients = torch.autograd.grad(output.square().mean(), [*layer.parameters(), *latents])
        results.append((output, gradients))
    (output, gradients), (output_reference, gradients_reference) = results
    yield agreement("LMF layer", "output", difference(output, output_reference))
    pairs = zip(gradients, gradients_reference, strict=True)
    yield agreement("LMF layer", "gradients, largest", max(difference(g, r) for g, r in pairs))


def training_agreement(pair: Pair) -> Iterator[Line]:
    """Losses and parameters after the same steps from the same start; S = 2.

    AdamW divides by the root of the squared gradient: where a gradient is nothing but rounding, its step is a coin
    toss of size `learning_rate`. So parameters are compared as vectors, and the largest single difference is reported:
    float32 against float64 on one CPU, at the default sizes, are 1.3e-6 apart as vectors and 8e-4 in one tensor.
    """
    both = [
        train_members(device, pair.sizes, 2, Schedule(epochs=1, keep="last"), examples=64 * pair.sizes.steps)
        for device in (pair.device, pair.reference)
    ]
    losses = [torch.tensor(list(trained.history[0]["loss"].values())) for trained in both]  # (terms, S)
    weights = [[p.detach() for model in trained.models for p in model.parameters()] for trained in both]
    norms = [torch.cat([p.flatten().double() for p in parameters]) for parameters in weights]
    name = f"{pair.sizes.steps} steps: "
    yield agreement("training", name + "losses", difference(*losses))
    distance = float((norms[0] - norms[1]).norm() / norms[1].norm())
    yield agreement("training", name + "parameters, |a - b| / |b|", distance)
    largest = max(difference(p, r) for p, r in zip(*weights, strict=True))
    yield Line("training", name + "largest of any tensor", f"{largest:.1e}")


def encoder_agreement(pair: Pair) -> Iterator[Line]:
    """Vectors of seeded random ResNet-50 and BERT: float32 against float32, then autocast against float32."""
    config, jsonl = inputs(pair)
    memes = read_annotations(jsonl)[0][:16]
    image, text = find_image_encoder(config), find_text_encoder(config)
    pixels = np.stack([preprocess(decode_rgb(jsonl.parent / m.img), preprocessing_of(config, image)) for m in memes])
    with float32_alone():
        for name, encoder, source, values in (
            ("ResNet-50", ImageEncoder, image, pixels),
            ("BERT", TextEncoder, text, [meme.text for meme in memes]),
        ):

            def encode(device: str, compute: str, encoder=encoder, source=source, values=values) -> Tensor:
                tower = encoder(config, source, device, compute)
                return tower(tower.tokenize(values) if encoder is TextEncoder else values)

            reference = encode(pair.reference, "float32")  # (16, d)
            yield agreement("encoders", f"{name}, float32", difference(encode(pair.device, "float32"), reference))
            half = encode(pair.device, "bfloat16 autocast")
            error = float((half - reference).norm(dim=1).div(reference.norm(dim=1)).max())
            yield agreement("encoders", f"{name}, bfloat16, relative error", error, BFLOAT16_ERROR)
            cosine = float(torch.cosine_similarity(half, reference).min())
            verdict = "ok" if cosine >= BFLOAT16_COSINE else "FAILED"
            yield Line("encoders", f"{name}, bfloat16, least cosine", f"{cosine:.5f}", f">= {BFLOAT16_COSINE}", verdict)


# ---- b. extraction -----------------------------------------------------------------------------------------------


@functools.cache
def inputs(pair: Pair) -> tuple[EncoderConfig, Path]:
    """Photo-like PNG files of 825 x 550 with captions, and both encoders with seeded random weights."""
    jsonl = write_folder(pair.folder / "photos", pair.sizes.photos + 8)
    bert = pair.sizes.bert or jsonl.parent / "bert"
    config = EncoderConfig("random:resnet50", image_size=pair.sizes.image_size, text_encoder=f"random:{bert}")
    return config, jsonl


def extraction(pair: Pair) -> Iterator[Line]:
    """Images a second with and without decoding, texts a second; cold caches, the encoders' construction included."""
    config, jsonl = inputs(pair)
    sizes, processes = pair.sizes, Processes(device=pair.device)
    memes = read_annotations(jsonl)[0]
    image, text = find_image_encoder(config), find_text_encoder(config)
    files = {f"{i:064x}": jsonl.parent / memes[i % len(memes)].img for i in range(sizes.images)}
    texts = {f"{i:064x}": f"{memes[i % len(memes)].text} {i}" for i in range(sizes.texts)}
    preprocessing = preprocessing_of(config, image)
    one = preprocess(decode_rgb(jsonl.parent / memes[0].img), preprocessing)
    batch = np.stack([one] * min(BATCH_CUDA, sizes.images))
    encoder = ImageEncoder(config, image, pair.device)
    encoder(batch)  # kernels are chosen
    rates: dict[str, list[float]] = {"images, decoded before": [], "images, from PNG files": [], "texts": []}
    for repeat in range(3):
        cache = {kind: FeatureCache(pair.folder / f"cold{repeat}", kind, {}) for kind in ("image", "text")}
        batches = max(1, sizes.images // len(batch))
        calls: dict[str, tuple[int, Callable[[], object]]] = {
            "images, decoded before": (batches * len(batch), lambda n=batches: [encoder(batch) for _ in range(n)]),
            "images, from PNG files": (
                len(files),
                lambda c=cache: encode_images(files, c["image"], config, image, processes, progress=False),
            ),
            "texts": (len(texts), lambda c=cache: encode_texts(texts, c["text"], config, text, processes)),
        }
        for name, (count, call) in calls.items():
            start = time.perf_counter()
            call()
            rates[name].append(count / (time.perf_counter() - start))
    for name, values in rates.items():
        yield Line("extraction", f"{name} a second", spread(values, 0))
    ratios = [a / b for a, b in zip(rates["images, from PNG files"], rates["images, decoded before"], strict=True)]
    yield Line("extraction", "PNG files / decoded before", spread(ratios, 2))


# ---- c. an epoch -------------------------------------------------------------------------------------------------


def build(widths: tuple[int, int], member: Member) -> FusionModel:
    """The main script's model of these widths."""
    return FusionModel(dict(zip(WIDTHS, widths, strict=True)))


def random_split(sizes: Sizes, examples: int, seed: int) -> Split:
    """Features that tell the label a little."""
    draw = torch.Generator().manual_seed(seed)
    target = (torch.rand(examples, generator=draw) > 0.5).float()
    target[:2] = torch.tensor([0.0, 1.0])
    features = {
        name: torch.randn(examples, width, generator=draw) + 0.1 * target[:, None]
        for name, width in zip(WIDTHS, sizes.widths, strict=True)
    }
    return Split(features, target, [str(i) for i in range(examples)])


def train_members(
    device: str,
    sizes: Sizes,
    members: int,
    schedule: Schedule,
    *,
    examples: int | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> Trained:
    """Seeds 0 .. members - 1 of the default model and objective through the project's trainer."""
    weights = ObjectiveConfig().loss_weights("binary", list(WIDTHS))
    problem = Problem(
        functools.partial(build, sizes.widths),
        objective,
        predict,
        lambda logits, target: float(np.mean((logits > 0) == (target > 0))),
    )
    return train(
        problem,
        [Member(seed, weights, 0.01) for seed in range(members)],
        TrainingData(random_split(sizes, examples or sizes.train, 0), random_split(sizes, sizes.dev, 1)),
        schedule,
        device=device,
        on_epoch=on_epoch,
    )


class PlainLoop:
    """One model, one seed, as one would write it: data on the device, eager, fused AdamW."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        weights = ObjectiveConfig().loss_weights("binary", list(WIDTHS))
        self.weights, self.device = weights, device
        self.model = build_members(functools.partial(build, sizes.widths), [Member(0, weights)])[0].to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        split = random_split(sizes, sizes.train, 0)
        self.features = {name: x.to(device) for name, x in split.features.items()}
        self.target = split.target.to(device)

    def epoch(self) -> None:
        """One pass, in batches of 64."""
        order = torch.randperm(len(self.target), device=self.device)
        for rows in order[: len(order) // 64 * 64].split(64):  # the trainer leaves a smaller last batch out, too
            batch = Batch({name: x[rows] for name, x in self.features.items()}, self.target[rows])
            self.optimizer.zero_grad()
            sum(self.weights[name] * term for name, term in objective(self.model, batch).items()).backward()
            self.optimizer.step()


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def epoch_seconds(device: str, sizes: Sizes, members: int, compile: bool) -> tuple[list[float], list[float]]:
    """Seconds of an epoch of all members (dev scores included), and of the plain loop's, taken in turn.

    The first two epochs of either are left out: they compile, allocate and warm up.
    """
    plain, stacked, single = PlainLoop(device, sizes), [], []
    start = time.perf_counter()

    def on_epoch(_: dict) -> None:
        nonlocal start
        synchronize(device)
        stacked.append(time.perf_counter() - start)
        start = time.perf_counter()
        plain.epoch()
        synchronize(device)
        single.append(time.perf_counter() - start)
        start = time.perf_counter()

    schedule = Schedule(epochs=2 + sizes.repeats, keep="last", compile=compile)
    train_members(device, sizes, members, schedule, on_epoch=on_epoch)
    return stacked[2:], single[2:]


def epochs(pair: Pair) -> Iterator[Line]:
    """An epoch of S seeds at once, eager and compiled, against S epochs of the plain loop."""
    device, sizes = pair.device, pair.sizes
    for compile in (False, True) if sizes.compile else (False,):
        for members in sizes.members:
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(device)
            stacked, single = epoch_seconds(device, sizes, members, compile)
            name = f"S = {members}, {'compiled' if compile else 'eager'}"
            is_target = members == 5
            target = f"<= {EPOCH_MS:g}" if is_target else ""
            yield Line("epoch", f"{name}: ms an epoch", spread([1e3 * s for s in stacked], 1), target)
            ratios = [members * one / many for one, many in zip(single, stacked, strict=True)]
            target = f">= {EPOCH_RATIO:g}" if is_target else ""
            yield Line("epoch", f"{name}: {members} plain epochs / epoch", spread(ratios, 1), target)
            if device.startswith("cuda"):
                peak = torch.cuda.max_memory_allocated(device) / 1e9
                yield Line("epoch", f"{name}: peak memory, both sides, GB", f"{peak:.2f}")


# ---- d. runs read on the other device ----------------------------------------------------------------------------


def runs(pair: Pair) -> Iterator[Line]:
    """A run trained on each device, its predictions and explanations made anew on the other.

    The other device reads the cached features that the run was trained on: their arithmetic is the run's own.
    """
    for name, own, other in (("gpu", pair.device, pair.reference), ("cpu", pair.reference, pair.device)):
        flags = ["--device", own, "--name", name, *pair.sizes.run_flags]
        command([str(ROOT / "main_hateful_memes.py"), *flags], pair.folder)
        run = load_run(pair.folder / "runs" / name, other)
        split = run.datasets[0].splits["dev"]
        model = run.ensembles[run.main_row].to(other)
        found = model.predict_proba({key: x.to(other) for key, x in split.features.items()}).cpu()  # (S, N)
        rows = list(csv.DictReader((run.folder / "predictions_dev.csv").open()))
        stored = torch.tensor([[float(row[f"seed_{s}"]) for row in rows] for s in run.seeds])  # (S, N)
        label = f"run of {own} on {other}: "
        yield agreement("runs", label + "dev probabilities", float((found - stored).abs().max()), PREDICTIONS)
        explained = ["-m", "mmfusion.explain", f"runs/{name}", "--split", "dev", "--worst", "2", "--device", other]
        command(explained, pair.folder)
        yield Line("runs", label + "explain", "2 examples", "", "ok")


def command(arguments: list[str], folder: Path) -> None:
    """Run Python in `folder`. Raises RuntimeError with the last line that it leaves on stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"{' '.join(arguments)[:60]} ended with {done.returncode}: {last}")


# ---- the table ---------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    """Median [smallest, largest] and n."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} [{low}, {high}] n={len(values)}"


# {part: (what measures it, seconds it may take)}; together below 8 minutes
PARTS: dict[str, tuple[Callable[[Pair], Iterator[Line]], float]] = {
    "LMF layer": (layer_agreement, 20),
    "training": (training_agreement, 40),
    "encoders": (encoder_agreement, 70),
    "extraction": (extraction, 80),
    "runs": (runs, 110),
    "epoch": (epochs, 145),  # last and in order of interest: what a slow compiler costs is the tail of the table
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when its time is up; in the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"did not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(pair: Pair, parts: dict[str, tuple[Callable[[Pair], Iterator[Line]], float]] = PARTS) -> list[Line]:
    """Every part in turn; what one could still say before it failed is kept."""
    lines: list[Line] = []
    for part, (lines_of, seconds) in parts.items():
        start = time.perf_counter()
        try:
            with time_limit(seconds):
                for line in lines_of(pair):
                    lines.append(line)
        except Exception as error:  # the other parts are worth knowing whatever goes wrong in one
            reason = " ".join(str(error).split())[:100]
            lines.append(Line(part, "did not end", f"{type(error).__name__}: {reason}", "", "FAILED"))
        lines.append(Line(part, "seconds", f"{time.perf_counter() - start:.1f}", f"<= {seconds:g}"))
    return lines


def render(lines: list[Line]) -> str:
    """The fixed-width table."""
    head = f"{'part':11} {'what':48} {'value':32} {'target':10} verdict"
    rows = [f"{x.part:11} {x.name:48} {x.value:32} {x.target:10} {x.verdict}".rstrip() for x in lines]
    return "\n".join([head, *rows])


def has_failed(lines: list[Line]) -> bool:
    """True where a part failed or the devices disagree."""
    return any(line.verdict == "FAILED" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write every line of the table to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "error: no CUDA device here; run it where torch.cuda.is_available() is true (a GPU, its driver, and a "
            "torch that was built for CUDA)",
            file=sys.stderr,
        )
        return 2
    if options.json and not options.json.absolute().parent.is_dir():
        print(f"error: --json {options.json}: its folder does not exist; make it first", file=sys.stderr)
        return 2
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Pair("cuda", "cpu", Sizes(), Path(folder)))
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    machine |= {"cpu": platform.machine(), "cores": str(Processes().cores)}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"one seed's plain epoch: eager, fused AdamW; {time.perf_counter() - start:.0f} s in all (to reach: 480)\n")
    print(render(lines))
    if options.json:
        write_json(options.json, {"machine": machine, "lines": [asdict(line) for line in lines]})
    return int(has_failed(lines))


if __name__ == "__main__":
    sys.exit(main())
