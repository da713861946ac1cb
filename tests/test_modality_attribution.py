"""Closed forms against their definitions: EMAP, Shapley values, relevance."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from lmf_module import LowRankMultimodalFusion
from mmfusion.dataset import Split
from mmfusion.explain.account import exact_layer, latents_of
from mmfusion.explain.summary import summarise, summary_rows
from mmfusion.models.decomposition import (
    emap,
    interventional_values,
    recentred_parts,
    relevance_scores,
    shapley_values,
    values_by_definition,
    variance_shares,
)
from mmfusion.models.fusion import FusionEnsemble

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}

shapes = st.tuples(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),  # widths
    st.integers(1, 3),  # outputs
    st.integers(1, 4),  # rank
    st.integers(2, 5),  # examples
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 1000),  # seed
)


def drawn(shape) -> tuple[LowRankMultimodalFusion, list[torch.Tensor]]:
    """A layer in general position, and latents far from centred."""
    widths, outputs, rank, n, dtype, seed = shape
    torch.manual_seed(seed)
    layer = LowRankMultimodalFusion(widths, outputs, rank).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():  # as initialised, ranks of width 1 may cancel
            parameter.normal_(std=0.5)
    return layer, [torch.randn(n, d, dtype=dtype) * 0.5 + 0.3 for d in widths]


def close(actual, expected, dtype, addends=()):
    """Equal to 1e-6 or 1e-10 of the largest number that was added up on the way, or of 1."""
    largest = max([1.0, *(x.abs().max().item() for x in addends)])
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * largest)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes)
def test_closed_form_is_the_average_over_all_values_of_the_others(shape):
    layer, latents = drawn(shape)
    with torch.no_grad():
        expected = values_by_definition(layer, latents)
    actual = interventional_values(layer, latents)
    assert set(actual) == set(expected)
    for known in expected:
        close(actual[known], expected[known], shape[4], recentred_parts(layer, latents).values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes)
def test_recentred_parts_any_origin_sum_to_the_output(shape):
    layer, latents = drawn(shape)
    means = [torch.randn(z.shape[1], dtype=z.dtype) for z in latents]
    bias = layer.projections[0].bias.detach().clone()
    parts = recentred_parts(layer, latents, means)
    close(sum(parts.values()), layer(latents).detach(), shape[4], parts.values())
    close(parts[()][0], layer(means).detach(), shape[4], parts.values())
    assert torch.equal(layer.projections[0].bias, bias)  # the layer itself is not moved


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes)
def test_emap_of_two_modalities_is_hessel_and_lees(shape):
    widths = (*shape[0], 2, 3)[:2]
    layer, (a, b) = drawn((widths, *shape[1:]))
    n = len(a)
    with torch.no_grad():  # their Algorithm 1: all N^2 pairings, then row means + column means - grand mean
        table = layer([a.unsqueeze(1).expand(n, n, -1), b.unsqueeze(0).expand(n, n, -1)])  # (n, n, O)
    expected = table.mean(1) + table.mean(0) - table.mean((0, 1))
    close(emap(interventional_values(layer, [a, b])), expected, shape[4], [table])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes)
def test_shapley_values_are_efficient_and_split_each_part_evenly(shape):
    layer, latents = drawn(shape)
    values = interventional_values(layer, latents)
    phi = shapley_values(values)
    everyone = max(values, key=len)
    close(phi.sum(-1), values[everyone] - values[()], shape[4], values.values())
    parts = recentred_parts(layer, latents)
    for m in range(len(latents)):
        close(phi[..., m], sum(part / len(s) for s, part in parts.items() if m in s), shape[4], values.values())


def test_shapley_values_are_the_mean_over_all_orders():
    torch.manual_seed(0)
    layer, latents = drawn(([2, 3, 2], 1, 3, 6, torch.float64, 0))
    values = interventional_values(layer, latents)
    phi = torch.zeros(6, 1, 3, dtype=torch.float64)
    orders = list(itertools.permutations(range(3)))
    for order in orders:
        for place, m in enumerate(order):
            before, after = (tuple(sorted(order[:end])) for end in (place, place + 1))
            phi[..., m] += (values[after] - values[before]) / len(orders)
    torch.testing.assert_close(shapley_values(values), phi)


def test_emap_is_the_best_additive_fit_over_all_pairings():
    layer, (a, b) = drawn(([3, 2], 1, 3, 5, torch.float64, 1))
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    with torch.no_grad():
        y = layer([a[i], b[j]])
    design = torch.cat([torch.eye(5)[i], torch.eye(5)[j]], 1).double()  # one effect for each value of each modality
    fitted = design @ torch.linalg.lstsq(design, y, driver="gelsd").solution
    torch.testing.assert_close(emap(interventional_values(layer, [a, b])), fitted[i == j])


def test_additive_model_is_its_own_emap():
    layer, latents = drawn(([3, 2, 2], 1, 1, 7, torch.float64, 2))
    with torch.no_grad():
        layer.projections[0].weight.zero_()
        layer.projections[1].weight.zero_()
    torch.testing.assert_close(emap(interventional_values(layer, latents)), layer(latents).detach())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes)
def test_relevance_is_the_weight_norm_on_explicit_normalised_blocks(shape):
    layer, latents = drawn((*shape[:4], torch.float64, shape[5]))
    scores = relevance_scores(layer, latents)
    centred = [z - z.mean(0) for z in latents]
    parts = recentred_parts(layer, latents)
    expected = {}
    for subset in parts:
        if subset:
            phi = centred[subset[0]]
            for m in subset[1:]:
                phi = torch.einsum("ni,nj->nij", phi, centred[m]).flatten(1)
            scale = (phi - phi.mean(0)).square().sum(1).mean().sqrt()
            # the weights on the block, read off the layer at unit vectors
            units = [torch.cat([torch.zeros(1, z.shape[1]), torch.eye(z.shape[1])]).double() for z in latents]
            total = 0.0
            for index in itertools.product(*(range(1, latents[m].shape[1] + 1) for m in subset)):
                at = [z.mean(0, keepdim=True) for z in latents]
                for m, k in zip(subset, index, strict=True):
                    at[m] = at[m] + units[m][k]
                total += recentred_parts(layer, at, [z.mean(0) for z in latents])[subset].square().sum().item()
            expected[subset] = (total**0.5) * scale.item()
    whole = sum(expected.values())
    for subset, value in expected.items():
        assert scores[subset] == pytest.approx(value / whole, abs=1e-7)  # a square root of a difference of squares


def test_relevance_does_not_change_when_scale_moves_between_latent_and_factor():
    layer, latents = drawn(([3, 4], 2, 3, 50, torch.float64, 3))
    before = relevance_scores(layer, latents)
    with torch.no_grad():
        layer.projections[1].weight /= 7
    after = relevance_scores(layer, [latents[0], latents[1] * 7])
    assert after == pytest.approx(before)
    assert sum(after.values()) == pytest.approx(1)


# ---- whole models


def ensemble(fusion: str, outputs: int = 1) -> tuple[FusionEnsemble, Split]:
    """Two untrained members in float64, and twelve labelled examples."""
    torch.manual_seed(4)
    made = FusionEnsemble({"image": 5, "text": 4}, 2, 3, 8, rank=3, output_dim=outputs, fusion=fusion).double().eval()
    features = {"image": torch.randn(12, 5).double() + 1, "text": torch.randn(12, 4).double()}
    target = torch.arange(12) % 2.0 if outputs == 1 else torch.randn(12, outputs)
    return made.requires_grad_(False), Split(features, target, [str(i) for i in range(12)])


def projected(member, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hessel & Lee's algorithm on the whole model: (N, O) from predictions on all N^2 pairs of raw features."""
    n = len(features["image"])
    i, j = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    table = member({"image": features["image"][i], "text": features["text"][j]}).prediction.reshape(n, n, -1)
    return table.mean(1) + table.mean(0) - table.mean((0, 1))


def test_emap_of_the_whole_model_is_that_of_its_head():
    made, split = ensemble("lmf", outputs=2)
    for member in made.members:
        member.rescale.fit(split.target * 3 + 1)
        closed = emap(interventional_values(exact_layer(member), latents_of(member, split.features)))
        close(closed, projected(member, split.features), torch.float64)


def test_summary_scores_the_projections_of_lmf_and_of_other_heads():
    made, split = ensemble("lmf")
    other, _ = ensemble("concatenation")
    summary = summarise(made.members, split, "dev", "binary", 0, "logit", {"concatenation": other.members})
    for label, models in (("its EMAP: additive in the modalities", made), ("its EMAP, concatenation", other)):
        logits = torch.stack([projected(member, split.features).squeeze(-1) for member in models.members])
        expected = ((logits > 0) == (split.target == 1)).double().mean(1).tolist()
        assert summary.scores[label]["accuracy"].members == pytest.approx(expected)
    for shares in (summary.relevance, summary.variance):
        assert sum(shares.values()) == pytest.approx([1, 1])
        assert set(shares) == {"image alone", "text alone", "image x text"}
    layer, latents = exact_layer(made.members[0]), latents_of(made.members[0], split.features)
    phi = shapley_values(interventional_values(layer, latents))  # (N, 1, 2)
    assert [summary.shapley[m][0] for m in ("image", "text")] == pytest.approx(phi.abs().mean((0, 1)).tolist())
    assert all(len(cells) == len(head) for _, head, rows in summary_rows(summary) for cells in rows)


def test_unlabelled_split_has_no_scores_and_all_else():
    made, split = ensemble("lmf")
    unlabelled = Split(split.features, None, split.ids)
    summary = summarise(made.members, unlabelled, "test", "binary", 0, "logit", variance_shares)
    assert summary.scores == {} and len(summary_rows(summary)) == 2


# ---- the summary of classes and labels


def test_summary_of_classes_scores_all_logits_and_accounts_for_the_margin():
    made, split = ensemble("lmf", outputs=3)
    split = replace(split, target=(torch.arange(len(split)) % 3).float())
    summary = summarise(made.members, split, "dev", "multiclass", 0, "margin (...)")
    logits = torch.stack([member(split.features, reconstruct=False).prediction for member in made.members]).double()
    additive = torch.stack([projected(member, split.features) for member in made.members])
    for row, outputs in (("full model", logits), ("its EMAP: additive in the modalities", additive)):
        losses = [torch.nn.functional.cross_entropy(z, split.target.long()).item() for z in outputs]
        assert summary.scores[row]["log_loss"].members == pytest.approx(losses, rel=1e-5)
        right = (outputs.argmax(-1) == split.target).double().mean(1).tolist()
        assert summary.scores[row]["accuracy"].members == pytest.approx(right)
    first, second = logits.softmax(-1).mean(0).topk(2).indices.T[:, :, None]
    layer, latents = exact_layer(made.members[1]), latents_of(made.members[1], split.features)
    values = interventional_values(layer, latents)  # (N, C) each
    phi = shapley_values({known: (v.gather(1, first) - v.gather(1, second))[:, 0] for known, v in values.items()})
    assert [summary.shapley[m][1] for m in ("image", "text")] == pytest.approx(phi.abs().mean(0).tolist())


def test_summary_of_labels_scores_the_chosen_one_and_names_it():
    made, split = ensemble("lmf", outputs=2)
    split = replace(
        split, target=torch.stack([torch.arange(len(split)) % 2, torch.arange(len(split)) % 3 > 0], 1).float()
    )
    summary = summarise(made.members, split, "dev", "multilabel", 1, "logit of rain", label="rain")
    logits = torch.stack([member(split.features, reconstruct=False).prediction[:, 1] for member in made.members])
    expected = [roc_auc_score(split.target[:, 1], z) for z in logits.detach()]
    assert summary.scores["full model"]["auroc"].members == pytest.approx(expected)
    captions = [caption for caption, _, _ in summary_rows(summary)]
    assert "scores of rain" in captions[0] and "logit of rain" in captions[1]
