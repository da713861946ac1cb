"""MUStARD's annotations and folds as released (Castro et al., 2019), checked entry by entry."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfusion.data.pickles import as_numbers, load_pickle
from mmfusion.errors import InputError
from mmfusion.files import ANNOTATION_BYTES, read_regular_file

ANNOTATION_NAMES = ("sarcasm_data.json", "*sarcasm_data.json")
FOLD_NAMES = ("split_indices.p", "mustard_folds.json", "*folds.json")


@dataclass(frozen=True)
class Utterance:
    """One annotated utterance."""

    key: str
    """as released: "1_60" """
    utterance: str
    context: str
    """the sentences before it, joined with a space"""
    speaker: str
    show: str
    sarcasm: bool


@dataclass(frozen=True)
class FoldPlaces:
    """Places of a fold's examples in the order of the annotations."""

    train: list[int]
    test: list[int]


def find_annotations(path: Path) -> Path:
    """The json itself, or the one in the folder `path`. Raises InputError."""
    path = Path(os.path.expanduser(path))
    if not os.path.isdir(path):  # unlike Path's own, it takes names that are too long
        return path
    found = next((match for name in ANNOTATION_NAMES for match in sorted(path.glob(name))), None)
    if found is None:
        raise InputError(f"{path}: holds no sarcasm_data.json; fetch it from the MUStARD repository")
    return found


def find_folds(annotations: Path, folds: Path | None) -> Path:
    """`folds`, or the file of folds beside the annotations. Raises InputError."""
    if folds is not None:
        return Path(os.path.expanduser(folds))
    found = next((match for name in FOLD_NAMES for match in sorted(annotations.parent.glob(name))), None)
    if found is None:
        raise InputError(
            f"{annotations.parent}: holds no split_indices.p or mustard_folds.json; fetch the released folds"
        )
    return found


def read_annotations(path: Path) -> list[Utterance]:
    """Rows in the order of the file, which the released folds count on. Raises InputError naming file and key."""
    content = _read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: is no object from ids to utterances; fetch sarcasm_data.json again")
    return [_parse(key, row, f"{path}: {key}") for key, row in content.items()]


def read_folds(path: Path, keys: Sequence[str]) -> list[FoldPlaces]:
    """The folds of split_indices.p (pairs of row numbers) or of a JSON list of {"train": [ids], "test": [ids]}.

    Raises InputError: another layout, an unknown or repeated example, one in train and in test.
    """
    as_json = path.suffix == ".json"
    content = _read_json(path) if as_json else load_pickle(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: is no list of folds; fetch the released folds again")
    place = {key: row for row, key in enumerate(keys)}
    folds = []
    for number, fold in enumerate(content, 1):
        where = f"{path}: fold {number}"
        if as_json:
            if not isinstance(fold, dict) or not all(isinstance(fold.get(part), list) for part in ("train", "test")):
                raise InputError(f'{where} is not {{"train": [ids], "test": [ids]}}')
            parts = [_places(fold[part], place, f"{where}, {part}") for part in ("train", "test")]
        else:
            if not isinstance(fold, (list, tuple)) or len(fold) != 2:
                raise InputError(f"{where} is no pair of row numbers (train, test)")
            parts = [_row_numbers(part, len(keys), where) for part in fold]
        for name, part in zip(("train", "test"), parts, strict=True):
            if not part or len(set(part)) < len(part):
                raise InputError(f"{where}: its {name} is empty or holds an example twice; fetch the folds again")
        both = set(parts[0]) & set(parts[1])
        if both:
            raise InputError(f"{where}: {len(both)} examples are in train and in test, {keys[min(both)]} among them")
        folds.append(FoldPlaces(*parts))
    return folds


def _read_json(path: Path) -> object:
    try:
        return json.loads(read_regular_file(path, ANNOTATION_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{path}: is not JSON ({reason}); fetch the file again") from error


def _parse(key: str, row: object, where: str) -> Utterance:
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}, not an object with utterance, context and sarcasm")
    for name in ("utterance", "speaker", "show"):
        if not isinstance(row.get(name), str):
            raise InputError(f"{where}: key {name!r} is {'no string' if name in row else 'missing'}")
    context = row.get("context")
    if not isinstance(context, list) or not all(isinstance(sentence, str) for sentence in context):
        raise InputError(f"{where}: key 'context' is {'no list of strings' if 'context' in row else 'missing'}")
    if type(row.get("sarcasm")) is not bool:
        raise InputError(f"{where}: sarcasm is {json.dumps(row.get('sarcasm'))[:40]}; it must be true or false")
    texts = [row["utterance"], " ".join(context), row["speaker"], row["show"]]
    try:
        "".join([key, *texts]).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: its text is not Unicode ({error.reason}); repair the row") from error
    return Utterance(key, *texts, row["sarcasm"])


def _places(ids: list[object], place: dict[str, int], where: str) -> list[int]:
    unknown = [one for one in ids if not isinstance(one, str) or one not in place]
    if unknown:
        raise InputError(f"{where}: {len(unknown)} ids are not in the annotations, {str(unknown[0])[:40]!r} among them")
    return [place[one] for one in ids]


def _row_numbers(value: object, count: int, where: str) -> list[int]:
    numbers = as_numbers(value, where)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise InputError(f"{where}: holds shape {numbers.shape}, type {numbers.dtype}; expected row numbers (N,)")
    if np.any((numbers < 0) | (numbers >= count)):
        raise InputError(
            f"{where}: names rows up to {numbers.max()}; the annotations have {count}, these folds are others"
        )
    return numbers.tolist()
