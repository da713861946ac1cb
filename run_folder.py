"""What a run leaves behind: runs/NAME with its settings, its log, its weights, its predictions and its scores."""

import csv
import io
import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from atomic_files import write_json, write_text
from corpus import Corpus, InputError
from fusion_model import FusionEnsemble

RUNS = Path("runs")
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scikit-learn", "safetensors")
# settings that do not change a result, and so need not agree when a run is resumed
FREE_SETTINGS = {"resume", "name", "workers", "jsonl", "img_dir", "download", "cache_dir"}
MARK_OF_COMPLETION = "results.json"


def open_run(config: object, corpus: Corpus, device: torch.device) -> Path:
    """Make the folder of a new run, or find the one to resume.

    `config` is a dataclass with `name` and `resume`. Raises InputError where the name is taken (without --resume),
    where there is nothing to resume, and where the run to resume was begun with other settings or other data.
    """
    settings = json.loads(json.dumps(asdict(config), default=str))
    name = config.name
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise InputError(f"--name {name!r}: give a plain folder name")
    if config.resume:
        return _resume(settings, name or _latest(corpus.name), corpus, device)
    if name is None:
        taken = (path.name for path in RUNS.glob("*"))
        name = _first_free(corpus.name, set(taken))
    folder = RUNS / name
    if folder.exists():
        raise InputError(f"{folder}: this run exists; choose another --name, or go on with it with --resume")
    write_json(folder / "run.json", _description(settings, corpus, device))
    return folder


def _first_free(stem: str, taken: set[str]) -> str:
    number = 1
    while (name := stem if number == 1 else f"{stem}-{number}") in taken:
        number += 1
    return name


def _latest(stem: str) -> str:
    folders = [path.parent for path in RUNS.glob(f"{stem}*/run.json")]
    if not folders:
        raise InputError(f"--resume: there is no run {RUNS / stem} to go on with; leave the flag out, or give --name")
    return max(folders, key=lambda folder: (folder / "run.json").stat().st_mtime).name


def _resume(settings: dict, name: str, corpus: Corpus, device: torch.device) -> Path:
    folder = RUNS / name
    try:
        begun = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--resume: there is no run {folder}; leave the flag out to begin it") from None
    except ValueError as error:
        raise InputError(f"{folder / 'run.json'}: damaged ({error}); begin anew under another --name") from None
    for key, value in settings.items():
        if key not in FREE_SETTINGS and begun["settings"].get(key) != value:
            raise InputError(
                f"{folder}: was begun with --{key.replace('_', '-')} {begun['settings'].get(key)}, not {value}; "
                "give the same settings to resume it, or another --name"
            )
    now = _description(settings, corpus, device)
    for key in ("data", "device"):
        if begun[key] != now[key]:
            raise InputError(f"{folder}: was begun with another {key}; restore it to resume, or choose another --name")
    return folder


def _description(settings: dict, corpus: Corpus, device: torch.device) -> dict:
    """Settings, data and machine, as they stand in run.json and config.json."""
    return {
        "settings": settings,
        "data": {
            "name": corpus.name,
            "selection": corpus.selection,
            "examples": {name: len(split) for name, split in corpus.splits.items()},
            "notes": corpus.notes,
            **corpus.provenance,
        },
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)  # reads metadata; imports nothing
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Commit of the code that runs, with `+` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.returncode else "")


class MetricsLog:
    """metrics.jsonl: one line per row and epoch, on disk as soon as the epoch is over.

    It is written anew when a run is resumed: the training replays the epochs that its checkpoint holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "MetricsLog":
        try:
            self._file: TextIO = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextmanager
    def stack(self, rows: Sequence[str], seeds: Sequence[int], epochs: int) -> Iterator[Callable[[dict], None]]:
        """A progress bar, and a callback for the epochs of rows that are trained in one stack (row-major members)."""
        with tqdm(total=epochs, desc=f"train {rows[0]}", unit="epoch", mininterval=0.5) as bar:

            def on_epoch(record: dict) -> None:
                size = len(seeds)
                for i, row in enumerate(rows):
                    part = slice(i * size, (i + 1) * size)
                    loss = {term: values[part] for term, values in record["loss"].items()}
                    line = {"row": row, "epoch": record["epoch"], "loss": loss, "dev_auroc": record["score"][part]}
                    self._write(json.dumps(line) + "\n")
                bar.update()
                bar.set_postfix(dev_auroc=f"{sum(record['score'][:size]) / size:.3f}")

            yield on_epoch

    def _write(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); make room, then --resume") from error


def save_ensembles(folder: Path, ensembles: Mapping[str, FusionEnsemble]) -> None:
    """The first ensemble into `folder` itself, the others (baselines) into folders below it; all can be loaded.

    config.json holds the constructor's arguments (Hugging Face hub convention) and, under "run", all of run.json.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for i, (label, ensemble) in enumerate(ensembles.items()):
        place = (
            folder if i == 0 else folder / "baselines" / label.replace(" + ", "-").replace(", ", "-").replace(" ", "-")
        )
        ensemble.save_pretrained(place)
        arguments = json.loads((place / "config.json").read_text(encoding="utf-8"))
        write_json(place / "config.json", {**arguments, "row": label, "run": run})


def write_predictions(folder: Path, corpus: Corpus, probabilities: Mapping[str, Tensor], seeds: Sequence[int]) -> None:
    """predictions_SPLIT.csv for every split: id, label (empty where unlabelled), mean probability, one per seed."""
    for name, split in corpus.splits.items():
        p = probabilities[name].numpy()  # (S, N)
        labels = [""] * len(split) if split.target is None else split.target.int().tolist()
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["id", "label", "probability", *(f"seed_{seed}" for seed in seeds)])
        for n, (key, label) in enumerate(zip(split.ids, labels, strict=True)):
            # repr of a float32 reads back as the same float32
            table.writerow([key, label, str(p[:, n].mean()), *(str(value) for value in p[:, n])])
        write_text(folder / f"predictions_{name}.csv", text.getvalue())


def write_results(folder: Path, scores: Mapping, ranks: object, corpus: Corpus) -> None:
    """results.json, the last file of a run, and with it the end of the checkpoints, which only a resume needs."""
    value = {"selection": corpus.selection, "scores": scores, "ranks": ranks}
    write_json(folder / MARK_OF_COMPLETION, json.loads(json.dumps(value, default=_plain)))
    for checkpoint in (folder / "checkpoints").glob("*"):
        checkpoint.unlink()
    (folder / "checkpoints").rmdir()


def _plain(value: object) -> object:
    if is_dataclass(value):
        return asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value))
