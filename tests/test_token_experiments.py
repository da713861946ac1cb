"""The two experiments on tokens: can they say yes, can they say no, and is each condition what it says?"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import planted_tokens, temporal, wma
from experiments.experiment import Run
from experiments.planted_tokens import planted_steps
from experiments.token_rows import (
    foreign_tokens,
    gaussian_noise,
    hidden,
    predictions_on_test,
    shuffled_steps,
    train_rows,
)
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.errors import InputError
from mmfusion.sequences import Sequences


def study(count: int = 240, seed: int = 0, size: float = 2.0) -> FoldedDataset:
    """Two classes by the sign of a channel's mean in one modality times that in the other; 2 to 6 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, count), generator=generator).float() * 2 - 1
    features = {}
    for name, sign in zip(("a", "b"), signs, strict=True):
        lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
        tokens = [torch.randn(length, 6, generator=generator) for length in lengths]
        for part, s in zip(tokens, sign, strict=True):
            part[:, 0] += size * s
        features[name] = Sequences(tokens)
    order = torch.arange(count)
    fold = Fold(order[: count // 2], order[count // 2 : 3 * count // 4], order[3 * count // 4 :])
    pool = Split(features, (signs[0] * signs[1] > 0).float(), [str(k) for k in range(count)])
    return FoldedDataset("toy", "binary", pool, [fold], [], {})


def run_of(options, folder) -> Run:
    run = Run(options, folder, torch.device("cpu"))
    run.checkpoints.mkdir()
    return run


def test_steps_that_must_meet_in_time_are_found_and_means_say_nothing_of_them(tmp_path):
    planted = planted_steps(study())
    outcome = temporal.measure(planted, run_of(temporal.TemporalOptions(seeds=3), tmp_path))
    by_name = {contrast.name: contrast for contrast in outcome.contrasts}
    assert outcome.verdict == "supported"
    assert by_name["diagonal over uniform"].low > 0.2 and by_name["diagonal over shuffled"].low > 0.2
    assert np.mean(outcome.numbers["diagonal"]["share of the interaction"]) > 0.8


def test_where_means_say_everything_no_coupling_is_better_and_the_verdict_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(planted_tokens, "PLANTED", 64)  # its own test stands above
    outcome = temporal.measure(study(320, size=5.0), run_of(temporal.TemporalOptions(seeds=2, epochs=40), tmp_path))
    assert outcome.verdict != "supported"
    uniform, diagonal = (np.mean(outcome.numbers[name]["scores"]["accuracy"]) for name in ("uniform", "diagonal"))
    assert uniform > 0.75 and uniform >= diagonal - 0.05
    assert "uniform" in outcome.table and "Planted control" in outcome.answer


def test_vectors_and_single_steps_are_refused():
    data = study()
    vectors = {name: x.pooled() for name, x in data.pool.features.items()}
    with pytest.raises(InputError, match="pairs of steps"):
        temporal.check(replace(data, pool=replace(data.pool, features=vectors)))
    with pytest.raises(InputError, match="no tokens"):
        wma.check(replace(data, pool=replace(data.pool, features=vectors)))
    single = {name: Sequences([part[:1] for part in x]) for name, x in data.pool.features.items()}
    with pytest.raises(InputError, match="one step"):
        temporal.check(replace(data, pool=replace(data.pool, features=single)))


def test_damage_is_what_it_says():
    split = study().pool
    empty = hidden("a")(split, 0).features
    assert all(len(part) == 0 for part in empty["a"]) and empty["b"] is split.features["b"]
    ones = {name: torch.ones(6) for name in split.features}
    same = gaussian_noise(ones, 0.0)(split, 0).features["a"]
    assert all(torch.equal(x, y) for x, y in zip(same, split.features["a"], strict=True))
    noisy = gaussian_noise(ones, 2.0)(split, 0).features["a"]
    change = torch.cat([x - y for x, y in zip(noisy, split.features["a"], strict=True)])
    assert change.std() == pytest.approx(2.0, rel=0.05) and abs(change.mean()) < 0.1
    taken = foreign_tokens(0.5)(split, 0).features["a"]
    kept = torch.cat([(x == y).all(-1) for x, y in zip(taken, split.features["a"], strict=True)]).float().mean()
    assert kept == pytest.approx(0.5, abs=0.08)
    mixed = shuffled_steps("a")(split, 0).features["a"]
    for x, y in zip(mixed, split.features["a"], strict=True):
        torch.testing.assert_close(x.sort(0).values, y.sort(0).values)
    assert any(not torch.equal(x, y) for x, y in zip(mixed, split.features["a"], strict=True))


def test_missing_scores_are_the_exact_expectation_over_masks(tmp_path):
    data, options = study(), wma.WMAOptions(seeds=2, epochs=2, width=16, heads=2, tune=False)
    trained = train_rows(data, [wma.row(data, options, "one", 1e-3, {})], run_of(options, tmp_path), "t")
    scores = wma.condition_scores(data, trained["one"])
    clean, a, b = (scores[name] for name in ("clean", "without a", "without b"))
    expected = []
    for level in wma.LEVELS:
        expected += [(1 - level) * clean + level * gone for gone in (a, b, (a + b) / 2)]
    np.testing.assert_allclose(scores["missing"], np.mean(expected, axis=0), atol=1e-12)
    noisy = [values for name, values in scores.items() if name[:5] in ("input", "forei")]
    assert len(noisy) == 2 * len(wma.LEVELS)
    np.testing.assert_allclose(scores["noise"], np.mean(noisy, axis=0))


def test_every_row_is_trained_scored_and_counted(tmp_path):
    data = study(160)
    options = wma.WMAOptions(seeds=2, epochs=1, width=16, heads=2, tune=False)
    outcome = wma.measure(data, run_of(options, tmp_path))
    for label in (wma.ALONE, wma.ALIGNED, wma.RANDOM, wma.MMD, wma.BOTH, "transport-LMF, aligned"):
        assert label in outcome.table
    deciding = [contrast for contrast in outcome.contrasts if contrast.decides]
    assert [contrast.effect for contrast in deciding] == [0.009, 0.025, 0.021]
    assert set(outcome.numbers["tokens"][wma.ALONE]) == {"variance", "distance", "effective"}
    assert outcome.verdict == "cannot tell", "one epoch shows nothing on the planted copies either"


def test_modality_dropout_gains_on_planted_copies_where_a_modality_is_missing(tmp_path):
    options = wma.WMAOptions(seeds=3)
    planted = wma.control(study(), run_of(options, tmp_path), wma.Chosen(1e-3, 1e-3, 0.2))
    assert planted[wma.ALONE]["clean"].mean() > 0.8
    assert (planted[wma.DROPPED]["missing"] - planted[wma.ALONE]["missing"]).mean() > wma.SCORE_EFFECT


def test_tuning_takes_the_best_rate_and_weight_by_dev_scores_alone(tmp_path, monkeypatch):
    data, options = study(160), wma.WMAOptions(seeds=2, epochs=1, width=16, heads=2)
    best = {"0.001": {"0": 0.7, "5": 0.6}, "0.0003": {"0": 0.5, "0.2": 0.9}, "0.0001": {"0": 0.6}}
    trained_at: list[str] = []

    def train(data, rows, run, title):
        trained_at.append(title)
        return {row.label: title.split()[-1] for row in rows}

    def scores(data, trained):
        (rate,) = set(trained.values())
        return {label: [best[rate].get(label, 0.1)] for label in trained}

    monkeypatch.setattr(wma, "train_rows", train)
    monkeypatch.setattr(wma, "dev_scores", scores)
    chosen, tried = wma.tune(data, run_of(options, tmp_path))
    assert chosen == wma.Chosen(1e-3, 3e-4, 0.2)
    assert trained_at[3:] == ["tune 1 0.0003", "tune 1 0.001"] and set(tried) == set(best)


def test_predictions_follow_the_test_rows_of_every_fold(tmp_path):
    data = study(160)
    order = torch.arange(160)
    folds = [Fold(order[:80], order[80:120], order[120:]), Fold(order[80:], order[:40], order[40:80])]
    data = replace(data, folds=folds)
    options = wma.WMAOptions(seeds=2, epochs=1, width=16, heads=2, tune=False)
    trained = train_rows(data, [wma.row(data, options, "one", 1e-3, {})], run_of(options, tmp_path), "t")
    found = predictions_on_test(data, trained["one"])
    assert found.shape == (2, 80)
    second = trained["one"].part(1, 2)
    direct = second({name: x[folds[1].test] for name, x in data.pool.features.items()})[..., 0].numpy()
    np.testing.assert_allclose(found[:, 40:], direct, atol=1e-5)
