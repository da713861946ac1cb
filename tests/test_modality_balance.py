"""Shares of variance against layers made by hand, hidden modalities without influence, whole runs in small."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from experiments.experiment import Options, Run, contrasts_on_test
from experiments.modality_balance import (
    EXPERIMENT,
    LEAST_RANGE,
    Balance,
    differences,
    measure_balance,
    reliabilities,
    slopes,
    verdict_of_dial,
    with_reliability,
)
from experiments.modality_subsets import TERMS, chosen, label, on_dev, subset_scores, subset_settings
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.metrics.verdicts import verdict_of
from mmfusion.models.decomposition import contributions, imbalance, variance_shares
from mmfusion.models.fusion import FusionModel
from mmfusion.training.grid import JWAE, Recipe, Setting, by_fold, outputs_of, train_grid

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


def test_best_and_worst_are_chosen_on_each_folds_own_dev_part():
    dev = {"audio": np.array([[0.6, 0.5], [0.7, 0.4]]), "text": np.array([[0.5, 0.6], [0.6, 0.6]])}
    test = {"audio": np.array([[1.0, 2.0], [3.0, 4.0]]), "text": np.array([[5.0, 6.0], [7.0, 8.0]])}
    np.testing.assert_array_equal(chosen(test, ["audio", "text"], on_dev(dev, ["audio", "text"])), [[1, 6], [3, 8]])
    worst = on_dev(dev, ["audio", "text"], best=False)
    np.testing.assert_array_equal(chosen(test, ["audio", "text"], worst), [[5, 2], [7, 4]])


def test_slopes_are_those_of_least_squares_and_zero_where_nothing_varies():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7, 2, 3))
    found = slopes(x, y)
    for s, f in np.ndindex(2, 3):
        assert found[s, f] == pytest.approx(np.polyfit(x[:, s, f], y[:, s, f], 1)[0])
    assert found.shape == (2, 3) and (slopes(np.ones((4, 1, 2)), rng.normal(size=(4, 1, 2))) == 0).all()


def test_every_direction_keeps_the_share_of_signal_and_the_shares_sum_to_one():
    for turn in (0.0, 0.3, 0.9):
        assert sum(reliabilities("abc", "b", turn).values()) == pytest.approx(1)
    assert reliabilities("abc", "b", 0.0)["a"] == reliabilities("abc", "b", 0.0)["b"]
    assert reliabilities("ab", "b", 1.0) == {"a": 0.0, "b": 1.0}
    data = small_study()
    many = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 6)) + 3
    data = replace(data, pool=replace(data.pool, features={"audio": many, "text": many}))
    made = with_reliability(data, {"audio": 0.25, "text": 1.0}).pool.features
    torch.testing.assert_close(made["text"], many)
    torch.testing.assert_close(made["audio"].mean(0), many.mean(0), atol=1e-3, rtol=1e-3)
    for k in range(5):
        r = np.corrcoef(made["audio"][:, k], many[:, k])[0, 1]
        assert r**2 == pytest.approx(0.25, abs=0.05) and made["audio"][:, k].std() == pytest.approx(k + 1, rel=0.05)


def made_balance(slope, rise=0.0, folds=5, settings=7):
    """Imbalance from 0 to .6, worst drops that rise with it by that slope, complete scores that rise by `rise`."""
    rng = np.random.default_rng(0)
    shape = (settings, 1, folds)
    x = np.linspace(0, 0.6, settings)[:, None, None] + 0.01 * rng.normal(size=shape)
    drop = 0.3 + slope * x + 0.001 * rng.normal(size=shape)
    complete = 0.8 + rise * x + 0.001 * rng.normal(size=shape)
    share = {(0,): (1 + x) / 2, (1,): (1 - x) / 2, (0, 1): np.zeros(shape)}
    both = ("auroc", "log_loss")
    drops = np.stack([drop, 0 * drop], -1)
    return Balance([str(k) for k in range(settings)], share, dict.fromkeys(both, complete), dict.fromkeys(both, drops))


def made_scores(balance, apart=0.0):
    """Scores of one modality, and of pairs of three: the first of each is that much better, on dev and test."""
    rng = np.random.default_rng(1)
    texts = ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]
    shape = balance.imbalance.shape[1:]
    of = {text: 0.7 + apart * (text == "a+b") + 0.002 * rng.normal(size=shape) for text in texts}
    return {part: {"auroc": of, "log_loss": of} for part in ("dev", "test")}


@pytest.mark.parametrize(
    ("slope", "rise", "apart", "wanted"),
    [
        (0.3, 0.0, 0.1, "supported"),
        (0.3, 0.2, 0.1, "supported"),
        (0.3, 0.4, 0.1, "not supported"),  # there is more to lose, and more is left
        (-0.1, -0.4, 0.1, "not supported"),  # less is left of less
        (-0.3, 0.0, 0.1, "not supported"),
        (0.0, 0.0, 0.1, "not supported"),
        (0.3, 0.0, 0.0, "not supported"),  # no pair is better
    ],
)
def test_verdict_needs_the_drop_what_it_leaves_and_a_better_pair(slope, rise, apart, wanted):
    data = small_study(folds=5)
    balance = made_balance(slope, rise)
    named, effects = differences(("a", "b", "c"), balance, made_scores(balance, apart))
    contrasts = contrasts_on_test(data, named, effects)
    assert verdict_of(contrasts) == wanted
    assert {c.route for c in contrasts if c.decides} == {"AUROC", "log loss"}
    estimates = {c.name: c.estimate for c in contrasts}
    assert estimates["AUROC: worst drop over imbalance"] == pytest.approx(slope, abs=0.01)
    assert estimates["AUROC: score left, fall over imbalance"] == pytest.approx(slope - rise, abs=0.01)


def test_two_modalities_have_no_pairs_to_compare_and_a_dial_that_does_not_turn_no_verdict():
    balance = made_balance(0.3)
    scores = {part: {"auroc": {"a": x, "b": x, "a+b": x}} for part in ("dev", "test") for x in [np.zeros((1, 5))]}
    named, _ = differences(("a", "b"), replace(balance, complete={"auroc": balance.complete["auroc"]}), scores)
    assert not any("pair" in name for name in named) and sum(one.decides for one in named.values()) == 2
    assert verdict_of_dial(balance, "supported")[0] == "supported"
    still = replace(balance, shares={subset: x[:1].repeat(7, 0) for subset, x in balance.shares.items()})
    assert still.imbalance.std(0).mean() < LEAST_RANGE and verdict_of_dial(still, "supported")[0] == "not identified"


def test_balance_of_trained_members_is_by_fold_and_drops_are_what_each_fold_loses():
    data = small_study(folds=2)
    grid = train_grid(data, [Setting("all", 4, TERMS, dropout={})], [0, 1], Recipe(epochs=2, batch_size=16))
    balance = measure_balance(grid, 0)
    assert balance.imbalance.shape == (1, 2, 2)
    np.testing.assert_allclose(sum(balance.shares.values()), 1)
    model, fold = grid.model(0, 1, 1), data.folds[1]
    latents = model.latents({name: x[fold.test] for name, x in data.pool.features.items()})
    for subset, share in variance_shares(model.fusion, latents).items():
        assert balance.shares[subset][0, 1, 1] == pytest.approx(share)
    complete = by_fold(data, grid.outcome("auroc"))[0]
    missing = outputs_of(data, [model], ["text"])[0][fold.test.numpy()]
    lost = complete[1, 1] - roc_auc_score(data.pool.target[fold.test], missing)
    assert balance.drops["auroc"][0, 1, 1, 1] == pytest.approx(lost)


def test_subsets_never_see_the_others_and_see_their_own_always():
    subsets = {label(one): one for one in (("audio",), ("audio", "text"))}
    alone, both = subset_settings(("audio", "text"), subsets)
    assert alone.dropout == {"text": 1.0} and both.dropout == {}
    assert all("alignment" not in setting.terms for setting in (alone, both))
    data = small_study(folds=2)
    grid = train_grid(data, [alone, both], [0], Recipe(epochs=1, batch_size=16))
    scores = subset_scores(grid, subsets, "dev")["auroc"]
    fold = data.folds[1]
    hidden = outputs_of(data, [grid.model(0, 0, 1)], ["text"])[0][fold.dev.numpy()]
    assert scores["audio"][0, 1] == pytest.approx(roc_auc_score(data.pool.target[fold.dev], hidden))
    np.testing.assert_allclose(scores["audio+text"], by_fold(data, grid.outcome("auroc", "dev"), "dev")[1])


@pytest.mark.parametrize(
    ("names", "outputs", "folds", "seeds"), [(("audio", "text", "video"), None, 3, 1), (("image", "text"), 3, 2, 2)]
)
def test_a_small_study_ends_in_a_verdict(tmp_path, names, outputs, folds, seeds):
    data = small_study(names, outputs, folds)
    outcome = EXPERIMENT.measure(data, Run(Options(seeds=seeds, epochs=2), tmp_path, torch.device("cpu")))
    assert outcome.verdict in VERDICTS
    assert len(outcome.contrasts) == (10 if len(names) == 3 else 8)
    numbers = json.loads(json.dumps(outcome.numbers, allow_nan=False))
    word = "AUROC" if outputs is None else "MAE / std"
    assert len(numbers["subsets"]["test"][word]) == 2 ** len(names) - 1
    assert len(numbers["settings of all modalities"]) == 1 + 3 * len(names)
    for found in numbers["settings of all modalities"].values():
        np.testing.assert_allclose(np.sum(list(found["share of variance"].values()), 0), 1)
        np.testing.assert_allclose(np.max(list(found["drop without"][word].values()), 0), found["worst drop"][word])
    assert any("two modalities" in note for note in outcome.notes) == (len(names) == 2)
    assert all(text in outcome.table for text in numbers["subsets"]["test"][word])
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))
