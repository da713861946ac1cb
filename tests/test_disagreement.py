"""The class that the mean probability decides for, where the mean logit that is taken apart speaks against it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmfusion.data.arrays import ArraysConfig
from mmfusion.explain.explainer import Choices, Explainer
from mmfusion.explain.text import sentence
from mmfusion.models.fusion import ModelConfig
from mmfusion.train import Config, Run, fit
from mmfusion.training.fit import Method
from mmfusion.training.recipe import TrainingConfig

FAR_OFF = 50.0


@pytest.fixture(params=[2, 3], ids=["two classes", "three classes"])
def run(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Three seeds whose constants decide: two say the last class with a logit of 3, one says the first with 50."""
    monkeypatch.chdir(tmp_path)
    rng, classes = np.random.default_rng(0), request.param
    arrays = {"a": rng.normal(size=(60, 3)), "b": rng.normal(size=(60, 2)), "target": np.arange(60) % classes}
    training = TrainingConfig(seeds=3, epochs=1, device="cpu")
    config = Config(ArraysConfig(hold_out=0.2), training, ModelConfig(4, 8, 2))
    found = fit(arrays, config, [[Method("jWAE-LMF", ("a", "b"), active_rank=2)]])
    with torch.no_grad():
        for member, height in zip(found.ensemble.members, (3.0, 3.0, -FAR_OFF), strict=True):
            bias = [height] if classes == 2 else [0.0, -FAR_OFF, height]
            member.fusion.bias.copy_(torch.tensor(bias))
    return found


def test_the_row_says_that_the_mean_points_elsewhere(run):
    test = run.trained.datasets[0].splits["test"].features
    decided = run.predict_proba(test)
    last = decided if decided.ndim == 1 else decided[:, 2]
    assert (last > 0.6).all()  # two of three seeds
    account = run.explain(test)
    assert (account.prediction.mean(0) < -10).all() and account.seeds_disagree.all()
    if decided.ndim > 1:
        assert (account.pairs == [2, 0]).all()
    explained = Explainer(run.trained, Choices(), "cpu").explain_places([("test", 0), ("test", 5)])
    assert all("The seeds disagree: their mean" in sentence(explained, row) for row in range(2))


def test_seeds_of_one_opinion_or_of_like_strength_do_not(run):
    test = run.trained.datasets[0].splits["test"].features
    for heights in ((3.0, 3.0, 3.0), (3.0, 3.0, -3.0), (-3.0, -3.0, -3.0)):
        with torch.no_grad():
            for member, height in zip(run.ensemble.members, heights, strict=True):
                member.fusion.bias[-1] = height
        account = run.explain(test)
        assert not account.seeds_disagree.any()
        explained = Explainer(run.trained, Choices(), "cpu").explain_places([("test", 0)])
        assert "disagree" not in sentence(explained, 0)
