"""Pooled examples and folds: which rows a model trains on, is selected on and is tested on.

A dataset with fixed splits is one fold; MUStARD's five released folds are five; `cross_validated` cuts the pool anew,
as often as asked for. No example is tested in two folds of one repeat.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from mmfusion.dataset import Dataset, Fold, Split, Task, take
from mmfusion.errors import InputError
from mmfusion.metrics.verdicts import Cut
from mmfusion.sequences import Sequences, concatenate


@dataclass(frozen=True)
class FoldedDataset:
    """All examples of a dataset, N of them, and its folds."""

    name: str
    task: Task
    pool: Split
    folds: list[Fold]
    notes: list[str]
    provenance: dict[str, object]
    label_range: tuple[float, float] | None = None
    class_names: tuple[str, ...] = Dataset.class_names
    labelled: bool = True
    """as `Dataset.labelled`"""
    repeats: int = 1
    """of the cross-validation; folds are repeat-major"""

    @property
    def cut(self) -> Cut | None:
        """The test parts of the folds; None for one test part."""
        if len(self.folds) == 1:
            return None
        sizes = tuple(len(fold.test) for fold in self.folds)
        return Cut(sizes, float(np.mean([len(fold.test) / len(fold.train) for fold in self.folds])))

    @property
    def input_dims(self) -> dict[str, int]:
        """Width d_m of each modality."""
        return {name: x.shape[-1] for name, x in sorted(self.pool.features.items())}

    @property
    def output_dim(self) -> int:
        """Number of outputs O: classes of a multiclass target, else its columns."""
        if self.task == "multiclass":
            return len(self.class_names)
        return 1 if self.pool.target.ndim == 1 else self.pool.target.shape[1]

    @property
    def has_columns(self) -> bool:
        """True where a model says several things of one example: its outputs are (N, O), not (N,)."""
        return self.task == "multiclass" or self.pool.target.ndim > 1

    @property
    def target_scale(self) -> Tensor:
        """What errors are divided by: the standard deviation (O,) of a regression's targets in training; 1 else."""
        if self.task != "regression":
            return torch.ones(1)
        training = torch.cat([fold.train for fold in self.folds]).unique()
        return target_scale(self.pool.target[training])

    @property
    def score_name(self) -> str:
        """Of the additive score (mmfusion.metrics.scores.example_scores in units of the target's deviation)."""
        if self.task == "regression":
            return "-MAE / std of target"
        return "accuracy, mean over labels" if self.task == "multilabel" else "accuracy"

    @property
    def loss_name(self) -> str:
        """Of the loss (mmfusion.metrics.scores.example_losses in the same units)."""
        return "squared error / variance" if self.task == "regression" else "cross-entropy"

    @property
    def description(self) -> dict[str, object]:
        """What a run records of its data, JSON-able."""
        return {
            "name": self.name,
            "examples": [{part: len(rows) for part, rows in fold._asdict().items()} for fold in self.folds],
            "notes": self.notes,
            **self.provenance,
        }

    @property
    def test_rows(self) -> Tensor:
        """Rows of all folds' test parts, fold after fold."""
        return torch.cat([fold.test for fold in self.folds])


def target_scale(target: Tensor) -> Tensor:
    """(O,) standard deviation of a regression's training targets, (N,) or (N, O): what errors are divided by."""
    std = target.reshape(len(target), -1).std(0, correction=0)
    return torch.where(std > 0, std, torch.ones_like(std))


def fold_datasets(datasets: Sequence[Dataset]) -> FoldedDataset:
    """One study of the folds of a dataset (or of its only one).

    The test part of a fold is the first labelled split called test*, else any that is neither train nor selected upon,
    else the selection split itself, with a note. Raises InputError where nothing labelled is left to test on.
    """
    first = datasets[0]
    pool = _Pool()
    folds, notes = [], list(first.notes)
    for dataset in datasets:
        names = {"train": "train", "dev": dataset.selection, "test": tested_split(dataset)}
        if names["test"] == dataset.selection and dataset is first:
            notes.append(f"{dataset.selection} is tested on: no other labelled split is there")
        rows = {part: torch.tensor(pool.add(dataset.splits[name], name)) for part, name in names.items()}
        folds.append(Fold(**rows))
    kept = (first.provenance, first.label_range, first.class_names, first.labelled)
    data = FoldedDataset(first.name, first.task, pool.split(), folds, notes, *kept)
    tested = data.test_rows
    if len(tested.unique()) < len(tested):
        raise InputError(f"{first.name}: {len(tested) - len(tested.unique())} examples are tested in several folds")
    if data.task == "binary" and len(data.pool.target[tested].unique()) < 2:
        raise InputError(f"{first.name}: all {len(tested)} test examples are of one class; scores need both")
    return data


DEV_PARTS = 8


def cross_validated(data: FoldedDataset, folds: int, repeats: int = 1, seed: int = 0) -> FoldedDataset:
    """The same examples, those that were trained, selected or tested on, cut anew: K folds, `repeats` times.

    Classes are kept in proportion, groups (videos, speakers) whole. An eighth of what a fold trains on is its dev part,
    cut the same way. What the data set's notes say of train, dev and test is of its own split; a note says so.

    Raises InputError where there are fewer groups, or examples of a class, than folds, and where rows that are no
    group have an item in common (captions of a picture).
    """
    if items := [name for name, of in data.pool.shared.items() if len(set(of)) < len(of)]:
        raise InputError(f"--cross-validate {folds}: rows of {data.name} share their {items[0]}; leave the flag out")
    rows = torch.cat([torch.cat(list(fold)) for fold in data.folds]).unique().numpy()
    labels = data.pool.target.numpy() if data.task in ("binary", "multiclass") else None
    column = data.pool.metadata.get("group")
    groups = None if column is None else np.array([str(one) for one in column])
    units = _least(labels, groups, rows)
    if units < folds or len(rows) < 2 * DEV_PARTS:
        raise InputError(
            f"--cross-validate {folds}: {data.name} has {units} examples of a class, or groups, to share out; give a "
            "smaller number"
        )

    def parts(of: np.ndarray, count: int, draw: int) -> list[tuple[np.ndarray, np.ndarray]]:
        stratified = labels is not None
        kinds = {(True, True): StratifiedGroupKFold, (True, False): StratifiedKFold}
        kinds |= {(False, True): GroupKFold, (False, False): KFold}
        cutter = kinds[stratified, groups is not None](count, shuffle=True, random_state=draw)
        found = cutter.split(of, None if labels is None else labels[of], None if groups is None else groups[of])
        return [(of[train], of[test]) for train, test in found]

    cuts = []
    for repeat in range(repeats):
        for k, (train, test) in enumerate(parts(rows, folds, seed + repeat)):
            count = min(DEV_PARTS, max(2, _least(labels, groups, train)))
            train, dev = parts(train, count, seed + 1000 * (k + 1) + repeat)[0]
            cuts.append(Fold(*(torch.from_numpy(np.sort(part)) for part in (train, dev, test))))
    by_group = "" if groups is None else ", by group"
    note = (
        f"{folds} folds, cut {repeats} times over all {len(rows)} examples{by_group}: notes above are of its own split"
    )
    provenance = data.provenance | {"cross_validate": folds, "repeats": repeats, "cross_validation_seed": seed}
    return replace(data, folds=cuts, notes=[*data.notes, note], provenance=provenance, repeats=repeats)


def _least(labels: np.ndarray | None, groups: np.ndarray | None, rows: np.ndarray) -> int:
    """Of the smallest class, or of groups, how many there are among these rows."""
    counts = [len(rows)]
    if labels is not None:
        counts.append(int(np.unique(labels[rows], return_counts=True)[1].min()))
    if groups is not None:
        counts.append(len(np.unique(groups[rows])))
    return min(counts)


class _Pool:
    """Examples by id, each once; what only shares its id with another is an example of its own."""

    def __init__(self) -> None:
        self.place: dict[str, int] = {}
        self.parts: list[Split] = []

    def add(self, split: Split, name: str) -> list[int]:
        """Rows of the pool for a split's examples; those that are not yet in it are added."""
        known = self.split() if self.parts else None
        rows, new = [], []
        for i, key in enumerate(split.ids):
            if known is not None and key in self.place and not _is_same(known, self.place[key], split, i):
                key = f"{name}/{key}"  # ids that begin anew in every split
            if key not in self.place:
                self.place[key] = len(self.place)
                new.append(i)
            rows.append(self.place[key])
        self.parts.append(take(split, new))
        return rows

    def split(self) -> Split:
        """All examples so far; of the metadata, the columns that all splits have."""
        columns = [c for c in self.parts[0].metadata if all(c in part.metadata for part in self.parts)]
        return Split(
            {
                name: concatenate([part.features[name] for part in self.parts])
                for name in sorted(self.parts[0].features)
            },
            torch.cat([part.target for part in self.parts]),
            list(self.place),
            {column: [value for part in self.parts for value in part.metadata[column]] for column in columns},
        )


def _is_same(one: Split, i: int, other: Split, k: int) -> bool:
    """True where two rows hold the same example: released splits may overlap."""
    features = all(_is_equal(x, i, other.features[name], k) for name, x in one.features.items())
    return features and torch.equal(one.target[i], other.target[k])


def _is_equal(x: Tensor | Sequences, i: int, y: Tensor | Sequences, k: int) -> bool:
    if isinstance(x, Sequences) and x.parts[i] is y.parts[k]:  # folds share parts, which need not be read for it
        return True
    return torch.equal(x[i], y[k])


def tested_split(dataset: Dataset) -> str:
    """Name of the split that a study tests on; raises InputError where none has labels."""
    labelled = [name for name, split in dataset.splits.items() if split.target is not None and len(split)]
    held_out = [name for name in labelled if name not in ("train", dataset.selection)]
    if dataset.selection not in labelled:
        raise InputError(
            f"{dataset.name}: split {dataset.selection} has no labels; the experiments need some to test on"
        )
    return min(held_out, key=lambda name: not name.startswith("test"), default=dataset.selection)


def only(data: FoldedDataset, modalities: Sequence[str]) -> FoldedDataset:
    """The same study without the other modalities."""
    features = {name: data.pool.features[name] for name in sorted(modalities)}
    return replace(data, pool=replace(data.pool, features=features))


def with_dev_in_training(data: FoldedDataset) -> FoldedDataset:
    """The same study with every fold's dev part trained on too: for scores where nothing is selected upon."""
    folds = [Fold(torch.cat([fold.train, fold.dev]).unique(), fold.dev, fold.test) for fold in data.folds]
    if any(bool(torch.isin(fold.test, fold.train).any()) for fold in folds):  # dev is tested on: it stays out
        return data
    return replace(data, folds=folds)


def datasets_of(data: FoldedDataset, like: Dataset) -> list[Dataset]:
    """One dataset for each fold, of its train, dev and test parts; names and notes are those of `like`."""
    return [
        replace(
            like,
            splits={part: take(data.pool, rows.tolist()) for part, rows in fold._asdict().items()},
            selection="dev",
        )
        for fold in data.folds
    ]


def constant_predictions(data: FoldedDataset) -> np.ndarray:
    """(1, n[, O]): what knowing nothing says of every fold's test part, fold after fold; as a model's outputs.

    The training part's mean of a regression's target, or the logits of its shares of the classes: their sign, or the
    largest, is the majority.
    """
    folds = []
    for fold in data.folds:
        target = data.pool.target[fold.train].double()
        if data.task == "regression":
            constant = target.mean(0)
        elif data.task == "multiclass":
            shares = torch.bincount(target.long(), minlength=data.output_dim) / len(target)
            constant = shares.clamp_min(1e-9).log()
        else:
            constant = torch.logit(target.mean(0), eps=1e-6)
        folds.append(constant.expand(len(fold.test), *constant.shape))
    return torch.cat(folds)[None].float().numpy()


def targets(data: FoldedDataset, part: str = "test") -> np.ndarray:
    """(n,) or (n, O): targets of that part of every fold, fold after fold."""
    return np.concatenate([data.pool.target[getattr(fold, part)].numpy() for fold in data.folds])
