"""Targets of users' own arrays: what kind of task they are, and their values as the data contract has them.

    infer_task(np.array(["cat", "dog", "cat"]))  # "binary"

The rule of `infer_task`, in its order:

    booleans, texts, or any two distinct values            binary (two) or multiclass
    (N, C) of 0 and 1, exactly one 1 in each row           one-hot: multiclass, or binary where C = 2
    (N, O) of 0 and 1                                      multilabel
    at most 20 distinct whole numbers, each at least twice multiclass
    all else                                               regression, of one value (N,) or of O values (N, O)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmfusion.dataset import Task
from mmfusion.errors import InputError, printable

MOST_CLASSES = 20  # of whole numbers; texts may be of any number of classes
LISTED = 12  # classes that a note names

TaskChoice = Literal["auto", "binary", "multiclass", "multilabel", "regression"]


@dataclass(frozen=True)
class Targets:
    """The targets of all labelled splits, of one task and one numbering of the classes."""

    task: Task
    values: dict[str, Tensor]
    """split -> float32 (N,) or (N, O), as in `mmfusion.dataset.Split.target`"""
    class_names: tuple[str, ...]
    """one per class of a binary or multiclass target; empty else"""
    target_names: list[str]
    """one per column of an (N, O) target; empty for one output"""
    note: str
    """what the target was taken for, in words"""


def infer_task(target: np.ndarray) -> Task:
    """The task of a target (N,) or (N, O), by the rule above. Raises ValueError at other shapes."""
    target = _squeezed(np.asarray(target))
    if target.ndim not in (1, 2) or target.size == 0:
        raise ValueError(f"a target is (N,) or (N, O), found shape {target.shape}")
    is_text = target.dtype.kind in "USO"
    if target.ndim == 1:
        values, counts = np.unique(target, return_counts=True)
        if len(values) == 2 or target.dtype.kind == "b":
            return "binary"
        if is_text or (_is_whole(values) and len(values) <= MOST_CLASSES and counts.min() >= 2):
            return "multiclass"
        return "regression"
    if is_text or not np.isin(target, (0, 1)).all():
        return "regression"
    if not _is_one_hot(target):
        return "multilabel"
    return "binary" if target.shape[1] == 2 else "multiclass"


def encode_targets(
    raw: Mapping[str, np.ndarray],
    task: TaskChoice = "auto",
    column_names: Sequence[str] | None = None,
    name: str = "target",
    source: str = "the arrays",
) -> Targets:
    """Targets of all labelled splits as numbers; classes are numbered in the sorted order of their values.

    Args:
        raw: split -> (N,) or (N, O); `train` is among them. Checked: shapes agree, and numbers are finite.
        task: what the target is; auto infers it from all splits together.
        column_names: O names of the columns of an (N, O) target, where they are known.
        name: the target's key, for the note and for messages.
        source: the file, for messages.

    Raises InputError where the values do not fit the task, there is one class only, or train lacks a class that another
    split has.
    """
    where = f"{source}: {name}"
    raw = {split: _squeezed(target) for split, target in raw.items()}
    _check_kinds(raw, where)
    together = np.concatenate(list(raw.values()))
    found = infer_task(together) if task == "auto" else task
    said = "inferred; --task changes it" if task == "auto" else "as --task says"
    columns = together.shape[1] if together.ndim == 2 else 1
    if column_names is not None and len(column_names) != columns:
        raise InputError(f"{source}: target_names holds {len(column_names)} names for {columns} columns of {name}")
    names = list(column_names or []) or [f"{name}_{place}" for place in range(1, columns + 1)]
    if found in ("binary", "multiclass"):
        values, class_names, kind = _classes(raw, together, found, column_names, where)
        listed = ", ".join(one[:40] for one in class_names[:LISTED]) + (", ..." if len(class_names) > LISTED else "")
        note = f"{name}: {found}, {len(class_names)} classes{kind}: {listed} ({said})"
        return Targets(found, values, class_names, [], note)
    if together.dtype.kind in "US":
        raise InputError(f"{where}: holds texts, which are classes; {found} takes numbers, choose --task multiclass")
    if found == "multilabel":
        if together.ndim != 2 or not np.isin(together, (0, 1)).all():
            raise InputError(
                f"{where}: has shape {together.shape} and values from {float(together.min()):g} to "
                f"{float(together.max()):g}; "
                "multilabel takes (N, O) of 0 and 1, choose another --task"
            )
        note = f"{name}: multilabel, {columns} labels ({said})"
    elif found == "regression":
        said = _why_values(together) if task == "auto" else said
        note = f"{name}: regression of {columns} value{'s' if columns > 1 else ''} ({said})"
    else:
        raise InputError(f"{where}: task {task!r} does not exist; choose binary, multiclass, multilabel or regression")
    values = {split: _numbers(target, where) for split, target in raw.items()}
    if (np.ptp(values["train"].reshape(len(values["train"]), -1).numpy(), axis=0) == 0).all():
        raise InputError(f"{where}: all targets of train are the same; there is nothing to learn")
    return Targets(found, values, (), names if together.ndim == 2 else [], note)


def _why_values(target: np.ndarray) -> str:
    """What a regression was inferred from; of whole numbers that are nearly classes, which of them spoils that."""
    said = "inferred; --task changes it"
    if target.ndim == 1 and _is_whole(target):
        values, counts = np.unique(target, return_counts=True)
        if len(values) <= MOST_CLASSES and counts.min() == 1:
            lone = class_name(values[counts.argmin()])
            said = f"inferred, as {lone} occurs once and a class needs two examples; --task changes it"
    return said


def _squeezed(target: np.ndarray) -> np.ndarray:
    """(N, 1) as (N,)."""
    return target[:, 0] if target.ndim == 2 and target.shape[1] == 1 else target


def _is_whole(values: np.ndarray) -> bool:
    return values.dtype.kind in "iu" or (values.dtype.kind == "f" and bool((values == np.floor(values)).all()))


def _is_one_hot(target: np.ndarray) -> bool:
    """True for (N, C) of 0 and 1 with exactly one 1 in each row."""
    return bool(np.isin(target, (0, 1)).all() and (target.sum(1) == 1).all())


def _numbers(target: np.ndarray, where: str) -> Tensor:
    with np.errstate(over="ignore"):
        values = np.array(target, np.float32)  # a copy: arrays from a file may be read-only
    if not np.isfinite(values).all():
        raise InputError(f"{where}: holds a value beyond the range of float32; rescale the target")
    return torch.from_numpy(values)


def _check_kinds(raw: Mapping[str, np.ndarray], where: str) -> None:
    """Raise InputError where splits hold values of different kinds or shapes, which no numbering joins."""
    shapes = {split: target.shape[1:] for split, target in raw.items()}
    kinds = {split: "texts" if target.dtype.kind in "US" else "numbers" for split, target in raw.items()}
    for split in raw:
        if kinds[split] != kinds["train"]:
            raise InputError(f"{where}: holds {kinds[split]} in {split} and {kinds['train']} in train")
        if shapes[split] != shapes["train"]:
            columns = [f"{math.prod(shapes[name])} columns in {name}" for name in (split, "train")]
            raise InputError(f"{where}: has {' and '.join(columns)}; make them the same")


def _classes(
    raw: Mapping[str, np.ndarray],
    together: np.ndarray,
    task: Literal["binary", "multiclass"],
    column_names: Sequence[str] | None,
    where: str,
) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """(class numbers of each split, names of the classes, " from one-hot rows" or "")."""
    if together.ndim == 2:
        if together.dtype.kind in "US" or not _is_one_hot(together):
            raise InputError(f"{where}: has shape {together.shape}; {task} takes (N,), or rows with exactly one 1")
        names = tuple(column_names or map(str, range(together.shape[1])))
        numbers = {split: target.argmax(1) for split, target in raw.items()}
    else:
        if task == "multiclass" and together.dtype.kind == "f" and not _is_whole(together):
            fraction = together[together != np.floor(together)][0]
            raise InputError(f"{where}: holds fractions such as {fraction:g}; multiclass takes whole numbers or texts")
        values = np.unique(together)
        names = tuple(class_name(value) for value in values)
        numbers = {split: np.searchsorted(values, target) for split, target in raw.items()}
    if len(names) < 2:
        raise InputError(f"{where}: all values are {names[0]!r}; at least two classes are needed")
    if task == "binary" and len(names) != 2:
        raise InputError(f"{where}: has {len(names)} distinct values; binary takes two, choose another --task")
    for place, name in enumerate(names):
        if not (numbers["train"] == place).any():
            others = [split for split, part in numbers.items() if (part == place).any()]
            raise InputError(
                f"{where}: train has no example of class {name!r}{', which is in ' if others else ''}"
                f"{' and '.join(others)}; leave that class out, or choose --task regression if these are numbers"
            )
    kind = " from one-hot rows" if together.ndim == 2 else ""
    return {split: torch.from_numpy(part.astype(np.float32)) for split, part in numbers.items()}, names, kind


def class_name(value: object) -> str:
    """A class's value in words: whole numbers without a fraction."""
    if isinstance(value, (float, np.floating)) and value == np.floor(value):
        return str(int(value))
    return printable(str(value))
