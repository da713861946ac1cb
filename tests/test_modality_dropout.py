"""What a missing modality does: exact lines against masks, zero latents against dropped terms, whole runs in small."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from experiments.experiment import Options, Run, contrast_table, contrasts_on_test
from experiments.modality_dropout import (
    DRAWS,
    EXPERIMENT,
    PROTOCOLS,
    RATES,
    ROWS,
    auroc,
    by_protocol,
    check_identities,
    differences,
    drawn_scores,
    drawn_uniforms,
    harm,
    label,
    missing_predictions,
    rate_curves,
    verdict_of,
)
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.models.fusion import FusionModel
from mmfusion.training.grid import Grid, Setting, outputs_of, select

VERDICTS = ("supported", "not supported", "cannot tell", "not identified")
EXAMPLES = 90


def small_study(names=("audio", "text"), outputs=None, folds=1, seed=0):
    """A random study: binary, or a regression of that many outputs; the target depends on the first modality."""
    rng = np.random.default_rng(seed)
    features = {name: torch.from_numpy(rng.normal(size=(EXAMPLES, 5 + m))).float() for m, name in enumerate(names)}
    signal = features[names[0]][:, 0] + 0.5 * torch.from_numpy(rng.normal(size=EXAMPLES)).float()
    target = (signal > 0).float() if outputs is None else torch.stack([signal * (k + 1) for k in range(outputs)], 1)
    rows = torch.arange(EXAMPLES)
    parts = [Fold(r[:48], r[48:64], r[64:]) for r in (rows.roll(13 * f) for f in range(folds))]
    pool = Split(features, target, [str(i) for i in range(EXAMPLES)])
    return FoldedDataset("small", "binary" if outputs is None else "regression", pool, parts, [], {})


def untrained(data, settings, seeds=2):
    """A grid of models as they are initialised."""
    models = []
    for k in range(len(settings)):
        for seed in range(seeds):
            for fold in data.folds:
                torch.manual_seed(seed + 100 * k)
                model = FusionModel(data.input_dims, 6, 8, output_dim=data.output_dim)
                model.fit_standardisation({name: x[fold.train] for name, x in data.pool.features.items()})
                for projection in model.fusion.projections:  # nothing about a factor may be special
                    torch.nn.init.normal_(projection.bias)
                models.append(model)
    outputs = outputs_of(data, models)
    shape = (len(settings), seeds, len(data.folds), *outputs.shape[1:])
    return Grid(data, settings, list(range(seeds)), models, outputs.reshape(shape), {})


def settings_of(data):
    complete = Setting("complete", 4, dropout={})
    return [complete, *(Setting(label(name, p), 4) for name in data.input_dims for p in RATES[1:])]


@pytest.mark.parametrize("names", [("audio", "text"), ("audio", "text", "video")])
@pytest.mark.parametrize("outputs", [None, 5])
def test_zero_latent_equals_dropped_terms_and_the_grids_own_forward(names, outputs):
    data = small_study(names, outputs, folds=2)
    grid = untrained(data, [Setting("complete", 4)])
    for name in names:
        missing = missing_predictions(grid, name)
        np.testing.assert_allclose(missing["zero latent"], missing["dropped terms"], atol=1e-5)
        forward = outputs_of(data, grid.models, [name]).reshape(grid.outputs.shape)  # by `present`
        np.testing.assert_allclose(missing["zero latent"], select(data, forward, "test")[0], atol=1e-5)
        assert np.abs(missing["zero latent"] - grid.predictions()[0]).max() > 1e-3
        assert np.abs(missing["zero latent"] - missing["mean latent"]).max() > 1e-3


def test_mean_latent_is_that_of_the_folds_own_training_part():
    data = small_study(folds=2)
    grid = untrained(data, [Setting("complete", 4)], seeds=1)
    ours = missing_predictions(grid, "text")["mean latent"]  # (1, n), fold after fold
    start = 0
    for f, fold in enumerate(data.folds):
        model = grid.model(0, 0, f)
        latents = model.encode(data.pool.features)
        mean = latents["text"][fold.train].mean(0, keepdim=True)
        by_hand = [model.fusion([latents["audio"][i : i + 1], mean]).item() for i in fold.test]
        np.testing.assert_allclose(ours[0, start : start + len(fold.test)], by_hand, atol=1e-5)
        start += len(fold.test)


def test_exact_line_equals_the_mean_over_very_many_masks():
    rng = np.random.default_rng(0)
    s1, s0 = rng.normal(size=(3, 20)), rng.normal(0.4, 1, size=(3, 20))
    uniforms = rng.random((40_000, 20))
    means, errors = drawn_scores(s1, s0, uniforms)
    line = [(1 - p) * s1.mean() + p * s0.mean() for p in RATES]
    np.testing.assert_allclose(means, line, atol=2e-3)
    assert np.abs(errors).max() < 4
    by_hand = np.where(uniforms[:500, None] < 0.3, s0, s1).mean()
    assert drawn_scores(s1, s0, uniforms[:500])[0][3] == pytest.approx(by_hand)


def test_deviation_of_masks_is_in_units_of_its_monte_carlo_standard_error():
    rng = np.random.default_rng(1)
    s1, s0 = rng.normal(size=(2, 2, 30))
    errors = np.array([drawn_scores(s1, s0, rng.random((DRAWS, 30)))[1] for _ in range(800)])
    np.testing.assert_allclose(errors[:, 1:].std(0), 1, atol=0.15)
    assert (errors[:, 0] == 0).all() and (drawn_scores(s1, s1, rng.random((DRAWS, 30)))[1] == 0).all()


def test_harm_at_test_is_linear_in_the_rate_and_zero_at_none():
    data = small_study()
    grid = untrained(data, settings_of(data))
    curves = rate_curves(grid, "audio", missing_predictions(grid, "audio"))
    assert tuple(curves) == ROWS
    line = curves["at test"]
    np.testing.assert_allclose(np.diff(line, 2, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(harm(line, (3, 4, 5)) / 0.4, harm(line, (7, 8, 9)) / 0.8, atol=1e-12)
    alone, place = grid.without(["audio"], range(len(grid.settings))), grid.index(label("audio", 0.7))
    np.testing.assert_allclose(curves["in training"][7], grid.scores()[place])
    np.testing.assert_allclose(curves["both"][7], 0.3 * grid.scores()[place] + 0.7 * alone[place])
    np.testing.assert_allclose(line[7], 0.3 * grid.scores()[0] + 0.7 * alone[0])
    for curve in curves.values():  # no rate, no harm: all protocols begin at the complete members
        np.testing.assert_array_equal(curve[0], grid.scores()[0])


def test_auroc_is_the_mean_of_the_folds_and_equals_scikit_learn():
    data = small_study(folds=2)
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=(3, 52)), 1)  # with ties
    first, second = (data.pool.target[fold.test].numpy() for fold in data.folds)
    for row, got in zip(values, auroc(data, values), strict=True):
        assert got == pytest.approx((roc_auc_score(first, row[:26]) + roc_auc_score(second, row[26:])) / 2)


def test_masks_are_written_once_and_read_again(tmp_path):
    path = tmp_path / "masks.safetensors"
    first = drawn_uniforms(path, 30, 2)
    assert first.shape == (DRAWS, 30, 2) and 0 <= first.min() and first.max() < 1
    written = path.stat().st_mtime_ns
    assert torch.equal(drawn_uniforms(path, 30, 2), first) and path.stat().st_mtime_ns == written
    assert torch.equal(load_file(path)["uniforms"], first)


def test_a_layer_whose_dropped_terms_differ_is_refused():
    data = small_study()
    grid = untrained(data, [Setting("complete", 4)])
    missing = missing_predictions(grid, "audio")
    missing["dropped terms"] = missing["dropped terms"] + 1e-3
    with pytest.raises(AssertionError, match="same function"):
        check_identities(grid, missing, np.random.default_rng(0).random((DRAWS, 26)))


@pytest.mark.parametrize(
    ("middle", "high", "apart", "harms", "expected"),
    [
        (0.2, 0.1, "supported", "supported", "supported"),
        (-0.1, -0.3, "supported", "not supported", "not supported"),  # to be without it helps, and more at high rates
        (0.1, 0.2, "not supported", "supported", "not supported"),
        (0.0, -0.2, "supported", "not supported", "not supported"),
    ],
)
def test_verdict_needs_harm_as_well_as_more_of_it_than_at_high_rates(middle, high, apart, harms, expected):
    data = small_study()
    noise = np.random.default_rng(0).normal(0, 0.01, size=(len(RATES), 6, len(data.test_rows)))
    harmed = np.array([middle if k < 6 else high for k in range(len(RATES))]) * (np.arange(len(RATES)) > 0)
    flat = np.zeros_like(noise)
    curves = {"audio": dict.fromkeys(PROTOCOLS, flat) | {"both": noise - harmed[:, None, None]}}
    pairs = by_protocol(contrasts_on_test(data, differences(curves)))
    assert list(pairs) == [("audio", protocol) for protocol in PROTOCOLS]
    difference, harm_alone = pairs["audio", "both"]
    assert difference.estimate == pytest.approx(middle - high, abs=0.01)
    assert harm_alone.estimate == pytest.approx(middle, abs=0.01)
    assert (difference.verdict, harm_alone.verdict) == (apart, harms)
    assert verdict_of(pairs) == expected


def test_difference_and_harm_must_hold_in_the_same_protocol():
    data = small_study()
    noise = np.random.default_rng(0).normal(0, 0.01, size=(len(RATES), 6, len(data.test_rows)))
    steps = (np.arange(len(RATES)) / 10)[:, None, None]
    curves = {"audio": {"at test": noise - steps, "in training": noise + steps, "both": noise * 0}}
    pairs = by_protocol(contrasts_on_test(data, differences(curves)))
    assert pairs["audio", "at test"][1].verdict == pairs["audio", "in training"][0].verdict == "supported"
    assert verdict_of(pairs) == "not supported"


@pytest.mark.parametrize(
    ("names", "outputs", "folds"), [(("audio", "text", "video"), None, 1), (("image", "text"), 3, 2)]
)
def test_a_small_study_ends_in_a_verdict(tmp_path, names, outputs, folds):
    data = small_study(names, outputs, folds)
    outcome = EXPERIMENT.measure(data, Run(Options(seeds=2, epochs=2), tmp_path, torch.device("cpu")))
    assert outcome.verdict in VERDICTS
    assert len(outcome.contrasts) == 6 * len(names)
    assert json.loads(json.dumps(outcome.numbers, allow_nan=False))["text"]["mean"].keys() == set(ROWS)
    assert ("auroc" in outcome.numbers["text"]) == (outputs is None)
    assert all(word in outcome.table for word in names) and contrast_table(outcome.contrasts)
    # the claim is about audio: where it is there, it alone decides
    assert ("text" in outcome.answer) == ("audio" not in names)
    assert any("no audio" in note for note in outcome.notes) == ("audio" not in names)
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))
    assert (tmp_path / "masks.safetensors").exists()
