"""The command as a user meets it, and the account against direct formulas."""

import csv
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_memes import write_bert, write_memes

import main_hateful_memes
import mmfusion.runs.load as trained_run
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.folds import fold_datasets
from mmfusion.dataset import Dataset, Split
from mmfusion.explain import account as explanation
from mmfusion.explain.__main__ import run
from mmfusion.explain.account import Explanation, account_for, ensemble_losses, exact_layer, latents_of
from mmfusion.explain.ranks import RankComponents
from mmfusion.explain.text import is_wrong, plain, sentence
from mmfusion.explain.waterfall import waterfall
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.runs.load import TrainedRun

# ---- runs to explain


@pytest.fixture(scope="module")
def memes(tmp_path_factory) -> Path:
    """The working folder of a finished run of two seeds on tiny memes."""
    place = tmp_path_factory.mktemp("memes")
    write_bert(place / "bert")
    write_memes(place, {"train": 48, "dev": 16, "test": 6})
    before = Path.cwd()
    os.chdir(place)
    flags = {
        "jsonl": "train.jsonl",
        "image-encoder": "random:resnet50",
        "image-size": 64,
        "text-encoder": "random:bert",
        "latent-dim": 4,
        "hidden-dim": 8,
        "rank": 2,
        "epochs": 2,
        "batch-size": 16,
        "device": "cpu",
        "seeds": 2,
        "name": "trial",
    }
    arguments = [part for key, value in flags.items() for part in (f"--{key}", *str(value).split())]
    try:
        assert main_hateful_memes.run(arguments) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(memes, tmp_path, monkeypatch) -> Path:
    """A working folder from which the run can be read; what is written lies in its own `explanations`."""
    for name in ("bert", "img", "cache", "runs", "train.jsonl", "dev.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(memes / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_run(modalities=("audio", "text", "video"), outputs=2, folds=1, task="regression") -> TrainedRun:
    """Untrained members on random features, as `load_run` would give them."""
    torch.manual_seed(0)
    datasets = []
    for fold in range(folds):
        splits = {}
        for name, n in (("train", 40), ("dev", 12), ("test", 9)):
            target = torch.randn(n, outputs) * 2 + 3 if task == "regression" else torch.arange(n) % 2.0
            ids = [f"{fold}-{name}-{i}" for i in range(n)]
            words = {"transcript": [f"<b>words</b> & more of {key}" for key in ids]}
            splits[name] = Split({m: torch.randn(n, 5) + 1 for m in modalities}, target, ids, words)
        names = [f"trait_{k}" for k in range(outputs)] if outputs > 1 else []
        datasets.append(Dataset("toy", task, splits, "dev", target_names=names))
    ensemble = FusionEnsemble(dict.fromkeys(modalities, 5), 2 * folds, 4, 8, rank=3, output_dim=outputs).eval()
    for member in ensemble.members:
        member.fit_standardisation(datasets[0].splits["train"].features)
        if task == "regression":
            member.rescale.fit(datasets[0].splits["train"].target)
    ensemble.requires_grad_(False)
    ensembles = {"jWAE-LMF": ensemble}
    fields = {"encoders": None, "memes": None, "cache_dir": Path("cache"), "trained_on_dev": False}
    return TrainedRun(Path("runs/toy"), fold_datasets(datasets), datasets, ensembles, [0, 1], {"seeds": 2}, **fields)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Lets the command find a small run in place of one on disk."""
    monkeypatch.chdir(tmp_path)

    def use(**shape) -> TrainedRun:
        made = small_run(**shape)
        monkeypatch.setattr("mmfusion.explain.__main__.load_run", lambda folder, device, **options: made)
        return made

    return use


class Page(HTMLParser):
    """Checks that tags nest, and keeps what a reader would look for."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.words = [], [], []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        return [attributes["data-id"] for _, attributes in self.tags if "data-id" in attributes]

    @property
    def charts(self) -> list[list[str]]:
        """Of each waterfall, "part +1.23" for every bar."""
        tables = re.findall(r'<table class="waterfall">(.*?)</table>', self.source)
        row = r'<th scope="row">(.*?)</th>.*?<td class="n">(.*?)</td>'
        return [[f"{name} {value}" for name, value in re.findall(row, table)] for table in tables]


def refused(capsys, arguments: list[str]) -> str:
    """Run; expect exit code 2, one line on stderr and nothing written; return the line."""
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: "), error
    assert not Path("explanations").exists()
    return error[0]


# ---- one meme


def test_one_meme_is_printed_and_drawn(here, capsys):
    assert run(["runs/trial", "--image", "img/00050.png", "--text", "my dogs love you"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"(Hateful|Benign) with probability \S+ \([12] of 2 seeds agree\); unlabelled\. \S", out)
    for phrase in ("probability of hateful", "over 2 seeds", "certified radius", "image x text", "image alone", "bias"):
        assert phrase in out
    for phrase in ("parts sum to the logit", "canonical component", "rank terms of seed 0", "dogs", "minus without it"):
        assert phrase in out
    parts = [float(re.search(rf"  {name} +(\S+) \+-", out)[1]) for name in ("bias", "image alone", "text alone")]
    interaction, total = (float(re.search(rf"  {name} +(\S+) \+-", out)[1]) for name in ("image x text", "sum"))
    assert sum(parts) + interaction == pytest.approx(total, abs=3e-3)  # as printed
    with Image.open(here / "explanations/trial-00050.png") as image:
        image.load()
        assert image.width > 1200
        assert len(image.convert("RGB").getcolors(1 << 24)) > 500


def test_meme_of_the_corpus_is_said_of_what_its_cached_features_say(here, capsys):
    row = next(csv.DictReader(Path("runs/trial/predictions_dev.csv").open()))
    text = trained_run.load_run(Path("runs/trial")).datasets[0].splits["dev"].metadata["transcript"][0]
    assert run(["runs/trial", "--image", row["id"], "--text", text, "--out", "one.png"]) == 0
    said = float(re.search(r"probability of hateful (\S+)", capsys.readouterr().out)[1])
    assert said == pytest.approx(float(row["probability"]), abs=1e-3)
    assert not Path("explanations").exists() and Path("one.png").exists()


def test_text_that_looks_like_a_formula_or_is_no_latin_is_drawn(here, capsys, recwarn):
    assert run(["runs/trial", "--image", "img/00050.png", "--text", "$5 ^_ \\frac{ $ for 狗 \U0001f415"]) == 0
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_one_named_example_is_printed_too(toy, capsys):
    toy(outputs=2)
    assert run(["runs/toy", "--ids", "0-dev-3"]) == 0
    out = capsys.readouterr().out
    for phrase in (
        "Trait_0 ",
        "largest change",
        "audio x text x video",
        "trait_0 less its bias",
        "1 example explained",
    ):
        assert phrase in out


def test_rank_maps_that_component_of_that_seed(here, capsys):
    command = ["runs/trial", "--image", "img/00050.png", "--text", "a big dog", "--rank", "2", "--seed", "1"]
    assert run(command) == 0
    assert "that feed component 2 of seed 1" in capsys.readouterr().out


# ---- pages


def test_worst_of_a_split_are_those_with_the_largest_loss_worst_first(here, capsys):
    assert run(["runs/trial", "--split", "dev", "--worst", "4"]) == 0
    page = Page(here / "explanations/trial-dev-worst-4.html")
    rows = list(csv.DictReader(Path("runs/trial/predictions_dev.csv").open()))
    loss = {r["id"]: -np.log(np.abs(1 - int(r["label"]) - float(r["probability"]))) for r in rows}
    assert page.ids == sorted(loss, key=loss.get, reverse=True)[:4]
    assert "EMAP" in page.text and "Shapley" in page.text


def test_page_needs_no_other_file_and_describes_its_pictures(here):
    assert run(["runs/trial", "--split", "test", "--maps"]) == 0  # without labels
    page = Page(here / "explanations/trial-test.html")
    assert len(page.ids) == 6
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 12  # each meme, and its map
    assert all(x["src"].startswith("data:image/jpeg;base64,") and x["alt"] for x in images)
    links = [x for _, attributes in page.tags for k, x in attributes.items() if k in ("src", "href") and x]
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"url\((?!data:)|<script [^>]|http|fetch|@import|import\(", page.source)
    assert "prefers-color-scheme: dark" in page.source
    assert len(page.charts) == 6 and all(" ".join(chart).count("image x text") == 1 for chart in page.charts)
    assert "span" in {tag for tag, _ in page.tags}


def test_named_examples_of_any_split_come_in_the_order_given(here):
    assert run(["runs/trial", "--ids", "img/00050.png", "img/00001.png", "--out", "some/page.html"]) == 0
    page = Page(Path("some/page.html"))
    assert page.ids == ["img/00050.png", "img/00001.png"]
    nearest = re.findall("nearest in train: (.*?)<", page.source.split("<li ")[2])
    assert nearest and "img/00001.png" not in " ".join(nearest)  # it is in train, and no neighbour of its own


def test_unreadable_picture_is_said_in_its_place(here, monkeypatch):
    from mmfusion.explain import page as explanation_page

    def decode(path):
        if path.name == "00050.png":
            raise OSError("<truncated>")
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(explanation_page, "decode_rgb", decode)
    assert run(["runs/trial", "--ids", "img/00050.png", "img/00051.png"]) == 0
    assert "img/00050.png: &lt;truncated&gt;" in Path("explanations/trial-ids.html").read_text()


def test_summary_is_printed_without_a_page(here, capsys):
    assert run(["runs/trial", "--summary"]) == 0
    out = capsys.readouterr().out
    for phrase in ("full model", "its EMAP", "concatenation + MLP", "Shapley", "relevance", "image x text", "on dev"):
        assert phrase in out
    assert not Path("explanations").exists()


def test_notes_of_the_data_stand_above_the_summary_and_on_the_page(toy, capsys):
    loaded = toy(task="binary", outputs=1)
    loaded.datasets[0].notes.append("scores on dev are optimistic and say little")
    assert run(["runs/toy", "--summary"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("note: scores on dev are optimistic and say little\nnote: dev is selected upon")
    assert run(["runs/toy", "--split", "test"]) == 0
    page = Page(Path("explanations/toy-test.html"))
    assert "Note: scores on dev are optimistic" in page.text and "selected upon" not in page.text
    assert run(["runs/toy", "--ids", "0-dev-3"]) == 0
    assert "note: scores on dev are optimistic" in capsys.readouterr().out
    assert "Note: scores on dev are optimistic" in Page(Path("explanations/toy-ids.html")).text


def test_summary_warns_of_a_split_that_was_trained_on(toy, capsys, monkeypatch):
    loaded = replace(toy(task="binary", outputs=1), trained_on_dev=True)
    monkeypatch.setattr("mmfusion.explain.__main__.load_run", lambda folder, device, **options: loaded)
    for split in ("dev", "train"):
        assert run(["runs/toy", "--summary", "--split", split]) == 0
        assert capsys.readouterr().out.startswith(f"note: {split} is trained on: its scores are optimistic")


def test_one_seed_has_no_spread_and_is_never_plural(toy, capsys, monkeypatch):
    loaded = toy(task="binary", outputs=1)
    ensembles = {row: torch.nn.Module() for row in loaded.ensembles}
    for row, ensemble in loaded.ensembles.items():
        ensembles[row].members = list(ensemble.members)[:1]
    loaded = replace(loaded, ensembles=ensembles, seeds=[0])
    monkeypatch.setattr("mmfusion.explain.__main__.load_run", lambda folder, device, **options: loaded)
    assert run(["runs/toy", "--ids", "0-dev-3", "--summary"]) == 0
    words = capsys.readouterr().out + Page(Path("explanations/toy-ids.html")).text
    assert "1 seed" in words and "1 seeds" not in words and "seed(s)" not in words
    assert "+-" not in words and "over seeds" not in words and "nan" not in words


@pytest.mark.parametrize("modalities", [("audio",), ("audio", "text"), ("audio", "text", "video", "words")])
def test_regression_of_any_number_of_modalities_is_explained_by_value(toy, modalities, capsys):
    toy(modalities=modalities)
    assert run(["runs/toy", "--split", "test", "--output", "1", "--summary"]) == 0
    page = Page(Path("explanations/toy-test-output-1.html"))
    assert "Trait_1 " in page.text and "the target is" in page.text and "probability" not in page.text
    assert '<select name="order">' in page.source and '<select name="show">' not in page.source
    bars = page.charts[0]
    assert len(bars) == 2 ** len(modalities) + 1
    values = [float(bar.rsplit(" ", 1)[1]) for bar in bars]
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.01 * len(bars))
    assert "correlation" in capsys.readouterr().out
    whiskers = re.findall(r'class="whisker" style="left:(.*?)%;width:(.*?)%', page.source)
    assert len(whiskers) > 0  # and they lie on the track: its ends are theirs, where they reach beyond the bars
    assert all(float(left) >= 0 and float(left) + float(width) < 100.02 for left, width in whiskers)
    # the bar of the bias has no length: a value is drawn from what the model says at the mean latents
    widths = [float(x) for x in re.findall(r'class="(?:raises|lowers|sum)" style="left:.*?%;width:(.*?)%', page.source)]
    assert widths[0] == 0 < max(widths[: len(bars)])


def test_maps_of_a_run_without_encoders_are_refused(toy, capsys):
    toy(task="binary", outputs=1)
    assert "--maps" in refused(capsys, ["runs/toy", "--split", "test", "--maps"])
    assert not Path("explanations").exists()


def test_texts_ids_and_names_are_escaped_and_control_characters_replaced(toy):
    run_of = toy(task="binary", outputs=1)
    split = run_of.datasets[0].splits["test"]
    split.ids[0] = '"><script>alert(1)</script>\x1b[2J\u202e'
    run_of.datasets[0].notes.append("<i>a note</i> with \x07")
    assert run(["runs/toy", "--split", "test"]) == 0
    page = Page(Path("explanations/toy-test.html"))
    assert "<b>" not in page.source and "<i>a" not in page.source and page.source.count("<script") == 1
    assert "<b>words</b> & more of 0-test-0" in page.text and "<i>a note</i>" in page.text
    assert page.ids[0].startswith('"><script>')
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page.source)


def test_page_says_first_in_words_what_was_predicted_then_shows_it_then_the_numbers(here):
    assert run(["runs/trial", "--split", "dev", "--worst", "5"]) == 0
    page = Page(here / "explanations/trial-dev-worst-5.html")
    for card in page.source.split("<li ")[1:]:
        places = [card.index(x) for x in ("<h2>", "with probability", "<img", "cross-entropy", 'class="waterfall"')]
        assert places == sorted(places)
    wrong = [attributes["data-wrong"] == "1" for _, attributes in page.tags if "data-wrong" in attributes]
    rows = {row["id"]: row for row in csv.DictReader(Path("runs/trial/predictions_dev.csv").open())}
    decided = [(float(rows[key]["probability"]) >= 0.5) != (rows[key]["label"] == "1") for key in page.ids]
    assert wrong == decided and any(wrong)
    assert page.text.count("; wrong: labelled") == sum(wrong) and "label 1" not in page.text
    losses = [float(attributes["data-loss"]) for _, attributes in page.tags if "data-loss" in attributes]
    assert losses == sorted(losses, reverse=True)
    assert "dev is selected upon" in page.text


def test_form_is_hidden_where_no_script_shows_it(toy):
    toy(task="binary", outputs=1)
    assert run(["runs/toy", "--split", "test"]) == 0
    page = Page(Path("explanations/toy-test.html"))
    assert next(attributes for tag, attributes in page.tags if tag == "form").keys() == {"id", "hidden"}
    assert [tag for tag, _ in page.tags].count("li") == 9 and ("ol", {"id": "examples"}) in page.tags
    options = [attributes["value"] for tag, attributes in page.tags if tag == "option"]
    assert options == ["given", "loss", "value", "id", "all", "first", "only"]


# ---- the sentence


def explained(
    prediction: list[list[float]],
    target: float | None,
    parts: dict[str, list[list[float]]] | None = None,
    task: str = "binary",
    **fields: object,
) -> Explanation:
    """One example (S, 1) with the given parts."""
    values = np.array(prediction)
    taken = {name: np.array(part) for name, part in (parts or {"bias": 0 * values, "text alone": values}).items()}
    account = explanation.Account(("text",), values, taken, 0.0, {}, {}, {})
    examples = explanation.Examples(["a"], {}, [target], {})
    seeds = list(range(len(values)))
    names = {"class_names": ("benign", "hateful")} if task == "binary" else {}
    shape = {"run": "r", "row": "LMF", "output": "logit" if task == "binary" else "value", "mapped": "", "maps": [None]}
    other = {"seed": 0, "examples": examples, "train": examples, "account": account, "ranks": None}
    return Explanation(task=task, seeds=seeds, **shape, **other, **names, **fields)


def test_sentence_of_a_right_a_wrong_and_an_unlabelled_prediction():
    logits = [[3.0], [2.0]]
    parts = {"bias": [[0.5], [0.5]], "image alone": [[-0.5], [-0.5]], "image x text": [[3.0], [2.0]]}
    start = "Hateful with probability 0.92 (2 of 2 seeds agree); "
    end = ". Image and text together push most: +2.5 in a logit of +2.5."
    for target, verdict in ((1.0, "right: labelled hateful"), (0.0, "wrong: labelled benign"), (None, "unlabelled")):
        assert sentence(explained(logits, target, parts), 0) == start + verdict + end
    assert is_wrong(explained(logits, 0.0), 0) and not is_wrong(explained(logits, None), 0)


def test_sentence_of_a_negative_prediction_names_its_own_class_and_what_pushes_down():
    parts = {"bias": [[1.0]], "image alone": [[2.0]], "text alone": [[-7.0]]}
    assert sentence(explained([[-4.0]], 1.0, parts), 0) == (
        "Benign with probability 0.98 (1 seed); wrong: labelled hateful. "
        "Text alone pushes most: -7.0 in a logit of -4.0."
    )
    assert "above 0.99 (1 seed)" in sentence(explained([[9.0]], 1.0), 0)


def test_sentence_counts_the_seeds_that_agree_with_the_mean_probability():
    # the mean probability is above 1/2 although the mean logit is below 0: no part can be named for it
    assert sentence(explained([[3.0], [3.0], [-20.0]], 0.0), 0) == (
        "Hateful with probability 0.64 (2 of 3 seeds agree); wrong: labelled benign. "
        "The seeds disagree: their mean logit is -4.7."
    )


def test_sentence_names_the_bias_where_no_part_pushes_towards_the_decision():
    parts = {"bias": [[2.0]], "text alone": [[-1.5]]}
    assert sentence(explained([[0.5]], 1.0, parts), 0).endswith(
        "No part of the example pushes that way: the bias does, +2.0 in a logit of +0.50."
    )


def test_sentence_of_a_regression_speaks_of_value_target_and_error():
    parts = {"bias": [[3.0], [3.0]], "audio x text x video": [[-1.5], [-0.5]], "text alone": [[0.25], [0.25]]}
    whole = explained([[1.75], [2.75]], 2.0, parts, "regression")
    assert sentence(whole, 0) == (
        "Value 2.25 (2 seeds, 1.75 to 2.75); the target is 2.00, the error +0.25. "
        "Audio, text and video together push most: -1.0 from 3.00 at the mean of train."
    )
    assert sentence(explained([[1.0]], None, task="regression"), 0).startswith("Value 1.00 (1 seed); unlabelled. ")
    assert whole.loss(0) == pytest.approx(0.0625)


def test_control_characters_are_replaced_and_white_space_is_a_space():
    assert plain("a\x1b[31m\nb\t\u202ec\ud800 \u200d") == "a\ufffd[31m b \ufffdc\ufffd \u200d"


def test_waterfall_bars_join_and_end_at_the_prediction():
    parts = {"bias": [[1.0], [2.0]], "text alone": [[-3.0], [-3.0]], "image alone": [[0.5], [0.0]]}
    bars = waterfall(explained([[-1.5], [-1.0]], None, parts), 0)
    np.testing.assert_allclose(bars.starts, [0, 1.5, -1.5, 0])
    np.testing.assert_allclose(bars.ends, [1.5, -1.5, -1.25, -1.25])
    np.testing.assert_allclose(bars.spread, np.std([[1, 2], [-3, -3], [0.5, 0], [-1.5, -1]], axis=1, ddof=1))
    assert bars.limits == (pytest.approx(-1.25 - 0.125**0.5), pytest.approx(1.5 + 0.5**0.5))
    regression = waterfall(explained([[-1.5], [-1.0]], None, parts, "regression"), 0)
    assert regression.origin == regression.starts[0] == regression.starts[-1] == 1.5


def test_fold_chooses_models_and_splits(toy, capsys):
    toy(folds=2)
    assert run(["runs/toy", "--split", "test", "--fold", "1", "--out", "page.html"]) == 0
    assert Page(Path("page.html")).ids[0] == "1-test-0"
    assert "0-test-0" in refused(capsys, ["runs/toy", "--ids", "0-test-0", "--fold", "1"])


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs/none", "--split", "dev"], "runs/none"),
        (["runs/trial"], "--image"),
        (["runs/trial", "--image", "img/00050.png"], "give --text too"),
        (["runs/trial", "--text", "a dog"], "give --image too"),
        (["runs/trial", "--image", "img/00050.png", "--text", " "], "--text"),
        (["runs/trial", "--image", "img/none.png", "--text", "a dog"], "--image img/none.png: no such file"),
        (["runs/trial", "--image", "train.jsonl", "--text", "a dog"], "--image train.jsonl: not an image"),
        (["runs/trial", "--image", "img/00050.png", "--text", "a dog", "--split", "dev"], "leave --split out"),
        (["runs/trial", "--image", "img/00050.png", "--text", "a dog", "--summary"], "--summary"),
        (["runs/trial", "--ids", "img/0005.png"], "--ids img/0005.png"),
        (["runs/trial", "--ids", "img/00050.png", "--split", "dev"], "--ids"),
        (["runs/trial", "--split", "holdout"], "--split holdout: hateful_memes has train, dev, test"),
        (["runs/trial", "--split", "dev", "--worst", "0"], "--worst 0"),
        (["runs/trial", "--split", "test", "--worst", "3"], "--worst: test has no labels"),
        (["runs/trial", "--ids", "img/00050.png", "--worst", "3"], "--worst"),
        (["runs/trial", "--split", "dev", "--rank", "1"], "--rank 1: says what is mapped"),
        (["runs/trial", "--split", "dev", "--maps", "--rank", "0"], "--rank 0"),
        (["runs/trial", "--split", "dev", "--maps", "--rank", "3"], "--rank 3: this run has ranks 1 to 2"),
        (["runs/trial", "--split", "dev", "--seed", "7"], "--seed 7: this run's seeds are 0, 1"),
        (["runs/trial", "--split", "dev", "--output", "1"], "--output 1"),
        (["runs/trial", "--split", "dev", "--fold", "1"], "--fold 1"),
        (["runs/trial", "--split", "dev", "--neighbours", "0"], "--neighbours 0"),
        (["runs/trial", "--split", "dev", "--out", "img"], "--out img: is a folder"),
        (["runs/trial", "--split", "dev", "--out", "page.png"], "--out page.png: what is written is a .html file"),
        (
            ["runs/trial", "--image", "img/00050.png", "--text", "a dog", "--out", "img/00050.png"],
            "--out img/00050.png: is the picture itself",
        ),
        (["runs/trial", "--split", "dev", "--device", "toaster"], "--device toaster"),
        (["runs/trial", "--splits", "dev"], "--splits"),
    ],
)
def test_mistake_is_one_line_and_nothing_is_written(here, capsys, arguments, expected):
    assert expected in refused(capsys, arguments)


def test_meme_is_refused_by_a_run_without_pictures(toy, capsys):
    toy()
    assert "--image a.png" in refused(capsys, ["runs/toy", "--image", "a.png", "--text", "a dog"])


def test_folder_that_cannot_be_written_is_one_line(here, capsys):
    Path("taken").write_text("a file")
    assert "taken/page.html" in refused(capsys, ["runs/trial", "--split", "dev", "--out", "taken/page.html"])
    assert Path("taken").read_text() == "a file"


# ---- the account


def member_of(modalities: int, outputs: int, fused_dim: int | None = None, dtype=torch.float32) -> FusionModel:
    torch.manual_seed(modalities + outputs)
    names = [f"m{k}" for k in range(modalities)]
    model = FusionModel(dict.fromkeys(names, 6), 5, 8, rank=3, output_dim=outputs, active_rank=2, fused_dim=fused_dim)
    model.fit_standardisation({name: torch.randn(30, 6) for name in names})
    model.rescale.fit(torch.randn(30, outputs) * 3 + 2)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("fused_dim", [None, 4])
@pytest.mark.parametrize(("modalities", "outputs"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_account_sums_to_the_prediction_whatever_the_head(modalities, outputs, fused_dim):
    member = member_of(modalities, outputs, fused_dim, torch.float64)
    features, train = ({name: torch.randn(n, 6).double() for name in member.modalities} for n in (7, 20))
    whole = member(features).prediction
    torch.testing.assert_close(exact_layer(member)(latents_of(member, features)), whole, rtol=1e-10, atol=1e-10)
    account = account_for([member], features, train, outputs - 1)
    assert len(account.parts) == 2**modalities
    np.testing.assert_allclose(sum(account.parts.values())[0], whole[:, -1], rtol=1e-10, atol=1e-10)
    ranks = RankComponents(member, train, outputs - 1).account(features, 3, [None] * 7)
    what = account.parts["m0 x m1"][0] if modalities == 2 else whole[:, -1].numpy() - ranks.raw_bias
    np.testing.assert_allclose(ranks.terms.sum(1), what, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ranks.weight * ranks.coordinates.prod(-1), ranks.terms, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fused_dim", [None, 4])
def test_exact_layer_takes_shared_factors_masks_and_computed_weights(fused_dim):
    member = member_of(2, 3, fused_dim, torch.float64)
    layer = LowRankMultimodalFusion([5, 5], fused_dim or 3, 3, shared_factors=True, active_rank=2).double()
    torch.nn.utils.parametrizations.weight_norm(layer.projections[0])
    if fused_dim:
        member.fusion.layer = layer
    else:
        member.fusion = layer
    features = {name: torch.randn(7, 6).double() for name in member.modalities}
    state = torch.random.get_rng_state()
    exact = exact_layer(member)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(exact(latents_of(member, features)), member(features).prediction)


def test_bias_is_the_prediction_at_the_mean_latents_and_parts_are_what_a_latent_changes():
    member = member_of(2, 1, dtype=torch.float64)
    features, train = ({name: torch.randn(n, 6).double() for name in member.modalities} for n in (7, 20))
    account = account_for([member], features, train)
    layer, z, reference = exact_layer(member), latents_of(member, features), latents_of(member, train)
    mean = [x.mean(0).expand(7, -1) for x in reference]
    bias, first = layer(mean)[:, 0], layer([z[0], mean[1]])[:, 0]
    np.testing.assert_allclose(account.parts["bias"][0], bias)
    np.testing.assert_allclose(account.parts["m0 alone"][0], first - bias)


def test_radius_is_attained_and_nothing_nearer_changes_the_decision():
    member = member_of(2, 1, dtype=torch.float64)
    features = {name: torch.randn(5, 6).double() for name in member.modalities}
    account = account_for([member], features, features)
    layer, z = exact_layer(member), latents_of(member, features)
    radius = torch.tensor(account.radius["m1"][0])
    gradient = layer.modality_gradient(z, 1)[:, 0]
    step = -layer(z)[:, :1].sign() * gradient / gradient.norm(dim=1, keepdim=True) * radius[:, None]
    torch.testing.assert_close(layer([z[0], z[1] + step])[:, 0], torch.zeros(5).double(), rtol=0, atol=1e-9)
    random = torch.randn(200, 5, 5).double()
    moved = z[1] + 0.999 * radius[:, None] * random / random.norm(dim=-1, keepdim=True)
    assert (layer([z[0].expand_as(moved), moved]).sign() == layer(z).sign()).all()


def test_account_that_does_not_sum_is_an_error(monkeypatch):
    member = member_of(2, 1)
    features = {name: torch.randn(5, 6) for name in member.modalities}
    honest = explanation.recentred_parts
    monkeypatch.setattr(explanation, "recentred_parts", lambda *a: {k: v + 1e-3 for k, v in honest(*a).items()})
    with pytest.raises(ArithmeticError):
        account_for([member], features, features)


def test_canonical_terms_do_not_depend_on_the_basis_of_the_factors():
    member, other = member_of(2, 1, dtype=torch.float64), member_of(2, 1, dtype=torch.float64)
    features, train = ({name: torch.randn(n, 6).double() for name in member.modalities} for n in (7, 20))
    # ranks in another order, scale moved between the factors: the same function
    fusion, order = other.fusion, [1, 0, 2]
    fusion.projections[0].weight.copy_(member.fusion.projections[0].weight[order] * 3)
    fusion.projections[0].bias.copy_(member.fusion.projections[0].bias[order] * 3)
    fusion.projections[1].weight.copy_(member.fusion.projections[1].weight[order] / 3)
    fusion.projections[1].bias.copy_(member.fusion.projections[1].bias[order] / 3)
    fusion.rank_weights.copy_(member.fusion.rank_weights[order])
    a, b = (RankComponents(m, train).account(features, 2, [None] * 7) for m in (member, other))
    np.testing.assert_allclose(a.terms, b.terms, atol=1e-9)
    assert np.abs(a.raw_terms - b.raw_terms).max() > 1e-3
    assert np.array_equal(a.neighbours[:, :2], b.neighbours[:, :2])  # the third, of no weight, is nobody's


def test_neighbours_are_the_nearest_in_both_coordinates_and_never_oneself():
    member = member_of(2, 1, dtype=torch.float64)
    train = {name: torch.randn(20, 6).double() for name in member.modalities}
    components = RankComponents(member, train)
    account = components.account(train, 3, list(range(20)))
    coordinates = components.train_coordinates.numpy()  # (n, R, M)
    np.testing.assert_allclose(coordinates[:, :2].std(0, ddof=1), 1, rtol=1e-6)
    for r in range(2):
        distance = np.linalg.norm(coordinates[:, None, r] - coordinates[None, :, r], axis=-1)
        np.fill_diagonal(distance, np.inf)
        np.testing.assert_array_equal(account.neighbours[:, r], np.argsort(distance, 1)[:, :3])


def test_loss_of_the_ensemble_is_that_of_the_mean_probability():
    logits, target = np.array([[2.0, -900.0, 1.0], [-1.0, -800.0, 3.0]]), np.array([1.0, 1.0, 0.0])
    p = (1 / (1 + np.exp(-logits[:, [0, 2]]))).mean(0)
    losses = ensemble_losses(logits, target, "binary")
    np.testing.assert_allclose(losses[[0, 2]], [-np.log(p[0]), -np.log(1 - p[1])])
    assert losses[1] == pytest.approx(800 + np.log(2))  # where the probability itself is 0
    np.testing.assert_allclose(ensemble_losses(logits, target, "regression")[0], (0.5 - 1) ** 2)


def test_half_a_surrogate_pair_in_the_text_is_one_line(toy, capsys):
    toy()
    line = refused(capsys, ["runs/toy", "--image", "a.png", "--text", "lone \udced end"])
    assert "--text" in line and "no UTF-8" in line and "\udced" not in line
