"""Linear probes of latents: what a linear model, fitted on one part of the data, makes of them on another."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RIDGE = 1.0  # on standardised latents: far below the number of examples

Arrays = Mapping[str, np.ndarray]


def probe_score(latents: Arrays, target: np.ndarray, dev_latents: Arrays, dev_target: np.ndarray) -> float:
    """AUROC (two classes) or accuracy on dev of a logistic regression on all modalities' latents.

    Args:
        latents, dev_latents: (n, L) by modality; fitted on the first, scored on the second.
        target, dev_target: (n,) class numbers.

    Raises ValueError, as scikit-learn does, for a single class.
    """
    x, y = _joined(latents, sorted(latents)), _joined(dev_latents, sorted(latents))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, target)
    if len(probe.classes_) == 2:
        return float(roc_auc_score(dev_target, probe.decision_function(y)))
    return float((probe.predict(y) == dev_target).mean())


def unique_share(features: Arrays, latents: Arrays, dev_features: Arrays, dev_latents: Arrays) -> float:
    """What a modality's latents say of its features and the others' do not, mean over modalities.

    R^2 on dev of a modality's features by ridge regression on all latents, less R^2 by the latents of the others alone.
    0 where these say all that its own do, whether latents are equal or say nothing; below 0 by chance. At most 1, but
    where the others' R^2 is negative: a regression on more latents than examples says less than the mean.

    Args:
        features, dev_features: (n, d_m) by modality; R^2 pools the columns, each in units of its deviation in training.
        latents, dev_latents: (n, L) by modality; fitted on the first, scored on the second.
    """

    def explained(name: str, sources: Sequence[str]) -> float:
        scale = StandardScaler().fit(features[name])
        x, found = scale.transform(features[name]), scale.transform(dev_features[name])
        fitted = make_pipeline(StandardScaler(), Ridge(RIDGE)).fit(_joined(latents, sources), x)
        errors = fitted.predict(_joined(dev_latents, sources)) - found
        return 1 - float(np.square(errors).sum() / np.square(found - found.mean(0)).sum())

    names = sorted(latents)
    gains = [explained(one, names) - explained(one, [name for name in names if name != one]) for one in names]
    return float(np.mean(gains))


def _joined(latents: Arrays, names: Sequence[str]) -> np.ndarray:
    return np.concatenate([latents[name] for name in names], axis=1)
