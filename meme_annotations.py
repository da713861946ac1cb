"""The jsonl files of Hateful Memes -> checked rows, split by split; no image is opened here."""

import json
import posixpath
from dataclasses import dataclass
from pathlib import Path

from corpus import InputError

# both releases, in the order in which splits are reported
SPLIT_NAMES = ("train", "dev", "dev_seen", "dev_unseen", "test", "test_seen", "test_unseen")
SELECTION_NAMES = ("dev_seen", "dev", "dev_unseen")


@dataclass(frozen=True)
class Meme:
    """One row. `img` is its key: `id` is an int in one release and a zero-padded string in the other."""

    img: str
    """path relative to the jsonl's folder, normalised"""
    text: str
    """valid Unicode; may be empty"""
    label: int | None
    """1 hateful, 0 benign, None where the row has no `label` key"""
    line: str
    """FILE:LINE, for messages"""


def find_annotations(jsonl: Path) -> dict[str, Path]:
    """The train file that `jsonl` names (or holds, if it is a folder) and its companion splits, in reporting order.

    Raises InputError where there is no train file.
    """
    jsonl = jsonl.expanduser()
    if jsonl.is_dir():
        candidates = [jsonl / "train.jsonl", jsonl / "data" / "train.jsonl"]  # the Kaggle copy nests a data/ folder
    elif jsonl.name == "train.jsonl":
        candidates = [jsonl, jsonl.parent / "data" / "train.jsonl"]
    else:
        candidates = [jsonl]
    train = next((path for path in candidates if path.is_file()), None)
    if train is None:
        raise InputError(f"{candidates[0]}: no such file; set --jsonl (or REAL_PATH) to train.jsonl or its folder")
    if train.stem in SPLIT_NAMES[1:]:
        raise InputError(
            f"{train}: is the {train.stem} split; set --jsonl to train.jsonl, the others are found beside it"
        )
    companions = {name: train.parent / f"{name}.jsonl" for name in SPLIT_NAMES[1:]}
    return {"train": train} | {name: path for name, path in companions.items() if path.is_file()}


def read_annotations(path: Path) -> tuple[list[Meme], str | None]:
    """Rows of one file and, where identical rows were dropped, a note that counts them.

    Raises InputError naming file and line: not UTF-8, not JSON, a key missing or of the wrong type, a label other than
    0 or 1, an `img` that is absolute or leaves the folder, one `img` with two texts or labels, labels on some rows
    only.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors write a byte order mark
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    memes: dict[str, Meme] = {}
    duplicates = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        meme = _parse(line, f"{path}:{number}")
        first = memes.setdefault(meme.img, meme)
        if first is not meme:
            if (first.text, first.label) != (meme.text, meme.label):
                raise InputError(f"{meme.line}: {meme.img} has another text or label than in {first.line}; keep one")
            duplicates += 1
    if not memes:
        raise InputError(f"{path}: holds no rows; fetch the file again")
    bare = next((meme for meme in memes.values() if meme.label is None), None)
    if bare is not None and any(meme.label is not None for meme in memes.values()):
        raise InputError(f"{bare.line}: has no label though other rows of the file have; add it or remove the row")
    note = f"{path.stem}: {duplicates} duplicated rows dropped" if duplicates else None
    return list(memes.values()), note


def _parse(line: bytes, where: str) -> Meme:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{where}: is not JSON ({reason}); every line must be one object") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: is {type(row).__name__}, not an object with img, text and label")
    for key in ("img", "text"):
        if not isinstance(row.get(key), str):
            state = f"is {json.dumps(row[key])[:40]}, not a string" if key in row else "is missing"
            raise InputError(f"{where}: key {key!r} {state}")
    label = row.get("label")
    if "label" in row and (type(label) is not int or label not in (0, 1)):  # bool is an int to isinstance
        raise InputError(f"{where}: label is {json.dumps(label)[:40]}; it must be the number 0 or 1")
    return Meme(_inside(row["img"], where), _valid_unicode(row["text"]), label, where)


def _inside(img: str, where: str) -> str:
    """The path normalised, if it stays below the folder it is relative to."""
    slashed = img.replace("\\", "/")
    normal = posixpath.normpath(slashed)
    if slashed.startswith("/") or slashed[1:2] == ":" or normal.split("/")[0] == "..":
        raise InputError(
            f"{where}: img is {_shown(img)}, outside the image folder; it must be a path like img/01235.png"
        )
    if normal == "." or "\0" in img or img != _valid_unicode(img):
        raise InputError(f"{where}: img is {_shown(img)}, no file name; it must be a path like img/01235.png")
    return normal if slashed == img else img


def _shown(text: str) -> str:
    return json.dumps(text)[:80]


def _valid_unicode(text: str) -> str:
    """JSON escapes can spell half a surrogate pair, which no encoder takes: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
