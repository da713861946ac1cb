"""Scores of aligned spaces on test examples: retrieval, gap, clusters, damage, invariance, and what is unique.

Damage of one modality at a time, each drawn once: "missing", its latent is the mean of the others'; "noise" of two
standard deviations on its features; "occlusion", a random half of each example's features at their mean.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # scikit-learn needs it too
from torch import Tensor

from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, take
from mmfusion.metrics.clusters import cluster_scores
from mmfusion.metrics.cross_decoding import measure_cross_decoding
from mmfusion.metrics.geometry import centroid_gap, foscttm, unbiased_cka
from mmfusion.metrics.probes import unique_share
from mmfusion.metrics.retrieval import unit_rows
from mmfusion.metrics.shared_retrieval import distinct_items, shared_retrieval
from mmfusion.models.alignment import AlignmentEnsemble, AlignmentModel
from mmfusion.models.heads import Standardise

NOISE = 2.0  # standard deviations
RATE = 0.5  # of the examples of one modality, missing or noise

Damage = Literal["noise", "occlusion"]
Scores = dict[str, np.ndarray]


def scored(data: FoldedDataset, ensemble: AlignmentEnsemble) -> Scores:
    """{"R@1" | "accuracy" | "invariance, noise" ...: (S, n) of the test examples; "gap" | "unique" ...: (S, folds)}."""
    folds = []
    # small matrices: more threads gain nothing, and where another process has a core they wait for each other
    with threadpool_limits(1, "blas"):
        for f, fold in enumerate(data.folds):
            seeds = [_of_member(data, member, fold) for member in ensemble.part(f, len(data.folds)).members]
            folds.append({name: np.stack([np.atleast_1d(one[name]) for one in seeds]) for name in seeds[0]})
    return {name: np.concatenate([of[name] for of in folds], 1) for name in folds[0]}


def fall(of: Scores, kind: str, rate: float) -> np.ndarray:
    """(S, n) of accuracy, from clean to where `rate` of one modality's examples are damaged.

    Which examples are hit is drawn: the expected accuracy is a mixture, so that the fall is proportional to the rate.
    """
    return rate / RATE * (of["accuracy"] - of[f"accuracy, {RATE:.0%} {kind}"])


def in_reach(of: Scores, share: float, guessed: float) -> bool:
    """Whether a fall down to guessing, of the share `RATE` of the examples, is more than `share` of the accuracy."""
    clean = float(of["accuracy"].mean())
    return RATE * (clean - guessed) > share * clean


def largest_class(data: FoldedDataset) -> float:
    """Share of the test examples that guessing their largest class gets right; 0 without classes."""
    if data.task not in ("binary", "multiclass"):
        return 0.0
    return float(np.bincount(data.pool.target[data.test_rows].numpy().astype(int)).max() / len(data.test_rows))


@torch.inference_mode()
def latents_of(
    data: FoldedDataset, member: AlignmentModel, examples: Tensor, damaged: str | None = None, kind: Damage = "noise"
) -> np.ndarray:
    """(n, M, L) of these rows of the pool; the features of the modality `damaged`, where one is named, as `damage`."""
    features = {name: x[examples] for name, x in data.pool.features.items()}
    if damaged is not None:
        features[damaged] = damage(features[damaged], member.standardise[damaged], kind)
    return torch.stack(list(member.encode(features).values()), 1).numpy()


def damage(x: Tensor, standardise: Standardise, kind: Damage) -> Tensor:
    """Features (n, d) with noise, or with a random half of each example's at their mean in training."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return x + NOISE * standardise.std * torch.randn(x.shape, generator=generator)
    hidden = torch.rand(x.shape, generator=generator).argsort(1) < x.shape[1] // 2  # (n, d), as many in every row
    return torch.where(hidden, standardise.mean, x)


# ---- of one member -----------------------------------------------------------------------------------------------


def _of_member(data: FoldedDataset, member: AlignmentModel, fold: Fold) -> Scores:
    """Scores of the examples (n,) that one member is tested on, and of the space ()."""
    names = list(member.modalities)
    train, test = (latents_of(data, member, part) for part in (fold.train, fold.test))
    damaged = {
        kind: [latents_of(data, member, fold.test, name, kind) for name in names] for kind in ("occlusion", "noise")
    }
    shared = take(data.pool, fold.test.tolist()).shared
    found = space_scores({name: test[:, m] for m, name in enumerate(names)}, shared)
    found |= cross_decoded(data, member, fold.test)
    for kind, latents in damaged.items():
        found[f"invariance, {kind}"] = invariance(test, latents)
    parts = [{name: data.pool.features[name][part].numpy() for name in names} for part in (fold.train, fold.test)]
    by_name = [{name: z[:, m] for m, name in enumerate(names)} for z in (train, test)]
    found["unique"] = np.float64(unique_share(parts[0], by_name[0], parts[1], by_name[1]))
    if data.task not in ("binary", "multiclass"):
        return found
    target = data.pool.target.numpy().astype(int)
    pairs = itertools.combinations([unit_rows(test[:, m], name) for m, name in enumerate(names)], 2)
    order = np.arange(len(test))[None]  # as they are, without a null
    clusters = [cluster_scores(a, b, target[fold.test], order) for a, b in pairs]
    found["V-measure"] = np.mean([of_pair["V-measure"][0] for of_pair in clusters])
    spoiled = {"missing": [_without(test, m) for m in range(len(names))], "noise": damaged["noise"]}
    return found | accuracies(train, target[fold.train], test, target[fold.test], spoiled)


def space_scores(latents: dict[str, np.ndarray], shared: Mapping[str, Sequence[str]] | None = None) -> Scores:
    """Retrieval of the examples (n,), gap, CKA and FOSCTTM (), means over the pairs of modalities (n, L)."""
    recall, precision = retrieved_rows(latents, shared or {})
    pairs = list(itertools.combinations(latents.values(), 2))
    return {
        "R@1": recall,
        "mAP": precision,
        "gap": np.mean([centroid_gap(a, b) for a, b in pairs]),
        "CKA": np.mean([unbiased_cka(a, b) for a, b in pairs]),
        "FOSCTTM": np.mean([foscttm(a, b) for a, b in pairs]),
    }


def retrieved_rows(
    latents: Mapping[str, np.ndarray], shared: Mapping[str, Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """R@1 and average precision (n,) of each row, mean over ordered pairs of modalities; latents {name: (n, L)}.

    Where rows share an image, each of them has the score that the image gets as a query.
    """
    recall, precision = [], []
    for (asked, _), scores in shared_retrieval(latents, shared, (1,)).items():
        rows = distinct_items(shared[asked])[1] if asked in shared else slice(None)
        recall.append(scores.per_query.recall[1][rows])
        precision.append(scores.per_query.average_precision[rows])
    return np.mean(recall, axis=0), np.mean(precision, axis=0)


def accuracies(
    train: np.ndarray,
    target: np.ndarray,
    test: np.ndarray,
    test_target: np.ndarray,
    damaged: dict[str, list[np.ndarray]],
) -> Scores:
    """Logistic regression on all latents: right (1.) or wrong (n,), clean and expected at `RATE` of each damage.

    "unique accuracy" is what a modality adds: right by all latents, less right by a regression on the others' alone.

    Args:
        train, test: (n, M, L).
        target, test_target: (n,) class numbers.
        damaged: test latents with one modality damaged, for each modality in turn.
    """

    def fitted(latents: np.ndarray) -> LogisticRegression:
        return LogisticRegression(max_iter=2000).fit(latents.reshape(len(latents), -1), target)

    def right(probe: LogisticRegression, latents: np.ndarray) -> np.ndarray:
        return (probe.predict(latents.reshape(len(latents), -1)) == test_target).astype(float)

    probe = fitted(train)
    clean = right(probe, test)
    found = {"accuracy": clean}
    for kind, spoiled in damaged.items():
        hit = np.mean([right(probe, latents) for latents in spoiled], axis=0)
        found[f"accuracy, {RATE:.0%} {kind}"] = (1 - RATE) * clean + RATE * hit
    others = [right(fitted(np.delete(train, m, 1)), np.delete(test, m, 1)) for m in range(test.shape[1])]
    found["unique accuracy"] = clean - np.mean(others, axis=0)
    return found


def invariance(latents: np.ndarray, damaged: list[np.ndarray]) -> np.ndarray:
    """(n,) cosine of an example's latent and that of its damaged features, mean over the modalities.

    Args:
        latents: (n, M, L).
        damaged: (n, M, L) for each modality m in turn, of which [:, m] is damaged.
    """
    spoiled = torch.stack([torch.from_numpy(z[:, m]) for m, z in enumerate(damaged)], 1)  # (n, M, L)
    return F.cosine_similarity(torch.from_numpy(latents), spoiled, dim=-1).mean(1).double().numpy()


@torch.inference_mode()
def cross_decoded(data: FoldedDataset, member: AlignmentModel, examples: Tensor) -> dict[str, np.float64]:
    """Mean over ordered pairs of modalities of R^2 and Frechet distance of features decoded from another's latent."""
    given = {name: data.pool.features[name][examples] for name in member.modalities}
    features = {name: member.standardise[name](x) for name, x in given.items()}
    decoded = {(source, name): x for source in given for name, x in member.cross_decode(given, source).items()}
    measured = measure_cross_decoding(features, decoded, permutations=0, halvings=1).values()
    return {
        "R^2 across": np.mean([one.r2.value for one in measured]),
        "Frechet across": np.mean([one.frechet for one in measured]),
    }


def _without(latents: np.ndarray, m: int) -> np.ndarray:
    """One modality's latents replaced by the mean of the others'."""
    others = np.delete(latents, m, axis=1).mean(1)
    return np.concatenate([latents[:, :m], others[:, None], latents[:, m + 1 :]], axis=1)
