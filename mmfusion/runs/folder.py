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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock, Timeout

from mmfusion.errors import InputError
from mmfusion.files import read_regular_file, write_json
from mmfusion.runs.settings import MOST_BYTES, check_settings, config_from, read_run, settings_of

Config = TypeVar("Config")
RUNS = Path("runs")
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scikit-learn", "safetensors")
MARK_OF_COMPLETION = "results.json"


@dataclass(frozen=True)
class RunConfig:
    """What the run is called, and whether it goes on from a kill."""

    name: str | None = None
    """the run is kept in runs/NAME; default: the data's name, with a number if that is taken"""
    resume: bool = False
    """go on with the run of that name where it was killed"""
    config: Path | None = None
    """repeat a run: config.json (or run.json) of its folder gives all flags that are not named here"""
    tensorboard: bool = False
    """write event files for TensorBoard into the run's folder too (needs the package tensorboard)"""


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
    def writes_events(self) -> bool:
        """True where --tensorboard is given."""
        return bool(settings_of(self.config).get("tensorboard"))

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


def defaults_for(config_class: type[Config], run: RunConfig, default: Callable[[], str]) -> Config | None:
    """The settings that stand in for flags that are left out: with --resume or --config those of another run.

    `default` gives the name of the run to resume where none is given. Raises InputError.
    """
    if run.resume and run.config is not None:
        raise InputError("--resume and --config: one goes on with a run, the other begins it anew; give one of the two")
    if run.resume:
        folder = find_begun(run.name, run.name or default())
        return config_from(config_class, read_run(folder)["settings"], folder / "run.json")
    if run.config is None:
        return None
    path = run.config.expanduser()
    path = path / "run.json" if path.is_dir() else path
    remedy = "give config.json or run.json of a run's folder"
    try:
        content = json.loads(read_regular_file(path, MOST_BYTES, remedy, "--config"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: is no JSON ({type(error).__name__}); {remedy}") from error
    settings = content.get("run", content) if isinstance(content, dict) else None
    settings = settings.get("settings") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: holds no settings; give config.json or run.json of a run's folder")
    unknown = sorted(set(settings) - set(settings_of(config_class())))
    if unknown:
        raise InputError(f"--config {path}: is of another command (this one has no --{unknown[0].replace('_', '-')})")
    own = {"name": None, "resume": False, "config": None}
    return config_from(config_class, settings | own, path)


def same_data(begun: Mapping[str, object], now: Mapping[str, object]) -> bool:
    """True where two descriptions are of the same data and encoders, wherever these lie on disk."""
    return _without_places(begun) == _without_places(now)


def _without_places(data: Mapping[str, object]) -> dict:
    plain = json.loads(json.dumps(data))
    if plain.get("loader") == "arrays":  # known by their SHA-256: a later version may put its notes otherwise
        plain.pop("notes", None)
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
