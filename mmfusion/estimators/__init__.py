"""jWAE-LMF as scikit-learn estimators: all members are trained at once, their mean predicts.

model = FusionClassifier().fit({"audio": x, "video": z}, y)      # a dict, a list, or one array with column slices
model.predict_proba(new), model.certified_radius(new), model.explain(new)
model.predict(new, coverage=0.9), model.predict_missing({"audio": x})
"""

from mmfusion.data.modalities import ALL, Modalities
from mmfusion.estimators.base import EPOCHS, PATIENCE, VALIDATION_FRACTION, Explained
from mmfusion.estimators.classifier import FusionClassifier
from mmfusion.estimators.regressor import FusionRegressor

__all__ = [
    "ALL",
    "EPOCHS",
    "PATIENCE",
    "VALIDATION_FRACTION",
    "Explained",
    "FusionClassifier",
    "FusionRegressor",
    "Modalities",
]
