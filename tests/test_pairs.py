"""Pairs without labels: cuts, refusals, and which experiments take them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import alignment, baselines, recipe_search
from experiments.experiment import run
from mmfusion.cli import run_command
from mmfusion.data.pairs import load_pairs
from mmfusion.data.registry import DataOptions, load_datasets, load_folded
from mmfusion.errors import InputError

N = 41


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pairs.npz in the working folder: column 0 of both modalities is the number of the example."""
    monkeypatch.chdir(tmp_path)
    return write("pairs.npz", b=numbered(5), a=numbered(3))


def numbered(width: int, n: int = N) -> np.ndarray:
    return np.arange(n)[:, None] + np.linspace(0, 0.5, width)


def write(path: str, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return Path(path)


def rows_of(dataset, part: str) -> list[int]:
    return dataset.splits[part].features["a"][:, 0].int().tolist()


# ---- cuts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hold_out", "sizes"), [(0.5, (19, 2, 20)), (0.1, (33, 4, 4)), (0.25, (28, 3, 10))])
def test_each_cut_is_a_partition_of_the_sizes_asked_for(file, hold_out, sizes):
    for dataset in load_pairs(file, (), splits=3, hold_out=hold_out):
        parts = [rows_of(dataset, part) for part in ("train", "dev", "test")]
        assert tuple(map(len, parts)) == sizes
        assert sorted(itertools.chain(*parts)) == list(range(N))
        assert all(part == sorted(part) for part in parts)


def test_rows_of_all_modalities_stay_together_and_name_their_example(file):
    for k, dataset in enumerate(load_pairs(file, (), splits=2)):
        assert list(dataset.splits["train"].features) == ["a", "b"]
        for part, split in dataset.splits.items():
            rows = rows_of(dataset, part)
            assert split.features["b"][:, 0].int().tolist() == rows
            assert split.metadata["group"] == [str(row) for row in rows]
            assert split.ids == [f"{row} of cut {k}" for row in rows]


def test_cuts_differ_from_each_other_and_come_again_with_the_seed(file):
    first, again, other = (load_pairs(file, (), splits=3, seed=seed) for seed in (4, 4, 5))
    tested = [tuple(rows_of(dataset, "test")) for dataset in (*first, *other)]
    assert len(set(tested)) == 6
    assert [rows_of(dataset, "test") for dataset in again] == [list(rows) for rows in tested[:3]]
    assert rows_of(load_pairs(file, (), splits=1, seed=4)[0], "dev") == rows_of(first[0], "dev")


def test_modalities_are_those_named_or_all_matrices_of_numbers(file):
    more = {"c": numbered(2), "name": np.array(["x"] * N), "number": np.arange(N), "steps": np.zeros((N, 2, 2))}
    write("more.npz", a=numbered(3), **more)
    assert load_pairs(Path("more.npz"), ())[0].input_dims == {"a": 3, "c": 2}
    assert load_pairs(Path("more.npz"), ("number", "a"))[0].input_dims == {"a": 3, "number": 1}


def test_folding_keeps_every_cut_and_that_there_are_no_labels(file):
    data = load_folded(DataOptions("pairs", file, folds=3, hold_out=0.25))
    assert not data.labelled and "no labels" in data.notes[0]
    assert len(data.folds) == 3 and len(data.test_rows) == 30
    for fold in data.folds:
        examples = data.pool.features["a"][torch.cat(list(fold)), 0].int().tolist()
        assert sorted(examples) == list(range(N))


def test_flags_reach_the_cuts(file):
    assert [len(d.splits["test"]) for d in load_datasets(DataOptions("pairs", file))] == [20]
    datasets = load_datasets(DataOptions("pairs", file, folds=2, hold_out=0.1, split_seed=3))
    expected = load_pairs(file, (), splits=2, hold_out=0.1, seed=3)
    assert [rows_of(d, "test") for d in datasets] == [rows_of(d, "test") for d in expected]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "modalities", "words"),
    [
        ({}, ("a", "q"), "x.npz: has no array 'q'; it holds a, b"),
        ({}, ("a",), "two modalities or more, found a"),
        ({}, ("a", "a"), "--modalities a a: name each once"),
        ({"b": np.arange(N)}, (), "two modalities or more, found a"),
        ({"b": numbered(2, 40)}, (), "a has 41 rows, b has 40 rows; row i"),
        ({"b": np.where(numbered(2) == 7, np.nan, numbered(2))}, (), "b: row 7 holds nan"),
        ({"b": np.array([["x"]] * N)}, ("a", "b"), "b: holds texts"),
        ({"b": np.zeros((N, 2, 2))}, ("a", "b"), "a sequence per example"),
        ({"keys": numbered(2)}, (), "modality 'keys' has a name that PyTorch"),
        ({"x.y": numbered(2)}, (), "modality 'x.y' has a name of other signs"),
        ({"a": numbered(2, 5), "b": numbered(2, 5)}, (), "has 5 examples, too few to hold out 0.5"),
    ],
)
def test_a_file_that_gives_no_pairs_is_one_line(file, arrays, modalities, words):
    write("x.npz", **{"a": numbered(3), "b": numbered(2)} | arrays)
    with pytest.raises(InputError) as caught:
        load_pairs(Path("x.npz"), modalities)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_six_examples_are_the_fewest(file):
    write("six.npz", a=numbered(2, 6), b=numbered(2, 6))
    sizes = {part: len(split) for part, split in load_pairs(Path("six.npz"), (), hold_out=0.34)[0].splits.items()}
    assert sizes == {"train": 2, "dev": 2, "test": 2}


@pytest.mark.parametrize(("splits", "hold_out"), [(0, 0.5), (1, 0.0), (1, 1.0), (1, float("nan"))])
def test_cuts_that_cannot_be_are_programming_errors(file, splits, hold_out):
    with pytest.raises(ValueError, match="at least 1, and a share between 0 and 1"):
        load_pairs(file, (), splits, hold_out)


def refused(capsys, command, *arguments: object) -> str:
    """Exit code 2, one line, nothing written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        command([str(part) for part in arguments])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert sorted(Path().rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--folds", 0), "--folds 0: give a number from 1 to 1000"),
        (("--folds=-1",), "--folds -1: give a number from 1"),
        (("--folds", "cuts.json"), "cuts.json: with --dataset pairs, give a number"),
        (("--hold-out", 0), "--hold-out 0.0: give a number from 0.01 to 0.99"),
        (("--hold-out", 1.5), "--hold-out 1.5: give a number from 0.01"),
        (("--hold-out", "nan"), "--hold-out nan: give a number from 0.01"),
        (("--split-seed=-1",), "--split-seed -1: give a number from 0"),
        (("--target", "a"), "--target: has no use with --dataset pairs"),
        (("--width", 0), "--width 0: give a number from 1"),
        (("--rate", "nan"), "--rate nan: give a number from 1e-09 to 1"),
        (("--identity",), "--identity: modalities have widths a 3, b 5; all must be --width 32"),
        (("--modalities", "a"), "two modalities or more, found a"),
    ],
)
def test_flags_out_of_range_are_one_line_that_names_them(file, capsys, flags, words):
    line = refused(capsys, lambda given: run(alignment.EXPERIMENT, given), "--dataset", "pairs", "--data", file, *flags)
    assert words in line


def test_questions_about_labels_are_refused_in_one_line(file, capsys):
    data = ("--dataset", "pairs", "--data", file)
    line = refused(capsys, lambda given: run(baselines.EXPERIMENT, given), *data)
    assert "--dataset pairs: has no labels; baselines needs some" in line
    search = lambda given: run_command(recipe_search.main, recipe_search.Config, given)  # noqa: E731
    assert "--dataset pairs: has no labels" in refused(capsys, search, *data)
