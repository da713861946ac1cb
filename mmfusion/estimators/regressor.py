"""One value or several."""

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_array

from mmfusion.data.modalities import Modalities
from mmfusion.estimators.base import FusionEstimator
from mmfusion.metrics.conformal import Intervals
from mmfusion.models.missing import Missing


class FusionRegressor(RegressorMixin, FusionEstimator):
    """jWAE-LMF for one value or several; trained on the absolute error. Arguments as `FusionEstimator`."""

    def fit(self, X: Modalities, y: np.ndarray) -> "FusionRegressor":
        """Train on X and y, (N,) or (N, O). Raises ValueError as scikit-learn does."""
        features, y = self._checked(X, y, numeric=True)
        self._fit(features, torch.from_numpy(y.astype(np.float32)), "regression", ())
        return self

    def predict(
        self, X: Modalities, missing: Missing = "error", coverage: float | None = None
    ) -> np.ndarray | Intervals:
        """Mean over members, (N,) or (N, O).

        Args:
            missing: as for `predict_missing`, whose expected values these then are; "error" refuses.
            coverage: for instance .9: intervals that hold the target with that probability (of several outputs, each
                output's own), as `Intervals`; `calibrate` says what that rests on.
        """
        values = self._predict(X, missing).double().mean(0).numpy()
        return values if coverage is None else self._calibrated(missing).intervals(values, coverage)

    def _target_numbers(self, y: np.ndarray) -> np.ndarray:
        return check_array(y, dtype=np.float64, ensure_2d=False, input_name="y")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
