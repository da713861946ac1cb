"""Inner folds of the training examples, and what is trained on them within a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mmfusion.data.array_cuts import cut_folds
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Dataset, Fold, Split, Task, take
from mmfusion.errors import InputError, check_numbers
from mmfusion.metrics.scores import example_scores
from mmfusion.metrics.tasks import balanced_weights
from mmfusion.training.grid import Grid, Setting, per_example
from mmfusion.training.recipe import Recipe

TERMS = ("mmd", "reconstruction")  # the pair alignment would let a left-out modality shape the others' encoders
PREVAILS = 1.5  # times its share among classes alike: of two classes, three quarters of the examples
BATCH = 64  # the prior's cost is quadratic in it


@dataclass(frozen=True)
class Budget:
    """What a diagnosis may cost: seconds to minutes, not an answer's last digit."""

    seeds: int = 2
    """trainings of every setting on every inner fold"""
    inner_folds: int = 3
    """inner folds, cut from train and dev"""
    inner_steps: int = 400
    """steps of 64 examples that each is trained for, to the next whole epoch; the last epoch is kept"""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """ranks that are compared"""
    effect: float = 0.01
    """smallest difference of score that would matter to you"""
    most_examples: int = 4000
    """more are not used: as many are drawn at random"""

    def check(self) -> None:
        """Raise InputError naming the first flag out of range."""
        bounds = {"seeds": (2, 64), "inner_folds": (2, 50), "inner_steps": (1, 1e6), "effect": (1e-6, 10)}
        check_numbers(self, bounds | {"most_examples": (20, 1e7)})
        if not self.ranks or min(self.ranks) < 1 or max(self.ranks) > 64 or len(set(self.ranks)) < len(self.ranks):
            given = " ".join(map(str, self.ranks))
            raise InputError(f"--ranks {given}: give different ranks from 1 to 64, such as 1 2 4")


def inner_folds(dataset: Dataset, budget: Budget) -> FoldedDataset:
    """Train and selection split of a dataset, pooled and cut into inner folds; other splits are left alone."""
    splits = [dataset.splits[name] for name in dict.fromkeys(("train", dataset.selection))]
    columns = [c for c in splits[0].metadata if all(c in split.metadata for split in splits)]
    count = sum(map(len, splits))
    pool = Split(
        {name: torch.cat([split.features[name] for split in splits]) for name in sorted(splits[0].features)},
        torch.cat([split.target for split in splits]),
        [str(i) for i in range(count)],
        {c: [value for split in splits for value in split.metadata[c]] for c in columns},
    )
    notes = ["test examples were not looked at: all figures are of inner folds of train and dev"]
    if count > budget.most_examples:
        rows = np.sort(np.random.default_rng(0).choice(count, budget.most_examples, replace=False))
        pool = take(pool, rows)
        notes.append(f"{budget.most_examples} of {count} examples, drawn at random, were used")
    is_classes = dataset.task in ("binary", "multiclass")
    names = dataset.class_names if is_classes else ()
    cuts, cut_notes = cut_folds(pool, budget.inner_folds, is_classes, 0, dataset.name, names)
    folds = [Fold(torch.from_numpy(rest), torch.from_numpy(test), torch.from_numpy(test)) for rest, test in cuts]
    kept = (dataset.provenance, dataset.label_range, dataset.class_names)
    return FoldedDataset(dataset.name, dataset.task, pool, folds, [*notes, *cut_notes], *kept)


def inner_settings(names: Sequence[str], ranks: Sequence[int], reference: int) -> list[Setting]:
    """Every rank with all modalities; each modality alone; all but each."""

    def hidden(kept: Sequence[str]) -> dict[str, float]:
        return {name: float(name not in kept) for name in names} if len(names) > 1 else {}

    settings = [Setting(f"rank {rank}", rank, TERMS, dropout=hidden(names)) for rank in ranks]
    if len(names) > 1:
        settings += [Setting(f"{name} alone", reference, TERMS, dropout=hidden([name])) for name in names]
    if len(names) > 2:  # of two, without one is the other alone
        settings += [
            Setting(f"without {name}", reference, TERMS, dropout=hidden([n for n in names if n != name]))
            for name in names
        ]
    return settings


class Scoring(NamedTuple):
    """The additive score that settings are compared by."""

    name: str
    of: Callable[[np.ndarray, np.ndarray, Task], np.ndarray]
    """as `mmfusion.metrics.scores.example_scores`"""
    note: str | None = None
    """why it is not the usual one"""


def inner_scoring(data: FoldedDataset) -> Scoring:
    """The usual score, or balanced accuracy where one class prevails: there a constant has nearly all the accuracy.

    Balanced accuracy is the mean of an example's accuracy times N / (C n_c), c its class. The class is chosen by the
    logits less the logarithms of the classes' shares: of calibrated logits that is the choice of the largest balanced
    accuracy, where the likeliest class is that of the largest accuracy.
    """
    usual = Scoring(data.score_name, example_scores)
    if data.task not in ("binary", "multiclass"):
        return usual
    classes = max(2, data.output_dim)
    counts = torch.bincount(data.pool.target.long(), minlength=classes)
    share = (counts.max() / counts.sum()).item()
    if share <= PREVAILS / classes:
        return usual
    weights = balanced_weights(data.pool.target, data.task, classes).numpy()  # (C,)
    logs = (counts.clamp_min(1) / counts.sum()).log().numpy()
    offset = logs if data.task == "multiclass" else logs[1] - logs[0]

    def of(predictions: np.ndarray, target: np.ndarray, task: Task) -> np.ndarray:
        return example_scores(predictions - offset, target, task) * weights[target.astype(int)]

    name = data.class_names[int(counts.argmax())]
    return Scoring("balanced accuracy", of, f"{share:.0%} are of class {name!r}: the score is balanced accuracy")


def hidden_scores(grid: Grid, of: Callable = example_scores) -> dict[str, np.ndarray]:
    """{setting: (S, n)}; what a setting's models were trained without is hidden from them in testing too."""
    found = {}
    for place, setting in enumerate(grid.settings):
        hidden = [name for name, rate in setting.dropout.items() if rate == 1]
        found[setting.label] = grid.without(hidden, [place], of=of)[0]
    return found


def inner_recipe(data: FoldedDataset, budget: Budget) -> Recipe:
    steps = max(1, min(len(fold.train) for fold in data.folds) // BATCH)  # of an epoch
    # small, fast and without noise: what its answers are worth was checked on planted data under this one
    return Recipe(
        latent_dim=16,
        hidden_dim=32,
        noise="none",
        epochs=math.ceil(budget.inner_steps / steps),
        batch_size=BATCH,
        learning_rate=5e-3,
        weight_decay=1.0,
        modality_dropout=0.0,
        feature_dropout=0.0,
        mmd_weight=0.3,
    )


def tested_groups(data: FoldedDataset) -> list[str] | None:
    """Group of each tested example, fold after fold."""
    groups = data.pool.metadata.get("group")
    return None if groups is None else [groups[i] for i in data.test_rows.tolist()]


def chance_scores(data: FoldedDataset, of: Callable = example_scores) -> np.ndarray:
    """(n,) scores of the best constant for the score: the most frequent class (or label) of an inner training part, or
    the median. `mmfusion.data.folds.constant_predictions` is that of the least loss."""
    said = []
    for fold in data.folds:
        train = data.pool.target[fold.train]
        if data.task == "multiclass":
            row = torch.bincount(train.long(), minlength=data.output_dim).float()
        elif data.task == "regression":
            row = train.median(0).values
        else:
            row = (train.mean(0) >= 0.5).float() - 0.5  # a logit
        said.append(row.expand(len(fold.test), *row.shape))
    constant = torch.cat(said).numpy()[None]
    return per_example(data, constant, "test", of)[0]
