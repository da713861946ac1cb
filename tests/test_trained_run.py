"""A finished run read again: the very members that its table is about, in their order, and what is refused."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score
from small_memes import write_bert, write_memes
from test_experiments import write_mosi
from test_main import flags

import main_hateful_memes
from experiments import baselines as train
from experiments import uncertainty
from experiments.baselines import TrainOptions
from experiments.experiment import execute, run
from experiments.robustness import measure as robustness
from experiments.robustness.corruption_grid import Predictor
from mmfusion.data import registry as datasets
from mmfusion.data.folds import fold_datasets
from mmfusion.dataset import Dataset, Split
from mmfusion.encoders import frozen
from mmfusion.errors import InputError
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.runs import load as trained_run
from mmfusion.runs.load import load_run
from mmfusion.training.objective import predict

FOLDS, SEEDS = 2, 2


def toy_datasets(*_: object) -> list[Dataset]:
    """Two folds with test parts of their own; the sum of two modalities decides."""
    rng = torch.Generator().manual_seed(0)
    features = {name: torch.randn(120, d, generator=rng) for name, d in (("text", 5), ("audio", 3))}
    target = (features["text"][:, 0] + features["audio"][:, 0] > 0).float()
    datasets = []
    for fold in range(FOLDS):
        test = list(range(fold, 120, 4))
        rest = [i for i in range(120) if i not in test]
        rows = {"train": rest[30:], "dev": rest[:30], "test": test}
        splits = {
            part: Split({m: x[r] for m, x in features.items()}, target[r], [str(i) for i in r])
            for part, r in rows.items()
        }
        datasets.append(Dataset("toy", "binary", splits, "dev"))
    return datasets


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with three runs: two folds, the same with dev held out, and one by the command line."""
    folder, before = tmp_path_factory.mktemp("runs"), Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets, "load_datasets", toy_datasets)
        options = {"dataset": "cmu_mosi", "data": Path("toy.npz"), "seeds": SEEDS, "epochs": 2, "device": "cpu"}
        execute(train.EXPERIMENT, TrainOptions(**options, name="folds"))
        execute(train.EXPERIMENT, TrainOptions(**options, name="held-out", hold_out_dev=True))
        cut = {"cross_validate": 3, "repeats": 2, "plant": "calibration", "hold_out_dev": True}
        execute(train.EXPERIMENT, TrainOptions(**options, name="cut-anew", **cut))
    mosi = write_mosi(folder / "mosi.npz")
    flags = ["--dataset", "cmu_mosi", "--data", str(mosi), "--seeds", "2", "--epochs", "1", "--device", "cpu"]
    assert run(train.EXPERIMENT, [*flags, "--name", "mosi"]) == 0
    yield folder
    os.chdir(before)


@pytest.fixture
def toy(place, monkeypatch):
    monkeypatch.setattr(trained_run, "load_datasets", toy_datasets)
    return load_run(place / "runs/folds")


def refused(capsys, *arguments: object) -> str:
    """What the command that reads runs says before it exits with code 2: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        robustness.run([str(a) for a in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / folder.name))


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_members_of_a_row_score_what_its_table_says_of_each_seed_and_fold(toy):
    said = json.loads((toy.folder / "results.json").read_text())["numbers"]
    seen = set()
    for row in toy.ensembles:
        for f, fold in enumerate(toy.data.folds):
            target = toy.data.pool.target[fold.test].numpy()
            members = toy.members(row, f)
            assert len(members) == SEEDS
            for s, model in enumerate(members):
                features = {name: toy.data.pool.features[name][fold.test] for name in model.modalities}
                logits = predict(model, features).numpy()
                auroc = said[row]["auroc"]["per seed and fold"][s][f]
                assert roc_auc_score(target, logits) == pytest.approx(auroc, abs=1e-9)
                accuracy = said[row]["accuracy"]["per seed and fold"][s][f]
                assert accuracy_score(target, logits >= 0) == pytest.approx(accuracy, abs=1e-9)
                seen.add((row, auroc))
    assert len(seen) > 3 * len(toy.ensembles), "of equal scores the order would not show"


def test_cross_validated_run_is_cut_as_it_was_trained_and_robustness_is_inferred_over_its_folds(place, capsys):
    flags = ["--dataset", "cmu_mosi", "--data", str(place / "mosi.npz"), "--epochs", "1", "--device", "cpu"]
    cut = ["--cross-validate", "2", "--repeats", "3", "--seeds", "1", "--name", "cut"]
    assert run(train.EXPERIMENT, [*flags, *cut]) == 0
    found = load_run(place / "runs/cut")
    assert len(found.data.folds) == len(found.datasets) == 6 and found.data.repeats == 3
    tested = [set(found.datasets[f].splits["test"].ids) for f in range(4)]
    assert not tested[0] & tested[1] and tested[0] | tested[1] == tested[2] | tested[3]
    said = json.loads((found.folder / "results.json").read_text())["numbers"][found.main_row]
    for f, fold in enumerate(found.data.folds):
        features = {name: x[fold.test] for name, x in found.data.pool.features.items()}
        logits = predict(found.members(found.main_row, f)[0], features).numpy()
        auroc = roc_auc_score(found.data.pool.target[fold.test].numpy(), logits)
        assert auroc == pytest.approx(said["auroc"]["per seed and fold"][0][f], abs=1e-9)
    arguments = ["runs/cut", "--groups", "missing", "--draws", "1", "--attack-seeds", "0", "--device", "cpu"]
    assert robustness.run([*arguments, "--name", "robust-cut"]) == 0
    contrasts = json.loads(Path("runs/robust-cut/results.json").read_text())["contrasts"]
    assert contrasts and all(len(c["fold_values"]) == 6 for c in contrasts)
    line = refused(capsys, "runs/cut", "--groups", "input", "--device", "cpu", "--name", "input-cut")
    assert "--groups input" in line and "--cross-validate" in line


def test_members_stand_seed_by_seed_and_within_a_seed_fold_by_fold(toy):
    # standardisation belongs to the fold, the initial weights to the seed
    for row, ensemble in toy.ensembles.items():
        means = [next(iter(member.standardise.values())).mean for member in ensemble.members]
        assert len(means) == SEEDS * FOLDS
        assert torch.equal(means[0], means[2]) and torch.equal(means[1], means[3])
        assert not torch.equal(means[0], means[1])
        for f, fold in enumerate(toy.data.folds):
            for model in toy.members(row, f):
                for name, module in model.standardise.items():
                    expected = toy.data.pool.features[name][fold.train]
                    dev = toy.data.pool.features[name][fold.dev]
                    torch.testing.assert_close(module.mean, torch.cat([expected, dev]).mean(0), rtol=1e-4, atol=1e-5)


def test_run_that_cut_its_data_anew_is_read_with_its_own_folds_and_planted_labels(place, monkeypatch, capsys):
    monkeypatch.setattr(trained_run, "load_datasets", toy_datasets)
    cut = load_run(place / "runs/cut-anew")
    said = json.loads((cut.folder / "results.json").read_text())["numbers"][cut.main_row]["auroc"]["per seed and fold"]
    assert len(cut.data.folds) == len(cut.datasets) == 6 and cut.data.repeats == 2 and not cut.trained_on_dev
    for f, (fold, dataset) in enumerate(zip(cut.data.folds, cut.datasets, strict=True)):
        assert torch.equal(dataset.splits["test"].target, cut.data.pool.target[fold.test])
        assert len(dataset.splits["train"]) == len(fold.train) and dataset.selection == "dev"
        for s, model in enumerate(cut.members(cut.main_row, f)):
            logits = predict(model, dataset.splits["test"].features).numpy()
            assert roc_auc_score(dataset.splits["test"].target, logits) == pytest.approx(said[s][f], abs=1e-9)
    real = fold_datasets(toy_datasets()).pool.target
    assert not torch.equal(cut.data.pool.target, real)
    message = refused(capsys, cut.folder, "--groups", "input", "--device", "cpu")
    assert "--groups input" in message and "--cross-validate" in message


def test_variance_of_a_logit_is_that_of_draws_of_the_latents(place, monkeypatch):
    monkeypatch.setattr(trained_run, "load_datasets", toy_datasets)
    cut = load_run(place / "runs/cut-anew")
    found = Predictor(cut).variances(cut.main_row)
    size = len(cut.data.folds[0].test)
    assert found.shape == (SEEDS, len(cut.data.test_rows)) and (found > 0).all()
    model = cut.members(cut.main_row, 0)[1]
    latents = model.latents({name: x[cut.data.folds[0].test] for name, x in cut.data.pool.features.items()})
    rng = torch.Generator().manual_seed(0)
    noise = [
        v.sqrt() * torch.randn(20_000, *z.shape, generator=rng)
        for z, v in zip(latents, model.latent_variances(), strict=True)
    ]
    drawn = model.fusion([z + e for z, e in zip(latents, noise, strict=True)]).squeeze(-1).var(0)
    np.testing.assert_allclose(found[1, :size], drawn, rtol=0.1)


def test_uncertainty_of_a_run_that_cut_its_data_anew_is_judged_by_fold(place, monkeypatch, tmp_path):
    monkeypatch.setattr(trained_run, "load_datasets", toy_datasets)
    monkeypatch.chdir(tmp_path)
    options = uncertainty.Options(place / "runs/cut-anew", draws=1, groups=("missing",), device="cpu")
    uncertainty.execute(options)
    results = json.loads((tmp_path / "runs/uncertainty-cut-anew/results.json").read_text())
    assert {len(c["fold_values"]) for c in results["contrasts"]} == {6} and results["folds"] == 6
    deciding = [c for c in results["contrasts"] if c["decides"]]
    assert len(deciding) == 4 and {c["route"] for c in deciding} == {""}
    assert any(c["name"].startswith("AURC, by Var[y] over") for c in results["contrasts"])


def test_rows_are_all_neural_methods_in_the_order_of_the_table(toy):
    said = json.loads((toy.folder / "results.json").read_text())["numbers"]
    assert list(toy.ensembles) == [row for row in said if "SVM" not in row and "training" not in row]
    assert toy.main_row == train.MAIN and toy.prior_free_row == "LMF without jWAE"
    assert (toy.seeds, len(toy.data.folds), toy.task) == (list(range(SEEDS)), FOLDS, "binary")
    assert toy.settings["epochs"] == 2 and toy.texts(toy.datasets[0], "test") == {}
    assert toy.encoders is None and toy.memes is None
    for ensemble in toy.ensembles.values():
        assert not ensemble.training and not any(p.requires_grad for p in ensemble.parameters())


def test_dev_is_said_to_be_trained_on_exactly_where_it_was(toy, place):
    assert toy.trained_on_dev
    held = load_run(place / "runs/held-out")
    assert not held.trained_on_dev
    fold = held.data.folds[0]
    mean = held.members(held.main_row)[0].standardise["text"].mean
    torch.testing.assert_close(mean, held.data.pool.features["text"][fold.train].mean(0), rtol=1e-4, atol=1e-5)


def test_run_of_the_command_line_is_read_with_its_data(place):
    found = load_run(place / "runs/mosi")
    said = json.loads((place / "runs/mosi/results.json").read_text())["numbers"]
    (fold,) = found.data.folds
    features = {name: x[fold.test] for name, x in found.data.pool.features.items()}
    target = found.data.pool.target[fold.test].numpy()
    for s, model in enumerate(found.members(found.main_row)):
        logits = predict(model, features).numpy()
        assert roc_auc_score(target, logits) == pytest.approx(said[train.MAIN]["auroc"]["per seed and fold"][s][0])
    np.testing.assert_array_equal(fold.test.numpy(), found.data.test_rows)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_folder_that_holds_no_run_is_named(place, capsys):
    assert "runs/nothing: holds no run" in refused(capsys, "runs/nothing")
    (place / "empty").mkdir()
    assert (
        "empty: holds no run (no run.json); train one with main_hateful_memes.py, python -m mmfusion.train"
        in refused(capsys, "empty")
    )


def test_run_that_has_not_ended_is_to_be_resumed(place, tmp_path, capsys):
    folder = copy_of(place / "runs/mosi", tmp_path)
    (folder / "results.json").unlink()
    assert "has not come to its end; go on with it with --resume" in refused(capsys, folder)


def test_run_of_another_experiment_keeps_no_models(place, tmp_path, capsys):
    folder = copy_of(place / "runs/mosi", tmp_path)
    begun = json.loads((folder / "run.json").read_text())
    begun["data"]["experiment"] = "rank_ablation"
    (folder / "run.json").write_text(json.dumps(begun))
    assert "a run of experiments.rank_ablation keeps no models" in refused(capsys, folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"data": {}}', '{"data": {}, "settings": 3}'])
def test_damaged_description_is_named(place, tmp_path, capsys, content):
    folder = copy_of(place / "runs/mosi", tmp_path)
    (folder / "run.json").write_text(content)
    assert "run.json: damaged" in refused(capsys, folder)


@pytest.mark.parametrize("where", [".", "baselines/concatenation-MLP"])
def test_missing_model_file_is_named(place, tmp_path, capsys, where):
    folder = copy_of(place / "runs/mosi", tmp_path)
    (folder / where / "model.safetensors").unlink()
    line = refused(capsys, folder)
    assert str(folder / where) in line and "train" in line


@pytest.mark.parametrize("where", [".", "baselines/concatenation-MLP"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_cut_file_is_named(place, tmp_path, capsys, where, name):
    folder = copy_of(place / "runs/mosi", tmp_path)
    content = (folder / where / name).read_bytes()
    (folder / where / name).write_bytes(content[: len(content) // 2])
    line = refused(capsys, folder)
    assert str(folder / where / name) in line and "cannot be read" in line


def test_data_that_changed_since_are_refused(place, tmp_path, capsys):
    folder = copy_of(place / "runs/mosi", tmp_path)
    data = dict(np.load(place / "mosi.npz"))
    data["text_train"][0, 0] += 1
    np.savez(tmp_path / "mosi.npz", **data)
    begun = json.loads((folder / "run.json").read_text())
    begun["settings"]["data"] = str(tmp_path / "mosi.npz")
    (folder / "run.json").write_text(json.dumps(begun))
    assert "was trained on other data" in refused(capsys, folder)
    (tmp_path / "mosi.npz").unlink()
    assert "mosi.npz" in refused(capsys, folder)


def test_files_of_several_runs_in_one_folder_are_refused(place, tmp_path, capsys):
    folder = copy_of(place / "runs/mosi", tmp_path)
    baseline = folder / "baselines/concatenation-MLP"
    config = json.loads((baseline / "config.json").read_text())
    ensemble = FusionEnsemble.from_pretrained(baseline)
    ensemble.members = ensemble.members[:1]
    ensemble.save_pretrained(baseline)
    (baseline / "config.json").write_text(json.dumps(config | {"members": 1}))
    assert "'concatenation + MLP' has 1 members, not 2 seeds x 1 folds" in refused(capsys, folder)


def test_nothing_is_left_behind_by_a_refusal(place, tmp_path, capsys):
    before = sorted(path.name for path in (place / "runs").iterdir())
    refused(capsys, "runs/nothing", "--name", "new")
    assert sorted(path.name for path in (place / "runs").iterdir()) == before
    assert {"cut-anew", "folds", "held-out", "mosi"} <= set(before) and "new" not in before
    with pytest.raises(InputError, match="holds no run"):
        load_run(tmp_path)


def test_run_of_cuda_is_read_without_cuda_from_the_features_that_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert")
    write_memes(tmp_path, {"train": 20, "dev": 8})
    with monkeypatch.context() as cuda:  # the arithmetic of CUDA, on a CPU
        cuda.setattr(frozen, "compute_dtype", lambda device: "bfloat16 autocast")
        assert main_hateful_memes.run(flags(tmp_path, epochs=1)) == 0
    folder = tmp_path / "runs/trial"
    run = load_run(folder, "cpu")
    rows = list(csv.DictReader((folder / "predictions_dev.csv").open()))
    probabilities = run.ensembles[run.main_row].predict_proba(run.datasets[0].splits["dev"].features)  # (S, N)
    for s, p in enumerate(probabilities):
        assert [float(row[f"seed_{s}"]) for row in rows] == pytest.approx(p.tolist(), abs=1e-7)
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {"image", "text"}
    assert len(list((tmp_path / "cache").iterdir())) == 2, "nothing is encoded a second time"
    shutil.rmtree(next((tmp_path / "cache").glob("text-*")))
    with pytest.raises(InputError, match=r"the cache lacks features that only CUDA encodes.*copy the cache folder"):
        load_run(folder, "cpu")


def test_run_of_the_first_version_still_loads(place, tmp_path):
    folder = copy_of(place / "runs/mosi", tmp_path)
    begun = json.loads((folder / "run.json").read_text())
    begun["data"]["experiment"] = "train"  # what baselines was called
    del begun["code"]
    (folder / "run.json").write_text(json.dumps(begun))
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config["row"] = config.pop("method")
        path.write_text(json.dumps(config))
    run = load_run(folder)
    assert next(iter(run.ensembles)) == "jWAE-LMF, rank 4" and run.seeds == [0, 1]
