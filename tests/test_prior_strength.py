"""The strength of the prior in small: its columns, its control, and that whitening leaves what is said alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import experiment as frame
from experiments import prior_strength
from experiments.prior_strength import KINDS, WEIGHTS, latent_checks
from mmfusion.data.folds import fold_datasets
from mmfusion.dataset import Dataset, Split
from mmfusion.training import grid as grids
from mmfusion.training.grid import JWAE, Recipe, Setting, outputs_of, train_grid


def small_data():
    rng = torch.Generator().manual_seed(0)
    features = {name: torch.randn(160, d, generator=rng) for name, d in (("a", 5), ("b", 4))}
    target = (features["a"][:, 0] * features["b"][:, 0] > 0).float()
    rows = {"train": slice(0, 80), "dev": slice(80, 110), "test": slice(110, 160)}
    splits = {
        name: Split({m: x[r] for m, x in features.items()}, target[r], [f"{name}{i}" for i in range(len(target[r]))])
        for name, r in rows.items()
    }
    return fold_datasets([Dataset("toy", "binary", splits, "dev")])


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


def test_experiment_leaves_every_weight_and_a_control_that_could_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(150, 5)), "b": rng.normal(size=(150, 4))}
    np.savez("mine.npz", **arrays, target=(arrays["a"][:, 0] > 0).astype(int))
    flags = "--dataset arrays --data mine.npz --hold-out 0.3 --seeds 2 --epochs 1 --hidden-dim 8 --device cpu"
    assert frame.run(prior_strength.EXPERIMENT, flags.split()) == 0
    results = json.loads(Path("runs/prior_strength-arrays/results.json").read_text())
    assert list(results["numbers"]) == [f"{kind}, {weight:g}" for kind in KINDS for weight in WEIGHTS]
    assert all(len(v) == 2 for cells in results["numbers"].values() for v in cells.values())
    assert results["numbers"]["certain, 1"]["share no noise"] == [1, 1]
    assert all(0 < v < 1 for v in results["numbers"]["Gaussian, 1"]["share no noise"])
    assert "Gaussian: weight 30 costs score" in capsys.readouterr().out
    assert Path("runs/prior_strength-arrays/figure.png").stat().st_size > 10_000
