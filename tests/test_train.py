"""`python -m mmfusion.train` and `mmfusion.train.fit`: four tasks, from a file of arrays to a run that can be asked."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.model_selection import train_test_split

from mmfusion import train
from mmfusion.data.arrays import ArraysConfig, dataset_from_arrays
from mmfusion.estimators import FusionClassifier
from mmfusion.explain.__main__ import run as explain
from mmfusion.metrics.tasks import ALL_SCORES
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.runs.folder import RunConfig
from mmfusion.runs.load import load_run
from mmfusion.training.recipe import TrainingConfig

N = 64
SMALL = "--seeds 2 --epochs 3 --latent-dim 4 --hidden-dim 8 --rank 2 --batch-size 16 --device cpu".split()


def arrays(task: str, n: int = N) -> dict[str, np.ndarray]:
    """Three modalities around two hidden numbers, and a target of that kind."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n, 2))
    made = {
        "audio": (z @ rng.standard_normal((2, 5)) + 0.1 * rng.standard_normal((n, 5))).astype(np.float32),
        "text": (z @ rng.standard_normal((2, 6)) + 0.1 * rng.standard_normal((n, 6))).astype(np.float32),
        "video": rng.standard_normal((n, 3)).astype(np.float32),
    }
    made["target"] = {
        "binary": (z[:, 0] > 0).astype(int) * 2 - 1,
        "multiclass": np.array(["low", "middle", "high"])[np.digitize(z[:, 0], [-0.4, 0.4])],
        "multilabel": (np.stack([z[:, 0], z[:, 1], z.sum(1)], 1) > 0).astype(int),
        "regression": z[:, 0],
        "regression of two": z,
    }[task]
    return made


TASKS = pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression", "regression of two"])


@TASKS
@pytest.mark.parametrize("cut", [["--hold-out", "0.25"], ["--folds", "3"]])
def test_a_file_becomes_a_run_that_can_be_loaded_and_explained(tmp_path, monkeypatch, capsys, task, cut):
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", **arrays(task))
    assert train.run(["--data", "mine.npz", *cut, *SMALL]) == 0
    said = capsys.readouterr().out
    folder, kind = Path("runs/mine"), task.split()[0]
    results = json.loads((folder / "results.json").read_text())
    part = "out_of_fold" if "--folds" in cut else "test"
    scores = results["scores"]["jWAE-LMF, rank 2"][part]
    shown = ALL_SCORES[kind][:3] if kind == "binary" else ALL_SCORES[kind]
    assert set(scores) == set(shown) and len(scores[shown[0]]["members"]) == 2
    assert scores[shown[0]]["examples"] == (N if "--folds" in cut else N // 4)
    assert set(results["scores"]) >= {"audio only", "text only", "video only", "concatenation + MLP"}
    rows = list(csv.DictReader((folder / f"predictions_{part}.csv").open()))
    assert len(rows) == scores[shown[0]]["examples"]
    run = load_run(folder)
    assert run.task == kind and len(run.ensembles[run.main_row].members) == 2 * (3 if "--folds" in cut else 1)
    assert explain([str(folder), "--split", "dev", "--summary"]) == 0
    assert (folder / "report.png").stat().st_size > 20_000 and "jWAE-LMF on mine" in (folder / "README.md").read_text()
    assert f"{kind}" in said and "inferred" in said


def test_predictions_csv_holds_the_predictions_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", **arrays("multiclass"))
    assert train.run(["--data", "mine.npz", "--hold-out", "0.25", *SMALL]) == 0
    rows = list(csv.DictReader(Path("runs/mine/predictions_test.csv").open()))
    run = load_run(Path("runs/mine"))
    split = run.datasets[0].splits["test"]
    names = run.datasets[0].class_names
    mean = run.ensembles[run.main_row].predict_proba(split.features).mean(0).numpy()
    for n, row in enumerate(rows):
        assert row["label"] == names[int(split.target[n])] and row["prediction"] == names[mean[n].argmax()]
        written = [float(row[f"probability_{name}"]) for name in names]
        np.testing.assert_allclose(written, mean[n], rtol=1e-5)
        assert sum(written) == pytest.approx(1, abs=1e-5)


def test_config_repeats_a_run_and_refuses_what_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", **arrays("regression"))
    assert train.run(["--data", "mine.npz", "--hold-out", "0.25", *SMALL, "--name", "first"]) == 0
    assert train.run(["--config", "runs/first/config.json", "--name", "second"]) == 0
    first, second = (load_file(f"runs/{name}/model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert Path("runs/first/results.json").read_text() == Path("runs/second/results.json").read_text()
    for content, reason in (("{", "no JSON"), ("[]", "no settings"), ('{"settings": {"jsonl": 1}}', "another command")):
        Path("x.json").write_text(content)
        with pytest.raises(SystemExit):
            train.run(["--config", "x.json"])
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.run(["--config", "runs/first", "--resume"])


def test_python_leaves_what_the_command_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = arrays("multiclass")
    np.savez("mine.npz", **mine)
    assert train.run(["--data", "mine.npz", "--hold-out", "0.25", *SMALL]) == 0
    training = TrainingConfig(seeds=2, epochs=3, batch_size=16, device="cpu")
    model = train.ModelConfig(4, 8, 2)
    config = train.Config(ArraysConfig(hold_out=0.25), training, model, run=RunConfig("python"))
    run = train.fit(mine, config)
    command, python = (load_file(f"runs/{name}/model.safetensors") for name in ("mine", "python"))
    assert all(torch.equal(command[name], python[name]) for name in command)
    files = {path.name for path in Path("runs/mine").iterdir()}
    assert {path.name for path in Path("runs/python").iterdir()} == files | {"arrays.npz"}
    features = {name: mine[name][:7] for name in ("audio", "text", "video")}
    p = run.predict_proba(features)
    np.testing.assert_allclose(p, run.ensemble.predict(features).mean(0).numpy(), rtol=1e-6)
    account = run.explain(features)
    top = np.sort(run.ensemble(features).detach().numpy(), -1)
    assert account.prediction.shape == (2, 7) and top.shape == (2, 7, 3)
    np.testing.assert_allclose(sum(account.parts.values()), account.prediction, atol=1e-5)
    assert set(run.robustness(features)) == {"audio", "text", "video"}
    again = train.fit(run.trained.datasets[0], train.Config(training=training, model=model, run=RunConfig("again")))
    assert again.trained.datasets[0].class_names == run.trained.datasets[0].class_names
    assert again.scores == run.scores


def test_estimator_and_command_agree_to_rounding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = arrays("multiclass", 120)
    y = mine.pop("target")
    rows = np.arange(100)
    settings = {
        "latent_dim": 4,
        "hidden_dim": 8,
        "rank": 2,
        "n_members": 2,
        "epochs": 5,
        "patience": 5,
        "batch_size": 16,
    }
    settings |= {"weight_decay": 0.01, "modality_dropout": 0.1, "feature_dropout": 0.5, "device": "cpu"}
    model = FusionClassifier(random_state=3, validation_fraction=0.2, **settings)
    model.fit({name: x[:100] for name, x in mine.items()}, y[:100])
    own, dev = train_test_split(rows, test_size=20, stratify=y[:100], random_state=3)
    places = {"train": np.sort(own), "dev": np.sort(dev), "test": np.arange(100, 120)}
    keyed = {f"{name}_{part}": x[place] for name, x in mine.items() for part, place in places.items()}
    np.savez("mine.npz", **keyed, **{f"target_{part}": y[place] for part, place in places.items()})
    flags = "--seeds 2 --first-seed 3 --epochs 5 --patience 5 --modality-dropout 0.1 --latent-dim 4 --hidden-dim 8"
    flags += " --rank 2 --batch-size 16 --device cpu --select-by log_loss --feature-dropout 0.5 --weight-decay 0.01"
    assert train.run(["--data", "mine.npz", *flags.split()]) == 0
    ensemble = FusionEnsemble.from_pretrained("runs/mine")
    test = {name: x[100:] for name, x in mine.items()}
    names = load_run(Path("runs/mine")).datasets[0].class_names
    assert list(names) == list(model.classes_)
    np.testing.assert_allclose(ensemble.predict(test).numpy(), model.member_predictions(test), rtol=1e-5, atol=1e-6)


def test_threshold_is_chosen_on_dev_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = arrays("binary", 200)
    mine["target"] = (mine["audio"][:, 0] > np.quantile(mine["audio"][:, 0], 0.85)).astype(int)
    np.savez("mine.npz", **mine)
    assert train.run(["--data", "mine.npz", "--hold-out", "0.3", *SMALL, "--epochs", "15"]) == 0
    assert "threshold chosen on dev" in capsys.readouterr().out
    found = json.loads(Path("runs/mine/results.json").read_text())
    run = load_run(Path("runs/mine"))
    test = run.datasets[0].splits["test"]
    p = run.ensembles[run.main_row].predict_proba(test.features).numpy()
    for s, threshold in enumerate(found["thresholds"]["thresholds"]):
        accuracy = ((p[s] >= threshold) == test.target.numpy()).mean()
        assert found["thresholds"]["scores"]["test"]["accuracy"]["members"][s] == pytest.approx(accuracy)


def test_class_weights_raise_the_recall_of_a_rare_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((400, 4)).astype(np.float32)
    y = (x[:, 0] + 1.5 * rng.standard_normal(400) > 2.2).astype(int)
    np.savez("mine.npz", a=x, b=x[:, :2], target=y)
    recall = {}
    for how in ("none", "balanced"):
        flags = ["--data", "mine.npz", "--hold-out", "0.4", "--seeds", "2", "--epochs", "15", "--device", "cpu"]
        assert train.run([*flags, "--class-weight", how, "--name", how]) == 0
        run = load_run(Path(f"runs/{how}"))
        test = run.datasets[0].splits["test"]
        p = run.ensembles[run.main_row].predict_proba(test.features).numpy()
        recall[how] = (p[:, test.target.numpy() == 1] >= 0.5).mean()
    assert recall["balanced"] > recall["none"] + 0.2


def test_missing_data_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        train.run([])
    assert stop.value.code == 2 and "--data" in capsys.readouterr().err


def test_class_weights_of_values_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", **arrays("regression"))
    with pytest.raises(SystemExit):
        train.run(["--data", "mine.npz", "--folds", "3", "--class-weight", "balanced", *SMALL])
    assert "--class-weight balanced" in capsys.readouterr().err and not Path("runs").exists()


def test_further_terms_are_trained_logged_and_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terms = {"latent_size": (10.0, lambda output, batch: sum(z.square().mean() for z in output.latents.values()))}
    training = TrainingConfig(seeds=1, epochs=4, batch_size=16, device="cpu")
    sizes = {}
    for name, further in (("with", terms), ("without", None)):
        config = train.Config(ArraysConfig(hold_out=0.25), training, run=RunConfig(name))
        run = train.fit(arrays("binary"), config, further_terms=further)
        line = json.loads(Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()[-1])
        assert ("latent_size" in line["loss"]) == (further is not None)
        latents = run.ensemble.members[0].latents(run.trained.datasets[0].splits["train"].features)
        sizes[name] = sum(z.square().mean().item() for z in latents)
    assert sizes["with"] < 0.8 * sizes["without"]


def test_datasets_of_arrays_carry_groups_into_folds():
    mine = arrays("binary") | {"group": np.array([f"g{n % 12}" for n in range(N)])}
    for dataset in dataset_from_arrays(mine, ArraysConfig(folds=4)):
        tested, trained = (set(dataset.splits[part].metadata["group"]) for part in ("test", "train"))
        assert not tested & trained
