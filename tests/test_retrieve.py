"""Retrieval in the latents of a run, as a user meets it and against slow loops."""

import copy
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_memes import write_bert, write_memes
from test_explain import small_run
from test_main import flags

import main_hateful_memes
from mmfusion.dataset import Dataset, Split, take
from mmfusion.metrics.retrieval import cross_retrieval
from mmfusion.models.fusion import FusionEnsemble, ModelConfig
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.retrieve import default_path, gallery_of, print_scores, run, similarities
from mmfusion.runs.encode import RunEncoders
from mmfusion.runs.load import TrainedRun, load_run
from mmfusion.runs.shared_space import shared_latents
from mmfusion.training import fit
from mmfusion.training.fit import Method
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

SIZES = {"train": 24, "dev": 8, "test": 4}
LINE = re.compile(r"^ *(-?\d\.\d{3})  (img/\d+\.png)  (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The working folder of a finished run of two seeds on tiny memes."""
    place, before = tmp_path_factory.mktemp("memes"), Path.cwd()
    write_bert(place / "bert")
    write_memes(place, SIZES)
    os.chdir(place)
    try:
        assert main_hateful_memes.run(flags(place, epochs=1)) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """A working folder from which the run can be read, so that what is written is seen."""
    for name in ("bert", "img", "cache", "runs", "train.jsonl", "dev.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(finished / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(finished) -> TrainedRun:
    return load_run(finished / "runs/trial")


def found_in(text: str) -> list[tuple[float, str, str]]:
    return [(float(cosine), key, words) for cosine, key, words in LINE.findall(text)]


def command(*arguments: object) -> int:
    return run(["runs/trial", "--device", "cpu", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """Exit code 2, one line on stderr, nothing written; the line."""
    before = sorted(Path().iterdir())
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert sorted(Path().iterdir()) == before
    return lines[0]


# ---- what is found -----------------------------------------------------------------------------------------------


def slow_similarities(trained: TrainedRun, asked: str, x: torch.Tensor, searched: str) -> dict[str, float]:
    """{id: cosine} example by example and member by member."""
    expected = {}
    for split in trained.datasets[0].splits.values():
        for row, key in enumerate(split.ids):
            cosines = []
            for member in trained.members(trained.main_row):
                z = {}
                for name, raw in ((asked, x), (searched, split.features[searched][row])):
                    scaled = (raw - member.standardise[name].mean) / member.standardise[name].std
                    own = member.jwae.encoders[name](scaled[None])[0].detach().double().numpy()
                    z[name] = member.frames[name].matrix.double().numpy() @ own + member.frames[name].shift.numpy()
                norms = np.linalg.norm(z[asked]) * np.linalg.norm(z[searched])
                cosines.append(z[asked] @ z[searched] / norms)
            expected[key] = float(np.mean(cosines))
    return expected


@pytest.mark.parametrize("asked", ["text", "image"])
def test_similarity_is_the_mean_cosine_over_members_and_the_nearest_is_first(here, trained, capsys, asked):
    encoders, searched = RunEncoders(trained, "cpu"), "image" if asked == "text" else "text"
    given = {"texts": ["a big dog"]} if asked == "text" else {"images": [Path("img/00030.png")]}
    expected = slow_similarities(trained, asked, encoders.encode(**given)[asked][0], searched)
    assert command(f"--{asked}", "a big dog" if asked == "text" else "img/00030.png", "--count", 100) == 0
    found = found_in(capsys.readouterr().out)
    assert [key for _, key, _ in found] == sorted(expected, key=expected.get, reverse=True)
    for cosine, key, _ in found:
        assert cosine == pytest.approx(expected[key], abs=6e-4)


def test_members_are_averaged_as_cosines_not_as_latents(trained):
    members, split = trained.members(trained.main_row), trained.datasets[0].splits["dev"]
    query, gallery = {"text": split.features["text"][:1]}, {"image": split.features["image"]}
    apart = [similarities([member], query, gallery) for member in members]
    assert np.abs(apart[0] - apart[1]).max() > 1e-2  # else the mean would not be seen
    np.testing.assert_allclose(similarities(members, query, gallery), np.mean(apart, 0), atol=1e-6)


def test_a_meme_of_the_data_asks_with_the_latent_that_the_run_has_of_it(trained):
    gallery, row = gallery_of(trained, trained.datasets[0].splits), 5
    encoded = RunEncoders(trained, "cpu").encode(texts=[gallery.texts[row]])["text"]
    torch.testing.assert_close(encoded[0], gallery.features["text"][row], rtol=1e-4, atol=1e-5)


def test_gallery_holds_every_example_once_with_its_own_text_and_features(trained):
    splits = trained.datasets[0].splits
    gallery = gallery_of(trained, splits)
    assert sorted(gallery.ids) == sorted(key for split in splits.values() for key in split.ids)
    overlapping = {"train": splits["train"], "dev": replace(splits["dev"], ids=splits["train"].ids[:8])}
    assert len(gallery_of(trained, overlapping).ids) == 24
    for split in splits.values():
        for row, key in enumerate(split.ids):
            place = gallery.ids.index(key)
            assert gallery.texts[place] == split.metadata["transcript"][row]
            assert torch.equal(gallery.features["image"][place], split.features["image"][row])


def test_split_and_count_bound_what_is_listed(here, trained, capsys):
    assert command("--text", "dogs", "--split", "dev", "--count", 3) == 0
    out = capsys.readouterr().out
    assert "of 8 examples" in out and len(found_in(out)) == 3
    assert {key for _, key, _ in found_in(out)} < set(trained.datasets[0].splits["dev"].ids)
    assert command("--text", "dogs", "--split", "test", "--count", 100) == 0
    assert len(found_in(capsys.readouterr().out)) == 4  # the whole gallery


def test_scores_of_rows_that_share_images_count_each_image_once(trained, capsys):
    split = trained.datasets[0].splits["train"]
    rows = torch.arange(0, len(split), 4).repeat_interleave(4)  # each picture under four of the texts
    names = [split.ids[row] for row in rows]
    features = split.features | {"image": split.features["image"][rows]}
    print_scores(trained, {"train": replace(split, features=features, metadata={"image": names})})
    lines = capsys.readouterr().out.splitlines()
    (forth,), (back,) = ([k for k, line in enumerate(lines) if line.startswith(f"{pair}, train, n = ")]
                         for pair in ("image to text", "text to image"))  # fmt: skip
    assert "n = 6" in lines[forth] and "n = 24" in lines[back]
    chance = [[float(number) for number in lines[k + 1].split()[1:]] for k in (forth, back)]
    assert chance[0][0] == pytest.approx(4 / 24, abs=6e-4) and chance[1][0] == pytest.approx(1 / 6, abs=6e-4)
    assert chance[0][1] == pytest.approx(1 - np.prod([(20 - k) / (24 - k) for k in range(5)]), abs=6e-4)
    assert chance[1][1] == pytest.approx(5 / 6, abs=6e-4)


def test_scores_are_those_of_cross_retrieval_with_chance_beside(here, trained, capsys):
    assert command("--scores", "--split", "dev") == 0
    out, split = capsys.readouterr().out, trained.datasets[0].splits["dev"]
    assert not Path("retrieved").exists() and "train" not in out
    for pair in (("image", "text"), ("text", "image")):
        own = []
        for member in trained.members(trained.main_row):
            latents = {
                name: z.detach().numpy() @ member.frames[name].matrix.numpy().T + member.frames[name].shift.numpy()
                for name, z in member.encode(split.features).items()
            }
            own.append(cross_retrieval(latents)[pair])
        line = next(line for line in out.splitlines() if line.startswith(f"{pair[0]} to {pair[1]}, dev, n = 8"))
        precision = [one.mean_average_precision for one in own]
        assert f"{np.mean(precision):.3f} +- {np.std(precision, ddof=1):.3f}" in line
        assert f"{np.mean([one.recall[1] for one in own]):.3f} +-" in line
    chance = next(line.split()[1:] for line in out.splitlines() if line.startswith("  chance"))
    assert [float(x) for x in chance[:4]] == [0.125, 0.625, 1.0, 4.5]


@pytest.fixture(scope="module")
def aligned() -> tuple[FusionEnsemble, FusionEnsemble, Dataset]:
    """Two seeds trained to align views of one factor under the prior: before whitening, as a run has them, and data."""
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(260, 5, generator=draws)
    noise = torch.linspace(0.05, 0.5, 5)  # what a knows best b knows least: whitening orders their latents otherwise
    features = {name: z + s * torch.randn(260, 5, generator=draws) for name, s in (("a", noise), ("b", noise.flip(0)))}
    whole = Split(features, (z[:, 0] > 0).float(), [str(i) for i in range(260)])
    splits = {"train": take(whole, range(200)), "dev": take(whole, range(200, 260))}
    data, kept = Dataset("views", "binary", splits, "dev"), []
    with pytest.MonkeyPatch.context() as patch:
        given = fit.give_prior
        patch.setattr(fit, "give_prior", lambda m, *rest: (kept.extend(copy.deepcopy(m)), given(m, *rest)))
        (whitened,), _ = fit.fit_methods(
            data,
            [Method("jWAE-LMF", ("a", "b"))],
            ModelConfig(6, 16, 2),
            ObjectiveConfig(alignment="info_nce", alignment_weight=1.0),
            TrainingConfig(seeds=2, epochs=15, batch_size=50, learning_rate=5e-3, keep="last"),
        )
    shape = {name: value for name, value in whitened.shape.items() if name != "members"}
    return FusionEnsemble.from_members(kept, **shape), whitened, data


def test_partners_are_found_as_they_were_before_the_prior_was_given(aligned):
    before, after, data = aligned
    split = data.splits["dev"]
    for trained_member, member in zip(before.members, after.members, strict=True):
        of_training = {name: z.detach().numpy() for name, z in trained_member.encode(split.features).items()}
        own = {name: z.detach().numpy() for name, z in member.encode(split.features).items()}
        expected, found = cross_retrieval(of_training), cross_retrieval(shared_latents(member, split))
        parted = cross_retrieval(own)
        for pair, one in found.items():
            assert one.median_rank <= 3, "chance is 30.5"
            assert one.mean_average_precision == pytest.approx(expected[pair].mean_average_precision, abs=5e-3)
            assert parted[pair].mean_average_precision < 0.6 * one.mean_average_precision, "else nothing is tested"
    query, gallery = {"a": split.features["a"][7:8]}, {"b": split.features["b"]}
    found = similarities(list(after.members), query, gallery)
    np.testing.assert_allclose(found, similarities(list(before.members), query, gallery), atol=1e-4)
    assert (found > found[7]).sum() < 5


def test_command_prints_the_ranks_of_the_space_that_was_trained(aligned, here, capsys, monkeypatch):
    _, after, data = aligned
    toy = small_run(modalities=("a", "b"), task="binary", outputs=1)
    made = replace(toy, ensembles={"jWAE-LMF": after.requires_grad_(False)}, datasets=[data])
    monkeypatch.setattr("mmfusion.retrieve.load_run", lambda folder, device: made)
    assert command("--scores", "--split", "dev") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " to " in line]
    assert len(lines) == 2
    for line in lines:
        at_1, at_5, at_10, median, precision = (float(x) for x in re.findall(r"(\d+\.\d+) \+-", line))
        assert median <= 3 and at_5 > 0.6 and at_1 <= at_5 <= at_10 and precision > 0.4


# ---- the contact sheet -------------------------------------------------------------------------------------------


def test_contact_sheet_is_a_png_in_a_folder_that_need_not_be_there(here, capsys):
    assert command("--text", "dogs", "--count", 6, "--out", "new/folder/sheet.PNG") == 0
    with Image.open("new/folder/sheet.PNG") as image:
        image.load()
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 500
    assert not Path("retrieved").exists() and [path.name for path in Path("new/folder").iterdir()] == ["sheet.PNG"]
    assert "drawn in new/folder/sheet.PNG" in capsys.readouterr().out


def test_a_text_like_a_formula_with_line_breaks_and_escapes_is_drawn_and_printed_safely(here, capsys, recwarn):
    assert command("--text", "$5 \\frac{ ^_\n\x1b[31m  of 狗 $", "--count", 1) == 0
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(found_in(out)) == 1
    assert out.count("\n") == 6  # blank, title, heading, one line, blank, where it is drawn
    (sheet,) = Path("retrieved").iterdir()
    assert re.fullmatch(r"trial-[\w.-]+\.png", sheet.name)


@pytest.mark.parametrize("text", ["../../x", "/etc/passwd", "...", "狗", "a" * 500, "\n"])
def test_default_name_is_a_file_in_its_folder_whatever_the_text(text):
    path = default_path(Path("runs/trial"), text)
    assert path.parent == Path("retrieved") and path.suffix == ".png" and len(path.name.encode()) < 255
    assert "/" not in path.name and path.name.startswith("trial-")


def test_a_picture_that_is_gone_is_said_in_its_place(here, capsys):
    (here / "img").unlink()
    (here / "img").mkdir()
    assert command("--text", "dogs", "--count", 2, "--out", "x.png") == 0
    assert Path("x.png").stat().st_size > 1000


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--text: nothing to look for"),
        (("--text", " \n"), "--text: is empty"),
        (("--text", "a", "--image", "img/00001.png"), "leave one of the two out"),
        (("--text", "a", "--count", 0), "--count 0: give a number from 1 to 100"),
        (("--text", "a", "--count", 101), "--count 101"),
        (("--text", "a", "--split", "valid"), "--split valid: runs/trial has train, dev, test"),
        (("--text", "a", "--out", "x.jpg"), "--out x.jpg: what is written is a .png"),
        (("--text", "a", "--out", "img"), "--out img: what is written is a .png"),
        (("--image", "img/00001.png", "--out", "x.png"), "--out: pictures are drawn for --text alone"),
        (("--scores", "--out", "x.png"), "--out: pictures are drawn for --text alone"),
        (("--text", "lone \udced end"), "no UTF-8"),
        (("--text", "a", "--device", "gpu"), "--device gpu: not available"),
        (("--text", "a", "--out", "dev.jsonl/x.png"), "dev.jsonl/x.png: cannot be written"),
        (("--image", "gone.png"), "--image gone.png: no such file"),
        (("--image", "img"), "--image img: Is a directory"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(here, capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_pictures_that_cannot_be_read_are_one_line(here, capsys):
    os.mkfifo("pipe.png")
    Path("cut.png").write_bytes(Path("img/00001.png").read_bytes()[:200])
    Path("words.png").write_text("no picture")
    assert "--image pipe.png: is a FIFO" in refused(capsys, "--image", "pipe.png")
    assert "--image cut.png: " in refused(capsys, "--image", "cut.png")
    assert "--image words.png: not an image" in refused(capsys, "--image", "words.png")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("one modality", "runs/trial: has no latents of several modalities"),
        ("tokens", "runs/trial: has no latents of several modalities"),
        ("no memes", "runs/toy was not trained on memes: it takes no raw memes; --scores alone"),
        ("features", "features of image came from files (--features): it takes no raw memes; --scores alone"),
    ],
)
def test_runs_without_what_is_asked_are_one_line(here, trained, capsys, monkeypatch, what, words):
    made = small_run(modalities=("text",) if what == "one modality" else ("image", "text"), task="binary", outputs=1)
    if what == "tokens":
        row = next(iter(made.ensembles))
        made = replace(made, ensembles={row: TokenEnsemble.__new__(TokenEnsemble)})
    if what == "features":
        made = replace(trained, memes=replace(trained.memes, given=("image",)))
    monkeypatch.setattr("mmfusion.retrieve.load_run", lambda folder, device: made)
    assert words in refused(capsys, "--text", "a dog")


def test_a_folder_without_a_run_is_one_line(here, capsys):
    with pytest.raises(SystemExit):
        run(["img", "--text", "a"])
    assert "img: holds no run" in capsys.readouterr().err


def test_scores_need_no_encoders(here, capsys, monkeypatch):
    made = small_run(modalities=("audio", "text", "video"))
    monkeypatch.setattr("mmfusion.retrieve.load_run", lambda folder, device: made)
    assert command("--scores") == 0
    assert capsys.readouterr().out.count(" to ") == 18  # six ordered pairs of three splits
