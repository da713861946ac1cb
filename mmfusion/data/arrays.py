"""Users' own arrays -> datasets: vectors or sequences per modality and a target, with splits of their own or cut here.

    datasets = load_arrays(ArraysConfig(Path("tweets.npz")))                          # image_train, text_train, ...
    datasets = load_arrays(ArraysConfig(Path("digits.npz"), target="digit", folds=5))  # one dataset per fold
    datasets = dataset_from_arrays({"audio": x, "video": z, "target": y}, ArraysConfig(hold_out=0.2))

Keys are `MODALITY_SPLIT` (splits train, dev or valid or val, test, and further names that begin with dev or test) or,
where the file has no splits, `MODALITY`; likewise `target`, and where there are such, `id`, `group`, `transcript`.
`target_names` holds the names of the columns of a target (N, O). Everything that is wrong raises InputError: one line
that names file, key and remedy.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.data.array_cuts import cut_dev, cut_folds, cut_test, overlap_notes
from mmfusion.data.array_files import arrays_identity, read_arrays
from mmfusion.data.array_targets import Targets, TaskChoice, encode_targets
from mmfusion.data.array_values import (
    check_modality_name,
    feature_sequences,
    feature_vectors,
    plain_array,
    strings,
    target_values,
)
from mmfusion.dataset import Dataset, Split, take
from mmfusion.errors import InputError, check_numbers, printable
from mmfusion.sequences import Sequences

SPLIT_KEY = re.compile(r"(.+?)_(train|valid|val|(?:dev|test)\w*)", re.DOTALL)
DEV_NAMES = ("valid", "val")  # what others call dev
STRING_COLUMNS = ("id", "group", "transcript")
NAMES_KEY = "target_names"
BOUNDS = {"folds": (2, 1000), "hold_out": (0.01, 0.9), "split_seed": (0, 2**31 - 1)}

Table = dict[str, np.ndarray]


@dataclass(frozen=True)
class ArraysConfig:
    """Which arrays, what they are, and how they are cut into train, dev and test."""

    data: Path | None = None
    """.npz, folder of .npy files, or .safetensors, with one array (N, d) per modality (and split) and a target"""
    target: str = "target"
    """key of the target, without the split: with label, label_train and label_test are read"""
    task: TaskChoice = "auto"
    """what the target is; auto infers it and says so"""
    modalities: tuple[str, ...] = ()
    """keys of the modalities, without the split; default: all keys that are not otherwise known"""
    ignore: tuple[str, ...] = ()
    """keys to leave out, without the split"""
    folds: int | None = None
    """K: cross-validation, each example tested once; for files without splits"""
    hold_out: float | None = None
    """share of the examples that is held out for test; for files without splits"""
    split_seed: int = 0
    """of the draws that cut test, folds and dev"""


@dataclass(frozen=True)
class _Part:
    """One split as read: float32 (N, d_m), or sequences, per modality; the raw target or None, strings."""

    features: dict[str, Tensor | Sequences]
    target: np.ndarray | None
    ids: list[str]
    metadata: dict[str, list[str]] = field(default_factory=dict)


def load_arrays(config: ArraysConfig, tokens: bool = False) -> list[Dataset]:
    """The datasets of a file, one per fold; named after the file. Raises InputError naming file, key or flag.

    With `tokens`, arrays (N, T, d) are sequences of T steps, of which those that are all zero, or NaN throughout, are
    padding; arrays (N, d) are one token each.
    """
    if config.data is None:
        raise InputError("--data: own arrays need the path of their file")
    path = Path(os.path.expanduser(config.data))
    arrays, identity = read_arrays(path)
    name = printable(path.absolute().name if os.path.isdir(path) else path.stem)
    return _datasets(arrays, config, name, str(path), identity, tokens)


def dataset_from_arrays(
    arrays: Mapping[str, np.ndarray],
    config: ArraysConfig | None = None,
    name: str = "arrays",
    source: str = "the arrays",
    tokens: bool = False,
) -> list[Dataset]:
    """The datasets of arrays in memory, one per fold, under the keys that a file would have.

    Args:
        arrays: key -> (N, d) or (N,) numbers, with `tokens` also (N, T, d); the target (N,) or (N, O), of numbers or
            texts.
        config: what they are and how they are cut; `data` is not used.
        name: of the dataset.
        source: what messages begin with.
        tokens: sequences, as `load_arrays`.

    Raises InputError as `load_arrays` does.
    """
    plain = {str(key): plain_array(value, f"{source}: {printable(str(key))}") for key, value in arrays.items()}
    return _datasets(plain, config or ArraysConfig(), name, source, arrays_identity(plain), tokens)


def describe_arrays(datasets: Sequence[Dataset]) -> dict[str, object]:
    """What a run records of its data, and by which loader it finds them again."""
    return datasets[0].description | {"loader": "arrays", "folds": len(datasets)}


def arrays_of(dataset: Dataset) -> dict[str, np.ndarray]:
    """The arrays that `dataset_from_arrays` makes the same dataset of, given its task.

    Classes become columns of 0 and 1, so that they keep their order and their names.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, split in dataset.splits.items():
        arrays |= {f"{modality}_{name}": _plain(x) for modality, x in split.features.items()}
        arrays[f"id_{name}"] = np.array(split.ids)
        arrays |= {f"{c}_{name}": np.array(split.metadata[c]) for c in STRING_COLUMNS if c in split.metadata}
        if split.target is not None:
            target = split.target.numpy()
            if dataset.task in ("binary", "multiclass"):
                target = np.eye(len(dataset.class_names), dtype=np.float32)[target.astype(int)]
            arrays[f"target_{name}"] = target
    names = dataset.class_names if dataset.task in ("binary", "multiclass") else dataset.target_names
    return arrays | ({NAMES_KEY: np.array(names)} if len(names) else {})


def _plain(x: Tensor | Sequences) -> np.ndarray:
    """(N, d), or of sequences (N, T, d) with NaN at padding."""
    if isinstance(x, Tensor):
        return x.numpy()
    values, mask = x.padded()
    return values.masked_fill(mask.unsqueeze(-1) == 0, np.nan).numpy()


def beyond_arrays(dataset: Dataset) -> dict[str, object]:
    """What `arrays_of` has no key for, JSON-able; `with_kept` gives it back."""
    return {"notes": dataset.notes, "label_range": dataset.label_range, "provenance": dataset.provenance}


def with_kept(datasets: Sequence[Dataset], kept: Mapping[str, object]) -> list[Dataset]:
    """Datasets made of the arrays of another one, with that one's notes, range of labels and provenance.

    Its provenance comes under the key "dataset", beside that of the arrays.
    """
    span = kept["label_range"]
    return [
        replace(
            dataset,
            notes=list(dict.fromkeys([*kept["notes"], *dataset.notes])),
            label_range=None if span is None else tuple(span),
            provenance=dataset.provenance | {"dataset": dict(kept)},
        )
        for dataset in datasets
    ]


def _datasets(
    arrays: Mapping[str, np.ndarray],
    config: ArraysConfig,
    name: str,
    source: str,
    identity: dict[str, object],
    tokens: bool,
) -> list[Dataset]:
    check_numbers(config, BOUNDS)
    tables, column_names = _tables(arrays, config, source)
    _check_cut_flags(tables, config, source)
    modalities = _modalities(tables, config, source)
    parts = {split: _read_part(table, split, modalities, config, source, tokens) for split, table in tables.items()}
    _check_widths(parts, source)
    raw = {split or "train": part.target for split, part in parts.items() if part.target is not None}
    targets = encode_targets(raw, config.task, column_names, config.target, source)
    splits = {
        split: Split(part.features, targets.values.get(split or "train"), part.ids, part.metadata)
        for split, part in parts.items()
    }
    options = asdict(config) | {"modalities": modalities, "ignore": sorted(config.ignore)}
    del options["data"]  # the file, wherever it lies, is in its identity
    options |= {"tokens": True} if tokens else {}
    shapes = {split or "all": {m: list(x.shape) for m, x in part.features.items()} for split, part in parts.items()}
    provenance: dict[str, object] = identity | {"options": options, "shapes": shapes}
    return [
        _dataset(name, targets, fold_splits, [targets.note, *notes], provenance, f"{source}: {config.target}")
        for fold_splits, notes in _cut(splits, targets, config, source)
    ]


def _cut(
    splits: dict[str, Split], targets: Targets, config: ArraysConfig, source: str
) -> list[tuple[dict[str, Split], list[str]]]:
    """(splits with train first and dev, notes) of each fold."""
    is_classes, names = targets.task in ("binary", "multiclass"), targets.class_names
    if "" in splits:  # a file without splits
        everything = splits[""]
        if config.folds is not None:
            cuts, notes = cut_folds(everything, config.folds, is_classes, config.split_seed, source, names)
        else:
            cuts, notes = cut_test(everything, config.hold_out, is_classes, config.split_seed, source, names)
        folds = [{"train": take(everything, rest), "test": take(everything, test)} for rest, test in cuts]
    else:
        folds, notes = [splits], overlap_notes(splits)
    results = []
    for fold in folds:
        said = []
        if not any(name.startswith("dev") for name in fold):
            train, dev, note = cut_dev(fold["train"], is_classes, config.split_seed, source, names)
            fold, said = {"train": train, "dev": dev} | {n: s for n, s in fold.items() if n != "train"}, [note]
        results.append((fold, notes + said))
    return results


def _dataset(
    name: str, targets: Targets, splits: dict[str, Split], notes: list[str], provenance: dict[str, object], where: str
) -> Dataset:
    """One fold, checked: what is trained and selected upon has targets, and of every class."""
    selection = "dev" if "dev" in splits else next(split for split in splits if split.startswith("dev"))
    if splits[selection].target is None:
        raise InputError(f"{where}: {selection} has no target, and models are selected on it; add it, or leave it out")
    classes = {split: set(splits[split].target.unique().tolist()) for split in ("train", selection)}
    for number, class_name in enumerate(targets.class_names):
        lacking = "train" if number not in classes["train"] else selection
        if number not in classes[lacking] and (lacking == "train" or targets.task == "binary"):
            raise InputError(f"{where}: {lacking} has no example of class {class_name!r}; add some, or cut otherwise")
    named = {"class_names": targets.class_names} if targets.class_names else {}
    return Dataset(name, targets.task, splits, selection, notes, provenance, target_names=targets.target_names, **named)


# ---- keys ------------------------------------------------------------------------------------------------------------


def _tables(
    arrays: Mapping[str, np.ndarray], config: ArraysConfig, source: str
) -> tuple[dict[str, Table], list[str] | None]:
    """Split -> column -> array, train first and dev before test, and the names of the target's columns.

    The one split of a file without splits is called "".
    """
    columns = {found[1] for found in map(SPLIT_KEY.fullmatch, arrays) if found}
    for key in config.ignore:
        if key not in arrays and key not in columns:
            raise InputError(f"--ignore {printable(key)[:60]}: {source} has no such key; it has {_listed(arrays)}")
    arrays = {key: x for key, x in arrays.items() if key not in config.ignore}
    if not arrays:
        raise InputError(f"{source}: holds no arrays{' but those of --ignore' if config.ignore else ''}")
    names = arrays.pop(NAMES_KEY, None)
    column_names = None
    if names is not None:
        column_names = [printable(one) for one in strings(np.ravel(names), f"{source}: {NAMES_KEY}")]
    parsed = {key: SPLIT_KEY.fullmatch(key) for key in arrays}
    if not any(found and found[2] == "train" for found in parsed.values()):
        lone = next((key for key, found in parsed.items() if found and found[1] == config.target), None)
        if lone is not None:
            raise InputError(f"{source}: has {lone!r} and no train split; its keys are {_listed(arrays)}")
        return {"": arrays}, column_names
    tables: dict[str, Table] = {}
    for key, found in parsed.items():
        if found is None:
            raise InputError(f"{source}: {key!r} names no split, as other keys do; leave it out with --ignore")
        column, split = found[1], "dev" if found[2] in DEV_NAMES else found[2]
        if column in config.ignore:
            continue
        if column in tables.setdefault(split, {}):
            raise InputError(f"{source}: {key!r} is a second {split} split of {column!r}; leave one out with --ignore")
        tables[split][column] = arrays[key]
    order = sorted(tables, key=lambda split: (split != "train", not split.startswith("dev"), split != "dev"))
    return {split: tables[split] for split in order if tables[split]}, column_names


def _listed(keys: Mapping[str, object]) -> str:
    return ", ".join(printable(str(key))[:30] for key in list(keys)[:20]) or "none"


def _check_cut_flags(tables: dict[str, Table], config: ArraysConfig, source: str) -> None:
    """Splits are in the file or cut here, not both, and not in two ways."""
    flags = {"--folds": config.folds, "--hold-out": config.hold_out}
    given = [f"{flag} {value}" for flag, value in flags.items() if value is not None]
    if "" not in tables and given:
        raise InputError(f"{given[0]}: {source} has splits of its own ({', '.join(tables)}); leave the flag out")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: give one of the two")
    if "" in tables and not given:
        raise InputError(
            f"{source}: has no splits (its keys are {_listed(tables[''])}); give --folds K or --hold-out SHARE"
        )


def _modalities(tables: dict[str, Table], config: ArraysConfig, source: str) -> list[str]:
    """Keys of the modalities, in the order of the file; every split has them."""
    first = tables.get("train", tables.get("", {}))
    if config.target not in first:
        near = next((key for key in ("label", "labels", "y", "target") if key in first), None)
        remedy = f"name it with --target{f' {near}' if near else ''}"
        key = config.target + ("_train" if "train" in tables else "")
        raise InputError(f"{source}: has no target {key!r}, its keys are {_listed(first)}; {remedy}")
    known = (config.target, *STRING_COLUMNS)
    present = [key for key in first if key not in known]
    for place, modality in enumerate(config.modalities):
        if modality in config.modalities[:place]:
            raise InputError(f"--modalities: names {printable(modality)[:60]} twice; name it once")
        if modality not in present:
            raise InputError(f"{source}: has no modality {modality!r}; choose from {_listed(dict.fromkeys(present))}")
    chosen = [key for key in present if key in config.modalities] if config.modalities else present
    if not chosen:
        raise InputError(f"{source}: has no modality beside {_listed(first)}; add an array (N, d), such as image")
    for modality in chosen:
        check_modality_name(modality, source)
    for split, table in tables.items():
        missing = next((m for m in chosen if m not in table), None)
        if missing is not None:
            raise InputError(f"{source}: has no {missing}_{split}, and train has that modality; add it, or --ignore it")
        further = next((key for key in table if key not in first and key not in known), None)
        if further is not None and not config.modalities:
            raise InputError(f"{source}: {printable(further)}_{split} is not in train; leave it out with --ignore")
    return chosen


# ---- values ----------------------------------------------------------------------------------------------------------


def _read_part(
    table: Table, split: str, modalities: list[str], config: ArraysConfig, source: str, tokens: bool
) -> _Part:
    """One split, checked."""
    suffix = f"_{split}" if split else ""
    features: dict[str, Tensor | Sequences] = {}
    for modality in modalities:
        where = f"{source}: {modality}{suffix}"
        x = table[modality]
        features[modality] = feature_sequences(x, where) if tokens else torch.from_numpy(feature_vectors(x, where))
    first = modalities[0]
    count = len(features[first])
    target = table.get(config.target)
    if target is None and split == "train":
        raise InputError(f"{source}: has no {config.target}_train")
    if target is not None:
        target = target_values(target, f"{source}: {config.target}{suffix}")
    columns = {c: strings(table[c], f"{source}: {c}{suffix}") for c in STRING_COLUMNS if c in table}
    for key, values in {**features, config.target: target, **columns}.items():
        if values is not None and len(values) != count:
            raise InputError(f"{source}: {key}{suffix} has {len(values)} rows and {first}{suffix} has {count}")
    ids = columns.pop("id", None)
    if ids is None:  # a name of its own in every split: rows that begin anew are other examples
        ids = [f"{split}_{row}" if split else str(row) for row in range(count)]
    elif len(set(ids)) < count:
        place = {one: row for row, one in reversed(list(enumerate(ids)))}
        row = next(row for row, one in enumerate(ids) if place[one] != row)
        raise InputError(
            f"{source}: id{suffix} has {ids[row]!r:.60} in rows {place[ids[row]]} and {row}; make it unique"
        )
    return _Part(features, target, ids, columns)


def _check_widths(parts: dict[str, _Part], source: str) -> None:
    for modality in next(iter(parts.values())).features:
        widths = {split: part.features[modality].shape[-1] for split, part in parts.items()}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{width} in {split}" for split, width in widths.items())
            raise InputError(f"{source}: {modality} has different widths: {listed}; make them one encoder's")
