"""The main job as a user meets it: runs, resumes, refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from small_memes import write_bert, write_memes, write_rows

import main_hateful_memes as script
from main_hateful_memes import Config, run
from mmfusion.cli import parse
from mmfusion.data.memes import MemesConfig, load_memes
from mmfusion.errors import InputError
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.runs.folder import RunFolder
from mmfusion.runs.outputs import plain_cell

ROOT = Path(script.__file__).parent


@pytest.fixture(scope="module")
def memes(tmp_path_factory) -> Path:
    """A folder in the release's layout, a tiny BERT, and a cache that the first run fills for all."""
    folder = tmp_path_factory.mktemp("memes")
    write_bert(folder / "bert")
    write_memes(folder, {"train": 48, "dev": 16, "test": 6, "dev_unseen": 12})
    return folder


def flags(memes: Path, **changes) -> list[str]:
    values = {
        "jsonl": memes / "train.jsonl",
        "image-encoder": "random:resnet50",
        "image-size": 32,
        "text-encoder": f"random:{memes / 'bert'}",
        "cache-dir": memes / "cache",
        "latent-dim": 4,
        "hidden-dim": 8,
        "rank": 2,
        "epochs": 3,
        "batch-size": 16,
        "device": "cpu",
        "seeds": 2,
        "name": "trial",
    } | {key.replace("_", "-"): value for key, value in changes.items()}
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", *str(value).split())]


def refused(capsys, arguments: list[str]) -> str:
    """Run; expect exit code 2 and one line on stderr after the progress bars; return the line."""
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and error[0].startswith("error: "), error
    return error[0]


@pytest.fixture(scope="module")
def finished(memes, tmp_path_factory) -> Path:
    """The folder of one finished run."""
    place = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(place)
    try:
        assert run(flags(memes)) == 0
    finally:
        os.chdir(before)
    return place / "runs/trial"


# ---- what a run leaves


def test_run_leaves_its_files_and_no_checkpoint(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "run.json", "metrics.jsonl", "model.safetensors", "report.png", "results.json"}
    assert "geometry.png" in names
    assert names >= {f"predictions_{split}.csv" for split in ("train", "dev", "dev_unseen", "test")}
    assert not any("checkpoint" in name or name.startswith(".") for name in names)
    assert {p.name for p in (finished / "baselines").iterdir()} == {
        "jWAE-LMF-rank-1", "jWAE-LMF-no-prior", "concatenation-MLP", "image-only", "text-only",
    }  # fmt: skip


def test_config_says_versions_device_revision_encoders_and_data(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["input_dims"] == {"image": 2048, "text": 32}
    said = config["run"]
    assert (
        said["versions"]["torch"] == torch.__version__.split("+")[0] or said["versions"]["torch"] == torch.__version__
    )
    assert said["device"] == "cpu"
    assert "git_revision" in said
    assert len(said["data"]["data_fingerprint"]) == 64
    assert "random" in json.dumps(said["data"]["encoders"]["image"])
    assert said["settings"]["epochs"] == 3


def test_predictions_are_what_the_loaded_model_says_of_raw_features(finished, memes):
    config = parse(Config, flags(memes))
    dataset = load_memes(config.data, config.encoders, script.join_processes("cpu"))
    model = FusionEnsemble.from_pretrained(finished)
    for name, split in dataset.splits.items():
        rows = list(csv.DictReader((finished / f"predictions_{name}.csv").open()))
        assert [row["id"] for row in rows] == split.ids
        expected = model.predict_proba(split.features).numpy()
        for s in range(2):
            assert np.array_equal(np.array([np.float32(row[f"seed_{s}"]) for row in rows]), expected[s])
        labels = [row["label"] for row in rows]
        assert set(labels) == ({""} if name == "test" else {"0", "1"})


def test_results_are_the_scores_of_the_predictions(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = list(csv.DictReader((finished / "predictions_dev_unseen.csv").open()))
    target = [int(row["label"]) for row in rows]
    aurocs = [roc_auc_score(target, [float(row[f"seed_{s}"]) for row in rows]) for s in range(2)]
    score = results["scores"]["jWAE-LMF, rank 2"]["dev_unseen"]["auroc"]
    assert score["members"] == pytest.approx(aurocs)
    assert score["mean"] == pytest.approx(np.mean(aurocs))
    assert results["selection"] == "dev"
    assert "test" not in results["scores"]["image only"]


def test_probability_is_the_mean_over_seeds(finished):
    for row in csv.DictReader((finished / "predictions_test.csv").open()):
        assert float(row["probability"]) == pytest.approx((float(row["seed_0"]) + float(row["seed_1"])) / 2, abs=1e-6)


def test_standardisation_is_that_of_train_alone(finished, memes):
    config = parse(Config, flags(memes))
    dataset = load_memes(config.data, config.encoders, script.join_processes("cpu"))
    for member in FusionEnsemble.from_pretrained(finished).members:
        for name, x in dataset.splits["train"].features.items():
            torch.testing.assert_close(member.standardise[name].mean, x.mean(0), rtol=1e-4, atol=1e-6)


def test_rank_and_part_shares_sum_to_one(finished):
    ranks = json.loads((finished / "results.json").read_text())["ranks"]
    np.testing.assert_allclose(np.sum(ranks["share"], axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(np.sum(list(ranks["part_share"].values()), axis=0), 1, atol=1e-9)
    assert set(ranks["part_share"]) == {"image", "text", "image x text"}


def test_metrics_hold_a_line_for_each_row_and_epoch(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {
        "jWAE-LMF, rank 2", "jWAE-LMF, rank 1", "jWAE-LMF, no prior", "concatenation + MLP", "image only", "text only",
    }  # fmt: skip
    fusion = [line for line in lines if line["method"] == "jWAE-LMF, rank 2"]
    assert [line["epoch"] for line in fusion] == [0, 1, 2]
    assert all(len(line["dev_auroc"]) == 2 and len(line["loss"]["mmd"]) == 2 for line in fusion)


@pytest.mark.parametrize("name", ["report.png", "geometry.png"])
def test_report_is_a_picture(finished, name):
    with Image.open(finished / name) as image:
        image.load()
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100  # something is drawn


def test_printed_tables_name_every_row_split_and_rank(memes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(flags(memes)) == 0
    out = capsys.readouterr().out
    for phrase in ("selected upon", "dev_unseen, n = 12", "image only", "text only", "concatenation + MLP", "+-", "["):
        assert phrase in out
    assert "python -m mmfusion.geometry runs/trial" in out
    for phrase in ("canonical spectrum", "share of variance", "image x text together", "bias"):
        assert phrase in out
    assert "DEMO" not in out


# ---- resume


def test_resume_refuses_another_config_other_data_and_a_run_that_is_not_there(memes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no run runs/trial" in refused(capsys, [*flags(memes), "--resume"])
    assert run(flags(memes)) == 0
    line = refused(capsys, [*flags(memes, rank=1), "--resume"])
    assert "--rank 2, not 1" in line
    other = tmp_path / "other"
    write_memes(other, {"train": 40, "dev": 16})
    assert "another experiment, dataset" in refused(capsys, [*flags(memes, jsonl=other / "train.jsonl"), "--resume"])


def test_resuming_a_finished_run_says_so_and_changes_nothing(memes, finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent.parent)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run([*flags(memes), "--resume"]) == 0
    assert "complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_taken_name_is_refused_and_a_default_name_is_numbered(memes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(flags(memes, epochs=1, name=None)) == 0
    assert run(flags(memes, epochs=1, name=None)) == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"hateful_memes", "hateful_memes-2"}
    assert "this run exists" in refused(capsys, flags(memes, name="hateful_memes"))


def test_two_runs_begun_at_once_do_not_share_a_folder(memes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(Config, flags(memes))
    same = [RunFolder.claim(config, "demo") for _ in range(2)]
    assert same[0].begin({}, torch.device("cpu"))
    with pytest.raises(InputError, match="another run has just taken this name"):
        same[1].begin({}, torch.device("cpu"))
    unnamed = [RunFolder.claim(parse(Config, flags(memes, name=None)), "demo") for _ in range(3)]
    assert all(run.begin({}, torch.device("cpu")) for run in unnamed)
    assert [run.path.name for run in unnamed] == ["demo", "demo-2", "demo-3"]


def test_two_processes_cannot_resume_one_run(memes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunFolder.claim(parse(Config, flags(memes)), "demo")
    assert first.begin({}, torch.device("cpu"))
    second = RunFolder.claim(parse(Config, [*flags(memes), "--resume"]), "demo")
    with pytest.raises(InputError, match="another process is at work in it"):
        second.begin({}, torch.device("cpu"))


def test_kill_before_run_json_leaves_a_name_that_can_be_used(memes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/trial").mkdir(parents=True)  # what a kill between mkdir and run.json left
    (tmp_path / "runs/.trial.1.begun").mkdir()
    assert RunFolder.claim(parse(Config, flags(memes)), "demo").begin({}, torch.device("cpu"))
    assert (tmp_path / "runs/trial/run.json").is_file()


def test_resume_needs_no_flag_but_the_name(memes, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs/trial")
    assert run(["--name", "trial", "--resume"]) == 0
    assert "this run is complete" in capsys.readouterr().out
    assert "was begun with --rank 2, not 3" in refused(capsys, ["--name", "trial", "--resume", "--rank", "3"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "run.json"),
        ("[1]", "run.json"),
        ('{"settings": 1, "data": {}, "device": "cpu"}', "run.json"),
        ('{"settings": {"rank": "x"}, "data": {}, "device": "cpu"}', "setting rank"),
        ("[" * 100_000, "run.json"),
    ],
)
def test_malformed_run_json_is_one_line(tmp_path, monkeypatch, capsys, text, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/trial").mkdir(parents=True)
    (tmp_path / "runs/trial/run.json").write_text(text)
    assert named in refused(capsys, ["--name", "trial", "--resume"])


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"rank": "four"}, "--rank"),
        ({"epochs": -1}, "--epochs"),
        ({"batch_size": 1}, "--batch-size 1"),
        ({"mmd_weight": "nan"}, "--mmd-weight nan"),
        ({"learning_rate": 0}, "--learning-rate"),
        ({"seeds": 0}, "--seeds 0"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "toaster"}, "--device toaster"),
        ({"name": "a/b"}, "--name"),
        ({"name": "n" * 300}, "--name"),
        ({"seeds": 99999999999999999999}, "--seeds"),
        ({"device": "meta"}, "--device meta"),
        ({"bad_images": "ignore"}, "--bad-images"),
        ({"image_size": 8}, "--image-size 8"),
        ({"jsonl": "nowhere/train.jsonl"}, "nowhere"),
        ({"img_dir": "nowhere"}, "nowhere"),
        ({"jsonl": None, "img_dir": "."}, "--img-dir"),
    ],
)
def test_flag_that_makes_no_sense_is_one_line_and_nothing_is_written(
    memes, tmp_path, monkeypatch, capsys, changes, expected
):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, flags(memes, **changes))
    assert list(tmp_path.iterdir()) == []


def test_compile_without_a_compiler_is_one_line(memes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in refused(capsys, [*flags(memes), "--compile"])


def test_unknown_flag_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--rnk" in refused(capsys, ["--rnk", "3"])


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for section in fields(Config()):
        for field in fields(getattr(Config(), section.name)):
            assert f"--{field.name.replace('_', '-')}" in out
    assert "REAL_PATH" in out


def test_bad_image_stops_the_run_before_its_folder_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert")
    write_memes(tmp_path)
    (tmp_path / "img/00003.png").write_bytes(b"not an image")
    line = refused(capsys, flags(tmp_path))
    assert "img/00003.png" in line and "--bad-images skip" in line
    assert not (tmp_path / "runs").exists()
    assert run(flags(tmp_path, bad_images="skip")) == 0
    said = json.loads((tmp_path / "runs/trial/config.json").read_text())["run"]["data"]
    assert [row["img"] for row in said["skipped"]] == ["img/00003.png"]
    assert "img/00003.png" not in (tmp_path / "runs/trial/predictions_train.csv").read_text()


def test_file_in_the_way_of_the_run_folder_is_named(memes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    assert "runs" in refused(capsys, flags(memes))


def test_loss_that_explodes_is_one_line_and_the_run_can_be_inspected(memes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, flags(memes, learning_rate=1e12))
    assert "loss term" in line and "member" in line and "step" in line
    assert not (tmp_path / "runs/trial/results.json").exists()


# ---- REAL_PATH and the modules


def test_edited_real_path_is_trained_on_without_flags(memes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(script.REAL_PATH, "jsonl", str(memes / "train.jsonl"))
    monkeypatch.setitem(script.REAL_PATH, "img_dir", str(memes / "img"))
    assert run(flags(memes, jsonl=None, epochs=1)) == 0
    out = capsys.readouterr().out
    assert "DEMO" not in out and "48 memes" in out


def test_flags_override_real_path(monkeypatch):
    monkeypatch.setitem(script.REAL_PATH, "jsonl", "real/train.jsonl")
    monkeypatch.setitem(script.REAL_PATH, "img_dir", "real/img")
    located = {
        "flags": [script.locate(MemesConfig(**flags)) for flags in ({}, {"img_dir": Path("mine")})],
        "own": script.locate(MemesConfig(jsonl=Path("mine.jsonl"))),
        "download": script.locate(MemesConfig(download=True)),
    }
    assert [(data.jsonl, data.img_dir) for data in located["flags"]] == [
        (ROOT / "real/train.jsonl", ROOT / "real/img"),
        (ROOT / "real/train.jsonl", Path("mine")),
    ]
    assert (located["own"].jsonl, located["own"].img_dir) == (Path("mine.jsonl"), None)
    assert located["download"].jsonl is None and not located["download"].is_demo


def test_torchrun_gives_the_run_of_one_process(memes, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "main_hateful_memes.py")]
    arguments = flags(memes, cache_dir=tmp_path / "cache")
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "runs/trial", finished)
    )
    for mine, reference in zip(ours, theirs, strict=True):  # up to rounding: each process trains some of the members
        assert mine["method"] == reference["method"] and mine["epoch"] == reference["epoch"]
        assert mine["dev_auroc"] == pytest.approx(reference["dev_auroc"], abs=1e-6)
        for term, values in reference["loss"].items():
            assert mine["loss"][term] == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_split_with_one_class_is_said_and_not_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert")
    write_memes(tmp_path, {"train": 32, "dev": 12, "test": 6})
    rows = [json.loads(line) | {"label": 1} for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "test.jsonl", rows)
    assert run(flags(tmp_path, epochs=1)) == 0
    assert "one class" in capsys.readouterr().out


def test_mistyped_flag_is_answered_with_the_nearest_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "perhaps you meant --name" in refused(capsys, ["--nmae", "x"])


@pytest.mark.parametrize("value", ["a/train.jsonl", {"json": "x"}, None])
def test_real_path_that_is_no_such_dict_is_one_line(tmp_path, monkeypatch, capsys, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "REAL_PATH", value)
    assert "REAL_PATH" in refused(capsys, [])


def test_latents_of_width_one_are_trained_and_reported(memes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(flags(memes, latent_dim=1, epochs=1, seeds=1)) == 0
    assert json.loads((tmp_path / "runs/trial/results.json").read_text())["ranks"]


def test_waiting_threads_do_not_spin_unless_the_user_wants_it():
    code = "import sys, main_hateful_memes, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    for wanted in (None, "ACTIVE"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": wanted} if wanted else {}
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert out.stdout.split() == [wanted or "PASSIVE", "True"], out.stderr


def test_spreadsheet_takes_no_id_for_a_formula():
    assert [plain_cell(text) for text in ("=1+1", "@x", "-3", "img/1.png")] == ["'=1+1", "'@x", "'-3", "img/1.png"]
