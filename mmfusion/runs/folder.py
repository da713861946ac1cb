"""What a run leaves behind: runs/NAME with its settings, its log, its weights, its predictions and its scores."""

import csv
import io
import itertools
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from mmfusion.files import write_json, write_text
from mmfusion.dataset import Dataset
from mmfusion.errors import InputError
from mmfusion.models.fusion import FusionEnsemble

RUNS = Path("runs")
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scikit-learn", "safetensors")
# settings that do not change a result, and so need not agree when a run is resumed
FREE_SETTINGS = {
    "resume",
    "name",
    "workers",
    "jsonl",
    "img_dir",
    "download",
    "cache_dir",
    "data",
    "folds",
    "audio",
    "visual",
}
MARK_OF_COMPLETION = "results.json"


def choose_folder(name: str | None, default: str, resume: bool) -> Path:
    """The folder of the run to begin, or of the run to resume; nothing is written yet.

    Raises InputError where the name is no folder name, is taken (without `resume`), or leads to no run (with it).
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name or len(name.encode()) > 100):
        raise InputError(f"--name {name[:100]!r}: give a plain folder name of at most 100 characters")
    if RUNS.exists() and not RUNS.is_dir():
        raise InputError(f"{RUNS}: is a file, and runs are kept in a folder of that name; move it away")
    if resume:
        wanted = re.compile(re.escape(name) if name else rf"{re.escape(default)}(-\d+)?")
        found = (path for path in RUNS.glob("*/run.json") if wanted.fullmatch(path.parent.name))
        begun = {path.parent.name: path.stat().st_mtime for path in found}
        if not begun:
            raise InputError(f"--resume: there is no run {RUNS / (name or default)}; leave the flag out to begin it")
        return RUNS / max(begun, key=begun.get)
    if name is None:
        numbered = (default if number == 1 else f"{default}-{number}" for number in itertools.count(1))
        name = next(candidate for candidate in numbered if not (RUNS / candidate).exists())
    if (RUNS / name).exists():
        raise InputError(f"{RUNS / name}: this run exists; choose another --name, or go on with it with --resume")
    return RUNS / name


def open_run(folder: Path, config: object, data: Mapping[str, object], device: torch.device, resume: bool) -> None:
    """Begin the run with run.json, or (`resume`) see that it was begun with these data on this device.

    `config` is a dataclass, `data` the description of a dataset. Raises InputError.
    """
    now = _description(_settings(config), data, device)
    if not resume:
        try:
            folder.mkdir(parents=True)  # exclusive: of two runs begun at once under one name, one must stop
        except FileExistsError:
            raise InputError(f"{folder}: another run has just taken this name; choose another --name") from None
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}); run where you may write") from error
        write_json(folder / "run.json", now)
        return
    begun = _begun(folder)
    other_data = begun["data"] != json.loads(json.dumps(now["data"]))
    other_device = begun["device"] != now["device"]
    if other_data:
        raise InputError(f"{folder}: was begun with another experiment, data set or encoder; choose another --name")
    if other_device:
        raise InputError(f"{folder}: was begun on {begun['device']}; resume it there, or choose another --name")


def check_resumable(folder: Path, config: object) -> None:
    """Raise InputError naming the first setting that differs from those of the run to resume; needs no data."""
    begun, settings = _begun(folder)["settings"], _settings(config)
    for key in settings:
        if key not in FREE_SETTINGS and begun.get(key) != settings[key]:
            raise InputError(
                f"{folder}: was begun with --{key.replace('_', '-')} {begun.get(key)}, not {settings[key]}; "
                "give the same settings to resume it, or another --name"
            )


def _settings(config: object) -> dict:
    """Every flag's value, JSON-able, sections flattened."""
    flat = {}
    for field in fields(config):
        value = getattr(config, field.name)
        flat |= _settings(value) if is_dataclass(value) else {field.name: value}
    return json.loads(json.dumps(flat, default=str))


def _begun(folder: Path) -> dict:
    """run.json of a run that was begun."""
    try:
        begun = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return {key: begun[key] for key in ("settings", "data", "device")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'run.json'}: damaged ({error!r}); begin anew under another --name") from None


def is_complete(folder: Path) -> bool:
    """True where the run has come to its end."""
    return (folder / MARK_OF_COMPLETION).exists()


def _description(settings: dict, data: Mapping[str, object], device: torch.device) -> dict:
    """Settings, data and machine, as they stand in run.json and config.json."""
    return {
        "settings": settings,
        "data": data,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "git_revision": _git_revision(),
    }


def installed_version(package: str) -> str | None:
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
    def stack(self, rows: Sequence[str], seeds: int, epochs: int) -> Iterator[Callable[[dict], None]]:
        """A progress bar, and a callback for the epochs of rows that are trained in one stack (row-major members)."""
        with tqdm(total=epochs, desc=f"train {rows[0]}", unit="epoch", mininterval=0.5) as bar:

            def on_epoch(record: dict) -> None:
                for i, row in enumerate(rows):
                    part = slice(i * seeds, (i + 1) * seeds)
                    loss = {term: values[part] for term, values in record["loss"].items()}
                    line = {"row": row, "epoch": record["epoch"], "loss": loss, "dev_auroc": record["score"][part]}
                    self._write(json.dumps(line) + "\n")
                bar.update()
                bar.set_postfix(dev_auroc=f"{sum(record['score'][:seeds]) / seeds:.3f}")

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
        place = folder if i == 0 else folder / "baselines" / re.sub(r"[^\w-]+", "-", label)
        try:
            with TemporaryDirectory(prefix=".saving-", dir=folder) as unfinished:
                ensemble.save_pretrained(unfinished)
                config = Path(unfinished, "config.json")
                write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "row": label, "run": run})
                place.mkdir(parents=True, exist_ok=True)
                for path in Path(unfinished).iterdir():
                    path.replace(place / path.name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{place}: cannot be written ({error}); make room, then --resume") from error


def write_predictions(folder: Path, dataset: Dataset, probabilities: Mapping[str, Tensor]) -> None:
    """predictions_SPLIT.csv for every split: id, label (empty where unlabelled), mean probability, one per seed."""
    for name, split in dataset.splits.items():
        p = probabilities[name].numpy()  # (S, N)
        labels = [""] * len(split) if split.target is None else split.target.int().tolist()
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["id", "label", "probability", *(f"seed_{seed}" for seed in range(len(p)))])
        for n, (key, label) in enumerate(zip(split.ids, labels, strict=True)):
            # repr of a float32 reads back as the same float32
            table.writerow([key, label, str(p[:, n].mean()), *(str(value) for value in p[:, n])])
        write_text(folder / f"predictions_{name}.csv", text.getvalue())


def close_run(folder: Path, results: Mapping[str, object]) -> None:
    """results.json, the last file of a run, and with it the end of the checkpoints, which only a resume needs."""
    write_json(folder / MARK_OF_COMPLETION, json.loads(json.dumps(results, default=_plain)))
    for leftover in (folder / "checkpoints", *folder.glob(".*")):  # hidden: what a kill left unfinished
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _plain(value: object) -> object:
    if is_dataclass(value):
        return asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value))
