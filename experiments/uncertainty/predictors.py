"""Calibrated predictors, one member or an ensemble: temperature, conformal quantile, residual variance."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import expit, softmax

from mmfusion.data.folds import FoldedDataset, targets
from mmfusion.dataset import Task
from mmfusion.metrics import calibration
from mmfusion.metrics.classes import (
    class_entropy,
    class_mutual_information,
    class_set_summary,
    ensemble_log_probabilities,
    likeliest_log_odds,
)
from mmfusion.metrics.conformal import Conformal
from mmfusion.metrics.scores import example_losses

RAW, SCALED = "raw", "scaled"
MEMBER, ENSEMBLE = "one member", "ensemble"
Measures = dict[str, float | np.ndarray]


class HeldOutTargets(NamedTuple):
    """Targets of the dev and test parts, fold after fold; a regression's (n, O) in units of its standard deviation."""

    task: Task
    dev: np.ndarray
    test: np.ndarray
    dev_fold: np.ndarray  # (n_dev,) number of each example's fold
    test_fold: np.ndarray
    scale: np.ndarray  # (O,) that predictions are divided by
    alphas: tuple[float, ...]

    def in_units(self, outputs: np.ndarray) -> np.ndarray:
        """Predictions as the predictors take them: logits, or values (S, n, O) in units of the target's deviation."""
        outputs = np.asarray(outputs, np.float64)
        return outputs.reshape(*outputs.shape[:2], -1) / self.scale if self.task == "regression" else outputs


def held_out_targets(data: FoldedDataset, alphas: Sequence[float]) -> HeldOutTargets:
    """What dev and test of a study hold."""
    scale = data.target_scale.double().numpy()
    parts, folds = [], []
    for part in ("dev", "test"):
        target = np.asarray(targets(data, part), np.float64)
        parts.append(target.reshape(len(target), -1) / scale if data.task == "regression" else target)
        sizes = [len(getattr(fold, part)) for fold in data.folds]
        folds.append(np.repeat(np.arange(len(sizes)), sizes))
    return HeldOutTargets(data.task, *parts, *folds, scale, tuple(alphas))


def fold_aurc_parts(targets: HeldOutTargets, uncertainty: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """(n,): `calibration.aurc_parts` of every fold by itself, since the models of two folds have no order in common."""
    ends = np.flatnonzero(np.diff(targets.test_fold)) + 1
    pairs = zip(np.split(uncertainty, ends), np.split(loss, ends), strict=True)
    return np.concatenate([calibration.aurc_parts(*pair) for pair in pairs])


def aurc_by_fold(targets: HeldOutTargets, uncertainty: np.ndarray, loss: np.ndarray) -> float:
    """AURC, mean over the folds by their size."""
    return float(fold_aurc_parts(targets, uncertainty, loss).mean())


class ClassPredictor:
    """The mean probability of K members; its temperature and conformal quantile, one each per fold, come from dev.

    Args of all methods: outputs, the members' logits on test: (K, n), (K, n, C) of classes or (K, n, O) of labels.
    Logits of their mean are (n,), (n, C) or (n, O). A subclass says how one task combines and reads them.
    """

    scalings = (RAW, SCALED)

    def __init__(self, dev: np.ndarray, targets: HeldOutTargets) -> None:
        self.targets = targets
        logits, target = self.combine(dev), targets.dev
        scores = Conformal.fit(
            self.probabilities(logits), target, targets.task
        ).scores  # (n_dev,), (n_dev, O) of labels
        folds = [targets.dev_fold == f for f in range(targets.dev_fold.max() + 1)]
        self.temperature = np.array([calibration.fit_temperature(logits[rows], target[rows]) for rows in folds])
        self.quantile = {
            a: np.array([calibration.conformal_quantile(scores[rows], a) for rows in folds]) for a in targets.alphas
        }

    def logits(self, outputs: np.ndarray, scaling: str = RAW) -> np.ndarray:
        """Of the mean probability: log-odds, or of classes the logarithm; divided by the temperature or not."""
        logits = self.combine(outputs)
        temperature = self.temperature[self.targets.test_fold].reshape(-1, *[1] * (logits.ndim - 1))
        return logits / temperature if scaling == SCALED else logits

    def losses(self, outputs: np.ndarray, scaling: str = RAW) -> np.ndarray:
        """(n,) NLL, mean over labels."""
        return example_losses(self.logits(outputs, scaling)[None], self.targets.test, self.targets.task)[0]

    def ranking(self, outputs: np.ndarray, scaling: str = RAW) -> tuple[np.ndarray, np.ndarray]:
        """Uncertainty, in the order of minus the probability of what is said, and risk (n,)."""
        return self.order(self.logits(outputs, scaling))

    def measures(self, outputs: np.ndarray, scaling: str = RAW, floor: bool = False) -> Measures:
        """Everything of one predictor; the floors of the ECE take a hundred times as long as the rest."""
        logits, ranking = self.logits(outputs, scaling), self.ranking(outputs, scaling)
        found: Measures = {
            "NLL": float(self.losses(outputs, scaling).mean()),
            "Brier": self.brier(self.probabilities(logits)),
            "AURC": aurc_by_fold(self.targets, *ranking),
            "excess AURC": aurc_by_fold(self.targets, *ranking) - aurc_by_fold(self.targets, ranking[1], ranking[1]),
        }
        events = self.events(logits)
        for kind in ("width", "mass"):
            errors = [calibration.calibration_error(p, true, kind=kind) for p, true in events]
            found[f"ECE, equal {kind}"] = float(np.mean(errors))
            if floor:
                drawn = [calibration.calibration_error_floor(p, kind=kind, seed=o) for o, (p, _) in enumerate(events)]
                drawn = np.mean(drawn, 0)
                found[f"ECE, equal {kind}, floor"] = float(drawn.mean())
                found[f"ECE, equal {kind}, floor 95 %"] = float(np.quantile(drawn, 0.95))
        if scaling == RAW:  # the sets are those of the raw probabilities
            for alpha, quantile in self.quantile.items():
                sets = self.sets(self.probabilities(logits), quantile[self.targets.test_fold])
                found |= {f"{name} at {1 - alpha:g}": value for name, value in sets.items()}
        return found


class BinaryPredictor(ClassPredictor):
    """Of one label, or of several, each by itself: measures are then means over labels."""

    combine = staticmethod(calibration.ensemble_logits)
    probabilities = staticmethod(expit)

    def order(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Minus |logit|, in the order of -max(p, 1 - p) without its ties at 1, and errors; of labels, their means."""
        wrong = ((logits >= 0) != (self.targets.test == 1)).astype(np.float64)
        if logits.ndim == 1:
            return -np.abs(logits), wrong
        return -expit(np.abs(logits)).mean(1), wrong.mean(1)

    def brier(self, p: np.ndarray) -> float:
        """Mean squared error."""
        return float(np.square(p - self.targets.test).mean())

    def events(self, logits: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the ECE is of: each label's probability and whether it is there, (n,) each."""
        p, target = (x.reshape(len(x), -1).T for x in (expit(logits), self.targets.test))
        return list(zip(p, target, strict=True))

    def sets(self, p: np.ndarray, quantile: np.ndarray) -> dict[str, float]:
        """Summary of the conformal sets of each label, mean over those where it is defined."""
        columns = [x.reshape(len(x), -1).T for x in (p, self.targets.test, quantile)]
        summaries = np.array([calibration.set_summary(*label) for label in zip(*columns, strict=True)])  # (O, 6)
        defined = ~np.isnan(summaries)
        mean = np.where(defined, summaries, 0).sum(0) / np.where(defined.any(0), defined.sum(0), np.nan)
        return dict(zip(calibration.SetSummary._fields, mean.tolist(), strict=True))

    @staticmethod
    def disagreement(outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (n,) that should be larger where the input is corrupted; the last knows nothing of the members."""
        scores = {
            "mutual information": calibration.mutual_information(outputs),
            "std of logits": outputs.std(0),
            "entropy of the mean": calibration.binary_entropy(calibration.ensemble_logits(outputs)),
        }
        return {name: x if x.ndim == 1 else x.mean(1) for name, x in scores.items()}


class MulticlassPredictor(ClassPredictor):
    """Of one class among C."""

    combine = staticmethod(ensemble_log_probabilities)
    probabilities = staticmethod(partial(softmax, axis=-1))

    def order(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Minus the log-odds of the likeliest class, and errors."""
        return -likeliest_log_odds(logits), (logits.argmax(-1) != self.targets.test).astype(np.float64)

    def brier(self, p: np.ndarray) -> float:
        """Sum over classes of squared errors, mean over examples."""
        return float(np.square(p - np.eye(p.shape[1])[self.targets.test.astype(int)]).sum(1).mean())

    def events(self, logits: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the ECE is of: the likeliest class's probability and whether it is the right one, (n,) each."""
        uncertainty, wrong = self.order(logits)
        return [(expit(-uncertainty), 1 - wrong)]

    def sets(self, p: np.ndarray, quantile: np.ndarray) -> dict[str, float]:
        """Summary of the conformal sets."""
        return class_set_summary(p, self.targets.test, quantile)._asdict()

    @staticmethod
    def disagreement(outputs: np.ndarray) -> dict[str, np.ndarray]:
        """As `BinaryPredictor.disagreement`; of each example's logits less their mean, which no probability knows."""
        return {
            "mutual information": class_mutual_information(outputs),
            "std of logits": (outputs - outputs.mean(-1, keepdims=True)).std(0).mean(-1),
            "entropy of the mean": class_entropy(ensemble_log_probabilities(outputs)),
        }


class GaussianPredictor:
    """N(mean of K members, their variance + residual variance) per output; the latter, and intervals, come from dev.

    The residual variance is the mean squared error on dev less the members' mean variance there, at least a twentieth
    of the former. Args of all methods: outputs (K, n, O), in units of the target's standard deviation.
    """

    scalings = (RAW,)

    def __init__(self, dev: np.ndarray, targets: HeldOutTargets) -> None:
        self.targets = targets
        mean, variance = _moments(dev)
        residual = np.abs(targets.dev - mean)  # (n_dev, O)
        folds = [targets.dev_fold == f for f in range(targets.dev_fold.max() + 1)]
        square = np.stack([np.square(residual[rows]).mean(0) for rows in folds])  # (F, O)
        among = np.stack([variance[rows].mean(0) for rows in folds])
        self.noise = np.maximum(square - among, square / 20)
        self.quantile = {
            a: np.stack([calibration.conformal_quantile(residual[rows], a) for rows in folds]) for a in targets.alphas
        }

    def moments(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (n, O) of the predictive distribution."""
        mean, variance = _moments(outputs)
        return mean, variance + self.noise[self.targets.test_fold]

    def losses(self, outputs: np.ndarray, scaling: str = RAW) -> np.ndarray:
        """(n,) NLL, mean over outputs."""
        return calibration.gaussian_nll(self.targets.test, *self.moments(outputs)).mean(1)

    def ranking(self, outputs: np.ndarray, scaling: str = RAW) -> tuple[np.ndarray, np.ndarray]:
        """Uncertainty and risk (n,): the members' standard deviation and the absolute error, means over outputs."""
        mean, variance = _moments(outputs)
        return np.sqrt(variance).mean(1), np.abs(self.targets.test - mean).mean(1)

    def measures(self, outputs: np.ndarray, scaling: str = RAW, floor: bool = False) -> Measures:
        """Everything of one predictor; a member alone has no standard deviation, and so no order of its examples."""
        ranking = self.ranking(outputs)
        found: Measures = {"NLL": float(self.losses(outputs).mean()), "MAE": float(ranking[1].mean())}
        if len(outputs) > 1:
            best = aurc_by_fold(self.targets, ranking[1], ranking[1])
            found["AURC"] = aurc_by_fold(self.targets, *ranking)
            found["excess AURC"] = found["AURC"] - best
        residual = np.abs(self.targets.test - _moments(outputs)[0])
        for alpha, quantile in self.quantile.items():
            half = quantile[self.targets.test_fold]  # (n, O)
            name = f"at {1 - alpha:g}"
            found[f"coverage {name}"] = float((residual <= half).mean())
            found[f"width {name}"] = float(2 * half.mean())
            found[f"coverage by output {name}"] = (residual <= half).mean(0)
            found[f"width by output {name}"] = 2 * half.mean(0)
        return found

    @staticmethod
    def disagreement(outputs: np.ndarray) -> dict[str, np.ndarray]:
        """The score (n,) that should be larger where the input is corrupted."""
        return {"std of the members": np.sqrt(_moments(outputs)[1]).mean(1)}


def _moments(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = outputs.mean(0)
    return mean, outputs.var(0, ddof=1) if len(outputs) > 1 else np.zeros_like(mean)


PREDICTORS: dict[Task, type[ClassPredictor] | type[GaussianPredictor]] = {
    "binary": BinaryPredictor,
    "multiclass": MulticlassPredictor,
    "multilabel": BinaryPredictor,
    "regression": GaussianPredictor,
}


class MethodPredictors:
    """One row of a run: each of its S members alone, their ensemble, and the ensembles that lack one of them."""

    def __init__(self, dev: np.ndarray, targets: HeldOutTargets) -> None:
        kind = PREDICTORS[targets.task]
        seeds = range(len(dev))
        self.ensemble = kind(dev, targets)
        self.members = [kind(dev[[s]], targets) for s in seeds]
        self.lacking = [kind(np.delete(dev, s, 0), targets) for s in seeds]

    def measures(self, outputs: np.ndarray, floor: bool = False) -> dict[str, dict[str, Measures]]:
        """{"one member" or "ensemble": {"raw" or "scaled": {measure: value, of members (S, ...)}}}."""
        alone = {
            scaling: [m.measures(outputs[[s]], scaling, floor) for s, m in enumerate(self.members)]
            for scaling in self.ensemble.scalings
        }
        return {
            MEMBER: {
                scaling: {name: np.array([x[name] for x in found]) for name in found[0]}
                for scaling, found in alone.items()
            },
            ENSEMBLE: {scaling: self.ensemble.measures(outputs, scaling, floor) for scaling in self.ensemble.scalings},
        }

    def by_seed(self, outputs: np.ndarray, of: "Parts") -> np.ndarray:
        """What each seed and example adds to a mean over examples of the ensemble: (S, n), whose mean it is.

        The jackknife's pseudo-values over seeds: a + (S - 1) (mean_t a_-t - a_-s) with a_-s of the ensemble without s,
        moved to have the ensemble's own a as mean.
        """
        whole = of(self.ensemble, outputs)
        lacking = np.stack([of(p, np.delete(outputs, s, 0)) for s, p in enumerate(self.lacking)])  # (S, n)
        return whole + (len(lacking) - 1) * (lacking.mean(0) - lacking)

    def member_losses(self, outputs: np.ndarray) -> np.ndarray:
        """(S, n) NLL of every member alone."""
        return np.stack([m.losses(outputs[[s]]) for s, m in enumerate(self.members)])


Parts = Callable[[ClassPredictor | GaussianPredictor, np.ndarray], np.ndarray]
PARTS: dict[str, Parts] = {
    "NLL": lambda predictor, outputs: predictor.losses(outputs),
    "AURC": lambda predictor, outputs: fold_aurc_parts(predictor.targets, *predictor.ranking(outputs)),
}
