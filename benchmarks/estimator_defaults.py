"""Settings of the estimators compared on inner folds of training parts; what their defaults were chosen by.

    python -m benchmarks.estimator_defaults --data digits.npz --target digit --hold-out .2
    python -m benchmarks.estimator_defaults --data vectors.npz

The test and dev splits are never looked at: train is cut into folds, on which every setting is trained and scored, and
a support vector machine on the standardised concatenation beside.
"""

import sys
import time
from dataclasses import dataclass, field

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mmfusion.cli import run_command
from mmfusion.data.arrays import ArraysConfig, load_arrays
from mmfusion.dataset import Split
from mmfusion.errors import InputError
from mmfusion.estimators import FusionClassifier

LAST = {"annealing": "cosine", "keep": "last", "epochs": 20}
SETTINGS: dict[str, dict[str, object]] = {
    "best epoch, certain latents, whole features": {"noise": "none", "feature_dropout": 0.0},
    **{f"best epoch, feature dropout {rate:g}": {"feature_dropout": rate} for rate in (0.0, 0.5, 0.8)},
    **{f"last of 20 epochs, feature dropout {rate:g}": LAST | {"feature_dropout": rate} for rate in (0.5, 0.8)},
}


@dataclass(frozen=True)
class Config:
    """Compare settings of FusionClassifier on inner folds of a file's training part."""

    data: ArraysConfig = field(default_factory=ArraysConfig)
    inner_folds: int = 5
    """folds of the training part"""
    used_folds: int = 5
    """how many of them are trained on"""
    members: int = 3
    """members of each ensemble"""


def scores(y: np.ndarray, p: np.ndarray) -> str:
    """Accuracy, log loss and (two classes) AUROC of probabilities (N, C)."""
    auroc = f"  AUROC {roc_auc_score(y, p[:, 1]):.4f}" if p.shape[1] == 2 else ""
    return f"accuracy {(p.argmax(1) == y).mean():.4f}  log loss {log_loss(y, p):.4f}{auroc}"


def training_part(config: ArraysConfig) -> Split:
    """All that may be looked at. Raises InputError for a target that is no class."""
    dataset = load_arrays(config)[0]
    if dataset.task not in ("binary", "multiclass"):
        raise InputError(f"{config.data}: holds a {dataset.task} target; the comparison is of classifiers")
    return dataset.splits["train"]


def main(config: Config) -> None:
    """Print a line for every setting, as soon as it is known."""
    split = training_part(config.data)
    features, y = {name: x.numpy() for name, x in split.features.items()}, split.target.numpy().astype(int)
    cuts = list(StratifiedKFold(config.inner_folds, shuffle=True, random_state=1).split(y, y))[: config.used_folds]
    tested = np.concatenate([test for _, test in cuts])
    together = np.concatenate(list(features.values()), 1)
    machine = make_pipeline(StandardScaler(), CalibratedClassifierCV(SVC(), ensemble=False))
    found = np.concatenate([machine.fit(together[a], y[a]).predict_proba(together[b]) for a, b in cuts])
    print(f"{len(y)} examples, {len(features)} modalities, {len(cuts)} of {config.inner_folds} folds")
    print(f"{'SVM on the concatenation':48} {scores(y[tested], found)}", flush=True)
    for label, settings in SETTINGS.items():
        started, parts = time.perf_counter(), []
        for a, b in cuts:
            model = FusionClassifier(n_members=config.members, random_state=0, **settings)
            model.fit({name: x[a] for name, x in features.items()}, y[a])
            parts.append(model.predict_proba({name: x[b] for name, x in features.items()}))
        seconds = (time.perf_counter() - started) / len(cuts)
        print(f"{label:48} {scores(y[tested], np.concatenate(parts))}  {seconds:.0f} s a fit", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, Config, sys.argv[1:]))
