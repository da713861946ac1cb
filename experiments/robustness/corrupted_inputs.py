"""Pictures and texts of a run's test examples, corrupted and encoded again through the cached loader."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfusion.data.folds import tested_split
from mmfusion.distributed import Processes
from mmfusion.encoders.cache import FeatureCache
from mmfusion.encoders.extract import encode_images, encode_text_groups
from mmfusion.encoders.frozen import find_image_encoder, find_text_encoder, image_identity
from mmfusion.encoders.images import digest_images
from mmfusion.robustness.corruptions import IMAGE_CORRUPTIONS, TEXT_CORRUPTIONS
from mmfusion.runs.load import TrainedRun

Key = tuple[str, str, float, int]
"""modality, corruption, severity, draw"""


def corruptions_of(run: TrainedRun) -> dict[str, list[str]]:
    """{modality: corruptions that it can be put through}: of those whose pictures or texts are at hand."""
    possible = {"image": list(IMAGE_CORRUPTIONS)} if run.memes and "image" not in run.memes.given else {}
    texts = run.texts(run.datasets[0], tested_split(run.datasets[0]))
    return possible | {name: list(TEXT_CORRUPTIONS) for name in texts}


def encode_corrupted(run: TrainedRun, keys: Sequence[Key], device: str = "cpu") -> dict[Key, Tensor]:
    """Features (n, d) of the test examples, fold after fold, under each corruption; what is cached is not encoded anew.

    Raises InputError where a picture or an encoder is gone.
    """
    result = {}
    if pictures := [key for key in keys if key[0] == "image" and run.memes]:
        result |= _pictures(run, pictures, device)
    if texts := [key for key in keys if key not in result]:
        result |= _texts(run, texts, device)
    return result


def _pictures(run: TrainedRun, keys: Sequence[Key], device: str) -> dict[Key, Tensor]:
    ids = [key for dataset in run.datasets for key in dataset.splits[tested_split(dataset)].ids]
    paths = run.image_paths(ids)
    digests, _ = digest_images(list(paths.values()))
    encoders = run.encoders
    source = find_image_encoder(encoders)
    cache = FeatureCache(run.cache_dir, "corrupted_image", image_identity(encoders, source, device))
    what: dict[str, Key] = {}
    files: dict[str, Path] = {}
    for key in keys:
        for path in paths.values():
            digest = _digest(digests[path], key)
            what[digest], files[digest] = key, path
    encode_images(files, cache, encoders, source, Processes(device=device), change=partial(_change, what))
    return {key: torch.stack([cache.vectors[_digest(digests[paths[i]], key)] for i in ids]) for key in keys}


def _digest(content: str, key: Key) -> str:
    return hashlib.sha256(repr((content, key, "version 2")).encode()).hexdigest()


def _change(what: Mapping[str, Key], picture: Image.Image, digest: str) -> Image.Image:
    _, corruption, severity, _ = what[digest]
    # the digest holds the draw: every picture, corruption, severity and draw has random numbers of its own
    return IMAGE_CORRUPTIONS[corruption](picture, severity, np.random.default_rng(int(digest[:16], 16)))


def _texts(run: TrainedRun, keys: Sequence[Key], device: str) -> dict[Key, Tensor]:
    masked = any(corruption == "word mask" for _, corruption, _, _ in keys)
    mask = _mask_token(find_text_encoder(run.encoders).path) if masked else ""
    corrupted: dict[Key, list[str]] = {}
    splits = [(run.texts(c, tested_split(c)), c.splits[tested_split(c)].ids) for c in run.datasets]
    for key in keys:
        modality, corruption, severity, _ = key
        corrupted[key] = []
        for texts, ids in splits:
            for example, text in zip(ids, texts[modality], strict=True):
                # the example's own, so that equal texts do not share their errors
                rng = np.random.default_rng(int(_digest(f"{example} {text}", key)[:16], 16))
                corrupted[key].append(TEXT_CORRUPTIONS[corruption](text, severity, rng, mask))
    processes = Processes(device=device)
    return encode_text_groups(corrupted, run.cache_dir, run.encoders, processes, kind="corrupted_text")[0]


def _mask_token(folder: Path) -> str:
    """The tokenizer's mask token; of a tokenizer without one, its unknown token, else an underscore."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.mask_token or tokenizer.unk_token or "_"
