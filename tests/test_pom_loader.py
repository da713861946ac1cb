"""POM as released: audio_*, video_* (N, 20, d) and traits_* (N, 17) for train, valid and test."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfusion.data.pom import load_pom
from mmfusion.errors import InputError


def _arrays(counts: tuple[int, int, int] = (6, 3, 4)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        arrays[f"audio_{split}"] = rng.normal(size=(count, 20, 4)).astype(np.float32)
        arrays[f"video_{split}"] = rng.normal(size=(count, 20, 3)).astype(np.float32)
        arrays[f"traits_{split}"] = rng.uniform(1, 7, (count, 17)).astype(np.float32)
    return arrays


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(folder / "pom.npz", **arrays)
    return folder / "pom.npz"


def test_splits_targets_and_names(tmp_path):
    arrays = _arrays()
    dataset = load_pom(_write(tmp_path, arrays))
    assert (dataset.name, dataset.task, dataset.selection, dataset.label_range) == ("pom", "regression", "dev", (1, 7))
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 6, "dev": 3, "test": 4}
    assert dataset.target_names == [f"trait_{number}" for number in range(1, 18)]
    assert dataset.notes == []
    np.testing.assert_array_equal(dataset.splits["dev"].target, arrays["traits_valid"])
    for split in dataset.splits.values():
        assert len(set(split.ids)) == len(split)
        assert {x.dtype for x in split.features.values()} == {torch.float32}


@pytest.mark.parametrize(("pooling", "dims"), [("mean", (4, 3)), ("mean_std", (8, 6))])
def test_pooling_sets_the_widths_and_leaves_padding_out(tmp_path, pooling, dims):
    arrays = _arrays()
    arrays["audio_test"][:, :5] = 0
    dataset = load_pom(_write(tmp_path, arrays), pooling)
    assert tuple(dataset.input_dims.values()) == dims
    mean = arrays["audio_test"][:, 5:].mean(1)
    np.testing.assert_allclose(dataset.splits["test"].features["audio"][:, :4], mean, rtol=1e-5, atol=1e-6)
    assert pooling in dataset.provenance["pooling"]


def test_missing_video_and_values_are_noted(tmp_path):
    arrays = _arrays()
    arrays["video_train"][0] = 0
    arrays["audio_test"][0, 0, 0] = -np.inf
    notes = " ".join(load_pom(_write(tmp_path, arrays)).notes)
    assert "video: 1 of 13 examples" in notes
    assert "audio: 1 values" in notes


def test_a_rating_just_outside_is_kept_and_noted(tmp_path):
    arrays = _arrays()
    arrays["traits_test"][1, 8] = 2 / 3  # as in the released file
    dataset = load_pom(_write(tmp_path, arrays))
    assert dataset.splits["test"].target[1, 8] == pytest.approx(2 / 3)
    assert any("1 ratings lie outside" in note for note in dataset.notes)


def _without(key: str):
    return lambda arrays: arrays.pop(key)


def _set(key: str, change):
    return lambda arrays: arrays.update({key: change(arrays[key])})


def _spoil(value: float):
    def change(traits: np.ndarray) -> np.ndarray:
        traits[2, 3] = value
        return traits

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without("audio_train"), "no array 'audio_train'"),
        (_without("traits_valid"), "no array 'traits_valid'"),
        (_set("traits_test", lambda x: x[:, :5]), r"traits_test has shape \(4, 5\)"),
        (_set("traits_test", lambda x: x[:0]), "traits_test has shape"),
        (_set("audio_test", lambda x: x[:, 0]), r"audio_test has shape \(4, 4\); expected \(4, T, d\)"),
        (_set("audio_test", lambda x: x[:2]), r"audio_test has shape \(2, 20, 4\); expected \(4, T, d\)"),
        (_set("video_test", lambda x: x[..., :2]), "video has different widths"),
        (_set("video_test", lambda x: x.astype(str)), "video_test: is of type"),
        (_set("traits_train", _spoil(9)), "trait 4 of row 2 is 9"),
        (_set("traits_train", _spoil(np.nan)), "trait 4 of row 2 is nan"),
    ],
)
def test_wrong_layouts_end_in_one_line(tmp_path, spoil, words):
    arrays = _arrays()
    spoil(arrays)
    path = _write(tmp_path, arrays)
    with pytest.raises(InputError, match=words) as caught:
        load_pom(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_pooling_is_refused(tmp_path):
    with pytest.raises(InputError, match="pooling 'max'"):
        load_pom(_write(tmp_path, _arrays()), "max")


@pytest.mark.skipif("FUSION_DATA" not in os.environ, reason="FUSION_DATA names no folder with pom_audio_video.npz")
def test_the_released_file():
    dataset = load_pom(Path(os.environ["FUSION_DATA"]) / "pom_audio_video.npz")
    assert [len(split) for split in dataset.splits.values()] == [600, 100, 203]
    assert dataset.input_dims == {"audio": 43, "video": 41}
    assert "video: 486 of 903 examples" in dataset.notes[0]
