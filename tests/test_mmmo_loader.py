"""ICT-MMMO as released: audio_*, video_* (N, 20, d) and label_* (N,) for train, dev and test."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfusion.data.mmmo import load_mmmo
from mmfusion.data.pom import load_pom
from mmfusion.data.registry import DataOptions, load_datasets, load_folded
from mmfusion.errors import InputError

COUNTS = {"train": 6, "dev": 3, "test": 4}


def _arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in COUNTS.items():
        arrays[f"audio_{split}"] = rng.normal(size=(count, 20, 4)).astype(np.float32)
        arrays[f"video_{split}"] = rng.normal(size=(count, 20, 3)).astype(np.float32)
        arrays[f"label_{split}"] = (rng.integers(2, 11, count) / 2).astype(np.float32)
    return arrays | changes


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(folder / "mmmo.npz", **arrays)
    return folder / "mmmo.npz"


def test_splits_and_targets(tmp_path):
    arrays = _arrays()
    dataset = load_mmmo(_write(tmp_path, arrays))
    assert (dataset.name, dataset.task, dataset.selection, dataset.label_range) == ("mmmo", "regression", "dev", (1, 5))
    assert {name: len(split) for name, split in dataset.splits.items()} == COUNTS
    assert dataset.target_names == [] and dataset.notes == []
    np.testing.assert_array_equal(dataset.splits["dev"].target, arrays["label_dev"])
    assert dataset.input_dims == {"audio": 4, "video": 3} and dataset.output_dim == 1


def test_a_split_called_valid_and_labels_in_a_column_are_taken_too(tmp_path):
    arrays = _arrays()
    named = {key.replace("_dev", "_valid"): x for key, x in arrays.items()}
    named["label_train"] = named["label_train"][:, None]
    dataset, other = load_mmmo(_write(tmp_path, named)), load_mmmo(_write(tmp_path, arrays))
    for name, split in dataset.splits.items():
        assert torch.equal(split.target, other.splits[name].target)
        assert torch.equal(split.features["audio"], other.splits[name].features["audio"])


@pytest.mark.parametrize("value", [255.0, -255.0])
def test_what_was_not_measured_is_missing_in_audio_alone(tmp_path, value):
    arrays = _arrays()
    for modality in ("audio", "video"):
        arrays[f"{modality}_test"][1, 5, 2] = value
    path = _write(tmp_path, arrays)
    pooled, steps = load_mmmo(path), load_mmmo(path, "steps")
    others = np.delete(arrays["audio_test"][1, :, 2], 5).mean()
    assert pooled.splits["test"].features["audio"][1, 2] == pytest.approx(others, rel=1e-5)
    assert steps.splits["test"].features["audio"][1][5, 2] == pytest.approx(others, rel=1e-5)
    assert steps.splits["test"].features["video"][1][5, 2] == value
    for dataset in (pooled, steps):
        (note,) = dataset.notes
        assert note == "audio: 1 values of -255 or 255, which stand for not measured, were taken as missing"


def test_values_near_it_were_measured(tmp_path):
    arrays = _arrays()
    arrays["audio_train"][0, 0, :2] = 254.5, -254.5
    dataset = load_mmmo(_write(tmp_path, arrays), "steps")
    assert dataset.splits["train"].features["audio"][0][0, :2].tolist() == [254.5, -254.5] and dataset.notes == []


def test_values_that_are_not_finite_have_a_note_of_their_own(tmp_path):
    arrays = _arrays()
    arrays["audio_train"][0, 0, :2] = np.nan, 255
    notes = load_mmmo(_write(tmp_path, arrays)).notes
    assert notes[0] == "audio: 1 values that were not finite were taken as missing" and "1 values of -255" in notes[1]


@pytest.mark.parametrize("value", [0.9, 5.1, np.nan])
def test_labels_off_the_scale_are_refused(tmp_path, value):
    arrays = _arrays()
    arrays["label_test"][2] = value
    with pytest.raises(InputError, match=r"mmmo\.npz: label_test: row 2 is .*; expected 1 to 5"):
        load_mmmo(_write(tmp_path, arrays))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda arrays: arrays.pop("audio_train"), "no array 'audio_train'"),
        (lambda arrays: arrays.pop("label_dev"), "no array 'label_valid'"),
        (lambda arrays: arrays.update(label_test=np.ones((4, 2))), r"label_test has shape \(4, 2\); expected \(N,\)"),
        (lambda arrays: arrays.update(label_test=np.ones(0)), "label_test has shape"),
        (
            lambda arrays: arrays.update(audio_test=arrays["audio_test"][:2]),
            r"\(2, 20, 4\); expected \(4, T, d\), as there are label",
        ),
        (lambda arrays: arrays.update(video_test=arrays["video_test"][..., :2]), "video has different widths"),
    ],
)
@pytest.mark.parametrize("manner", ["mean_std", "steps"])
def test_wrong_layouts_end_in_one_line(tmp_path, spoil, words, manner):
    arrays = _arrays()
    spoil(arrays)
    path = _write(tmp_path, arrays)
    with pytest.raises(InputError, match=words) as caught:
        load_mmmo(path, manner)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_the_files_of_pom_and_mmmo_are_not_each_others(tmp_path):
    with pytest.raises(InputError, match="no array 'traits_train'"):
        load_pom(_write(tmp_path, _arrays()))


def test_by_flags_as_vectors_and_as_steps(tmp_path):
    path = _write(tmp_path, _arrays())
    vectors, steps = (load_folded(DataOptions("mmmo", path, tokens=tokens)) for tokens in (False, True))
    assert {name: tuple(x.shape) for name, x in vectors.pool.features.items()} == {"audio": (13, 8), "video": (13, 6)}
    assert {name: x.shape for name, x in steps.pool.features.items()} == {"audio": (13, 20, 4), "video": (13, 20, 3)}
    assert [len(rows) for rows in steps.folds[0]] == [6, 3, 4] and steps.label_range == (1, 5)


@pytest.mark.skipif("FUSION_DATA" not in os.environ, reason="FUSION_DATA names no folder with mmmo_sequences.npz")
def test_the_released_file():
    path = Path(os.environ["FUSION_DATA"]) / "mmmo_sequences.npz"
    (steps,), (vectors,) = (load_datasets(DataOptions("mmmo", path, tokens=tokens)) for tokens in (True, False))
    assert [len(split) for split in steps.splits.values()] == [220, 40, 80]
    assert steps.input_dims == {"audio": 74, "video": 36} and vectors.input_dims == {"audio": 148, "video": 72}
    assert steps.notes == vectors.notes
    assert steps.notes[0].startswith("audio: 538 values of -255 or 255")
    for name, split in steps.splits.items():
        for modality, x in split.features.items():
            mean = vectors.splits[name].features[modality][:, : x.width]
            torch.testing.assert_close(x.pooled(), mean, rtol=1e-4, atol=1e-4)
