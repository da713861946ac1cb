"""Corrupted inputs of test examples: pictures and texts encoded anew through the cached loader, steps pooled."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfusion.data.folds import tested_split
from mmfusion.data.pooling import pool_over_time
from mmfusion.data.registry import DataOptions, load_datasets
from mmfusion.dataset import Dataset
from mmfusion.distributed import Processes
from mmfusion.encoders.cache import FeatureCache
from mmfusion.encoders.extract import encode_images, encode_text_groups
from mmfusion.encoders.frozen import find_image_encoder, find_text_encoder, image_identity
from mmfusion.encoders.images import digest_images
from mmfusion.errors import InputError
from mmfusion.robustness.corruptions import (
    IMAGE_CORRUPTIONS,
    SEQUENCE_CORRUPTIONS,
    TEXT_CORRUPTIONS,
    corrupt_sequences,
)
from mmfusion.runs.load import TrainedRun
from mmfusion.runs.settings import config_from
from mmfusion.sequences import Sequences

Key = tuple[str, str, float, int]
"""modality, corruption, severity, draw"""
STEPPED = ("cmu_mosi", "pom", "mmmo")  # their vectors are pooled over the steps of a file


def corruptions_of(run: TrainedRun) -> dict[str, list[str]]:
    """{modality: corruptions that it can be put through}: of those whose pictures, texts or steps are at hand."""
    possible = {"image": list(IMAGE_CORRUPTIONS)} if run.memes and "image" not in run.memes.given else {}
    texts = run.texts(run.datasets[0], tested_split(run.datasets[0]))
    possible |= {name: list(TEXT_CORRUPTIONS) for name in texts}
    return possible | {name: list(SEQUENCE_CORRUPTIONS) for name in stepped(run)[1] if name not in possible}


def encode_corrupted(run: TrainedRun, keys: Sequence[Key], device: str = "cpu") -> dict[Key, Tensor]:
    """Features (n, d) of the test examples, fold after fold, under each corruption; what is cached is not encoded anew.

    Raises InputError where a picture or an encoder is gone.
    """
    result = {}
    if pictures := [key for key in keys if key[0] == "image" and run.memes]:
        result |= _pictures(run, pictures, device)
    if steps := [key for key in keys if key not in result and key[1] in SEQUENCE_CORRUPTIONS]:
        result |= _steps(run, steps)
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


def stepped(run: TrainedRun) -> tuple[list[Dataset], list[str]]:
    """The run's datasets with sequences for vectors, and the modalities, but text, whose vectors are pooled from them.

    Nothing where the file holds no steps, or the pooled steps are not what the run was trained on.
    """
    if run.settings.get("dataset") not in STEPPED:
        return [], []
    options = config_from(DataOptions, run.settings, run.folder / "run.json")
    try:
        datasets = load_datasets(replace(options, tokens=True, text_encoder=None))
    except InputError:  # a file of vectors
        return [], []
    names = [name for name in run.data.input_dims if name != "text" and name in datasets[0].input_dims]
    return datasets, [
        name for name in names if all(_is_pooled(*two, name) for two in zip(datasets, run.datasets, strict=True))
    ]


def _is_pooled(steps: Dataset, vectors: Dataset, name: str) -> bool:
    x, y = (one.splits[tested_split(vectors)] for one in (steps, vectors))
    if x.ids != y.ids or x.features[name].shape[1] < 2:
        return False
    width = y.features[name].shape[1]
    return width % x.features[name].width == 0 and torch.allclose(
        _pool(x.features[name], width), y.features[name], rtol=1e-3, atol=1e-4
    )


def _pool(sequences: Sequences, width: int) -> Tensor:
    """(N, width): mean, or mean and standard deviation, of all steps, also of those that were set to zero."""
    pooling = "mean" if width == sequences.width else "mean_std"
    vectors = [
        pool_over_time(x.numpy()[None], np.ones((1, len(x)), bool), pooling).features
        if len(x)
        else np.zeros((1, width))
        for x in sequences
    ]
    return torch.from_numpy(np.concatenate(vectors).astype(np.float32))


def _steps(run: TrainedRun, keys: Sequence[Key]) -> dict[Key, Tensor]:
    result: dict[Key, list[Tensor]] = {key: [] for key in keys}
    for steps, vectors in zip(stepped(run)[0], run.datasets, strict=True):
        for key, found in result.items():
            modality, corruption, severity, _ = key
            test = steps.splits[tested_split(vectors)]
            neutral = steps.splits["train"].features[modality].pooled().mean(0)
            # of the fold's examples and the draw; severities of one draw differ too, as those of pictures do
            seed = int(_digest(" ".join(test.ids), key)[:16], 16)
            changed = corrupt_sequences(test.features[modality], corruption, severity, neutral, seed)
            found.append(_pool(changed, vectors.input_dims[modality]))
    return {key: torch.cat(found) for key, found in result.items()}


def _mask_token(folder: Path) -> str:
    """The tokenizer's mask token; of a tokenizer without one, its unknown token, else an underscore."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.mask_token or tokenizer.unk_token or "_"
