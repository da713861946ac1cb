"""Linearity of latents: probes, paths and ranks on planted latents, and the written rule on a small study."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_experiments import folded

from experiments import latent_linearity as experiment
from experiments.experiment import Options, Run
from experiments.latent_linearity import measure, paths, principal, probe, rank_needed, sparsity
from mmfusion.data.folds import targets
from mmfusion.dataset import Fold


def planted(latents: list[torch.Tensor], head=lambda given: sum(given.values())[..., :1]):
    """A model whose latents are given, and whose head is a function of them."""
    names = ["a", "b"][: len(latents)]
    return SimpleNamespace(modalities=names, latents=lambda _: latents, head=lambda given: (head(given), None))


def parts(n: int) -> Fold:
    rows = torch.arange(n)
    return Fold(rows[: n // 2], rows[n // 2 : 3 * n // 4], rows[3 * n // 4 :])


def test_paths_of_gaussian_latents_have_no_excess_and_those_between_clusters_or_through_a_shell_have():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 6, generator=generator)
    shell = 5 * z[:, :3] / z[:, :3].norm(dim=1, keepdim=True) + 0.1 * z[:, 3:]
    clusters = z.clone()
    clusters[:, 0] += 20 * torch.randint(2, (2000,), generator=generator)
    latents = {"gaussian": z @ torch.randn(6, 6, generator=generator), "shell": shell, "clusters": clusters}
    of = {name: paths(planted([x]), {}, parts(2000))["excess"] for name, x in latents.items()}
    assert abs(of["gaussian"]) < 0.05
    assert of["shell"] > 0.2 and of["clusters"] > 0.2


def test_sparsity_half_way_between_gaussian_points_is_below_their_ends():
    rng = np.random.default_rng(0)
    assert sparsity(rng.normal(size=(1000, 4)), rng.normal(size=(300, 4)), rng.normal(size=(300, 4))) < -0.1


def test_principal_components_are_white_on_their_rows_and_lead():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 9)) * np.array([9, 8, 7, 6, 0.1, 0.1, 0.1, 0.1, 0.1]) + 3
    found = principal(z, np.arange(200))
    assert found.shape == (400, 4)
    np.testing.assert_allclose(np.cov(found[:200].T), np.eye(4), atol=1e-9)
    cross = np.corrcoef(np.concatenate([found, z[:, 4:]], 1).T)[:4, 4:]
    assert np.abs(cross).max() < 0.3  # hardly anything of the small ones
    assert principal(z[:, :1] * np.ones((1, 9)), np.arange(200)).shape == (400, 1)


def test_monotone_paths_are_all_of_a_linear_head_and_few_of_a_product():
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(400, 2, generator=generator) for _ in range(2)]
    assert paths(planted(latents), {}, parts(400))["monotone"] == 1
    product = paths(planted(latents, lambda given: (given["a"] * given["b"])[..., :1]), {}, parts(400))["monotone"]
    # a parabola with its vertex within the path or not: neither all nor none
    assert 0.2 < product < 0.8


@pytest.mark.parametrize("kind", ["linear", "product"])
def test_rbf_probe_gains_where_the_target_is_a_product_of_latents_and_not_where_it_is_their_sum(kind):
    generator = torch.Generator().manual_seed(0)
    data = folded(examples=600)
    latents = [torch.randn(600, 2, generator=generator) for _ in range(2)]
    signal = (latents[0] + latents[1] if kind == "linear" else latents[0] * latents[1])[:, 0]
    data.pool.target.copy_((signal > 0).float())
    fold, right = data.folds[0], {}
    for kernel in ("linear", "rbf"):
        said = probe(data, planted(latents), fold, kernel)
        right[kernel] = ((said > 0) == (targets(data) == 1)).mean()
    if kind == "linear":
        assert right["linear"] > 0.9 and abs(right["rbf"] - right["linear"]) < 0.06
    else:
        assert right["linear"] < 0.65 and right["rbf"] > 0.8


def test_rank_needed_is_the_smallest_within_a_hundredth_of_the_largest():
    data = folded(folds=4, examples=160)
    one = np.ones((1, len(data.test_rows)))
    values = {1: 0.5 * one, 2: 0.795 * one, 8: 0.9 * one, 32: 0.8 * one}
    assert rank_needed(data, values).tolist() == [[2.0] * 4]
    assert rank_needed(data, {1: one, 32: 0.5 * one}).tolist() == [[1.0] * 4]
    assert rank_needed(data, {1: 0 * one, 32: one}).tolist() == [[32.0] * 4]


@pytest.mark.parametrize("holds", [True, False])
def test_small_study_ends_in_the_rule_of_four(tmp_path, monkeypatch, holds):
    monkeypatch.setattr(experiment, "LEAST_ENFORCED", 0.0 if holds else 1.1)
    monkeypatch.setattr(experiment, "verdict_of_rank", lambda grid, label, verdict: (verdict, ""))
    monkeypatch.setattr(experiment, "STRENGTHS", (1.0,))
    data = folded(folds=2, examples=160)
    run = Run(Options(seeds=1, epochs=1, hidden_dim=6, cross_validate=2), tmp_path, torch.device("cpu"))
    outcome = measure(data, run)
    deciding = [c for c in outcome.contrasts if c.decides]
    assert [c.name.split(":")[0] for c in deciding] == ["rank", "probes", "paths", "monotone"]
    assert {c.route for c in deciding} == {"linear"} and all(len(c.fold_values) == 2 for c in outcome.contrasts)
    weakest = min((c.verdict for c in deciding), key=["not supported", "cannot tell", "supported"].index)
    assert outcome.verdict == (weakest if holds else "not identified")
    json.dumps(outcome.numbers, allow_nan=False)
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))


def test_contrasts_point_as_the_claim_does():
    data = folded(folds=4, examples=160)
    one, folds = np.ones((1, len(data.test_rows))), np.ones((1, 4))

    def grid(rows: dict[str, float]):
        settings = [SimpleNamespace(label=label) for label in rows]
        return SimpleNamespace(settings=settings, outcome=lambda _: np.stack([score * one for score in rows.values()]))

    uncertain = {
        "noise alone, rank 1": 0.7,
        "noise alone, rank 8": 0.9,
        "enforced, rank 1": 0.85,
        "enforced, rank 8": 0.9,
    }
    grids = {"none": grid({"off, rank 1": 0.6, "off, rank 8": 0.9}), "dimension": grid(uncertain)}
    plain = experiment.Linearity(0.6 * one, 0.8 * one, 0.3 * folds, 0.5 * folds)
    enforced = experiment.Linearity(0.7 * one, 0.75 * one, 0.1 * folds, 0.9 * folds)
    named, effects = experiment.differences(data, grids, {"off": plain, "noise alone": plain, "enforced": enforced})
    means = [difference.values.mean() for difference in named.values() if difference.decides]
    assert means == pytest.approx([0.25, 0.15, 0.2, 0.4])
    assert set(effects) == set(named)
