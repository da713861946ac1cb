"""MUStARD (Castro et al., 2019): is an utterance of a television show sarcastic? One dataset per released fold.

    datasets = load_mustard(Path("sarcasm_data.json"), EncoderConfig(), Path("cache"))
    datasets[0].splits["train"].features["context"].shape  # (441, 768)

Utterance and context are texts, encoded here and cached; `audio_features.p` and `resnet_pool5.hdf5`, where given, are
pooled over time; with `tokens` all of them are sequences: words, steps, frames. Examples are keyed as released
("1_60").
"""

import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmfusion.data.mustard_annotations import (
    FoldPlaces,
    Utterance,
    find_annotations,
    find_folds,
    read_annotations,
    read_folds,
)
from mmfusion.data.pickles import as_numbers, file_identity, load_pickle
from mmfusion.data.pooling import pool_over_time, pooling_notes
from mmfusion.data.steps import keep_steps
from mmfusion.dataset import Dataset, Split, hold_out, take
from mmfusion.distributed import current_processes
from mmfusion.encoders.extract import encode_text_groups
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.errors import InputError
from mmfusion.files import DATA_BYTES, check_regular_file
from mmfusion.sequences import Sequences

DEV_SHARE = 0.2
TEST_SHOW = "FRIENDS"  # of the speaker-independent setting (Castro et al., their data_loader.py)
AUDIO_WIDTH = 283  # MFCC 13 + 13, mel bands 128 + 128, spectral centroid

Protocol = Literal["speaker_dependent", "speaker_independent"]


# ten parameters: the released files, three of them optional, what encodes the texts, and whether it keeps their words
def load_mustard(
    annotations: Path,
    encoders: EncoderConfig,
    cache_dir: Path,
    *,
    folds: Path | None = None,
    audio: Path | None = None,
    visual: Path | None = None,
    protocol: Protocol = "speaker_dependent",
    device: str = "cpu",
    progress: bool = True,
    tokens: bool = False,
) -> list[Dataset]:
    """One dataset for each of the five folds, or the one of the speaker-independent setting; splits train, dev, test.

    Modalities utterance and context (N, d), with `audio` also audio (N, 2 * 283: mean and standard deviation), with
    `visual` also visual (N, 2048: mean), or with `tokens` N sequences of each; target sarcasm (N,). `annotations` is
    the json or its folder; `folds` is split_indices.p or a JSON list of {"train": [ids], "test": [ids]}, None: found
    beside the annotations. dev is 20 % of a fold's train, of both labels alike or, speaker-independent, by whole
    speakers. Under torchrun every process must call it. Raises InputError.
    """
    processes = current_processes(str(device))
    with processes.together():
        path = find_annotations(Path(annotations))
        if protocol not in ("speaker_dependent", "speaker_independent"):
            raise InputError(
                f"{path}: protocol {protocol!r} does not exist; choose speaker_dependent or speaker_independent"
            )
        rows = read_annotations(path)
        provenance: dict[str, object] = {"annotations": file_identity(path)}
        if protocol == "speaker_dependent":
            fold_path = find_folds(path, folds)
            cuts = read_folds(fold_path, [row.key for row in rows])
            provenance["folds"] = file_identity(fold_path)
        else:
            cuts = [_by_show(rows, path)]
        extra, notes = _read_extra(rows, audio, visual, provenance, tokens)
    texts = {"utterance": [row.utterance for row in rows], "context": [row.context for row in rows]}
    features, encoded_by = encode_text_groups(texts, cache_dir, encoders, processes, progress=progress, tokens=tokens)
    everything = _gather(rows, features | extra)
    return [
        _fold_dataset(everything, cut, number, protocol, provenance | encoded_by, notes, path)
        for number, cut in enumerate(cuts, start=1)
    ]


def _gather(rows: list[Utterance], features: dict[str, Tensor | Sequences]) -> Split:
    metadata = {
        "transcript": [row.utterance for row in rows],
        "speaker": [row.speaker for row in rows],
        "show": [row.show for row in rows],
        "context": [row.context for row in rows],
    }
    target = torch.tensor([float(row.sarcasm) for row in rows])
    return Split(features, target, [row.key for row in rows], metadata)


def _by_show(rows: list[Utterance], path: Path) -> FoldPlaces:
    """All of one show is the test split: no speaker of it is heard in training."""
    test = [place for place, row in enumerate(rows) if row.show == TEST_SHOW]
    if not test or len(test) == len(rows):
        raise InputError(f"{path}: {len(test)} of {len(rows)} rows are of the show {TEST_SHOW}; some must be, not all")
    return FoldPlaces([place for place, row in enumerate(rows) if row.show != TEST_SHOW], test)


def _fold_dataset(
    everything: Split,
    cut: FoldPlaces,
    number: int,
    protocol: Protocol,
    provenance: dict[str, object],
    notes: list[str],
    path: Path,
) -> Dataset:
    """One fold, with its dev split cut from its training part."""
    training, test = take(everything, cut.train), take(everything, cut.test)
    notes = list(notes)
    where = f"{path}: {'fold ' + str(number) if protocol == 'speaker_dependent' else protocol}"
    if protocol == "speaker_dependent":
        name = f"mustard_fold_{number}"
        if torch.bincount(training.target.long(), minlength=2).min() < 2 or len(training) < 10:
            raise InputError(f"{where}: has too few training examples of both labels to cut a dev split from")
        train, dev = hold_out(training, DEV_SHARE, stratify=True)
        notes.append(f"no dev split: {len(dev)} of {len(training)} training examples were cut off, both labels alike")
        notes.append("folds share training examples: the spread over folds understates the spread over data sets")
        notes.append("speakers of test are also in train")
    else:
        name = "mustard_speaker_independent"
        # the PERSON of one show is not that of another
        columns = zip(training.metadata["show"], training.metadata["speaker"], strict=True)
        speakers = [f"{show} {speaker}" for show, speaker in columns]
        if len(set(speakers)) < 2:
            raise InputError(f"{where}: train has one speaker only; no dev split can be cut from it")
        train, dev = hold_out(training, DEV_SHARE, speakers)
        notes.append(f"no dev split: {len(dev)} of {len(training)} training examples (whole speakers) were cut off")
    for split, part in {"train": train, "dev": dev, "test": test}.items():
        if len(part.target.unique()) < 2:
            raise InputError(f"{where}: all labels of {split} are {part.target[0]:g}; both are needed")
    known = set(training.metadata["transcript"])
    again = sum(text in known for text in test.metadata["transcript"])
    if again:
        notes.append(f"{again} of {len(test)} test utterances occur with the same words in train or dev")
    provenance = provenance | {"protocol": protocol, "fold": number, "rows": [len(train), len(dev), len(test)]}
    splits, names = {"train": train, "dev": dev, "test": test}, ("not sarcastic", "sarcastic")
    return Dataset(name, "binary", splits, "dev", notes, provenance, class_names=names)


def _read_extra(
    rows: list[Utterance], audio: Path | None, visual: Path | None, provenance: dict[str, object], tokens: bool
) -> tuple[dict[str, Tensor | Sequences], list[str]]:
    """The modalities that were given, pooled or in steps, and notes on them; `provenance` gains their files."""
    features: dict[str, Tensor | Sequences] = {}
    notes = []
    keys = [row.key for row in rows]
    for modality, path in {"audio": audio, "visual": visual}.items():
        if path is None:
            continue
        path = Path(os.path.expanduser(path))
        read = _read_audio if modality == "audio" else _read_visual
        arrays = read(path, keys)
        if tokens:
            kept = keep_steps(arrays)
            features[modality] = kept.features
        else:
            kept = pool_over_time(arrays, None, "mean_std" if modality == "audio" else "mean")
            features[modality] = torch.from_numpy(kept.features)
        notes += pooling_notes(modality, [kept])
        provenance[modality] = file_identity(path)
    return features, notes


def _read_audio(path: Path, keys: list[str]) -> list[np.ndarray]:
    """(T_i, d) of each key. Released are (283, T_i): time is the dimension that differs between examples."""
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}; expected a dictionary from ids to arrays")
    _check_ids(keys, content, path)
    arrays = [as_numbers(content[key], f"{path}: {key}") for key in keys]
    arrays = [array[:, None] if array.ndim == 1 else array for array in arrays]  # one step, as in (283, 1)
    if any(array.ndim != 2 or array.size == 0 for array in arrays):
        key, array = next((k, a) for k, a in zip(keys, arrays, strict=True) if a.ndim != 2 or a.size == 0)
        raise InputError(f"{path}: {key} has shape {array.shape}; expected ({AUDIO_WIDTH}, T)")
    widths = [{array.shape[axis] for array in arrays} for axis in (0, 1)]
    if len(widths[1]) == 1 and (len(widths[0]) > 1 or (AUDIO_WIDTH in widths[1] and AUDIO_WIDTH not in widths[0])):
        return arrays
    if len(widths[0]) > 1:
        raise InputError(f"{path}: its arrays share neither dimension; expected ({AUDIO_WIDTH}, T) of each id")
    return [array.T for array in arrays]


def _read_visual(path: Path, keys: list[str]) -> list[np.ndarray]:
    """(T_i, 2048) of each key: one row per frame."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: reading it needs h5py; pip install h5py, or leave the modality out") from error
    check_regular_file(path, DATA_BYTES, "extract the frames' features first, or leave the modality out")
    frames = []
    try:
        with h5py.File(path, "r") as file:
            _check_ids(keys, file, path)
            for key in keys:
                array = as_numbers(file[key][()], f"{path}: {key}")
                if array.ndim != 2 or array.size == 0 or (frames and array.shape[1] != frames[0].shape[1]):
                    width = frames[0].shape[1] if frames else "2048"
                    raise InputError(f"{path}: {key} has shape {array.shape}; expected (T, {width})")
                frames.append(array)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: cannot be read as HDF5 ({reason}); fetch it again") from error
    return frames


def _check_ids(keys: Sequence[str], content: Container[str], path: Path) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise InputError(f"{path}: lacks {len(missing)} of {len(keys)} ids, {missing[0]} among them; fetch it again")
