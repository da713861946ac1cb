"""Data contract: named splits of features, targets and ids, and folds over a common pool."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit
from torch import Tensor

from mmfusion.sequences import Sequences

SHARED = ("image",)
"""modalities of which a column of the metadata may name the item that a row has"""

Task = Literal["binary", "multiclass", "multilabel", "regression"]


@dataclass(frozen=True)
class Split:
    """One named part of a dataset. N examples; modality m has width d_m."""

    features: dict[str, Tensor | Sequences]
    """float32 (N, d_m) per modality, or N sequences (T_i, d_m), in one fixed order of modalities; not standardised"""
    target: Tensor | None
    """float32; binary (N,) of 0 and 1, multiclass (N,) of class numbers 0 .. C - 1, multilabel (N, O) of 0 and 1,
    regression (N,) or (N, O); None where the split is unlabelled"""
    ids: list[str]
    """N names, unique within the split, that lead back to the source (for memes: the `img` key)"""
    metadata: dict[str, list[str]] = field(default_factory=dict)
    """what else is known of each example, N strings per column: transcript, speaker, group"""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shared(self) -> dict[str, list[str]]:
        """{modality: name of each row's item (N,)} where several rows have one item in common: an image's captions."""
        return {name: self.metadata[name] for name in SHARED if name in self.metadata and name in self.features}


@dataclass(frozen=True)
class Dataset:
    """Named splits in the order in which they are reported, `train` first."""

    name: str
    task: Task
    splits: dict[str, Split]
    selection: str
    """the split that models are selected on; its scores are reported as selected upon"""
    notes: list[str] = field(default_factory=list)
    """what the reader of a score must know: rows dropped, splits that overlap, a validation slice cut from train"""
    provenance: dict[str, object] = field(default_factory=dict)
    """JSON-able: encoders with their weights, preprocessing, fingerprint of the rows, skipped rows"""
    label_range: tuple[float, float] | None = None
    """closed range of a regression target, where the dataset defines one: (-3, 3) for sentiment"""
    target_names: list[str] = field(default_factory=list)
    """names of the O labels of a multilabel target, or of the O values of a regression's; empty for one output"""
    class_names: tuple[str, ...] = ("class 0", "class 1")
    """what the class numbers of a binary or multiclass target mean, in words: one name per class"""
    labelled: bool = True
    """False where the target stands in for labels that the file does not hold: nothing can be learned from it"""

    @property
    def input_dims(self) -> dict[str, int]:
        """Width d_m of each modality."""
        return {name: x.shape[-1] for name, x in self.splits["train"].features.items()}

    @property
    def output_dim(self) -> int:
        """Number of outputs O: the classes of a multiclass target, else the columns of the target."""
        if self.task == "multiclass":
            return len(self.class_names)
        target = self.splits["train"].target
        return 1 if target.ndim == 1 else target.shape[1]

    @property
    def description(self) -> dict[str, object]:
        """What a run records of its data, JSON-able."""
        return {
            "name": self.name,
            "selection": self.selection,
            "examples": {name: len(split) for name, split in self.splits.items()},
            "notes": self.notes,
            **self.provenance,
        }


class Fold(NamedTuple):
    """Which examples a model trains on, is selected on and is tested on; rows of a common pool, long (n,) each."""

    train: Tensor
    dev: Tensor
    test: Tensor | None = None


def take(split: Split, rows: Sequence[int] | np.ndarray) -> Split:
    """The examples `rows` of a split, in that order."""
    rows = [int(row) for row in rows]
    index = torch.tensor(rows, dtype=torch.long)
    return Split(
        {name: x[index] for name, x in split.features.items()},
        None if split.target is None else split.target[index],
        [split.ids[row] for row in rows],
        {column: [values[row] for row in rows] for column, values in split.metadata.items()},
    )


def pooled(split: Split) -> Split:
    """The same examples with one vector each: of sequences, the mean over their tokens."""
    features = {name: x.pooled() if isinstance(x, Sequences) else x for name, x in split.features.items()}
    return replace(split, features=features)


def hold_out(
    split: Split, share: float, groups: Sequence[str] | None = None, stratify: bool = False, seed: int = 0
) -> tuple[Split, Split]:
    """Cut `share` of the examples off at random: (the rest, held out), both in the split's own order.

    With `groups` (N,), whole groups are held out, `share` of their number; with `stratify`, each class alike.
    """
    if groups is not None:
        rule = GroupShuffleSplit(1, test_size=share, random_state=seed)
    else:
        rule = (StratifiedShuffleSplit if stratify else ShuffleSplit)(1, test_size=share, random_state=seed)
    target = split.target.numpy() if stratify else None
    rest, held_out = next(rule.split(np.zeros(len(split)), target, groups))
    return take(split, np.sort(rest)), take(split, np.sort(held_out))
