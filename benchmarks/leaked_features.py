"""CMU-MOSI's released text and video vectors were fitted on the training labels: the table that shows it.

    python -m benchmarks.leaked_features --data cmu_mosi_utterances.npz --text-encoder MODEL_FOLDER

Accuracy of a support vector machine, one modality at a time: inside the training part, cross-validated by whole videos,
and on the test part. Features that know nothing of the labels do about as well in both; a gap is a leak. The last line
is a text encoder's vectors of the transcripts, which the study uses in their place.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mmfusion.cli import run_command
from mmfusion.data.registry import DataOptions, load_datasets
from mmfusion.dataset import Dataset
from mmfusion.errors import InputError


@dataclass(frozen=True)
class Config:
    """A support vector machine inside the training part of CMU-MOSI, and on its test part."""

    data: Path | None = None
    """file of CMU-MOSI's vectors"""
    text_encoder: str | None = None
    """a Hugging Face name or a local model folder, for the transcripts; default: no such line"""
    cache_dir: Path = Path("cache")
    """where encoded transcripts are kept"""


def main(config: Config) -> None:
    """Print the table. Raises InputError."""
    if config.data is None:
        raise InputError("--data: give the file of CMU-MOSI's vectors")
    print("accuracy of SVC(C=1): inside train (5 folds of whole videos, mean +- std), on test")
    released = load_datasets(DataOptions(dataset="cmu_mosi", data=config.data))[0]
    for line in lines(released, list(released.splits["train"].features)):
        print(line, flush=True)
    if config.text_encoder is not None:
        options = DataOptions(
            dataset="cmu_mosi", data=config.data, text_encoder=config.text_encoder, cache_dir=config.cache_dir
        )
        for line in lines(load_datasets(options)[0], ["text"], " (encoded transcripts)"):
            print(line)


def lines(dataset: Dataset, modalities: list[str], said: str = "") -> Iterator[str]:
    """One for each modality; what the loader cut off train for a dev part is put back."""
    names = ["train", dataset.selection] if dataset.selection != "test" else ["train"]
    parts, test = [dataset.splits[name] for name in names], dataset.splits["test"]
    y = np.concatenate([part.target.numpy() for part in parts])
    groups = [video for part in parts for video in part.metadata["group"]]
    for modality in modalities:
        x = np.concatenate([part.features[modality].numpy() for part in parts])
        model = make_pipeline(StandardScaler(), SVC(C=1))
        inside = cross_val_score(model, x, y, groups=groups, cv=GroupKFold(5))
        on_test = model.fit(x, y).score(test.features[modality].numpy(), test.target.numpy())
        yield f"  {modality + said:30} {inside.mean():.3f} +- {inside.std(ddof=1):.3f}   {on_test:.3f}"


if __name__ == "__main__":
    sys.exit(run_command(main, Config, sys.argv[1:]))
