"""What a grid says by folds: outcomes, thresholds and temperatures of dev, repeats, starts, and kept predictions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from benchmarks import recomputed_cells
from experiments.experiment import keep_predictions, outcomes
from experiments.rank_ablation import at_matched_loss, used_ranks
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.folds import FoldedDataset, cross_validated
from mmfusion.dataset import Fold, Split
from mmfusion.metrics.verdicts import Difference, corrected_contrasts
from mmfusion.models.decomposition import interaction_rank
from mmfusion.training.grid import (
    Recipe,
    Setting,
    best_thresholds,
    by_fold,
    by_repeat,
    fold_sizes,
    train_grid,
)

SMALL = Recipe(latent_dim=4, hidden_dim=8, epochs=2)
EXAMPLES = 96


def study(repeats: int = 2) -> FoldedDataset:
    rng = np.random.default_rng(0)
    features = {name: torch.from_numpy(rng.normal(size=(EXAMPLES, 4))).float() for name in ("a", "b")}
    target = ((features["a"][:, 0] + features["b"][:, 0]) > 0).float()
    rows = torch.arange(EXAMPLES)
    pool = Split(features, target, [f"train_{k}" for k in range(EXAMPLES)])
    data = FoldedDataset("toy", "binary", pool, [Fold(rows[:64], rows[64:80], rows[80:])], [], {})
    return cross_validated(data, 3, repeats)


@pytest.fixture(scope="module")
def grid():
    settings = [Setting("rank 1", 1), Setting("rank 3", 3), Setting("random", 3, start="random")]
    return train_grid(study(), settings, [0, 1], SMALL)


def test_outcomes_by_folds_are_scikit_learns_scores(grid):
    data, found = grid.data, outcomes(grid)
    assert list(found) == ["auroc", "log_loss", "accuracy"]
    for f, fold in enumerate(data.folds):
        y, said = data.pool.target[fold.test].numpy(), grid.outputs[:, :, f][..., fold.test]
        for p, s in np.ndindex(said.shape[:2]):
            assert by_fold(data, found["auroc"])[p, s, f] == pytest.approx(roc_auc_score(y, said[p, s]))
            loss = log_loss(y, 1 / (1 + np.exp(-said[p, s].astype(float))))
            assert by_fold(data, found["log_loss"])[p, s, f] == pytest.approx(-loss, abs=1e-6)
            cut = grid.thresholds()[p, s, f]
            assert by_fold(data, found["accuracy"])[p, s, f] == pytest.approx(accuracy_score(y, said[p, s] >= cut))


def test_threshold_is_the_best_on_dev_and_sees_no_test_example(grid):
    logits = np.array([[-2.0, -1.0, 0.5, 3.0], [1.0, 2.0, 3.0, 4.0]])
    assert best_thresholds(logits, np.array([0, 0, 1, 1])).tolist() == [-0.25, 2.5]
    assert best_thresholds(logits, np.array([1, 1, 1, 1])).tolist() == [-3.0, 0.0]  # everything is called positive
    fold = grid.data.folds[0]
    said, y = grid.outputs[0, 0, 0], grid.data.pool.target.numpy()
    best = max(np.mean((said[fold.dev] >= t) == y[fold.dev]) for t in np.linspace(-5, 5, 2001))
    assert np.mean((said[fold.dev] >= grid.thresholds()[0, 0, 0]) == y[fold.dev]) == pytest.approx(best)


def test_temperature_comes_from_dev_and_keeps_the_order(grid):
    data = grid.data
    ratio = grid.tempered() / grid.predictions()
    ends = np.cumsum(fold_sizes(data))[:-1]
    for part in np.split(ratio, ends, axis=-1):
        np.testing.assert_allclose(part, part[..., :1].repeat(part.shape[-1], -1), rtol=1e-4)
    assert ratio.std() > 0


def test_one_score_for_each_seed_and_repeat(grid):
    values = grid.outcome("auroc")
    found = by_repeat(grid.data, values)
    assert found.shape == (3, 4)
    folds = by_fold(grid.data, values)
    np.testing.assert_allclose(found[:, 1], folds[:, 0, 3:].mean(-1))
    np.testing.assert_allclose(found[:, 2], folds[:, 1, :3].mean(-1))


def test_every_repeat_starts_anew(grid):
    start = replace(SMALL, epochs=1, learning_rate=1e-12, weight_decay=0.0)
    untrained = train_grid(study(), [Setting("rank 2", 2)], [0], start)
    weights = [model.fusion.rank_weights.detach() for model in untrained.models]
    factors = [model.fusion.projections[0].weight.detach() for model in untrained.models]
    assert all(torch.allclose(factors[0], one, atol=1e-6) for one in factors[:3])
    assert not torch.allclose(factors[0], factors[3], atol=1e-3) and len(weights) == 6


def test_signs_start_balanced_or_at_random():
    recipe = replace(SMALL, epochs=1, learning_rate=1e-12, weight_decay=0.0)
    settings = [Setting("balanced", 4), Setting("random", 4, start="random")]
    grid = train_grid(study(1), settings, list(range(8)), recipe)

    def positive(setting: int) -> list[int]:
        found = []
        for seed in range(8):
            layer: LowRankMultimodalFusion = grid.model(setting, seed).fusion
            sign = layer.rank_weights.sign()
            for projection in layer.projections:
                sign = sign * projection.bias.unflatten(0, (4, 1))[:, 0].sign()
            found.append(int((sign > 0).sum()))
        return found

    assert set(positive(0)) == {2}
    assert len(set(positive(1))) > 1


def test_effective_rank_is_that_of_the_canonical_spectrum():
    torch.manual_seed(0)
    latents = [torch.randn(300, 6) * torch.linspace(1, 2, 6) + 1, torch.randn(300, 5)]
    layer = LowRankMultimodalFusion([6, 5], rank=4)
    spectrum = layer.canonical_factors([torch.cov(z.T) for z in latents]).spectrum[0].double().square()
    assert interaction_rank(layer, latents) == pytest.approx(
        float(spectrum.sum() ** 2 / spectrum.square().sum()), rel=1e-4
    )
    assert interaction_rank(LowRankMultimodalFusion([6, 5], rank=1), latents) == pytest.approx(1)
    three = LowRankMultimodalFusion([6, 5, 4], output_dim=2, rank=3)
    assert 1 <= interaction_rank(three, [*latents, torch.randn(300, 4)]) <= 3
    with torch.no_grad():
        layer.rank_weights.zero_()
    assert interaction_rank(layer, latents) == 0


def test_rank_that_is_used_is_at_most_the_rank(grid):
    assert used_ranks(grid, 0) == pytest.approx(np.ones((2, 6)))
    assert (used_ranks(grid, 1) <= 3 + 1e-9).all() and used_ranks(grid, 1).max() > 1.05


def test_matched_loss_interpolates_over_step_sizes(grid):
    """Where one step size has just the wanted training loss, the matched outcome is that step size's."""
    renamed = [Setting("jWAE, rank 4", 3), Setting("jWAE, rank 8", 3)]
    own = replace_grid(grid, renamed, [1, 1])  # both rows are the same members
    other = replace_grid(grid, [Setting("jWAE, rank 8", 3)], [0])
    found = at_matched_loss(own, {1.0: own, 0.5: other}, 8, "auroc")
    np.testing.assert_allclose(found, by_fold(grid.data, own.outcome("auroc")[0]))


def replace_grid(grid, settings, places):
    return replace(grid, settings=settings, outputs=grid.outputs[places])


def test_kept_predictions_are_scored_again_by_other_code(grid, tmp_path):
    renamed = [Setting("jWAE-LMF, rank 4", 3), Setting("LMF without jWAE", 1)]
    own = replace_grid(grid, renamed, [1, 0])
    path = tmp_path / "predictions" / "x.safetensors"
    keep_predictions(own, path)
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["about"])["rows"] == [one.label for one in renamed]
    labels = dict(zip(own.data.pool.ids, own.data.pool.target.numpy(), strict=True))
    kept = recomputed_cells.read(path)
    for word, outcome in (("AUROC", "auroc"), ("log loss", "log_loss")):
        here = [recomputed_cells.scores(kept, one.label, word, labels) for one in renamed]
        values = own.outcome(outcome)
        (contrast,) = corrected_contrasts({"x": Difference(values[0] - values[1], "x")}, 0.01, cut=own.data.cut)
        found = recomputed_cells.interval(here[0] - here[1], recomputed_cells.ratio(kept["LMF without jWAE"]))
        np.testing.assert_allclose(found, (contrast.estimate, contrast.low, contrast.high), atol=1e-6)
