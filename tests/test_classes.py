"""Scores of several classes and labels against scikit-learn's, resample by resample; margins between classes."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from lmf_module import LowRankMultimodalFusion
from mmfusion.metrics import classes
from mmfusion.metrics.classes import (
    MULTICLASS_SCORES,
    MULTILABEL_SCORES,
    multiclass_scores,
    multilabel_scores,
    weighted_average_precision,
)
from mmfusion.metrics.scores import bootstrap_counts
from mmfusion.models.decomposition import contrast_layer
from mmfusion.robustness.certificates import certified_class_radius, worst_change

N, C, S = 60, 4, 2


def probabilities_of_classes() -> tuple[np.ndarray, np.ndarray]:
    """(S, N, C) rounded to tenths before they are normalised, so that there are ties; (N,) of all classes."""
    rng = np.random.default_rng(0)
    target = rng.permutation(np.arange(N) % C)
    raw = np.round(rng.random((S, N, C)), 1) + 0.5 * np.eye(C)[target] + 0.05
    return raw / raw.sum(-1, keepdims=True), target


def probabilities_of_labels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    target = (rng.random((N, C)) < [0.5, 0.3, 0.6, 0.2]).astype(float)
    return np.clip(np.round(0.6 * rng.random((S, N, C)) + 0.3 * target, 1), 0, 1), target


def ece(p: np.ndarray, right: np.ndarray, w: np.ndarray) -> float:
    """By its definition: over bins, share of the weight times |mean confidence - share right|."""
    total = 0.0
    for k in range(15):
        inside = (np.minimum(np.floor(p * 15), 14) == k) & (w > 0)
        if inside.any():
            gap = np.average(p[inside], weights=w[inside]) - np.average(right[inside], weights=w[inside])
            total += w[inside].sum() / w.sum() * abs(gap)
    return total


def over_labels(score, p, y, w):
    return np.mean([score(y[:, c], p[:, c], w) for c in range(y.shape[1])])


OF_CLASSES = {
    "accuracy": lambda p, y, w: metrics.accuracy_score(y, p.argmax(1), sample_weight=w),
    "balanced_accuracy": lambda p, y, w: metrics.balanced_accuracy_score(y, p.argmax(1), sample_weight=w),
    "macro_f1": lambda p, y, w: metrics.f1_score(y, p.argmax(1), average="macro", sample_weight=w),
    "weighted_f1": lambda p, y, w: metrics.f1_score(y, p.argmax(1), average="weighted", sample_weight=w),
    # scikit-learn's own one-vs-rest mean takes no weights that leave examples out: column by column
    "auroc": lambda p, y, w: over_labels(
        lambda t, q, v: metrics.roc_auc_score(t, q, sample_weight=v), p, np.eye(C)[y], w
    ),
    "log_loss": lambda p, y, w: metrics.log_loss(y, p, sample_weight=w, labels=range(C)),
    "brier": lambda p, y, w: np.average(np.square(p - np.eye(C)[y]).sum(1), weights=w),
    "ece": lambda p, y, w: ece(p.max(1), p.argmax(1) == y, w),
}
OF_LABELS = {
    "map": lambda p, y, w: metrics.average_precision_score(y, p, average="macro", sample_weight=w),
    "auroc": lambda p, y, w: over_labels(lambda t, q, v: metrics.roc_auc_score(t, q, sample_weight=v), p, y, w),
    "macro_f1": lambda p, y, w: metrics.f1_score(y, p >= 0.5, average="macro", sample_weight=w),
    "subset_accuracy": lambda p, y, w: metrics.accuracy_score(y, p >= 0.5, sample_weight=w),
    "log_loss": lambda p, y, w: over_labels(
        lambda t, q, v: metrics.log_loss(t, q, sample_weight=v, labels=(0, 1)), p, y, w
    ),
    "brier": lambda p, y, w: over_labels(lambda t, q, v: metrics.brier_score_loss(t, q, sample_weight=v), p, y, w),
    "ece": lambda p, y, w: over_labels(lambda t, q, v: ece(q, t, v), p, y, w),
}
CASES = [
    *((multiclass_scores, probabilities_of_classes, name, OF_CLASSES[name]) for name in MULTICLASS_SCORES),
    *((multilabel_scores, probabilities_of_labels, name, OF_LABELS[name]) for name in MULTILABEL_SCORES),
]


@pytest.mark.parametrize(("scores", "draw", "name", "slow"), CASES, ids=[f"{c[0].__name__}-{c[2]}" for c in CASES])
def test_score_and_interval_are_scikit_learns_of_every_resample(scores, draw, name, slow):
    p, target = draw()
    score = scores(p, target, seed=3, names=(name,))[name]
    assert score.members == pytest.approx([slow(member, target, np.ones(N)) for member in p], abs=1e-12)
    assert score.mean == pytest.approx(np.mean(score.members)) and score.examples == N
    counts = bootstrap_counts(N, 3)
    hot = np.eye(C)[target] if target.ndim == 1 else target
    table = classes._MULTICLASS if target.ndim == 1 else classes._MULTILABEL
    columns = np.stack([table[name](member, hot, counts) for member in p])  # (S, K)
    few = [[slow(member, target, drawn) for drawn in counts[:30]] for member in p]
    np.testing.assert_allclose(columns[:, :30], few, atol=1e-12)
    np.testing.assert_allclose([score.low, score.high], np.percentile(columns.mean(0), [2.5, 97.5]), atol=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "auroc", "ece"])
def test_a_weighting_is_the_rows_written_out(name):
    p, target = probabilities_of_classes()
    for drawn in bootstrap_counts(N, 5)[:5]:
        rows = np.repeat(np.arange(N), drawn.astype(int))
        weighted = classes._MULTICLASS[name](p[0], np.eye(C)[target], drawn[None])[0]
        assert multiclass_scores(p[:1, rows], target[rows], names=(name,))[name].mean == pytest.approx(weighted)


def test_classes_that_a_resample_lacks_are_left_out_of_a_mean():
    p, target = probabilities_of_classes()
    weights = (target != 2).astype(float)[None]
    hot = np.eye(C)[target]
    kept = [0, 1, 3]
    expected = [metrics.roc_auc_score(hot[:, c], p[0, :, c], sample_weight=weights[0]) for c in kept]
    assert classes._MULTICLASS["auroc"](p[0], hot, weights)[0] == pytest.approx(np.mean(expected))
    present = target != 2
    recall = metrics.recall_score(
        target[present], p[0, present].argmax(1), labels=kept, average="macro", zero_division=0
    )
    assert classes._MULTICLASS["balanced_accuracy"](p[0], hot, weights)[0] == pytest.approx(recall)


def test_average_precision_takes_equal_scores_as_one_threshold():
    rng = np.random.default_rng(0)
    scores, target = rng.integers(0, 4, N) / 4, rng.integers(0, 2, N)
    weights = np.vstack([np.ones(N), np.zeros(N), bootstrap_counts(N, 0)[:20]])
    found = weighted_average_precision(scores, target, weights)
    assert np.isnan(found[1])
    slow = [metrics.average_precision_score(target, scores, sample_weight=w) for w in np.delete(weights, 1, 0)]
    np.testing.assert_allclose(np.delete(found, 1), slow, atol=1e-12)


def test_mistakes_in_the_arguments_are_named():
    p, target = probabilities_of_classes()
    with pytest.raises(ValueError, match="no score is called"):
        multiclass_scores(p, target, names=("auc",))
    with pytest.raises(ValueError, match="no class numbers"):
        multiclass_scores(p, target + 1)
    with pytest.raises(ValueError, match="do not fit"):
        multiclass_scores(p[0], target)
    with pytest.raises(ValueError, match="of 0 and 1"):
        multilabel_scores(p, np.eye(C)[target] * 2)


# ---- margins between classes -------------------------------------------------------------------------------------


def random_layer(outputs: int, shared: bool = False, active: int | None = None) -> LowRankMultimodalFusion:
    torch.manual_seed(outputs)
    layer = LowRankMultimodalFusion((3, 4, 2), outputs, 5, active_rank=active, shared_factors=shared).double()
    torch.nn.init.normal_(layer.rank_weights)  # of +-1/sqrt(R) two outputs of shared factors may be the same
    return layer


def random_latents(count: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (3, 4, 2)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("active", [None, 2])
def test_a_contrast_is_the_weighted_sum_of_the_outputs(shared, active):
    layer, z = random_layer(4, shared, active), random_latents()
    before = torch.random.get_rng_state()
    for first, second in itertools.permutations(range(4), 2):
        contrast = torch.zeros(4, dtype=torch.float64)
        contrast[first], contrast[second] = 1, -1
        made = contrast_layer(layer, contrast)
        torch.testing.assert_close(made(z).squeeze(-1), layer(z) @ contrast)
        assert made.rank == (5 if shared else 10) and made.output_dim == 1
    weights = torch.tensor([0.5, -2.0, 0.0, 3.0], dtype=torch.float64)
    made = contrast_layer(layer, weights)
    torch.testing.assert_close(made(z).squeeze(-1), layer(z) @ weights)
    for subset, part in layer.subset_terms(z).items():
        torch.testing.assert_close(made.subset_terms(z)[subset].squeeze(-1), part @ weights)
    for m in range(3):
        gradient = torch.einsum("nod,o->nd", layer.modality_gradient(z, m), weights)
        torch.testing.assert_close(made.modality_gradient(z, m).squeeze(-2), gradient)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("shared", [False, True])
def test_the_class_radius_is_attained_and_nothing_smaller_changes_the_class(norm, shared):
    layer, z = random_layer(4, shared), random_latents()
    first = layer(z).argmax(-1)
    generator = torch.Generator().manual_seed(2)
    for m in range(3):
        radius = certified_class_radius(layer, z, m, norm)
        assert radius.shape == (20,) and (radius > 0).all()
        # by definition: the least over the other classes of the radius of their margin, each a layer of its own
        slow, changes = torch.full((20, 4), math.inf).double(), torch.zeros(20, 4, z[m].shape[1]).double()
        for n, other in itertools.product(range(20), range(4)):
            if other != first[n]:
                contrast = torch.zeros(4, dtype=torch.float64)
                contrast[first[n]], contrast[other] = 1, -1
                margin, row = contrast_layer(layer, contrast), [one[[n]] for one in z]
                unit = worst_change(margin, row, m, 1.0, norm)[0, 0]  # (d,)
                fall = margin(row) - margin([one + unit if k == m else one for k, one in enumerate(row)])
                slow[n, other] = (margin(row) / fall).item()
                changes[n, other] = unit
        torch.testing.assert_close(slow.amin(-1), radius)
        worst = changes[torch.arange(20), slow.argmin(-1)] * radius[:, None]  # (20, d)

        def classes_at(step, m=m):
            return layer([one + step if k == m else one for k, one in enumerate(z)]).argmax(-1)

        assert (classes_at((1 - 1e-6) * worst) == first).all()
        assert (classes_at((1 + 1e-6) * worst) == slow.argmin(-1)).all()
        for _ in range(300):  # no other direction does better
            step = torch.randn(z[m].shape, generator=generator, dtype=torch.float64)
            step = step / torch.linalg.vector_norm(step, ord=norm, dim=-1, keepdim=True)
            assert (classes_at(0.999 * radius[:, None] * step) == first).all()


def test_a_class_that_cannot_be_reached_has_an_infinite_radius():
    layer, z = random_layer(3), random_latents()
    with torch.no_grad():
        for projection in layer.projections[:1]:
            projection.weight.zero_()  # nothing depends on the first latent
    assert torch.isinf(certified_class_radius(layer, z, 0, 2)).all()
    assert certified_class_radius(layer, z, 1, 2).isfinite().all()


def test_two_classes_have_the_radius_of_the_difference_of_their_logits():
    layer, z = random_layer(2), random_latents()
    contrast = contrast_layer(layer, torch.tensor([1.0, -1.0], dtype=torch.float64))
    gradient = contrast.modality_gradient(z, 1).squeeze(-2)
    expected = contrast(z).squeeze(-1).abs() / gradient.norm(dim=-1)
    torch.testing.assert_close(certified_class_radius(layer, z, 1, 2), expected)
