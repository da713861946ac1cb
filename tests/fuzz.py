"""Mutated input files: each is read, or refused with one line; never another exception, never slow, never large.

    python -m tests.fuzz                       the full size: 2,000 jsonl files, 500 images, 300 shards, 300 arrays,
                                               300 checkpoints, 300 files of users' own arrays
    python -m tests.fuzz --share 0.1 --seed 7  a tenth of it, other mutations

`tests/test_fuzz.py` runs a small share of it. A new kind of file is a `Kind`: examples to start from, and what reads
one. Cases run in a process of their own under a limit of memory, so that one that takes too much is named too.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import pickle
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from hateful_memes_loader import image_paths, read_annotations
from mmfusion.data.arrays import ArraysConfig, load_arrays
from mmfusion.data.pickles import as_numbers, load_npz, load_pickle
from mmfusion.dataset import Split
from mmfusion.encoders.cache import FeatureCache
from mmfusion.encoders.images import FORMATS, ImageBatches, Preprocessing, digest_images
from mmfusion.errors import InputError
from mmfusion.training.feed import Member
from mmfusion.training.trainer import Problem, Schedule, TrainingData, train

SECONDS, MEGABYTES = 2.0, 1000  # of one case; the second is counted above what the process has before the first
TOKENS = [b"\x00", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00" * 8, b"NaN", b"1e999", b"9" * 5000, b"-1", b"\x1b[2J"]
TOKENS += [
    b"[" * 2000,
    b'{"img":',
    b"null",
    b"true",
    b'""',
    b"\\ud800",
    b"\xed\xa0\x80",
    b"../",
    b"/dev/zero",
    b"\\u0000",
]


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    cases: int
    """how many mutations the full size has"""
    examples: Callable[[], list[bytes]]
    """whole files that are mutated"""
    read: Callable[[bytes, Path], str]
    """content and an empty folder -> `read`, or the reason why it is refused; InputError counts as a reason"""


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _jsonl_examples() -> list[bytes]:
    texts = ["a", "é", "🎉", "\\"]
    rows = [{"id": n, "img": f"img/{n:05}.png", "label": n % 2, "text": text} for n, text in enumerate(texts)]
    bare = [{key: row[key] for key in ("img", "text")} for row in rows]
    files = [(part, ascii_only) for part in (rows, rows[:1], bare) for ascii_only in (True, False)]
    return ["\n".join(json.dumps(row, ensure_ascii=escaped) for row in part).encode() for part, escaped in files]


def _read_jsonl(content: bytes, folder: Path) -> str:
    (folder / "train.jsonl").write_bytes(content)
    memes, _ = read_annotations(folder / "train.jsonl")
    digest_images(list(image_paths([meme.img for meme in memes], folder, folder).values()))
    "".join(meme.text for meme in memes).encode()
    return "read"


def _image_examples() -> list[bytes]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((48, 36))
    exif = Image.Exif()
    exif[0x0112] = 6
    saved = []
    for kind in FORMATS:
        other = picture.convert("CMYK") if kind == "JPEG" else picture.quantize(8)
        saved += [(picture, kind, {}), (other, kind, {})]
    saved.append((picture, "JPEG", {"exif": exif, "progressive": True}))
    saved.append((picture.convert("RGBA"), "PNG", {}))
    saved.append((Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20) * 200), "PNG", {}))
    saved += [(picture, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg")]
    saved.append((picture, "GIF", {"save_all": True, "append_images": [picture.rotate(90)]}))
    contents = []
    for image, kind, options in saved:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        contents.append(stream.getvalue())
    return contents


def _read_image(content: bytes, folder: Path) -> str:
    path = folder / "a.png"
    path.write_bytes(content)
    _, bad = digest_images([path])
    for mode in ("squash", "crop"):
        how = Preprocessing(mode, 32, 37, (0.5,) * 3, (0.5,) * 3)
        _, _, _, reasons = ImageBatches([[path]], [[True]], how)[0]
    if bad and not reasons:
        raise AssertionError("the digest refuses what decodes")
    return (reasons or bad or {0: "read"}).popitem()[1]


def _shard_examples() -> list[bytes]:
    digests = torch.arange(160, dtype=torch.uint8).reshape(5, 32)
    return [save({"digests": digests, "features": torch.randn(5, 7)})]


def _read_shard(content: bytes, folder: Path) -> str:
    cache = FeatureCache(folder, "image", {"encoder": "some"})
    cache.add(["f" * 64], torch.zeros(1, 7))
    cache.flush()
    (cache.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors").write_bytes(content)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cache = FeatureCache(folder, "image", {"encoder": "some"})
    lines = said.getvalue().splitlines()
    shapes = {tuple(vector.shape) for vector in cache.vectors.values()}
    if len(lines) > 1 or len(shapes) > 1:
        raise AssertionError(f"{len(lines)} lines, vectors of shapes {shapes}")
    return lines[0].split(": ", 1)[1] if lines else "read"


def _array_examples() -> list[bytes]:
    table = {"train": {"audio": np.ones((3, 4, 2)), "text": np.array(["a", "bé"]), "id": np.array(["x", 1], object)}}
    contents = [pickle.dumps(table, protocol) for protocol in range(6)]
    for write in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        write(stream, audio_train=np.ones((3, 4, 2), np.float32), text_train=np.array(["a"]), n=np.arange(5))
        contents += [stream.getvalue()] * 3
    return contents


def _read_arrays(content: bytes, folder: Path) -> str:
    path = folder / "a"
    path.write_bytes(content)
    reasons = []
    for load in (load_pickle, load_npz):
        try:
            found = load(path)
        except InputError as error:
            reasons.append(_one_line(error))
            continue
        for value in found.values() if isinstance(found, dict) else [found]:
            for part in value.values() if isinstance(value, dict) else [value]:
                with contextlib.suppress(InputError):  # of text, or of what is damaged: a reason like another
                    as_numbers(part, f"{path}: a key")
        return "read"
    return reasons[content[:2] == b"PK"]


def _own_examples() -> list[bytes]:
    """.npz and .safetensors, with splits and without."""
    rng = np.random.default_rng(0)
    plain = {"a": rng.normal(size=(12, 3)).astype(np.float32), "b": np.arange(12), "target": np.arange(12) % 2}
    parts = {f"{key}_{split}": x for split in ("train", "dev", "test") for key, x in plain.items()}
    classes = np.array(["no", "yes"] * 6)
    texts = plain | {"id": np.array([f"é{row}" for row in range(12)]), "group": np.arange(12) // 3, "target": classes}
    values = plain | {"target": rng.normal(size=(12, 2)), "target_names": np.array(["p", "q"])}
    contents = [save({key: torch.tensor(x) for key, x in table.items()}) for table in (plain, parts)]
    for table in (texts, parts, values):
        for write in (np.savez, np.savez_compressed):
            stream = io.BytesIO()
            write(stream, **table)
            contents.append(stream.getvalue())
    return contents


def _read_own(content: bytes, folder: Path) -> str:
    path = folder / ("a.npz" if b"PK" in content else "a.safetensors")
    path.write_bytes(content)
    reasons = []
    for cut in ({}, {"folds": 2}, {"hold_out": 0.3}):
        try:
            datasets = load_arrays(ArraysConfig(path, **cut))
        except InputError as error:
            reasons.append(_one_line(error))
            continue
        for dataset in datasets:
            json.dumps(dataset.description, allow_nan=False)
            json.dumps([split.ids for split in dataset.splits.values()], ensure_ascii=False).encode()
            if not all(x.isfinite().all() for split in dataset.splits.values() for x in split.features.values()):
                raise AssertionError("values that are not finite")
    return "read" if len(reasons) < 3 else reasons[0]


_DRAWN = np.random.default_rng(0).standard_normal((24, 4)).astype(np.float32)


def _train_two_epochs(checkpoint: Path | None) -> bytes:
    """What two members end in; goes on from the checkpoint where it exists."""
    x = torch.from_numpy(_DRAWN[:, :3])
    split = Split({"a": x}, torch.from_numpy(_DRAWN[:, 3]), [str(n) for n in range(len(x))])
    problem = Problem(
        lambda _: nn.Linear(3, 1),
        lambda model, batch: {"loss": (model(batch.features["a"]).squeeze(-1) - batch.target).square().mean()},
        lambda model, features: model(features["a"]).squeeze(-1),
        lambda prediction, target: -float(np.abs(prediction - target).mean()),
    )
    schedule = Schedule(epochs=2, batch_size=8, learning_rate=1e-2, patience=5, checkpoint_seconds=0.0)
    members = [Member(seed, {"loss": 1.0}) for seed in (0, 1)]
    trained = train(problem, members, TrainingData(split, split), schedule, checkpoint=checkpoint)
    return b"".join(value.numpy().tobytes() for model in trained.models for value in model.state_dict().values())


def _checkpoint_examples() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        _train_two_epochs(path)
        return [path.read_bytes()]


def _read_checkpoint(content: bytes, folder: Path) -> str:
    path = folder / "a.safetensors"
    path.write_bytes(content)
    if _train_two_epochs(path) != _train_two_epochs(None):
        raise AssertionError("a changed checkpoint was gone on from")
    return "read"


KINDS = {
    "jsonl": Kind(2000, _jsonl_examples, _read_jsonl),
    "image": Kind(500, _image_examples, _read_image),
    "shard": Kind(300, _shard_examples, _read_shard),
    "arrays": Kind(300, _array_examples, _read_arrays),
    "checkpoint": Kind(300, _checkpoint_examples, _read_checkpoint),
    "arrays_file": Kind(300, _own_examples, _read_own),
}


# ---- mutations and the run -------------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers at their ends, a cut, a part repeated, moved or taken out, a token."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(data) + 1)
        # headers are short, and most of what can go wrong is in them
        place = min(place, rng.choice((16, 64, 256, len(data))))
        length = min(rng.choice((1, 2, 4, 8, 30)), len(data) - place)
        match rng.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + length] = rng.randbytes(length)
            case 2:
                data[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * length
            case 3:
                del data[rng.randrange(len(data) + 1) :]
            case 4:
                data[place:place] = data[place : place + length] * rng.choice((1, 3, 100))
            case 5:
                del data[place : place + length]
            case _:
                data[place : place + rng.choice((0, 4))] = rng.choice(TOKENS)
    return bytes(data)


def _one_line(error: InputError) -> str:
    if len(str(error).splitlines()) != 1:
        raise AssertionError(f"an InputError of several lines: {error}")
    return str(error)


def _check(kind: Kind, content: bytes) -> tuple[str, str | None]:
    """(outcome, what is wrong with it or None) of one case."""
    before, started = _peak(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = kind.read(content, Path(folder))
        except InputError as error:
            outcome = _one_line(error).replace(folder, "")
        except Exception:
            return "raised", traceback.format_exc()
    seconds, megabytes = time.monotonic() - started, _peak() - before
    if seconds > SECONDS or megabytes > MEGABYTES:
        return outcome, f"took {seconds:.1f} s, {megabytes:.0f} MB"
    return outcome, None


def _peak() -> float:
    """The most megabytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def case(name: str, number: int, seed: int, examples: list[bytes]) -> bytes:
    """The content of one case: the examples unharmed first, then mutations, each with a generator of its own."""
    if number < len(examples):
        return examples[number]
    rng = random.Random(f"{name} {seed} {number}")
    return mutate(rng.choice(examples), rng)


def _work(name: str, numbers: range, seed: int, pipe: Connection) -> None:
    """Send (outcome, what is wrong) of each case."""
    torch.set_num_threads(1)
    limit = 8 << 30  # of memory that is asked for: a case that takes the machine down tells nothing
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kind, examples = KINDS[name], KINDS[name].examples()
    _check(kind, examples[0])  # what libraries load at their first use is of no case
    for number in numbers:
        outcome, wrong = _check(kind, case(name, number, seed, examples))
        if number < len(examples) and outcome != "read":
            wrong = wrong or "a file without harm is refused"
        pipe.send((outcome, wrong))


def run(name: str, count: int, seed: int = 0) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Outcomes of one kind's examples and `count` mutations, and (number, what is wrong) of those that fail."""
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang in its threads
    total = len(KINDS[name].examples()) + count
    number = 0
    while number < total:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, range(number, total), seed, theirs), daemon=True)
        process.start()
        theirs.close()
        patience = 60.0  # the imports; then a case
        with contextlib.suppress(EOFError):
            while number < total and ours.poll(patience):
                outcome, wrong = ours.recv()
                outcomes["read" if outcome == "read" else "refused"] += 1
                failures += [(number, f"{wrong}; outcome: {outcome}")] if wrong else []
                number, patience = number + 1, 5 * SECONDS
        if number < total:
            failures.append((number, "the process died, or the case did not end"))
            number += 1
        process.kill()
        process.join()
    return outcomes, failures


def main() -> int:
    """Print a line for each kind, and each failure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the full size")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--kind", choices=list(KINDS), help="this kind alone")
    choices = parser.parse_args()
    failed = 0
    for name in [choices.kind] if choices.kind else KINDS:
        started = time.monotonic()
        outcomes, failures = run(name, round(choices.share * KINDS[name].cases), choices.seed)
        counts = f"{outcomes['read']:5} read {outcomes['refused']:5} refused {len(failures):5} failed"
        print(f"{name:11} {counts} {time.monotonic() - started:6.1f} s", flush=True)
        for number, wrong in failures[:20]:
            print(f"  {name} {number}, seed {choices.seed}: {wrong}")
        failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
