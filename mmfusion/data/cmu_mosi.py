"""CMU-MOSI (Zadeh et al., 2016) and its kin in the released files -> one vector per utterance and modality.

    dataset = load_cmu_mosi(Path("unaligned_50.pkl"))  # MMSA: regression, -3 .. 3
    dataset.splits["train"].features["audio"].shape  # (1284, 10): mean and standard deviation of 5 coordinates

Read are the pickles of MMSA (MOSI, MOSEI), MulT and MultiBench (also UR-FUNNY and MUStARD: two-valued labels), and an
.npz of utterance vectors (Poria et al., 2017). Sequences are pooled over time, or kept with `tokens`. CMU-MOSEI's seven
label columns are sentiment and six emotions; sentiment is taken.
"""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mmfusion.data.pickles import as_numbers, file_identity, load_npz, load_pickle
from mmfusion.data.pooling import Pooled, pool_over_time, pooling_notes, steps_from_lengths
from mmfusion.data.steps import Steps, keep_steps
from mmfusion.dataset import Dataset, Split, hold_out, take
from mmfusion.errors import InputError

SENTIMENT_RANGE = (-3.0, 3.0)
HOLDOUT_SHARE = 0.15
SPLIT_KEYS = {"train": ("train",), "dev": ("valid", "dev", "val"), "test": ("test",)}
MODALITY_KEYS = {"text": ("text",), "audio": ("audio",), "video": ("vision", "video")}
LABEL_KEYS = ("regression_labels", "labels", "label")
ID_KEYS = ("id", "ids")
TRANSCRIPT_KEYS = ("raw_text", "transcript")
NAMES = {"mosei": "cmu_mosei", "mosi": "cmu_mosi", "humor": "ur_funny", "funny": "ur_funny", "sarcasm": "mustard"}
TWO_VALUES = ([0, 1], [-1, 1])
VIDEO = re.compile(r"(.+?)(?:\$_\$.*|\[\d+\]|_\d+)")  # VIDEO$_$3 (MMSA), VIDEO[3] (MultiBench), VIDEO_3 (Poria et al.)

Table = dict[str, object]


@dataclass(frozen=True)
class _Part:
    """One split as read: features, pooled or in steps, labels (N,) as released, ids, columns of metadata."""

    read: dict[str, Pooled | Steps]
    labels: np.ndarray
    ids: list[str]
    metadata: dict[str, list[str]]
    notes: list[str]


def load_cmu_mosi(
    path: Path,
    task: Literal["auto", "regression", "binary"] = "auto",
    modalities: Sequence[str] | None = None,
    name: str | None = None,
    tokens: bool = False,
) -> Dataset:
    """Splits train, dev and test of one released file; target sentiment in [-3, 3], or 0/1.

    `task` auto is regression where the labels are graded and binary where they take two values; binary on graded labels
    is polarity without the exact zeros. `modalities` is a choice of text, audio and video; None: all that the file
    has. `name` of the dataset; None: by the names of the file and its folder. A file without a dev split loses 15 % of
    train's videos to one. With `tokens` features are sequences: the valid steps; an array (N, d) is one token each.
    Raises InputError naming the file and the key or shape that is wrong.
    """
    path = Path(os.path.expanduser(path))
    tables = _read_tables(path)
    chosen = _choose_modalities(tables["train"], modalities, path)
    parts = {split: _read_part(table, split, chosen, f"{path}: {split}", tokens) for split, table in tables.items()}
    _check_widths(parts, path)
    graded, task = _resolve_task(parts, task, path)
    notes = [f"{split}: {note}" for split, part in parts.items() for note in part.notes]
    notes += [note for m in chosen for note in pooling_notes(m, [part.read[m] for part in parts.values()])]
    splits = {}
    for split, part in parts.items():
        if not graded and path.suffix != ".npz":  # UR-FUNNY's and MUStARD's ids name no video
            part.metadata.pop("group", None)
        splits[split], note = _make_split(part, task, graded, f"{path}: {split}")
        notes += [f"{split}: {note}"] if note else []
    if "dev" not in splits:
        splits, note = _cut_dev(splits, path)
        notes.append(note)
    if path.suffix == ".npz":
        notes.append(
            "the released vectors were fitted on the training utterances: scores on train, and on a dev split cut from "
            "it, are optimistic and say little"
        )
    notes += _overlap_notes(splits)
    if task == "binary":
        _check_classes(splits, path)
    provenance: dict[str, object] = file_identity(path) | {
        "shapes": {
            split: {m: _shape(_first(table, MODALITY_KEYS[m])) for m in chosen} for split, table in tables.items()
        },
        "pooling": "none: the valid steps"
        if tokens
        else "mean and standard deviation over the valid steps; (N, d) as it is",
        "rows": {split: len(rows) for split, rows in splits.items()},
    }
    label_range = SENTIMENT_RANGE if task == "regression" else None
    # two-valued labels of a released file may be humour or sarcasm: only graded ones are known to be sentiment
    words = ("negative", "positive") if graded else Dataset.class_names
    return Dataset(name or _name(path, graded), task, splits, "dev", notes, provenance, label_range, class_names=words)


def _read_tables(path: Path) -> dict[str, Table]:
    """split -> key -> array, with the splits under our names; an .npz has both in one key, `audio_train`."""
    if path.suffix == ".npz":
        content: object = {}
        for key, array in load_npz(path).items():
            column, _, split = key.rpartition("_")
            content.setdefault(split, {})[column] = array
        _check_npz_layout(content, path)
    else:
        content = load_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}; expected a dictionary with train, valid and test")
    tables = {}
    for split, keys in SPLIT_KEYS.items():
        table = _first(content, keys)
        if table is None:
            if split != "dev":
                raise InputError(f"{path}: has no split {split!r}, its keys are {_listed(content)}; fetch it anew")
            continue
        if not isinstance(table, dict):
            raise InputError(f"{path}: {split} is {type(table).__name__}; expected a dictionary of arrays")
        tables[split] = table
    return tables


def _check_npz_layout(content: dict[str, Table], path: Path) -> None:
    """Raise InputError where an .npz is not laid out as the released one: what it holds is no sentiment of CMU-MOSI."""
    splits = [split for keys in SPLIT_KEYS.values() for split in keys]
    columns = {*itertools.chain(*MODALITY_KEYS.values()), *LABEL_KEYS, *ID_KEYS, *TRANSCRIPT_KEYS}
    reason = None if content else "is empty"
    for split, table in content.items():
        other = [f"{column}_{split}".lstrip("_") for column in table if split not in splits or column not in columns]
        labels, ids = _first(table, LABEL_KEYS), _first(table, ID_KEYS)
        if other or labels is None or ids is None:
            reason = reason or (f"has {other[0]!r}" if other else f"{split} lacks {'id' if ids is None else 'label'}")
        elif not all(VIDEO.fullmatch(_text(one)) for one in np.ravel(ids)):
            reason = reason or f"{split} has ids that are no VIDEO_SEGMENT"
        elif labels.dtype.kind in "iufb" and labels.size and np.isfinite(labels).all():  # else named with its row later
            low, high = float(labels.min()), float(labels.max())
            if not (np.isin(labels, (0, 1)).all() or -3.001 <= low < 0 <= high <= 3.001):  # 0, 1, 2 number classes
                reason = reason or f"{split} has labels from {low:g} to {high:g}, not 0 and 1 or -3 to 3"
    if reason is not None:
        raise InputError(f"{path}: is no .npz of CMU-MOSI ({reason}); for arrays of your own, give --dataset arrays")


def _first(table: dict, keys: Sequence[str]) -> object:
    """The value of the first key there is, or None; Python 2's pickles have bytes for keys at times."""
    return next((table[form] for key in keys for form in (key, key.encode()) if form in table), None)


def _shape(value: object) -> list[int]:
    return list(value.shape) if isinstance(value, np.ndarray) else [len(value)]


def _listed(table: dict) -> str:
    return ", ".join(str(key)[:30] for key in list(table)[:20]) or "none"


def _choose_modalities(table: Table, modalities: Sequence[str] | None, path: Path) -> list[str]:
    present = [m for m, keys in MODALITY_KEYS.items() if _first(table, keys) is not None]
    if not present:
        raise InputError(f"{path}: train has no text, audio, vision or video, its keys are {_listed(table)}")
    for modality in modalities or []:
        if modality not in present:
            raise InputError(f"{path}: has no modality {modality!r}; choose from {', '.join(present)}")
    return present if modalities is None else [m for m in present if m in modalities]


def _read_part(table: Table, split: str, modalities: list[str], where: str, tokens: bool) -> _Part:
    labels = _read_labels(table, where)
    read, notes = {}, []
    for modality in modalities:
        x, valid, note = _read_steps(table, modality, len(labels), where)
        if tokens:
            read[modality] = keep_steps(x[:, None] if _is_table(x) else x, valid)
        else:
            read[modality] = pool_over_time(x[:, None], valid, "mean") if _is_table(x) else pool_over_time(x, valid)
        notes += [note] if note else []
    ids = _read_strings(table, ID_KEYS, len(labels), where)
    metadata = {}
    transcript = _read_strings(table, TRANSCRIPT_KEYS, len(labels), where)
    if transcript is not None:
        metadata["transcript"] = transcript
    if ids is None:
        ids = [f"{split}_row_{row}" for row in range(len(labels))]
        notes.append("the file has no ids; examples are named by their row")
    else:
        metadata["group"] = [_video(one) for one in ids]  # before repeated ids get their numbers
    seen: dict[str, int] = {}
    unique = []
    for one in ids:
        seen[one] = seen.get(one, 0) + 1
        unique.append(one if seen[one] == 1 else f"{one}#{seen[one]}")
    if len(seen) < len(ids):
        notes.append(f"{len(ids) - len(seen)} ids occur again and were given a #2, #3, ...")
    return _Part(read, labels, unique, metadata, notes)


def _is_table(x: np.ndarray | list[np.ndarray]) -> bool:
    """True of one vector for each example, (N, d)."""
    return isinstance(x, np.ndarray) and x.ndim == 2


def _read_labels(table: Table, where: str) -> np.ndarray:
    """(N,) float64 of (N,), (N, 1), (N, 1, 1), (N, 7) or (N, 1, 7)."""
    found = _first(table, LABEL_KEYS)
    if found is None:
        raise InputError(f"{where} has no {' or '.join(LABEL_KEYS)}, its keys are {_listed(table)}")
    labels = as_numbers(found, f"{where}: labels")
    if labels.ndim == 0 or labels.size == 0:
        raise InputError(f"{where}: labels have shape {labels.shape}; expected one or more rows")
    columns = labels.size // len(labels)
    if labels.ndim > 3 or columns not in (1, 7) or (labels.ndim == 3 and labels.shape[1] != 1):
        raise InputError(f"{where}: labels have shape {labels.shape}; expected (N,), (N, 1), (N, 1, 1) or (N, 1, 7)")
    labels = labels.reshape(len(labels), columns)[:, 0]
    if not np.isfinite(labels).all():
        row = int(np.argmin(np.isfinite(labels)))
        raise InputError(f"{where}: the label of row {row} is {labels[row]}; remove the row or fetch the file again")
    return labels


def _read_steps(
    table: Table, modality: str, count: int, where: str
) -> tuple[np.ndarray | list[np.ndarray], np.ndarray | None, str | None]:
    """One modality (N, T, d), (N, d) or N times (T_i, d); its valid steps (N, T), where they are not told by zeros; and
    a note where the file's lengths do not fit it."""
    found = _first(table, MODALITY_KEYS[modality])
    if found is None:
        raise InputError(f"{where} has no {' or '.join(MODALITY_KEYS[modality])}, which train has")
    where = f"{where}: {modality}"
    if isinstance(found, (list, tuple)) or (isinstance(found, np.ndarray) and found.dtype == object and found.ndim):
        return _sequences(found, count, where), None, None
    x = as_numbers(found, where)
    if x.ndim not in (2, 3) or len(x) != count or 0 in x.shape:
        raise InputError(f"{where} has shape {x.shape}; expected ({count}, T, d) or ({count}, d), as there are labels")
    if x.ndim == 2:
        return x, np.ones((count, 1), bool), None
    valid, unfit = None, 0
    lengths = _first(table, [f"{key}_lengths" for key in MODALITY_KEYS[modality]])
    tokens = _first(table, ["text_bert"]) if modality == "text" else None
    if lengths is None and isinstance(tokens, np.ndarray) and tokens.shape == (count, 3, x.shape[1]):
        lengths = (as_numbers(tokens, f"{where}_bert")[:, 1] != 0).sum(1)  # token ids, attention mask, segments
    if lengths is not None:
        lengths = as_numbers(lengths, f"{where}_lengths")
        if lengths.size != count:
            raise InputError(f"{where}_lengths have shape {lengths.shape}; expected ({count},)")
        valid, unfit = steps_from_lengths(x, lengths)
    note = f"{modality}: lengths of {unfit} examples do not fit; their steps that are not zero count" if unfit else None
    return x, valid, note


def _sequences(found: Sequence[object], count: int, where: str) -> list[np.ndarray]:
    """N arrays (T_i, d) of a list or an array of objects."""
    sequences = [as_numbers(one, where) for one in found]
    shapes = sorted({one.shape for one in sequences})
    if len(sequences) != count or any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
        raise InputError(f"{where} is a list of {len(sequences)}, shapes {shapes[:3]}; expected {count} of (T, d)")
    return sequences


def _read_strings(table: Table, keys: Sequence[str], count: int, where: str) -> list[str] | None:
    """N strings; rows of several parts (MulT: video, start, end) are joined with a bar."""
    found = _first(table, keys)
    if found is None:
        return None
    if not isinstance(found, (list, tuple, np.ndarray)) or _shape(found)[:1] != [count]:
        raise InputError(f"{where}: {keys[0]} is not a list of {count}, one for each label")
    several = (list, tuple, np.ndarray)
    return ["|".join(map(_text, np.ravel(one))) if isinstance(one, several) else _text(one) for one in found]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _video(example: str) -> str:
    """The video that an utterance was cut from, by its id; an id of another form is its own video."""
    if "|" in example:
        return example.split("|")[0]
    found = VIDEO.fullmatch(example)
    return found[1] if found else example


def _check_widths(parts: dict[str, _Part], path: Path) -> None:
    for modality in parts["train"].read:
        widths = {split: part.read[modality].features.shape[-1] for split, part in parts.items()}
        if len(set(widths.values())) > 1:
            raise InputError(f"{path}: {modality} has different widths in its splits ({widths}); fetch it again")


def _resolve_task(parts: dict[str, _Part], task: str, path: Path) -> tuple[bool, Literal["binary", "regression"]]:
    """(labels are graded, task). Graded ones are checked against the range of sentiment."""
    values = sorted(set(np.concatenate([part.labels for part in parts.values()])))
    graded = values not in TWO_VALUES and len(values) > 1
    if task not in ("auto", "regression", "binary"):
        raise InputError(f"{path}: task {task!r} does not exist; choose auto, regression or binary")
    if task == "regression" and not graded:
        raise InputError(f"{path}: its labels are {values[0]:g} and {values[-1]:g} only; choose task binary")
    if graded:
        for split, part in parts.items():
            outside = np.abs(part.labels) > SENTIMENT_RANGE[1] + 1e-3  # averages of raters, rounded
            if outside.any():
                row = int(np.argmax(outside))
                raise InputError(f"{path}: {split}: the label of row {row} is {part.labels[row]:g}; expected -3 to 3")
    return graded, "regression" if graded and task != "binary" else "binary"


def _make_split(part: _Part, task: str, graded: bool, where: str) -> tuple[Split, str | None]:
    target = part.labels if task == "regression" else part.labels > 0
    features = {m: x.features if isinstance(x, Steps) else torch.from_numpy(x.features) for m, x in part.read.items()}
    split = Split(features, torch.from_numpy(target.astype(np.float32)), part.ids, part.metadata)
    if task == "regression" or not graded:
        return split, None
    polar = np.flatnonzero(part.labels)
    if len(polar) == 0:
        raise InputError(f"{where}: all labels are 0, none has a polarity; choose task regression")
    note = f"{len(split) - len(polar)} of {len(split)} utterances of neutral sentiment (exactly 0) are left out"
    return take(split, polar), note if len(polar) < len(split) else None


def _cut_dev(splits: dict[str, Split], path: Path) -> tuple[dict[str, Split], str]:
    train = splits["train"]
    groups = train.metadata.get("group", train.ids)
    if len(set(groups)) < 2:
        raise InputError(f"{path}: has no dev split, and train is one video only; none can be cut from it")
    rest, dev = hold_out(train, HOLDOUT_SHARE, groups)
    note = f"no dev split: {len(dev)} of {len(train)} utterances (whole videos) were cut from train as dev"
    return {"train": rest, "dev": dev, "test": splits["test"]}, note


def _overlap_notes(splits: dict[str, Split]) -> list[str]:
    """Videos that a later split shares with train."""
    notes = []
    train = set(splits["train"].metadata.get("group", []))
    for name in list(splits)[1:]:
        videos = set(splits[name].metadata.get("group", []))
        if videos & train:
            notes.append(f"{len(videos & train)} of {len(videos)} videos of {name} are also in train")
    return notes


def _check_classes(splits: dict[str, Split], path: Path) -> None:
    for name in ("train", "dev"):
        classes = splits[name].target.unique().tolist()
        if len(classes) < 2:
            raise InputError(f"{path}: all labels of {name} are {classes[0]:g}; both classes are needed")


def _name(path: Path, graded: bool) -> str:
    """By the file's name, else by its folders' (MMSA: MOSI/Processed/unaligned_50.pkl), else sentiment is MOSI's."""
    for part in [path.stem, *(folder.name for folder in list(path.absolute().parents)[:2])]:
        for word, name in NAMES.items():
            if word in part.lower():
                return name
    return "cmu_mosi" if graded else path.stem
