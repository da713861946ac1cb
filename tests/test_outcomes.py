"""Outcomes by examples: their mean is the score of scikit-learn and SciPy, their spread that of repeated draws."""

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import log_loss, roc_auc_score

from mmfusion.metrics.outcomes import PRIMARY, example_auroc, example_correlation, example_outcome


def test_mean_is_the_score():
    rng = np.random.default_rng(0)
    y = (rng.random(200) < 0.3).astype(float)
    logits = np.round(y + rng.normal(size=(3, 200)), 1)  # with ties
    np.testing.assert_allclose(
        example_outcome(logits, y, "binary", "auroc").mean(1), [roc_auc_score(y, one) for one in logits]
    )
    np.testing.assert_allclose(
        -example_outcome(logits, y, "binary", "log_loss").mean(1),
        [log_loss(y, 1 / (1 + np.exp(-one))) for one in logits],
    )
    target = rng.normal(size=(150, 2))
    values = target + rng.normal(size=(2, 150, 2))
    np.testing.assert_allclose(
        example_outcome(values, target, "regression", "correlation").mean(1),
        [np.mean([pearsonr(v[:, k], target[:, k])[0] for k in range(2)]) for v in values],
    )
    classes = rng.integers(0, 4, 120)
    of_classes = np.eye(4)[classes] + rng.normal(size=(2, 120, 4))
    shares = np.exp(of_classes) / np.exp(of_classes).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        example_outcome(of_classes, classes, "multiclass", "auroc").mean(1),
        [roc_auc_score(classes, p, multi_class="ovr") for p in shares],
    )
    labels = (rng.random((120, 3)) < 0.4).astype(float)
    np.testing.assert_allclose(
        example_outcome(labels + shares[..., :3], labels, "multilabel", "auroc").mean(1),
        [roc_auc_score(labels, labels + p[:, :3]) for p in shares],
    )


@pytest.mark.parametrize("of", [example_auroc, example_correlation])
def test_spread_is_that_of_repeated_draws(of):
    rng, scores, variances = np.random.default_rng(1), [], []
    for _ in range(1500):
        y = (rng.random(150) < 0.3).astype(float)
        values = of(y + rng.normal(size=(1, 150)), y)
        scores.append(values.mean())
        variances.append(values.var() / 150)
    assert np.mean(variances) == pytest.approx(np.var(scores), rel=0.12)


def test_a_constant_has_no_correlation_and_one_class_no_auroc():
    assert (example_correlation(np.ones((2, 5)), np.arange(5.0)) == 0).all()
    assert (example_correlation(np.arange(10.0).reshape(2, 5), np.ones(5)) == 0).all()
    with pytest.raises(ValueError, match="one class"):
        example_auroc(np.zeros((1, 4)), np.ones(4))
    for task, outcome in (("binary", "mae"), ("regression", "auroc"), ("binary", "f1")):
        with pytest.raises(ValueError, match="no outcome"):
            example_outcome(np.zeros((1, 4)), np.array([0.0, 1, 0, 1]), task, outcome)
    assert set(PRIMARY) == {"binary", "multiclass", "multilabel", "regression"}
