"""Robustness at matched accuracy and fit: models planted robust and fragile, geometry by autograd, the written rule."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_experiments import folded, write_mosi
from test_robustness import model_of

from experiments.experiment import Options, Run, run
from experiments.rank_robustness import EXPERIMENT, members
from experiments.rank_robustness import measure as experiment
from experiments.rank_robustness.measure import (
    HIGH,
    LOW,
    RANKS,
    STEPS,
    at_equal_score,
    differences,
    matching_weights,
    measure,
    reached,
    settings_of,
)
from experiments.rank_robustness.members import (
    NOISE,
    RHO,
    Measures,
    components_by_fold,
    components_of,
    geometry,
    measure_members,
    noisy_predictions,
    principal_noise,
)
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.metrics.verdicts import corrected_contrasts, verdict_of
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.worst_case import Criterion, change_size, latent_stds
from mmfusion.training.grid import Grid, Setting, by_fold, outputs_of

SPECTRAL = ["spectral norm, rank 4", f"spectral norm, rank {HIGH}"]
SLOWER = [f"step {step:g}, rank {HIGH}" for step in STEPS]
LABELS = [setting.label for setting in settings_of()] + SPECTRAL + SLOWER
EQUAL, TRAINED = "matched training loss", "as trained"
DECIDES = [
    f"certified: low over {HIGH}, {EQUAL}",
    f"attacked: low over {HIGH}, {EQUAL}",
    f"|B|_2 / margin: low below {HIGH}, {EQUAL}",
    f"gradient / margin: low below {HIGH}, {EQUAL}",
    f"temperature-scaled log loss: low below {HIGH}, {EQUAL}",
]


# ---- planted models --------------------------------------------------------------------------------------------------


def planted_study() -> FoldedDataset:
    """Both coordinates of `a` know the label: the first by 1, the second by a 50th of that; `b` knows nothing."""
    sign = torch.tensor([1.0, -1.0] * 30)
    features = {"a": torch.stack([sign, sign / 50, 0 * sign, 0 * sign], 1), "b": torch.randn(60, 3)}
    rows = torch.arange(60)
    parts = [Fold(rows[:30], rows[30:40], rows[40:])]
    return FoldedDataset(
        "planted", "binary", Split(features, (sign > 0).float(), [str(i) for i in range(60)]), parts, [], {}
    )


def reader(coordinate: int, size: float) -> FusionModel:
    """A model whose logit is size * x_a[coordinate]: GELU is the identity far from 0, and the head ignores `b`."""
    model = FusionModel({"a": 4, "b": 3}, 1, 1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first, _, second = model.jwae.encoders["a"]
        first.weight[0, coordinate], first.bias[0] = size, 20.0
        second.weight[0, 0], second.bias[0] = 1.0, -20.0
        model.jwae.encoders["b"][0].weight.fill_(0.1)
        model.jwae.encoders["b"][2].weight.fill_(1.0)
        model.fusion.projections[0].weight[0, 0] = model.fusion.projections[1].bias[0] = 1.0
        model.fusion.rank_weights[0] = 1.0
    return model.eval()


def test_planted_fragile_model_is_less_robust_at_the_same_clean_score():
    data = planted_study()
    models = [reader(0, 1.0), reader(1, 50.0)]  # the same logits, to the bit of rounding
    outputs = outputs_of(data, models).reshape(2, 1, 1, -1)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    found = Measures()
    grid = Grid(data, [Setting("robust", 1), Setting("fragile", 1)], [0], models, outputs, {})
    measure_members(grid, components_by_fold(data), found)
    assert found.clean["robust"].all() and found.clean["fragile"].all()
    # moved by .05 sqrt(4) = .1: 1 stands, 1/50 falls; `b` moves nothing, and is one of two modalities
    for worst in (found.certified, found.attacked):
        np.testing.assert_array_equal(worst["robust"], 1.0)
        np.testing.assert_array_equal(worst["fragile"], 0.5)
        np.testing.assert_array_equal(at_equal_score(data, found, worst, "robust", "fragile"), 0.5)
        np.testing.assert_array_equal(at_equal_score(data, found, worst, "fragile", "robust"), -0.5)
    assert found.gradient["robust"].shape == (1, 1)
    assert found.gradient["fragile"] / found.gradient["robust"] == pytest.approx(50, rel=1e-4)
    assert found.gradient["robust"] == pytest.approx(4**0.5 / 2, rel=1e-4)  # sqrt(d) |g| / |y| and 0, their mean
    np.testing.assert_allclose(found.loss["robust"], found.loss["fragile"], atol=1e-5)
    assert found.norm["robust"] == found.interaction["robust"] == 0


def scored(task: str, **scores: list[float]) -> tuple[FoldedDataset, Measures]:
    """A data set of two folds of four test examples each, and clean scores (1, 8)."""
    data = replace(folded(folds=2, examples=80), task=task)
    folds = [fold._replace(test=fold.test[:4]) for fold in data.folds]
    return replace(data, folds=folds), Measures(clean={name: np.array([x], float) for name, x in scores.items()})


def test_settings_that_are_equal_differ_by_nothing():
    rng = np.random.default_rng(0)
    clean, worst = rng.integers(0, 2, 8), rng.random((1, 8))
    for task in ("binary", "regression"):
        data, found = scored(task, a=clean, b=clean)
        assert not at_equal_score(data, found, {"a": worst, "b": worst}, "a", "b").any()


def test_only_examples_that_both_get_right_count_as_a_share_of_these_in_each_fold():
    data, found = scored("binary", a=[1, 1, 1, 0, 1, 0, 0, 0], b=[1, 1, 0, 1, 0, 1, 0, 0])
    worst = {"a": np.array([[1.0, 1, 1, 0, 1, 0, 0, 0]]), "b": np.array([[0.0, 1, 0, 1, 0, 1, 0, 0]])}
    values = at_equal_score(data, found, worst, "a", "b")
    assert values.tolist() == [[2, 0, 0, 0, 0, 0, 0, 0]]
    assert by_fold(data, values).tolist() == [[0.5, 0]]  # of two that both get right one; of none nothing
    # regression: what each loses of its own clean score
    data, found = scored("regression", a=[-1.0] * 8, b=[-0.2] * 8)
    worst = {"a": np.full((1, 8), -1.5), "b": np.full((1, 8), -1.0)}
    assert at_equal_score(data, found, worst, "a", "b") == pytest.approx(0.3)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_geometry_is_that_of_autograd(task):
    dims = {"a": 4, "b": 3, "c": 5}
    model = model_of(dims, 0, output_dim={"binary": 1, "multiclass": 3, "regression": 2}[task])
    if task != "regression":
        model.rescale.mean.zero_()
    features = {name: torch.randn(31, d).double() for name, d in dims.items()}
    scale = torch.tensor([1.0, 3.0]).double() if task == "regression" else torch.ones(1).double()
    criterion = Criterion(torch.zeros(31, 2 if task == "regression" else 1), task, scale)
    stds = latent_stds(model, features)
    output = model(features).prediction.detach()
    # of classes, what class 0 is ahead of each other
    weights = torch.tensor([[1.0, -1, 0], [1, 0, -1]]).double() if task == "multiclass" else torch.eye(output.shape[1])
    weights = weights.double()
    size = scale.expand_as(output) if task == "regression" else (output @ weights.T).abs()
    gradients, norms, relative = [], [], []
    for name, d in dims.items():
        change = torch.zeros(31, d, dtype=torch.float64, requires_grad=True)
        moved = features | {name: features[name] + change * model.standardise[name].std}
        said = model(moved).prediction
        lengths = [
            torch.autograd.grad(y.sum(), change, retain_graph=True)[0].norm(dim=1) for y in (said @ weights.T).unbind(1)
        ]
        gradients.append((torch.stack(lengths, 1) * d**0.5 / size).median().item())
    encoded = model.encode(features)
    for first, second in (("a", "b"), ("a", "c"), ("b", "c")):
        values = torch.zeros_like(output)
        for i, o in product(range(31), range(output.shape[1])):
            fixed = {name: z[i].detach() for name, z in encoded.items()}

            def of(u, v, fixed=fixed, o=o, first=first, second=second):
                latents = fixed | {first: u, second: v}
                return model.rescale(model.fusion([latents[name] for name in model.modalities]))[o]

            blocks = torch.autograd.functional.hessian(of, (fixed[first], fixed[second]))
            values[i, o] = torch.linalg.matrix_norm(blocks[0][1], ord=2)
        norms.append(values.mean().item())
        units = change_size(stds[first], 2) * change_size(stds[second], 2)
        relative.append((values @ weights.abs().T * units / size).median().item())
    found = geometry(model, features, stds, criterion)
    assert found["gradient"] == pytest.approx(np.mean(gradients), rel=1e-9)
    assert found["norm"] == pytest.approx(np.mean(norms), rel=1e-9)
    assert found["interaction"] == pytest.approx(np.mean(relative), rel=1e-9)


# ---- matching ------------------------------------------------------------------------------------------------------


def test_matching_interpolates_between_the_neighbours_and_stops_at_the_ends():
    available = np.array([[[3.0, 1.0, 2.0]]])
    for wanted, expected in ((2.0, [0, 0, 1]), (1.25, [0, 0.75, 0.25]), (2.5, [0.5, 0, 0.5]), (9, [1, 0, 0])):
        assert matching_weights(np.array([[wanted]]), available).tolist() == [[expected]]


def test_a_difference_that_only_the_training_loss_makes_is_gone_at_matched_loss():
    rng = np.random.default_rng(0)
    found, data = made_up(set()), folded(folds=4, examples=160)
    for label in LABELS:
        found.training[label] = rng.normal(size=(1, 4)) - 4 * (label == f"jWAE, rank {HIGH}")
    for step, label in enumerate(SLOWER):
        found.training[label] = found.training[f"jWAE, rank {HIGH}"] + 4 * (2 - step)
    for label in LABELS:  # the gradient is a function of the training loss and of nothing else
        found.gradient[label] = np.exp(-found.training[label])
    assert all(reached(found, rank) == 1 for rank in LOW)
    named, _ = differences(data, found)
    assert named[f"gradient / margin: low below {HIGH}, {TRAINED}"].values.mean() > 1
    np.testing.assert_allclose(named[f"gradient / margin: low below {HIGH}, {EQUAL}"].values, 0, atol=1e-12)


# ---- noise ---------------------------------------------------------------------------------------------------------


def test_noise_lies_along_its_components_and_has_one_length():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    # standardised, the first two coordinates of an own basis vary most, the last two least
    x = torch.randn(500, 8, generator=generator) * torch.tensor([9.0, 8, 3, 3, 3, 3, 0.2, 0.1]) @ turn
    rows = torch.arange(400)
    std = x[rows].std(0, correction=0)
    _, _, axes = torch.linalg.svd((x[rows] - x[rows].mean(0)) / std, full_matrices=False)
    for end, span in (("leading", axes[:2]), ("trailing", axes[-2:])):
        noise = (principal_noise(x, components_of(x, rows), end, torch.Generator().manual_seed(0)) - x) / std
        torch.testing.assert_close(noise.norm(dim=1), torch.full((500,), NOISE * 8**0.5), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close((noise @ span.T) @ span, noise, rtol=1e-3, atol=1e-3)


def test_noise_harms_the_model_that_reads_its_components():
    generator = torch.Generator().manual_seed(0)
    data = planted_study()
    a = torch.randn(60, 1, generator=generator) + 0.1 * torch.randn(60, 4, generator=generator)
    data = replace(data, pool=replace(data.pool, features={"a": a, "b": data.pool.features["b"]}))
    std, mean = torch.std_mean(a[:30], 0, correction=0)
    _, _, axes = torch.linalg.svd((a[:30] - mean) / std, full_matrices=False)
    models = [reader(0, 1.0), reader(0, 1.0)]
    for model, axis in zip(models, (axes[0], axes[-1]), strict=True):
        with torch.no_grad():
            model.jwae.encoders["a"][0].weight.copy_(axis[None])
        model.fit_standardisation({name: x[:30] for name, x in data.pool.features.items()})
    outputs = outputs_of(data, models).reshape(2, 1, 1, -1)
    grid = Grid(data, [Setting("first", 1), Setting("last", 1)], [0], models, outputs, {})
    moved = {
        end: np.abs(noisy_predictions(grid, components_by_fold(data), end) - grid.predictions()).mean(-1)[:, 0]
        for end in ("leading", "trailing")
    }
    assert moved["leading"][0] > 5 * moved["trailing"][0] and moved["trailing"][1] > 5 * moved["leading"][1]


# ---- the rule ------------------------------------------------------------------------------------------------------


def made_up(better: set[str], folds: int = 4, examples: int = 40) -> Measures:
    """Numbers of every setting; the low ranks are better in those contrasts of DECIDES that are named, else worse."""
    rng = np.random.default_rng(0)
    found = Measures()
    low = [f"jWAE, rank {rank}" for rank in LOW]
    for label in LABELS:
        up = [(0.2 if name in better else -0.2) if label in low else 0.0 for name in DECIDES]
        noise = 0.02 * rng.normal(size=(4, 1, folds * examples))
        found.clean[label] = np.ones((1, folds * examples))
        found.certified[label], found.attacked[label] = 0.6 + up[0] + noise[0], 0.7 + up[1] + noise[1]
        found.interaction[label] = np.exp(-2 * up[2] + noise[2, :, :folds])
        found.gradient[label] = np.exp(-2 * up[3] + noise[3, :, :folds])
        found.loss[label] = 0.5 - up[4] + noise[2]
        found.training[label] = np.zeros((1, folds)) + (0.5 * SLOWER.index(label) if label in SLOWER else 0)
        found.latent[label] = found.outcome[label] = found.leading[label] = found.trailing[label] = found.clean[label]
        found.norm[label] = np.ones((1, folds))
    return found


def judged(found: Measures):
    data = folded(folds=4, examples=160)
    named, effects = differences(data, found)
    contrasts = corrected_contrasts(named, effects, cut=data.cut)
    return verdict_of(contrasts), {contrast.name: contrast for contrast in contrasts}


def test_claim_is_supported_where_all_five_hold_and_controls_do_not_decide():
    verdict, by_name = judged(made_up(set(DECIDES)))
    assert verdict == "supported"
    assert [by_name[name].verdict for name in DECIDES] == ["supported"] * 5
    assert {name for name, contrast in by_name.items() if contrast.decides} == set(DECIDES)
    assert by_name[DECIDES[3]].effect == experiment.RATIO_EFFECT != by_name[DECIDES[0]].effect
    assert by_name[DECIDES[0]].estimate == pytest.approx(0.2, abs=0.01)
    assert by_name[DECIDES[3]].estimate == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("broken", DECIDES)
def test_any_one_of_the_five_that_fails_takes_the_claim_down(broken):
    verdict, by_name = judged(made_up(set(DECIDES) - {broken}))
    assert by_name[broken].estimate < 0 and by_name[broken].verdict == "not supported"
    assert all(by_name[name].verdict == "supported" for name in DECIDES if name != broken)
    assert verdict == "not supported"


def test_controls_are_what_their_names_say():
    found = made_up(set(DECIDES))
    spectral = f"spectral norm, rank {HIGH}"
    found.attacked[spectral] = found.attacked[f"jWAE, rank {HIGH}"] + 0.1
    found.trailing[f"jWAE, rank {HIGH}"] = found.clean[spectral] - 0.3
    found.trailing["jWAE, rank 2"] = found.clean[spectral] - 0.2
    by_name = judged(found)[1]
    assert by_name[f"attacked: {spectral} over jWAE, rank {HIGH}"].estimate == pytest.approx(0.1)
    assert by_name["trailing noise, AUROC: low loses less"].estimate == pytest.approx(0.2)
    assert by_name["leading noise, AUROC: low loses less"].estimate == 0
    assert by_name["trailing over leading noise, AUROC: low loses less"].estimate == pytest.approx(0.2)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_toy_study_is_measured_with_the_right_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "RESTARTS", 1)
    data, grids, recipes = folded("regression", outputs=2, folds=2, examples=80), [], []
    options = Options(seeds=1, epochs=1, hidden_dim=6, cross_validate=2)

    class Watched(Run):
        def grid(self, data, settings, title, recipe=None, **shape):
            recipes.append(recipe)
            grids.append(super().grid(data, settings, title, recipe, **shape))
            return grids[-1]

    outcome = measure(data, Watched(options, tmp_path, torch.device("cpu")))
    free, spectral = grids[:2]
    assert [s.label for grid in grids for s in grid.settings] == LABELS == list(outcome.numbers)
    for grid in grids:
        for p, setting in enumerate(grid.settings):
            assert int(grid.model(p, 0).fusion.rank_mask.sum()) == setting.rank == int(setting.label.split()[-1])
    weights = [grid.model(1, 0).jwae.encoders["text"][0].weight for grid in (spectral, free)]
    norms = [torch.linalg.matrix_norm(weight, ord=2).item() for weight in weights]
    assert norms[0] == pytest.approx(experiment.SPECTRAL_NORM, rel=0.03) != pytest.approx(norms[1], rel=0.03)
    rate = options.recipe("regression").learning_rate
    assert [recipe.learning_rate / rate for recipe in recipes[2:]] == pytest.approx(list(STEPS))
    assert "mmd" in free.settings[0].terms and "mmd" not in free.settings[len(RANKS)].terms
    json.dumps(outcome.numbers, allow_nan=False)
    for cells in outcome.numbers.values():
        order = np.array([cells["certified"], cells["attacked"], cells["clean"]])
        assert (np.diff(order, axis=0) >= -1e-5).all() and order.shape == (3, 1)
        assert (np.array(cells["latent worst"]) <= np.array(cells["clean"]) + 1e-6).all()
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))


def test_command_gives_no_verdict_where_no_rank_can_bind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(members, "RESTARTS", 1)
    monkeypatch.setattr(Grid, "latent_dimension", lambda *_: 1.0)
    data = write_mosi(tmp_path / "mosi.npz", 40)
    flags = ["--dataset", "cmu_mosi", "--data", str(data), "--seeds", "1", "--cross-validate", "2", "--epochs", "1"]
    assert run(EXPERIMENT, [*flags, "--device", "cpu"]) == 0
    folder = Path("runs/rank_robustness-cmu_mosi")
    results = json.loads((folder / "results.json").read_text())
    assert sorted(c["name"] for c in results["contrasts"] if c["decides"]) == sorted(DECIDES)
    assert results["verdict"] == "not identified" and "effective dimensions, fewer than its rank" in results["answer"]
    assert f"rho = {RHO:g}" in results["table"] and (folder / "figure.png").stat().st_size > 10_000
