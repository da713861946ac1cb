"""The strength of the prior in small: each column beside the same by hand, and that whitening leaves what is said."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from experiments import experiment as frame
from experiments import prior_strength
from experiments.attacked import attacked_rows
from experiments.prior_strength import damage
from experiments.prior_strength.damage import damaged, outputs_under, worst_columns
from experiments.prior_strength.doubt import Doubt, measure_doubt, output_variance
from experiments.prior_strength.latents import latent_checks, latent_distances
from experiments.prior_strength.measure import KINDS, WEIGHTS, Kind, below_random, costs, gains, measure_kind
from experiments.prior_strength.report import BLOCKS, panels, table
from mmfusion.data.folds import FoldedDataset, fold_datasets
from mmfusion.dataset import Dataset, Split
from mmfusion.metrics.outcomes import PRIMARY, WORDS
from mmfusion.metrics.scores import example_losses, example_scores
from mmfusion.metrics.verdicts import corrected_contrasts, verdict_of
from mmfusion.training import grid as grids
from mmfusion.training.grid import JWAE, Recipe, Setting, outputs_of, train_grid

RECIPE = Recipe(latent_dim=4, hidden_dim=8, epochs=1, batch_size=16, weight_decay=0.1, learning_rate=0.01)
TASKS = ("binary", "multiclass", "multilabel", "regression")
ABSENT = ("ECE", "confidence")
"""what a regression's members do not have"""


def small_data(task="binary", folds=1):
    """160 examples of two modalities; of several folds every one tests 50 others."""
    rng = torch.Generator().manual_seed(0)
    features = {name: torch.randn(160, d, generator=rng) for name, d in (("a", 5), ("b", 4))}
    a, b = features["a"], features["b"][:, 0]
    target = {
        "binary": (a[:, 0] * b > 0).float(),
        "multiclass": (a[:, 0] > 0).long() + (b > 0.5).long(),
        "multilabel": torch.stack([a[:, 0] > 0, b > 0, a[:, 1] * b > 0], 1).float(),
        "regression": torch.stack([a[:, 0] * b, 10 * a[:, 1]], 1),
    }[task]
    datasets = []
    for f in range(folds):
        order = torch.arange(160).roll(-50 * f)
        rows = {"train": order[:80], "dev": order[80:110], "test": order[110:]}
        splits = {
            name: Split({m: x[r] for m, x in features.items()}, target[r], [f"id{i}" for i in r.tolist()])
            for name, r in rows.items()
        }
        classes = ("0", "1", "2") if task == "multiclass" else Dataset.class_names
        datasets.append(Dataset("toy", task, splits, "dev", class_names=classes))
    return fold_datasets(datasets)


def small_grid(task="binary", folds=1, noise="dimension", weights=(0.0, 1.0)):
    settings = [Setting(f"weight {weight:g}", 2, JWAE, mmd_weight=weight) for weight in weights]
    return train_grid(small_data(task, folds), settings, [0, 1], RECIPE, noise=noise)


def risk_by_hand(data: FoldedDataset, outputs: np.ndarray) -> np.ndarray:
    """(n,) of logits or values on test."""
    target = data.pool.target[data.test_rows].numpy()
    if data.task == "multiclass":
        return (outputs.argmax(-1) != target).astype(float)
    if data.task == "regression":
        return (np.abs(outputs - target) / data.target_scale.numpy()).mean(-1)
    wrong = ((outputs > 0) != (target > 0)).astype(float)
    return wrong if wrong.ndim == 1 else wrong.mean(-1)


def aurc_by_hand(uncertainty: np.ndarray, risk: np.ndarray) -> float:
    """Mean over k of the mean risk of the k least uncertain."""
    ordered = risk[np.argsort(uncertainty)]
    return float(np.mean([ordered[:k].mean() for k in range(1, len(ordered) + 1)]))


@torch.no_grad()
def covariances_by_hand(grid, place: int, seed: int) -> np.ndarray:
    """(n, O, O) of one member on test, fold after fold."""
    features = grid.data.pool.features
    return np.concatenate(
        [
            grid.model(place, seed, f)({m: x[fold.test] for m, x in features.items()}).covariance.double().numpy()
            for f, fold in enumerate(grid.data.folds)
        ]
    )


@pytest.mark.parametrize("noise", KINDS.values())
def test_whitened_latents_have_a_largest_eigenvalue_near_1_and_say_the_same(noise):
    data, recipe = small_data(), Recipe(latent_dim=4, hidden_dim=8, epochs=3, batch_size=16, weight_decay=0.1)
    grid = train_grid(data, [Setting("x", 2, JWAE, mmd_weight=0.0)], [0, 1], recipe, noise=noise)
    for model in grid.models:
        model.jwae.encoders["a"][-1].weight.data *= 20
    before = outputs_of(data, grid.models)
    as_trained, whitened = latent_checks(grid, 0)
    np.testing.assert_allclose(outputs_of(data, grid.models), before, rtol=1e-3, atol=1e-3)
    largest = [[one[0].follows["largest eigenvalue"].value for one in checks] for checks in (as_trained, whitened)]
    assert min(largest[0]) > 5 > 3 > max(largest[1])


def test_the_weight_of_a_setting_reaches_its_members_and_others_keep_the_recipes():
    data, recipe = small_data(), Recipe(latent_dim=4, hidden_dim=8, epochs=1, batch_size=16, mmd_weight=0.5)
    settings = [Setting("own", 2, JWAE, mmd_weight=7.0), Setting("recipe", 2), Setting("off", 2, (), mmd_weight=7.0)]
    members = grids._members(data, settings, [0], recipe)
    assert [member.loss_weights["mmd"] for member in members] == [7.0, 0.5, 0.0]


# ---- doubt ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_aurc_by_var_y_orders_by_the_covariance_of_each_member_and_of_their_mean(task):
    grid = small_grid(task, folds=2)
    doubt, outputs = measure_doubt(grid, 1), grid.predictions()[1].astype(float)
    scale = grid.data.target_scale.numpy()
    together = {
        "binary": lambda: np.log(expit(outputs).mean(0) / (1 - expit(outputs).mean(0))),
        "multilabel": lambda: np.log(expit(outputs).mean(0) / (1 - expit(outputs).mean(0))),
        "multiclass": lambda: np.log(softmax(outputs, -1).mean(0)),
        "regression": lambda: outputs.mean(0),
    }[task]()

    def variance(covariance, said):  # of one example
        if task != "multiclass":
            return (np.diag(covariance) / scale**2).mean()
        contrast = np.zeros(len(said))
        contrast[np.argsort(said)[-2:]] = 1, -1
        return contrast @ covariance @ contrast

    covariances = [covariances_by_hand(grid, 1, s) for s in (0, 1)]
    own = [[variance(c, y) for c, y in zip(covariances[s], outputs[s], strict=True)] for s in (0, 1)]
    shared = np.mean([[variance(c, y) for c, y in zip(x, together, strict=True)] for x in covariances], axis=0)
    np.testing.assert_allclose(doubt.variance, own, rtol=1e-4)
    np.testing.assert_allclose(doubt.ensemble_variance, shared, rtol=1e-4)
    risks = [risk_by_hand(grid.data, y) for y in outputs]
    expected = [aurc_by_hand(np.array(v), r) for v, r in zip(own, risks, strict=True)]
    np.testing.assert_allclose(doubt.columns["AURC Var[y]"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        doubt.columns["ensemble AURC Var[y]"], aurc_by_hand(shared, risk_by_hand(grid.data, together)), rtol=1e-6
    )
    np.testing.assert_allclose(doubt.columns["AURC random"], np.mean(risks, axis=1))
    np.testing.assert_allclose(doubt.columns["ensemble AURC random"], risk_by_hand(grid.data, together).mean())


def test_of_certain_latents_there_is_no_variance_and_no_aurc_by_it():
    doubt = measure_doubt(small_grid(noise="none"), 0)
    assert doubt.variance is None and doubt.ensemble_variance is None
    assert not any("Var[y]" in name for name in doubt.columns)
    assert {"AURC random", "AURC confidence", "ECE"} <= doubt.columns.keys()


def test_ece_and_aurc_by_confidence_and_disagreement_of_two_classes_by_hand():
    grid = small_grid()  # one fold: of several the AURC is the mean of theirs
    columns, logits = measure_doubt(grid, 0).columns, grid.predictions()[0].astype(float)
    target = grid.data.pool.target[grid.data.test_rows].numpy()

    def ece(p):
        bins = np.minimum((p * 15).astype(int), 14)
        return sum(abs((p - target)[bins == b].sum()) for b in range(15)) / len(p)

    p = expit(logits)
    mean = p.mean(0)
    risks = [(q > 0.5) != target for q in (*p, mean)]
    np.testing.assert_allclose(columns["ECE"], [ece(q) for q in p])
    np.testing.assert_allclose(columns["ensemble ECE"], [ece(mean)])
    by_confidence = [aurc_by_hand(-np.abs(q - 0.5), r) for q, r in zip((*p, mean), risks, strict=True)]
    np.testing.assert_allclose(columns["AURC confidence"], by_confidence[:2])
    np.testing.assert_allclose(columns["ensemble AURC confidence"], by_confidence[2:])
    entropy = lambda q: -q * np.log(q) - (1 - q) * np.log(1 - q)  # noqa: E731
    information = entropy(mean) - entropy(p).mean(0)
    np.testing.assert_allclose(columns["ensemble AURC disagreement"], [aurc_by_hand(information, risks[2])])


def test_of_a_regression_members_disagree_by_their_std_and_there_is_no_ece():
    grid = small_grid("regression")
    columns, values = measure_doubt(grid, 0).columns, grid.predictions()[0].astype(float)
    std = (values.std(0) / grid.data.target_scale.numpy()).mean(-1)  # of two, either ddof gives the same order
    expected = aurc_by_hand(std, risk_by_hand(grid.data, values.mean(0)))
    np.testing.assert_allclose(columns["ensemble AURC disagreement"], [expected])
    assert not any("ECE" in name or "confidence" in name for name in columns)


def test_distance_of_whitened_latents_is_mahalanobis_from_the_training_mean():
    grid = small_grid(noise="none", folds=2)
    expected = np.zeros((2, 100))
    for s in (0, 1):
        for f, fold in enumerate(grid.data.folds):
            with torch.no_grad():
                z = [x.double().numpy() for x in grid.model(0, s, f).latents(grid.data.pool.features)]
            for x in z:
                train, test = x[fold.train], x[fold.test]
                inverse = np.linalg.inv(np.cov(train.T))
                away = test - train.mean(0)
                expected[s, 50 * f : 50 * (f + 1)] += np.einsum("ni,ij,nj->n", away, inverse, away)
    latent_checks(grid, 0)  # whitens
    np.testing.assert_allclose(latent_distances(grid, 0), expected, rtol=1e-2)
    risks = [risk_by_hand(grid.data, y) for y in grid.predictions()[0]]
    by_hand = [aurc_by_hand(d, r) for d, r in zip(expected, risks, strict=True)]
    np.testing.assert_allclose(measure_doubt(grid, 0).columns["AURC distance"], by_hand, rtol=1e-3)


def test_planted_errors_that_grow_with_their_variance_are_found_below_the_random_order():
    rng = np.random.default_rng(0)
    variance = rng.uniform(0.01, 4, (2, 300))
    risk = np.abs(rng.normal(size=(2, 300))) * np.sqrt(variance)
    found = below_random(variance, risk)
    by_hand = [r.mean() - aurc_by_hand(v, r) for v, r in zip(variance, risk, strict=True)]
    np.testing.assert_allclose(found.mean(1), by_hand)
    assert (found.mean(1) > 0.1).all() and (below_random(-variance, risk).mean(1) < -0.1).all()


def test_variance_of_a_margin_counts_what_two_classes_share():
    covariance = torch.tensor([[[2.0, 1.5, 0.0], [1.5, 3.0, 0.0], [0.0, 0.0, 50.0]]]).double()
    said = torch.tensor([[1.0, 2.0, -5.0]])
    assert output_variance(covariance, said, "multiclass", torch.ones(1)).tolist() == [2 + 3 - 3]
    assert output_variance(covariance, said, "regression", torch.tensor([1.0, 1.0, 5.0])).tolist() == [7 / 3]


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_missing_columns_are_those_of_the_grid_without_each_modality(task):
    grid = small_grid(task, folds=2)
    scores, losses = damaged(grid)["missing"]
    for found, of in ((scores, example_scores), (losses, example_losses)):
        np.testing.assert_allclose(found, np.mean([grid.without([m], [0, 1], of=of) for m in "ab"], axis=0), rtol=1e-5)


def test_noise_columns_are_the_loss_of_features_with_that_noise_on_one_modality():
    grid = small_grid(folds=2)
    losses = []
    for m in "ab":
        clean = grid.data.pool.features
        rng = damage.Condition("features", "feature noise", m, 0.5, 0).rng()
        values = [[], []]
        for f, fold in enumerate(grid.data.folds):
            noise = torch.from_numpy(rng.standard_normal((50, clean[m].shape[1]), dtype=np.float32))
            x = {name: x[fold.test] for name, x in clean.items()}
            x[m] = x[m] + 0.5 * clean[m][fold.train].std(0) * noise
            for s in (0, 1):
                with torch.no_grad():
                    y = grids.predict(grid.model(1, s, f), x).double()
                values[s].append(log_loss(grid.data.pool.target[fold.test], y.sigmoid(), labels=[0, 1]))
        losses.append(np.mean(values, axis=1))
    np.testing.assert_allclose(damaged(grid)["noise 0.5"][1][1].mean(-1), np.mean(losses, axis=0), rtol=1e-5)


def test_noise_is_the_same_draw_at_every_level_and_level_0_changes_nothing():
    grid = small_grid("regression")
    np.testing.assert_allclose(outputs_under(grid, "a", 0.0), grid.predictions(), rtol=1e-4, atol=1e-5)
    for model in grid.models:  # linear in "a" where nothing else is there to bend it
        model.jwae.encoders["a"] = torch.nn.Linear(5, 4)
    start, half, whole = (outputs_under(grid, "a", level) for level in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(whole - start, 2 * (half - start), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", KINDS.values())
def test_latent_column_is_the_share_whose_margin_beats_the_steepest_rise(noise, monkeypatch):
    monkeypatch.setattr(damage, "RHO", 0.3)
    grid = small_grid(noise=noise)
    latent_checks(grid, 0)
    columns, (fold,) = worst_columns(grid, 0), grid.data.folds
    target = grid.data.pool.target[fold.test]
    for s in (0, 1):
        model, kept = grid.model(0, s), {"means": [], "total": []}
        z = [x.detach() for x in model.latents(grid.data.pool.features)]
        variances = model.latent_variances() or [torch.zeros(4)] * 2
        for m in (0, 1):
            moving = [x[fold.test].clone().requires_grad_(k == m) for k, x in enumerate(z)]
            y = model.rescale(model.fusion(moving)).squeeze(-1)
            (gradient,) = torch.autograd.grad(y.sum(), moving[m])
            margin = (2 * target - 1) * y.detach()
            means = z[m][fold.train].var(0)
            for name, size in (("means", means.sum().sqrt()), ("total", (means + variances[m]).sum().sqrt())):
                kept[name].append((margin > 0.3 * size * gradient.norm(dim=1)).double().mean().item())
        for name, shares in kept.items():
            np.testing.assert_allclose(columns[f"latent, {name}"][s], np.mean(shares), atol=1e-6)
    if noise == "none":
        np.testing.assert_allclose(columns["latent, means"], columns["latent, total"])
    else:
        assert (columns["latent, means"] >= columns["latent, total"]).all()


@pytest.mark.parametrize("task", TASKS)
def test_worst_features_lie_between_certificate_and_attack_and_below_the_clean_score(task):
    grid = small_grid(task, folds=2)
    columns, clean = worst_columns(grid, 0), grid.scores()[0].mean(-1)
    assert (columns["certified"] <= columns["attacked"] + 1e-9).all()
    assert (columns["attacked"] < clean + (0.02 if task == "multiclass" else 1e-6)).all()


def test_worst_cases_see_at_most_so_many_examples_spread_over_the_folds():
    data = small_data(folds=3)
    assert [rows.tolist() for rows in attacked_rows(data)] == [fold.test.tolist() for fold in data.folds]
    rows = attacked_rows(data, 30)
    assert [len(r) for r in rows] == [10, 10, 10]
    assert all(set(r.tolist()) < set(fold.test.tolist()) for r, fold in zip(rows, data.folds, strict=True))


def test_a_grid_is_damaged_as_it_was_trained_and_whitened_before_its_latents_move():
    grid = small_grid()
    for model in grid.models:  # a missing latent is far from the mean, which whitening makes 0
        model.jwae.encoders["a"][-1].bias.data += 3
    grid.outputs = outputs_of(grid.data, grid.models).reshape(grid.outputs.shape)
    missing = np.mean([grid.without([m], [0, 1]).mean(-1) for m in "ab"], axis=0)
    missing_losses = np.mean([grid.without([m], [0, 1], of=example_losses).mean(-1) for m in "ab"], axis=0)
    noisy = damaged(grid)
    kind = measure_kind(grid)
    np.testing.assert_allclose(kind.noisy_losses, (noisy["noise 0.5"][1] + noisy["noise 1"][1]) / 2)
    np.testing.assert_allclose([kind.columns[f"weight {w}"]["missing score"] for w in "01"], missing)
    np.testing.assert_allclose([kind.columns[f"weight {w}"]["missing loss"] for w in "01"], missing_losses, rtol=1e-5)
    np.testing.assert_allclose(kind.columns["weight 1"]["noise 1 loss"], noisy["noise 1"][1][1].mean(-1))
    latent_checks(grid, 1)  # changes nothing where measure_kind has whitened
    whitened = worst_columns(grid, 1)
    np.testing.assert_allclose(kind.columns["weight 1"]["latent, total"], whitened["latent, total"])
    np.testing.assert_allclose(
        kind.columns["weight 1"]["AURC distance"], measure_doubt(grid, 1).columns["AURC distance"]
    )


# ---- contrasts, table and figure -----------------------------------------------------------------------------------


def test_gains_are_positive_where_the_prior_and_gaussian_latents_do_better():
    places = len(WEIGHTS)
    losses = np.ones((places, 2, 5))
    better = losses.copy()
    better[WEIGHTS.index(1.0)] = 0.25
    certain = Kind(losses, losses, better, [], {})
    risk = np.tile(np.arange(5.0), (2, 1))
    doubts = [Doubt(risk, risk, risk[0], risk[0], {})] * places
    gaussian = Kind(losses, better, losses, doubts, {})
    named = gains({"certain": certain, "Gaussian": gaussian})
    assert [(name, d.values.mean(), d.decides) for name, d in list(named.items())[:3]] == [
        ("certain: lower loss under noise at weight 1", 0.75, False),
        ("Gaussian: lower loss under noise at weight 1", 0.0, False),
        ("weight 1: lower loss of Gaussian", 0.75, False),
    ]
    last = named["Gaussian: Var[y] finds errors at weight 1"]
    assert math.isclose(last.values.mean(), 2 - np.mean([0, 0.5, 1, 1.5, 2])) and not last.decides


def test_table_says_minus_and_the_figure_leaves_out_what_no_setting_has():
    cells = {name: np.array([0.5]) for block in BLOCKS for name in block.names if "ECE" not in name}
    columns = {"x": cells, "y": {name: v for name, v in cells.items() if "Var[y]" not in name}}
    members = table(small_data("regression"), columns).split("\n\n")[4].splitlines()
    assert [line.split()[1:] for line in members[2:]] == [["-", *["0.500"] * 4], ["-", *["0.500"] * 3, "-"]]
    shown = {panel.title: list(panel.lines) for panel in panels(small_data("regression"), columns)}
    assert not any("ECE" in title for title in shown) and "Var[y]" in shown["AURC of members"]


@pytest.mark.parametrize("task", TASKS)
def test_experiment_leaves_every_weight_and_a_control_that_could_fail(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(150, 5)), "b": rng.normal(size=(150, 4))}
    target = {
        "binary": (arrays["a"][:, 0] > 0).astype(int),
        "multiclass": (arrays["a"][:, 0] > 0).astype(int) + (arrays["b"][:, 0] > 0),
        "multilabel": (arrays["a"][:, :2] > 0).astype(int),
        "regression": arrays["a"][:, 0] + 0.1,
    }[task]
    np.savez("mine.npz", **arrays, target=target)
    flags = "--dataset arrays --data mine.npz --hold-out 0.3 --seeds 2 --epochs 1 --hidden-dim 8 --device cpu"
    assert frame.run(prior_strength.EXPERIMENT, [*flags.split(), "--task", task]) == 0
    results = json.loads(Path("runs/prior_strength-arrays/results.json").read_text())
    numbers = results["numbers"]
    assert list(numbers) == [f"{kind}, {weight:g}" for kind in KINDS for weight in WEIGHTS]
    assert all(len(v) == 2 - name.startswith("ensemble") for cells in numbers.values() for name, v in cells.items())
    assert numbers["certain, 1"]["share no noise"] == [1, 1]
    assert all(0 < v < 1 for v in numbers["Gaussian, 1"]["share no noise"])
    shown = {name for block in BLOCKS for name in block.names}
    assert set(numbers["Gaussian, 1"]) == {n for n in shown if task != "regression" or n.split()[-1] not in ABSENT}
    assert set(numbers["Gaussian, 1"]) - set(numbers["certain, 1"]) == {"AURC Var[y]", "ensemble AURC Var[y]"}
    assert [c["decides"] for c in results["contrasts"]] == [*[False, False, True, False] * 2, *[False] * 4]
    assert f"Gaussian: weight 30 costs {WORDS[PRIMARY[task][0]]}" in capsys.readouterr().out
    assert Path("runs/prior_strength-arrays/figure.png").stat().st_size > 10_000


def test_cost_of_a_cross_validated_study_is_inferred_over_its_folds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(120, 5)), "b": rng.normal(size=(120, 4))}
    np.savez("mine.npz", **arrays, target=(arrays["a"][:, 0] > 0).astype(int))
    flags = "--dataset arrays --data mine.npz --hold-out 0.3 --epochs 1 --hidden-dim 8 --device cpu"
    assert frame.run(prior_strength.EXPERIMENT, [*flags.split(), "--seeds", "1", "--cross-validate", "5"]) == 0
    contrasts = json.loads(Path("runs/prior_strength-arrays/results.json").read_text())["contrasts"]
    assert all(len(c["fold_values"]) == 5 for c in contrasts)


@pytest.mark.parametrize("cost, verdict", [(0.0, "supported"), (0.05, "not supported")])
def test_a_prior_that_costs_more_than_an_effect_of_interest_is_no_free_prior(cost, verdict):
    data, rng = small_data(folds=3), np.random.default_rng(0)
    shape = (len(WEIGHTS), 1, len(data.test_rows))
    found = {name: 0.001 * rng.normal(size=shape) for name in PRIMARY["binary"]}
    kinds = {kind: Kind({n: x.copy() for n, x in found.items()}, None, None, [], {}) for kind in KINDS}
    kinds["Gaussian"].outcomes["log_loss"][WEIGHTS.index(1.0)] -= cost
    named, effects = costs(data, kinds)
    assert verdict_of(corrected_contrasts(named, effects, cut=data.cut)) == verdict
