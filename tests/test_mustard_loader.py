"""MUStARD as released: sarcasm_data.json, split_indices.p, audio_features.p, resnet_pool5.hdf5."""

import contextlib
import importlib.util
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from small_memes import WORDS, write_bert

from mmfusion.data.mustard import load_mustard
from mmfusion.data.mustard_annotations import find_annotations, read_annotations
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.errors import InputError

COUNT = 60


def _rows() -> dict[str, dict[str, object]]:
    """Two thirds are of FRIENDS; labels alternate; every speaker has both."""
    rng = np.random.default_rng(0)
    rows = {}
    for number in range(COUNT):
        context = [" ".join(rng.choice(WORDS, 3)) for _ in range(1 + number % 3)]
        rows[f"1_{number}"] = {
            "utterance": " ".join(rng.choice(WORDS, 4)),
            "speaker": f"S{number // 2 % 5}",
            "context": context,
            "context_speakers": ["X"] * len(context),
            "show": "FRIENDS" if number < 20 else "BBT",
            "sarcasm": bool(number % 2),
        }
    return rows


def _fold_rows() -> list[tuple[list[int], list[int]]]:
    return [
        ([r for r in range(COUNT) if r // 2 % 5 != f], [r for r in range(COUNT) if r // 2 % 5 == f]) for f in range(5)
    ]


def _write(folder: Path, rows: object = None, folds: str | None = "split_indices.p") -> Path:
    rows = _rows() if rows is None else rows
    folder.mkdir(exist_ok=True)
    (folder / "sarcasm_data.json").write_text(json.dumps(rows))
    if folds == "split_indices.p":  # as released: arrays, protocol 2
        pairs = [(np.array(train), np.array(test)) for train, test in _fold_rows()]
        (folder / folds).write_bytes(pickle.dumps(pairs, protocol=2))
    elif folds:
        named = [{"train": [f"1_{r}" for r in a], "test": [f"1_{r}" for r in b]} for a, b in _fold_rows()]
        (folder / folds).write_text(json.dumps(named))
    return folder / "sarcasm_data.json"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> EncoderConfig:
    return EncoderConfig(text_encoder=f"random:{write_bert(tmp_path_factory.mktemp('bert') / 'bert')}")


@pytest.fixture(scope="module")
def load(tmp_path_factory, encoders):
    """load_mustard with a tiny BERT and a cache that all tests share."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda path, **settings: load_mustard(path, encoders, cache, progress=False, **settings)


def test_five_folds_as_released(tmp_path, load):
    datasets = load(_write(tmp_path))
    assert [dataset.name for dataset in datasets] == [f"mustard_fold_{number}" for number in range(1, 6)]
    for dataset, (training, test) in zip(datasets, _fold_rows(), strict=True):
        assert (dataset.task, dataset.selection, list(dataset.splits)) == ("binary", "dev", ["train", "dev", "test"])
        assert dataset.class_names == ("not sarcastic", "sarcastic")
        assert dataset.splits["test"].ids == [f"1_{row}" for row in test]
        both = dataset.splits["train"].ids + dataset.splits["dev"].ids
        assert sorted(both) == sorted(f"1_{row}" for row in training)
        assert dataset.input_dims == {"utterance": 32, "context": 32}
        assert any("folds share training examples" in note for note in dataset.notes)


def test_dev_is_a_fifth_of_train_with_both_labels_alike(tmp_path, load):
    dev = load(_write(tmp_path))[0].splits["dev"]
    assert len(dev) == 10
    assert dev.target.mean().item() == 0.5


def test_columns_and_targets_belong_to_their_ids(tmp_path, load):
    rows = _rows()
    for split in load(_write(tmp_path))[1].splits.values():
        assert split.target.tolist() == [float(rows[key]["sarcasm"]) for key in split.ids]
        assert split.metadata["transcript"] == [rows[key]["utterance"] for key in split.ids]
        assert split.metadata["context"] == [" ".join(rows[key]["context"]) for key in split.ids]
        assert split.metadata["speaker"] == [rows[key]["speaker"] for key in split.ids]
        assert split.metadata["show"] == [rows[key]["show"] for key in split.ids]


def test_equal_texts_have_equal_vectors_in_both_modalities(tmp_path, load):
    rows = _rows()
    rows["1_3"]["context"] = [*rows["1_8"]["utterance"].split(" ")]  # joined with spaces it is that utterance
    vectors = {}
    for split in load(_write(tmp_path, rows))[0].splits.values():
        for modality, x in split.features.items():
            vectors |= {(modality, key): one for key, one in zip(split.ids, x, strict=True)}
    torch.testing.assert_close(vectors["context", "1_3"], vectors["utterance", "1_8"], rtol=0, atol=0)
    assert not torch.equal(vectors["context", "1_8"], vectors["utterance", "1_8"])


@pytest.mark.parametrize("name", ["mustard_folds.json", "other_folds.json"])
def test_folds_as_lists_of_ids_are_the_same_folds(tmp_path, load, name):
    released = load(_write(tmp_path / "a"))
    listed = load(_write(tmp_path / "b", folds=name))
    explicit = load(tmp_path / "a", folds=tmp_path / "b" / name)
    for one, other, third in zip(released, listed, explicit, strict=True):
        for split in one.splits:
            assert one.splits[split].ids == other.splits[split].ids == third.splits[split].ids
    assert listed[0].provenance["folds"]["file"] == name


def test_a_second_load_is_the_same_and_encodes_nothing(tmp_path, load, monkeypatch):
    path = _write(tmp_path)
    first = load(path)
    monkeypatch.setattr("mmfusion.encoders.extract.TextEncoder", None)
    for one, other in zip(first, load(path), strict=True):
        for split in one.splits:
            torch.testing.assert_close(one.splits[split].features, other.splits[split].features, rtol=0, atol=0)


def test_speaker_independent_tests_on_friends_and_cuts_dev_by_speaker(tmp_path, load):
    (dataset,) = load(_write(tmp_path, folds=None), protocol="speaker_independent")
    train, dev, test = dataset.splits.values()
    assert test.ids == [f"1_{row}" for row in range(20)]
    assert set(test.metadata["show"]) == {"FRIENDS"}
    assert set(train.metadata["speaker"]) | set(dev.metadata["speaker"]) == {f"S{n}" for n in range(5)}
    assert not set(train.metadata["speaker"]) & set(dev.metadata["speaker"])
    assert dataset.name == "mustard_speaker_independent"


def test_repeated_utterances_are_noted(tmp_path, load):
    rows = _rows()
    rows["1_0"]["utterance"] = rows["1_59"]["utterance"] = "you hate my big red house"
    notes = load(_write(tmp_path, rows))[0].notes
    assert any(note.startswith("1 of 12 test utterances occur with the same words") for note in notes)


def _audio(wide: int = 283) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {f"1_{row}": rng.normal(size=(wide, 9 + row % 4)).astype(np.float32) for row in range(COUNT)}


def _dump(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


@pytest.mark.parametrize("steps", ["last", "first"])
def test_audio_is_pooled_over_the_dimension_that_varies(tmp_path, load, steps):
    audio = _audio()
    stored = audio if steps == "last" else {key: x.T for key, x in audio.items()}
    test = load(_write(tmp_path), audio=_dump(tmp_path / "audio_features.p", stored))[0].splits["test"]
    expected = [np.concatenate([audio[key].mean(1), audio[key].std(1)]) for key in test.ids]
    np.testing.assert_allclose(test.features["audio"], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(283, 10), (10, 283)])
def test_audio_of_one_length_is_told_by_its_width(tmp_path, load, shape):
    audio = {f"1_{row}": np.random.default_rng(row).normal(size=shape) for row in range(COUNT)}
    dataset = load(_write(tmp_path), audio=_dump(tmp_path / "audio_features.p", audio))[0]
    assert dataset.input_dims["audio"] == 566
    assert dataset.provenance["audio"]["file"] == "audio_features.p"


@pytest.fixture
def hdf5(monkeypatch):
    """A writer of HDF5 files; where h5py is not installed, of .npz under a stand-in for it."""
    if importlib.util.find_spec("h5py"):
        import h5py

        def write(path: Path, content: dict[str, np.ndarray]) -> Path:
            with h5py.File(path, "w") as file:
                for key, array in content.items():
                    file.create_dataset(key, data=array)
            return path

        return write

    @contextlib.contextmanager
    def open_npz(path: Path, _: str):
        with np.load(path, allow_pickle=False) as archive:
            yield dict(archive)

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=open_npz))

    def write(path: Path, content: dict[str, np.ndarray]) -> Path:
        with open(path, "wb") as file:
            np.savez(file, **content)
        return path

    return write


def _frames() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {f"1_{row}": rng.random((1 + row % 5, 8), dtype=np.float32) for row in range(COUNT)}


def test_visual_is_the_mean_over_frames(tmp_path, load, hdf5):
    frames = _frames()
    test = load(_write(tmp_path), visual=hdf5(tmp_path / "resnet_pool5.hdf5", frames))[0].splits["test"]
    np.testing.assert_allclose(test.features["visual"], [frames[key].mean(0) for key in test.ids], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frames: frames.pop("1_7"), "lacks 1 of 60 ids, 1_7 among them"),
        (lambda frames: frames.update({"1_7": np.ones(8)}), r"1_7 has shape \(8,\); expected \(T, 8\)"),
        (lambda frames: frames.update({"1_7": np.ones((2, 5))}), r"1_7 has shape \(2, 5\); expected \(T, 8\)"),
    ],
)
def test_wrong_visual_files_end_in_one_line(tmp_path, load, hdf5, change, words):
    frames = _frames()
    change(frames)
    path = hdf5(tmp_path / "v.hdf5", frames)
    with pytest.raises(InputError, match=words) as caught:
        load(_write(tmp_path), visual=path)
    assert str(caught.value).startswith(str(path))


def test_a_visual_file_that_is_absent_or_damaged_is_refused(tmp_path, load, hdf5):
    annotations = _write(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load(annotations, visual=tmp_path / "absent.hdf5")
    (tmp_path / "v.hdf5").write_bytes(b"text")
    with pytest.raises(InputError, match="cannot be read as HDF5"):
        load(annotations, visual=tmp_path / "v.hdf5")


def test_without_h5py_the_remedy_is_named(tmp_path, load, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="pip install h5py"):
        load(_write(tmp_path), visual=tmp_path / "v.hdf5")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda audio: [audio], "holds list; expected a dictionary"),
        (lambda audio: audio | {"1_7": np.ones((2, 3, 4))}, r"1_7 has shape \(2, 3, 4\); expected \(283, T\)"),
        (lambda audio: audio | {"1_7": np.ones((283, 0))}, r"1_7 has shape \(283, 0\)"),
        (lambda audio: audio | {"1_7": np.ones((5, 3))}, "share neither dimension"),
        (lambda audio: audio | {"1_7": ["a"]}, "1_7: is of type"),
        (lambda audio: {key: x for key, x in audio.items() if key != "1_7"}, "lacks 1 of 60 ids, 1_7"),
    ],
)
def test_wrong_audio_files_end_in_one_line(tmp_path, load, change, words):
    path = _dump(tmp_path / "audio.p", change(_audio()))
    with pytest.raises(InputError, match=words) as caught:
        load(_write(tmp_path), audio=path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_hostile_audio_file_runs_nothing(tmp_path, load):
    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with pytest.raises(InputError, match="system"):
        load(_write(tmp_path), audio=_dump(tmp_path / "audio.p", {"1_0": Call()}))
    assert not (tmp_path / "ran").exists()


def _row(**changes: object):
    def change(rows: dict) -> dict:
        rows["1_5"] |= changes
        rows["1_5"] = {key: value for key, value in rows["1_5"].items() if value is not ...}
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_row(utterance=...), "1_5: key 'utterance' is missing"),
        (_row(speaker=3), "1_5: key 'speaker' is no string"),
        (_row(show=None), "1_5: key 'show' is no string"),
        (_row(context=...), "1_5: key 'context' is missing"),
        (_row(context="a string"), "1_5: key 'context' is no list of strings"),
        (_row(sarcasm=1), "1_5: sarcasm is 1; it must be true or false"),
        (_row(sarcasm=...), "1_5: sarcasm is null"),
        (_row(utterance="\ud800"), "1_5: its text is not Unicode"),
        (lambda rows: rows | {"1_5": "text"}, "1_5 is str, not an object"),
        (lambda rows: list(rows), "no object from ids to utterances"),
        (lambda rows: {}, "no object from ids to utterances"),
    ],
)
def test_wrong_annotations_end_in_one_line(tmp_path, load, change, words):
    path = _write(tmp_path, change(_rows()))
    with pytest.raises(InputError, match=words) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_annotations_that_are_absent_or_no_json_are_refused(tmp_path, load):
    with pytest.raises(InputError, match=r"holds no sarcasm_data\.json"):
        load(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "absent.json")
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "sarcasm_data.json").write_bytes(content)
        with pytest.raises(InputError, match="is not JSON"):
            load(tmp_path)


def test_absent_folds_are_named(tmp_path, load):
    path = _write(tmp_path, folds=None)
    with pytest.raises(InputError, match=r"holds no split_indices\.p or mustard_folds\.json"):
        load(path)
    with pytest.raises(InputError, match="cannot be read"):
        load(path, folds=tmp_path / "absent.p")


@pytest.mark.parametrize(
    ("fold", "words"),
    [
        ({"train": ["1_1", "1_99"], "test": ["1_2"]}, "fold 1, train: 1 ids are not in the annotations, '1_99'"),
        ({"train": ["1_1", 4], "test": ["1_2"]}, "1 ids are not in the annotations"),
        ({"train": ["1_1", "1_2"], "test": ["1_2"]}, "fold 1: 1 examples are in train and in test, 1_2"),
        ({"train": ["1_1", "1_1"], "test": ["1_2"]}, "its train is empty or holds an example twice"),
        ({"train": ["1_1"], "test": []}, "its test is empty"),
        ({"train": ["1_1"]}, "fold 1 is not"),
        (["1_1"], "fold 1 is not"),
        ({"train": ["1_1", "1_3"], "test": ["1_2"]}, "too few training examples of both labels"),
    ],
)
def test_wrong_folds_of_ids_end_in_one_line(tmp_path, load, fold, words):
    path = _write(tmp_path, folds=None)
    (tmp_path / "folds.json").write_text(json.dumps([fold]))
    with pytest.raises(InputError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        ([(np.arange(50), np.arange(50, 61))], "names rows up to 60; the annotations have 60"),
        ([(np.arange(-1, 50), np.arange(50, 60))], "names rows up to"),
        ([(np.arange(50.0), np.arange(50, 60))], "expected row numbers"),
        ([(np.ones((5, 2), int), np.arange(50, 60))], r"shape \(5, 2\)"),
        ([(np.arange(50), np.arange(49, 60))], "1 examples are in train and in test, 1_49"),
        ([np.arange(3)], "no pair of row numbers"),
        ({}, "is no list of folds"),
        ([], "is no list of folds"),
    ],
)
def test_wrong_folds_of_row_numbers_end_in_one_line(tmp_path, load, folds, words):
    path = _write(tmp_path, folds=None)
    _dump(tmp_path / "split_indices.p", folds)
    with pytest.raises(InputError, match=words) as caught:
        load(path)
    assert str(caught.value).startswith(str(tmp_path / "split_indices.p"))


def test_splits_of_one_label_are_refused(tmp_path, load):
    path = _write(tmp_path, folds=None)
    fold = {"train": [f"1_{row}" for row in range(40)], "test": ["1_51", "1_53"]}
    (tmp_path / "folds.json").write_text(json.dumps([fold]))
    with pytest.raises(InputError, match="fold 1: all labels of test are 1"):
        load(path)


@pytest.mark.parametrize(("show", "count"), [("BBT", 0), ("FRIENDS", 60)])
def test_speaker_independent_needs_both_kinds_of_show(tmp_path, load, show, count):
    rows = {key: row | {"show": show} for key, row in _rows().items()}
    with pytest.raises(InputError, match=f"{count} of 60 rows are of the show FRIENDS"):
        load(_write(tmp_path, rows), protocol="speaker_independent")


def test_speaker_independent_needs_two_speakers_to_train_on(tmp_path, load):
    rows = {key: row | {"speaker": "S"} for key, row in _rows().items()}
    with pytest.raises(InputError, match="one speaker only"):
        load(_write(tmp_path, rows), protocol="speaker_independent")


def test_unknown_protocol_is_refused(tmp_path, load):
    with pytest.raises(InputError, match="protocol 'both' does not exist"):
        load(_write(tmp_path), protocol="both")


@pytest.mark.skipif(
    "FUSION_DATA" not in os.environ, reason="FUSION_DATA names no folder with mustard_sarcasm_data.json"
)
def test_the_released_files(load):
    folder = Path(os.environ["FUSION_DATA"])
    datasets = load(folder)
    assert [[len(split) for split in dataset.splits.values()] for dataset in datasets] == [[441, 111, 138]] * 5
    tested = [key for dataset in datasets for key in dataset.splits["test"].ids]
    assert len(tested) == len(set(tested)) == 690
    (dataset,) = load(folder, protocol="speaker_independent")
    assert len(dataset.splits["test"]) == 356


@pytest.mark.parametrize("name", ["~nobody-of-that-name/a.json", "x" * 300])
def test_annotations_under_a_name_that_no_file_has_are_one_line(name):
    with pytest.raises(InputError, match="cannot be read"):
        read_annotations(find_annotations(Path(name)))
