"""Datasets become folded datasets: one pool, folds by rows, nothing of a test part in training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmfusion.data.folds import (
    constant_predictions,
    cross_validated,
    fold_datasets,
    only,
    targets,
    with_dev_in_training,
)
from mmfusion.dataset import Dataset, Split, Task, hold_out, take
from mmfusion.errors import InputError


def split(names: list[str], labelled: bool = True, outputs: int | None = None) -> Split:
    """Features that encode the example's number, so that rows can be told apart."""
    numbers = torch.tensor([float(name[1:]) for name in names])
    target = (numbers % 2) if outputs is None else numbers[:, None].repeat(1, outputs)
    features = {"text": numbers[:, None].repeat(1, 3), "audio": -numbers[:, None]}
    return Split(features, target if labelled else None, names, {"group": [f"g{name[-1]}" for name in names]})


def names(start: int, stop: int) -> list[str]:
    return [f"e{i}" for i in range(start, stop)]


def dataset(**splits: Split) -> Dataset:
    return Dataset("toy", "binary", splits, "dev")


def test_fixed_splits_are_one_fold_whose_rows_lead_back_to_their_examples():
    data = fold_datasets(
        [dataset(train=split(names(0, 10)), dev=split(names(10, 14)), test=split(names(14, 20)), extra=split(["e99"]))]
    )
    (fold,) = data.folds
    assert [data.pool.ids[row] for row in fold.test] == names(14, 20)
    assert data.pool.features["text"][fold.dev][:, 0].tolist() == [10, 11, 12, 13]
    assert list(data.pool.features) == ["audio", "text"]
    assert data.input_dims == {"audio": 1, "text": 3} and data.output_dim == 1
    assert "e99" not in data.pool.ids
    assert targets(data).tolist() == [0, 1, 0, 1, 0, 1]


def test_folds_share_one_pool_and_every_example_stands_in_it_once():
    everything = names(0, 12)
    datasets = []
    for k in range(3):
        test = everything[k::3]
        rest = [name for name in everything if name not in test]
        datasets.append(dataset(train=split(rest[2:]), dev=split(rest[:2]), test=split(test)))
    data = fold_datasets(datasets)
    assert sorted(data.pool.ids) == sorted(everything)
    assert sorted(data.test_rows.tolist()) == list(range(12))
    for fold, one in zip(data.folds, datasets, strict=True):
        assert [data.pool.ids[row] for row in fold.train] == one.splits["train"].ids
        assert not set(fold.train.tolist()) & set(fold.test.tolist())
    again = with_dev_in_training(data)
    for fold, grown in zip(data.folds, again.folds, strict=True):
        assert set(grown.train.tolist()) == set(fold.train.tolist()) | set(fold.dev.tolist())
        assert not set(grown.train.tolist()) & set(fold.test.tolist())


def test_without_a_labelled_test_split_dev_is_tested_on_said_so_and_never_trained_on():
    data = fold_datasets(
        [dataset(train=split(names(0, 6)), dev=split(names(6, 9)), test=split(names(9, 12), labelled=False))]
    )
    assert any("tested on" in note for note in data.notes)
    assert data.folds[0].test.tolist() == data.folds[0].dev.tolist()
    assert with_dev_in_training(data).folds[0].train.tolist() == data.folds[0].train.tolist()


def test_nothing_labelled_to_test_on_is_an_input_error():
    with pytest.raises(InputError, match="dev has no labels"):
        fold_datasets([dataset(train=split(names(0, 6)), dev=split(names(6, 9), labelled=False))])


def test_one_modality_keeps_folds_and_targets():
    data = fold_datasets([dataset(train=split(names(0, 6)), dev=split(names(6, 9)), test=split(names(9, 12)))])
    alone = only(data, ["text"])
    assert list(alone.pool.features) == ["text"] and alone.folds is data.folds
    assert list(data.pool.features) == ["audio", "text"]


def test_regression_errors_are_in_units_of_the_training_targets_deviation():
    parts = {"train": split(names(0, 6), outputs=2), "dev": split(names(6, 9), outputs=2)}
    data = fold_datasets([Dataset("toy", "regression", parts | {"test": split(names(100, 104), outputs=2)}, "dev")])
    torch.testing.assert_close(data.target_scale, torch.arange(6.0).std(correction=0).repeat(2))
    assert data.output_dim == 2


@pytest.mark.parametrize(
    ("task", "target", "expected"),
    [
        ("regression", [0.0, 1, 5], 2.0),
        ("binary", [0.0, 0, 0, 1], -np.log(3)),
        ("multiclass", [0.0, 1, 1, 1], np.log([0.25, 0.75])),
        ("multilabel", [[0.0, 1], [0, 0], [0, 1], [1, 1]], [-np.log(3), np.log(3)]),
    ],
)
def test_knowing_nothing_says_the_training_mean_or_the_shares_of_the_classes(task: Task, target, expected):
    train, test = take(split(names(0, len(target))), range(len(target))), split(names(20, 22))
    train = replace(train, target=torch.tensor(target))
    test = replace(test, target=train.target[-2:])
    said = constant_predictions(fold_datasets([Dataset("toy", task, {"train": train, "dev": test}, "dev")]))
    np.testing.assert_allclose(said, np.broadcast_to(expected, (1, 2, *np.shape(expected))), rtol=1e-5)


def test_held_out_groups_are_whole_and_the_cut_is_deterministic():
    whole = split(names(0, 40))
    rest, held_out = hold_out(whole, 0.3, groups=whole.metadata["group"])
    assert not set(rest.metadata["group"]) & set(held_out.metadata["group"])
    assert sorted(rest.ids + held_out.ids) == sorted(whole.ids)
    assert hold_out(whole, 0.3, groups=whole.metadata["group"])[1].ids == held_out.ids
    rest, held_out = hold_out(whole, 0.25, stratify=True)
    assert held_out.target.mean() == 0.5 and len(held_out) == 10
    assert take(whole, np.array([3, 1])).features["text"][:, 0].tolist() == [3, 1]


def test_ids_that_begin_anew_in_every_split_stay_different_examples_and_real_overlaps_are_one():
    def numbered(start: int, stop: int) -> Split:
        part = split(names(start, stop))
        return Split(part.features, part.target, [f"row_{i}" for i in range(len(part))], part.metadata)

    data = fold_datasets([dataset(train=numbered(0, 10), dev=numbered(10, 14), test=numbered(14, 20))])
    (fold,) = data.folds
    assert len(data.pool) == 20
    assert not set(fold.train.tolist()) & set(fold.test.tolist())
    assert data.pool.features["text"][fold.test][:, 0].tolist() == [14, 15, 16, 17, 18, 19]
    overlapping = fold_datasets(
        [dataset(train=split(names(0, 10)), dev=split(names(8, 12)), test=split(names(14, 20)))]
    )
    assert len(overlapping.pool) == 18


def test_columns_that_one_split_lacks_are_left_out():
    bare = split(names(10, 14))
    bare = Split(bare.features, bare.target, bare.ids)
    data = fold_datasets([dataset(train=split(names(0, 6)), dev=bare, test=split(names(14, 20)))])
    assert data.pool.metadata == {}


def test_test_part_of_one_class_and_examples_tested_twice_are_input_errors():
    even = split([f"e{i}" for i in range(20, 30, 2)])
    with pytest.raises(InputError, match="one class"):
        fold_datasets([dataset(train=split(names(0, 6)), dev=split(names(6, 9)), test=even)])
    twice = dataset(train=split(names(0, 6)), dev=split(names(6, 9)), test=split(names(9, 12)))
    with pytest.raises(InputError, match="3 examples are tested in several folds"):
        fold_datasets([twice, twice])


def test_output_that_never_varies_has_scale_one():
    parts = {
        name: split(names(*span), outputs=2) for name, span in (("train", (0, 6)), ("dev", (6, 9)), ("test", (9, 12)))
    }
    for part in parts.values():
        part.target[:, 1] = 5
    data = fold_datasets([Dataset("toy", "regression", parts, "dev")])
    assert data.target_scale[1] == 1 and data.target_scale[0] > 1


@pytest.mark.parametrize("grouped", [False, True])
def test_cross_validation_tests_every_example_once_a_repeat_and_keeps_groups_whole(grouped):
    several = [split(names(a, b)) for a, b in ((0, 120), (120, 140), (140, 200))]
    if not grouped:
        several = [replace(one, metadata={}) for one in several]
    data = fold_datasets([dataset(train=several[0], dev=several[1], test=several[2])])
    made = cross_validated(data, 5, 3)
    assert (len(made.folds), made.repeats, sum(made.cut.sizes)) == (15, 3, 600)
    group = made.pool.metadata.get("group")
    for fold in made.folds:
        parts = [set(part.tolist()) for part in fold]
        assert set().union(*parts) == set(range(200)) and sum(map(len, parts)) == 200
        assert min(map(len, parts)) >= 15
        if grouped:
            found = [{group[row] for row in part} for part in parts]
            assert not found[0] & found[2] and not found[0] & found[1] and not found[1] & found[2]
        else:
            assert all(0.4 < made.pool.target[part].mean() < 0.6 for part in fold)
    for repeat in range(3):
        tested = torch.cat([fold.test for fold in made.folds[5 * repeat : 5 * repeat + 5]])
        assert sorted(tested.tolist()) == list(range(200))
    assert not torch.equal(made.folds[0].test, made.folds[5].test)
    again = [torch.cat(list(fold)) for fold in cross_validated(data, 5, 3).folds]
    assert all(torch.equal(torch.cat(list(a)), b) for a, b in zip(made.folds, again, strict=True))
    assert made.cut.ratio == pytest.approx(np.mean([len(f.test) / len(f.train) for f in made.folds]))
    assert data.cut is None


def test_cross_validation_needs_enough_groups_or_examples():
    data = fold_datasets([dataset(train=split(names(0, 30)), dev=split(names(30, 40)), test=split(names(40, 60)))])
    with pytest.raises(InputError, match="--cross-validate 11: toy has 10"):
        cross_validated(data, 11)
