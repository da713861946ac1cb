"""The benchmark of the objective's weights trains what it says."""

import numpy as np
import torch

from benchmarks.objective_weights import DEFAULT, measure, settings
from mmfusion.dataset import Split


def split(seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(40, 4, generator=generator) for name in ("image", "text")}
    return Split(features, (features["image"][:, 0] > 0).float(), [str(i) for i in range(40)])


def test_every_weight_is_scored_from_the_same_initial_values_and_pulls_or_does_not():
    assert settings()[0] == DEFAULT and all(s != DEFAULT for s in settings()[1:])
    found = measure(split(0), split(1), seeds=2, epochs=2)
    assert found.shape == (len(settings()), 2, 3) and np.isfinite(found).all()
    for term in ("mmd", "reconstruction", "margin", "alignment"):
        changed = [i for i, setting in enumerate(settings()) if setting[term] != DEFAULT[term]]
        assert changed and all((found[i, :, 1:] != found[0, :, 1:]).any() for i in changed), term
