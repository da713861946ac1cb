"""Memory of a training on more tokens than one wants to hold: 12,140 pictures of 49 cells, 2.4 GB in half precision.

    python -m benchmarks.token_memory

A cache of made-up tokens is written to a temporary folder by a process of its own, as the encoders write it; then it is
opened, members of two methods and two seeds are trained on it, and the process's peak and present memory are printed
(Linux: /proc). The folder is removed afterwards.
"""

import argparse
import hashlib
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch

from mmfusion.dataset import Dataset, Split
from mmfusion.encoders.cache import FeatureCache
from mmfusion.models.fusion import ModelConfig
from mmfusion.sequences import Sequences
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

KINDS = {"image": 2048, "text": 768}  # width of the tokens
CELLS, WORDS = 49, 20  # a picture has 49 cells, a text 1 to 20 words
DEV = 540
BATCH = 128  # pictures that are added to the cache at a time, as from an encoder


def identity(kind: str) -> dict[str, object]:
    """What the cache of one kind is known by."""
    return {"encoder": f"made up, {kind}", "tokens": "float16"}


def digest(kind: str, number: int) -> str:
    """Of a picture or a text: 64 hexadecimal digits."""
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()


def write_cache(folder: Path, pictures: int) -> None:
    """Tokens whose first coordinate tells the label, so that there is something to learn."""
    torch.manual_seed(0)
    for kind, width in KINDS.items():
        cache = FeatureCache(folder, kind, identity(kind))
        base = torch.randn(CELLS, width)
        for start in range(0, pictures, BATCH):
            numbers = range(start, min(start + BATCH, pictures))
            tokens = []
            for number in numbers:
                length = CELLS if kind == "image" else 1 + number % WORDS
                x = base[:length].roll(number, 1)
                x[:, 0] = number % 2 + 0.3 * torch.randn(length)
                tokens.append(x.half())
            cache.add([digest(kind, number) for number in numbers], tokens)
        cache.flush()


def read_split(caches: dict[str, FeatureCache], rows: range) -> Split:
    """Examples whose label is the parity of their number."""
    features = {kind: Sequences([cache.vectors[digest(kind, n)] for n in rows]) for kind, cache in caches.items()}
    return Split(features, torch.tensor([float(n % 2) for n in rows]), [str(n) for n in rows])


def memory() -> dict[str, float]:
    """GB (10^9 bytes): most memory ever resident, and what is resident now, of its own and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {key: value.split()[0] for key, _, value in (line.partition(":") for line in lines) if value.strip()}
    return {name: int(found[name]) * 1024 / 1e9 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=12_140)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()

    start = time.perf_counter()

    def report(what: str) -> None:
        figures = "  ".join(f"{name} {value:5.2f}" for name, value in memory().items())
        print(f"{what:34}{figures}  GB  {time.perf_counter() - start:5.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_cache, args=(Path(folder), options.pictures))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the cache could not be written")
        shards = list(Path(folder).glob("*/*.safetensors"))
        size = sum(path.stat().st_size for path in shards)
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads; {len(shards)} shards, {size / 1e9:.2f} GB"
        )
        report("imported, nothing read")

        caches = {kind: FeatureCache(Path(folder), kind, identity(kind)) for kind in KINDS}
        cut = max(DEV, options.pictures - DEV) if options.pictures > 2 * DEV else options.pictures // 2
        splits = {"train": read_split(caches, range(cut)), "dev": read_split(caches, range(cut, options.pictures))}
        report("cache opened and checked")

        methods = [
            Method("aligned", tuple(KINDS), "transport"),
            Method("not aligned", tuple(KINDS), "transport", weights={"transport": 0.0}),
        ]
        training = TrainingConfig(seeds=options.seeds, epochs=options.epochs, batch_size=64)
        dataset = Dataset("made up", "binary", splits, "dev")
        _, trained = fit_methods(dataset, methods, ModelConfig(), ObjectiveConfig(), training)
        members = len(methods) * options.seeds
        report(f"{members} members, {options.epochs} epoch{'s' * (options.epochs > 1)} trained")
        print("AUROC on dev: " + " ".join(f"{score:.3f}" for score in trained.best_score))


if __name__ == "__main__":
    main()
