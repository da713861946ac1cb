"""experiments.modality_count: what is averaged at each size, against loops; the shape of a fall that is known."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_alignment_experiment import toy

from experiments import modality_count
from experiments.experiment import Outcome, Run
from experiments.modality_count import CountOptions, check, measure, recall, shape_of_fall, trained_on
from mmfusion.errors import InputError

SMALL = {"device": "cpu", "seeds": 2, "epochs": 2, "hidden_dim": 8, "width": 4}


def new_run(folder: Path) -> Run:
    (folder / "checkpoints").mkdir()
    return Run(CountOptions(**SMALL), folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    return measure(toy(), new_run(tmp_path_factory.mktemp("run")))


def test_every_size_is_the_mean_over_all_its_subsets(outcome, tmp_path):
    data, run = toy(), new_run(tmp_path)
    of_pairs = [recall(data, trained_on(data, run, "pairs", pair), pair) for pair in itertools.combinations("abc", 2)]
    found = outcome.numbers["R@1"]
    np.testing.assert_allclose(found["pairs"]["2"], np.mean(of_pairs, (0, 2)), atol=1e-6)
    assert found["hub"]["2"] == found["pairs"]["2"], "of two modalities the forms are one"
    hub = recall(data, trained_on(data, run, "hub", tuple("abc")), tuple("abc"))
    np.testing.assert_allclose(found["hub"]["3"], hub.mean(1), atol=1e-6)
    assert found["hub"]["3"] != found["pairs"]["3"]


def test_contrasts_are_of_sizes_and_forms(outcome):
    found = outcome.numbers["R@1"]
    falls, hub = outcome.contrasts
    sizes = [len(fold.test) for fold in toy().folds]
    # folds weigh alike in the estimate, examples in the table
    for one, difference in (
        (falls, np.mean(found["pairs"]["2"]) - np.mean(found["pairs"]["3"])),
        (hub, np.mean(found["hub"]["3"]) - np.mean(found["pairs"]["3"])),
    ):
        assert one.estimate == pytest.approx(np.mean(one.fold_values))
        assert np.average(one.fold_values, weights=sizes) == pytest.approx(difference, abs=1e-6)


def test_recall_is_of_the_subset_alone(tmp_path):
    data, run = toy(folds=1), new_run(tmp_path)
    ensemble = trained_on(data, run, "pairs", ("a", "c"))
    assert ensemble.members[0].modalities == ("a", "c")
    expected = []
    for member in ensemble.members:
        with torch.no_grad():
            z = member.encode({name: data.pool.features[name][data.folds[0].test] for name in "ac"})
        x, y = (torch.nn.functional.normalize(v, dim=-1) for v in z.values())
        nearest = (x @ y.T).argmax(1), (y @ x.T).argmax(1)
        expected.append(np.mean([(n == torch.arange(30)).float().numpy() for n in nearest], 0))
    np.testing.assert_allclose(recall(data, ensemble, ("a", "c")), expected)


def curve(values: np.ndarray) -> dict[int, np.ndarray]:
    noise = np.random.default_rng(0).normal(0, 1e-3, (5, 5))
    return {m: values[m - 2] + noise[m - 2] for m in range(2, 7)}


def test_shape_of_a_fall_is_told_where_it_can_be():
    sizes = np.arange(2, 7)
    assert "a line fits better" in shape_of_fall(curve(0.5 - 0.1 * (sizes - 2)))
    assert "an exponential fits better" in shape_of_fall(curve(0.5 * np.exp(-0.8 * (sizes - 2))))
    assert "cannot be told apart" in shape_of_fall(curve(0.5 - 0.0 * sizes))
    assert "three sizes or fewer" in shape_of_fall({2: np.ones(3), 3: np.ones(3), 4: np.ones(3)})


def test_more_modalities_than_subsets_can_be_trained_of_are_one_line(monkeypatch):
    monkeypatch.setattr(modality_count, "MOST", 2)
    with pytest.raises(InputError, match=r"toy: has 3 modalities; choose 3 to 2 by --modalities"):
        check(toy(), CountOptions())
    with pytest.raises(InputError, match=r"--width 0"):
        check(toy(), CountOptions(width=0))
