"""Images and their captions as released: Flickr8k's texts, Karpathy's dataset_*.json, COCO's captions_*.json.

annotations = read_captions(Path("flickr8k"))
annotations.images[0].captions  # ("A child in a pink dress is climbing up a set of stairs in an entry way .", ...)
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmfusion.errors import InputError, printable
from mmfusion.files import ANNOTATION_BYTES, read_regular_file

FLICKR_TEXTS = ("Flickr8k.token.txt", "captions.txt")  # the second: the copy on Kaggle, comma-separated, with a header
FLICKR_SPLITS = {part: f"Flickr_8k.{part}Images.txt" for part in ("train", "dev", "test")}
SUBFOLDERS = ("", "Flickr8k_text", "annotations")  # where the releases unpack their texts
NOT_RELEASED = "2258277193_586949ec62.jpg.1"  # has five captions in Flickr8k.token.txt; there is no such file
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
COCO_NAME = re.compile(r"captions_(train|val)(\d{4})\.json")
AGAIN = "fetch the file again"
REMEDY = "check --data, or fetch the file again"


@dataclass(frozen=True)
class CaptionedImage:
    """One picture and what people wrote about it."""

    name: str
    """of its file, unique in the data set"""
    folder: str
    """in which the file lies below that of all images: "train2017" of COCO; "" of Flickr"""
    split: str | None
    """train, dev or test; None where no file says so"""
    captions: tuple[str, ...]
    """one or more, in the file's order"""


@dataclass(frozen=True)
class CaptionAnnotations:
    """All images of a data set, in the order of its file."""

    name: str
    path: Path
    """the file that was read, for messages"""
    images: list[CaptionedImage]
    notes: list[str] = field(default_factory=list)


def read_captions(path: Path) -> CaptionAnnotations:
    """The annotations in a folder, or in the file, that `path` names.

    Raises InputError naming file and line, or entry: no layout that is known, no regular file, not UTF-8, not JSON, a
    line or entry that is not as released, an image without captions, a caption without an image.
    """
    path = Path(os.path.expanduser(path))
    file = _find(path)
    if file.suffix != ".json":
        return _read_flickr(file)
    if COCO_NAME.fullmatch(file.name):
        return _read_coco(file)
    return _read_karpathy(file)


def _find(path: Path) -> Path:
    """The file that names the captions."""
    if not os.path.isdir(path):  # unlike Path's own, it takes names that are too long
        return path
    for folder in (path / name for name in SUBFOLDERS):
        texts = [folder / name for name in FLICKR_TEXTS if os.path.lexists(folder / name)][:1]  # they say the same
        coco = {COCO_NAME.fullmatch(file.name)[2]: file for file in _coco_files(folder)}  # one of each year
        found = [*texts, *sorted(folder.glob("dataset_*.json")), *coco.values()]
        if len(found) > 1:
            names = ", ".join(printable(file.name) for file in found)
            raise InputError(f"{folder}: holds {names}; give one of these files with --data")
        if found:
            return found[0]
    kinds = "Flickr8k.token.txt, captions.txt, dataset_coco.json or captions_train2017.json"
    raise InputError(f"{path}: holds none of {kinds}; give the folder or file of the captions with --data")


def _coco_files(folder: Path) -> list[Path]:
    """captions_train*.json and captions_val*.json."""
    return sorted(file for file in folder.glob("captions_*.json") if COCO_NAME.fullmatch(file.name))


# ---- Flickr8k ----------------------------------------------------------------------------------------------------


def _read_flickr(file: Path) -> CaptionAnnotations:
    lines = _lines(file)
    header = lines[0].strip().lower() if lines else ""
    rows = _kaggle_rows(file, lines) if header == "image,caption" else _token_rows(file, lines)
    captions: dict[str, list[str]] = {}
    for name, caption in rows:
        captions.setdefault(name, []).append(caption)
    notes = []
    if captions.pop(NOT_RELEASED, None):
        notes.append(f"{NOT_RELEASED}: its captions are left out, the release has no such image")
    if not captions:
        raise InputError(f"{file}: holds no captions; {AGAIN}")
    split_of, note = _flickr_splits(file, captions)
    notes += note
    images = [
        CaptionedImage(name, "", split_of.get(name), tuple(texts))
        for name, texts in captions.items()
        if not split_of or name in split_of
    ]
    return CaptionAnnotations("flickr8k", file, images, notes)


def _token_rows(file: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    """(image, caption) of lines "IMAGE.jpg#0<TAB>caption"."""
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        key, tab, caption = line.partition("\t")
        name, mark, order = key.rpartition("#")
        if not (tab and mark and order.strip().isdecimal()):
            raise InputError(f"{where}: is not IMAGE.jpg#NUMBER, a tab and a caption; {AGAIN}")
        if (first := seen.setdefault(key, number)) != number:
            raise InputError(f"{where}: {printable(key)[:80]} stands in line {first} already; keep one of them")
        yield _file_name(name, where), caption.strip()


def _kaggle_rows(file: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    """(image, caption) of comma-separated lines, a caption with commas in quotation marks; the first is a header."""
    reader = csv.reader(io.StringIO("\n".join(lines)), strict=True)
    try:
        for number, row in enumerate(reader):
            if number and row:
                where = f"{file}:{reader.line_num}"
                if len(row) != 2:
                    raise InputError(f"{where}: has {len(row)} fields, not image and caption; {AGAIN}")
                yield _file_name(row[0].strip(), where), " ".join(row[1].split())
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: is not comma-separated ({error}); {AGAIN}") from error


def _flickr_splits(file: Path, known: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
    """{image: split} of the released lists beside the file, and a note; nothing where there are none."""
    files = {part: file.parent / name for part, name in FLICKR_SPLITS.items()}
    there = [part for part, path in files.items() if os.path.lexists(path)]
    if not there:
        return {}, []
    if lacking := [path.name for part, path in files.items() if part not in there]:
        raise InputError(
            f"{file.parent}: has {FLICKR_SPLITS[there[0]]} but no {lacking[0]}; put it beside the captions"
        )
    split_of: dict[str, str] = {}
    for part, path in files.items():
        for number, line in enumerate(_lines(path), 1):
            name, where = line.strip(), f"{path}:{number}"
            if not name:
                continue
            if name not in known:
                raise InputError(f"{where}: {printable(name)[:80]} has no caption in {file.name}; {AGAIN}")
            if name in split_of:
                raise InputError(f"{where}: {printable(name)[:80]} is in {split_of[name]} already; {AGAIN}")
            split_of[name] = part
        if part not in split_of.values():
            raise InputError(f"{path}: names no image; {AGAIN}")
    rest = len(known) - len(split_of)
    return split_of, [f"{rest} of {len(known)} images are in no split and left out"] if rest else []


def _lines(path: Path) -> list[str]:
    try:
        return read_regular_file(path, ANNOTATION_BYTES, REMEDY).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


# ---- JSON --------------------------------------------------------------------------------------------------------


def _read_karpathy(file: Path) -> CaptionAnnotations:
    """Splits of COCO, Flickr8k and Flickr30k by Karpathy & Fei-Fei (2015); restval, of COCO's val2014, is train."""
    content = _json(file)
    images = []
    seen: set[str] = set()
    for number, entry in enumerate(_entries(content, "images", file)):
        where = f"{file}: images[{number}]"
        name, split = _file_name(_text(entry, "filename", where), where), _text(entry, "split", where)
        folder = _file_name(_text(entry, "filepath", where), where) if entry.get("filepath") else ""
        if split not in KARPATHY_SPLITS:
            raise InputError(f"{where}: split is {printable(split)[:40]!r}; known are {', '.join(KARPATHY_SPLITS)}")
        if name in seen:
            raise InputError(f"{where}: {printable(name)[:80]} is there twice; {AGAIN}")
        seen.add(name)
        sentences = _entries(entry, "sentences", where)
        captions = tuple(_text(one, "raw", f"{where}.sentences[{k}]").strip() for k, one in enumerate(sentences))
        images.append(CaptionedImage(name, folder, KARPATHY_SPLITS[split], captions))
    lacking = [part for part in ("train", "dev", "test") if all(image.split != part for image in images)]
    if lacking:
        raise InputError(f"{file}: has no image of {lacking[0]}; {AGAIN}")
    name = content.get("dataset")
    return CaptionAnnotations(printable(name) if isinstance(name, str) and name else file.stem, file, images)


def _read_coco(file: Path) -> CaptionAnnotations:
    """COCO's own files: captions_train* is trained on, captions_val* is the test, since that of test* is not public."""
    year = COCO_NAME.fullmatch(file.name)[2]
    images: list[CaptionedImage] = []
    for split, part in (("train", "train"), ("val", "test")):
        path = file.parent / f"captions_{split}{year}.json"
        if not os.path.lexists(path):
            raise InputError(f"{path}: no such file; put it beside {file.name}")
        images += _coco_images(path, f"{split}{year}", part)
    if shared := {image.name for image in images if image.split == "train"} & {
        image.name for image in images if image.split == "test"
    }:
        raise InputError(f"{path}: {len(shared)} images are in train too, {printable(min(shared))[:80]} among them")
    return CaptionAnnotations("coco", file, images)


def _coco_images(path: Path, folder: str, part: str) -> list[CaptionedImage]:
    content = _json(path)
    names: dict[int, str] = {}
    for number, entry in enumerate(_entries(content, "images", path)):
        where = f"{path}: images[{number}]"
        key = _number(entry, "id", where)
        if key in names:
            raise InputError(f"{where}: id {key} is there twice; {AGAIN}")
        names[key] = _file_name(_text(entry, "file_name", where), where)
    if len(set(names.values())) < len(names):
        raise InputError(f"{path}: two images have one file_name; {AGAIN}")
    captions: dict[int, list[str]] = {key: [] for key in names}
    for number, entry in enumerate(_entries(content, "annotations", path)):
        where = f"{path}: annotations[{number}]"
        key = _number(entry, "image_id", where)
        if key not in captions:
            raise InputError(f"{where}: image_id {key} is that of no image; {AGAIN}")
        captions[key].append(_text(entry, "caption", where).strip())
    if bare := [key for key, texts in captions.items() if not texts]:
        raise InputError(f"{path}: {len(bare)} images have no caption, {printable(names[bare[0]])[:80]} among them")
    return [CaptionedImage(name, folder, part, tuple(captions[key])) for key, name in names.items()]


def _json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(read_regular_file(file, ANNOTATION_BYTES, REMEDY).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", getattr(error, "reason", type(error).__name__))
        raise InputError(f"{file}: is not JSON ({reason}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: is {type(content).__name__}, not an object with images; {AGAIN}")
    return content


def _entries(content: Mapping[str, object], key: str, where: Path | str) -> list[dict[str, object]]:
    """The objects of a list that must not be empty."""
    found = content.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{where}: {key!r} is no list of objects, or empty; give captions as Karpathy or COCO do")
    return found


def _text(entry: Mapping[str, object], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is {'no string' if key in entry else 'missing'}; {AGAIN}")
    try:
        value.encode()  # JSON escapes can spell half a surrogate pair, which no encoder takes
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {key!r} is not Unicode ({error.reason}); repair the entry") from error
    return value


def _number(entry: Mapping[str, object], key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int:  # bool is an int to isinstance
        raise InputError(f"{where}: {key!r} is {'no whole number' if key in entry else 'missing'}; {AGAIN}")
    return value


def _file_name(name: str, where: str) -> str:
    """The name, if it is one of a file and no path: it must not lead out of the image folder."""
    if not name or name in (".", "..") or set(name) & set("/\\\0") or name[1:2] == ":":
        raise InputError(f"{where}: {json.dumps(name)[:80]} is no plain name of a file; {AGAIN}")
    return name
