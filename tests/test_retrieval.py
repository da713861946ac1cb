"""Retrieval scores against scikit-learn, against every order among equals, and at chance."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from mmfusion.metrics import retrieval
from mmfusion.metrics.retrieval import cross_retrieval, retrieval_scores
from mmfusion.metrics.shared_retrieval import shared_precision

DATA = Path(os.environ.get("FUSION_DATA", "")) / "clip_coco_pairs.npz"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def angles(similarities: list[float]) -> np.ndarray:
    """Unit vectors (G, 2) that have these cosines to (1, 0)."""
    return np.stack([np.asarray(similarities), np.sqrt(1 - np.square(similarities))], -1)


def over_orders(similarities: list[float], positive: list[int], cutoffs: tuple[int, ...]) -> np.ndarray:
    """Rank of the best positive, AP and recalls of one query, mean over all orders that the similarities allow."""
    results = []
    for order in itertools.permutations(range(len(similarities))):
        ordered = [similarities[i] for i in order]
        if ordered != sorted(similarities, reverse=True):
            continue
        hits = [i in positive for i in order]
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        results.append([1 + hits.index(True), np.mean(precisions), *(any(hits[:k]) for k in cutoffs)])
    return np.mean(results, 0)


@pytest.mark.parametrize(
    ("similarities", "positive"),
    [
        ([0.5] * 6, [0]),
        ([0.5] * 6, [1, 4, 5]),
        ([0.9, 0.5, 0.5, 0.5, 0.2, 0.2], [1, 4]),
        ([0.9, 0.9, 0.5, 0.5, 0.5, 0.2], [0, 2, 3, 5]),
        ([0.9, 0.8, 0.8, 0.8, 0.8, 0.1], [2]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 3]),
        ([0.5, 0.5, 0.5], [0, 1, 2]),
        ([0.9, 0.5, 0.5, 0.2], [1, 2]),
    ],
)
def test_ties_score_the_mean_over_every_order_among_equals(similarities, positive):
    cutoffs = (1, 2, 3, 5)
    labels = ["right" if i in positive else "wrong" for i in range(len(similarities))]
    scores = retrieval_scores([[1.0, 0.0]], angles(similarities), ["right"], labels, cutoffs)
    found = [scores.median_rank, scores.mean_average_precision, *scores.recall.values()]
    np.testing.assert_allclose(found, over_orders(similarities, positive, cutoffs), atol=1e-12)


def test_without_ties_scores_are_those_of_scikit_learn_and_of_a_slow_loop(monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 7 * 50)  # several chunks, the last not full
    x, y = normal(40, 5), normal(50, 5, seed=1)
    of_x, of_y = (np.random.default_rng(s).integers(0, 12, n) for s, n in ((2, 40), (3, 50)))
    of_x[[3, 17]] = 99  # without a positive
    scores = retrieval_scores(x, y, of_x, of_y)
    similarities = (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T
    rows = [i for i in range(40) if of_x[i] in of_y]
    hits = [of_y[np.argsort(-similarities[i])] == of_x[i] for i in rows]
    ranks = np.array([1 + np.argmax(hit) for hit in hits])
    precisions = [average_precision_score(of_y == of_x[i], similarities[i]) for i in rows]
    np.testing.assert_array_equal(scores.per_query.query, rows)
    np.testing.assert_allclose(scores.per_query.rank, ranks)
    np.testing.assert_allclose(scores.per_query.average_precision, precisions, atol=1e-12)
    for k in (1, 5, 10):
        np.testing.assert_allclose(scores.per_query.recall[k], ranks <= k)
        assert scores.recall[k] == pytest.approx((ranks <= k).mean())
    assert scores.median_rank == np.median(ranks)
    assert scores.mean_average_precision == pytest.approx(np.mean(precisions))
    assert (scores.queries, scores.without_positive, scores.gallery) == (len(rows), 40 - len(rows), 50)
    assert scores.without_positive >= 2


@pytest.mark.parametrize("width", [1, 3, 512])
def test_a_collapsed_space_scores_chance(width):
    n = 37
    vector = normal(1, width) + 0.1
    # norms differ by powers of two, so that directions are equal to the last bit
    scores = retrieval_scores(np.repeat(vector, n, 0), vector * 2.0 ** (np.arange(n)[:, None] % 3))
    np.testing.assert_allclose([scores.recall[k] for k in (1, 5, 10)], np.array([1, 5, 10]) / n, rtol=1e-12)
    assert scores.median_rank == (n + 1) / 2
    assert scores.mean_average_precision == pytest.approx((1 / np.arange(1, n + 1)).mean(), rel=1e-12)


def test_equal_vectors_apart_by_rounding_alone_are_ties():
    x = normal(60, 64)
    doubled = np.concatenate([x, x * 3.0])  # times 3 is rounded
    scores = retrieval_scores(x, doubled, np.arange(60), np.arange(120))
    np.testing.assert_allclose(scores.per_query.rank, 1.5)
    assert scores.recall[1] == 0.5


def test_random_embeddings_are_at_chance_and_equal_ones_perfect():
    x, y = normal(1000, 32), normal(1000, 32, seed=1)
    scores = retrieval_scores(x, y)
    assert abs(scores.recall[10] - 0.01) < 0.01 and abs(scores.median_rank - 500) < 60
    scores = retrieval_scores(x, x)
    assert scores.recall[1] == scores.median_rank == scores.mean_average_precision == 1


def test_rotation_and_the_length_of_vectors_change_no_score():
    x, y = normal(80, 6), normal(80, 6, seed=1)
    y += x
    turn = np.linalg.qr(normal(6, 6, seed=2))[0]
    expected = retrieval_scores(x, y)
    found = retrieval_scores(torch.from_numpy(x @ turn * 1e-200), torch.from_numpy(y @ turn * 1e200))
    assert found.recall == expected.recall and found.median_rank == expected.median_rank
    assert 0.1 < expected.recall[1] < 1  # the case says something


def test_every_ordered_pair_of_modalities_is_scored_with_its_own_labels():
    image, text = normal(10, 8), np.repeat(normal(10, 8), 5, 0) + 0.01 * normal(50, 8, seed=1)
    labels = {"image": np.arange(10), "text": np.repeat(np.arange(10), 5)}
    scores = cross_retrieval({"image": image, "text": text}, labels)
    assert list(scores) == [("image", "text"), ("text", "image")]
    assert scores["image", "text"].queries == 10 and scores["text", "image"].queries == 50
    assert all(s.recall[1] == s.mean_average_precision == 1 for s in scores.values())
    three = cross_retrieval({"a": image, "b": image, "c": -image})
    assert len(three) == 6 and three["a", "b"].recall[1] == 1 and three["a", "c"].median_rank == 10


def test_half_precision_tensors_and_cutoffs_beyond_the_gallery_are_taken():
    x = torch.from_numpy(normal(6, 4)).bfloat16().requires_grad_()
    assert retrieval_scores(x, x.flip(0), cutoffs=[1, 100]).recall[100] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3), np.ones((3, 2))), "queries of shape"),
        ((np.ones((3, 2)), np.ones((0, 2))), "gallery of shape"),
        ((np.ones((3, 2)), np.ones((3, 4))), "not of one width"),
        ((np.ones((3, 2)), np.ones((4, 2))), "no pairs: give labels"),
        ((np.array([[1, np.nan], [1, 1]]), np.ones((2, 2))), r"queries .* NaN or infinity in 1 rows, the first is 0"),
        ((np.ones((2, 2)), np.array([[1, 1], [0, 0]])), r"gallery .* 1 zero vectors, the first in row 1"),
        ((np.ones((2, 2)), np.ones((2, 2)), [1, 2]), "both or none"),
        ((np.ones((2, 2)), np.ones((2, 2)), [1, 2], [1, 2, 3]), "cannot be of shapes"),
        ((np.ones((2, 2)), np.ones((2, 2)), [1, 2], [3, 4]), "none of 2 queries has a positive"),
        ((np.ones((2, 2)), np.ones((2, 2)), [1, 2], ["1", "2"]), "two kinds"),
        ((np.ones((2, 2)), np.ones((2, 2)), [1.0, np.nan], [1.0, np.nan]), "labels hold NaN"),
        ((np.ones((2, 2)), np.ones((2, 2)), None, None, (0, 1)), "cutoffs"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval_scores(*arguments)


def test_one_modality_or_labels_of_others_are_refused():
    for latents, labels in (({"a": np.ones((2, 2))}, None), (dict.fromkeys("ab", np.ones((2, 2))), {"a": [1, 2]})):
        with pytest.raises(ValueError, match="two modalities"):
            cross_retrieval(latents, labels)


@pytest.mark.skipif(not DATA.is_file(), reason="FUSION_DATA names no folder with clip_coco_pairs.npz")
def test_clip_on_coco_scores_what_is_known():
    arrays = np.load(DATA)
    scores = cross_retrieval({name: arrays[name] for name in ("image", "text")})
    assert {pair: s.recall[1] for pair, s in scores.items()} == {("image", "text"): 0.552, ("text", "image"): 0.506}


@pytest.mark.parametrize("kind", ["all different", "ties", "all equal", "one example"])
def test_precision_of_partners_without_sorting_is_that_of_ranked_galleries(kind):
    latents = normal(1 if kind == "one example" else 40, 3, 4)
    latents = {"ties": np.round(latents) + 0.5, "all equal": np.ones_like(latents)}.get(kind, latents)
    by_name = {str(m): latents[:, m] for m in range(3)}
    ranked = cross_retrieval(by_name).values()
    assert shared_precision(by_name, {}) == pytest.approx(
        np.mean([one.mean_average_precision for one in ranked]), rel=1e-12
    )


def test_blocks_of_single_positives_are_those_of_the_general_way():
    """Found for all rows at once, or row by row as where a query has several positives."""
    for digits in (0, 1, 6):
        x, y = np.round(normal(30, 3, seed=1), digits) + 0.01, np.round(normal(30, 3, seed=2), digits) + 0.01
        alone = retrieval_scores(x, y).per_query
        # one query with a second positive sends all of them the general way; the others' scores are the same
        labels = np.arange(30)
        several = retrieval_scores(x, np.r_[y, y[:1]], labels, np.r_[labels, 0]).per_query
        kept = retrieval_scores(x, np.r_[y, y[:1]], labels, np.r_[labels, 99]).per_query
        np.testing.assert_allclose(several.rank[1:], kept.rank[1:], rtol=1e-12)
        np.testing.assert_allclose(several.average_precision[1:], kept.average_precision[1:], rtol=1e-12)
        assert alone.rank.min() >= 1
