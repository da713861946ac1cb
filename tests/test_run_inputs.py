"""A run from Python, of memes or of a dataset: the folder of the command, and answers on raw pictures and texts."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small_memes import small_encoders, write_bert, write_memes

import main_hateful_memes
from mmfusion.data.arrays import ArraysConfig
from mmfusion.data.memes import MemesConfig
from mmfusion.data.registry import DataOptions
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError
from mmfusion.explain.explainer import Choices, Explainer
from mmfusion.models.fusion import ModelConfig
from mmfusion.runs.folder import RunConfig
from mmfusion.runs.settings import config_from
from mmfusion.train import Config, Run, fit
from mmfusion.training.fit import Method
from mmfusion.training.recipe import TrainingConfig

TRAINING = TrainingConfig(seeds=2, epochs=2, batch_size=16, device="cpu")
MODEL = ModelConfig(4, 8, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with two runs on the same memes: one by the command, one from Python."""
    folder, before = tmp_path_factory.mktemp("memes"), Path.cwd()
    bert = write_bert(folder / "bert")
    jsonl = write_memes(folder, {"train": 40, "dev": 20, "test": 6})
    os.chdir(folder)
    flags = f"--jsonl {jsonl} --image-encoder random:resnet50 --image-size 32 --text-encoder random:{bert} --rank 2"
    flags += " --latent-dim 4 --hidden-dim 8 --seeds 2 --epochs 2 --batch-size 16 --device cpu --name command"
    assert main_hateful_memes.run(flags.split()) == 0
    config = Config(training=TRAINING, model=MODEL, run=RunConfig("python"))
    terms = {"size": (1e-9, lambda output, batch: sum(z.square().mean() for z in output.latents.values()))}
    fit(MemesConfig(jsonl=jsonl), config, encoders=small_encoders(bert), further_terms=terms)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def run(place) -> Run:
    return Run(place / "runs/python")


def rows_of(place: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (place / f"{split}.jsonl").read_text().splitlines()]


def raw(place: Path, split: str) -> tuple[list[Path], list[str]]:
    rows = rows_of(place, split)
    return [place / row["img"] for row in rows], [row["text"] for row in rows]


# ---- the folder


def test_memes_from_python_leave_what_the_command_leaves(place, run):
    command, python = (json.loads((place / f"runs/{name}/run.json").read_text()) for name in ("command", "python"))
    assert python["settings"] | {"name": "command"} == command["settings"]
    assert python["data"] == command["data"] | {"further_terms": {"size": 1e-9}}
    files = {
        name: {str(path.relative_to(place / "runs" / name)) for path in (place / "runs" / name).rglob("*")}
        for name in ("command", "python")
    }
    assert files["command"] == files["python"] and "model.safetensors" in files["python"]
    of_command = Run("runs/command").scores
    for method, parts in run.scores.items():
        for score, found in parts["dev"].items():
            assert found["members"] == pytest.approx(of_command[method]["dev"][score]["members"], abs=1e-6)


# ---- raw pictures and texts


def test_raw_memes_are_answered_as_the_runs_own(place, run):
    for split in ("dev", "test"):
        features = run.encode(*raw(place, split))
        own = run.trained.datasets[0].splits[split].features
        for name, x in own.items():
            assert (features[name] - x).abs().max() < 1e-4 * x.std(), "another order of adding up, in fifty layers"
        with (place / f"runs/python/predictions_{split}.csv").open() as file:
            written = [float(row["probability"]) for row in csv.DictReader(file)]
        p = run.predict_proba(features)
        assert p.std() > 1e-4
        np.testing.assert_allclose(p, written, atol=1e-5)


def test_all_that_a_run_answers_takes_what_it_encodes(place, run):
    images, texts = raw(place, "dev")
    features = run.encode([str(path) for path in images[:3]], tuple(texts[:3]))
    account = run.explain(features)
    np.testing.assert_allclose(sum(account.parts.values()), account.prediction, atol=1e-5)
    assert run.robustness(features)["image"].shape == (2, 3)
    alone = run.encode(images=images[:3])
    assert set(alone) == {"image"} and torch.equal(alone["image"], features["image"])
    whole, without = run.predict_missing(features), run.predict_missing(alone)
    assert (whole.std == 0).all() and (without.std > 0).all()
    assert set(run.encode(texts=texts[:2])) == {"text"}


def test_a_batch_is_encoded_as_each_meme_alone_and_as_the_explainer_does(place, run):
    images, texts = raw(place, "train")  # more than one batch
    together = run.encode(images, texts)
    for n in (0, 17, 39):
        for name, x in run.encode(images[n : n + 1], texts[n : n + 1]).items():
            apart = (together[name][n : n + 1] - x).abs().max()
            assert apart < 1e-4 * together[name].std()
    explained = Explainer(run.trained, Choices(), "cpu").meme(images[17], texts[17])
    account = run.explain(run.encode(images[17:18], texts[17:18]))
    np.testing.assert_array_equal(explained.account.prediction, account.prediction)


@pytest.mark.parametrize(
    ("images", "texts", "error", "said"),
    [
        (["img/00040.png", "img/none.png"], ["a", "b"], InputError, r"^img/none\.png: no such file; give a picture"),
        (["train.jsonl"], ["a"], InputError, r"^train\.jsonl: not an image"),
        (["img/00040.png"], ["half \ud800"], InputError, "no UTF-8"),
        (["img/00040.png"], ["a", "b"], ValueError, "a list of N files"),
        ("img/00040.png", "a dog on the ", ValueError, "a list of N files"),
        (None, None, ValueError, "a list of N files"),
        ([], [], ValueError, "nothing to encode"),
        (["img/00040.png"], [None], ValueError, "texts: row 0 is None, no text; .* with texts left out"),
        (["img/00040.png", None], ["a", "b"], ValueError, "images: row 1 is None, no file"),
    ],
)
def test_what_cannot_be_encoded_is_named(place, run, images, texts, error, said):
    with pytest.raises(error, match=said) as caught:
        run.encode(images, texts)
    assert "\n" not in str(caught.value)


# ---- a dataset of one's own


def sentiment(label_range: tuple[float, float] | None) -> Dataset:
    rng = torch.Generator().manual_seed(0)
    splits = {}
    for name, n in (("train", 60), ("dev", 20), ("test", 30)):
        x = {"a": torch.randn(n, 4, generator=rng), "b": torch.randn(n, 3, generator=rng)}
        splits[name] = Split(x, 2 * x["a"][:, 0].clamp(-1.5, 1.5), [f"{name}{i}" for i in range(n)])
    return Dataset("mood", "regression", splits, "dev", ["rated by three"], {"source": {"year": 2020}}, label_range)


def test_a_dataset_keeps_notes_provenance_and_range_of_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stacks = [[Method("jWAE-LMF", ("a", "b"), active_rank=2)]]
    ranged = fit(sentiment((-3.0, 3.0)), Config(training=TRAINING, model=MODEL), stacks)
    assert capsys.readouterr().out.count("note: rated by three") == 1
    assert "accuracy_7" in ranged.scores["jWAE-LMF"]["test"]
    for again in (ranged, Run(ranged.folder)):
        (dataset,) = again.trained.datasets
        assert dataset.label_range == (-3.0, 3.0) and dataset.notes[0] == "rated by three"
        assert dataset.provenance["dataset"]["provenance"] == {"source": {"year": 2020}}
    assert "- rated by three" in (ranged.folder / "README.md").read_text()
    free = fit(sentiment(None), Config(training=TRAINING, model=MODEL), stacks)
    assert free.folder.name == "mood-2" and "accuracy_7" not in free.scores["jWAE-LMF"]["test"]


def test_arrays_take_no_encoders_and_their_runs_no_pictures(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"image": rng.normal(size=(40, 3)), "text": rng.normal(size=(40, 2)), "target": np.arange(40) % 2}
    config = Config(ArraysConfig(hold_out=0.3), TRAINING, MODEL)
    with pytest.raises(ValueError, match="encoders: are of memes"):
        fit(arrays, config, encoders=small_encoders(place / "bert"))
    assert not Path("runs").exists()
    own = fit(arrays, config, [[Method("jWAE-LMF", ("image", "text"))]])
    with pytest.raises(InputError, match=r"runs/arrays was not trained on memes: it takes no raw memes"):
        own.encode([place / "img/00040.png"], ["a dog"])


def test_setting_that_is_a_word_or_nothing_is_read_again_either_way():
    path = Path("run.json")
    assert config_from(DataOptions, {"plant": None}, path).plant is None
    assert config_from(DataOptions, {"plant": "dropout"}, path).plant == "dropout"
    with pytest.raises(InputError, match="setting plant"):
        config_from(DataOptions, {"plant": "nothing"}, path)
