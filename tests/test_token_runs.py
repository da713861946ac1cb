"""Runs on tokens as a user meets them: trained, resumed, loaded, explained, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_memes import write_bert, write_memes
from test_main import ROOT, flags, refused

import main_hateful_memes as script
from experiments.robustness.measure import run as robustness
from main_hateful_memes import Config, run
from mmfusion.cli import parse
from mmfusion.data.memes import load_memes
from mmfusion.errors import InputError
from mmfusion.explain.__main__ import run as explain
from mmfusion.explain.tokens import TokenExplainer
from mmfusion.models.token_ensemble import TokenEnsemble, load_ensemble
from mmfusion.runs.load import load_run

SMALL = {"epochs": 2, "transformer_width": 16, "transformer_heads": 4}
FUSIONS = {"wma": SMALL, "transport": {"epochs": 2}}


@pytest.fixture(scope="module")
def memes(tmp_path_factory) -> Path:
    """A folder in the release's layout, a tiny BERT, and a cache that the first run fills for all."""
    folder = tmp_path_factory.mktemp("memes")
    write_bert(folder / "bert")
    write_memes(folder, {"train": 32, "dev": 12, "test": 4})
    return folder


@pytest.fixture(scope="module")
def finished(memes, tmp_path_factory) -> Path:
    """A folder of finished runs, runs/wma and runs/transport."""
    place, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(place)
    try:
        for fusion, more in FUSIONS.items():
            assert run(flags(memes, fusion=fusion, name=fusion, **more)) == 0
    finally:
        os.chdir(before)
    return place


def scores(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["scores"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_saved_ensemble_says_what_the_run_predicted(finished, memes, fusion):
    config = parse(Config, flags(memes, fusion=fusion, name=fusion, **FUSIONS[fusion]))
    dataset = load_memes(config.data, config.encoders, script.join_processes("cpu"), tokens=True)
    ensemble = load_ensemble(finished / "runs" / fusion)
    assert isinstance(ensemble, TokenEnsemble)
    lines = (finished / "runs" / fusion / "predictions_dev.csv").read_text().splitlines()
    names = lines[0].split(",")
    written = np.array([[float(line.split(",")[names.index(f"seed_{s}")]) for line in lines[1:]] for s in range(2)])
    np.testing.assert_allclose(ensemble.predict(dataset.splits["dev"].features), written, atol=1e-6)
    assert ensemble.predict({n: x[0:0] for n, x in dataset.splits["dev"].features.items()}).shape == (2, 0)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_config_of_a_run_repeats_it(finished, memes, fusion, monkeypatch):
    monkeypatch.chdir(finished)
    assert run(["--config", f"runs/{fusion}/config.json", "--name", f"{fusion}-again"]) == 0
    assert scores(finished / f"runs/{fusion}-again") == scores(finished / f"runs/{fusion}")


def test_killed_run_is_resumed_to_the_same_scores(finished, memes, tmp_path):
    arguments = flags(memes, fusion="wma", name="wma", **SMALL | {"epochs": 40, "patience": 40, "seeds": 1})
    program = (
        "import functools, sys; import main_hateful_memes as m; from mmfusion.training import fit; "
        "fit.Schedule = functools.partial(fit.Schedule, checkpoint_seconds=0.0); sys.exit(m.run(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
        options = {"cwd": place, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen([sys.executable, "-c", program, *arguments], **options)
        if place is killed:
            until = time.monotonic() + 240
            while not list(place.glob("runs/wma/checkpoints/wma*.safetensors")) and time.monotonic() < until:
                time.sleep(0.02)
            child.send_signal(signal.SIGKILL)
        code = child.wait()
        assert code == (0 if place is whole else -signal.SIGKILL)
    assert not (killed / "runs/wma/results.json").exists()
    command = [sys.executable, "-c", program, "--name", "wma", "--resume"]
    assert subprocess.run(command, **options).returncode == 0
    assert scores(killed / "runs/wma") == scores(whole / "runs/wma")
    same = [(place / "runs/wma/model.safetensors").read_bytes() for place in (killed, whole)]
    assert same[0] == same[1]


def test_methods_are_named_after_what_they_are(finished, memes, monkeypatch, tmp_path):
    assert list(scores(finished / "runs/wma")) == [
        "transformer, aligned tokens",
        "transformer",
        "jWAE-LMF of mean tokens, rank 2",
        "concatenation of mean tokens + MLP",
    ]
    monkeypatch.chdir(tmp_path)
    assert run(flags(memes, fusion="wma", transport_weight=0, **SMALL | {"epochs": 1})) == 0
    assert next(iter(scores(tmp_path / "runs/trial"))) == "transformer"


@pytest.mark.parametrize(
    ("fusion", "entry", "value"),
    [
        ("wma", "width", 0),
        ("wma", "width", "128"),
        ("wma", "width", 10**9),
        ("wma", "heads", 3),
        ("wma", "places", None),
        ("wma", "dropout", -1),
        ("wma", "dropout", float("nan")),
        ("wma", "layers", 10**6),
        ("wma", "fusion", "gromov"),
        ("transport", "plan", "dtw"),
        ("transport", "plan", None),
        ("transport", "band", 0),
        ("transport", "band", True),
        ("transport", "rank", -3),
        ("transport", "latent_dim", None),
    ],
)
def test_damaged_config_is_one_line(finished, tmp_path, fusion, entry, value):
    folder = tmp_path / "copy"
    shutil.copytree(finished / "runs" / fusion, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {entry: value}))
    with pytest.raises(InputError) as raised:
        load_ensemble(folder)
    assert "config.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fusion": "foo"}, "foo"),
        ({"fusion": "wma", "transformer_heads": 7}, "--transformer-heads 7: must divide"),
        ({"fusion": "transport", "plan": "banded", "band": -1}, "--band -1"),
        ({"fusion": "transport", "band": 0.2}, "--band 0.2: is of --plan banded"),
        ({"fusion": "wma", "plan": "banded"}, "--plan banded: is of --fusion transport"),
        ({"fusion": "transport", "transformer_width": 64}, "--transformer-width 64: is of --fusion wma"),
        ({"transformer_layers": 3}, "--transformer-layers 3: is of --fusion wma"),
        ({"fusion": "wma", "transformer_dropout": 0.95}, "--transformer-dropout 0.95"),
    ],
)
def test_bad_flags_are_one_line(memes, capsys, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    if changes.get("fusion") == "foo":
        with pytest.raises(SystemExit) as stop:
            run(flags(memes, **changes))
        assert stop.value.code == 2 and said in capsys.readouterr().err
    else:
        assert said in refused(capsys, flags(memes, **changes))
    assert not (tmp_path / "runs").exists()


def test_commands_of_vectors_refuse_a_run_of_tokens(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    with pytest.raises(SystemExit) as stop:
        robustness(["runs/wma"])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and "token" in lines[0]


# ---- explanations


@pytest.mark.parametrize("fusion", FUSIONS)
def test_explains_a_meme_named_examples_and_the_worst(finished, memes, fusion, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    image = next((memes / "img").glob("*.png"))
    name = f"runs/{fusion}"
    assert explain([name, "--image", str(image), "--text", "a dog runs", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert ("all pairs sum to it" in printed) == (fusion == "transport") and "a dog runs" in printed
    run_of = load_run(Path(name), "cpu", with_tokens=True)
    ids = run_of.datasets[0].splits["dev"].ids[:2]
    assert explain([name, "--ids", *ids, "--out", f"{fusion}-two.html", "--device", "cpu"]) == 0
    assert explain([name, "--ids", ids[0], "--out", f"{fusion}-one.png", "--device", "cpu"]) == 0
    assert explain([name, "--split", "dev", "--worst", "3", "--out", f"{fusion}-worst.html", "--device", "cpu"]) == 0
    page = (finished / f"{fusion}-worst.html").read_text()
    assert page.count("<li>") == 3 and page.count("data:image/png;base64,") == 3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_worst_is_the_largest_loss(finished, fusion, monkeypatch):
    monkeypatch.chdir(finished)
    loaded = load_run(Path(f"runs/{fusion}"), "cpu", with_tokens=True)
    explainer = TokenExplainer(loaded, "cpu")
    split = loaded.datasets[0].splits["dev"]
    losses = explainer.losses(split)
    row = int(losses.argmax())
    one = explainer.example("dev", row)
    p = one.probability.mean()
    assert losses[row] == pytest.approx(-np.log(p if split.target[row] else 1 - p), abs=1e-4)


def test_pairs_and_parts_sum_to_the_logit_within_the_bounds(finished, monkeypatch):
    monkeypatch.chdir(finished)
    explainer = TokenExplainer(load_run(Path("runs/transport"), "cpu", with_tokens=True), "cpu")
    for row in range(3):
        one = explainer.example("dev", row)
        assert one.pairs.sum() == pytest.approx(one.value.mean(), abs=1e-4) and one.residual < 1e-4
        assert sum(one.parts.values()) == pytest.approx(one.value, abs=1e-4)
        assert one.bounds[0] - 1e-4 <= one.value.mean() <= one.bounds[1] + 1e-4
        assert one.plan.sum() == pytest.approx(1, abs=1e-5)
        assert {k: len(v) for k, v in one.names.items()} == {k: len(v) for k, v in one.worth.items()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ids", "nobody"], "nobody"),
        (["--split", "nowhere"], "nowhere"),
        (["--image", "missing.png", "--text", "a dog"], "missing.png"),
        (["--split", "test", "--worst", "2"], "--worst"),
        (["--split", "dev", "--rank", "1", "--maps"], "--rank"),
        (["--ids", "img/00032", "--output", "3"], "--output 3"),
    ],
)
def test_mistakes_in_explaining_are_one_line(finished, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(finished)
    with pytest.raises(SystemExit) as stop:
        explain(["runs/transport", *arguments, "--device", "cpu"])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and said in lines[0], lines
    assert not torch.is_inference_mode_enabled()
