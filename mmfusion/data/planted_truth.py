"""What is true of planted labels: each example's logit, and the best scores with all modalities and without one.

    f = constant + sum_m b_m . z_m + z_1^T B z_2,    label ~ Bernoulli(sigmoid(f / noise)), or f + noise N(0, 1)

Scores are expectations over the labels' draw, at these examples; nothing is drawn. Without modality m its components
are what the others' say linearly, plus a residual e: enumerated over the pool, f is alpha_i + beta_i . e_j, and the
mean over j of sigmoid(f / noise) is predicted. That is the best prediction where the residual is independent of the
other modalities, and else a prediction that can be had: a lower bound of the best.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, ndtr, xlogy

from mmfusion.dataset import Task

_NUMBERS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Truth:
    """The planted function of N examples."""

    task: Task
    """binary or regression"""
    components: dict[str, np.ndarray]
    """{modality: z_m (N, q_m)}"""
    constant: float
    linear: dict[str, np.ndarray]
    """{modality: b_m (q_m,)}"""
    pair: tuple[str, str] | None
    """the two modalities that are multiplied"""
    bilinear: np.ndarray | None
    """B (q_1, q_2) between them"""
    noise: float

    @property
    def logit(self) -> np.ndarray:
        """(N,) f: noise times the logit of a binary label, or a regression's mean."""
        f = self.constant + sum(z @ self.linear[name] for name, z in self.components.items())
        if self.pair is not None:
            first, second = (self.components[name] for name in self.pair)
            f = f + ((first @ self.bilinear) * second).sum(1)  # (N, q_1) @ (q_1, q_2)
        return f

    @property
    def probability(self) -> np.ndarray:
        """(N,) of label 1. Raises ValueError for a regression."""
        if self.task != "binary":
            raise ValueError("a regression has no probability of a label")
        return expit(self.logit / self.noise)

    def best(self, rows: np.ndarray | None = None) -> dict[str, float]:
        """Expected scores of whoever knows the truth, on these rows of the pool (default: all).

        auroc, accuracy, log loss; of a regression mae and r2, in the units of f (its variance is 1 but in the kind
        calibration, the target's is 1 + noise^2).
        """
        return self._scores(self.probability if self.task == "binary" else self.logit, rows)

    def without(self, modality: str, rows: np.ndarray | None = None) -> dict[str, float]:
        """As `best`, where that modality is missing and what it would have said is averaged out over the pool.

        Raises ValueError for a modality that there is not, or is the only one.
        """
        return self._scores(self.prediction_without(modality), rows)

    def accuracy_at(self, rate: float, modality: str, rows: np.ndarray | None = None) -> float:
        """Expected accuracy where that modality is missing at that rate: a straight line in it.

        Raises ValueError as `without`, for a regression, and for a rate outside [0, 1].
        """
        if self.task != "binary" or not 0 <= rate <= 1:
            raise ValueError(f"no accuracy of a {self.task} target at rate {rate}")
        return (1 - rate) * self.best(rows)["accuracy"] + rate * self.without(modality, rows)["accuracy"]

    def prediction_without(self, modality: str) -> np.ndarray:
        """(N,) probability of label 1, or a regression's mean, with that modality averaged out."""
        if modality not in self.components or len(self.components) < 2:
            raise ValueError(f"no modality {modality!r} to leave out of {', '.join(self.components)}")
        others = np.hstack([z for name, z in self.components.items() if name != modality])  # (N, Q)
        guess = others @ np.linalg.lstsq(others, self.components[modality], rcond=None)[0]  # (N, q)
        residual = self.components[modality] - guess  # mean 0, as all z have
        alpha = replace(self, components={**self.components, modality: guess}).logit  # (N,)
        if self.task == "regression":
            return alpha
        beta = np.broadcast_to(self.linear[modality], guess.shape)
        if self.pair is not None and modality in self.pair:
            place = self.pair.index(modality)
            other = self.components[self.pair[1 - place]]
            beta = beta + other @ (self.bilinear if place else self.bilinear.T)  # (N, q)
        step = max(1, _NUMBERS_AT_ONCE // len(alpha))
        parts = [slice(start, start + step) for start in range(0, len(alpha), step)]
        means = [expit((alpha[part, None] + beta[part] @ residual.T) / self.noise).mean(1) for part in parts]
        return np.concatenate(means)

    def _scores(self, prediction: np.ndarray, rows: np.ndarray | None) -> dict[str, float]:
        rows = np.arange(len(prediction)) if rows is None else rows
        guess = prediction[rows]
        if self.task == "binary":
            p = self.probability[rows]
            return {
                "auroc": expected_auroc(guess, p),
                "accuracy": float(np.where(guess > 0.5, p, 1 - p).mean()),
                "log loss": float(-(xlogy(p, guess) + xlogy(1 - p, 1 - guess)).mean()),
            }
        f = self.logit[rows]
        error = f - guess
        ratio = error / self.noise  # mean of |N(error, noise^2)|: the folded normal's
        density = (2 / np.pi) ** 0.5 * np.exp(-(ratio**2) / 2)
        absolute = self.noise * density + error * (2 * ndtr(ratio) - 1)
        squared = (error**2).mean() + self.noise**2
        return {"mae": float(absolute.mean()), "r2": float(1 - squared / (f.var() + self.noise**2))}


def expected_auroc(scores: np.ndarray, probability: np.ndarray) -> float:
    """Area under the ROC curve of scores (N,) whose labels are drawn with these probabilities (N,), ties as one half.

    The expected number of ordered pairs over that of pairs: the expected area up to 1 / N.
    """
    p, q = probability, 1 - probability
    _, index = np.unique(scores, return_inverse=True)
    positive, negative = np.bincount(index, p), np.bincount(index, q)
    below = np.cumsum(negative) - negative
    self_pairs = float(p @ q)  # an example is no pair with itself
    ordered = float(positive @ (below + negative / 2)) - self_pairs / 2
    return ordered / float(p.sum() * q.sum() - self_pairs)


def variance_one(
    components: dict[str, np.ndarray], pair: tuple[str, str], bilinear: np.ndarray
) -> tuple[float, dict[str, np.ndarray], float]:
    """What makes z_1^T B z_2 an interaction of mean 0 and variance 1 that no linear function of the z predicts.

    Returns:
        constant and {modality: b_m} to be added to z_1^T B z_2 / deviation, and that deviation.
    """
    first, second = (components[name] for name in pair)
    product = ((first @ bilinear) * second).sum(1)  # (N,)
    design = np.hstack([np.ones((len(product), 1)), *components.values()])
    weights = np.linalg.lstsq(design, product, rcond=None)[0]
    deviation = float((product - design @ weights).std())
    cuts = np.cumsum([1, *(z.shape[1] for z in components.values())])
    removed = {name: -weights[a:b] / deviation for name, a, b in zip(components, cuts, cuts[1:], strict=False)}
    return -float(weights[0]) / deviation, removed, deviation
