"""What a run says a missing modality costs, against every training example put in its place, one after the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, mean_absolute_error, roc_auc_score

from mmfusion.data import folds
from mmfusion.data.arrays import ArraysConfig
from mmfusion.models.fusion import ModelConfig
from mmfusion.runs import missing as report
from mmfusion.train import Config, Run, fit
from mmfusion.training.fit import Method
from mmfusion.training.recipe import TrainingConfig

N = 90
MODALITIES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small_run(task: str, modalities=MODALITIES, **cut) -> Run:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(N, 3)) for name in MODALITIES}
    signal = arrays["a"][:, 0] * arrays["b"][:, 0] + arrays["c"][:, 0]
    arrays["target"] = {
        "binary": (signal > 0).astype(int),
        "multiclass": np.digitize(signal, [-0.7, 0.7]),
        "multilabel": np.stack([signal > 0, arrays["a"][:, 1] > 0], 1).astype(int),
        "regression": 5 + 3 * signal,
    }[task]
    training = TrainingConfig(seeds=2, epochs=4, batch_size=16, learning_rate=1e-2, device="cpu")
    config = Config(ArraysConfig(task=task, **cut), training, ModelConfig(4, 8, 2, "none"))
    return fit(arrays, config, [[Method("jWAE-LMF", modalities, active_rank=2 if len(modalities) > 1 else 1)]])


def slow(run: Run, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(n, ...) mean prediction and (n, O) std of the outputs of one seed, over all of train; the target."""
    predictions, spread, targets = [], [], []
    for fold, dataset in enumerate(run.trained.datasets):
        ensemble = run.ensemble.part(fold, len(run.trained.datasets))
        split, train = dataset.splits[folds.tested_split(dataset)], dataset.splits["train"].features[name]
        outputs, said = [], []
        for row in train:
            features = split.features | {name: row.expand(len(split), -1)}
            outputs.append(ensemble(features)[seed].detach().double())
            said.append(ensemble.predict(features)[seed].double())
        predictions.append(torch.stack(said).mean(0))
        spread.append(torch.stack(outputs).std(0, correction=0))
        targets.append(split.target.numpy())
    return torch.cat(predictions), torch.cat(spread), np.concatenate(targets)


SLOW_SCORES = {
    "binary": {"auroc": lambda y, p: roc_auc_score(y, p), "log_loss": lambda y, p: log_loss(y, p)},
    "multiclass": {"accuracy": lambda y, p: accuracy_score(y, p.argmax(1)), "log_loss": lambda y, p: log_loss(y, p)},
    "multilabel": {
        "map": lambda y, p: average_precision_score(y, p),
        "log_loss": lambda y, p: np.mean([log_loss(y[:, o], p[:, o]) for o in range(2)]),
    },
    "regression": {"mae": mean_absolute_error, "correlation": lambda y, p: np.corrcoef(y, p)[0, 1]},
}


@pytest.mark.parametrize(
    ("task", "cut"),
    [
        ("binary", {"hold_out": 0.3}),
        ("binary", {"folds": 2}),
        ("multiclass", {"hold_out": 0.3}),
        ("multilabel", {"hold_out": 0.3}),
        ("regression", {"folds": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_cost_is_that_of_every_training_example_in_the_modalitys_place(task, cut, capsys):
    run = small_run(task, **cut)
    found = run.results["missing"]
    part = "out_of_fold" if "folds" in cut else "test"
    (scores,) = run.scores.values()
    assert found["part"] == part and found["examples"] == (N if "folds" in cut else 27)
    assert found["reference"] == max(len(dataset.splits["train"]) for dataset in run.trained.datasets)
    for name, members in found["whole"].items():
        if name in scores[part]:  # a table of two classes has no log loss
            assert members == pytest.approx(scores[part][name]["members"], abs=1e-12)
    for name in MODALITIES:
        for seed in range(2):
            p, spread, target = slow(run, name, seed)
            for score, of in SLOW_SCORES[task].items():
                assert found["without"][name][score][seed] == pytest.approx(of(target, p.numpy()), abs=1e-5)
            assert found["std"][name][seed] == pytest.approx(spread.mean().item(), rel=1e-4)
    assert len({found["std"][name][0] for name in MODALITIES}) == 3
    text = capsys.readouterr().out
    assert f"what a missing modality costs on {part}" in text
    line = next(line for line in text.splitlines() if line.startswith("without b"))
    assert f"{np.mean(found['std']['b']):.3f} +- {np.std(found['std']['b'], ddof=1):.3f}" in line


def test_of_many_examples_some_are_drawn_and_it_says_how_many(monkeypatch, capsys):
    whole = small_run("binary", hold_out=0.3).results["missing"]
    monkeypatch.setattr(report, "MOST_LOGITS", 0)
    monkeypatch.setattr(report, "LEAST_REFERENCE", 20)
    drawn = small_run("binary", hold_out=0.3).results["missing"]
    assert drawn["reference"] == 20 and "over 20 training examples" in capsys.readouterr().out
    assert drawn["whole"] == whole["whole"] and drawn["without"] != whole["without"]
    for name in MODALITIES:
        assert drawn["without"][name]["log_loss"] == pytest.approx(whole["without"][name]["log_loss"], abs=0.2)


def test_one_modality_has_nothing_to_go_without():
    run = small_run("binary", ("a",), hold_out=0.3)
    assert "missing" not in json.loads((run.folder / "results.json").read_text())
