"""The demo: what is planted is planted."""

import json
import os
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmfusion.data import demo_memes
from mmfusion.data.demo_memes import PHRASES, PICTURES, PLANTED_RANK, draw_demo, hateful
from mmfusion.errors import InputError

TABLE = np.array([[2 * hateful(i, t) - 1 for t in range(8)] for i in range(8)])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo_memes, "COPIES", {"train": 2, "dev": 1, "test": 1})


def test_planted_table_has_the_planted_rank_with_equal_singular_values():
    singular = np.linalg.svd(TABLE, compute_uv=False)
    np.testing.assert_allclose(singular[:PLANTED_RANK], singular[0])
    np.testing.assert_allclose(singular[PLANTED_RANK:], 0, atol=1e-12)
    assert PLANTED_RANK > 1


def test_every_picture_and_every_phrase_is_as_often_hateful_as_benign():
    assert (TABLE.sum(0) == 0).all()
    assert (TABLE.sum(1) == 0).all()


def test_files_hold_the_planted_labels_in_the_release_layout(tmp_path, small):
    train = draw_demo(tmp_path / "demo")
    memes = json.loads((tmp_path / "demo/demo.json").read_text())["memes"]
    for split, copies in (("train", 2), ("dev", 1), ("test", 1)):
        rows = [json.loads(line) for line in (train.parent / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == 64 * copies
        for row in rows:
            concept = memes[row["img"]]
            assert row["label"] == hateful(concept["picture"], concept["phrase"])
            assert row["text"].endswith(PHRASES[concept["phrase"]])
        counts = Counter((memes[row["img"]]["picture"], memes[row["img"]]["phrase"]) for row in rows)
        assert set(counts.values()) == {copies}
        with Image.open(train.parent / rows[0]["img"]) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
    assert len(PICTURES) == len(PHRASES) == 8


def test_drawing_is_a_function_of_the_seed(tmp_path, small):
    a, b, c = (draw_demo(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a.read_text() == b.read_text() != c.read_text()
    first = json.loads(a.read_text().splitlines()[0])["img"]
    assert (a.parent / first).read_bytes() == (b.parent / first).read_bytes()


def test_interrupted_drawing_is_drawn_again(tmp_path, small, monkeypatch):
    drawn = []

    def interrupt(*args):
        drawn.append(args)
        if len(drawn) == 40:
            raise KeyboardInterrupt
        return original(*args)

    original = demo_memes.draw_meme
    monkeypatch.setattr(demo_memes, "draw_meme", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_demo(tmp_path / "demo")
    monkeypatch.setattr(demo_memes, "draw_meme", original)
    train = draw_demo(tmp_path / "demo")
    assert train.read_text() == draw_demo(tmp_path / "whole").read_text()
    assert {p.name for p in train.parent.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_drawn_demo_is_not_drawn_twice(tmp_path, small, monkeypatch):
    draw_demo(tmp_path / "demo")
    monkeypatch.setattr(demo_memes, "draw_meme", None)
    assert draw_demo(tmp_path / "demo").exists()


def test_folder_of_someone_else_is_left_alone(tmp_path, small):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(InputError, match="not a demo folder"):
        draw_demo(tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_captions_stay_inside_the_picture():
    for seed, text in enumerate(opening + phrase for opening in demo_memes.OPENINGS for phrase in PHRASES):
        image = Image.new("RGB", demo_memes.SIZE)
        demo_memes._draw_caption(ImageDraw.Draw(image), text, random.Random(seed))
        left, top, right, bottom = image.getbbox()
        assert left > 0 and top > 0 and right < demo_memes.SIZE[0] and bottom < demo_memes.SIZE[1], text


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"recipe": 5}', "[" * 100_000])
def test_a_damaged_manifest_is_drawn_again(tmp_path, monkeypatch, content):
    monkeypatch.setattr("mmfusion.data.demo_memes.COPIES", {"train": 1})
    whole = draw_demo(tmp_path / "demo").with_name("demo.json").read_text()
    (tmp_path / "demo/demo.json").write_text(content)
    draw_demo(tmp_path / "demo")
    assert (tmp_path / "demo/demo.json").read_text() == whole


def test_a_manifest_that_is_no_file_is_one_line(tmp_path):
    (tmp_path / "demo").mkdir()
    os.mkfifo(tmp_path / "demo/demo.json")
    with pytest.raises(InputError, match=r"demo\.json: cannot be read \(is a FIFO"):
        draw_demo(tmp_path / "demo")
