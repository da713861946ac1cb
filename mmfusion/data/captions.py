"""Images with several captions each -> cached frozen features: Flickr8k, Flickr30k and COCO, in their own splits.

    dataset = load_captions(Path("flickr8k"), None, EncoderConfig(), Path("cache"))
    dataset.splits["test"].features["text"].shape  # (5000, 768): five rows of each of 1000 images

A row is one image with one of its captions, `IMAGE.jpg#0`. Its columns `group` and `image` of the metadata name the
image: cuts and statistics keep the rows of an image together, and retrieval counts each image once and all of its
captions as right (`Split.shared`, `mmfusion.metrics.shared_retrieval`). An image is encoded once.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.data.caption_annotations import CaptionAnnotations, CaptionedImage, read_captions
from mmfusion.data.pairs import UNLABELLED
from mmfusion.dataset import Dataset, Split
from mmfusion.distributed import Processes, current_processes
from mmfusion.encoders.cache import FeatureCache
from mmfusion.encoders.extract import encode_images, encode_text_groups
from mmfusion.encoders.frozen import EncoderConfig, find_image_encoder, image_identity
from mmfusion.encoders.images import digest_images
from mmfusion.errors import InputError, printable

CAPTIONS = 5
"""of an image that is tested on, the first in the file: as published, though some images of COCO have six or seven"""
SHARE = 1 / 8  # of the images, for dev and for test each, where no file has splits: Flickr8k's own 1000 of 8000
COCO_DEV = 5000  # images cut from train, as many as val2017 has; a tenth of it at most
IMAGE_FOLDERS = (
    "",
    "images",
    "Images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "flickr30k-images",
    "flickr30k_images",
)
"""where images are looked for, beside the captions' file and one folder up (Flickr8k's release has the misspelt one)"""
LOOKED_AT = 20  # images of each folder by which it is found
LISTED = 100  # bad files that a message names; it counts them all
BOUNDS = {"captions_per_image": (1, 1000), "split_seed": (0, 2**31 - 1)}
"""of the flags"""


def load_captions(
    path: Path,
    img_dir: Path | None,
    encoders: EncoderConfig,
    cache_dir: Path,
    *,
    captions_per_image: int = CAPTIONS,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Dataset:
    """Train, dev and test as rows of `image` (N, d) and `text` (N, d), without labels.

    Args:
        path: folder or file of the captions, as `mmfusion.data.caption_annotations.read_captions` takes.
        img_dir: folder of the images; None: looked for beside the captions.
        captions_per_image: the most captions of an image of train that become rows, in the file's order; with one, no
            batch holds two captions of an image, whose contrast would call one of them wrong.
        seed: of the cuts that no file gives.

    Under torchrun every process must call it. Raises InputError: annotations as `read_captions`, images that are
    missing or cannot be read, an encoder that cannot be had.
    """
    if captions_per_image < 1:
        raise ValueError(f"captions_per_image {captions_per_image}: at least 1")
    processes = current_processes(str(device))
    with processes.together():
        encoders = encoders.filled()
        annotations = _with_splits(read_captions(path), seed)
        files = image_files(annotations, img_dir)
    pictures, digests, picture_record = _encode_pictures(files, encoders, cache_dir, processes, progress)
    parts: dict[str, list[tuple[CaptionedImage, int]]] = {}
    for part in ("train", "dev", "test"):
        most = captions_per_image if part == "train" else CAPTIONS
        images = [image for image in annotations.images if image.split == part]
        parts[part] = [(image, k) for image in images for k in range(min(most, len(image.captions)))]
    texts = {part: [image.captions[k] for image, k in rows] for part, rows in parts.items()}
    encoded, record = encode_text_groups(texts, cache_dir, encoders, processes, progress=progress)
    record["encoders"] = {**picture_record, **record["encoders"]}
    place = {name: row for row, name in enumerate(files)}
    splits = {}
    for part, rows in parts.items():
        names = [image.name for image, _ in rows]
        features = {"image": pictures[[place[name] for name in names]], "text": encoded[part]}
        ids = [f"{image.name}#{k}" for image, k in rows]
        columns = {"transcript": texts[part], "group": names, "image": names}
        splits[part] = Split(features, torch.zeros(len(rows)), ids, columns)
    counts = ", ".join(f"{len(set(s.metadata['image']))} of {part}" for part, s in splits.items())
    notes = [UNLABELLED, f"images: {counts}; a row is an image with one of its captions", *annotations.notes]
    provenance = {
        "data_fingerprint": _fingerprint(parts, digests),
        "rows": {part: len(rows) for part, rows in parts.items()},
        "captions_per_image": captions_per_image,
        **record,
    }
    return Dataset(annotations.name, "regression", splits, "dev", notes, provenance, labelled=False)


def image_files(annotations: CaptionAnnotations, img_dir: Path | None) -> dict[str, Path]:
    """Where each image lies, by name: in `img_dir` or beside the captions, with or without its subfolder.

    A folder is chosen by the first images that are looked for in it; nothing is opened. Raises InputError where none of
    them is anywhere.
    """
    beside = annotations.path.absolute().parent
    roots = (
        [img_dir.expanduser()] if img_dir else [at / name for at in (beside, beside.parent) for name in IMAGE_FOLDERS]
    )
    if img_dir is not None and not roots[0].is_dir():
        raise InputError(f"--img-dir {img_dir}: no such folder; give the one of the images")
    by_folder: dict[str, list[str]] = {}
    for image in annotations.images:
        by_folder.setdefault(image.folder, []).append(image.name)
    found: dict[str, Path] = {}
    for folder, names in by_folder.items():
        places = [root / below for root in roots for below in dict.fromkeys((folder, ""))]
        present = [sum(os.path.lexists(place / name) for name in names[:LOOKED_AT]) for place in places]
        if not max(present):
            where = img_dir or beside
            raise InputError(
                f"{where}: none of {printable(folder + '/' + names[0] if folder else names[0])[:120]} and the images "
                "after it is there; give their folder with --img-dir"
            )
        found |= {name: places[int(np.argmax(present))] / name for name in names}
    return {image.name: found[image.name] for image in annotations.images}


def _with_splits(annotations: CaptionAnnotations, seed: int) -> CaptionAnnotations:
    """The same with a split of every image: what the files leave open is cut at random, whole images."""
    images, notes = list(annotations.images), list(annotations.notes)
    rng = np.random.default_rng(seed)
    have = Counter(image.split for image in images)
    if None in have:  # Flickr's captions alone
        size = max(1, round(SHARE * len(images)))
        cut = {"dev": size, "test": size}
        pool = list(range(len(images)))
        notes.append(
            f"no split files: {size} images each for dev and test were cut at random (seed {seed}); put the released "
            "Flickr_8k.*Images.txt beside the captions for scores that compare with published ones"
        )
    elif not have["dev"]:
        pool = [row for row, image in enumerate(images) if image.split == "train"]
        cut = {"dev": max(1, min(COCO_DEV, len(pool) // 10))}
        notes.append(f"no dev split: {cut['dev']} images were cut from train at random (seed {seed})")
    else:
        return annotations
    if len(pool) <= sum(cut.values()):
        raise InputError(f"{annotations.path}: has {len(pool)} images to cut, too few; give the whole file")
    order = iter(rng.permutation(pool).tolist())
    chosen = {next(order): part for part, size in cut.items() for _ in range(size)}
    images = [replace(one, split=chosen.get(row, one.split or "train")) for row, one in enumerate(images)]
    return replace(annotations, images=images, notes=notes)


def _encode_pictures(
    files: dict[str, Path], encoders: EncoderConfig, cache_dir: Path, processes: Processes, progress: bool
) -> tuple[Tensor, dict[str, str], dict[str, object]]:
    """Vectors (I, d) of all images in the order of `files`, digests of their content, and what to record."""
    with processes.together():
        source = find_image_encoder(encoders)
        identity = image_identity(encoders, source, processes.device)
        cache = FeatureCache(Path(cache_dir), "image", identity)
        by_path, bad = digest_images(list(files.values()))
        _refuse({name: bad[path] for name, path in files.items() if path in bad}, len(files))
    digests = {name: by_path[path] for name, path in files.items()}
    by_digest = {digests[name]: path for name, path in files.items()}
    undecodable = encode_images(by_digest, cache, encoders, source, processes, progress=progress)
    with processes.together():
        _refuse({n: undecodable[digest] for n, digest in digests.items() if digest in undecodable}, len(files))
    vectors = torch.stack([cache.vectors[digest] for digest in digests.values()])
    return vectors, digests, {"image": {"name": source.name, **identity}}


def _refuse(bad: dict[str, str], count: int) -> None:
    if bad:
        named = ", ".join(f"{printable(name)} ({reason})" for name, reason in sorted(bad.items())[:LISTED])
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise InputError(f"{len(bad)} of {count} images cannot be used: {named}{more}; fetch them again, or --img-dir")


def _fingerprint(parts: dict[str, list[tuple[CaptionedImage, int]]], digests: dict[str, str]) -> str:
    """SHA-256 of all rows in order, and of the content of their images."""
    rows = {p: [(digests[one.name], one.name, one.captions[k]) for one, k in of] for p, of in parts.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
