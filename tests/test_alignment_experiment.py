"""experiments.alignment on a toy: its table, its damaged scores against slow loops, and data without labels."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from experiments import alignment
from experiments.alignment import (
    AlignmentOptions,
    differences,
    effects,
    latents_of,
    measure,
    rows,
    scored,
    training_of,
    tune,
)
from experiments.experiment import Outcome, Run, run
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.metrics.cross_decoding import frechet_distance
from mmfusion.metrics.retrieval import cross_retrieval
from mmfusion.training.align import Weighting, align

LABELS = ["none", "contrast", "transport", "Riemannian", "contrast + transport", "contrast + Riemannian"]
LABELS += ["transport + Riemannian", "hybrid", "contrast + CORAL", "contrast + MMD", "GRAM", "multilinear"]
SMALL = {"device": "cpu", "seeds": 2, "epochs": 2, "hidden_dim": 8, "width": 4}


def toy(task: str = "multiclass", folds: int = 2) -> FoldedDataset:
    """90 examples of three modalities and three classes, which test parts of 30 and 20 examples are drawn from."""
    rng = torch.Generator().manual_seed(0)
    target = torch.arange(90) % 3
    centres = torch.randn(3, 4, generator=rng)
    factors = centres[target] + 0.5 * torch.randn(90, 4, generator=rng)
    features = {
        name: factors @ torch.randn(4, d, generator=rng) + 0.3 * torch.randn(90, d, generator=rng)
        for name, d in (("a", 5), ("b", 4), ("c", 6))
    }
    order = torch.randperm(90, generator=rng)
    tested = (order[:30], order[30:50])[:folds]
    cuts = []
    for test in tested:
        rest = order[~torch.isin(order, test)]
        cuts.append(Fold(rest[15:], rest[:15], test))
    pool = Split(features, target.float(), [str(i) for i in range(90)])
    names = ("x", "y", "z")
    return FoldedDataset("toy", task, pool, cuts, [], {}, class_names=names, labelled=task == "multiclass")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    return measured(toy(), tmp_path_factory.mktemp("run"), tune=True)


def measured(data: FoldedDataset, folder: Path, **changes) -> Outcome:
    (folder / "checkpoints").mkdir()
    return measure(data, Run(AlignmentOptions(**SMALL | changes), folder, torch.device("cpu")))


@pytest.fixture(scope="module")
def ensemble():
    return align(toy(), [Weighting("x", {"info_nce": 1.0})], training_of(AlignmentOptions(**SMALL), 2))["x"]


def test_every_row_stands_in_the_table_with_every_score(outcome):
    head, *lines = outcome.table.splitlines()
    assert [line[: max(map(len, LABELS))].strip() for line in lines] == LABELS
    scores = [
        "R@1",
        "mAP",
        "gap",
        "CKA",
        "FOSCTTM",
        "R^2 across",
        "Frechet across",
        "V-measure",
        "accuracy",
        "accuracy, 50% missing",
    ]
    assert all(name in head for name in [*scores, "accuracy, 50% noise"])
    assert all(line.count("+-") == 11 for line in lines) and "nan" not in outcome.table


def test_three_expectations_decide_and_the_others_stand_beside(outcome):
    deciding = [contrast.name for contrast in outcome.contrasts if contrast.decides]
    assert deciding == [
        "R@1: hybrid over contrast",
        "fall at 50% missing: none over hybrid",
        "fall at 50% noise: none over hybrid",
    ]
    assert len(outcome.contrasts) == 9
    assert {c.effect for c in outcome.contrasts if c.name.startswith("fall")} == {0.2}


def test_tuning_takes_the_weights_of_the_best_dev_precision(outcome):
    tried, weights = outcome.numbers["tried on dev"], outcome.numbers["weights"]
    assert len(tried) == 6
    for kind, weight in weights.items():
        assert tried[f"{kind} {weight:g}"] == max(value for label, value in tried.items() if label.startswith(kind))


def test_tuning_sees_no_test_example_and_no_other_fold(tmp_path):
    data, other = toy(), toy()
    unseen = other.folds[0].test
    for x in other.pool.features.values():
        x[unseen] = torch.randn_like(x[unseen])
    found = []
    for k, one in enumerate((data, replace(other, folds=other.folds[:1]))):
        (tmp_path / f"{k}/checkpoints").mkdir(parents=True)
        found.append(tune(one, Run(AlignmentOptions(**SMALL), tmp_path / str(k), torch.device("cpu")))[1])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_tests_rows_come_fold_after_fold_and_seed_by_seed(ensemble):
    data, found = toy(), scored(toy(), ensemble)
    assert found["R@1"].shape == found["accuracy"].shape == (2, 50) and found["gap"].shape == (2, 2)
    for s in range(2):
        for f, (fold, place) in enumerate(zip(data.folds, (slice(0, 30), slice(30, 50)), strict=True)):
            member = ensemble.members[s * 2 + f]
            z = latents_of(data, member, fold.test)
            retrieved = cross_retrieval({name: z[:, m] for m, name in enumerate("abc")})
            hits = np.mean([one.per_query.recall[1] for one in retrieved.values()], 0)
            np.testing.assert_allclose(found["R@1"][s, place], hits)


def test_cross_decoding_is_of_every_modality_from_every_other_ones_latent(ensemble):
    data, found = toy(), scored(toy(), ensemble)
    fold, member = data.folds[1], ensemble.members[3]  # the second seed's
    explained, distances = [], []
    for source, name in itertools.permutations("abc", 2):
        z = member.encode({source: data.pool.features[source][fold.test]})[source]
        x = member.standardise[name](data.pool.features[name][fold.test])
        decoded = member.jwae.decoders[name](z).detach()
        explained.append(1 - (x - decoded).square().sum().item() / x.square().sum().item())
        a, b = np.array_split(np.random.default_rng(0).permutation(20), 2)
        both = [frechet_distance(decoded[a], x[b]), frechet_distance(decoded[b], x[a])]
        distances.append(np.mean(both) / x.shape[1])
    assert found["R^2 across"][1, 1] == pytest.approx(np.mean(explained), abs=1e-5)
    assert found["Frechet across"][1, 1] == pytest.approx(np.mean(distances), abs=1e-5)


def test_damaged_accuracy_is_the_mixture_of_clean_and_hit_examples(ensemble):
    data, found = toy(), scored(toy(), ensemble)
    fold, member = data.folds[1], ensemble.members[3]  # the second seed's
    train, test = (latents_of(data, member, part) for part in (fold.train, fold.test))
    probe = LogisticRegression(max_iter=2000).fit(train.reshape(len(train), -1), data.pool.target[fold.train])
    generators = {name: torch.Generator().manual_seed(0) for name in "abc"}
    for kind in ("missing", "noise"):
        hits = np.zeros((3, 20))
        for m, name in enumerate("abc"):
            spoiled = test.copy()
            if kind == "missing":
                others = [k for k in range(3) if k != m]
                spoiled[:, m] = (test[:, others[0]] + test[:, others[1]]) / 2
            else:
                x = data.pool.features[name][fold.test]
                noise = torch.randn(x.shape, generator=generators[name])
                z = member.encode({name: x + 2 * member.standardise[name].std * noise})[name]
                spoiled[:, m] = z.detach().numpy()
            hits[m] = probe.predict(spoiled.reshape(20, -1)) == data.pool.target[fold.test].numpy()
        clean = probe.predict(test.reshape(20, -1)) == data.pool.target[fold.test].numpy()
        np.testing.assert_allclose(found["accuracy"][1, 30:], clean)
        np.testing.assert_allclose(found[f"accuracy, 50% {kind}"][1, 30:], 0.5 * clean + 0.5 * hits.mean(0))


def test_fall_of_the_row_without_losses_counts_as_claimed():
    ones = np.ones((2, 4))
    row = {"R@1": 0.2 * ones, "accuracy": ones, "accuracy, 50% missing": ones, "accuracy, 50% noise": ones}
    found = {label: dict(row) for label in LABELS}
    found["none"]["accuracy, 50% missing"] = 0.7 * ones
    found["hybrid"]["accuracy, 50% missing"] = 0.9 * ones
    found["hybrid"]["R@1"] = 0.3 * ones
    named = differences(found)
    np.testing.assert_allclose(named["fall at 50% missing: none over hybrid"].values, 0.2)
    np.testing.assert_allclose(named["R@1: hybrid over contrast"].values, 0.1)
    assert effects(found)["R@1: hybrid over contrast"] == pytest.approx(0.01)


def test_without_labels_there_is_no_accuracy_and_weights_are_one_without_tuning(tmp_path):
    found = measured(toy("regression", 1), tmp_path, tune=False)
    assert "accuracy" not in found.table and "V-measure" not in found.table
    assert found.numbers["weights"] == {"transport": 1.0, "riemannian": 1.0} and not found.numbers["tried on dev"]
    assert [c.name for c in found.contrasts if c.decides] == ["R@1: hybrid over contrast"]
    figure = Figure()
    found.draw(figure)
    assert len(figure.axes) == 3


def test_two_modalities_have_no_rows_for_losses_of_three():
    weights = {"transport": 2.0, "riemannian": 3.0}
    assert [one.label for one in rows(weights, 2)] == LABELS[:-2]
    by_label = {one.label: one.weights for one in rows(weights, 3)}
    base = {"prior": 0.1, "reconstruction": 0.1}
    assert by_label["none"] == base
    assert by_label["hybrid"] == base | {"info_nce": 1.0, "transport": 2.0, "stein": 3.0, "bures": 3.0}


def test_the_command_leaves_table_figure_and_results_of_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("pairs.npz", a=rng.normal(size=(40, 4)), b=rng.normal(size=(40, 4)))
    flags = "--dataset pairs --data pairs.npz --folds 2 --hold-out 0.3 --identity --width 4 --no-tune --epochs 1"
    assert run(alignment.EXPERIMENT, [*flags.split(), "--seeds", "2", "--device", "cpu", "--name", "x"]) == 0
    out = capsys.readouterr().out
    assert "note: no labels" in out and "accuracy" not in out.split("verdict:")[0].split("claim:")[0]
    assert {path.name for path in Path("runs/x").iterdir()} >= {"table.txt", "figure.png", "results.json"}
