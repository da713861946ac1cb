"""CMU-MOSI without the vectors that were fitted on its labels: transcripts through a text encoder, and new folds.

    dataset = encode_transcripts(load_cmu_mosi(path), EncoderConfig(text_encoder="models/minilm"), Path("cache"))
    folds = cut_by_video(dataset, 5)

The released .npz of utterance vectors (Poria et al., 2017) holds text and video vectors of networks that were trained
on the labels of train: a part cut from train says nothing about them. Its audio (openSMILE) and its transcripts are as
they were recorded.
"""

from dataclasses import replace
from pathlib import Path

import torch

from mmfusion.data.array_cuts import cut_dev, cut_folds
from mmfusion.dataset import Dataset, Split, take
from mmfusion.distributed import current_processes
from mmfusion.encoders.extract import encode_text_groups
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.errors import InputError
from mmfusion.sequences import concatenate

FITTED_ON_LABELS = ("text", "video")  # of the .npz


def encode_transcripts(
    dataset: Dataset,
    encoders: EncoderConfig,
    cache_dir: Path,
    device: str = "cpu",
    *,
    progress: bool = True,
    tokens: bool = False,
) -> Dataset:
    """The dataset with `text` (N, d) made of the transcripts by a frozen encoder; of an .npz, audio alone stays beside.

    With `tokens`, text is the words of the transcripts, N sequences (T_i, d).

    Under torchrun every process must call it. Raises InputError: no transcripts, or an encoder that cannot be read.
    """
    processes = current_processes(str(device))
    source_file = str(dataset.provenance.get("file", dataset.name))
    with processes.together():
        if any("transcript" not in split.metadata for split in dataset.splits.values()):
            raise InputError(f"--text-encoder: {source_file} holds no transcripts to encode; leave the flag out")
    transcripts = {name: split.metadata["transcript"] for name, split in dataset.splits.items()}
    texts, encoded_by = encode_text_groups(
        transcripts, cache_dir, encoders, processes, progress=progress, tokens=tokens
    )

    leaked = FITTED_ON_LABELS if source_file.endswith(".npz") else ("text",)
    splits = {}
    for name, split in dataset.splits.items():
        kept = {modality: x for modality, x in split.features.items() if modality not in leaked}
        splits[name] = replace(split, features={"text": texts[name], **kept})
    dropped = [m for m in leaked if m != "text" and m in dataset.input_dims]
    notes = [note for note in dataset.notes if "fitted on the training utterances" not in note]
    notes.append("text: transcripts through the text encoder, not the vectors of the file")
    notes += [f"{m}: left out, its released vectors were fitted on labels of train" for m in dropped]
    return replace(dataset, splits=splits, notes=notes, provenance=dataset.provenance | encoded_by)


def cut_by_video(dataset: Dataset, folds: int, seed: int = 0) -> list[Dataset]:
    """One dataset for each of K folds over all utterances, each tested once; whole videos together, if ids name them.

    Raises InputError where there are fewer videos than folds.
    """
    parts = list(dataset.splits.values())
    known = [column for column in parts[0].metadata if all(column in part.metadata for part in parts)]
    everything = Split(
        {name: concatenate([part.features[name] for part in parts]) for name in parts[0].features},
        torch.cat([part.target for part in parts]),
        [one for part in parts for one in part.ids],
        {column: [x for part in parts for x in part.metadata[column]] for column in known},
    )
    is_classes = dataset.task == "binary"
    cuts, notes = cut_folds(everything, folds, is_classes, seed, dataset.name, dataset.class_names)
    said = [note for note in dataset.notes if not note.startswith("no dev split")]
    found = []
    for rest, test in cuts:
        train, dev, note = cut_dev(take(everything, rest), is_classes, seed, dataset.name, dataset.class_names)
        splits = {"train": train, "dev": dev, "test": take(everything, test)}
        rows = {"rows": {name: len(split) for name, split in splits.items()}}
        provenance = dataset.provenance | rows | {"folds": folds, "split_seed": seed}
        found.append(replace(dataset, splits=splits, notes=[*said, *notes, note], provenance=provenance))
    return found
