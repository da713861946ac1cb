"""The four numbers of the latents and the two of their means; what a run says of them."""

import json

import numpy as np
import pytest
import torch

from mmfusion.data.arrays import ArraysConfig
from mmfusion.metrics.prior import NUMBERS, carried_dimension, check_prior
from mmfusion.models.fusion import ModelConfig
from mmfusion.train import Config, fit
from mmfusion.training.feed import step_directions
from mmfusion.training.fit import Method, _members
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_draws_of_the_prior_pass_in_98_of_100_cases_each_number():
    held = np.array([[n.holds for n in check_prior(normal(200, 8, seed=s)).follows.values()] for s in range(300)])
    assert held.shape == (300, 4) and (abs(held.mean(0) - 0.98) < 0.03).all()


@pytest.mark.parametrize(
    ("latents", "wrong"),
    [
        (normal(500, 8) * 1.5, "mean |std - 1|"),
        (normal(500, 8) * np.array([3, *[1] * 7]), "largest eigenvalue"),
        (normal(500, 8) * np.array([*[1] * 4, *[0.1] * 4]), "effective dimension"),
        (normal(500, 8) + 2, "share in the 95 % ball"),
        (np.outer(normal(500), np.ones(8)), "effective dimension"),
    ],
)
def test_each_number_sees_what_it_is_for(latents, wrong):
    check = check_prior(latents)
    assert not check.follows[wrong].holds and not check.enforced


def test_what_the_means_carry_is_told_from_noise():
    silent = check_prior(np.zeros((500, 8)), np.ones(8))
    assert silent.enforced and silent.dimension_of_means == 0 and silent.share_of_means == 0
    half = check_prior(normal(2000, 8) * np.array([1, 1, 1, 1, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    assert half.enforced and abs(half.dimension_of_means - 4) < 0.1 and abs(half.share_of_means - 0.5) < 0.02
    certain = check_prior(normal(2000, 8))
    assert certain.share_of_means == 1 and certain.dimension_of_means > 7.5


def test_other_shapes_are_refused():
    for wrong in (np.zeros(5), np.zeros((1, 4))):
        with pytest.raises(ValueError, match="means must be"):
            check_prior(wrong)


def test_a_run_prints_keeps_and_reaches_the_moments_on_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(240, 6)), "b": rng.normal(size=(240, 5))}
    arrays["target"] = (arrays["a"][:, 0] * arrays["b"][:, 0] > 0).astype(int)
    training = TrainingConfig(seeds=2, epochs=3, batch_size=16, learning_rate=1e-2, device="cpu")
    run = fit(arrays, Config(ArraysConfig(hold_out=0.25), training, ModelConfig(4, 8, 2)))
    reports = run.results["prior"]
    assert {(one["modality"], one["split"]) for one in reports} == {
        (name, split) for name in "ab" for split in run.trained.datasets[0].splits
    }
    for one in reports:
        assert list(one["numbers"]) == list(NUMBERS) and all(len(values) == 2 for values in one["numbers"].values())
        if one["split"] == "train":
            assert max(one["numbers"]["mean |std - 1|"]) < one["ranges"]["mean |std - 1|"][1]
            assert max(one["numbers"]["largest eigenvalue"]) < 2
    said = capsys.readouterr().out
    assert "do the latents follow N(0, I)?" in said and "a train" in said and "of 2 seeds" in said
    for member in run.ensemble.members:
        features = run.trained.datasets[0].splits["train"].features
        z = member.latents(features)[0]
        total = z.T.cov().diagonal() + member.latent_variances()[0]
        np.testing.assert_allclose(total.detach().numpy(), 1, atol=1e-4)


@pytest.mark.parametrize("name", ["bures", "sliced", "characteristic"])
def test_a_further_penalty_is_trained_logged_and_off_in_the_row_without_a_prior(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(160, 6)), "b": rng.normal(size=(160, 5))}
    arrays["target"] = (arrays["a"][:, 0] * arrays["b"][:, 0] > 0).astype(int)
    training = TrainingConfig(seeds=1, epochs=6, batch_size=32, learning_rate=1e-2, keep="last", device="cpu")
    last = {}
    for weight in (0.0, 3.0):
        objective = ObjectiveConfig(**{f"{name}_weight": weight})
        run = fit(arrays, Config(ArraysConfig(hold_out=0.25), training, ModelConfig(4, 8, 2), objective))
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines if '"loss"' in line]
        last[weight] = [r for r in records if "rank" in str(r)]
        assert (name in json.dumps(last[weight])) == bool(weight)
    first, final = (np.mean(last[3.0][i]["loss"][name]) for i in (0, -1))
    assert final < first, "the latents come nearer"
    methods = [Method("on", ("a", "b"), active_rank=2), Method("off", ("a", "b"), active_rank=2, prior=False)]
    weights = objective.loss_weights("binary", ("a", "b"))
    members = _members(methods, weights, training, 1)
    assert [member.loss_weights[name] for member in members] == [3.0, 0.0]
    assert [member.loss_weights["mmd"] for member in members] == [1.0, 0.0]


def test_directions_are_those_of_the_seed_epoch_and_step_and_of_no_companion():
    one = step_directions(0, 1, 2, (5, 3))
    assert one.shape == (5, 3) and torch.equal(one, step_directions(0, 1, 2, (5, 3)))
    others = [step_directions(*key, (5, 3)) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert not any(torch.equal(one, other) for other in others)


def test_a_penalty_along_directions_trains_a_member_alike_alone_and_beside_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(120, 6)), "b": rng.normal(size=(120, 5)), "target": rng.integers(0, 2, 120)}
    found = []
    for seeds in (1, 2):
        training = TrainingConfig(seeds=seeds, epochs=3, batch_size=32, keep="last", device="cpu")
        objective = ObjectiveConfig(characteristic_weight=1.0, sliced_weight=0.5)
        run = fit(arrays, Config(ArraysConfig(hold_out=0.25), training, ModelConfig(4, 8, 2), objective))
        found.append(run.ensemble.members[0].state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-5)


def test_the_dimension_that_latents_carry_is_one_of_no_coordinates():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4000, 6)) * np.array([3, 3, 0.1, 0, 0, 0])
    variances = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = carried_dimension(means, variances)
    assert found == pytest.approx(2.02, abs=0.03), "two directions above the noise; the third is noise to 99 %"
    scale = rng.uniform(0.1, 10, 6)
    assert carried_dimension(means * scale + 5, variances * scale**2) == pytest.approx(found, rel=1e-9)
    # a rotation of coordinates of equal noise
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert carried_dimension(means @ rotation, variances) == pytest.approx(found, rel=1e-9)
    assert carried_dimension(np.ones((5, 3)), np.ones(3)) == carried_dimension(np.ones((5, 3))) == 0
    by_hand = np.array([1.0, 1.0, 1 / 9])  # without noise: as it stands
    wide = rng.normal(size=(200_000, 3)) * np.sqrt(by_hand)
    assert carried_dimension(wide) == pytest.approx(by_hand.sum() ** 2 / np.square(by_hand).sum(), rel=0.02)
