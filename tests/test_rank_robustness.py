"""Robustness at matched accuracy: models planted robust and fragile, the geometry by autograd, the written rule."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_experiments import folded, write_mosi
from test_robustness import model_of

from experiments import rank_robustness as experiment
from experiments.experiment import Options, Run, run
from experiments.rank_robustness import (
    DECAYS,
    DECIDES,
    DROPOUTS,
    EXPERIMENT,
    HIGH,
    LOW,
    RANKS,
    RHO,
    RankRobustnessResult,
    at_equal_score,
    differences,
    examine,
    geometry,
    measure,
)
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.worst_case import Criterion, change_size, latent_stds
from mmfusion.training.grid import Grid, Setting, outputs_of

LABELS = [
    *(f"{kind}, rank {rank}" for kind, rank in product(("prior", "no prior"), RANKS)),
    *(f"decay {decay:g}, rank {HIGH}" for decay in DECAYS),
    *(f"dropout {rate:g}, rank 4" for rate in DROPOUTS),
    "spectral norm, rank 4",
    f"spectral norm, rank {HIGH}",
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
    found = examine(data, [Grid(data, [Setting("robust", 1), Setting("fragile", 1)], [0], models, outputs, {})])
    assert found.clean["robust"].all() and found.clean["fragile"].all()
    # moved by .05 sqrt(4) = .1: 1 stands, 1/50 falls; `b` moves nothing, and is one of two modalities
    for worst in (found.certified, found.attacked):
        np.testing.assert_array_equal(worst["robust"], 1.0)
        np.testing.assert_array_equal(worst["fragile"], 0.5)
        np.testing.assert_array_equal(at_equal_score(data, found, worst, "robust", "fragile"), 0.5)
        np.testing.assert_array_equal(at_equal_score(data, found, worst, "fragile", "robust"), -0.5)
    assert found.gradient["fragile"] / found.gradient["robust"] == pytest.approx(50, rel=1e-4)
    assert found.gradient["robust"] == pytest.approx(4**0.5 / 2, rel=1e-4)  # sqrt(d) |g| / |y| and 0, their mean
    np.testing.assert_allclose(found.loss["robust"], found.loss["fragile"], atol=1e-5)
    np.testing.assert_array_equal(found.missing["robust"], (1 + (data.pool.target[40:].numpy() == 1)[None]) / 2)
    assert found.norm["robust"] == found.interaction["robust"] == 0


def test_settings_that_are_equal_differ_by_nothing():
    rng = np.random.default_rng(0)
    clean, worst = rng.integers(0, 2, (3, 20)).astype(float), rng.random((3, 20))
    found = SimpleNamespace(clean={"a": clean, "b": clean})
    for task in ("binary", "regression"):
        assert not at_equal_score(SimpleNamespace(task=task), found, {"a": worst, "b": worst}, "a", "b").any()


def test_only_examples_that_both_get_right_count():
    found = SimpleNamespace(clean={"a": np.array([[1.0, 1, 0, 0]]), "b": np.array([[1.0, 0, 1, 0]])})
    worst = {"a": np.array([[1.0, 1, 0, 0]]), "b": np.array([[0.0, 0, 1, 0]])}
    assert at_equal_score(SimpleNamespace(task="binary"), found, worst, "a", "b").tolist() == [[1, 0, 0, 0]]
    # regression: what each loses of its own clean score
    found = SimpleNamespace(clean={"a": np.array([[-1.0]]), "b": np.array([[-0.2]])})
    worst = {"a": np.array([[-1.5]]), "b": np.array([[-1.0]])}
    assert at_equal_score(SimpleNamespace(task="regression"), found, worst, "a", "b") == pytest.approx(0.3)


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


# ---- the rule --------------------------------------------------------------------------------------------------------


def made_up(better: set[str], seeds: int = 6, examples: int = 40) -> RankRobustnessResult:
    """Numbers of every setting; the low ranks are better in those contrasts of DECIDES that are named, else worse."""
    rng = np.random.default_rng(0)
    found = RankRobustnessResult(*({} for _ in range(10)))
    low = [f"prior, rank {rank}" for rank in LOW]
    for label in LABELS:
        up = {name: (0.2 if name in better else -0.2) if label in low else 0.0 for name in DECIDES}
        noise = 0.02 * rng.normal(size=(4, seeds, examples))
        found.clean[label] = np.ones((seeds, examples))
        found.certified[label] = 0.6 + up[DECIDES[0]] + noise[0]
        found.attacked[label] = 0.7 + up[DECIDES[1]] + noise[1]
        found.loss[label] = 0.5 - up[DECIDES[2]] + noise[2]
        found.gradient[label] = np.exp(-2 * up[DECIDES[3]] + noise[3, :, 0])
        found.latent[label] = found.noisy[label] = found.missing[label] = found.clean[label]
        found.interaction[label] = found.norm[label] = np.ones(seeds)
    return found


def judged(found: RankRobustnessResult, monkeypatch):
    monkeypatch.setattr(experiment, "examine", lambda *_: found)
    monkeypatch.setattr(experiment, "verdict_of_rank", lambda grid, label, verdict: (verdict, ""))  # no latents here
    return measure(folded(examples=160), SimpleNamespace(grid=lambda *_, **__: None))


def test_claim_is_supported_where_all_four_hold_and_controls_do_not_decide(monkeypatch):
    outcome = judged(made_up(set(DECIDES)), monkeypatch)
    assert outcome.verdict == "supported"
    by_name = {contrast.name: contrast for contrast in outcome.contrasts}
    assert [by_name[name].verdict for name in DECIDES] == ["supported"] * 4
    assert by_name["certified: prior over none, rank 4"].verdict == "supported"  # the low rank with prior is the better
    assert by_name["loss: prior below none, rank 4"].estimate > 0
    assert by_name["missing: dropout .2 over 0, rank 4"].estimate == 0
    assert {name for name, contrast in by_name.items() if contrast.decides} == set(DECIDES)
    assert by_name[DECIDES[3]].effect == experiment.RATIO_EFFECT != by_name[DECIDES[0]].effect


@pytest.mark.parametrize("broken", DECIDES)
def test_any_one_of_the_four_that_fails_takes_the_claim_down(monkeypatch, broken):
    outcome = judged(made_up(set(DECIDES) - {broken}), monkeypatch)
    by_name = {contrast.name: contrast for contrast in outcome.contrasts}
    assert by_name[broken].estimate < 0 and by_name[broken].verdict == "not supported"
    assert all(by_name[name].verdict == "supported" for name in DECIDES if name != broken)
    assert outcome.verdict == "not supported"


def test_contrasts_are_what_their_claims_say():
    found = made_up(set(DECIDES))
    found.attacked[f"decay 1, rank {HIGH}"] = found.attacked[f"prior, rank {HIGH}"] + 0.4
    found.missing["dropout 0.2, rank 4"] = found.clean["dropout 0.2, rank 4"] - 0.1
    found.missing["dropout 0, rank 4"] = found.clean["dropout 0, rank 4"] - 0.4
    named = {name: values for name, (values, *_) in differences(folded(), found).items()}
    assert named[DECIDES[0]].mean() == pytest.approx(0.2, abs=0.01)
    assert named[DECIDES[1]].mean() == pytest.approx(0.2, abs=0.01)
    assert named[DECIDES[2]].mean() == pytest.approx(0.2, abs=0.01)
    assert named[DECIDES[3]].mean() == pytest.approx(0.4, abs=0.02) and named[DECIDES[3]].shape == (6,)
    assert named[f"attacked: ranks 2-4 over decay 1, rank {HIGH}"].mean() == pytest.approx(-0.2, abs=0.01)
    assert named["missing: dropout .2 over 0, rank 4"].mean() == pytest.approx(0.3)
    assert len([name for name in named if name not in DECIDES]) == len(DECAYS) + 1 + 5


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_toy_study_is_measured_with_the_right_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESTARTS", 1)
    data, grids = folded("regression", outputs=2, folds=2, examples=80), []
    options = Options(seeds=2, epochs=1, hidden_dim=6)

    class Watched(Run):
        def grid(self, *arguments, **shape):
            grids.append(super().grid(*arguments, **shape))
            return grids[-1]

    outcome = measure(data, Watched(options, tmp_path, torch.device("cpu")))
    free, spectral = grids
    assert [s.label for grid in grids for s in grid.settings] == LABELS == list(outcome.numbers)
    for grid in grids:
        for p, setting in enumerate(grid.settings):
            assert int(grid.model(p, 0).fusion.rank_mask.sum()) == setting.rank == int(setting.label.split()[-1])
    weights = [grid.model(1, 0).jwae.encoders["text"][0].weight for grid in (spectral, free)]
    norms = [torch.linalg.matrix_norm(weight, ord=2).item() for weight in weights]
    assert norms[0] == pytest.approx(experiment.SPECTRAL_NORM, rel=0.03) != pytest.approx(norms[1], rel=0.03)
    decays = {s.label: s.weight_decay for s in free.settings if s.label.startswith("decay")}
    assert list(decays.values()) == list(DECAYS)
    assert free.settings[free.index("dropout 0.5, rank 4")].dropout == {"audio": 0.5, "text": 0.5}
    assert "mmd" in free.settings[0].terms and "mmd" not in free.settings[len(RANKS)].terms
    json.dumps(outcome.numbers, allow_nan=False)
    for cells in outcome.numbers.values():
        order = np.array([cells["certified"], cells["attacked"], cells["clean"]])
        assert (np.diff(order, axis=0) >= -1e-5).all() and order.shape == (3, 2)
        assert (np.array(cells["latent worst"]) <= np.array(cells["clean"]) + 1e-6).all()
    outcome.draw(Figure(figsize=outcome.size, layout="constrained"))


def test_command_names_the_four_and_gives_no_verdict_where_no_rank_of_32_can_bind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "RANKS", (2, 4, 32))
    monkeypatch.setattr(experiment, "RESTARTS", 1)
    data = write_mosi(tmp_path / "mosi.npz", 40)
    flags = ["--dataset", "cmu_mosi", "--data", str(data), "--seeds", "2", "--epochs", "1", "--device", "cpu"]
    assert run(EXPERIMENT, flags) == 0
    folder = Path("runs/rank_robustness-cmu_mosi")
    results = json.loads((folder / "results.json").read_text())
    assert sorted(c["name"] for c in results["contrasts"] if c["decides"]) == sorted(DECIDES)
    assert results["verdict"] == "not identified" and "effective dimensions, fewer than its rank" in results["answer"]
    assert f"rho = {RHO:g}" in results["table"] and (folder / "figure.png").stat().st_size > 10_000
