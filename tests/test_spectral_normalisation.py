"""The norm that is divided by, against the singular values; as a training option, in stacks, on disk, as a flag."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_experiments import SMALL, folded
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lmf_module import LowRankMultimodalFusion
from main_hateful_memes import run
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.models.spectral_norm import SpectralNormalisation, normalise_spectrally, schatten_norm
from mmfusion.training.grid import Setting, train_grid

spectral_property = settings(max_examples=60, deadline=None, derandomize=True)
ORDER = 2 ** (SpectralNormalisation.SQUARINGS + 1)  # 128


def spectral(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(weight, ord=2)


def drawn(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the norm --------------------------------------------------------------------------------------------------------


@spectral_property
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999), st.integers(1, 6))
def test_schatten_norm_is_the_power_sum_of_the_singular_values(rows, columns, seed, squarings):
    weight = drawn(rows, columns, seed)
    order = 2 ** (squarings + 1)
    s = torch.linalg.svdvals(weight)
    expected = s.max() * (s / s.max()).pow(order).sum() ** (1 / order)
    torch.testing.assert_close(schatten_norm(weight, squarings), expected, rtol=1e-10, atol=0)


@spectral_property
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 999), st.floats(0.1, 10), st.sampled_from(["f32", "f64"]))
def test_norm_lies_between_the_bound_and_n_to_the_minus_128th_of_it(rows, columns, seed, bound, precision):
    dtype, tolerance = {"f32": (torch.float32, 1e-5), "f64": (torch.float64, 1e-10)}[precision]
    norm = spectral(SpectralNormalisation(bound)(drawn(rows, columns, seed, dtype))).item()
    assert bound * min(rows, columns) ** (-1 / ORDER) * (1 - tolerance) <= norm <= bound * (1 + tolerance)


def test_both_ends_of_that_interval_are_reached():
    alone, equal = torch.zeros(9, 12).double(), torch.eye(9, 12).double()
    alone[0, 0] = 3.0
    normalise = SpectralNormalisation(2.0)
    assert spectral(normalise(alone)).item() == pytest.approx(2.0, rel=1e-12)
    assert spectral(normalise(equal)).item() == pytest.approx(2.0 * 9 ** (-1 / ORDER), rel=1e-12)


@spectral_property
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.integers(-12, 12))
def test_weights_of_any_scale_give_the_same(rows, columns, seed, exponent):
    normalise, weight = SpectralNormalisation(1.5), drawn(rows, columns, seed)
    scaled = normalise(weight.float() * 10.0**exponent)
    torch.testing.assert_close(scaled, normalise(weight).float(), rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_finite_differences():
    for shape in ((3, 5), (5, 3), (1, 4)):
        weight = drawn(*shape, seed=0).requires_grad_(True)
        assert torch.autograd.gradcheck(SpectralNormalisation(0.7), (weight,))


# ---- layers and models -----------------------------------------------------------------------------------------------


def test_every_linear_layer_of_encoders_and_head_is_normalised_and_no_decoder():
    model = FusionModel({"a": 5, "b": 4}, 3, 6, 2, spectral_norm=0.8)
    for part in (model.jwae.encoders, model.fusion):
        linear = [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
        assert linear
        for layer in linear:
            assert 0.8 * 0.97 <= spectral(layer.weight).item() <= 0.8 * (1 + 1e-5)
    free = [layer for layer in model.jwae.decoders.modules() if isinstance(layer, nn.Linear)]
    assert free and not any(hasattr(layer, "parametrizations") for layer in free)
    assert "parametrizations" not in "".join(dict(FusionModel({"a": 5}, 3, 6).named_parameters()))


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_bound_that_is_not_positive_is_refused(bound):
    with pytest.raises(ValueError, match="is positive, not"):
        normalise_spectrally(nn.Linear(2, 2), bound)


@pytest.mark.parametrize("shared", [False, True])
def test_masked_ranks_take_no_part_in_the_norm(shared):
    torch.manual_seed(0)
    large = LowRankMultimodalFusion((5, 4), 2, 6, active_rank=2, shared_factors=shared).double()
    small = LowRankMultimodalFusion((5, 4), 2, 2, shared_factors=shared).double()
    with torch.no_grad():
        for own, other in zip(small.parameters(), large.parameters(), strict=True):
            own.copy_(other[: len(own)])
    for layer in (large, small):
        normalise_spectrally(layer, 1.0)
    latents = [drawn(7, d, seed=d) for d in large.input_dims]
    torch.testing.assert_close(large(latents), small(latents), rtol=1e-10, atol=1e-10)
    large(latents).square().sum().backward()
    for projection in large.projections:
        gradient = projection.parametrizations.weight.original.grad
        active = 2 if shared else 4
        assert gradient[:active].any() and not gradient[active:].any()


def test_vmap_over_stacked_models_gives_each_models_own_outputs_and_gradients():
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(FusionModel({"a": 5, "b": 4}, 3, 6, 3, spectral_norm=1.0, active_rank=1 + seed).double())
    features = {"a": drawn(8, 5, seed=0), "b": drawn(8, 4, seed=1)}
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(p, b):
        return functional_call(base, (p, b), (features,)).prediction.square().sum()

    values, gradients = vmap(loss)(parameters, buffers), vmap(grad(loss))(parameters, buffers)
    for k, model in enumerate(models):
        alone = model(features).prediction.square().sum()
        torch.testing.assert_close(values[k], alone, rtol=1e-10, atol=1e-12)
        alone.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name][k], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_trained_grid_keeps_the_bound_and_its_ensemble_survives_the_disk(tmp_path):
    data = folded()
    settings_of = [Setting("rank 3", 3), Setting("rank 1", 1)]
    grid = train_grid(data, settings_of, [0, 1], SMALL, spectral_norm=0.5)
    free = train_grid(data, settings_of, [0, 1], SMALL)
    assert abs(grid.outputs - free.outputs).max() > 1e-3
    for p in range(2):
        ensemble = grid.ensemble(p)
        for member in ensemble.members:
            head = [layer.weight[member.fusion.rank_mask.bool()] for layer in member.fusion.projections]
            encoders = [x.weight for x in member.jwae.encoders.modules() if isinstance(x, nn.Linear)]
            assert len(head) == 2 and len(encoders) == 4 and len(head[0]) == settings_of[p].rank
            for weight in (*head, *encoders):
                assert 0.5 * 0.97 <= spectral(weight).item() <= 0.5 * (1 + 1e-5)
        ensemble.save_pretrained(tmp_path / str(p))
        loaded = FusionEnsemble.from_pretrained(tmp_path / str(p))
        with torch.no_grad():
            said = loaded(data.pool.features)
        assert torch.equal(said, ensemble(data.pool.features))
        torch.testing.assert_close(said[..., 0].numpy(), grid.outputs[p, :, 0], rtol=1e-5, atol=1e-6)


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--spectral-norm", "0"),
        ("--spectral-norm", "-1"),
        ("--spectral-norm", "nan"),
        ("--spectral-norm", "inf"),
        ("--spectral-norm", "large"),
        ("--modality-dropout", "1"),
        ("--modality-dropout", "-0.1"),
        ("--modality-dropout", "nan"),
    ],
)
def test_main_script_refuses_what_makes_no_sense_in_one_line(tmp_path, monkeypatch, capsys, flag, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run([flag, value])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and flag in error[0]
    assert list(tmp_path.iterdir()) == []
