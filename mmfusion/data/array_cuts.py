"""Cuts of users' own examples into train, dev and test: by whole groups where there are groups, else classes alike."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from mmfusion.dataset import Split, take
from mmfusion.errors import InputError

DEV_SHARE = 0.1
FEW_REMEDY = "add examples, or leave that class out"
DRAWS = 100  # of whole groups, until both parts have the classes that they need
OVERSTATED = "folds share training examples: the spread over folds understates the spread over data sets"

Cut = tuple[np.ndarray, np.ndarray]
"""rows of the rest and of what is cut off, ascending"""


def cut_folds(
    split: Split, folds: int, stratify: bool, seed: int, source: str, class_names: Sequence[str] = ()
) -> tuple[list[Cut], list[str]]:
    """K cuts (rest, test) in which each example is tested once, and notes on them.

    Whole groups where the split's metadata has `group`; with `stratify`, classes alike as far as that allows. Raises
    InputError where there are fewer examples, or groups, than folds, or a class of one example.
    """
    groups = split.metadata.get("group")
    kind, count = ("examples", len(split)) if groups is None else ("groups", len(set(groups)))
    if count < folds:
        raise InputError(f"--folds {folds}: {source} has {count} {kind}; give at most as many folds")
    target = split.target.numpy() if stratify else None
    classes, counts = (None, None) if target is None else np.unique(target, return_counts=True)
    rarest = None if target is None else int(counts.min())
    if rarest == 1:
        name = _class_in_words(classes[counts.argmin()], class_names)
        raise InputError(f"{source}: {name} has one example only; {FEW_REMEDY}")
    options = {"n_splits": folds, "shuffle": True, "random_state": seed}
    rows = np.zeros(len(split))
    if groups is None:
        balanced, plain = StratifiedKFold(**options), KFold(**options)
    else:
        balanced, plain = StratifiedGroupKFold(**options), GroupKFold(**options)
    cuts: list[Cut] = []
    if target is not None and counts.max() >= folds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with fewer examples than folds: noted below
            cuts = list(balanced.split(rows, target, groups))
    if not cuts or any(len(test) == 0 for _, test in cuts):  # balance may leave a fold without a group
        cuts = list(plain.split(rows, None, groups))
    manner = _manner(groups is not None, stratify)
    notes = [f"{folds} folds ({manner}, seed {seed}); each example is tested once", OVERSTATED]
    if rarest is not None and rarest < folds:
        notes.append(f"the rarest class has {rarest} examples: some of the {folds} folds test none of it")
    return [(np.sort(rest), np.sort(test)) for rest, test in cuts], notes


def cut_test(
    split: Split, share: float, stratify: bool, seed: int, source: str, class_names: Sequence[str] = ()
) -> tuple[list[Cut], list[str]]:
    """One cut (rest, test), and notes on it. Raises InputError as `cut_dev` does."""
    cut = _cut_off(split, share, stratify, seed, f"--hold-out {share:g}: {source} cannot be cut", class_names)
    manner = _manner("group" in split.metadata, stratify)
    return [cut], [f"test: {len(cut[1])} of {len(split)} examples were held out ({manner}, seed {seed})"]


def cut_dev(
    train: Split, stratify: bool, seed: int, source: str, class_names: Sequence[str] = ()
) -> tuple[Split, Split, str]:
    """(train without dev, dev, note): a tenth of train, by groups or of each class alike.

    Raises InputError where train has too few examples, groups, or examples of a class.
    """
    rest, dev = _cut_off(train, DEV_SHARE, stratify, seed, f"{source}: no dev split can be cut from train", class_names)
    manner = _manner("group" in train.metadata, stratify)
    note = f"no dev split: {len(dev)} of {len(train)} training examples were cut from train ({manner}, seed {seed})"
    return take(train, rest), take(train, dev), note


def _manner(grouped: bool, stratify: bool) -> str:
    return "whole groups" if grouped else "each class alike" if stratify else "at random"


def _class_in_words(number: float, class_names: Sequence[str]) -> str:
    return f"class {class_names[int(number)]!r}" if class_names else f"class number {number:g}"


def _cut_off(split: Split, share: float, stratify: bool, seed: int, where: str, class_names: Sequence[str]) -> Cut:
    """Cut about `share` of the examples off. Raises InputError beginning with `where`."""
    groups = split.metadata.get("group")
    target = split.target.numpy() if stratify else np.zeros(len(split))
    classes, counts = np.unique(target, return_counts=True)
    if groups is None:
        if counts.min() < 2:
            name = _class_in_words(classes[counts.argmin()], class_names) if stratify else "it"
            remedy = FEW_REMEDY if stratify else "add examples"
            raise InputError(f"{where}: {name} has one example there, and each part needs one; {remedy}")
        rng = np.random.default_rng(seed)
        return _sides(np.concatenate([_some(np.flatnonzero(target == c), share, rng) for c in classes]), len(split))
    names, group_of = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"{where}: it is one group only; add groups, or leave `group` out with --ignore group")
    for cut in _group_draws(group_of, share, seed):
        rest_classes, cut_classes = (len(np.unique(target[rows])) for rows in cut)
        if rest_classes == len(classes) and cut_classes >= min(2, len(classes)):
            return cut
    raise InputError(f"{where}: no cut by whole groups leaves both parts their classes; add groups, or --ignore group")


def _group_draws(group_of: np.ndarray, share: float, seed: int) -> Iterator[Cut]:
    """Cuts by whole groups, one draw after the other."""
    numbers = np.arange(group_of.max() + 1)
    for draw in range(DRAWS):
        chosen = _some(numbers, share, np.random.default_rng((seed, draw)))
        yield _sides(np.flatnonzero(np.isin(group_of, chosen)), len(group_of))


def _some(rows: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """`share` of two or more rows: at least one, and at least one stays."""
    return rng.permutation(rows)[: min(max(1, round(share * len(rows))), len(rows) - 1)]


def _sides(cut: np.ndarray, count: int) -> Cut:
    return np.setdiff1d(np.arange(count), cut), np.sort(cut)


def overlap_notes(splits: dict[str, Split]) -> list[str]:
    """Ids, and groups, that a later split shares with train."""
    notes = []
    train = splits["train"]
    for name in list(splits)[1:]:
        if shared := set(splits[name].ids) & set(train.ids):
            notes.append(f"{len(shared)} of {len(splits[name])} ids of {name} are also in train")
        groups = set(splits[name].metadata.get("group", []))
        if shared := groups & set(train.metadata.get("group", [])):
            notes.append(f"{len(shared)} of {len(groups)} groups of {name} are also in train")
    return notes
