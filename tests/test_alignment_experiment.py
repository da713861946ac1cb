"""experiments.alignment on a toy: its table, its damaged scores against slow loops, and data without labels."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from experiments import alignment
from experiments.alignment import AlignmentOptions, beside, claim, falls, measure, rows, training_of, tune
from experiments.alignment_scores import accuracies, damage, fall, largest_class, latents_of, scored
from experiments.experiment import Outcome, Run, run
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.metrics.cross_decoding import frechet_distance
from mmfusion.metrics.retrieval import cross_retrieval
from mmfusion.training.align import Weighting, align

LABELS = ["none", "contrast", "transport", "Riemannian", "contrast + transport", "contrast + Riemannian"]
LABELS += [
    "transport + Riemannian",
    "hybrid",
    "contrast + local",
    "contrast + CORAL",
    "contrast + MMD",
    "GRAM",
    "multilinear",
]
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
    return measured(toy(folds=1), tmp_path_factory.mktemp("run"), tune=True)


def measured(data: FoldedDataset, folder: Path, **changes) -> Outcome:
    (folder / "checkpoints").mkdir()
    return measure(data, Run(AlignmentOptions(**SMALL | changes), folder, torch.device("cpu")))


@pytest.fixture(scope="module")
def ensemble():
    return align(toy(), [Weighting("x", {"info_nce": 1.0})], training_of(toy(), AlignmentOptions(**SMALL), 2))["x"]


def test_every_row_stands_in_both_blocks_of_the_table_with_every_score(outcome):
    wanted = [
        ["R@1", "mAP", "gap", "CKA", "FOSCTTM", "R^2 across", "Frechet across"],
        ["invariance, occlusion", "invariance, noise", "unique", "V-measure", "accuracy"],
    ]
    wanted[1] += ["accuracy, 50% missing", "accuracy, 50% noise", "unique accuracy"]
    for block, names in zip(outcome.table.split("\n\n"), wanted, strict=True):
        head, *lines = block.splitlines()
        assert re.split("  +", head.strip()) == names
        assert [line[: max(map(len, LABELS))].strip() for line in lines] == LABELS
        assert all(line.count("+-") == len(names) for line in lines)
    assert "nan" not in outcome.table


def test_the_sources_claim_decides_and_the_others_stand_beside(outcome):
    deciding = [contrast.name for contrast in outcome.contrasts if contrast.decides]
    out_of_reach = [note for note in outcome.notes if note.startswith("no part of the verdict")]
    assert len(out_of_reach) == (len(deciding) < 5)
    assert [name for name in (c.name for c in outcome.contrasts[:5]) if name not in deciding] == [
        name + " by" for note in out_of_reach for name in note.split("right: ")[1].split("; ")
    ]
    assert [contrast.name for contrast in outcome.contrasts[:5]] == [
        "R@1: hybrid over contrast",
        "fall at 50% missing, hybrid: below 10% by",
        "fall at 50% missing, none: above 30% by",
        "fall at 50% noise, hybrid: below 10% by",
        "fall at 50% noise, none: above 30% by",
    ]
    beside = [contrast.name for contrast in outcome.contrasts[5:]]
    falls = [f"fall at 50% {kind}: {a} over hybrid" for kind in ("missing", "noise") for a in ("none", "contrast")]
    assert beside[:4] == falls and len(beside) == 22
    assert {c.effect for c in outcome.contrasts if c.name in falls} == {0.2}
    assert {c.effect for c in outcome.contrasts if c.name.startswith("relative")} == {0.05}


def test_all_of_the_claim_must_hold_so_that_nothing_is_corrected(outcome):
    assert all(c.p_corrected == c.p for c in outcome.contrasts)
    assert {c.route for c in outcome.contrasts} == {""}


def test_notes_tell_falls_and_relative_changes(outcome):
    notes = "\n".join(outcome.notes)
    for kind in ("missing", "noise"):
        assert f"at 20%, 50%, 80% {kind}: none " in notes
    change = next(c for c in outcome.contrasts if c.name == "relative gap: contrast + local")
    assert f"contrast + local, in % of the contrast's: gap closes by {100 * change.estimate:.1f} [" in notes


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
    assert {found[name].shape for name in ("R@1", "accuracy", "unique accuracy", "invariance, noise")} == {(2, 50)}
    assert found["gap"].shape == found["unique"].shape == (2, 2)
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


def test_unique_share_is_of_the_test_part_by_ridge_on_the_training_part(ensemble):
    data, found = toy(), scored(toy(), ensemble)
    fold, member = data.folds[1], ensemble.members[3]
    train, test = (latents_of(data, member, part).astype(float) for part in (fold.train, fold.test))

    def explained(x: np.ndarray, y: np.ndarray, modalities: list[int]) -> float:
        a, b = (np.concatenate([z[:, m] for m in modalities], 1) for z in (train, test))
        b, a = (b - a.mean(0)) / a.std(0), (a - a.mean(0)) / a.std(0)
        weights = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ x)
        return 1 - np.square(y - b @ weights).sum() / np.square(y - y.mean(0)).sum()

    gains = []
    for m, name in enumerate("abc"):
        x, y = (data.pool.features[name][part].double().numpy() for part in (fold.train, fold.test))
        y, x = (y - x.mean(0)) / x.std(0), (x - x.mean(0)) / x.std(0)
        gains.append(explained(x, y, [0, 1, 2]) - explained(x, y, [k for k in range(3) if k != m]))
    assert found["unique"][1, 1] == pytest.approx(np.mean(gains), abs=1e-4)


def test_unique_accuracy_is_what_a_modality_adds_to_the_others(ensemble):
    data, found = toy(), scored(toy(), ensemble)
    fold, member = data.folds[1], ensemble.members[3]
    train, test = (latents_of(data, member, part) for part in (fold.train, fold.test))
    target = data.pool.target.numpy()

    def right(modalities: list[int]) -> np.ndarray:
        a, b = (np.concatenate([z[:, m] for m in modalities], 1) for z in (train, test))
        return LogisticRegression(max_iter=2000).fit(a, target[fold.train]).predict(b) == target[fold.test]

    added = [right([0, 1, 2]).astype(float) - right(others) for others in ([1, 2], [0, 2], [0, 1])]
    np.testing.assert_allclose(found["unique accuracy"][1, 30:], np.mean(added, 0))


def test_a_label_that_one_modality_carries_alone_is_unique_and_one_that_all_carry_is_not():
    rng = np.random.default_rng(0)
    target = np.arange(200) % 2
    alone = rng.normal(size=(200, 2, 2))
    alone[:, 0, 0] += 12 * target
    both = alone + 12 * target[:, None, None]
    added = [accuracies(z[:100], target[:100], z[100:], target[100:], {})["unique accuracy"] for z in (alone, both)]
    assert 0.15 < added[0].mean() < 0.35  # of two modalities one is worth half the accuracy, the other nothing
    assert added[1].mean() == 0


@pytest.mark.parametrize("kind", ["occlusion", "noise"])
def test_invariance_is_the_cosine_of_latents_of_clean_and_damaged_features(ensemble, kind):
    data, found = toy(), scored(toy(), ensemble)
    fold, member = data.folds[1], ensemble.members[3]
    cosines = np.zeros((20, 3))
    for m, name in enumerate("abc"):
        x = data.pool.features[name][fold.test]
        spoiled = damage(x, member.standardise[name], kind)
        z, w = (member.encode({name: features})[name].detach().numpy() for features in (x, spoiled))
        for i in range(20):
            cosines[i, m] = z[i] @ w[i] / (np.linalg.norm(z[i]) * np.linalg.norm(w[i]))
    np.testing.assert_allclose(found[f"invariance, {kind}"][1, 30:], cosines.mean(1), atol=1e-5)


def test_occlusion_hides_a_random_half_of_every_examples_features(ensemble):
    x = toy().pool.features["c"]
    standardise = ensemble.members[1].standardise["c"]
    spoiled = damage(x, standardise, "occlusion")
    hidden = spoiled != x
    assert (hidden.sum(1) == 3).all() and len(hidden.unique(dim=0)) > 5
    torch.testing.assert_close(spoiled[hidden], standardise.mean.expand_as(x)[hidden])


def made_up() -> dict[str, dict[str, np.ndarray]]:
    """All rows equal: 2 seeds, 4 examples, 2 folds; accuracy .8, of which nothing is lost."""
    ones = np.ones((2, 4))
    row = {"R@1": 0.2 * ones, "accuracy": 0.8 * ones, "unique accuracy": 0.1 * ones}
    row |= {f"accuracy, 50% {kind}": 0.8 * ones for kind in ("missing", "noise")}
    row |= {f"invariance, {kind}": 0.5 * ones for kind in ("occlusion", "noise")}
    row |= {"gap": 0.4 * np.ones((2, 2)), "V-measure": 0.5 * np.ones((2, 2)), "unique": 0.3 * np.ones((2, 2))}
    return {label: dict(row) for label in LABELS}


def values(family: dict, name: str) -> np.ndarray:
    return family[name][0].values


def test_falls_are_judged_in_parts_of_the_clean_accuracy():
    found = made_up()
    found["none"]["accuracy, 50% missing"] = 0.5 * np.ones((2, 4))  # falls by .3 of .8: 37.5 %
    found["hybrid"]["accuracy, 50% missing"] = 0.74 * np.ones((2, 4))  # by .06: 7.5 %
    found["hybrid"]["R@1"] = 0.3 * np.ones((2, 4))
    family = claim(found, 0.1)
    np.testing.assert_allclose(values(family, "fall at 50% missing, none: above 30% by"), 0.3 - 0.3 * 0.8)
    np.testing.assert_allclose(values(family, "fall at 50% missing, hybrid: below 10% by"), 0.1 * 0.8 - 0.06)
    np.testing.assert_allclose(values(family, "fall at 50% noise, none: above 30% by"), -0.3 * 0.8)
    np.testing.assert_allclose(values(family, "R@1: hybrid over contrast"), 0.1)
    assert family["R@1: hybrid over contrast"][1] == pytest.approx(0.01)
    np.testing.assert_allclose(values(beside(found), "fall at 50% missing: none over hybrid"), 0.24)
    missing, noise = falls(found)
    assert "none 15.0 +- 0.0, 37.5 +- 0.0, 60.0 +- 0.0; contrast 0.0" in missing
    assert "hybrid 3.0 +- 0.0, 7.5 +- 0.0, 12.0 +- 0.0" in missing and "none 0.0" in noise


@pytest.mark.parametrize(("guessed", "kept", "lost"), [(0.1, True, True), (0.5, True, False), (0.7, False, False)])
def test_fall_decides_only_where_one_down_to_guessing_would_exceed_it(guessed, kept, lost):
    """Of .8 a half at guessing leaves .35, .15 or .05 to fall by: below and above .08 and .24."""
    family = claim(made_up(), guessed)
    for kind in ("missing", "noise"):
        assert family[f"fall at 50% {kind}, hybrid: below 10% by"][0].decides == kept
        assert family[f"fall at 50% {kind}, none: above 30% by"][0].decides == lost
    assert family["R@1: hybrid over contrast"][0].decides


def test_guessing_is_the_share_of_the_largest_class_of_the_test_examples():
    data = toy()
    target = torch.zeros(90)
    target[data.test_rows[:20]] = 1
    assert largest_class(replace(data, pool=replace(data.pool, target=target))) == 30 / 50
    assert largest_class(toy("regression")) == 0


@pytest.mark.parametrize(
    ("train", "given", "epochs"), [(45, None, 100), (300, None, 50), (5000, None, 15), (300, 7, 7)]
)
def test_few_examples_are_trained_for_more_epochs_unless_epochs_are_given(train, given, epochs):
    cuts = [Fold(torch.arange(n), torch.arange(9), torch.arange(9)) for n in (train, 9999)]
    assert training_of(replace(toy(), folds=cuts), AlignmentOptions(epochs=given), 2).epochs == epochs


def test_fall_at_a_rate_is_that_of_the_mixture():
    clean, hit = np.array([[1.0, 1.0, 0.0]]), np.array([[0.0, 0.5, 0.5]])
    of = {"accuracy": clean, "accuracy, 50% noise": 0.5 * clean + 0.5 * hit}
    for rate in (0.2, 0.8):
        np.testing.assert_allclose(fall(of, "noise", rate), clean - ((1 - rate) * clean + rate * hit))


def test_changes_beside_the_claim_have_the_sign_of_what_they_ask():
    found = made_up()
    found["contrast + local"] |= {
        "gap": 0.1 * np.ones((2, 2)),
        "V-measure": 0.6 * np.ones((2, 2)),
        "R@1": 0.22 * np.ones((2, 4)),
        "invariance, noise": 0.7 * np.ones((2, 4)),
    }
    found["none"] |= {"unique": 0.5 * np.ones((2, 2)), "unique accuracy": 0.15 * np.ones((2, 4))}
    family = beside(found)
    expected = {
        "relative gap: contrast + local": 0.75,
        "relative V-measure: contrast + local": 0.2,
        "relative R@1: contrast + local": 0.1,
        "relative gap over R@1: contrast + local": 0.65,
        "relative V-measure over R@1: contrast + local": 0.1,
        "relative gap: contrast + transport": 0.0,
        "invariance, noise: contrast + local over contrast": 0.2,
        "invariance, occlusion: contrast + local over contrast": 0.0,
        "unique: none over hybrid": 0.2,
        "unique accuracy: none over hybrid": 0.05,
        "accuracy: none over hybrid": 0.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(values(family, name), value, atol=1e-12, err_msg=name)
    assert values(family, "relative gap over R@1: contrast + local").shape == (2,)
    assert not any(difference.decides for difference, _ in family.values())


def test_without_labels_there_is_no_accuracy_and_weights_are_one_without_tuning(tmp_path):
    found = measured(toy("regression", 1), tmp_path, tune=False)
    assert "accuracy" not in found.table and "V-measure" not in found.table
    assert found.numbers["weights"] == {"transport": 1.0, "riemannian": 1.0} and not found.numbers["tried on dev"]
    assert [c.name for c in found.contrasts if c.decides] == ["R@1: hybrid over contrast"]
    figure = Figure()
    found.draw(figure)
    assert len(figure.axes) == 4
    assert {"unique: none over hybrid", "invariance, noise: contrast + local over contrast"} <= {
        c.name for c in found.contrasts
    }
    assert not any("V-measure" in c.name or "accuracy" in c.name for c in found.contrasts)


def test_two_modalities_have_no_rows_for_losses_of_three():
    weights = {"transport": 2.0, "riemannian": 3.0}
    assert [one.label for one in rows(weights, 2)] == LABELS[:-2]
    by_label = {one.label: one.weights for one in rows(weights, 3)}
    base = {"prior": 0.1, "reconstruction": 0.1}
    assert by_label["none"] == base
    assert by_label["hybrid"] == base | {"info_nce": 1.0, "transport": 2.0, "stein": 3.0, "bures": 3.0}
    assert by_label["contrast + local"] == base | {"info_nce": 1.0, "bures": 3.0}


def test_the_command_leaves_table_figure_and_results_of_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("pairs.npz", a=rng.normal(size=(40, 4)), b=rng.normal(size=(40, 4)))
    flags = "--dataset pairs --data pairs.npz --folds 2 --hold-out 0.3 --identity --width 4 --no-tune --epochs 1"
    assert run(alignment.EXPERIMENT, [*flags.split(), "--seeds", "2", "--device", "cpu", "--name", "x"]) == 0
    out = capsys.readouterr().out
    assert "note: no labels" in out and "accuracy" not in out.split("verdict:")[0].split("claim:")[0]
    assert {path.name for path in Path("runs/x").iterdir()} >= {"table.txt", "figure.png", "results.json"}
