"""Settings of a run: flags as JSON, and back; which of them must agree when a run is resumed."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmfusion.errors import InputError

Config = TypeVar("Config")
MOST_BYTES = 2**26  # of run.json: a list of a million skipped images has less
# settings that do not change a result, and so need not agree when a run is resumed
FREE_SETTINGS = {
    "resume",
    "name",
    "config",
    "tensorboard",
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
    # a Literal | None is typing's Union, int | None a UnionType
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
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
