"""Users' own arrays: keys, targets, splits and folds, and every mistake as one line."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmfusion.cli import parse
from mmfusion.data.array_targets import infer_task
from mmfusion.data.arrays import ArraysConfig, dataset_from_arrays, load_arrays
from mmfusion.data.folds import fold_datasets
from mmfusion.data.registry import DataOptions, load_datasets
from mmfusion.dataset import Dataset
from mmfusion.errors import InputError
from mmfusion.runs.folder import same_data

COUNTS = {"train": 40, "dev": 10, "test": 20}
DATA = Path(os.environ.get("FUSION_DATA", ""))
needs_data = pytest.mark.skipif(
    "FUSION_DATA" not in os.environ,
    reason="FUSION_DATA names no folder with mfeat_digits.npz, photo_tweets_vectors.npz and snareseq_cells.npz",
)

Arrays = dict[str, np.ndarray]


def with_splits() -> Arrays:
    """Two modalities, a binary target, ids; of train, dev and test."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {}
    for split, count in COUNTS.items():
        arrays[f"image_{split}"] = rng.normal(size=(count, 5)).astype(np.float16)
        arrays[f"text_{split}"] = rng.normal(size=(count, 3))
        arrays[f"target_{split}"] = np.arange(count) % 2
        arrays[f"id_{split}"] = np.array([f"{split}-{row}" for row in range(count)])
    return arrays


def without_splits(count: int = 60) -> Arrays:
    """Two modalities, of which one is (N,), and three classes."""
    rng = np.random.default_rng(1)
    return {"a": rng.normal(size=(count, 4)), "b": np.arange(count), "target": np.arange(count) % 3}


def only(datasets: list[Dataset]) -> Dataset:
    (dataset,) = datasets
    return dataset


def in_memory(arrays: Arrays, **settings: object) -> list[Dataset]:
    return dataset_from_arrays(arrays, ArraysConfig(**settings))


def target_of(target: np.ndarray, **settings: object) -> Dataset:
    arrays = {"a": np.arange(len(target), dtype=float), "target": target}
    return in_memory(arrays, folds=2, **settings)[0]


# ---- layouts and files -----------------------------------------------------------------------------------------------


def test_a_files_own_splits_are_taken_as_they_are(tmp_path):
    arrays = with_splits()
    np.savez(tmp_path / "tweets.npz", **arrays)
    dataset = only(load_arrays(ArraysConfig(tmp_path / "tweets.npz")))
    assert (dataset.name, dataset.task, dataset.selection) == ("tweets", "binary", "dev")
    assert {name: len(split) for name, split in dataset.splits.items()} == COUNTS
    assert dataset.input_dims == {"image": 5, "text": 3}
    test = dataset.splits["test"]
    assert test.ids[:2] == ["test-0", "test-1"]
    np.testing.assert_array_equal(test.features["image"], arrays["image_test"].astype(np.float32))
    assert {x.dtype for x in [*test.features.values(), test.target]} == {torch.float32}
    assert dataset.class_names == ("0", "1") and dataset.output_dim == 1
    assert dataset.notes == ["target: binary, 2 classes: 0, 1 (inferred; --task changes it)"]


def test_npz_folder_safetensors_and_memory_give_the_same_dataset(tmp_path):
    arrays = {key: x for key, x in with_splits().items() if not key.startswith("id")}
    np.savez_compressed(tmp_path / "mine.npz", **arrays)
    (tmp_path / "mine").mkdir()
    for key, x in arrays.items():
        np.save(tmp_path / "mine" / f"{key}.npy", x)
    save_file({key: torch.from_numpy(x) for key, x in arrays.items()}, tmp_path / "mine.safetensors")
    found = [only(load_arrays(ArraysConfig(tmp_path / name))) for name in ("mine.npz", "mine", "mine.safetensors")]
    found.append(only(dataset_from_arrays(arrays, name="mine")))
    for dataset in found:
        assert dataset.name == "mine" and list(dataset.splits) == list(COUNTS)
        for name, split in dataset.splits.items():
            assert torch.equal(split.target, found[0].splits[name].target)
            for modality in ("image", "text"):
                assert torch.equal(split.features[modality], found[0].splits[name].features[modality])
        assert split.ids[:2] == ["test_0", "test_1"]
        json.dumps(dataset.provenance, allow_nan=False)
        assert len(dataset.provenance["sha256"]) == 64 and str(tmp_path) not in str(dataset.provenance)


def test_bfloat16_is_read_as_float32(tmp_path):
    x = torch.randn(20, 3).bfloat16()
    save_file({"a": x, "target": torch.arange(20) % 2}, tmp_path / "x.safetensors")
    dataset = load_arrays(ArraysConfig(tmp_path / "x.safetensors", folds=2))[0]
    rows = [int(one) for one in dataset.splits["test"].ids]
    assert torch.equal(dataset.splits["test"].features["a"], x[rows].float())


def test_valid_and_val_are_dev_and_further_splits_keep_their_names():
    arrays = with_splits()
    renamed = {key.replace("_dev", "_valid").replace("_test", "_test_seen"): x for key, x in arrays.items()}
    renamed |= {key.replace("_dev", "_dev_other"): x for key, x in arrays.items() if "_dev" in key}
    dataset = only(in_memory(renamed))
    assert list(dataset.splits) == ["train", "dev", "dev_other", "test_seen"] and dataset.selection == "dev"


def test_modalities_are_chosen_and_keys_ignored():
    arrays = with_splits()
    assert list(only(in_memory(arrays, modalities=("text",))).input_dims) == ["text"]
    assert list(only(in_memory(arrays, ignore=("text",))).input_dims) == ["image"]
    arrays["note"] = np.array(["made by hand"])
    assert list(only(in_memory(arrays, ignore=("note",))).input_dims) == ["image", "text"]
    renamed = {key.replace("target", "label"): x for key, x in with_splits().items()}
    assert only(in_memory(renamed, target="label")).task == "binary"


def test_texts_lists_tensors_and_columns_of_objects_are_taken_in_memory():
    rows = 12
    texts = np.array(["b", "a"] * (rows // 2), object)
    arrays = {
        "x": [[float(row)] for row in range(rows)],
        "y": torch.arange(rows),
        "target": texts,
        "id": list("abcdefghijkl"),
    }
    dataset = in_memory(arrays, folds=2)[0]
    assert dataset.class_names == ("a", "b") and dataset.input_dims == {"x": 1, "y": 1}
    by_id = dict(zip(dataset.splits["test"].ids, dataset.splits["test"].target.tolist(), strict=True))
    assert all(value == (1.0 if "abcdefghijkl".index(key) % 2 == 0 else 0.0) for key, value in by_id.items())


def test_a_test_split_may_lack_targets_and_may_be_missing():
    arrays = with_splits()
    del arrays["target_test"]
    assert only(in_memory(arrays)).splits["test"].target is None
    arrays = {key: x for key, x in with_splits().items() if not key.endswith("_test")}
    data = fold_datasets(in_memory(arrays))
    assert any("dev is tested on" in note for note in data.notes)


@pytest.mark.parametrize("change", ["value", "target", "key", "option"])
def test_provenance_sees_every_change_and_no_place(tmp_path, change):
    arrays, options = without_splits(), {"hold_out": 0.2}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "x.npz", **arrays)
    one, two = (load_arrays(ArraysConfig(tmp_path / folder / "x.npz", **options))[0] for folder in ("one", "two"))
    assert same_data(one.description, two.description)
    if change == "value":
        arrays["a"][3, 1] += 1
    elif change == "target":
        arrays["target"][:2] = arrays["target"][1::-1]
    elif change == "key":
        arrays["c"] = arrays.pop("a")
    else:
        options["split_seed"] = 1
    np.savez(tmp_path / "two" / "x.npz", **arrays)
    other = load_arrays(ArraysConfig(tmp_path / "two" / "x.npz", **options))[0]
    assert not same_data(one.description, other.description)
    in_memory_ones = [in_memory(x, **options)[0].provenance for x in (without_splits(), arrays)]
    assert (in_memory_ones[0] != in_memory_ones[1]) == (change != "option")


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "task", "class_names", "expected"),
    [
        (np.array([True, False] * 6), "binary", ("False", "True"), [1, 0] * 6),
        (np.array([-1, 1] * 6), "binary", ("-1", "1"), [0, 1] * 6),
        (np.array([2.0, 1.0] * 6), "binary", ("1", "2"), [1, 0] * 6),
        (np.array(["no", "yes"] * 6), "binary", ("no", "yes"), [0, 1] * 6),
        (np.array([b"no", b"yes"] * 6), "binary", ("no", "yes"), [0, 1] * 6),
        (np.array([[0], [1]] * 6), "binary", ("0", "1"), [0, 1] * 6),
        (np.array(["c", "a", "b"] * 4), "multiclass", ("a", "b", "c"), [2, 0, 1] * 4),
        (np.array([9, 3, 5] * 4, np.uint8), "multiclass", ("3", "5", "9"), [2, 0, 1] * 4),
        (np.array([10.0, 9.0, 5.0] * 4), "multiclass", ("5", "9", "10"), [2, 1, 0] * 4),
        (np.eye(3)[[2, 0, 1] * 4], "multiclass", ("0", "1", "2"), [2, 0, 1] * 4),
        (np.eye(2, dtype=bool)[[1, 0] * 6], "binary", ("0", "1"), [1, 0] * 6),
    ],
)
def test_classes_are_numbered_in_the_order_of_their_values(target, task, class_names, expected):
    dataset = target_of(target)
    assert (dataset.task, dataset.class_names) == (task, class_names)
    assert dataset.output_dim == (1 if task == "binary" else len(class_names))
    for split in dataset.splits.values():
        assert split.target.tolist() == [expected[int(one)] for one in split.ids]
    assert "inferred; --task changes it" in dataset.notes[0] and task in dataset.notes[0]


@pytest.mark.parametrize(
    ("target", "task"),
    [
        (np.linspace(0, 1, 12), "regression"),
        (np.arange(12), "regression"),  # whole numbers that occur once each
        (np.repeat(np.arange(21), 2), "regression"),  # more than twenty of them
        (np.repeat(np.arange(20), 2), "multiclass"),
        (np.array([1, 1, 2, 2, 3]), "regression"),
        (np.array([0.5, 1.5] * 6), "binary"),
        (np.random.default_rng(0).normal(size=(12, 3)), "regression"),
        (np.array([[1, 1, 0], [0, 1, 0]] * 6), "multilabel"),
        (np.array([[0, 0], [1, 0]] * 6), "multilabel"),
        (np.array([[1, 2, 0], [0, 1, 0]] * 6), "regression"),
        (np.array([f"w{row}" for row in range(30)]), "multiclass"),
    ],
)
def test_the_task_follows_the_documented_rule(target, task):
    assert infer_task(target) == task


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-5, 5), min_size=3, max_size=30), st.randoms())
def test_the_inferred_task_depends_on_no_order_shift_or_type(values, random):
    shuffled = random.sample(values, len(values))
    kinds = [values, shuffled, [value + 100 for value in values], [float(value) for value in values]]
    assert len({infer_task(np.array(kind)) for kind in kinds}) == 1


def test_multilabel_and_regression_keep_values_and_name_their_columns():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]] * 4)
    arrays = {"a": np.arange(16.0), "target": labels, "target_names": np.array(["joy", "fear", "anger"])}
    dataset = in_memory(arrays, folds=2)[0]
    assert (dataset.task, dataset.target_names, dataset.output_dim) == ("multilabel", ["joy", "fear", "anger"], 3)
    test = dataset.splits["test"]
    np.testing.assert_array_equal(test.target, labels[[int(one) for one in test.ids]])
    assert target_of(labels, task="regression").target_names == ["target_1", "target_2", "target_3"]
    graded = target_of(np.linspace(-1, 1, 16))
    assert (graded.task, graded.target_names, graded.label_range) == ("regression", [], None)


def test_the_task_can_be_said():
    stars = np.array([1, 2, 3, 4] * 4)
    assert target_of(stars).task == "multiclass"
    said = target_of(stars, task="regression")
    assert said.task == "regression" and "as --task says" in said.notes[0]
    assert target_of(np.array([0, 1] * 8), task="multiclass").output_dim == 2
    assert target_of(np.eye(4)[stars - 1], task="multilabel").output_dim == 4


# ---- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [2, 5, 7])
@pytest.mark.parametrize("kind", ["classes", "numbers", "groups", "numbers in groups"])
def test_each_example_is_tested_once_and_stands_in_one_part_of_a_fold(folds, kind):
    arrays = without_splits()
    if "numbers" in kind:
        arrays["target"] = np.random.default_rng(2).normal(size=60)
    if "groups" in kind:
        arrays["group"] = np.array([f"g{row // 4}" for row in range(60)])
    datasets = in_memory(arrays, folds=folds)
    assert len(datasets) == folds
    for dataset in datasets:
        parts = [set(split.ids) for split in dataset.splits.values()]
        assert list(dataset.splits) == ["train", "dev", "test"] and all(parts)
        assert set.union(*parts) == {str(row) for row in range(60)} and sum(map(len, parts)) == 60
        if "groups" in kind:
            groups = [set(split.metadata["group"]) for split in dataset.splits.values()]
            assert sum(map(len, groups)) == len(set.union(*groups)) == 15
    data = fold_datasets(datasets)
    assert len(data.pool) == 60 and sorted(data.test_rows.tolist()) == list(range(60))
    for row, one in enumerate(data.pool.ids):
        assert data.pool.features["b"][row] == int(one)  # rows lead back to their examples
        assert data.pool.target[row] == pytest.approx(float(arrays["target"][int(one)]))


def test_folds_and_cuts_keep_the_shares_of_the_classes():
    arrays = without_splits(200)
    arrays["target"] = (np.arange(200) % 10 == 0).astype(int)  # one in ten
    for dataset in in_memory(arrays, folds=4):
        assert dataset.splits["test"].target.sum() == 5 and len(dataset.splits["test"]) == 50
        assert 1 <= dataset.splits["dev"].target.sum() <= 2
    dataset = only(in_memory(arrays, hold_out=0.2))
    assert (len(dataset.splits["test"]), dataset.splits["test"].target.sum()) == (40, 4)


def test_a_rare_class_is_in_every_part_or_the_notes_say_so():
    arrays = without_splits(101)
    arrays["target"] = (np.arange(101) < 4).astype(int)
    datasets = in_memory(arrays, folds=2)
    assert all(split.target.sum() >= 1 for dataset in datasets for split in dataset.splits.values())
    assert not any("rarest" in note for note in datasets[0].notes)
    notes = in_memory(arrays, folds=5)[0].notes
    assert "the rarest class has 4 examples: some of the 5 folds test none of it" in notes


def test_cuts_are_the_seeds():
    arrays = without_splits()
    ids = [
        [split.ids for split in in_memory(arrays, folds=3, split_seed=seed)[0].splits.values()] for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_dev_is_cut_from_train_by_whole_groups_and_said():
    arrays = {key: x for key, x in with_splits().items() if not key.endswith("_dev")}
    arrays |= {f"group_{split}": np.arange(COUNTS[split]) // 4 + (split == "test") * 9 for split in ("train", "test")}
    dataset = only(in_memory(arrays))
    assert list(dataset.splits) == ["train", "dev", "test"]
    train, dev, _ = dataset.splits.values()
    assert len(train) + len(dev) == 40 and not set(train.metadata["group"]) & set(dev.metadata["group"])
    assert (
        f"no dev split: {len(dev)} of 40 training examples were cut from train (whole groups, seed 0)" in dataset.notes
    )
    assert len(fold_datasets([dataset]).pool) == 60


def test_ids_and_groups_that_splits_share_are_noted():
    arrays = with_splits()
    arrays["id_test"][3] = "train-5"
    arrays |= {f"group_{split}": np.arange(count) // 2 for split, count in COUNTS.items()}
    notes = only(in_memory(arrays)).notes
    assert "1 of 20 ids of test are also in train" in notes and "10 of 10 groups of test are also in train" in notes


def test_equal_rows_without_ids_stay_different_examples():
    arrays = {key: np.ones_like(x) for key, x in with_splits().items() if key.startswith(("image", "text"))}
    arrays |= {f"target_{split}": np.arange(count) % 2 for split, count in COUNTS.items()}
    assert len(fold_datasets(in_memory(arrays)).pool) == 70


# ---- mistakes --------------------------------------------------------------------------------------------------------


def _set(key: str, value: object):
    return lambda arrays: arrays.update({key: value(arrays[key]) if callable(value) else value})


def _drop(*keys: str):
    return lambda arrays: [arrays.pop(key) for key in keys]


def _at(place: tuple[int, ...], value: float):
    def change(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x[place] = value
        return x

    return change


MODALITY_KEYS = [f"{m}_{split}" for m in ("image", "text") for split in COUNTS]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_set("image_test", _at((7, 1), np.nan)), "image_test: row 7 holds nan; leave that example out"),
        (_set("image_test", _at((7, 1), -np.inf)), "image_test: row 7 holds -inf"),
        (_set("image_test", _at((7, 1), 1e300)), r"image_test: row 7 holds 1e\+300, beyond the range of float32"),
        (_set("image_test", lambda x: x[:3]), "text_test has 20 rows and image_test has 3"),
        (_set("target_test", lambda x: x[:3]), "target_test has 3 rows and image_test has 20"),
        (_set("id_test", lambda x: x[:3]), "id_test has 3 rows and image_test has 20"),
        (_set("group_test", np.arange(3)), "group_test has 3 rows and image_test has 20"),
        (_set("image_test", lambda x: x[:, :2]), "image has different widths: 5 in train, 5 in dev, 2 in test"),
        (
            _set("image_test", lambda x: x[:, None]),
            r"shape \(20, 1, 5\), a sequence per example; .*mmfusion.data.pooling",
        ),
        (_set("image_test", lambda x: x[:0]), r"image_test: has shape \(0, 5\)"),
        (_set("image_test", lambda x: x[:, :0]), r"image_test: has shape \(20, 0\)"),
        (_set("image_test", np.array(3.0)), r"image_test: has shape \(\); expected \(N, d\)"),
        (_set("image_test", lambda x: x + 1j), "image_test: holds complex64, not real numbers"),
        (_set("image_test", lambda x: x.astype(str)), "image_test: holds texts, which must be encoded first"),
        (_set("image_test", lambda x: x.astype("M8[s]")), "image_test: holds datetime64"),
        (_drop("image_test"), "has no image_test, and train has that modality"),
        (_set("audio_test", np.ones((20, 2))), "audio_test is not in train"),
        (_drop(*MODALITY_KEYS), "has no modality beside target, id"),
        (_drop("target_train"), "has no target 'target_train', its keys are image, text, id; name it with --target"),
        (_drop("target_dev"), "dev has no target, and models are selected on it"),
        (_set("image", np.ones((3, 2))), "'image' names no split, as other keys do; leave it out with --ignore"),
        (_set("image_valid", np.ones((10, 5))), "'image_valid' is a second dev split of 'image'"),
        (_set("id_test", lambda x: np.where(x == "test-9", "test-2", x)), "id_test has 'test-2' in rows 2 and 9"),
        (_set("id_test", np.ones(20)), r"id_test: has shape \(20,\) of float64; expected \(N,\) texts or whole"),
        (_set("target_train", np.ones(40)), "train has no example of class '0', which is in dev and test"),
        (_set("target_dev", np.ones(10, int)), "dev has no example of class '0'"),
        (_set("target_test", np.full(20, 2)), "train has no example of class '2', which is in test"),
        (_set("target_test", lambda x: x.astype(str)), "target: holds texts in test and numbers in train"),
        (_set("target_test", np.ones((20, 2))), "target: has 2 columns in test and 1 columns in train"),
        (_set("target_test", _at((4,), np.nan)), "target_test: row 4 holds nan"),
        (_set("target_test", lambda x: x[:0]), r"target_test: has shape \(0,\)"),
        (_set("target_test", lambda x: x + 0j), "target_test: is of type complex128"),
        (_set("target_names", np.array(["a", "b"])), "target_names holds 2 names for 1 columns of target"),
    ],
)
def test_mistakes_in_a_file_with_splits_are_one_line(tmp_path, spoil, words):
    arrays = with_splits()
    spoil(arrays)
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(InputError, match=words) as caught:
        load_arrays(ArraysConfig(tmp_path / "mine.npz"))
    assert str(tmp_path / "mine.npz") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (_drop(), {}, r"has no splits \(its keys are a, b, target\); give --folds K or --hold-out SHARE"),
        (_drop(), {"folds": 2, "hold_out": 0.1}, "--folds 2 and --hold-out 0.1: give one of the two"),
        (_drop(), {"folds": 1}, "--folds 1: give a number from 2 to 1000"),
        (_drop(), {"hold_out": 1.0}, "--hold-out 1.0: give a number from 0.01 to 0.9"),
        (_drop(), {"hold_out": float("nan")}, "--hold-out nan"),
        (_drop(), {"folds": 61}, "--folds 61: .* has 60 examples; give at most as many"),
        (_set("group", np.arange(60) // 20), {"folds": 4}, "--folds 4: .* has 3 groups"),
        (_set("group", np.zeros(60, int)), {"hold_out": 0.2}, "cannot be cut: it is one group only"),
        (_set("group", np.arange(60) % 3), {"hold_out": 0.2}, "no cut by whole groups leaves both parts their classes"),
        (_drop("target"), {"folds": 2}, "has no target 'target', its keys are a, b; name it with --target"),
        (lambda x: x.update(label=x.pop("target")), {"folds": 2}, "name it with --target label"),
        (_set("target", np.zeros(60)), {"folds": 2}, "all values are '0'; at least two classes are needed"),
        (_set("target", np.zeros((60, 2))), {"folds": 2}, "all targets of train are the same"),
        (
            _set("target", np.arange(60) // 59),
            {"folds": 2},
            "class '1' has one example only; add examples, or leave that class out",
        ),
        (
            _set("target", np.arange(60) // 58),
            {"folds": 2},
            "class '1' has one example there, and each part",
        ),
        (_drop(), {"folds": 2, "ignore": ("b", "gps")}, "--ignore gps: .* has no such key; it has a, b, target"),
        (_drop(), {"folds": 2, "modalities": ("a", "b", "a")}, "--modalities: names a twice"),
        (_drop(), {"folds": 2, "task": "binary"}, "has 3 distinct values; binary takes two"),
        (_drop(), {"folds": 2, "task": "multilabel"}, r"target: has shape \(60,\) and values from 0 to 2; multilabel"),
        (_set("target", np.array(["a", "b"] * 30)), {"folds": 2, "task": "regression"}, "texts, which are classes"),
        (_set("target", np.arange(60) / 7), {"folds": 2, "task": "multiclass"}, "holds fractions such as"),
        (_set("target", np.ones((60, 2))), {"folds": 2, "task": "binary"}, "rows with exactly one 1"),
        (_set("target", np.array([["a", "b"]] * 60)), {"folds": 2}, "holds texts, which are classes"),
        (_set("target", np.geomspace(1, 1e300, 60)), {"folds": 2}, "beyond the range of float32"),
        (_drop(), {"folds": 2, "task": "ordinal"}, "task 'ordinal' does not exist"),
        (_drop(), {"folds": 2, "modalities": ("c",)}, "has no modality 'c'; choose from a, b"),
        (_drop(), {"folds": 2, "modalities": ("target",)}, "has no modality 'target'"),
        (_drop(), {"folds": 2, "ignore": ("a", "b", "target")}, "holds no arrays but those of --ignore"),
        (lambda x: x.update(target_test=x.pop("target")), {"folds": 2}, "has 'target_test' and no train split"),
    ],
)
def test_mistakes_in_a_file_without_splits_are_one_line(tmp_path, spoil, options, words):
    arrays = without_splits()
    spoil(arrays)
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(InputError, match=words) as caught:
        load_arrays(ArraysConfig(tmp_path / "mine.npz", **options))
    assert "\n" not in str(caught.value)


def test_splits_of_the_file_and_of_a_flag_do_not_go_together():
    with pytest.raises(InputError, match=r"--folds 3: the arrays has splits of its own \(train, dev, test\)"):
        in_memory(with_splits(), folds=3)


def _header(claim: int) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({claim},), }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _write(folder: Path, name: str, content: bytes | None) -> Path:
    path = folder / name
    if content is None:
        os.mkfifo(path)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return path


def _safetensors(shape: str, end: int) -> bytes:
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}'.encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.npz", b"", r"no such file\); give an .npz, a folder"),
        ("x.csv", b"1,2", "is of a kind that is not read; give an .npz, a folder of .npy files, or .safetensors"),
        ("x.npz", b"PK\x03\x04", "is not a readable .npz"),
        ("x.npz", _header(1), "is one array, not an .npz"),
        ("x.npz", None, "is a FIFO"),
        ("x.safetensors", None, "is a FIFO"),
        ("x.safetensors", b"", "is not a whole .safetensors"),
        ("x.safetensors", _safetensors("[4]", 16)[:-3], "is not a whole .safetensors"),
        ("x.safetensors", _safetensors(f"[{2**60}]", 16), "is not a whole .safetensors"),
        ("x.safetensors", _safetensors(f"[{2**60}]", 2**62), "is not a whole .safetensors"),
        ("x.safetensors", struct.pack("<Q", 2**60) + b"{}", "is not a whole .safetensors"),
        ("folder/a.txt", b"", "holds no .npy file"),
        (
            "folder/a.npy",
            _header(2**60),
            r"a.npy: is not a readable array .*says that it has shape \(1152921504606846976,\)",
        ),
        ("folder/a.npy", _header(4) + bytes(15), "says that it has shape"),
        ("folder/a.npy", b"", "is not a readable array"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, name, content, words):
    path = _write(tmp_path, name, content)
    if name.startswith("missing"):
        path.unlink()
    with pytest.raises(InputError, match=words) as caught:
        load_arrays(ArraysConfig(path.parent if name.startswith("folder") else path, folds=2))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_fifo_within_a_folder_and_objects_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(InputError, match=r"a\.npy: cannot be read \(is a FIFO"):
        load_arrays(ArraysConfig(tmp_path, folds=2))
    np.savez(tmp_path / "x.npz", a=np.array([1, "b"], object))
    with pytest.raises(InputError, match=r"holds Python objects.*save it with \.astype\(str\) \(texts\) or as numbers"):
        load_arrays(ArraysConfig(tmp_path / "x.npz", folds=2))
    with pytest.raises(InputError, match="the arrays: a: holds Python objects"):
        in_memory({"a": np.array([1, "b"], object)}, folds=2)
    with pytest.raises(InputError, match=r"the arrays: a: is no array of NumPy .*; rows need one length"):
        in_memory({"a": [[1.0], [1.0, 2.0]]}, folds=2)
    with pytest.raises(InputError, match="--data: own arrays need the path"):
        load_arrays(ArraysConfig())
    with pytest.raises(InputError, match="the arrays: holds no arrays"):
        in_memory({}, folds=2)


def test_keys_with_line_breaks_stay_within_one_line():
    strange = {"a\nb\x1b[2J": np.full((4, 2), np.nan)}
    for arrays in (strange | {"y\n": np.arange(4)}, strange | {"target": np.arange(4) % 2}):
        with pytest.raises(InputError) as caught:
            in_memory(arrays, folds=2)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    with pytest.raises(InputError, match=r"modality 'a\.b' has a name of other signs"):
        in_memory(without_splits() | {"a.b": np.ones(60)}, folds=2)
    with pytest.raises(InputError, match="modality 'values' has a name that PyTorch"):
        in_memory(without_splits() | {"values": np.ones(60)}, folds=2)


# ---- the registry, and real data -------------------------------------------------------------------------------------


def test_the_registry_loads_arrays_by_flags(tmp_path):
    np.savez(tmp_path / "mine.npz", **without_splits())
    flags = f"--dataset arrays --data {tmp_path / 'mine.npz'} --folds 3 --modalities b --task regression --split-seed 2"
    options = parse(DataOptions, flags.split())
    datasets = load_datasets(options)
    assert [dataset.task for dataset in datasets] == ["regression"] * 3
    assert datasets[0].name == "mine" and list(datasets[0].input_dims) == ["b"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--dataset arrays --data x.npz --folds folds.json",
            "--folds folds.json: with --dataset arrays, give a number",
        ),
        ("--dataset mustard --data x.json --folds 5", "--folds 5: mustard has folds of its own; give their file"),
        ("--dataset arrays", "--data: --dataset arrays needs the path"),
    ],
)
def test_folds_are_a_number_of_arrays_and_a_file_of_mustard(flags, words):
    with pytest.raises(InputError, match=words):
        load_datasets(parse(DataOptions, flags.split()))


@needs_data
@pytest.mark.parametrize(
    ("name", "options", "task", "classes", "count"),
    [
        ("mfeat_digits", {"target": "digit", "folds": 5}, "multiclass", 10, 2000),
        ("snareseq_cells", {"target": "cell_type", "folds": 4}, "multiclass", 4, 1047),
        ("photo_tweets_vectors", {}, "binary", 2, 3000),
        ("cmu_mosi_utterances", {"target": "label"}, "binary", 2, 2199),
    ],
)
def test_real_data_are_loaded_and_pooled(name, options, task, classes, count):
    datasets = load_arrays(ArraysConfig(DATA / f"{name}.npz", **options))
    assert (datasets[0].name, datasets[0].task, len(datasets[0].class_names)) == (name, task, classes)
    data = fold_datasets(datasets)
    assert len(data.pool) == count
    if "folds" in options:
        assert sorted(data.test_rows.tolist()) == list(range(count))
        sizes = [torch.bincount(dataset.splits["test"].target.long()) for dataset in datasets]
        assert (torch.stack(sizes).max(0).values - torch.stack(sizes).min(0).values).max() <= 1  # each class alike
