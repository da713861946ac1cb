"""Rank factors: matching, what is identified, planted recovery, probes, and the whole experiment on small studies."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.experiment import Options, Run
from experiments.rank_semantics.components import over_pairs, parts_of, per_seed, pseudovalues, stability
from experiments.rank_semantics.lexicon import (
    NEGATIVE,
    POSITIVE,
    correlation_ratio,
    partial_association,
    polarity,
    probe,
    probes_of,
    unit_columns,
    words,
)
from experiments.rank_semantics.measure import ONE, STABLE, TELLS, measure
from experiments.rank_semantics.planted_factors import fit, plant, recovery
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.metrics.verdicts import Verdict
from mmfusion.models.fusion import FusionModel
from mmfusion.models.identifiability import (
    kruskal_condition,
    match,
    matched_correlation,
    mix_ranks,
    refit_perturbed,
    similarity,
)
from mmfusion.training.trainer import Schedule


def random_layer(dims, rank=4, output_dim=1, seed=0):
    layer = LowRankMultimodalFusion(dims, output_dim, rank).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def small_study(modalities, outputs=None, examples=90, metadata=True):
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(examples, 5, generator=generator) for name in modalities}
    target = torch.randn(examples, outputs, generator=generator) if outputs else (features["a"][:, 0] > 0).float()
    texts = ["a good film", "bad", "it is what it is", "awful awful plot", "so much fun and great"]
    columns = {
        "transcript": [texts[i % 5] for i in range(examples)],
        "speaker": [f"s{i * 7 % 11 % 4}" for i in range(examples)],
    }
    pool = Split(features, target, [str(i) for i in range(examples)], columns if metadata else {})
    rows = torch.arange(examples)
    folds = [Fold(rows[:50], rows[50:60], rows[60:]), Fold(rows[40:], rows[30:40], rows[:30])]
    return FoldedDataset("small", "regression" if outputs else "binary", pool, folds, [], {})


def test_matching_recovers_a_permuted_and_sign_flipped_set_exactly():
    generator = torch.Generator().manual_seed(0)
    planted = [torch.randn(5, 7, generator=generator) for _ in range(3)]
    order = torch.tensor([3, 0, 4, 1, 2])
    estimated = [-2.5 * planted[0][order], planted[1][order], -planted[2][order]]
    columns, mean = match(similarity(estimated, planted))
    assert columns.tolist() == order.tolist()
    assert mean == pytest.approx(1)


def test_canonical_factors_recover_what_raw_factors_of_two_modalities_do_not():
    seeds = [0, 1]
    problems = [plant(2, seed, examples=1500) for seed in seeds]
    layers = fit(problems, seeds, Schedule(epochs=25, batch_size=50, learning_rate=1e-2, keep="last"), held_out=300)
    found = recovery(problems, layers, held_out=300)
    assert found.r2.min() > 0.95
    assert found.canonical.min() > 0.95
    assert found.raw.mean() < found.canonical.mean() - 0.1
    assert found.null < found.null95 < 0.5


def test_signal_of_a_planted_problem_is_the_sum_of_its_terms_and_has_unit_variance():
    for modalities in (2, 3):
        problem = plant(modalities, 3, examples=40_000)
        products = torch.stack([z @ a.T for z, a in zip(problem.latents, problem.directions, strict=True)]).prod(0)
        weights = torch.linalg.lstsq(products, problem.signal[:, None]).solution[:, 0]
        torch.testing.assert_close(weights / weights[2], torch.tensor([3.0, 2.0, 1.0]), rtol=1e-3, atol=1e-3)
        assert problem.signal.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("outputs", [1, 3])
def test_mixed_ranks_are_the_same_function_with_other_terms(outputs):
    layer = random_layer([6, 5], output_dim=outputs)
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(50, d, generator=generator, dtype=torch.float64) for d in (6, 5)]
    g = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    other = mix_ranks(layer, g)
    torch.testing.assert_close(other(latents), layer(latents), rtol=1e-10, atol=1e-10)
    assert (other.rank_terms(latents) - layer.rank_terms(latents)).abs().max() > 0.1


def test_mixing_refuses_three_modalities():
    with pytest.raises(ValueError, match="two modalities"):
        mix_ranks(random_layer([3, 3, 3]), torch.eye(4, dtype=torch.float64))


def test_a_refit_finds_the_same_terms_where_they_are_unique_and_others_where_not():
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(400, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    for dims, unique in ((3, True), (2, False)):
        layer = random_layer([4] * dims, rank=2)
        after, before = refit_perturbed(layer, latents[:dims], generator)
        assert (after.sum(-1) - before.sum(-1)).abs().max() < 1e-4 * before.sum(-1).std()
        same = matched_correlation(unit_columns(after[:, None].numpy()), unit_columns(before[:, None].numpy()))
        assert (same > 0.999) == unique


def test_kruskal_condition_holds_for_random_factors_and_fails_for_repeated_ones():
    layer = random_layer([6, 6, 6])
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    smallest, holds = kruskal_condition(layer, latents)
    assert holds and smallest > 1e-3
    with torch.no_grad():  # two modalities in which ranks 0 and 1 are multiples of each other
        for projection in layer.projections[:2]:
            projection.weight[1], projection.bias[1] = 2 * projection.weight[0], 2 * projection.bias[0]
    smallest, holds = kruskal_condition(layer, latents)
    assert not holds and smallest < 1e-6
    assert not kruskal_condition(random_layer([6, 6]), latents[:2])[1]  # two modalities never have it


@pytest.mark.parametrize("outputs", [None, 3])
def test_components_and_the_rest_sum_to_the_prediction(outputs):
    for modalities in ("ab", "abc"):
        data = small_study(modalities, outputs)
        torch.manual_seed(0)
        model = FusionModel(data.input_dims, 4, 4, 4, data.output_dim).double()
        if outputs:
            model.rescale.fit(data.pool.target)
        features = {name: x.double() for name, x in data.pool.features.items()}
        rows = data.folds[0]
        parts = parts_of(model, features, rows)
        scale = model.rescale.std.numpy()
        with torch.no_grad():
            latents = model.latents(features)
            layer = deepcopy(model.fusion)
            if len(modalities) == 2:  # what is constant or linear in one latent is the rest
                means = [z[rows.train].mean(0) for z in latents]
                for projection, mean in zip(layer.projections, means, strict=True):
                    projection.bias += projection.weight @ mean.squeeze()
                split = layer.subset_terms([z - mean for z, mean in zip(latents, means, strict=True)])
                rest = sum(term for subset, term in split.items() if len(subset) < 2)[rows.test]
            else:
                rest = layer.bias.detach().expand(len(rows.test), -1)
        whole = (parts.components.sum(-1) + rest.numpy() * scale) + model.rescale.mean.numpy()
        np.testing.assert_allclose(whole, parts.prediction, atol=1e-10)


def test_stability_is_one_for_permuted_components_and_low_for_unrelated_ones():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2, 4))
    members = [[x], [-3 * x[..., [2, 0, 3, 1]]], [rng.normal(size=(300, 2, 4))]]
    own, null = stability(members)
    assert own.shape == null.shape == (1, 3, 3)
    assert own[0, 0, 1] == pytest.approx(1)
    assert own[0, 0, 2] < 0.2 and null.max() < 0.2
    assert (own == own.mT).all() and (np.diag(own[0]) == 0).all()


def test_pseudovalues_are_the_jackknife_of_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    pairs = np.triu(rng.random((6, 6)), 1)
    pairs = pairs + pairs.T
    mean = pairs[np.triu_indices(6, 1)].mean()

    def without(s):
        kept = np.delete(np.delete(pairs, s, 0), s, 1)
        return kept[np.triu_indices(5, 1)].mean()

    expected = [6 * mean - 5 * without(s) for s in range(6)]
    np.testing.assert_allclose(pseudovalues(pairs), expected)
    assert per_seed(pairs).mean() == pytest.approx(mean)
    np.testing.assert_allclose(over_pairs(pairs[None]), expected)
    np.testing.assert_allclose(over_pairs(np.stack([pairs, 0 * pairs])), [[mean, 0]])
    assert over_pairs(pairs[None, :2, :2]) is None


@pytest.mark.parametrize("shared", [True, False])
def test_a_probe_is_told_by_one_component_where_starts_share_it_and_not_where_each_has_its_own(shared):
    rng = np.random.default_rng(0)
    values = rng.normal(size=600)
    components, predictions = [], []
    for s in range(3):
        # each start tells a sixth of the probe's variance; where not shared, with noise of its own
        noise = np.random.default_rng(1 if shared else 2 + s).normal(size=600)
        x = rng.normal(size=(600, 1, 4))
        x[:, 0, s] = values + 2.2 * noise
        components.append([x])
        predictions.append([rng.normal(size=(600, 1))])
    one = probe(components, predictions, [values])
    assert one.partial_association.shape == one.null.shape == (3, 1) and one.p < 0.02
    assert (one.partial_association - one.null > 0.2).all()
    alike = per_seed(one.same - one.same_null)
    assert (alike > 0.9).all() if shared else (alike < 0.3).all()


def test_polarity_counts_positive_minus_negative_words():
    assert polarity("I LOVED it, a great film!") == 2
    assert polarity("boring, predictable and bad; one good joke") == -2
    assert polarity("it's a film") == 0
    assert polarity("goodness, the badge") == 0  # whole words
    assert words("It's OK, isn't it?") == ["it's", "ok", "isn't", "it"]
    assert not POSITIVE & NEGATIVE


def test_correlation_ratio_of_a_hand_made_case():
    x = np.array([1.0, 3.0, 5.0, 7.0])  # groups (1, 3) and (5, 7): between 4 * 4 = 16, total 20
    assert correlation_ratio(x, np.array([0, 0, 1, 1])) == pytest.approx((16 / 20) ** 0.5)
    assert correlation_ratio(x, np.array([0, 0, 0, 0])) == pytest.approx(0)
    assert correlation_ratio(np.ones(4), np.array([0, 0, 1, 1])) == 0


def test_a_probe_that_the_prediction_tells_is_not_told_beyond_it():
    rng = np.random.default_rng(0)
    prediction, other = rng.normal(size=(500, 1)), rng.normal(size=500)
    components = np.stack([prediction[:, 0], prediction[:, 0] + other], -1)[:, None]  # (n, 1, 2)
    through = partial_association(components, prediction, prediction[:, 0] + 0.1 * rng.normal(size=500))
    beyond = partial_association(components, prediction, prediction[:, 0] + other)
    assert through.max() < 0.15
    assert beyond[0, 0] == 0 and beyond[0, 1] == pytest.approx(1)


def test_absent_columns_are_noted():
    probes, notes = probes_of(small_study("ab", metadata=False))
    assert probes == {} and len(notes) == 2


@pytest.mark.parametrize("modalities, outputs", [("ab", None), ("abc", None), ("ab", 2)])
def test_whole_experiment_ends_in_a_verdict_and_json_numbers(tmp_path: Path, modalities, outputs):
    run = Run(Options(dataset="cmu_mosi", seeds=1, epochs=2), tmp_path, torch.device("cpu"))
    outcome = measure(small_study(modalities, outputs), run)
    assert outcome.verdict in Verdict.__args__
    json.dumps(outcome.numbers, allow_nan=False)
    names = ("polarity", "length", "speaker")
    deciding = {text.format(name) for name in names for text in (TELLS, ONE)}
    assert {c.name for c in outcome.contrasts if c.decides} == deciding
    assert {c.route for c in outcome.contrasts if c.decides} == set(names)
    of = {c.name: c for c in outcome.contrasts}
    assert len(of[STABLE].fold_values) == 2 and not of[STABLE].decides
    assert 0 <= np.mean(outcome.numbers["other terms"]["matched correlation"]) <= 1
    assert outcome.answer.count("\n") == 0 and "component" in outcome.table


def test_without_probes_nothing_is_identified(tmp_path: Path):
    run = Run(Options(dataset="cmu_mosi", seeds=3, epochs=2), tmp_path, torch.device("cpu"))
    outcome = measure(small_study("ab", metadata=False), run)
    assert outcome.verdict == "not identified"
    assert any("transcripts" in note for note in outcome.notes)
