"""Shares of variance against layers made by hand, hidden modalities without influence, whole runs in small."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from experiments.experiment import Options, Run
from experiments.modality_balance import (
    BALANCE,
    EXPERIMENT,
    OVER_SINGLE,
    TERMS,
    best_single,
    chance_score,
    rank_correlations,
    verdict_of,
)
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.metrics.verdicts import Difference, corrected_contrasts
from mmfusion.models.decomposition import contributions, imbalance, variance_shares
from mmfusion.models.fusion import FusionModel
from mmfusion.training.grid import JWAE, Recipe, Setting, outputs_of, train_grid

VERDICTS = ("supported", "not supported", "cannot tell", "not identified")
EXAMPLES = 90


def small_study(names=("audio", "text"), outputs=None, folds=1, seed=0):
    """A random study: binary, or a regression of that many outputs; the target depends on the first modality."""
    rng = np.random.default_rng(seed)
    features = {name: torch.from_numpy(rng.normal(size=(EXAMPLES, 5 + m))).float() for m, name in enumerate(names)}
    signal = features[names[0]][:, 0] + 0.5 * torch.from_numpy(rng.normal(size=EXAMPLES)).float()
    target = (signal > 0).float() if outputs is None else torch.stack([signal * (k + 1) for k in range(outputs)], 1)
    rows = torch.arange(EXAMPLES)
    parts = [Fold(r[:48], r[48:64], r[64:]) for r in (rows.roll(13 * f) for f in range(folds))]
    pool = Split(features, target, [str(i) for i in range(EXAMPLES)])
    return FoldedDataset("small", "binary" if outputs is None else "regression", pool, parts, [], {})


def contrast(name, verdict):
    (made,) = corrected_contrasts({name: Difference(np.arange(9.0), name)}, 0.01)
    return replace(made, verdict=verdict)


# ---- contributions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("widths", [(3, 4), (3, 4, 2)])
def test_shares_and_contributions_sum_to_one_and_do_not_depend_on_the_origin(widths, outputs):
    torch.manual_seed(0)
    layer = LowRankMultimodalFusion(widths, outputs, rank=3)
    latents = [torch.randn(200, d) for d in widths]
    before = deepcopy(layer.state_dict())
    shares = variance_shares(layer, latents)
    assert len(shares) == 2 ** len(widths) - 1
    assert sum(shares.values()) == pytest.approx(1)
    assert contributions(shares, len(widths)).sum() == pytest.approx(1)
    # the same function of latents shifted by 2: z - 2 enters, bias rows c + 2 A 1
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for projection in layer.projections:
        projection.bias.data += 2 * projection.weight.data.sum(1)
    shifted = variance_shares(layer, [z - 2 for z in latents])
    assert shifted == pytest.approx(shares, abs=1e-5)


def test_shares_of_a_layer_made_by_hand():
    # y = (z_1 + 2)(z_2 + 3) with z_1, z_2 = +-1 in all four combinations: 3 z_1 + 2 z_2 + z_1 z_2 + 6
    layer = LowRankMultimodalFusion((1, 1), 1, rank=1)
    with torch.no_grad():
        layer.rank_weights.fill_(1)
        for projection, constant in zip(layer.projections, (2.0, 3.0), strict=True):
            projection.weight.fill_(1)
            projection.bias.fill_(constant)
    z1, z2 = torch.tensor([[1.0], [1], [-1], [-1]]), torch.tensor([[1.0], [-1], [1], [-1]])
    shares = variance_shares(layer, [z1, z2])
    assert shares == pytest.approx({(0,): 9 / 14, (1,): 4 / 14, (0, 1): 1 / 14})
    contribution = contributions(shares, 2)
    np.testing.assert_allclose(contribution, [9.5 / 14, 4.5 / 14])
    assert imbalance(contribution) == pytest.approx(2 * 9.5 / 14 - 1)


def test_shares_of_several_outputs_weigh_by_variance():
    torch.manual_seed(1)
    layer, latents = LowRankMultimodalFusion((3, 2), 2, rank=2), [torch.randn(50, 3), torch.randn(50, 2)]
    y = layer(latents).detach()
    shares = variance_shares(layer, latents)
    alone = []
    for o in range(2):
        one = LowRankMultimodalFusion((3, 2), 1, rank=2)
        with torch.no_grad():
            one.rank_weights.copy_(layer.rank_weights)
            for mine, theirs in zip(one.projections, layer.projections, strict=True):
                mine.weight.copy_(theirs.weight.unflatten(0, (2, 2))[:, o])
                mine.bias.copy_(theirs.bias.unflatten(0, (2, 2))[:, o])
        alone.append(variance_shares(one, latents))
    v = y.var(0)
    for subset, share in shares.items():
        assert share == pytest.approx(((v[0] * alone[0][subset] + v[1] * alone[1][subset]) / v.sum()).item(), abs=1e-5)


def test_contributions_are_the_shapley_values_of_the_sums_of_shares():
    names, rng = range(3), np.random.default_rng(0)
    subsets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    shares = dict(zip(subsets, rng.normal(size=7), strict=True))

    def worth(members):
        return sum(share for subset, share in shares.items() if set(subset) <= set(members))

    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for m in names:
        gains = [worth(o[: o.index(m) + 1]) - worth(o[: o.index(m)]) for o in orders]
        assert contributions(shares, 3)[m] == pytest.approx(np.mean(gains))


def test_imbalance_runs_from_equal_to_one_alone():
    cases = np.array([[1 / 3, 1 / 3, 1 / 3], [1.0, 0, 0], [1.1, -0.1, 0], [0, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_allclose(imbalance(cases), [0, 1, 1, 0, 0.25], atol=1e-12)


# ---- a hidden modality has no influence --------------------------------------------------------------------------


def test_an_always_hidden_encoder_gets_no_task_gradient_and_does_not_change_the_test_score():
    data = small_study(("audio", "text", "video"))
    torch.manual_seed(0)
    model = FusionModel(data.input_dims, 6, 8)
    present = {"video": torch.zeros(EXAMPLES)}
    logits = model(data.pool.features, present=present).prediction.squeeze(-1)
    F.binary_cross_entropy_with_logits(logits, data.pool.target).backward()
    of = {name: p.grad for name, p in model.jwae.encoders.named_parameters()}
    hidden = [grad for name, grad in of.items() if name.startswith("video")]
    assert hidden and all(grad is None or grad.abs().max() == 0 for grad in hidden)
    assert all(grad.abs().max() > 0 for name, grad in of.items() if not name.startswith("video"))
    before = outputs_of(data, [model], ["video"])
    for name, parameter in model.jwae.encoders.named_parameters():
        if name.startswith("video"):
            parameter.data.normal_()
    np.testing.assert_array_equal(outputs_of(data, [model], ["video"]), before)


def test_a_subset_member_does_not_depend_on_what_it_never_sees_unless_pairs_are_aligned():
    data = small_study(("audio", "text"))
    other = {**data.pool.features, "text": torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(1))}
    studies = (data, replace(data, pool=replace(data.pool, features=other)))
    settings = [Setting("audio", 2, TERMS, dropout={"text": 1.0}), Setting("aligned", 2, JWAE, dropout={"text": 1.0})]
    ours, theirs = (train_grid(s, settings, [0, 1], Recipe(epochs=3, batch_size=16)) for s in studies)
    without = [outputs_of(s, grid.models, ["text"]) for s, grid in zip(studies, (ours, theirs), strict=True)]
    apart = np.abs(without[0] - without[1]).reshape(2, -1).max(1)
    assert apart[0] < 1e-6 < 1e-5 < apart[1]


# ---- the experiment ----------------------------------------------------------------------------------------------


def test_best_single_is_chosen_on_dev():
    dev = {"audio": np.full((2, 4), 0.6), "text": np.full((2, 4), 0.5)}
    assert best_single(("audio", "text"), dev) == "audio"


def test_rank_correlations_are_per_seed_and_zero_where_nothing_is_ordered():
    x = np.array([[1.0, 1, 1], [2, 2, 1], [3, 3, 1]])
    y = np.array([[5.0, 3, 1], [6, 2, 2], [9, 1, 3]])
    np.testing.assert_allclose(rank_correlations(x, y), [1, -1, 0])


def test_chance_of_a_regression_is_what_the_training_mean_scores():
    data = small_study(outputs=3, folds=2)
    by_fold = []
    for fold in data.folds:
        error = (data.pool.target[fold.test] - data.pool.target[fold.train].mean(0)).abs() / data.target_scale
        by_fold.append(-error.mean().item())
    assert chance_score(data) == pytest.approx(np.mean(by_fold), abs=1e-6)
    assert chance_score(small_study()) == 0.5


def test_verdict_needs_the_balance_and_one_pair():
    single = replace(contrast(OVER_SINGLE, "not supported"), decides=False)  # has no say
    for balance, pairs, expected in (
        ("supported", ("not supported", "supported"), "supported"),
        ("supported", ("not supported", "cannot tell"), "cannot tell"),
        ("not supported", ("supported",), "not supported"),
        ("cannot tell", (), "cannot tell"),
        ("supported", (), "supported"),
    ):
        made = [contrast(BALANCE, balance), *(contrast(str(k), v) for k, v in enumerate(pairs)), single]
        assert verdict_of(made) == expected


def test_subsets_never_see_the_others_and_see_their_own_always(tmp_path, monkeypatch):
    asked = []
    grid = Run.grid
    monkeypatch.setattr(
        Run, "grid", lambda self, data, settings, title: asked.append(settings) or grid(self, data, settings, title)
    )
    EXPERIMENT.measure(small_study(), Run(Options(seeds=2, epochs=1), tmp_path, torch.device("cpu")))
    (settings,) = asked  # one training call
    dropout = {setting.label: setting.dropout for setting in settings}
    assert dropout["audio"] == {"text": 1.0} and dropout["text"] == {"audio": 1.0} and dropout["audio+text"] == {}
    assert dropout["text dropped at 0.6"] == {"text": 0.6} and len(dropout) == 3 + 4
    assert all("alignment" not in setting.terms for setting in settings)


@pytest.mark.parametrize(
    ("names", "outputs", "folds"), [(("audio", "text", "video"), None, 1), (("image", "text"), 3, 2)]
)
def test_a_small_study_ends_in_a_verdict(tmp_path, names, outputs, folds):
    data = small_study(names, outputs, folds)
    outcome = EXPERIMENT.measure(data, Run(Options(seeds=2, epochs=2), tmp_path, torch.device("cpu")))
    assert outcome.verdict in VERDICTS
    assert [c.name for c in outcome.contrasts][:: len(outcome.contrasts) - 1] == [BALANCE, OVER_SINGLE]
    assert len(outcome.contrasts) == (5 if len(names) == 3 else 2)
    numbers = json.loads(json.dumps(outcome.numbers, allow_nan=False))
    assert len(numbers["subsets"]) == 2 ** len(names) - 1
    assert len(numbers["settings of all modalities"]) == 1 + 2 * len(names)
    for found in numbers["settings of all modalities"].values():
        np.testing.assert_allclose(np.sum(list(found["share of variance"].values()), 0), 1)
        np.testing.assert_allclose(np.max(list(found["drop without"].values()), 0), found["worst drop"])
    assert any("two modalities" in note for note in outcome.notes) == (len(names) == 2)
    assert all(text in outcome.table for text in numbers["subsets"])
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))
