"""--tokens: sequences of every data set that has some, by the rules that its vectors are pooled by."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_memes import write_bert, write_memes
from test_cmu_mosi_loader import _write, _write_npz, mmsa, multibench
from test_mustard_loader import _write as write_mustard
from test_pom_loader import _arrays as pom_arrays
from test_pom_loader import _write as write_pom

from experiments import baselines
from experiments.experiment import Options, execute
from experiments.recipe_search import Config as SearchConfig
from experiments.recipe_search import main as search
from mmfusion.data.array_values import feature_sequences
from mmfusion.data.arrays import ArraysConfig, arrays_of, dataset_from_arrays
from mmfusion.data.cmu_mosi import load_cmu_mosi
from mmfusion.data.folds import fold_datasets, only
from mmfusion.data.pom import load_pom
from mmfusion.data.pooling import pool_over_time, pooling_notes
from mmfusion.data.registry import CORPORA, Corpus, DataOptions, load_datasets, load_folded
from mmfusion.data.steps import keep_steps
from mmfusion.dataset import Dataset, Split, pooled, take
from mmfusion.encoders.cache import StoredTokens
from mmfusion.errors import InputError
from mmfusion.models.fusion import ModelConfig
from mmfusion.models.token_ensemble import TokenConfig
from mmfusion.sequences import Sequences, concatenate
from mmfusion.train import Config as TrainConfig
from mmfusion.train import fit
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

RNG = np.random.default_rng(0)


# ---- steps are kept by the rules of pooling --------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data())
def test_the_mean_over_kept_steps_is_the_pooled_vector(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    x = rng.normal(size=(6, 5, 3))
    x[rng.random((6, 5)) < 0.3] = 0  # padding, anywhere
    holes = rng.random(x.shape) < data.draw(st.sampled_from([0.0, 0.2, 0.9]))
    x[holes & (x != 0)] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e300]))
    valid = rng.random((6, 5)) < 0.6 if data.draw(st.booleans()) else None
    kept, vectors = keep_steps(x, valid), pool_over_time(x, valid, "mean")
    torch.testing.assert_close(kept.features.pooled(), torch.from_numpy(vectors.features), rtol=1e-4, atol=1e-5)
    assert (kept.missing, kept.empty) == (vectors.missing, vectors.empty)
    assert all(steps.isfinite().all() for steps in kept.features)
    counts = (x != 0).any(-1).sum(1) if valid is None else valid.sum(1)
    assert kept.features.lengths.tolist() == counts.tolist()


def test_steps_keep_their_order_and_their_values():
    x = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    x[0, 1] = 0
    found = keep_steps(x).features
    np.testing.assert_array_equal(found[0], x[0, [0, 2, 3]])
    np.testing.assert_array_equal(found[1], x[1])
    ragged = keep_steps([x[0, :2], x[1]]).features
    assert ragged.lengths.tolist() == [1, 4] and ragged.width == 3


def test_a_missing_value_is_the_mean_of_its_coordinate_over_the_examples_other_steps():
    x = np.array([[[1.0, np.nan], [3.0, 4.0], [np.inf, 6.0]], [[np.nan, 1.0], [np.nan, 2.0], [0.0, 0.0]]])
    first, second = keep_steps(x).features
    assert first.tolist() == [[1.0, 5.0], [3.0, 4.0], [2.0, 6.0]]
    assert second.tolist() == [[0.0, 1.0], [0.0, 2.0]]


def test_an_example_without_a_step_is_an_empty_sequence_and_noted():
    kept = keep_steps(np.zeros((3, 4, 2)))
    assert kept.features.shape == (3, 0, 2) and kept.empty == 3
    assert pooling_notes("video", [kept]) == ["video: 3 of 3 examples have no step that is not zero; nothing is there"]


@pytest.mark.parametrize(
    ("x", "valid"),
    [([np.ones((2, 3)), np.ones((2, 4))], None), ([np.ones(3)], None), (np.ones((2, 3, 4)), np.ones((2, 4), bool))],
)
def test_other_shapes_are_refused(x, valid):
    with pytest.raises(ValueError, match="must be"):
        keep_steps(x, valid)


def test_the_caller_keeps_its_array():
    x = np.array([[[1.0, np.nan], [0.0, 0.0]]])
    keep_steps(x).features[0].zero_()
    np.testing.assert_array_equal(x, [[[1.0, np.nan], [0.0, 0.0]]])


# ---- sequences as features -------------------------------------------------------------------------------------------


def _sequences(lengths: list[int], width: int = 2) -> Sequences:
    return Sequences([torch.full((length, width), float(row)) for row, length in enumerate(lengths)], width)


def test_no_sequence_has_a_width_too():
    none = _sequences([1, 2])[torch.zeros(0, dtype=torch.long)]
    assert none.shape == (0, 0, 2) and none.pooled().shape == (0, 2) and len(none.padded().values) == 0
    assert concatenate([none, _sequences([3])]).shape == (1, 3, 2)
    with pytest.raises(ValueError, match="one width"):
        Sequences([])


def test_sequences_are_chosen_by_a_number_numbers_or_booleans():
    x = _sequences([1, 2, 3])
    assert len(x[1]) == len(x[torch.tensor(1)]) == 2
    assert x[torch.tensor([2, 0])].lengths.tolist() == x[[2, 0]].lengths.tolist() == [3, 1]
    assert x[torch.tensor([True, False, True])].lengths.tolist() == x[::2].lengths.tolist() == [1, 3]
    with pytest.raises(IndexError, match="chosen by booleans"):
        x[torch.tensor([True])]


def test_folds_of_sequences_hold_each_example_once():
    split = Split({"a": _sequences([1, 2, 0, 3, 2, 1])}, torch.arange(6.0), list("uvwxyz"))
    datasets = [
        Dataset("folds", "regression", {n: take(split, rows) for n, rows in zip(("train", "dev", "test"), cut)}, "dev")  # noqa: B905
        for cut in (([0, 1], [2, 3], [4, 5]), ([4, 5], [2, 3], [0, 1]))
    ]
    data = fold_datasets(datasets)
    assert len(data.pool) == 6 and data.input_dims == {"a": 2}
    for dataset, fold in zip(datasets, data.folds, strict=True):
        for name, rows in fold._asdict().items():
            expected = dataset.splits[name].features["a"]
            assert all(torch.equal(p, q) for p, q in zip(data.pool.features["a"][rows], expected, strict=True))


def test_an_id_with_other_tokens_is_another_example():
    one = Split({"a": _sequences([1, 2])}, torch.zeros(2), ["u", "v"])
    other = replace(one, features={"a": Sequences([torch.ones(2, 2), one.features["a"][1].clone()])})
    data = fold_datasets([Dataset("d", "regression", {"train": one, "dev": other, "test": other}, "dev")])
    assert data.pool.ids == ["u", "v", "dev/u", "test/u"] and data.folds[0].dev.tolist() == [2, 1]


def test_a_token_that_is_not_finite_is_named_by_its_example(monkeypatch):
    spoiled = _sequences([1, 0, 2])
    spoiled.parts[2][1, 0] = float("nan")
    split = Split({"a": spoiled}, torch.zeros(3), list("uvw"))
    corpus = Corpus(lambda *_: [Dataset("d", "regression", {"train": split}, "train")], ("tokens",))
    monkeypatch.setitem(CORPORA, "pom", corpus)
    with pytest.raises(InputError, match=r"x\.npz: a of 'w' in train holds a value that is no finite number"):
        load_datasets(DataOptions("pom", Path("x.npz"), tokens=True))


# ---- the data sets ---------------------------------------------------------------------------------------------------


def _assert_same_means(tokens: Dataset, vectors: Dataset, modalities: list[str]) -> None:
    """The mean over tokens is the first half of mean and standard deviation, or the vector itself."""
    for name, split in tokens.splits.items():
        assert split.ids == vectors.splits[name].ids and torch.equal(split.target, vectors.splits[name].target)
        for modality in modalities:
            x = split.features[modality]
            assert isinstance(x, Sequences)
            mean = vectors.splits[name].features[modality][:, : x.width]
            torch.testing.assert_close(x.pooled(), mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pooled(split).features[modality], mean, rtol=1e-4, atol=1e-5)


def test_pom_gives_its_steps(tmp_path):
    arrays = pom_arrays()
    arrays["audio_test"][:, :5] = 0
    arrays["video_train"][0] = 0
    arrays["audio_train"][1, 3, 2] = -np.inf
    path = write_pom(tmp_path, arrays)
    (tokens,), (vectors,) = (load_datasets(DataOptions("pom", path, tokens=t)) for t in (True, False))
    assert tokens.splits["test"].features["audio"].lengths.tolist() == [15] * 4
    assert tokens.splits["train"].features["video"][0].shape == (0, 3)
    _assert_same_means(tokens, vectors, ["audio", "video"])
    assert [note.split(";")[0] for note in tokens.notes] == [note.split(";")[0] for note in vectors.notes]
    assert tokens.provenance["pooling"].startswith("none") and load_pom(path, "steps").input_dims == tokens.input_dims


@pytest.mark.parametrize("layout", ["mmsa", "aligned", "multibench", "humor", "lists"])
def test_the_kin_of_cmu_mosi_give_their_valid_steps(tmp_path, layout):
    made = {"mmsa": mmsa, "aligned": lambda: mmsa(True), "humor": lambda: multibench("humor")}
    content = made.get(layout, multibench)()
    if layout == "lists":
        for table in content.values():
            table["audio"] = [x[(x != 0).any(1)] for x in table["audio"]]
    path = _write(tmp_path, content)
    tokens, vectors = (load_cmu_mosi(path, tokens=t) for t in (True, False))
    _assert_same_means(tokens, vectors, ["text", "audio", "video"])
    assert tokens.notes == vectors.notes and tokens.task == vectors.task
    if layout == "mmsa":
        lengths = tokens.splits["dev"].features["audio"].lengths.tolist()
        assert lengths == list(content["valid"]["audio_lengths"])


def test_a_zero_step_within_a_known_length_is_a_step(tmp_path):
    content = mmsa()
    content["valid"]["audio_lengths"][0] = 4
    content["valid"]["audio"][0] = 0
    content["valid"]["audio"][0, [0, 1, 3]] = 1.0
    found = load_cmu_mosi(_write(tmp_path, content), tokens=True).splits["dev"].features["audio"][0]
    assert found[:, 0].tolist() == [1, 1, 0, 1]


def test_utterance_vectors_without_an_encoder_are_no_tokens(tmp_path):
    path = _write_npz(tmp_path)
    with pytest.raises(InputError, match=r"--tokens: .* holds one vector of each utterance.*give --text-encoder"):
        load_datasets(DataOptions("cmu_mosi", path, tokens=True))


def test_with_an_encoder_transcripts_are_words_and_audio_is_one_token(tmp_path):
    def with_texts(arrays: dict[str, np.ndarray]) -> None:
        for split in ("train", "test"):
            count = len(arrays[f"label_{split}"])
            arrays[f"transcript_{split}"] = np.array([["a dog runs", "people", ""][row % 3] for row in range(count)])

    path, encoder = _write_npz(tmp_path, with_texts), f"random:{write_bert(tmp_path / 'bert')}"
    options = DataOptions("cmu_mosi", path, text_encoder=encoder, cache_dir=tmp_path / "cache", tokens=True)
    (dataset,) = load_datasets(options)
    (vectors,) = load_datasets(replace(options, tokens=False))
    assert list(dataset.input_dims) == list(vectors.input_dims) == ["text", "audio"]
    for name, split in dataset.splits.items():
        text, audio = split.features["text"], split.features["audio"]
        assert text.lengths.tolist() == [max(1, len(words.split())) for words in split.metadata["transcript"]]
        assert set(audio.lengths.tolist()) == {1}
        assert torch.equal(audio.pooled(), vectors.splits[name].features["audio"])
        assert all(isinstance(part, StoredTokens) for part in text.parts)
    folds = load_folded(replace(options, folds=3))
    assert len(folds.folds) == 3 and len(folds.pool.features["text"]) == len(folds.pool) == len(folds.test_rows)


def _mustard_options(folder: Path, **changes: object) -> DataOptions:
    encoder = f"random:{write_bert(folder / 'bert')}"
    data = write_mustard(folder / "data")
    return DataOptions("mustard", data, text_encoder=encoder, cache_dir=folder / "cache", tokens=True, **changes)


def test_mustard_gives_words_of_utterance_and_context_and_steps_of_audio(tmp_path):
    options = _mustard_options(tmp_path)
    rng = np.random.default_rng(0)
    audio = {f"1_{row}": rng.normal(size=(283, 1 + row % 7)) for row in range(60)}
    audio["1_4"][0, 0] = np.nan
    (tmp_path / "audio.p").write_bytes(pickle.dumps(audio))
    options = replace(options, audio=tmp_path / "audio.p")
    datasets, vectors = load_datasets(options), load_datasets(replace(options, tokens=False))
    assert len(datasets) == 5 and datasets[0].input_dims == {"utterance": 32, "context": 32, "audio": 283}
    assert "audio: 1 values that were not finite were taken as missing" in datasets[0].notes
    for dataset, other in zip(datasets, vectors, strict=True):
        _assert_same_means(dataset, other, ["audio"])
        for split in dataset.splits.values():
            for modality, column in (("utterance", "transcript"), ("context", "context")):
                words = [len(text.split()) for text in split.metadata[column]]
                assert split.features[modality].lengths.tolist() == words
            assert split.features["audio"].lengths.tolist() == [1 + int(key[2:]) % 7 for key in split.ids]
    data = fold_datasets(datasets)
    assert len(data.pool) == 60 and len(data.test_rows) == 60
    assert datasets[0].provenance["encoders"]["text"]["tokens"] == "float16"


def test_memes_are_cells_and_words(tmp_path):
    write_memes(tmp_path)
    options = DataOptions(
        "hateful_memes",
        tmp_path / "train.jsonl",
        image_encoder="random:resnet50",
        text_encoder=f"random:{write_bert(tmp_path / 'bert')}",
        cache_dir=tmp_path / "cache",
        tokens=True,
    )
    train = load_folded(options).pool
    assert train.features["image"].shape == (30, 49, 2048)
    assert train.features["text"].lengths.tolist() == [len(text.split()) for text in train.metadata["transcript"]]


def test_only_what_has_tokens_takes_the_flag(monkeypatch):
    assert {name for name, corpus in CORPORA.items() if "tokens" in corpus.flags} == set(CORPORA) - {
        "synthetic",
        "pairs",
        "captions",
    }
    monkeypatch.setitem(CORPORA, "pom", replace(CORPORA["pom"], flags=()))
    with pytest.raises(InputError, match=r"--tokens: has no use with --dataset pom, only with demo or cmu_mosi or"):
        load_datasets(DataOptions("pom", Path("x.npz"), tokens=True))


def test_studies_of_vectors_refuse_the_flag(tmp_path):
    path = write_pom(tmp_path, pom_arrays())
    with pytest.raises(InputError, match="--tokens: baselines is about one vector of each modality"):
        execute(baselines.EXPERIMENT, Options("pom", path, tokens=True))
    with pytest.raises(InputError, match="--tokens: the search is of models of one vector"):
        search(SearchConfig(dataset="pom", data=path, tokens=True))


def _of_sequences() -> Dataset:
    def split(part: str, count: int) -> Split:
        lengths = [1 + (3 * i) % 4 for i in range(count)]
        features = {"a": _sequences([0, *lengths])[1:], "b": _sequences([0, *(5 - n for n in lengths)])[1:]}
        return Split(features, torch.arange(float(count)) % 2, [f"{part}{i}" for i in range(count)])

    return Dataset("d", "binary", {"train": split("t", 16), "dev": split("d", 8)}, "dev")


def test_a_run_of_vectors_refuses_sequences():
    with pytest.raises(InputError, match=r"data: holds sequences; fuse them .* or give their means"):
        fit(_of_sequences())


@pytest.mark.parametrize("fusion", ["wma", "transport"])
def test_a_dataset_of_sequences_is_trained_on_as_it_is(fusion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = _of_sequences()
    (found,) = dataset_from_arrays(arrays_of(data), ArraysConfig(task="binary"), tokens=True)
    for name, x in data.splits["train"].features.items():
        for before, after in zip(x, found.splits["train"].features[name], strict=True):
            assert torch.equal(before, after)
    training = replace(TrainConfig().training, epochs=1, seeds=2)
    run = fit(data, TrainConfig(training=training, tokens=TokenConfig(fusion)))
    assert run.predict(data.splits["dev"].features).shape == (8,)
    prior = json.loads((run.folder / "results.json").read_text()).get("prior", [])
    modalities = [(one["modality"], one["split"]) for one in prior]
    expected = [(m, part) for m in ("a", "b") for part in ("train", "dev")] if fusion == "transport" else []
    assert modalities == expected, "one token of each example is held against the prior, where there is one"


# ---- own arrays ------------------------------------------------------------------------------------------------------


def _own(count: int = 60, labels: int = 25) -> dict[str, np.ndarray]:
    """Pictures in cells and plots in words, with several genres each, as in MM-IMDb."""
    rng = np.random.default_rng(1)
    image = rng.normal(size=(count, 4, 6)).astype(np.float32)
    text = rng.normal(size=(count, 9, 5)).astype(np.float32)
    for row in range(count):
        text[row, 1 + row % 9 :] = 0 if row % 2 else np.nan
    target = (rng.random((count, labels)) < 0.2).astype(np.int64)
    target[:, 0] = image[:, :, 0].mean(1) > 0
    return {"image": image, "text": text, "year": rng.normal(size=(count, 3)), "target": target}


def test_arrays_of_sequences_with_several_labels_are_folded_and_learned_from(tmp_path):
    arrays = _own()
    np.savez(tmp_path / "genres.npz", **arrays)
    options = DataOptions("arrays", tmp_path / "genres.npz", folds=3, tokens=True)
    data = load_folded(options)
    assert data.task == "multilabel" and data.pool.target.shape == (60, 25) and len(data.folds) == 3
    assert {name: x.shape for name, x in data.pool.features.items()} == {
        "image": (60, 4, 6),
        "text": (60, 9, 5),
        "year": (60, 1, 3),
    }
    rows = [int(key) for key in data.pool.ids]
    assert data.pool.features["text"].lengths.tolist() == [1 + row % 9 for row in rows]
    np.testing.assert_array_equal(data.pool.features["text"][3], arrays["text"][rows[3], : 1 + rows[3] % 9])
    np.testing.assert_array_equal(data.pool.features["year"].pooled(), arrays["year"][rows].astype(np.float32))

    training = TrainingConfig(seeds=1, epochs=2, batch_size=8)
    method = Method("tokens", ("image", "text"), "transport")
    pair = only(data, ["image", "text"])
    ensembles, trained = fit_methods(pair, [method], ModelConfig(8, 8, 2), ObjectiveConfig(), training)
    p = ensembles[0].predict(pair.pool.features)
    assert p.shape == (3, 60, 25) and p.isfinite().all() and len(trained.models) == 3


def test_without_the_flag_arrays_of_sequences_are_refused_as_before(tmp_path):
    with pytest.raises(InputError, match=r"image: has shape \(60, 4, 6\), a sequence per example; pool .*--tokens"):
        dataset_from_arrays(_own(), ArraysConfig(folds=3))


def test_splits_of_different_lengths_are_one_data_set():
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count, steps in (("train", 20, 5), ("dev", 6, 9)):
        arrays |= {f"a_{split}": rng.normal(size=(count, steps, 3)), f"target_{split}": np.arange(count) % 2}
    (dataset,) = dataset_from_arrays(arrays, tokens=True)
    assert dataset.input_dims == {"a": 3} and dataset.provenance["options"]["tokens"] is True
    assert [split.features["a"].shape for split in dataset.splits.values()] == [(20, 5, 3), (6, 9, 3)]
    (vectors,) = dataset_from_arrays({key: x.mean(1) if x.ndim == 3 else x for key, x in arrays.items()})
    assert "tokens" not in vectors.provenance["options"], "runs of before are still known by theirs"
    arrays["a_dev"] = arrays["a_dev"][..., :2]
    with pytest.raises(InputError, match="a has different widths: 3 in train, 2 in dev"):
        dataset_from_arrays(arrays, tokens=True)


def _with(value: float):
    """The array with `value` in step 2 of row 3."""
    return lambda x: np.where(np.arange(72).reshape(6, 4, 3) == 43, value, x)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x[..., None], r"a: has shape \(6, 4, 3, 1\); expected \(N, T, d\)"),
        (lambda x: x[:, :0], r"a: has shape \(6, 0, 3\); expected"),
        (lambda x: x.astype(str), "a: holds texts"),
        (_with(np.nan), "a: step 2 of row 3 holds nan; leave that"),
        (_with(np.inf), "a: step 2 of row 3 holds inf"),
        (_with(1e300), "a: step 2 of row 3 holds 1e[+]300, beyond the range of float32"),
        (lambda x: x[:, 0] * np.nan, "a: row 0 holds nan"),
    ],
)
def test_sequences_that_cannot_be_used_are_one_line(spoil, words):
    x = np.random.default_rng(0).normal(size=(6, 4, 3))
    with pytest.raises(InputError, match=words) as caught:
        feature_sequences(spoil(x), "mine.npz: a")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("mine.npz: a")


def test_an_array_without_any_step_is_one_of_empty_sequences():
    found = feature_sequences(np.full((3, 4, 2), np.nan), "a")
    assert found.shape == (3, 0, 2)


@pytest.mark.skipif("FUSION_DATA" not in os.environ, reason="FUSION_DATA names no folder with pom_audio_video.npz")
def test_the_released_pom_in_steps():
    path = Path(os.environ["FUSION_DATA"]) / "pom_audio_video.npz"
    (tokens,), (vectors,) = (load_datasets(DataOptions("pom", path, tokens=t)) for t in (True, False))
    _assert_same_means(tokens, vectors, ["audio", "video"])
    assert sum((split.features["video"].lengths == 0).sum().item() for split in tokens.splits.values()) == 486
