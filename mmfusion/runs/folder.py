"""Life cycle of a run's folder runs/NAME: claimed by name, begun with run.json, closed with results.json.

run = RunFolder.claim(config, "demo")        # before anything is loaded: is the name free, do the settings agree?
if run.begin(dataset.description, device):   # run.json; False where a resumed run is complete already
    ...
    run.close(results)                       # results.json, and with it the end of the checkpoints
"""

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from filelock import FileLock, Timeout

from mmfusion.errors import InputError
from mmfusion.files import write_json

Config = TypeVar("Config")
RUNS = Path("runs")
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scikit-learn", "safetensors")
MARK_OF_COMPLETION = "results.json"
MOST_BYTES = 2**26  # of run.json: a list of a million skipped images has less
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
    "features",
}


@dataclass(frozen=True)
class RunConfig:
    """What the run is called, and whether it goes on from a kill."""

    name: str | None = None
    """the run is kept in runs/NAME; default: the data's name, with a number if that is taken"""
    resume: bool = False
    """go on with the run of that name where it was killed"""


class RunFolder:
    """One run's folder and its life."""

    def __init__(self, path: Path, config: object, resume: bool, numbered: bool) -> None:
        self.path, self.config, self.resume = path, config, resume
        self.numbered = numbered
        """True where the name is a default: another run that takes it first makes this one take the next number"""

    @classmethod
    def claim(cls, config: object, default: str) -> "RunFolder":
        """The folder of the run to begin, or of the run to resume; nothing is written yet.

        Args:
            config: a dataclass of flags (or of sections of flags), `name` and `resume` among them.
            default: the name where none is given; a number is appended where that is taken.

        Raises InputError where the name is no folder name, is taken (without `resume`), or leads to no run (with it),
        or where a setting differs from those of the run to resume.
        """
        settings = settings_of(config)
        name, resume = settings["name"], settings["resume"]
        if resume:
            path = find_begun(name, default)
            check_settings(path, settings)
            return cls(path, config, resume, False)
        _check_name(name)
        if name is None:
            return cls(_first_free(default), config, resume, True)
        if _is_taken(RUNS / name):
            raise InputError(f"{RUNS / name}: this run exists; choose another --name, or go on with it with --resume")
        return cls(RUNS / name, config, resume, False)

    @property
    def is_complete(self) -> bool:
        """True where the run has come to its end."""
        return is_complete(self.path)

    def begin(self, data: Mapping[str, object], device: torch.device) -> bool:
        """Write run.json, or (a resumed run) see that it was begun with these data on this device.

        `data` is the description of a dataset. Returns False, after one printed line, where the run is complete. The
        folder is this process's alone until it ends. Raises InputError.
        """
        now = _description(settings_of(self.config), data, device)
        if self.resume:
            begun = read_run(self.path)
            if not same_data(begun["data"], now["data"]):
                raise InputError(
                    f"{self.path}: was begun with another experiment, dataset or encoder; choose another --name"
                )
            if begun["device"] != now["device"]:
                raise InputError(
                    f"{self.path}: was begun on {begun['device']}; resume it there, or choose another --name"
                )
        else:
            self._create(now)
        if self.is_complete:
            self._remove_leftovers()
            print(f"{self.path}: this run is complete; its scores are in {self.path / MARK_OF_COMPLETION}")
            return False
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.path}: another process is at work in it; wait for it, or end it") from None
        return True

    def _create(self, description: dict) -> None:
        """The folder appears together with its run.json, by a rename: a kill in between leaves no half of a run."""
        while True:
            begun = RUNS / f".{self.path.name}.{os.getpid()}.begun"
            try:
                begun.mkdir(parents=True, exist_ok=True)
                write_json(begun / "run.json", description)
                begun.rename(self.path)  # onto a folder that is there and not empty: an error
                return
            except OSError as error:
                shutil.rmtree(begun, ignore_errors=True)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise InputError(
                        f"{self.path}: cannot be made ({error.strerror}); run where you may write"
                    ) from error
            if not self.numbered:
                raise InputError(f"{self.path}: another run has just taken this name; choose another --name") from None
            self.path = _first_free(re.sub(r"-\d+$", "", self.path.name))

    def close(self, results: Mapping[str, object]) -> None:
        """Write results.json, the last file, and remove the checkpoints, which only a resume needs."""
        write_json(self.path / MARK_OF_COMPLETION, json.loads(json.dumps(results, default=_plain)))
        self._remove_leftovers()
        self._lock.release()

    def _remove_leftovers(self) -> None:
        """Remove what only a resume needs, and what a kill left unfinished: hidden files, beside the run as well."""
        unfinished = RUNS.glob(f".{glob.escape(self.path.name)}.*.begun")
        for leftover in (self.path / "checkpoints", *self.path.rglob(".*"), *unfinished):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # a complete run may lie where nothing can be written
                    leftover.unlink()


def is_complete(folder: Path) -> bool:
    """True where the run in `folder` has come to its end."""
    return (folder / MARK_OF_COMPLETION).exists()


def find_begun(name: str | None, default: str) -> Path:
    """The folder of the run of that name, or of the last one begun under the default name. Raises InputError."""
    _check_name(name)
    wanted = re.compile(re.escape(name) if name else rf"{re.escape(default)}(-\d+)?")
    found = (path for path in RUNS.glob("*/run.json") if wanted.fullmatch(path.parent.name))
    begun = {path.parent.name: path.stat().st_mtime for path in found}
    if not begun:
        raise InputError(f"--resume: there is no run {RUNS / (name or default)}; leave the flag out to begin it")
    return RUNS / max(begun, key=begun.get)


def _check_name(name: str | None) -> None:
    if name is not None and (name in ("", ".", "..") or Path(name).name != name or len(name.encode()) > 100):
        raise InputError(f"--name {name[:100]!r}: give a plain folder name of at most 100 characters")
    if RUNS.exists() and not RUNS.is_dir():
        raise InputError(f"{RUNS}: is a file, and runs are kept in a folder of that name; move it away")


def _is_taken(path: Path) -> bool:
    """True for what exists, an empty folder apart: nothing was begun in that."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _first_free(default: str) -> Path:
    names = (default if number == 1 else f"{default}-{number}" for number in itertools.count(1))
    return next(RUNS / name for name in names if not _is_taken(RUNS / name))


# ---- settings ----------------------------------------------------------------------------------------------------


def settings_of(config: object) -> dict[str, object]:
    """Every flag's value, JSON-able, sections flattened; paths are absolute: a run can be read from anywhere."""
    flat: dict[str, object] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            flat |= settings_of(value)
        elif isinstance(value, Path):
            flat[field.name] = str(value.expanduser().absolute())
        elif field.name == "features":  # MODALITY=PATH
            pairs = [pair.partition("=") for pair in value]
            flat[field.name] = [f"{modality}={Path(path).expanduser().absolute()}" for modality, _, path in pairs]
        elif field.name.endswith("_encoder") and value and Path(value.removeprefix("random:")).expanduser().exists():
            prefix = "random:" if value.startswith("random:") else ""
            flat[field.name] = prefix + str(Path(value.removeprefix(prefix)).expanduser().absolute())
        else:
            flat[field.name] = value
    return json.loads(json.dumps(flat, default=str))


def config_from(config_class: type[Config], settings: Mapping[str, object], path: Path) -> Config:
    """The dataclass whose flags were written to run.json (`path`); flags that came later have their defaults.

    Raises InputError naming the first setting of a wrong type.
    """
    values: dict[str, object] = {}
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        kind = hints[field.name]
        if is_dataclass(kind):
            values[field.name] = config_from(kind, settings, path)
        elif field.name in settings:
            value = settings[field.name]
            if field.name == "seeds" and isinstance(value, list):  # the main script used to list them
                value = len(value)
            values[field.name] = _typed(value, kind, f"{path}: setting {field.name}")
    return config_class(**values)


def _typed(value: object, kind: object, where: str) -> object:
    """A JSON value as the type of a flag. Raises InputError."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for one in kinds:
        if one is type(None) and value is None:
            return None
        if one is Path and isinstance(value, str) and "\0" not in value:
            return Path(value)
        if get_origin(one) is tuple and isinstance(value, list):
            return tuple(value)
        if one is float and type(value) in (int, float):
            return value
        if one in (int, str, bool) and type(value) is one:
            return value
        if get_origin(one) is Literal and value in get_args(one):
            return value
    raise InputError(f"{where} is {json.dumps(value)[:60]}, which it cannot be; begin anew under another --name")


def check_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Raise InputError naming the first setting that differs from those of the run to resume; needs no data."""
    begun = read_run(folder)["settings"]
    for key, value in settings.items():
        was = begun.get(key)
        if key == "seeds" and isinstance(was, list):
            was = len(was)
        if key not in FREE_SETTINGS and was != value:
            raise InputError(
                f"{folder}: was begun with --{key.replace('_', '-')} {was}, not {value}; "
                "leave the flag out to resume it, or give another --name"
            )


def read_run(folder: Path) -> dict[str, dict]:
    """run.json of a run that was begun: its settings, data and device. Raises InputError."""
    path = folder / "run.json"
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError("no regular file of a run's size")
        begun = json.loads(path.read_text(encoding="utf-8"))
        run = {key: begun[key] for key in ("settings", "data", "device")}
        if not isinstance(run["settings"], dict) or not isinstance(run["data"], dict):
            raise TypeError("settings and data must be objects")
        return run
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"{path}: damaged ({type(error).__name__}: {reason}); begin anew under another --name"
        ) from None


def same_data(begun: Mapping[str, object], now: Mapping[str, object]) -> bool:
    """True where two descriptions are of the same data and encoders, wherever these lie on disk."""
    return _without_places(begun) == _without_places(now)


def _without_places(data: Mapping[str, object]) -> dict:
    plain = json.loads(json.dumps(data))
    plain.pop("encoder_config", None)  # as typed; what matters of it is in the encoders' identities
    for encoder in plain.get("encoders", {}).values() if isinstance(plain.get("encoders"), dict) else ():
        if isinstance(encoder, dict):
            encoder.pop("name", None)
    if plain.get("experiment") == "train":  # what baselines was called
        plain["experiment"] = "baselines"
    return plain


def _description(settings: dict, data: Mapping[str, object], device: torch.device) -> dict:
    """Settings, data and machine, as they stand in run.json and config.json."""
    return {
        "settings": settings,
        "data": data,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "code": code_digest(),
        "git_revision": _git_revision(),
    }


def code_digest() -> str:
    """16 hexadecimal digits of all code that a result can depend on: the top-level modules, mmfusion, experiments.

    Unlike a commit it does not change with tests, docs or results.
    """
    root = Path(__file__).parents[2]
    top = [root / f"{name}.py" for name in ("hateful_memes_loader", "jwae_module", "lmf_module", "main_hateful_memes")]
    files = [*top, *(path for room in ("mmfusion", "experiments") for path in sorted((root / room).rglob("*.py")))]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def installed_version(package: str) -> str | None:
    """Version of an installed package, from its metadata; None where it is not installed."""
    try:
        return version(package)
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


def _plain(value: object) -> object:
    if is_dataclass(value):
        return asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value))
