"""CMU-MOSI and its kin, in each layout in which they are released."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfusion.data.cmu_mosi import load_cmu_mosi
from mmfusion.dataset import Dataset
from mmfusion.errors import InputError

COUNTS = {"train": 24, "valid": 8, "test": 10}
WIDTHS = {"text": 6, "audio": 5, "vision": 4}
STEPS = {"text": 12, "audio": 15, "vision": 9}


def _graded(rng: np.random.Generator, count: int) -> np.ndarray:
    labels = np.round(rng.uniform(-3, 3, count), 1)
    labels[:3] = 1.2, -1.2, 0.0
    return labels


def _sequences(rng: np.random.Generator, count: int, steps: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Padded at the end, with their lengths."""
    lengths = rng.integers(2, steps + 1, count)
    x = rng.normal(size=(count, steps, width)).astype(np.float32)
    x[np.arange(steps) >= lengths[:, None]] = 0
    return x, lengths


def mmsa(aligned: bool = False) -> dict[str, dict[str, object]]:
    """The layout of MMSA's aligned_50.pkl and unaligned_50.pkl."""
    rng = np.random.default_rng(0)
    content = {}
    for split, count in COUNTS.items():
        table: dict[str, object] = {"raw_text": np.array([f"words {row}" for row in range(count)], object)}
        for key, width in WIDTHS.items():
            table[key], lengths = _sequences(rng, count, STEPS[key], width)
            if key == "text":
                mask = (np.arange(STEPS[key]) < lengths[:, None]).astype(np.float32)
                table["text_bert"] = np.stack([mask * 101, mask, mask * 0], 1)
            elif not aligned:
                table[f"{key}_lengths"] = lengths.tolist()
        table["id"] = np.array([f"{split}-v_{row // 3}$_${row % 3}" for row in range(count)])
        table["regression_labels"] = _graded(rng, count)
        table["classification_labels"] = np.sign(table["regression_labels"])
        table["annotations"] = np.array(["Neutral"] * count)
        content[split] = table
    return content


def multibench(labels: str = "mosi") -> dict[str, dict[str, object]]:
    """The layout of MultiBench's pickles: padded at the front, no lengths."""
    rng = np.random.default_rng(1)
    content = {}
    for split, count in COUNTS.items():
        table: dict[str, object] = {}
        for key, width in WIDTHS.items():
            table[key] = _sequences(rng, count, 10, width)[0][:, ::-1].astype(np.float64)
        table["id"] = [f"{split}v{row // 3}[{row % 3}]" for row in range(count)]
        table["labels"] = _graded(rng, count).reshape(-1, 1, 1)
        if labels == "mosei":
            table["labels"] = np.concatenate([table["labels"], np.full((count, 1, 6), 9.0)], 2)
        elif labels == "humor":
            table |= {"labels": np.arange(count).reshape(-1, 1) % 2, "id": np.arange(count).reshape(-1, 1)}
        elif labels == "sarcasm":
            table |= {
                "labels": np.arange(count).reshape(-1, 1, 1) % 2 * 2 - 1,
                "id": [f"1_{row}" for row in range(count)],
            }
        content[split] = table
    return content


def _write(folder: Path, content: object, name: str = "unaligned_50.pkl", protocol: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder / name


def _write_npz(folder: Path, change=lambda arrays: None) -> Path:
    rng = np.random.default_rng(2)
    arrays = {}
    for split, count in {"train": 60, "test": 20}.items():
        for key, width in {"text": 7, "audio": 5, "video": 3}.items():
            arrays[f"{key}_{split}"] = rng.normal(size=(count, width)).astype(np.float32)
        arrays[f"label_{split}"] = np.arange(count) % 2
        arrays[f"id_{split}"] = np.array([f"{split}_vid{row // 4}_{row % 4}" for row in range(count)])
        arrays[f"transcript_{split}"] = np.array([f"WORDS {row}" for row in range(count)])
    change(arrays)
    np.savez(folder / "mosi.npz", **arrays)
    return folder / "mosi.npz"


def test_mmsa_is_a_regression_with_its_own_splits(tmp_path):
    content = mmsa()
    dataset = load_cmu_mosi(_write(tmp_path, content))
    assert (dataset.name, dataset.task, dataset.selection) == ("cmu_mosi", "regression", "dev")
    assert dataset.label_range == (-3, 3)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 24, "dev": 8, "test": 10}
    assert dataset.input_dims == {"text": 12, "audio": 10, "video": 8}
    assert dataset.notes == []
    train = dataset.splits["train"]
    np.testing.assert_allclose(train.target, content["train"]["regression_labels"], rtol=1e-6)
    assert train.ids[:2] == ["train-v_0$_$0", "train-v_0$_$1"]
    assert train.metadata["group"][2:4] == ["train-v_0", "train-v_1"]
    assert train.metadata["transcript"][0] == "words 0"
    assert {x.dtype for x in [*train.features.values(), train.target]} == {torch.float32}


@pytest.mark.parametrize("key", list(WIDTHS))
def test_mmsas_steps_are_those_of_the_lengths(tmp_path, key):
    content = mmsa()
    table = content["train"]
    # a zero step within the length, and rubbish beyond the attention mask
    table[key][:, 0] = 0
    lengths = table["text_bert"][:, 1].sum(1).astype(int) if key == "text" else table[f"{key}_lengths"]
    features = load_cmu_mosi(_write(tmp_path, content)).splits["train"].features["video" if key == "vision" else key]
    x = [one[:length] for one, length in zip(table[key], lengths, strict=True)]
    np.testing.assert_allclose(features[:, : WIDTHS[key]], [one.mean(0) for one in x], atol=1e-6)
    np.testing.assert_allclose(features[:, WIDTHS[key] :], [one.std(0) for one in x], atol=1e-6)


def test_lengths_that_do_not_fit_are_noted(tmp_path):
    content = mmsa()
    content["test"]["audio"][:] = 1
    content["test"]["audio_lengths"][0] = 3
    content["test"]["audio_lengths"][1:] = [15] * 9
    assert any("test: audio: lengths of 1 examples" in note for note in load_cmu_mosi(_write(tmp_path, content)).notes)


@pytest.mark.parametrize("layout", [lambda: mmsa(aligned=True), multibench])
def test_without_lengths_padding_is_what_is_all_zero(tmp_path, layout):
    content = layout()
    features = load_cmu_mosi(_write(tmp_path, content)).splits["dev"].features["audio"]
    x = [one[(one != 0).any(1)] for one in content["valid"]["audio"]]
    np.testing.assert_allclose(features[:, :5], [one.mean(0) for one in x], atol=1e-6)


@pytest.mark.parametrize("protocol", [2, 5])
def test_multibench_mosi_in_old_and_new_pickles(tmp_path, protocol):
    dataset = load_cmu_mosi(_write(tmp_path, multibench(), "mosi_raw.pkl", protocol))
    assert (dataset.name, dataset.task) == ("cmu_mosi", "regression")
    assert dataset.splits["test"].metadata["group"][:4] == ["testv0", "testv0", "testv0", "testv1"]


def test_mosei_takes_sentiment_from_seven_columns(tmp_path):
    content = multibench("mosei")
    dataset = load_cmu_mosi(_write(tmp_path, content, "mosei_raw.pkl"))
    assert dataset.name == "cmu_mosei"
    np.testing.assert_allclose(dataset.splits["train"].target, content["train"]["labels"][:, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [("humor", "ur_funny"), ("sarcasm", "mustard")])
def test_two_valued_labels_are_binary_and_their_ids_name_no_video(tmp_path, kind, name):
    dataset = load_cmu_mosi(_write(tmp_path, multibench(kind), f"{kind}.pkl"))
    assert (dataset.name, dataset.task, dataset.label_range) == (name, "binary", None)
    assert dataset.class_names == Dataset.class_names  # not known to be sentiment
    assert dataset.splits["train"].target.tolist() == [0.0, 1.0] * 12
    assert dataset.splits["train"].ids[:2] == (["0", "1"] if kind == "humor" else ["1_0", "1_1"])
    assert "group" not in dataset.splits["train"].metadata


def test_parts_of_an_id_are_joined(tmp_path):
    content = mmsa()
    for split, count in COUNTS.items():  # MulT: bytes, (N, 3)
        content[split]["id"] = np.array(
            [[f"{split}{row // 2}".encode(), b"0.5", str(row).encode()] for row in range(count)]
        )
    train = load_cmu_mosi(_write(tmp_path, content)).splits["train"]
    assert train.ids[1] == "train0|0.5|1"
    assert train.metadata["group"][1:3] == ["train0", "train1"]


def test_binary_on_graded_labels_is_polarity_without_zeros(tmp_path):
    content = mmsa()
    dataset = load_cmu_mosi(_write(tmp_path, content), "binary")
    labels = content["test"]["regression_labels"]
    np.testing.assert_array_equal(dataset.splits["test"].target, labels[labels != 0] > 0)
    assert (dataset.task, dataset.label_range) == ("binary", None)
    assert dataset.class_names == ("negative", "positive")
    zeros = int((labels == 0).sum())
    assert zeros > 0
    assert any(note.startswith(f"test: {zeros} of 10 utterances") for note in dataset.notes)
    assert len(dataset.splits["test"].ids) == len(dataset.splits["test"].metadata["transcript"]) == 10 - zeros


def test_values_that_are_not_finite_are_noted_by_modality(tmp_path):
    content = mmsa()
    content["train"]["audio"][0, 0, 0] = -np.inf
    content["test"]["audio"][0, 1, 0] = np.nan
    content["test"]["vision"][3] = 0
    content["test"].pop("vision_lengths")
    dataset = load_cmu_mosi(_write(tmp_path, content))
    assert "audio: 2 values that were not finite were taken as missing" in dataset.notes
    assert any(note.startswith("video: 1 of 42 examples") for note in dataset.notes)
    assert all(x.isfinite().all() for split in dataset.splits.values() for x in split.features.values())


def test_vectors_are_taken_as_they_are(tmp_path):
    content = mmsa()
    for split in COUNTS:
        content[split]["text"] = content[split]["text"][:, 0]
    content["train"]["text"][0] = 0
    dataset = load_cmu_mosi(_write(tmp_path, content))
    np.testing.assert_array_equal(dataset.splits["train"].features["text"], content["train"]["text"])
    assert dataset.notes == []


def test_lists_of_sequences_of_any_length(tmp_path):
    content = mmsa()
    ragged = [one[: 2 + row % 3] for row, one in enumerate(content["train"]["audio"])]
    content["train"]["audio"] = ragged
    features = load_cmu_mosi(_write(tmp_path, content)).splits["train"].features["audio"]
    np.testing.assert_allclose(features[:, :5], [one[(one != 0).any(1)].mean(0) for one in ragged], atol=1e-6)


def test_modalities_are_chosen_in_the_fixed_order(tmp_path):
    path = _write(tmp_path, mmsa())
    assert list(load_cmu_mosi(path, modalities=["video", "text"]).input_dims) == ["text", "video"]
    with pytest.raises(InputError, match="no modality 'vision'; choose from text, audio, video"):
        load_cmu_mosi(path, modalities=["vision"])


def test_name_comes_from_the_file_its_folders_or_the_caller(tmp_path):
    content = mmsa()
    assert load_cmu_mosi(_write(tmp_path / "MOSEI", content)).name == "cmu_mosei"
    assert load_cmu_mosi(_write(tmp_path, content, "mosei.pkl"), name="mine").name == "mine"


def test_without_a_dev_split_whole_videos_are_cut_from_train(tmp_path):
    content = mmsa()
    del content["valid"]
    dataset = load_cmu_mosi(_write(tmp_path, content))
    train, dev = dataset.splits["train"], dataset.splits["dev"]
    assert list(dataset.splits) == ["train", "dev", "test"]
    assert len(train) + len(dev) == 24
    assert not set(train.metadata["group"]) & set(dev.metadata["group"])
    assert any(note.startswith(f"no dev split: {len(dev)} of 24") for note in dataset.notes)


def test_repeated_ids_become_unique_and_keep_their_video(tmp_path):
    content = mmsa()
    content["train"]["id"][1] = content["train"]["id"][0]
    dataset = load_cmu_mosi(_write(tmp_path, content))
    assert dataset.splits["train"].ids[:2] == ["train-v_0$_$0", "train-v_0$_$0#2"]
    assert dataset.splits["train"].metadata["group"][1] == "train-v_0"
    assert any("train: 1 ids occur again" in note for note in dataset.notes)


def test_videos_shared_with_train_are_noted(tmp_path):
    content = mmsa()
    content["test"]["id"][0] = content["train"]["id"][0].replace("$_$0", "$_$77")
    assert "1 of 5 videos of test are also in train" in load_cmu_mosi(_write(tmp_path, content)).notes


def test_without_ids_rows_are_counted(tmp_path):
    content = mmsa()
    for table in content.values():
        table.pop("id")
        table.pop("raw_text")
    dataset = load_cmu_mosi(_write(tmp_path, content))
    assert dataset.splits["test"].ids[:2] == ["test_row_0", "test_row_1"]
    assert dataset.splits["test"].metadata == {}
    assert sum("no ids" in note for note in dataset.notes) == 3


def test_npz_of_utterance_vectors(tmp_path):
    dataset = load_cmu_mosi(_write_npz(tmp_path))
    assert (dataset.name, dataset.task) == ("cmu_mosi", "binary")
    assert dataset.input_dims == {"text": 7, "audio": 5, "video": 3}
    train, dev, test = dataset.splits.values()
    assert (len(train) + len(dev), len(test)) == (60, 20)
    assert 1 <= len(set(dev.metadata["group"])) <= 4
    assert not set(train.metadata["group"]) & set(dev.metadata["group"])
    assert test.metadata["transcript"][3] == "WORDS 3"
    assert any("fitted on the training utterances" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.update(label_train=np.arange(60) % 3), "train has labels from 0 to 2, not 0 and 1 or -3 to 3"),
        (lambda x: x.update(label_test=np.arange(20) * 1.0), "test has labels from 0 to 19"),
        (lambda x: x.update(label_test=np.arange(20) - 9), "test has labels from -9 to 10"),
        (lambda x: x.update(target_train=x.pop("label_train")), "has 'target_train'"),
        (lambda x: x.update(image_train=np.ones((60, 2))), "has 'image_train'"),
        (lambda x: x.update(text=np.ones((60, 2))), "has 'text'"),
        (lambda x: x.pop("id_train"), "train lacks id"),
        (lambda x: x.pop("label_test"), "test lacks label"),
        (lambda x: x.update(id_test=np.array([f"tweet{row}" for row in range(20)])), "test has ids that are no VIDEO_"),
        (lambda x: x.clear(), "is empty"),
    ],
)
def test_an_npz_of_ones_own_is_refused_and_pointed_to_its_loader(tmp_path, change, words):
    path = _write_npz(tmp_path, change)
    with pytest.raises(InputError, match=words) as caught:
        load_cmu_mosi(path)
    assert str(caught.value).startswith(f"{path}: is no .npz of CMU-MOSI (")
    assert str(caught.value).endswith("; for arrays of your own, give --dataset arrays")


def test_an_npz_may_be_graded(tmp_path):
    graded = np.linspace(-3, 3, 60).round(1)
    path = _write_npz(tmp_path, lambda x: x.update(label_train=graded, label_test=graded[::3]))
    assert load_cmu_mosi(path).task == "regression"


def test_npz_is_not_regression(tmp_path):
    with pytest.raises(InputError, match="labels are 0 and 1 only; choose task binary"):
        load_cmu_mosi(_write_npz(tmp_path), "regression")


def test_provenance_holds_the_file_and_no_folder(tmp_path):
    dataset = load_cmu_mosi(_write(tmp_path, mmsa()))
    assert dataset.provenance["file"] == "unaligned_50.pkl"
    assert dataset.provenance["shapes"]["train"]["video"] == [24, 9, 4]
    assert str(tmp_path) not in str(dataset.provenance)
    assert len(dataset.provenance["sha256"]) == 64


def _drop(split: str, key: str | None = None):
    return lambda content: content.pop(split) if key is None else content[split].pop(key)


def _put(split: str, key: str, value):
    def change(content) -> None:
        found = content[split].get(key)
        content[split][key] = value(found) if callable(value) else value

    return change


def _label(value: float):
    def change(labels: np.ndarray) -> np.ndarray:
        labels[4] = value
        return labels

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_drop("train"), "no split 'train', its keys are valid, test"),
        (_drop("test"), "no split 'test'"),
        (lambda content: content.update(test=[1]), "test is list; expected a dictionary"),
        (_drop("train", "regression_labels"), "train has no regression_labels or labels or label, its keys are"),
        (_drop("test", "audio"), "test has no audio, which train has"),
        (_put("test", "audio", lambda x: x[:3]), r"test: audio has shape \(3, 15, 5\); expected \(10, T, d\) or"),
        (_put("test", "audio", lambda x: x[:, 0, 0]), r"test: audio has shape \(10,\)"),
        (_put("test", "audio", lambda x: x[..., :2]), "audio has different widths in its splits"),
        (_put("test", "audio", lambda x: x.astype(str)), "test: audio: is of type"),
        (_put("test", "audio", lambda x: list(x)[:4]), "test: audio is a list of 4"),
        (_put("test", "audio", lambda x: [*list(x)[:-1], np.ones((2, 3))]), "test: audio is a list of 10"),
        (_put("test", "audio", {"a": 1}), "test: audio: is not one array of numbers"),
        (_put("test", "audio_lengths", [1, 2]), r"test: audio_lengths have shape \(2,\); expected \(10,\)"),
        (_put("test", "id", ["a"]), "test: id is not a list of 10"),
        (_put("test", "id", "a"), "test: id is not a list of 10"),
        (_put("test", "regression_labels", lambda y: y.reshape(5, 2)), r"test: labels have shape \(5, 2\); expected"),
        (_put("test", "regression_labels", lambda y: y[:0]), r"test: labels have shape \(0,\)"),
        (_put("test", "regression_labels", lambda y: y.astype(str)), "test: labels: is of type"),
        (_put("test", "regression_labels", _label(np.nan)), "test: the label of row 4 is nan"),
        (_put("test", "regression_labels", _label(3.5)), "test: the label of row 4 is 3.5; expected -3 to 3"),
    ],
)
def test_wrong_layouts_end_in_one_line(tmp_path, spoil, words):
    content = mmsa()
    spoil(content)
    path = _write(tmp_path, content)
    with pytest.raises(InputError, match=words) as caught:
        load_cmu_mosi(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], np.ones(3), {"train": {}, "test": {}}])
def test_other_pickles_end_in_one_line(tmp_path, content):
    with pytest.raises(InputError, match=r"expected a dictionary|has no text"):
        load_cmu_mosi(_write(tmp_path, content))


def test_one_class_is_refused(tmp_path):
    content = multibench("humor")
    content["train"]["labels"][:] = 1
    with pytest.raises(InputError, match="all labels of train are 1"):
        load_cmu_mosi(_write(tmp_path, content))


def test_unknown_task_is_refused(tmp_path):
    with pytest.raises(InputError, match="task 'ordinal' does not exist"):
        load_cmu_mosi(_write(tmp_path, mmsa()), "ordinal")


def test_train_of_one_video_cannot_lose_a_dev_split(tmp_path):
    path = _write_npz(tmp_path, lambda arrays: arrays.update(id_train=np.array([f"v_{row}" for row in range(60)])))
    with pytest.raises(InputError, match="one video only"):
        load_cmu_mosi(path)


@pytest.mark.skipif("FUSION_DATA" not in os.environ, reason="FUSION_DATA names no folder with cmu_mosi_utterances.npz")
def test_the_released_file():
    dataset = load_cmu_mosi(Path(os.environ["FUSION_DATA"]) / "cmu_mosi_utterances.npz")
    train, dev, test = dataset.splits.values()
    assert (len(train) + len(dev), len(test)) == (1447, 752)
    assert len(set(train.metadata["group"]) | set(dev.metadata["group"])) == 62
    assert test.target.mean().item() == pytest.approx(0.621, abs=1e-3)
    assert not any("also in train" in note for note in dataset.notes)
