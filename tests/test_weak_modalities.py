"""experiments.weak_modalities: who is weakest and who chooses it, what is left out, verdicts both ways."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_modality_dropout import small_study

from experiments.experiment import Options, Run, contrasts_on_test
from experiments.weak_modalities import (
    EXPERIMENT,
    WeakResult,
    differences,
    weakest_counts,
    with_noise_modality,
)
from mmfusion.metrics.verdicts import verdict_of

NAMES = ("a", "b", "c")
FOLDS = 5


def made_result(gain, noise=0.0, spread=0.001):
    """Folds in which c is the weakest on dev; without it the test score is that much higher than with all."""
    rng = np.random.default_rng(0)

    def values(mean):
        return mean + spread * rng.normal(size=(1, FOLDS))

    alone = {"a": values(0.8), "b": values(0.7), "c": values(0.6)}
    test = {name: values(0.7) for name in NAMES}  # on test all are alike: only dev tells them apart
    test |= {"b+c": values(0.7), "a+c": values(0.79), "a+b": values(0.8 + gain), "a+b+c": values(0.8)}
    test["a+b+c+noise"] = values(0.8 - noise)
    both = ("auroc", "log_loss")
    return WeakResult(NAMES, "noise", dict.fromkeys(both, alone | {"a+b+c": values(0.8)}), dict.fromkeys(both, test))


@pytest.mark.parametrize(("gain", "wanted"), [(0.05, "supported"), (0.0, "not supported"), (-0.05, "not supported")])
def test_verdict_is_about_the_modality_that_is_weakest_on_dev(gain, wanted):
    result = made_result(gain, noise=0.03)
    contrasts = contrasts_on_test(small_study(folds=FOLDS), *differences(result))
    assert verdict_of(contrasts) == wanted
    of = {c.name: c for c in contrasts}
    assert [name for name, c in of.items() if c.decides] == [
        "AUROC: without the weakest over all",
        "log loss: without the weakest over all",
    ]
    assert of["AUROC: without the weakest over all"].estimate == pytest.approx(gain, abs=0.002)
    assert of["AUROC: all over without the strongest"].estimate == pytest.approx(0.1, abs=0.002)
    assert of["AUROC: all over all and noise"].verdict == "supported"
    assert weakest_counts(result) == {word: {"a": 0, "b": 0, "c": FOLDS} for word in ("AUROC", "log loss")}


def test_a_spread_that_hides_the_gain_leaves_the_question_open():
    contrasts = contrasts_on_test(small_study(folds=FOLDS), *differences(made_result(0.02, spread=0.05)))
    assert verdict_of(contrasts) == "cannot tell"


def test_the_weakest_may_be_another_in_every_fold():
    result = made_result(0.05)
    dev = {name: x.copy() for name, x in result.dev["auroc"].items()}
    dev["a"][0, 2] = 0.1
    other = replace(result, dev={"auroc": dev}, test={"auroc": result.test["auroc"]})
    assert weakest_counts(other)["AUROC"] == {"a": 1, "b": 0, "c": FOLDS - 1}
    (name, difference), *_ = differences(other)[0].items()
    test = result.test["auroc"]
    assert name == "AUROC: without the weakest over all"
    np.testing.assert_allclose(difference.values[0, 2], (test["b+c"] - test["a+b+c"])[0, 2])
    np.testing.assert_allclose(difference.values[0, 3], (test["a+b"] - test["a+b+c"])[0, 3])


def test_noise_is_one_modality_more_as_wide_as_the_widest_under_a_free_name():
    data = small_study(("audio", "text"))
    wide = with_noise_modality(data)
    assert wide.input_dims == {"audio": 5, "noise": 6, "text": 6} and list(wide.pool.features) == list(wide.input_dims)
    assert wide.pool.features["text"] is data.pool.features["text"] and wide.folds is data.folds
    assert torch.equal(with_noise_modality(data).pool.features["noise"], wide.pool.features["noise"])
    assert "noise_" in with_noise_modality(wide).input_dims


@pytest.mark.parametrize(
    ("names", "outputs", "folds", "seeds"), [(("audio", "text", "video"), None, 3, 1), (("image", "text"), 3, 2, 2)]
)
def test_a_small_study_ends_in_a_verdict(tmp_path, monkeypatch, names, outputs, folds, seeds):
    trained = []
    grid = Run.grid
    monkeypatch.setattr(
        Run,
        "grid",
        lambda self, data, *rest: trained.append(tuple(data.input_dims)) or grid(self, data, *rest),
    )
    data = small_study(names, outputs, folds)
    outcome = EXPERIMENT.measure(data, Run(Options(seeds=seeds, epochs=2), tmp_path, torch.device("cpu")))
    assert outcome.verdict in ("supported", "not supported", "cannot tell")
    assert len(set(trained)) == len(trained) == (8 if len(names) == 3 else 4)  # what is left out is not there at all
    assert len(outcome.contrasts) == 2 * (3 + len(names))
    numbers = json.loads(json.dumps(outcome.numbers, allow_nan=False))
    word = "AUROC" if outputs is None else "MAE / std"
    assert len(numbers["test"][word]) == len(trained)
    assert sum(numbers["folds in which it is the weakest"][word].values()) == folds
    assert all(text in outcome.table for text in numbers["test"][word]) and "noise" in outcome.answer
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))
