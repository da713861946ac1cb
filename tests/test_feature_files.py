"""Features that were encoded elsewhere, in place of an encoder or beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_memes import small_encoders, write_bert, write_memes

import hateful_memes_loader
import main_hateful_memes
from experiments.robustness.corrupted_inputs import corruptions_of
from hateful_memes_loader import load_hateful_memes, read_annotations
from mmfusion.data.feature_files import read_feature_flags, read_features
from mmfusion.data.memes import MemesConfig, load_memes
from mmfusion.data.registry import DataOptions, load_datasets
from mmfusion.dataset import Dataset
from mmfusion.distributed import Processes
from mmfusion.errors import InputError
from mmfusion.explain import __main__ as explain
from mmfusion.runs.folder import same_data
from mmfusion.runs.load import load_run
from mmfusion.runs.settings import settings_of

COUNTS = {"train": 22, "dev": 8, "test": 5}


@pytest.fixture
def memes(tmp_path) -> Path:
    return write_memes(tmp_path / "memes", COUNTS)


def imgs_of(jsonl: Path) -> list[str]:
    """Keys of all memes, in no order of a split."""
    rows = [meme.img for name in COUNTS for meme in read_annotations(jsonl.with_name(f"{name}.jsonl"))[0]]
    return sorted(rows, reverse=True)


def write_features(path: Path, imgs: list[str], width: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    """img -> vector, and the file with them."""
    vectors = np.random.default_rng(seed).normal(size=(len(imgs), width)).astype(np.float16)
    np.savez(path, img=np.array(imgs), features=vectors)
    return dict(zip(imgs, vectors.astype(np.float32), strict=True))


def load(jsonl: Path, *features: str, **changes: object) -> Dataset:
    folder = jsonl.parent.parent
    config = MemesConfig(jsonl, cache_dir=folder / "cache", workers=0, features=features, **changes)
    return load_memes(config, small_encoders(write_bert(folder / "bert")), Processes())


def refuse(*_: object) -> None:
    raise AssertionError("an encoder that nothing needs was looked for")


def test_image_vectors_from_a_file_stand_for_the_encoder_and_the_pictures(memes, tmp_path, monkeypatch):
    expected = write_features(tmp_path / "clip.npz", imgs_of(memes))
    for picture in (memes.parent / "img").iterdir():
        picture.unlink()
    (memes.parent / "img").rmdir()
    monkeypatch.setattr(hateful_memes_loader, "find_image_encoder", refuse)
    monkeypatch.setattr(hateful_memes_loader, "encode_images", refuse)
    dataset = load(memes, f"image={tmp_path / 'clip.npz'}")
    assert dataset.input_dims == {"image": 6, "text": 32} and list(dataset.input_dims) == ["image", "text"]
    for split in dataset.splits.values():
        np.testing.assert_array_equal(split.features["image"], [expected[img] for img in split.ids])
    assert list(dataset.provenance["encoders"]) == ["text"]
    recorded = dataset.provenance["features"]["image"]
    assert recorded["file"] == "clip.npz" and len(recorded["sha256"]) == 64


def test_text_vectors_and_further_modalities(memes, tmp_path, monkeypatch):
    write_features(tmp_path / "text.npz", imgs_of(memes), 3)
    expected = write_features(tmp_path / "faces.npz", imgs_of(memes), 4, seed=1)
    monkeypatch.setattr(hateful_memes_loader, "find_text_encoder", refuse)
    monkeypatch.setattr(hateful_memes_loader, "encode_texts", refuse)
    dataset = load(memes, f"faces={tmp_path / 'faces.npz'}", f"text={tmp_path / 'text.npz'}")
    assert dataset.input_dims == {"image": 2048, "text": 3, "faces": 4}
    train = dataset.splits["train"]
    np.testing.assert_array_equal(train.features["faces"], [expected[img] for img in train.ids])
    assert list(dataset.provenance["encoders"]) == ["image"]


def test_without_features_nothing_changes(memes):
    dataset = load(memes)
    plain = load_hateful_memes(
        memes, None, small_encoders(memes.parent.parent / "bert"), memes.parent.parent / "cache", workers=0
    )
    assert dataset.description == plain.description and "features" not in dataset.provenance
    assert all(torch.equal(x, plain.splits["train"].features[m]) for m, x in dataset.splits["train"].features.items())


def test_other_vectors_are_other_data(memes, tmp_path):
    imgs, described = imgs_of(memes), []
    for seed in (0, 0, 1):
        write_features(tmp_path / "clip.npz", imgs, seed=seed)
        described.append(load(memes, f"image={tmp_path / 'clip.npz'}").description)
    assert same_data(described[0], described[1]) and not same_data(described[0], described[2])


def test_a_held_out_slice_shares_no_image_vector_with_train(tmp_path):
    jsonl = write_memes(tmp_path / "memes", {"train": 60})
    imgs = sorted(meme.img for meme in read_annotations(jsonl)[0])
    vectors = np.arange(30)[np.arange(60) // 2][:, None]  # two memes have each picture
    np.savez(tmp_path / "clip.npz", id=np.array(imgs), clip=vectors)
    dataset = load(jsonl, f"image={tmp_path / 'clip.npz'}")
    train, held_out = (set(dataset.splits[name].features["image"][:, 0].tolist()) for name in ("train", "holdout"))
    assert train and held_out and not train & held_out


def test_flags_reach_the_registry_and_are_kept_as_whole_paths(memes, tmp_path, monkeypatch):
    write_features(tmp_path / "clip.npz", imgs_of(memes))
    write_features(tmp_path / "text.npz", imgs_of(memes))
    monkeypatch.chdir(tmp_path)
    options = DataOptions("hateful_memes", memes, features=("image=clip.npz", "text=text.npz"))
    assert load_datasets(options)[0].input_dims == {"image": 6, "text": 6}
    assert settings_of(options)["features"][0] == f"image={tmp_path / 'clip.npz'}"


def test_a_run_on_given_image_vectors_is_read_and_explained_without_pictures(memes, tmp_path, monkeypatch, capsys):
    write_features(tmp_path / "clip.npz", imgs_of(memes))
    write_bert(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    flags = "--jsonl memes/train.jsonl --features image=clip.npz --image-encoder random:resnet50 --image-size 32"
    sizes = "--text-encoder random:bert --latent-dim 4 --hidden-dim 8 --rank 2 --epochs 1 --batch-size 8 --seeds 2"
    assert main_hateful_memes.run([*flags.split(), *sizes.split(), "--device", "cpu", "--name", "given"]) == 0
    run = load_run(tmp_path / "runs/given")
    assert run.memes.given == ("image",) and run.data.input_dims == {"image": 6, "text": 32}
    assert explain.run(["runs/given", "--split", "dev", "--maps"]) == 0
    assert corruptions_of(run).keys() == {"text"}
    (memes.parent / "img").rename(tmp_path / "gone")
    monkeypatch.chdir(memes.parent)  # the file of features is found from anywhere
    assert explain.run([str(tmp_path / "runs/given"), "--split", "dev"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        explain.run([str(tmp_path / "runs/given"), "--image", "x.png", "--text", "a dog"])
    assert "image came from files (--features); give --ids or --split" in capsys.readouterr().err
    write_features(tmp_path / "clip.npz", imgs_of(memes), seed=1)
    with pytest.raises(InputError, match="was trained on other data"):
        load_run(tmp_path / "runs/given")


def test_safetensors_have_whole_numbers_for_ids(tmp_path):
    save_file({"id": torch.tensor([7, 3]), "features": torch.tensor([[1.0], [2.0]])}, tmp_path / "x.safetensors")
    assert read_features(tmp_path / "x.safetensors").of(["3", "7", "3"]).tolist() == [[2], [1], [2]]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"features": np.ones((2, 3))}, "has neither 'img' nor 'id', its keys are 'features'; add the ids"),
        ({"id": np.arange(2)}, "has no array 'features', its keys are 'id'"),
        ({"id": np.arange(2), "a": np.ones((2, 3)), "b": np.ones((2, 3))}, "has no array 'features'"),
        ({"id": np.arange(2), "features": np.ones((3, 3))}, "id has 2 rows and features has 3"),
        ({"id": np.array(["a", "b", "a"]), "features": np.ones((3, 3))}, "1 ids occur again, 'a' first"),
        ({"id": np.ones(2), "features": np.ones((2, 3))}, "expected .N,. texts or whole numbers"),
        ({"id": np.arange(2), "features": np.array([[1.0], [np.nan]])}, "features: row 1 holds nan"),
        ({"id": np.arange(2), "features": np.array([["a"], ["b"]])}, "features: holds texts"),
        ({"id": np.arange(2), "features": np.ones((2, 4, 3))}, "pool its steps first"),
    ],
)
def test_files_of_another_layout_are_one_line(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=words) as caught:
        read_features(tmp_path / "x.npz")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_missing_ids_are_counted_and_the_first_is_named(memes, tmp_path):
    imgs = [img for img in imgs_of(memes) if img not in ("img/00003.png", "img/00030.png")]
    write_features(tmp_path / "clip.npz", imgs)
    with pytest.raises(InputError, match=r"clip\.npz: lacks 2 of 35 ids, 'img/00003\.png' first") as caught:
        load(memes, f"image={tmp_path / 'clip.npz'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["clip.npz"], "--features clip.npz: give MODALITY=PATH, such as image=clip_image.npz"),
        (["image="], "--features image=: give MODALITY=PATH"),
        (["a b=x.npz"], "--features a b=x.npz: modality 'a b' has a name of other signs"),
        (["keys=x.npz"], "--features keys=x.npz: modality 'keys' has a name that PyTorch"),
        (["image=missing.npz"], "missing.npz: cannot be read"),
    ],
)
def test_flags_of_another_form_are_one_line(flags, words):
    with pytest.raises(InputError, match=words):
        read_feature_flags(flags)


def test_a_modality_is_given_once(tmp_path):
    write_features(tmp_path / "x.npz", ["a"])
    with pytest.raises(InputError, match="image is given twice"):
        read_feature_flags([f"image={tmp_path / 'x.npz'}"] * 2)
