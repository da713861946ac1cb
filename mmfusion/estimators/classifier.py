"""Two classes, more classes, or several labels."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from mmfusion.data.modalities import Modalities
from mmfusion.estimators.base import (
    EPOCHS,
    PATIENCE,
    VALIDATION_FRACTION,
    FusionEstimator,
)
from mmfusion.metrics.conformal import LabelSets
from mmfusion.models.fusion import ModelConfig
from mmfusion.models.missing import Missing
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig


class FusionClassifier(ClassifierMixin, FusionEstimator):
    """jWAE-LMF for two classes, more classes, or several labels; arguments as `FusionEstimator`, and

    class_weight: None; "balanced": every class weighs alike in the fit; or {class: weight} (1 for those not named).
    """

    def __init__(
        self,
        *,
        modalities: Mapping[str, slice | Sequence[int]] | None = None,
        latent_dim: int = ModelConfig.latent_dim,
        hidden_dim: int = ModelConfig.hidden_dim,
        rank: int = ModelConfig.rank,
        noise: str = ModelConfig.noise,
        n_members: int = TrainingConfig.seeds,
        epochs: int = EPOCHS,
        patience: int = PATIENCE,
        batch_size: int | str = "auto",
        learning_rate: float = TrainingConfig.learning_rate,
        weight_decay: float = TrainingConfig.weight_decay,
        modality_dropout: float = TrainingConfig.modality_dropout,
        feature_dropout: float = TrainingConfig.feature_dropout,
        annealing: str = TrainingConfig.annealing,
        keep: str = TrainingConfig.keep,
        mmd_weight: float = ObjectiveConfig.mmd_weight,
        reconstruction_weight: float = ObjectiveConfig.reconstruction_weight,
        alignment_weight: float = ObjectiveConfig.alignment_weight,
        alignment: str = ObjectiveConfig.alignment,
        validation_fraction: float = VALIDATION_FRACTION,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        class_weight: str | Mapping[object, float] | None = None,
    ) -> None:
        settings = dict(locals())
        for name in ("self", "__class__", "class_weight"):
            settings.pop(name)
        super().__init__(**settings)
        self.class_weight = class_weight

    def fit(self, X: Modalities, y: np.ndarray) -> "FusionClassifier":
        """Train on X and y (N,) of any labels, or (N, O) of 0 and 1. Raises ValueError as scikit-learn does."""
        named = isinstance(self.class_weight, Mapping)
        if not named and self.class_weight not in (None, "balanced"):
            raise ValueError(f'class_weight is None, "balanced" or a dict, not {self.class_weight!r}')
        features, y = self._checked(X, y)
        check_classification_targets(y)
        if y.ndim == 2:
            if not np.isin(y, (0, 1)).all():
                raise ValueError("y with several columns is of labels that are there or not: 0 and 1 alone")
            self.classes_ = np.array([0, 1])
            task, target, names = "multilabel", y.astype(np.float32), ("absent", "present")
        else:
            self.classes_, numbers = np.unique(y, return_inverse=True)
            if len(self.classes_) < 2:
                raise ValueError(f"y holds one class alone ({self.classes_.tolist()[0]!r}); a classifier needs two")
            task = "binary" if len(self.classes_) == 2 else "multiclass"
            target, names = numbers.astype(np.float32), tuple(map(str, self.classes_))
        weights = None
        if named:
            if y.ndim == 2:
                raise ValueError('class_weight of several labels is None or "balanced"')
            weights = torch.tensor([float(self.class_weight.get(label, 1.0)) for label in self.classes_.tolist()])
        self._fit(features, torch.from_numpy(target), task, names, self.class_weight == "balanced", weights)
        return self

    def predict_proba(self, X: Modalities, missing: Missing = "error") -> np.ndarray:
        """Mean over members: (N, C) of the classes in the order of `classes_`; of labels (N, O) of presence.

        `missing`: as for `predict_missing`, whose expected probabilities these then are; "error" refuses.
        """
        p = self._predict(X, missing).double().mean(0).numpy()
        if self.ensemble_.task == "multiclass":
            return p / p.sum(1, keepdims=True)  # float32 sums to 1 within 1e-7, and log_loss of scikit-learn minds
        return np.stack([1 - p, p], 1) if self.ensemble_.task == "binary" else p

    def predict(
        self, X: Modalities, missing: Missing = "error", coverage: float | None = None
    ) -> np.ndarray | LabelSets:
        """The likeliest class (N,), or for labels (N, O) of 0 and 1.

        Args:
            missing: as for `predict_missing`, whose expected probabilities then decide; "error" refuses.
            coverage: for instance .9: sets that hold the target with that probability, and where to abstain because a
                set does not hold exactly one class, as `LabelSets`; `calibrate` says what that rests on.
        """
        if coverage is not None:
            conformal, p = self._calibrated(missing), self._predict(X).double().mean(0).numpy()
            return conformal.label_sets(p, coverage)._replace(prediction=self._likeliest(self.predict_proba(X)))
        return self._likeliest(self.predict_proba(X, missing))

    def _target_numbers(self, y: np.ndarray) -> np.ndarray:
        """Labels as in `mmfusion.dataset.Split`."""
        y = np.asarray(y)
        if not np.isin(y, self.classes_).all():
            raise ValueError(f"y holds labels that fit did not see: it saw {self.classes_.tolist()[:20]}")
        return y if self.ensemble_.task == "multilabel" else np.searchsorted(self.classes_, y.ravel())

    def _likeliest(self, p: np.ndarray) -> np.ndarray:
        return (p >= 0.5).astype(int) if self.ensemble_.task == "multilabel" else self.classes_[p.argmax(1)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
