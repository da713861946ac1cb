"""What a missing modality does: exact lines against masks, zero latents against dropped terms, whole runs in small."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from experiments import modality_dropout
from experiments.experiment import Options, Run, contrast_table, contrasts_on_test
from experiments.modality_dropout import (
    DRAWS,
    EXPERIMENT,
    LINE,
    PROTOCOLS,
    RATES,
    check_identities,
    curves_of,
    differences,
    expected,
    harm,
    label,
    mask_errors,
    settings_of,
    thinned,
    without_both_ways,
)
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.losses.expected import moderated_logits
from mmfusion.metrics.verdicts import verdict_of
from mmfusion.models.fusion import FusionModel
from mmfusion.training.grid import Grid, Setting, outputs_of

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


def of_all(data):
    return settings_of(list(data.input_dims), list(data.input_dims), 0.5)


@pytest.mark.parametrize("names", [("audio", "text"), ("audio", "text", "video")])
@pytest.mark.parametrize("outputs", [None, 5])
def test_zero_latent_equals_dropped_terms_and_the_grids_own_forward(names, outputs):
    data = small_study(names, outputs, folds=2)
    grid = untrained(data, [Setting("complete", 4)])
    for name in names:
        zero, kept = (torch.stack(both).numpy() for both in zip(*without_both_ways(grid, name), strict=True))
        np.testing.assert_allclose(zero, kept, atol=1e-5)
        forward = outputs_of(data, grid.models, [name])  # by `present`
        np.testing.assert_allclose(zero.reshape(forward.shape), forward, atol=1e-5)
        assert np.abs(forward.reshape(grid.outputs.shape) - grid.outputs).max() > 1e-3


def test_exact_line_equals_the_mean_over_very_many_masks():
    data, rng = small_study(), np.random.default_rng(0)
    n = len(data.test_rows)
    complete, hidden = rng.normal(size=(2, 3, n))
    line = expected(data, complete, hidden, np.empty((0, n)), 0.3, "log_loss")
    mask = rng.random((20_000, 1, n)) < 0.3
    target = data.pool.target[data.test_rows].numpy()
    drawn = -np.logaddexp(0, np.where(mask, hidden, complete) * (1 - 2 * target)).mean(0)
    np.testing.assert_allclose(line, drawn, atol=0.05)
    assert line.mean() == pytest.approx(drawn.mean(), abs=2e-3)


def test_auroc_under_masks_is_scikit_learns_mean_over_them():
    data, rng = small_study(folds=2), np.random.default_rng(0)
    n, half = len(data.test_rows), len(data.folds[0].test)
    complete, hidden = rng.normal(size=(2, 2, n))
    uniforms = rng.random((5, n))
    got = expected(data, complete, hidden, uniforms, 0.5, "auroc")
    target = data.pool.target[data.test_rows].numpy()
    for part in (slice(0, half), slice(half, n)):  # folds have an AUROC of their own
        wanted = [
            [roc_auc_score(target[part], np.where(u < 0.5, h, c)[part]) for u in uniforms]
            for c, h in zip(complete, hidden, strict=True)
        ]
        np.testing.assert_allclose(got[:, part].mean(1), np.mean(wanted, 1))


def test_deviation_of_masks_is_in_units_of_its_monte_carlo_standard_error():
    rng = np.random.default_rng(1)
    s1, s0 = rng.normal(size=(2, 2, 30))
    errors = np.array([mask_errors(s1, s0, rng.random((12, 30))) for _ in range(800)])
    np.testing.assert_allclose(errors[:, 1:].std(0), 1, atol=0.15)
    assert (errors[:, 0] == 0).all() and (mask_errors(s1, s1, rng.random((12, 30))) == 0).all()
    assert np.abs(mask_errors(s1, s0 + 1, rng.random((12, 30)) ** 2)).max() > 4  # masks of another rate are found out


def test_thinned_features_are_zero_or_scaled_and_the_other_modality_is_whole():
    data = small_study(folds=2)
    grid = untrained(data, [Setting("complete", 4)], seeds=1)
    p, n = 0.6, len(data.folds[0].test)
    ours = thinned(grid, 0, "text", p, seed=3)
    assert ours.shape == (1, 2 * n)
    assert np.array_equal(ours, thinned(grid, 0, "text", p, seed=3))  # the same masks on every call
    uniforms = np.random.default_rng([3, 1]).random((EXAMPLES, 6), np.float32)
    for f, fold in enumerate(data.folds):
        model = grid.model(0, 0, f)
        kept = torch.from_numpy(uniforms)[fold.test] >= p
        x = {name: model.standardise[name](values[fold.test]) for name, values in data.pool.features.items()}
        x["text"] = torch.where(kept, x["text"] / (1 - p), 0)
        z = model.jwae.encode(x)
        by_hand = moderated_logits(*model.head(z), "binary").squeeze(-1).detach()
        np.testing.assert_allclose(ours[0, f * n : (f + 1) * n], by_hand, atol=1e-5)
    np.testing.assert_allclose(thinned(grid, 0, "text", 0.0, seed=3), grid.predictions()[0], atol=1e-6)


def test_harm_of_a_hidden_modality_is_linear_in_the_rate_and_all_protocols_begin_at_none():
    data = small_study()
    grid = untrained(data, of_all(data))
    uniforms = np.random.default_rng(0).random((DRAWS["modality"], len(data.test_rows)))
    curves = curves_of(grid, "audio", uniforms, trained=True)
    assert list(curves) == ["auroc", "log_loss"] and all(tuple(rows) == PROTOCOLS for rows in curves.values())
    line = curves["log_loss"][LINE]
    slope = (line[1:] - line[0]) / np.array(RATES)[1:, None, None]
    np.testing.assert_allclose(slope, np.broadcast_to(slope[:1], slope.shape), atol=1e-9)
    place = grid.index(label("audio", "modality", 0.7))
    complete = grid.outcome("log_loss")[place]
    hidden = -grid.without(["audio"], [place], of=lambda x, y, task: np.logaddexp(0, x * (1 - 2 * y)))[0]
    np.testing.assert_allclose(curves["log_loss"]["modality in training"][4], complete)
    np.testing.assert_allclose(curves["log_loss"]["modality both"][4], 0.3 * complete + 0.7 * hidden, atol=1e-6)
    whole = grid.outcome("auroc")
    for what, place in (("modality", 0), ("features", grid.index(label("audio", "features", 0.0)))):
        for where in ("at test", "in training", "both"):
            np.testing.assert_allclose(curves["auroc"][f"{what} {where}"][0], whole[place])
    at_test = curves_of(grid, "audio", uniforms, trained=False)
    assert list(at_test["auroc"]) == ["modality at test", "features at test"]
    np.testing.assert_array_equal(at_test["auroc"]["features at test"], curves["auroc"]["features at test"])


def test_training_drops_the_features_of_the_one_modality_at_the_rate_and_hides_none():
    settings = {setting.label: setting for setting in settings_of(["audio", "text"], ["audio"], 0.6)}
    assert len(settings) == 1 + 2 * len(RATES)
    assert settings["audio, features dropped at 0.3"].feature_dropout == {"audio": 0.3, "text": 0.6}
    assert settings["audio, features dropped at 0.3"].dropout == {}
    assert settings["audio, modality dropped at 0.3"].dropout == {"audio": 0.3}
    assert [name for name in settings if name.startswith("text")] == ["text, features dropped at 0.0"]


def test_a_layer_whose_dropped_terms_differ_is_refused(monkeypatch):
    data = small_study()
    grid = untrained(data, [Setting("complete", 4)])
    pairs = [(zero, kept + 1e-3) for zero, kept in without_both_ways(grid, "audio")]
    monkeypatch.setattr(modality_dropout, "without_both_ways", lambda *_: iter(pairs))
    with pytest.raises(AssertionError, match="same function"):
        check_identities(grid, "audio", np.random.default_rng(0).random((12, 26)))


def made_curves(middle, high, data, protocol="modality both"):
    """Curves of audio that harm so much at 30-50 % and at 70-90 % in that protocol, and nowhere else."""
    rng, n = np.random.default_rng(0), len(data.test_rows)
    places = np.array(RATES)
    harmed = np.where(places < 0.2, 0, np.where(places < 0.6, middle, high))[:, None, None]

    def noise():
        return rng.normal(0, 0.002, size=(len(RATES), 1, n))

    return {"audio": {"log_loss": {one: noise() - harmed * (one == protocol) for one in PROTOCOLS}}}


@pytest.mark.parametrize(
    ("middle", "high", "apart", "harms", "expected"),
    [
        (0.2, 0.1, "supported", "supported", "supported"),
        (-0.1, -0.3, None, "not supported", "not supported"),  # to be without it helps, and more at high rates
        (0.1, 0.2, "not supported", None, "not supported"),
        (0.0, -0.2, None, "not supported", "not supported"),
    ],
)
def test_verdict_needs_harm_as_well_as_more_of_it_than_at_high_rates(middle, high, apart, harms, expected):
    data = small_study(folds=5)
    contrasts = contrasts_on_test(data, *differences(made_curves(middle, high, data), ["audio"]))
    difference, harm_alone = (c for c in contrasts if c.route == "audio, modality both, log loss")
    assert difference.estimate == pytest.approx(middle - high, abs=0.01)
    assert harm_alone.estimate == pytest.approx(middle, abs=0.01)
    # None: the other of the route fails, whose p this one shares
    assert apart in (None, difference.verdict) and harms in (None, harm_alone.verdict)
    assert verdict_of(contrasts) == expected


def test_the_line_decides_nothing_where_it_is_exact_and_another_modality_never():
    data = small_study(folds=5)
    curves = made_curves(0.2, 0.1, data, LINE)
    curves["text"] = made_curves(0.2, 0.1, data)["audio"]
    named, _ = differences(curves, ["audio"])
    assert {name for name, one in named.items() if not one.decides} == {
        name for name in named if name.startswith(("text", f"audio, {LINE}, log loss"))
    }
    assert verdict_of(contrasts_on_test(data, named)) == "not supported"


def test_difference_and_harm_must_hold_in_the_same_protocol():
    data = small_study(folds=5)
    rows = made_curves(0.1, 0.2, data, "modality both")["audio"]["log_loss"]
    rows["modality in training"] = made_curves(-0.1, -0.2, data, "modality in training")["audio"]["log_loss"][
        "modality in training"
    ]
    contrasts = contrasts_on_test(data, *differences({"audio": {"log_loss": rows}}, ["audio"]))
    assert harm(rows["modality both"], (2, 3)).mean() > 0.05
    assert (harm(rows["modality in training"], (2, 3)) - harm(rows["modality in training"], (4, 5))).mean() > 0.05
    assert verdict_of(contrasts) == "not supported"


@pytest.mark.parametrize(
    ("names", "outputs", "folds", "seeds"), [(("audio", "text", "video"), None, 1, 2), (("image", "text"), 3, 2, 1)]
)
def test_a_small_study_ends_in_a_verdict(tmp_path, names, outputs, folds, seeds):
    data = small_study(names, outputs, folds)
    outcome = EXPERIMENT.measure(data, Run(Options(seeds=seeds, epochs=2), tmp_path, torch.device("cpu")))
    assert outcome.verdict in VERDICTS
    numbers = json.loads(json.dumps(outcome.numbers, allow_nan=False))
    word = "AUROC" if outputs is None else "MAE / std"
    assert len(numbers["text"][word]) == (2 if "audio" in names else len(PROTOCOLS))
    shown = names if "audio" in names else names[:1]  # without it, the mean over all
    assert len(outcome.contrasts) == 4 * sum(len(numbers[name][word]) for name in shown)
    assert all(value >= 0 for rows in numbers["text"][word].values() for rate in rows for value in rate)
    assert all(text in outcome.table for text in names) and contrast_table(outcome.contrasts)
    # the claim is about audio: where it is there, it alone decides
    assert {c.name.split(",")[0] for c in outcome.contrasts if c.decides} == (
        {"audio"} if len(names) == 3 else {"image and text"}
    )
    assert any("no audio" in note for note in outcome.notes) == ("audio" not in names)
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))


def test_a_claim_about_several_modalities_is_about_their_mean():
    data = small_study(("image", "text"), None, 1)
    one, other = (made_curves(a, b, data, "modality both")["audio"] for a, b in ((0.2, 0.1), (0.4, 0.2)))
    named, _ = differences({"image": one, "text": other}, ["image", "text"])
    found = {name: d.values.mean() for name, d in named.items() if "modality both" in name}
    expected = np.mean([harm(x["log_loss"]["modality both"], (2, 3)).mean() for x in (one, other)])
    assert found["image and text, modality both, log loss: harm at 30-50 %"] == pytest.approx(expected)
    assert {name.split(",")[0] for name in named} == {"image and text"}
