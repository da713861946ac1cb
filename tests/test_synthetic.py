"""Synthetic data: the dials are what they say, and the stated best accuracy is the one that an oracle reaches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmfusion.data import synthetic_truth
from mmfusion.data.registry import DataOptions, check_flags, load_datasets, synthetic_config
from mmfusion.data.synthetic import SyntheticConfig, draw_factors, features_of, rotations, scores_of, synthetic
from mmfusion.data.synthetic_published import (
    accuracy_from_share,
    alone_accuracy,
    redundant_unique_synergic,
    shared_and_unique,
    xor_accuracy,
    xor_of_three,
)
from mmfusion.data.synthetic_truth import best_accuracy, truth
from mmfusion.errors import InputError
from mmfusion.models.missing import missing_rows

MANY = 200_000
MIX = SyntheticConfig(widths=(4, 5), shared=0.35, unique=0.25, synergy=0.3, alignment=0.6)


def drawn(config: SyntheticConfig, examples: int = MANY, missing: float = 0.0, seed: int = 5):
    """(factors, scores, features turned back by Q_m^T) of fresh examples."""
    rng = np.random.default_rng(seed)
    factors = draw_factors(config, examples, rng)
    features = features_of(config, factors, rng, missing)
    back = [features[name] @ q for name, q in zip(config.modalities, rotations(config), strict=True)]
    return factors, scores_of(config, factors), back


def shared_estimate(config: SyntheticConfig, copies: np.ndarray) -> np.ndarray:
    """E[s | copies] by the normal equations of the copies' covariance, not by the formula under test."""
    count, r = copies.shape[1], config.alignment
    covariance = r * np.ones((count, count)) + (1 - r + config.gaussian**2) * np.eye(count)
    return copies @ np.linalg.pinv(covariance, hermitian=True) @ np.full(count, r**0.5)


def assert_reached(right: np.ndarray, stated: synthetic_truth.Accuracy, sigmas: float = 4.0) -> None:
    """Accuracy within its binomial error, that of the statement and a quadrature's thousandth taken together."""
    spread = math.hypot((0.25 / len(right)) ** 0.5, stated.standard_error)
    assert abs(right.mean() - stated.value) < sigmas * spread + 2e-4, (right.mean(), stated)


# ---- dials -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
def test_shares_of_the_scores_variance_are_the_dials(order):
    config = replace(MIX, widths=(3, 3, 3), order=order)
    factors, scores, _ = drawn(config)
    columns = {
        "shared": factors.shared[:, None],
        "unique": factors.unique,
        "synergy": np.prod([factors.synergistic[:, m] for m in range(order)], 0)[:, None],
    }
    assert scores.var() == pytest.approx(1, abs=0.02) and scores.mean() == pytest.approx(0, abs=0.01)
    for part, x in columns.items():
        fitted = x @ np.linalg.lstsq(x, scores, rcond=None)[0]
        assert fitted.var() == pytest.approx(getattr(config, part), abs=0.012), part
    assert config.label_noise == pytest.approx(0.1)


@pytest.mark.parametrize("alignment", [0.0, 0.4, 1.0])
def test_alignment_is_the_correlation_of_the_copies(alignment):
    config = replace(MIX, alignment=alignment)
    factors, _, back = drawn(config, 50_000)
    found = np.corrcoef(back[0][:, 0], back[1][:, 0])[0, 1]
    assert found == pytest.approx(alignment, abs=0.015)
    np.testing.assert_allclose(
        back[1][:, :3], np.stack([factors.copies, factors.unique, factors.synergistic])[..., 1].T
    )
    assert alignment < 1 or np.allclose(back[0][:, 0], back[1][:, 0])


def test_a_modality_by_itself_shows_nothing_of_the_dials():
    _, _, back = drawn(replace(MIX, shared=0.0, unique=0.0, synergy=1.0), 100_000)
    assert np.abs(np.cov(back[0].T) - np.eye(4)).max() < 0.02


def test_every_kind_of_noise_has_the_level_of_its_dial():
    clean = features_of(MIX, *_same(MIX))
    assert _noise(clean, gaussian=0.7)[0].std() == pytest.approx(0.7, rel=0.02)
    heavy = _noise(clean, heavy=0.5)[0] / 0.5
    # of Student's t with two degrees of freedom: P(|t| > x) = 1 - x / sqrt(2 + x^2)
    for x in (1.0, 10.0):
        assert (np.abs(heavy) > x).mean() == pytest.approx(1 - x / (2 + x * x) ** 0.5, abs=0.01)
    config = replace(MIX, foreign=0.3)
    foreign = features_of(config, *_same(config))["a"]
    moved = (foreign != clean["a"]).any(1)
    assert moved.mean() == pytest.approx(0.3, abs=0.02)
    known = {row.tobytes() for row in clean["a"]}
    assert all(row.tobytes() in known for row in foreign[moved]), "rows of others"
    dropped = features_of(replace(MIX, dropout=0.2), *_same(MIX))["a"]
    assert (dropped == 0).mean() == pytest.approx(0.2, abs=0.01)
    np.testing.assert_array_equal(dropped[dropped != 0], clean["a"][dropped != 0])


def _same(config: SyntheticConfig):
    rng = np.random.default_rng(3)
    return draw_factors(config, 8000, rng), rng


def _noise(clean: dict[str, np.ndarray], **level: float) -> list[np.ndarray]:
    config = replace(MIX, **level)
    return [features_of(config, *_same(config))[name] - clean[name] for name in config.modalities]


def test_missing_rows_are_nan_in_test_alone_as_the_house_reads_them():
    data = synthetic(replace(MIX, missing=0.25, train=500, dev=100, test=4000))
    _, gone = missing_rows(data.splits["test"].features, data.input_dims)
    assert gone.float().mean(0).tolist() == pytest.approx([0.25, 0.25], abs=0.03)
    assert all(x.isfinite().all() for split in ("train", "dev") for x in data.splits[split].features.values())


def test_dataset_is_a_function_of_its_dials_and_splits_do_not_move_each_other():
    one, same = synthetic(replace(MIX, train=30, dev=10, test=20)), synthetic(replace(MIX, train=30, dev=10, test=20))
    more, other = synthetic(replace(MIX, train=60, dev=10, test=20)), synthetic(replace(MIX, train=30, seed=1))
    assert torch.equal(one.splits["train"].features["b"], same.splits["train"].features["b"])
    assert torch.equal(one.splits["test"].features["b"], more.splits["test"].features["b"])
    assert not torch.equal(one.splits["train"].features["b"], other.splits["train"].features["b"])
    alike = synthetic(replace(MIX, train=20, dev=20, test=20)).splits  # the same shapes, and yet other draws
    assert not any(torch.equal(alike[x].features["a"], alike["test"].features["a"]) for x in ("train", "dev"))
    assert one.input_dims == {"a": 4, "b": 5} and one.task == "binary" and len(one.splits["dev"]) == 10
    values = synthetic(replace(MIX, train=30, dev=10, test=20, task="regression"))
    assert torch.equal((values.splits["test"].target > 0).float(), one.splits["test"].target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shared": 0.9}, "sum to at most 1"),
        ({"shared": -0.1}, "--shared -0.1"),
        ({"alignment": math.nan}, "--alignment nan"),
        ({"gaussian": -1.0}, "--gaussian"),
        ({"dropout": 1.0}, "--dropout"),
        ({"widths": (4,)}, "--widths: 1 modalities"),
        ({"widths": (4, 2)}, "--widths 2"),
        ({"order": 3}, "--order 3: there are 2"),
        ({"order": 1}, "--order 1"),
        ({"train": 0}, "--train 0"),
        ({"task": "multiclass"}, "--task"),
        ({"seed": 0.5}, "--seed"),
    ],
)
def test_a_dial_out_of_range_is_one_line_that_names_it(change, said):
    with pytest.raises(InputError, match=said) as error:
        synthetic(replace(MIX, **change))
    assert "\n" not in str(error.value)


# ---- truth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"synergy": 0.0},
        {},
        {"shared": 0.0, "unique": 0.0},
        {"widths": (3, 3, 3), "order": 3},
        {"widths": (3, 3, 3, 3), "order": 4},
        {"widths": (3, 3, 3), "order": 2, "alignment": 1.0},
    ],
)
def test_an_oracle_that_knows_the_factors_reaches_the_stated_accuracy(change):
    config = replace(MIX, **change)
    _, scores, back = drawn(config)
    product = config.synergy**0.5 * np.prod([back[m][:, 2] for m in range(config.order)], 0)
    gaussian = gaussian_part(config, back)
    known = truth(config)
    assert_reached((gaussian + product > 0) == (scores > 0), known.bayes)
    assert_reached((gaussian > 0) == (scores > 0), known.additive)
    assert_reached((product > 0) == (scores > 0), known.parts["synergy"])
    assert known.is_exact and known.bayes.standard_error < 1e-3
    if config.shared:
        shared = gaussian_part(replace(config, unique=0.0), back)
        assert_reached((shared > 0) == (scores > 0), known.parts["shared"])
        alone = config.shared**0.5 * config.alignment**0.5 * back[0][:, 0]
        alone += (config.unique / len(back)) ** 0.5 * back[0][:, 1]
        assert_reached((alone > 0) == (scores > 0), known.alone["a"])


def gaussian_part(config: SyntheticConfig, back: list[np.ndarray]) -> np.ndarray:
    """Mean of the score's shared and unique part given what is seen."""
    kept = 1 / (1 + config.gaussian**2)
    shared = config.shared**0.5 * shared_estimate(config, np.stack([x[:, 0] for x in back], 1))
    return shared + (config.unique / len(back)) ** 0.5 * kept * sum(x[:, 1] for x in back)


def chance_above(g: np.ndarray, m: np.ndarray, c: float, rest: float, share: float) -> np.ndarray:
    """P(g + sqrt(share) v_1 v_2 + N(0, rest) > 0), v_j ~ N(m_j, c), by inversion of the characteristic function."""
    t = np.linspace(0, 20, 501)[1:]  # beyond, exp(-rest t^2 / 2) is nothing
    a = t * share**0.5
    scale = 1 + (a * c) ** 2
    exponent = (1j * a * m[:, :1] * m[:, 1:] - a**2 * c * (m**2).sum(1, keepdims=True) / 2) / scale
    characteristic = np.exp(exponent + 1j * t * g[:, None] - rest * t**2 / 2) / scale**0.5
    return 0.5 + (characteristic.imag / t).sum(1) * (t[1] - t[0]) / np.pi


def test_under_gaussian_noise_the_exact_posterior_reaches_the_stated_accuracy():
    config = replace(MIX, gaussian=0.5)
    _, scores, back = drawn(config, 8000)
    kept = 1 / (1 + 0.25)
    g = gaussian_part(config, back)
    rest = 1 - config.synergy - drawn_variance(config)
    above = chance_above(g, kept * np.stack([x[:, 2] for x in back], 1), 1 - kept, rest, config.synergy)
    stated = truth(config).bayes
    best = np.maximum(above, 1 - above)
    assert stated.method == "quadrature"
    assert abs(best.mean() - stated.value) < 4 * best.std() / len(best) ** 0.5
    assert_reached((above > 0.5) == (scores > 0), stated)


def drawn_variance(config: SyntheticConfig) -> float:
    """Variance of `gaussian_part`, by draws."""
    return gaussian_part(config, drawn(config, seed=9)[2]).var()


def test_of_two_noisy_signs_the_accuracy_is_that_of_both_right_or_both_wrong():
    config = replace(MIX, shared=0.0, unique=0.0, synergy=1.0, gaussian=0.5)
    one = accuracy_from_share(1 / 1.25)
    assert truth(config).bayes.value == pytest.approx(one**2 + (1 - one) ** 2, abs=1e-3)


def test_quadrature_and_draws_agree(monkeypatch):
    for change in ({}, {"widths": (3, 3, 3), "order": 3}):
        config = replace(MIX, **change)
        by_quadrature = best_accuracy(config)
        monkeypatch.setattr(synthetic_truth, "NODES", {})
        synthetic_truth._accuracy.cache_clear()
        by_draws = best_accuracy(config)
        monkeypatch.undo()
        synthetic_truth._accuracy.cache_clear()
        assert (by_quadrature.method, by_draws.method) == ("quadrature", "Monte Carlo")
        assert abs(by_quadrature.value - by_draws.value) < 4 * by_draws.standard_error + 2e-4
        assert 0 < by_draws.standard_error < 1e-3


def test_noise_that_fades_changes_nothing_and_noise_that_grows_leaves_chance():
    clean = truth(MIX).bayes.value
    assert truth(replace(MIX, gaussian=1e-3)).bayes.value == pytest.approx(clean, abs=1e-3)
    assert truth(replace(MIX, gaussian=1e3)).bayes.value == pytest.approx(0.5, abs=2e-3)
    three = replace(MIX, widths=(3, 3, 3), order=3)
    stated = best_accuracy(replace(three, gaussian=1e-3))
    assert abs(stated.value - best_accuracy(three).value) < 4 * stated.standard_error


def test_what_may_be_missing_is_averaged_over():
    config = replace(MIX, missing=0.3)
    _, scores, back = drawn(config, missing=0.3)
    there = [np.isfinite(x[:, 0]) for x in back]
    both, guess = there[0] & there[1], np.zeros(MANY)
    guess[both] = (gaussian_part(config, back) + config.synergy**0.5 * back[0][:, 2] * back[1][:, 2])[both]
    for m in (0, 1):
        rows = there[m] & ~there[1 - m]
        x = back[m][rows]
        guess[rows] = (config.shared * config.alignment) ** 0.5 * x[:, 0] + (config.unique / 2) ** 0.5 * x[:, 1]
    guess[guess == 0] = 1.0
    assert_reached((guess > 0) == (scores > 0), truth(config).bayes)


@pytest.mark.parametrize("change", [{}, {"gaussian": 0.5}, {"missing": 0.3}])
def test_explained_share_is_that_of_the_best_prediction(change):
    config = replace(MIX, **change)
    _, scores, back = drawn(config, missing=config.missing)
    seen = [np.isfinite(x[:, 0]) for x in back]
    residual = 0.0
    for pattern in ((1, 1), (1, 0), (0, 1), (0, 0)):
        rows = np.all([s == p for s, p in zip(seen, pattern, strict=True)], 0)
        x = [b[rows] for b, p in zip(back, pattern, strict=True) if p]
        columns = [b[:, k] for b in x for k in (0, 1)] + ([x[0][:, 2] * x[1][:, 2]] if len(x) == 2 else [])
        if rows.any():
            design = np.stack([np.ones(rows.sum()), *columns], 1)
            residual += ((scores[rows] - design @ np.linalg.lstsq(design, scores[rows], rcond=None)[0]) ** 2).sum()
    assert truth(config).explained == pytest.approx(1 - residual / MANY / scores.var(), abs=0.01)


def test_other_noise_leaves_upper_bounds_and_says_so():
    for change in ({"heavy": 0.5}, {"foreign": 0.2}, {"dropout": 0.2}):
        config = replace(MIX, **change)
        known = truth(config)
        _, scores, back = drawn(config)
        product = config.synergy**0.5 * back[0][:, 2] * back[1][:, 2]
        reached = ((gaussian_part(config, back) + product > 0) == (scores > 0)).mean()
        assert not known.is_exact and reached < known.bayes.value + 0.003
    assert truth(replace(MIX, foreign=0.2)).bayes == truth(replace(MIX, missing=0.2)).bayes, "as good as marked"


def test_parts_and_modalities_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="no modality and no part of the label: c, noise"):
        best_accuracy(MIX, ["a", "c"], ["noise"])


def test_a_sum_that_is_thresholded_gets_three_quarters_of_a_pure_product():
    factors, scores, _ = drawn(replace(MIX, shared=0.0, unique=0.0, synergy=1.0))
    f = np.where(factors.synergistic > 0, 1.0, -1.5)
    assert ((f.sum(1) > 0) == (scores > 0)).mean() == pytest.approx(0.75, abs=0.005)


# ---- published generators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "stated"), [(0.0, 0.125), (0.5, 0.5625), (1.0, 1.0)])
def test_best_guess_at_the_exclusive_or_is_right_as_often_as_stated(p, stated):
    split = xor_of_three(p, n=60_000).splits["train"]
    a, c = (split.features[name].int() for name in ("a", "c"))
    bits = torch.where((a == c).all(1, keepdim=True), 0, a ^ c)
    number = (bits * torch.tensor([4, 2, 1])).sum(1)
    assert xor_accuracy(p) == stated
    assert (number == split.target).float().mean().item() == pytest.approx(stated, abs=0.01)
    # a table of the commonest b of every (a, c), learned from the data, does no better
    table = np.zeros((64, 8))
    pair = ((a * torch.tensor([32, 16, 8])).sum(1) + (c * torch.tensor([4, 2, 1])).sum(1)).numpy()
    np.add.at(table, (pair, split.target.int().numpy()), 1)
    assert table.max(1).sum() / len(pair) == pytest.approx(stated, abs=0.012)


def test_one_of_the_three_says_nothing_and_two_do_not_without_the_exclusive_or():
    dataset = xor_of_three(1.0, n=40_000)
    assert dataset.task == "multiclass" and dataset.output_dim == 8 and dataset.class_names[6] == "110"
    split = dataset.splits["train"]
    for x in split.features.values():
        for bit in range(3):
            b = (split.target.int() >> (2 - bit)) & 1
            assert abs(np.corrcoef(x[:, bit], b)[0, 1]) < 0.02
    tested = dataset.splits["test"]
    assert len(split) == 28_000 and len(tested) == 8000 and len(dataset.splits["dev"]) == 4000


def probe(dataset, modalities: list[str]) -> float:
    """Test accuracy of logistic regression on the raw features."""
    x = {name: torch.cat([split.features[m] for m in modalities], 1) for name, split in dataset.splits.items()}
    std, mean = torch.std_mean(x["train"], 0)
    model = LogisticRegression(C=1e4, max_iter=2000).fit((x["train"] - mean) / std, dataset.splits["train"].target)
    return model.score((x["test"] - mean) / std, dataset.splits["test"].target)


def test_facts_of_shared_and_unique():
    assert accuracy_from_share(10 / 22) == pytest.approx(0.736, abs=5e-4)
    assert accuracy_from_share(16 / 22) == pytest.approx(0.825, abs=5e-4)
    dataset = shared_and_unique(12_000)
    assert dataset.input_dims == {"x1": 100, "x2": 100}
    assert probe(dataset, ["x1", "x2"]) > 0.99
    assert probe(dataset, ["x1"]) == pytest.approx(accuracy_from_share(16 / 22), abs=0.03)


@pytest.mark.parametrize("kind", ["redundancy", "uniqueness", "synergy"])
def test_of_redundant_unique_and_synergic_a_sum_of_both_is_enough_and_one_alone_says_its_share(kind):
    dataset = redundant_unique_synergic(kind)
    assert probe(dataset, ["x1", "x2"]) > 0.985
    for name, stated in alone_accuracy(kind).items():
        assert probe(dataset, [name]) == pytest.approx(stated, abs=0.04), name


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: xor_of_three(1.5), "p 1.5"),
        (lambda: xor_of_three(d=0), "d 0"),
        (lambda: xor_of_three(p=math.nan), "p nan"),
        (lambda: shared_and_unique(n=5), "n 5"),
        (lambda: shared_and_unique(n=100.5), "n 100.5"),
        (lambda: redundant_unique_synergic("mixed"), "kind 'mixed'"),
    ],
)
def test_published_generators_refuse_what_they_cannot_draw(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_published_generators_are_functions_of_their_seed():
    for generate in (lambda s: xor_of_three(n=50, seed=s), lambda s: shared_and_unique(50, s)):
        one, same, other = (generate(s).splits["train"] for s in (0, 0, 1))
        assert all(torch.equal(x, same.features[m]) for m, x in one.features.items())
        assert not all(torch.equal(x, other.features[m]) for m, x in one.features.items())


# ---- command line ----------------------------------------------------------------------------------------------------


def test_flags_set_the_dials_and_the_note_says_the_best_accuracy():
    options = DataOptions("synthetic", synthetic_shared=0.9, synthetic_unique=0.0, synthetic_synergy=0.0)
    (dataset,) = load_datasets(replace(options, synthetic_examples=40, split_seed=3))
    assert (len(dataset.splits["train"]), len(dataset.splits["dev"]), len(dataset.splits["test"])) == (40, 10, 40)
    assert dataset.provenance["dials"]["shared"] == 0.9 and dataset.provenance["dials"]["seed"] == 3
    assert "0.8976" in dataset.notes[0]  # 1/2 + arcsin(sqrt .9) / pi
    own = {"shared": 0.1, "unique": 0.2, "synergy": 0.4, "alignment": 0.5, "noise": 0.6}
    flags = DataOptions("synthetic", **{f"synthetic_{name}": value for name, value in own.items()})
    assert synthetic_config(flags) == SyntheticConfig(shared=0.1, unique=0.2, synergy=0.4, alignment=0.5, gaussian=0.6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"synthetic_noise": -1.0}, "--synthetic-noise -1"),
        ({"synthetic_shared": 0.8}, "sum to at most 1"),
        ({"synthetic_examples": 3}, "--synthetic-examples 3"),
        ({"tokens": True}, "--tokens: has no use with --dataset synthetic"),
        ({"data": "x.npz"}, "synthetic draws its own"),
    ],
)
def test_a_flag_out_of_range_is_refused(flags, said):
    with pytest.raises(InputError, match=said):
        load_datasets(DataOptions("synthetic", **flags))


def test_flags_of_synthetic_data_have_no_use_elsewhere():
    with pytest.raises(InputError, match="--synthetic-noise: has no use with --dataset demo"):
        check_flags(DataOptions(synthetic_noise=0.5))
