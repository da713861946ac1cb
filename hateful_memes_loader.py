"""Hateful Memes (Kiela et al., 2020) on disk -> frozen image and text vectors, split by split, cached.

    dataset = load_hateful_memes(Path("data/train.jsonl"), None, EncoderConfig(), Path("cache"))
    dataset.splits["train"].features["image"].shape  # (8500, 2048)

Rows are keyed on `img`; everything a user can get wrong raises InputError with one line that names the remedy.
"""

import hashlib
import json
import os
import posixpath
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from mmfusion.dataset import Dataset, Split
from mmfusion.distributed import Processes, current_processes
from mmfusion.encoders.cache import FeatureCache, text_digest
from mmfusion.encoders.extract import encode_images, encode_texts
from mmfusion.encoders.frozen import (
    EncoderConfig,
    find_image_encoder,
    find_text_encoder,
    image_identity,
    text_identity,
    token_identity,
)
from mmfusion.encoders.images import digest_images
from mmfusion.encoders.precomputed import PrecomputedFeatures
from mmfusion.encoders.weights import EncoderSource
from mmfusion.errors import InputError, printable
from mmfusion.files import ANNOTATION_BYTES, read_regular_file
from mmfusion.sequences import Sequences

# both releases, in the order in which splits are reported
SPLIT_NAMES = ("train", "dev", "dev_seen", "dev_unseen", "test", "test_seen", "test_unseen")
SELECTION_NAMES = ("dev_seen", "dev", "dev_unseen")
KAGGLE_HANDLE = "parthplc/facebook-hateful-meme-dataset/versions/1"  # unpinned, it asks the network even when cached
HOLDOUT_SHARE = 0.15
LISTED = 100  # bad files that an error message names; it counts them all


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


MemesBySplit = dict[str, list[Meme]]


@dataclass(frozen=True)
class _Images:
    """What is known of the image files: path of each img, content digest of each good path, reason of each bad img."""

    paths: dict[str, Path]
    digests: dict[str, str]
    bad: dict[str, str]


# a little over 60 lines: the loader's steps in their order, each a call
def load_hateful_memes(
    jsonl: Path,
    img_dir: Path | None,
    encoders: EncoderConfig,
    cache_dir: Path,
    *,
    bad_images: Literal["error", "skip"] = "error",
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
    features: Mapping[str, PrecomputedFeatures] | None = None,
    tokens: bool = False,
) -> Dataset:
    """Load every split beside `jsonl` (train.jsonl, or the folder with it) as image and text vectors.

    With `tokens` as sequences: the cells or patches of an image, the words of a text; given vectors are one token each.

    `img_dir` holds the image files; None means the img folder beside the jsonl. `workers` decode images (None: by the
    number of cores). `features` (modality -> vectors by img) replace image or text, whose encoder is not looked for
    then (nor, without an image encoder, any image), or come beside them. Under torchrun every process must call it,
    after `join_processes`; all get the same dataset. Raises InputError, in all processes alike.
    """
    features = features or {}
    processes = current_processes(str(device))
    with processes.together():
        encoders = encoders.filled()
        files = find_annotations(Path(jsonl))
        read = {name: read_annotations(path) for name, path in files.items()}
        rows: MemesBySplit = {name: memes for name, (memes, _) in read.items()}
        notes = [note for _, note in read.values() if note]
        selection = next((name for name in SELECTION_NAMES if name in rows), "holdout")
        _check_labels(rows, files, selection)
        imgs = {meme.img for memes in rows.values() for meme in memes}
        given = {modality: table.of(sorted(imgs)) for modality, table in features.items()}  # all ids are there
        paths = {} if "image" in given else image_paths(imgs, files["train"].parent, img_dir)
    images = _digest_vectors(sorted(imgs), given["image"]) if "image" in given else _digest(paths, processes)
    with processes.together():
        finders = {"image": find_image_encoder, "text": find_text_encoder}
        sources = {kind: find(encoders) for kind, find in finders.items() if kind not in features}
        caches, provenance = _open_caches(encoders, sources, Path(cache_dir), str(device), tokens)
        provenance |= {"features": {kind: table.identity for kind, table in features.items()}} if features else {}
    if "image" in caches:
        files_by_digest = {images.digests[img]: images.paths[img] for img in sorted(images.digests, reverse=True)}
        undecodable = encode_images(
            files_by_digest,
            caches["image"],
            encoders,
            sources["image"],
            processes,
            workers=workers,
            stop_at_bad=bad_images == "error",
            only_check=bad_images == "error" and bool(images.bad),
            progress=progress,
        )
        images.bad.update({img: undecodable[d] for img, d in images.digests.items() if d in undecodable})
    _refuse_or_drop(rows, images.bad, bad_images, files)
    if selection == "holdout":
        notes.append(_hold_out(rows, images.digests, files["train"]))
    _check_labels(rows, files, selection)
    if "text" in caches:
        texts = {text_digest(meme.text): meme.text for memes in rows.values() for meme in memes}
        encode_texts(texts, caches["text"], encoders, sources["text"], processes, progress=progress)
    notes += _overlap_notes(rows, images.digests)
    if images.bad:
        notes.append(f"{len(images.bad)} images could not be used; their rows are skipped (--bad-images skip)")
    provenance |= {
        "data_fingerprint": _data_fingerprint(rows, images.digests),
        "rows": {name: len(memes) for name, memes in rows.items()},
        "skipped": [{"img": img, "reason": reason} for img, reason in sorted(images.bad.items())],
    }
    splits = {name: _split(memes, images.digests, caches, features, tokens) for name, memes in rows.items()}
    return Dataset("hateful_memes", "binary", splits, selection, notes, provenance, class_names=("benign", "hateful"))


def download_hateful_memes() -> tuple[Path, Path]:
    """Fetch the Kaggle copy (or find it where kagglehub keeps it): (train.jsonl, image folder).

    Raises InputError with the remedy where it cannot be had.
    """
    remedy = "download it by hand from kaggle.com/datasets/parthplc/facebook-hateful-meme-dataset and set --jsonl"
    try:
        import kagglehub
    except ImportError as error:
        raise InputError(f"--download: needs kagglehub; pip install kagglehub, or {remedy}") from error
    try:
        folder = Path(kagglehub.dataset_download(KAGGLE_HANDLE))
    except (OSError, ValueError, kagglehub.exceptions.DataCorruptionError) as error:  # HTTP errors are OSErrors
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--download: {KAGGLE_HANDLE} cannot be fetched ({reason}); {remedy} or REAL_PATH") from error
    train = find_annotations(folder)["train"]
    return train, train.parent / "img"


def _check_labels(rows: MemesBySplit, files: dict[str, Path], selection: str) -> None:
    """What is trained and selected upon must have labels, of both kinds."""
    for name in ("train", selection):
        labels = {meme.label for meme in rows.get(name, [])}
        if not labels:
            continue
        path = files.get(name, files["train"])
        if labels == {None}:
            raise InputError(f"{path}: no row has a label; {name} needs them")
        if len(labels) == 1:
            raise InputError(f"{path}: all labels of {name} are {labels.pop()}; both 0 and 1 are needed")


def image_paths(imgs: Iterable[str], folder: Path, img_dir: Path | None) -> dict[str, Path]:
    """Where each img lies: `img_dir` stands for the first part of `img`, unless it holds a folder of that name.

    `folder` holds the jsonl. Raises InputError where there is no folder of images.
    """
    if img_dir is None:
        roots = {img.split("/")[0] for img in imgs if "/" in img}
        if roots and not any(os.path.isdir(folder / root) for root in roots):
            raise InputError(f"{folder / min(roots)}: no such image folder; set --img-dir (or REAL_PATH) to it")
        return {img: folder / img for img in imgs}
    img_dir = Path(os.path.expanduser(img_dir))
    if not os.path.isdir(img_dir):
        raise InputError(f"{img_dir}: no such image folder; set --img-dir (or REAL_PATH) to it")
    paths = {}
    for img in imgs:
        head, _, rest = img.partition("/")
        paths[img] = img_dir / (rest if rest and not os.path.isdir(img_dir / head) else img)
    return paths


def _digest(paths: dict[str, Path], processes: Processes) -> _Images:
    """Content digests of all image files, hashed in equal parts by all processes."""
    imgs = sorted(paths)
    mine = processes.share(imgs)
    digests, bad = digest_images([paths[img] for img in mine])
    images = _Images(paths, {}, {})
    for part in processes.gather(
        ({img: digests.get(paths[img]) for img in mine}, {img: bad.get(paths[img]) for img in mine})
    ):
        images.digests.update({img: digest for img, digest in part[0].items() if digest})
        images.bad.update({img: reason for img, reason in part[1].items() if reason})
    return images


def _digest_vectors(imgs: list[str], vectors: torch.Tensor) -> _Images:
    """Where the images' features were given, their content is what the features say: no file is opened."""
    digests = [hashlib.sha256(vector.numpy().tobytes()).hexdigest() for vector in vectors]
    return _Images({}, dict(zip(imgs, digests, strict=True)), {})


def _refuse_or_drop(rows: MemesBySplit, bad: dict[str, str], bad_images: str, files: dict[str, Path]) -> None:
    """With bad images: raise an InputError that counts them, or drop their rows from `rows` in place."""
    if not bad:
        return
    if bad_images == "error":
        named = ", ".join(f"{img} ({reason})" for img, reason in sorted(bad.items())[:LISTED])
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        total = len({meme.img for memes in rows.values() for meme in memes})
        raise InputError(
            f"{len(bad)} of {total} images cannot be used: {named}{more}; replace them or pass --bad-images skip"
        )
    for name in rows:
        rows[name] = [meme for meme in rows[name] if meme.img not in bad]
        if not rows[name]:
            raise InputError(f"{files[name]}: no image of this split can be used, nothing is left; check --img-dir")


def _open_caches(
    config: EncoderConfig, sources: dict[str, EncoderSource], cache_dir: Path, device: str, tokens: bool
) -> tuple[dict[str, FeatureCache], dict[str, object]]:
    """The caches of the encoders, and what is to be said of the encoders in a run's config.json."""
    identify = {"image": image_identity, "text": text_identity}
    identities = {kind: identify[kind](config, source, device) for kind, source in sources.items()}
    if tokens:
        identities = {kind: token_identity(identity) for kind, identity in identities.items()}
    caches = {kind: FeatureCache(cache_dir, kind, identity) for kind, identity in identities.items()}
    encoders = {kind: {"name": sources[kind].name, **identity} for kind, identity in identities.items()}
    return caches, {"encoders": encoders, "encoder_config": asdict(config)}


def _hold_out(rows: MemesBySplit, digests: dict[str, str], train: Path) -> str:
    """Move a seeded 15 % of train to a split `holdout`, in place; returns the note that goes with it.

    Memes that share an image or a text stay on one side.
    """
    memes = rows["train"]
    groups = _groups(memes, digests)
    random.Random(0).shuffle(groups)
    room = round(HOLDOUT_SHARE * len(memes))
    held: set[str] = set()
    for group in groups:
        if len(held) + len(group) <= room:
            held |= group
    kept = [meme for meme in memes if meme.img not in held]
    holdout = [meme for meme in memes if meme.img in held]
    if len({meme.label for meme in kept}) < 2 or len({meme.label for meme in holdout}) < 2:
        raise InputError(f"{train}: too few distinct memes to hold some out; put a dev.jsonl beside it")
    others = {name: split for name, split in rows.items() if name != "train"}
    rows.clear()
    rows.update({"train": kept, "holdout": holdout} | others)
    return (
        f"no dev split: {len(holdout)} of {len(memes)} rows were cut from train as `holdout`; AUROC on such a slice is "
        f"about .1 too high on this data set"
    )


def _groups(memes: list[Meme], digests: dict[str, str]) -> list[set[str]]:
    """Connected components of memes (by img) that share an image's content or a text, in a fixed order."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]  # halve the path, so that long chains stay cheap
            node = parent[node]
        return node

    for meme in memes:
        parent[root("image " + digests[meme.img])] = root("text " + meme.text.strip().lower())
    groups: dict[str, set[str]] = {}
    for meme in sorted(memes, key=lambda meme: meme.img):
        groups.setdefault(root("image " + digests[meme.img]), set()).add(meme.img)
    return list(groups.values())


def _overlap_notes(rows: MemesBySplit, digests: dict[str, str]) -> list[str]:
    """Memes (same picture, same text) that a later split shares with an earlier one."""
    notes = []
    content = {name: Counter((digests[meme.img], meme.text) for meme in memes) for name, memes in rows.items()}
    names = list(rows)
    for place, later in enumerate(names):
        for earlier in names[:place]:
            shared = sum(count for meme, count in content[later].items() if meme in content[earlier])
            if shared:
                notes.append(f"{shared} of {len(rows[later])} memes of {later} are also in {earlier}")
    return notes


def _data_fingerprint(rows: MemesBySplit, digests: dict[str, str]) -> str:
    """SHA-256 of all splits: names, rows in order, and the content of their images."""
    content = {
        name: [(meme.img, meme.label, meme.text, digests[meme.img]) for meme in memes] for name, memes in rows.items()
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _split(
    memes: list[Meme],
    digests: dict[str, str],
    caches: dict[str, FeatureCache],
    given: Mapping[str, PrecomputedFeatures],
    tokens: bool,
) -> Split:
    features: dict[str, torch.Tensor | Sequences] = {}
    for kind in dict.fromkeys(("image", "text", *given)):
        if kind in given:
            vectors = given[kind].of([meme.img for meme in memes])
            features[kind] = Sequences(list(vectors.unsqueeze(1))) if tokens else vectors
        else:
            keys = [digests[meme.img] if kind == "image" else text_digest(meme.text) for meme in memes]
            found = [caches[kind].vectors[key] for key in keys]
            features[kind] = Sequences(found) if tokens else torch.stack(found)
    labels = [meme.label for meme in memes]
    target = None if None in labels else torch.tensor(labels, dtype=torch.float32)
    return Split(features, target, [meme.img for meme in memes], {"transcript": [meme.text for meme in memes]})


# ---- annotations: the jsonl files -> checked rows; no image is opened ----------------------------------------------


def find_annotations(jsonl: Path) -> dict[str, Path]:
    """The train file that `jsonl` names (or holds, if it is a folder) and its companion splits, in reporting order.

    A link that leads nowhere counts as there: reading it says so. Raises InputError where there is no train file.
    """
    jsonl = Path(os.path.expanduser(jsonl))
    if os.path.isdir(jsonl):
        candidates = [jsonl / "train.jsonl", jsonl / "data" / "train.jsonl"]  # the Kaggle copy nests a data/ folder
    elif jsonl.name == "train.jsonl":
        candidates = [jsonl, jsonl.parent / "data" / "train.jsonl"]
    else:
        candidates = [jsonl]
    train = next((path for path in candidates if os.path.lexists(path)), None)
    if train is None:
        raise InputError(f"{candidates[0]}: no such file; set --jsonl (or REAL_PATH) to train.jsonl or its folder")
    if train.stem in SPLIT_NAMES[1:]:
        raise InputError(
            f"{train}: is the {train.stem} split; set --jsonl to train.jsonl, the others are found beside it"
        )
    companions = {name: train.parent / f"{name}.jsonl" for name in SPLIT_NAMES[1:]}
    return {"train": train} | {name: path for name, path in companions.items() if os.path.lexists(path)}


def read_annotations(path: Path) -> tuple[list[Meme], str | None]:
    """Rows of one file and, where identical rows were dropped, a note that counts them.

    Raises InputError naming the file where it is no regular one, and file and line: not UTF-8, not JSON, a key missing
    or of the wrong type, a label other than 0 or 1, an `img` that is absolute or leaves the folder, one `img` with two
    texts or labels, labels on some rows only.
    """
    content = read_regular_file(path, ANNOTATION_BYTES, "fetch the file again, or remove what stands in its place")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors write a byte order mark
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
    note = f"{printable(path.stem)}: {duplicates} duplicated rows dropped" if duplicates else None
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
