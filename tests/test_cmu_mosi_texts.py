"""CMU-MOSI's transcripts through a text encoder, without what was fitted on labels, and folds of whole videos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig

from mmfusion.data.registry import DataOptions, load_datasets, load_folded
from mmfusion.errors import InputError
from tests.small_memes import write_bert

TEXTS = ["a dog runs", "people love you", "hate my big house", "the red hill", "cat", "you"]


@pytest.fixture
def options(tmp_path):
    def make(**flags):
        return DataOptions("cmu_mosi", tmp_path / "mosi.npz", cache_dir=tmp_path / "cache", **flags)

    rng = np.random.default_rng(0)
    table = {}
    for split, videos in (("train", range(6)), ("test", range(6, 9))):
        ids = [f"video{v}_{k}" for v in videos for k in range(1, 5)]
        widths = {"text": 3, "audio": 4, "video": 5}
        table |= {f"{m}_{split}": rng.normal(size=(len(ids), d)).astype(np.float32) for m, d in widths.items()}
        table[f"label_{split}"] = np.arange(len(ids)) % 2
        table[f"id_{split}"] = np.array(ids)
        table[f"transcript_{split}"] = np.array([TEXTS[i % len(TEXTS)] for i in range(len(ids))])
    np.savez(tmp_path / "mosi.npz", **table)
    return make


def test_text_is_the_encoders_and_what_was_fitted_on_labels_is_gone(options, tmp_path):
    encoder = str(write_bert(tmp_path / "bert"))
    AutoModel.from_config(BertConfig.from_pretrained(encoder)).save_pretrained(encoder)
    before, (after,) = load_datasets(options()), load_datasets(options(text_encoder=encoder))
    assert list(after.input_dims) == ["text", "audio"] and after.input_dims["text"] != 3
    torch.testing.assert_close(after.splits["test"].features["audio"], before[0].splits["test"].features["audio"])
    text, transcripts = after.splits["train"].features["text"], after.splits["train"].metadata["transcript"]
    same = transcripts.index(transcripts[0], 1)
    torch.testing.assert_close(text[0], text[same])
    assert (text[0] - text[1]).abs().max() > 1e-3, "other words, other vectors"
    assert any("fitted on the training utterances" in note for note in before[0].notes)
    assert not any("fitted on the training utterances" in note for note in after.notes)
    assert any(note.startswith("video: left out") for note in after.notes)
    assert str(tmp_path) not in " ".join(after.notes), "notes are published"


def test_every_utterance_is_tested_once_and_no_video_is_on_two_sides(options):
    data = load_folded(options(folds=3))
    assert sorted(data.test_rows.tolist()) == list(range(36))
    videos = data.pool.metadata["group"]
    for fold in data.folds:
        sides = [{videos[row] for row in part} for part in fold]
        assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    other = load_folded(options(folds=3, split_seed=1))
    first = [{folded.pool.ids[row] for row in folded.folds[0].test} for folded in (data, other)]
    assert first[0] != first[1]


def test_mistakes_are_one_line(options, tmp_path):
    with pytest.raises(InputError, match=r"--folds 10: cmu_mosi has 9 groups"):
        load_folded(options(folds=10))
    with pytest.raises(InputError, match=r"--folds folds\.json: with --dataset cmu_mosi, give a number of folds"):
        load_folded(options(folds=Path("folds.json")))
    with np.load(tmp_path / "mosi.npz") as file:
        kept = {key: file[key] for key in file.files if not key.startswith("transcript")}
    np.savez(tmp_path / "mosi.npz", **kept)
    with pytest.raises(InputError, match=r"--text-encoder: mosi\.npz holds no transcripts"):
        load_folded(options(text_encoder="bert"))
