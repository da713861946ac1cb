"""Flickr8k, Karpathy's and COCO's layouts as released: rows, splits, images, refusals, retrieval."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_memes import picture, small_encoders, write_bert

from experiments.alignment_scores import retrieved_rows
from mmfusion.data import captions as module
from mmfusion.data.caption_annotations import CaptionAnnotations, CaptionedImage, read_captions
from mmfusion.data.captions import CAPTIONS, image_files, load_captions
from mmfusion.data.folds import fold_datasets
from mmfusion.data.registry import DataOptions, load_datasets
from mmfusion.dataset import Dataset
from mmfusion.encoders.cache import FeatureCache, text_digest
from mmfusion.errors import InputError
from mmfusion.losses.alignment import ALIGNMENTS
from mmfusion.losses.contrastive import info_nce
from mmfusion.metrics.retrieval import cross_retrieval, retrieval_scores
from mmfusion.metrics.shared_retrieval import distinct_items, shared_precision, shared_retrieval
from mmfusion.training.align import AlignmentTraining, Weighting, align, mean_precision

SIZES = {"train": 6, "dev": 2, "test": 3}
TRAP = "2258277193_586949ec62.jpg.1"
NAMES = {part: [f"{part}{k}_ab.jpg" for k in range(count)] for part, count in SIZES.items()}
ALL = [name for names in NAMES.values() for name in names]


def sentences(name: str, count: int = 5) -> list[str]:
    return [f'a "dog", no {k}: {name[:-7]}' for k in range(count)]


def save_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture(ALL.index(name)).save(folder / name, "PNG")  # content decides, not the name


def write_flickr(folder: Path, splits: bool = True, pictures: str | None = "Flicker8k_Dataset") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}#{k}\t{text}" for name in [*ALL, TRAP] for k, text in enumerate(sentences(name))]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    if splits:
        for part, names in NAMES.items():
            (folder / f"Flickr_8k.{part}Images.txt").write_text("\r\n".join(names) + "\r\n")
    if pictures:
        save_pictures(folder / pictures, ALL)
    return folder


def write_kaggle(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    quoted = ['{},"{}"'.format(name, text.replace('"', '""')) for name in ALL for text in sentences(name)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *quoted]) + "\n")
    save_pictures(folder / "Images", ALL)
    return folder


def karpathy(counts: Callable[[str], int] = lambda name: 5) -> dict[str, object]:
    splits = {"train": "train", "dev": "val", "test": "test"}
    images = [
        {
            "filename": name,
            "filepath": "train2014" if part == "train" else "val2014",
            "split": "restval" if name == NAMES["train"][0] else splits[part],
            "sentences": [{"raw": text, "tokens": ["x"]} for text in sentences(name, counts(name))],
        }
        for part, names in NAMES.items()
        for name in names
    ]
    return {"images": images, "dataset": "coco"}


def write_karpathy(folder: Path, **changes: object) -> Path:
    save_pictures(folder / "train2014", NAMES["train"])
    save_pictures(folder / "val2014", NAMES["dev"] + NAMES["test"])
    (folder / "dataset_coco.json").write_text(json.dumps(karpathy() | changes))
    return folder


def coco(names: list[str]) -> dict[str, object]:
    notes = [
        {"image_id": k, "id": k * 9 + i, "caption": text + "\n"}
        for k, name in enumerate(names)
        for i, text in enumerate(sentences(name))
    ]
    order = np.random.default_rng(0).permutation(len(notes))
    return {
        "info": {},
        "images": [{"id": k, "file_name": name, "height": 9} for k, name in enumerate(names)],
        "annotations": [notes[i] for i in order],
    }


def write_coco(folder: Path) -> Path:
    (folder / "annotations").mkdir(parents=True)
    for part, kind in (("train", "train"), ("test", "val")):
        save_pictures(folder / f"{kind}2017", NAMES[part])
        (folder / "annotations" / f"captions_{kind}2017.json").write_text(json.dumps(coco(NAMES[part])))
    return folder


def splits_of(annotations: CaptionAnnotations) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for image in annotations.images:
        found.setdefault(image.split, []).append(image.name)
    return found


# ---- layouts -----------------------------------------------------------------------------------------------------


def test_flickr8k_has_the_released_splits_and_the_image_that_does_not_exist_is_left_out(tmp_path):
    annotations = read_captions(write_flickr(tmp_path / "f"))
    assert splits_of(annotations) == NAMES
    assert all(list(image.captions) == sentences(image.name) for image in annotations.images)
    assert any(TRAP in note for note in annotations.notes)


def test_flickr8k_images_in_no_split_are_left_out_and_counted(tmp_path):
    folder = write_flickr(tmp_path / "f")
    (folder / "Flickr_8k.testImages.txt").write_text(NAMES["test"][0] + "\n")
    annotations = read_captions(folder)
    assert splits_of(annotations) == NAMES | {"test": NAMES["test"][:1]}
    assert "2 of 11 images are in no split and left out" in annotations.notes


def test_texts_may_lie_in_the_releases_subfolder_and_pictures_beside_it(tmp_path):
    write_flickr(tmp_path / "Flickr8k_text", pictures=None)
    save_pictures(tmp_path / "Flicker8k_Dataset", ALL)
    annotations = read_captions(tmp_path)
    files = image_files(annotations, None)
    assert list(files) == ALL and all(path.parent == tmp_path / "Flicker8k_Dataset" for path in files.values())


def test_kaggles_commas_and_quotation_marks_are_read_and_a_random_cut_is_of_whole_images_and_said(tmp_path):
    annotations = read_captions(write_kaggle(tmp_path / "k"))
    assert splits_of(annotations) == {None: ALL}
    assert all(list(image.captions) == sentences(image.name) for image in annotations.images)
    first, again, other = (module._with_splits(annotations, seed) for seed in (0, 0, 1))
    assert splits_of(first) == splits_of(again) != splits_of(other)
    assert {part: len(names) for part, names in splits_of(first).items()} == {"train": 9, "dev": 1, "test": 1}
    assert sorted(name for names in splits_of(first).values() for name in names) == sorted(ALL)
    assert any("cut at random (seed 0)" in note for note in first.notes)


def test_karpathys_restval_is_trained_on_and_val_is_dev(tmp_path):
    annotations = read_captions(write_karpathy(tmp_path / "c"))
    assert annotations.name == "coco" and splits_of(annotations) == NAMES
    assert module._with_splits(annotations, 0) is annotations
    files = image_files(annotations, None)
    assert files[NAMES["train"][1]] == tmp_path / "c" / "train2014" / NAMES["train"][1]
    assert files[NAMES["dev"][1]] == tmp_path / "c" / "val2014" / NAMES["dev"][1]
    flat = {**karpathy(), "dataset": 7}
    for image in flat["images"]:
        del image["filepath"]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(flat))
    assert read_captions(tmp_path / "dataset_flickr8k.json").name == "dataset_flickr8k"


@pytest.mark.parametrize("data", ["", "annotations", "annotations/captions_val2017.json"])
def test_cocos_own_files_are_found_together_and_captions_go_to_their_image(tmp_path, data):
    annotations = read_captions(write_coco(tmp_path / "c") / data)
    assert splits_of(annotations) == {"train": NAMES["train"], "test": NAMES["test"]}
    assert all(sorted(image.captions) == sentences(image.name) for image in annotations.images)
    cut = splits_of(module._with_splits(annotations, 0))
    assert cut["test"] == NAMES["test"] and len(cut["dev"]) == 1
    assert sorted(cut["train"] + cut["dev"]) == NAMES["train"]
    assert {path.parent.name for path in image_files(annotations, None).values()} == {"train2017", "val2017"}


def test_a_folder_of_images_that_the_flag_names_is_the_only_one_looked_in(tmp_path):
    annotations = read_captions(write_flickr(tmp_path / "f"))
    save_pictures(tmp_path / "other", ALL[1:])  # one is lacking: encoding says so
    assert set(image_files(annotations, tmp_path / "other")) == set(ALL)
    assert image_files(annotations, tmp_path / "other")[ALL[0]] == tmp_path / "other" / ALL[0]
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", "with --img-dir"), (tmp_path / "no", "no such folder")):
        with pytest.raises(InputError, match=words):
            image_files(annotations, folder)


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return small_encoders(write_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, encoders) -> Dataset:
    """COCO's layout with seven captions of some images, one cache."""
    place = tmp_path_factory.mktemp("coco")
    write_karpathy(place, **karpathy(lambda name: 7 if "1" in name else 5))
    dataset = load_captions(place, None, encoders, place / "cache", captions_per_image=3, progress=False)
    return replace(dataset, notes=[*dataset.notes, str(place)])


def test_a_row_is_an_image_with_one_caption_and_train_alone_has_fewer_where_asked(loaded):
    assert not loaded.labelled and loaded.selection == "dev" and loaded.task == "regression"
    for part, most in (("train", 3), ("dev", CAPTIONS), ("test", CAPTIONS)):
        split = loaded.splits[part]
        assert split.ids == [f"{name}#{k}" for name in NAMES[part] for k in range(most)]
        expected = [text for name in NAMES[part] for text in sentences(name)[:most]]
        assert split.metadata["transcript"] == expected
        assert split.shared == {"image": [key.rpartition("#")[0] for key in split.ids]}
        assert split.metadata["group"] == split.shared["image"]
        assert split.features["image"].shape == (len(split), 2048) and split.features["text"].shape == (len(split), 32)


def test_rows_have_the_vectors_of_their_own_image_and_caption(loaded, encoders):
    place = Path(loaded.notes[-1])
    identity = {kind: dict(of) for kind, of in loaded.provenance["encoders"].items()}
    caches = {kind: FeatureCache(place / "cache", kind, {k: v for k, v in of.items() if k != "name"})
              for kind, of in identity.items()}  # fmt: skip
    for split in loaded.splits.values():
        for row, (name, text) in enumerate(zip(split.shared["image"], split.metadata["transcript"], strict=True)):
            (path,) = place.rglob(name)
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            assert torch.equal(split.features["image"][row], caches["image"].vectors[content])
            assert torch.equal(split.features["text"][row], caches["text"].vectors[text_digest(text)])
    assert len(caches["image"].vectors) == len(ALL)


def test_an_image_is_encoded_once_and_a_second_load_encodes_nothing(tmp_path, encoders, monkeypatch):
    seen = []
    real = module.encode_images

    def counting(files, cache, *rest, **options):
        seen.append((len(files), sum(digest in cache for digest in files)))
        return real(files, cache, *rest, **options)

    monkeypatch.setattr(module, "encode_images", counting)
    folder = write_flickr(tmp_path / "f")
    one, two = (load_captions(folder, None, encoders, tmp_path / "cache", progress=False) for _ in range(2))
    assert seen == [(len(ALL), 0), (len(ALL), len(ALL))]
    assert all(torch.equal(one.splits[p].features["text"], two.splits[p].features["text"]) for p in SIZES)
    assert one.provenance == two.provenance
    (folder / "Flickr8k.token.txt").write_text((folder / "Flickr8k.token.txt").read_text().replace("no 3", "not 3"))
    other = load_captions(folder, None, encoders, tmp_path / "cache", progress=False)
    assert other.provenance["data_fingerprint"] != one.provenance["data_fingerprint"]


def test_the_command_line_reaches_every_argument(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("mmfusion.data.registry.load_captions", lambda *a, **k: given.update(k, a=a) or _tiny())
    options = DataOptions("captions", tmp_path, img_dir=tmp_path / "i", captions_per_image=2, split_seed=3)
    (dataset,) = load_datasets(options)
    assert given["a"][:2] == (tmp_path, tmp_path / "i") and dataset.name == "tiny"
    assert (given["captions_per_image"], given["seed"]) == (2, 3)
    with pytest.raises(InputError, match="--captions-per-image 0: give a number from 1"):
        load_datasets(DataOptions("captions", tmp_path, captions_per_image=0))


# ---- retrieval ---------------------------------------------------------------------------------------------------


def _tiny(images: int = 8, captions: int = 5, seed: int = 0) -> Dataset:
    """Images of width 6 and captions near them."""
    rng = np.random.default_rng(seed)
    splits = {}
    for part in SIZES:
        x = rng.normal(size=(images, 6)).astype(np.float32)
        rows = np.repeat(np.arange(images), captions)
        text = x[rows] + rng.normal(size=(len(rows), 6)).astype(np.float32)
        names = [f"{part}{i}.jpg" for i in rows]
        ids = [f"{name}#{k % captions}" for k, name in enumerate(names)]
        features = {"image": torch.from_numpy(x[rows]), "text": torch.from_numpy(text)}
        splits[part] = module.Split(features, torch.zeros(len(rows)), ids, {"group": names, "image": names})
    return Dataset("tiny", "regression", splits, "dev", labelled=False)


def test_shared_retrieval_is_that_of_distinct_images_and_all_captions():
    split = _tiny().splits["test"]
    images, texts = split.features["image"].numpy(), split.features["text"].numpy()
    order = np.random.default_rng(1).permutation(len(split))  # rows of an image need not stand together
    names = [split.shared["image"][i] for i in order]
    found = shared_retrieval({"image": images[order], "text": texts[order]}, {"image": names})
    owners = sorted(set(names), key=names.index)
    vectors = np.stack([images[order][names.index(name)] for name in owners])
    forth = retrieval_scores(vectors, texts[order], owners, names)
    back = retrieval_scores(texts[order], vectors, names, owners)
    assert (forth.queries, forth.gallery, back.queries, back.gallery) == (8, 40, 40, 8)
    for pair, expected in ((("image", "text"), forth), (("text", "image"), back)):
        assert found[pair].recall == expected.recall and found[pair].median_rank == expected.median_rank
        assert found[pair].mean_average_precision == expected.mean_average_precision
    # a slow loop: is any of the image's captions the nearest?
    cosine = vectors @ texts[order].T / np.linalg.norm(vectors, axis=1)[:, None] / np.linalg.norm(texts[order], axis=1)
    assert forth.recall[1] == np.mean([names[row.argmax()] == owner for row, owner in zip(cosine, owners, strict=True)])


def test_items_are_numbered_in_the_order_in_which_they_appear():
    first, item = distinct_items(["c", "a", "d", "a", "b", "c"])
    assert first.tolist() == [0, 1, 2, 4] and item.tolist() == [0, 1, 2, 1, 3, 0]


def test_without_shared_items_it_is_cross_retrieval_and_two_shared_modalities_are_refused():
    z = {name: np.random.default_rng(k).normal(size=(9, 4)) for k, name in enumerate("ab")}
    for pair, scores in cross_retrieval(z).items():
        assert shared_retrieval(z, {})[pair].recall == scores.recall
    with pytest.raises(ValueError, match="shared in one modality, not in a, b"):
        shared_retrieval(z, {"a": ["x"] * 9, "b": ["x"] * 9})


@pytest.mark.parametrize("seed", range(4))
def test_precision_without_sorting_is_that_of_ranked_galleries_with_ties_and_uneven_groups(seed):
    rng = np.random.default_rng(seed)
    items = rng.permutation(np.repeat(np.arange(7), rng.integers(1, 6, 7)))
    image = rng.integers(-1, 2, (7, 3))[items] + (1e-3 if seed else 0.1)  # few values: many equal cosines
    others = {name: rng.integers(-1, 2, (len(items), 3)) + 1e-3 for name in ("text", "audio")}
    latents = {"image": image, **(others if seed % 2 else {"text": others["text"]})}
    shared = {"image": [f"{i}.jpg" for i in items]}
    expected = [one.mean_average_precision for one in shared_retrieval(latents, shared).values()]
    assert shared_precision(latents, shared) == pytest.approx(np.mean(expected), abs=1e-12)


def test_rows_of_a_study_score_as_their_image_and_their_caption():
    split = _tiny(captions=3).splits["test"]
    z = {name: x.numpy() for name, x in split.features.items()}
    scores = shared_retrieval(z, split.shared, (1,))
    recall, precision = retrieved_rows(z, split.shared)
    for row in range(len(split)):
        forth, back = (scores[pair].per_query for pair in (("image", "text"), ("text", "image")))
        assert recall[row] == (forth.recall[1][row // 3] + back.recall[1][row]) / 2
        assert precision[row] == pytest.approx((forth.average_precision[row // 3] + back.average_precision[row]) / 2)
    assert mean_precision(np.stack(list(z.values()), 1), {0: split.shared["image"]}) == pytest.approx(precision.mean())


def test_alignment_selects_epochs_by_the_retrieval_of_distinct_images(monkeypatch):
    data, seen = fold_datasets([_tiny()]), []
    monkeypatch.setattr(
        "mmfusion.training.align.mean_precision",
        lambda z, shared=None: seen.append((z, shared)) or mean_precision(z, shared),
    )
    align(data, [Weighting("contrast", {"info_nce": 1.0})], AlignmentTraining(4, 0, seeds=1, epochs=1, batch_size=8))
    (z, shared), dev = seen[0], data.folds[0].dev
    names = [data.pool.shared["image"][row] for row in dev]
    assert list(shared) == [0]  # image, of image and text
    assert [names[a] == names[0] for a in range(len(names))] == (shared[0] == shared[0][0]).tolist()
    assert len(set(shared[0].tolist())) == 8 and z.shape == (40, 2, 4)


def test_captions_of_an_image_are_no_rivals_in_training_and_other_data_have_none(monkeypatch):
    seen, training = [], AlignmentTraining(4, 0, seeds=1, epochs=1, batch_size=8)

    def recorded(latents, temperature, items):
        seen.append(items is not None)
        return info_nce(latents, temperature, items=items)

    monkeypatch.setitem(ALIGNMENTS, "info_nce", recorded)
    captions = fold_datasets([_tiny()])
    plain = replace(captions, pool=replace(captions.pool, metadata={}))
    models = []
    for data in (captions, plain):
        models.append(align(data, [Weighting("x", {"info_nce": 1.0})], training)["x"].members[0])
        assert set(seen) == {data is captions}
        seen.clear()
    weights = [model.jwae.encoders["image"].state_dict() for model in models]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# ---- refusals ----------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_captions(path)
    message = str(caught.value)
    assert "\n" not in message and (str(path) in message or path.name in message)
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a.jpg#0\tgood\na.jpg without a tab\n", "txt:2: is not IMAGE.jpg#NUMBER, a tab and a caption"),
        ("a.jpg\tno number\n", "txt:1: is not IMAGE.jpg#NUMBER"),
        ("a.jpg#0\tx\nb.jpg#0\ty\na.jpg#0\tz\n", "txt:3: a.jpg#0 stands in line 1 already"),
        ("../a.jpg#0\tx\n", 'txt:1: "../a.jpg" is no plain name of a file'),
        ("#0\tx\n", 'txt:1: "" is no plain name'),
        ("", "holds no captions"),
        (f"{TRAP}#0\tx\n", "holds no captions"),
        ("image,caption\na.jpg,x,y\n", "txt:2: has 3 fields, not image and caption"),
        ('image,caption\na.jpg,"never closed\n', "txt:2: is not comma-separated"),
    ],
)
def test_flickr_lines_that_are_not_as_released_are_named(tmp_path, content, words):
    (tmp_path / "Flickr8k.token.txt").write_text(content)
    assert words in refused(tmp_path / "Flickr8k.token.txt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nobody.jpg\n", "testImages.txt:1: nobody.jpg has no caption in Flickr8k.token.txt"),
        (f"{NAMES['dev'][0]}\n", f"testImages.txt:1: {NAMES['dev'][0]} is in dev already"),
        ("\n", "testImages.txt: names no image"),
        (None, "but no Flickr_8k.testImages.txt"),
    ],
)
def test_split_files_that_do_not_fit_are_named(tmp_path, content, words):
    folder = write_flickr(tmp_path, pictures=None)
    file = folder / "Flickr_8k.testImages.txt"
    file.unlink() if content is None else file.write_text(content)
    assert words in refused(folder)


def _image(**changes: object) -> dict[str, object]:
    entry = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "x"}]} | changes
    return {"images": [{key: value for key, value in entry.items() if value is not None}]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dataset_x.json", [], "is list, not an object with images"),
        ("dataset_x.json", {"annotations": []}, "'images' is no list of objects, or empty"),
        ("dataset_x.json", {"images": [7]}, "'images' is no list of objects"),
        ("dataset_x.json", _image(filename=None), "images[0]: 'filename' is missing"),
        ("dataset_x.json", _image(filename="/etc/passwd"), "is no plain name of a file"),
        ("dataset_x.json", _image(filepath="..", filename="a"), "is no plain name of a file"),
        ("dataset_x.json", _image(split="holdout"), "images[0]: split is 'holdout'; known are train, restval"),
        ("dataset_x.json", _image(sentences=[]), "images[0]: 'sentences' is no list of objects, or empty"),
        ("dataset_x.json", _image(sentences=[{"raw": 3}]), "images[0].sentences[0]: 'raw' is no string"),
        ("dataset_x.json", _image(sentences=[{"raw": "\ud800"}]), "'raw' is not Unicode"),
        ("dataset_x.json", {"images": _image()["images"] * 2}, "images[1]: a.jpg is there twice"),
        ("dataset_x.json", _image(), "has no image of dev"),
        ("captions_train2017.json", coco(["train0_ab.jpg"]), "captions_val2017.json: no such file"),
        ("captions_train2017.json", {"images": [{"id": True, "file_name": "a"}]}, "'id' is no whole number"),
        (
            "captions_train2017.json",
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "x"}]},
            "annotations[0]: image_id 2 is that of no image",
        ),
        (
            "captions_train2017.json",
            {
                "images": [{"id": i, "file_name": "ab"[i]} for i in (0, 1)],
                "annotations": [{"image_id": 1, "caption": ""}],
            },
            "1 images have no caption, a among them",
        ),
        ("captions_train2017.json", {"images": [{"id": i, "file_name": "a"} for i in (0, 1)]}, "have one file_name"),
    ],
)
def test_json_of_another_kind_is_refused_with_the_entry(tmp_path, name, content, words):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_captions(tmp_path / name)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_files_that_cannot_be_read_are_refused_at_once(tmp_path):
    assert "holds none of Flickr8k.token.txt" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "dataset_coco.json")
    os.mkfifo(tmp_path / "dataset_pipe.json")
    assert "FIFO" in refused(tmp_path / "dataset_pipe.json")
    (tmp_path / "captions.txt").write_bytes(b"image,caption\na.jpg,\xff\n")
    assert "is not UTF-8" in refused(tmp_path / "captions.txt")
    whole = json.dumps(karpathy())
    (tmp_path / "dataset_cut.json").write_text(whole[: len(whole) // 2])
    assert "is not JSON" in refused(tmp_path / "dataset_cut.json")
    (tmp_path / "dataset_deep.json").write_text("[" * 100_000)
    assert "is not JSON" in refused(tmp_path / "dataset_deep.json")
    with open(tmp_path / "dataset_huge.json", "wb") as file:
        file.truncate(2 << 30)  # sparse
    assert "more than the" in refused(tmp_path / "dataset_huge.json")


def test_a_folder_of_several_data_sets_is_refused_and_their_files_are_not(tmp_path):
    folder = write_karpathy(write_coco(tmp_path) / "annotations")
    assert "holds dataset_coco.json, captions_val2017.json; give one of these files with --data" in refused(folder)
    assert read_captions(folder / "dataset_coco.json").path.name == "dataset_coco.json"
    assert splits_of(read_captions(folder / "captions_train2017.json"))["test"] == NAMES["test"]


def test_missing_and_damaged_images_are_counted_and_named(tmp_path, encoders):
    folder = write_flickr(tmp_path / "f")
    (folder / "Flicker8k_Dataset" / ALL[3]).unlink()
    (folder / "Flicker8k_Dataset" / ALL[5]).write_text("no picture")
    with pytest.raises(InputError) as caught:
        load_captions(folder, None, encoders, tmp_path / "cache", progress=False)
    message = str(caught.value)
    assert message.startswith("2 of 11 images cannot be used: ") and "\n" not in message
    assert f"{ALL[3]} (no such file)" in message and f"{ALL[5]} (not an image" in message
    path = folder / "Flicker8k_Dataset" / ALL[5]
    picture(5, (64, 64)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:200])  # a header, and no more
    picture(3).save(folder / "Flicker8k_Dataset" / ALL[3], "PNG")
    with pytest.raises(InputError, match=f"1 of 11 images cannot be used: {ALL[5]}"):
        load_captions(folder, None, encoders, tmp_path / "cache", progress=False)


def test_too_few_images_to_cut_are_refused(tmp_path):
    few = [CaptionedImage(f"{k}.jpg", "", None, ("x",)) for k in range(2)]
    with pytest.raises(InputError, match="has 2 images to cut, too few"):
        module._with_splits(CaptionAnnotations("x", tmp_path, few), 0)
