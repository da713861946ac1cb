"""Whitening changes the coordinates of the latents and nothing that a model says; frames lead back to them."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from mmfusion.errors import InputError
from mmfusion.metrics.prior import check_prior
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.models.heads import Frame
from mmfusion.models.spectral_norm import normalise_spectrally
from mmfusion.models.whitening import whiten_latents


def trained_looking(modalities: int = 2, **shape: object) -> tuple[FusionModel, dict[str, Tensor]]:
    """A float64 model with latents of unequal variances off the origin, and 300 raw examples."""
    torch.manual_seed(0)
    dims = {name: 6 + i for i, name in enumerate("abc"[:modalities])}
    model = FusionModel(dims, 5, 16, 3, **shape).double()
    features = {name: torch.randn(300, d).double() * 3 + 1 for name, d in dims.items()}
    model.fit_standardisation(features)
    with torch.no_grad():
        for name in dims:
            model.jwae.encoders[name][-1].weight.mul_(torch.tensor([30.0, 5.0, 2.0, 1.0, 0.3])[:, None])
            model.jwae.encoders[name][-1].bias.add_(2)
            if model.jwae.noise == "dimension":
                model.jwae.set_noise(name, torch.tensor([0.5, 0.1, 4.0, 1e-6, 1.0]))
    return model, features


@pytest.mark.parametrize("noise", ["none", "dimension"])
@pytest.mark.parametrize(
    "shape", [{}, {"fused_dim": 4, "output_dim": 2}, {"output_dim": 3}, {"modalities": 1}, {"modalities": 3}]
)
def test_nothing_that_the_model_says_changes(noise, shape):
    model, features = trained_looking(noise=noise, **shape)
    before = copy.deepcopy(model)(features)
    whiten_latents(model, features)
    after = model(features)
    torch.testing.assert_close(after.prediction, before.prediction, rtol=1e-8, atol=1e-8)
    for name, x in before.reconstructions.items():
        torch.testing.assert_close(after.reconstructions[name], x, rtol=1e-8, atol=1e-8)
    if noise == "dimension":
        torch.testing.assert_close(after.covariance, before.covariance, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("noise", ["none", "dimension"])
def test_the_latents_have_the_moments_of_the_prior_and_the_most_telling_coordinate_first(noise):
    model, features = trained_looking(noise=noise)
    whiten_latents(model, features)
    output = model(features)
    for name, z in output.latents.items():
        spread = output.variances.get(name, torch.zeros(5).double())
        torch.testing.assert_close(z.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(z.T.cov() + torch.diag(spread), torch.eye(5).double(), rtol=0, atol=1e-8)
        assert (spread.diff() >= -1e-9).all()
    again = copy.deepcopy(model)
    whiten_latents(again, features)
    torch.testing.assert_close(again(features).prediction, output.prediction, rtol=1e-8, atol=1e-8)
    check = check_prior(output.latents["a"].detach().numpy(), spread.detach().numpy() if noise != "none" else None)
    assert check.follows["largest eigenvalue"].value < 1.5


def test_a_direction_without_variance_keeps_its_scale_and_the_function_its_values():
    model, features = trained_looking()
    with torch.no_grad():
        model.jwae.encoders["a"][-1].weight[2] = 0
        model.jwae.encoders["a"][-1].bias[2] = 7
    before = model(features).prediction.detach()
    whiten_latents(model, features)
    output = model(features)
    torch.testing.assert_close(output.prediction, before, rtol=1e-8, atol=1e-8)
    stds = output.latents["a"].std(0).sort().values
    torch.testing.assert_close(stds, torch.tensor([0.0, 1, 1, 1, 1]).double(), rtol=0, atol=1e-6)


def test_float32_models_keep_what_they_say_up_to_rounding():
    model, features = trained_looking(noise="dimension")
    model, features = model.float(), {name: x.float() for name, x in features.items()}
    before = model(features)
    before = before.prediction.detach(), before.covariance.detach()
    whiten_latents(model, features)
    after = model(features)
    for x, y in zip((after.prediction, after.covariance), before, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))


def test_other_heads_and_bound_weights_and_single_examples_are_refused():
    model, features = trained_looking(fusion="concatenation")
    with pytest.raises(ValueError, match="LMF"):
        whiten_latents(model, features)
    model, features = trained_looking()
    with pytest.raises(ValueError, match="2 examples"):
        whiten_latents(model, {name: x[:1] for name, x in features.items()})
    normalise_spectrally(model.fusion, 1.0)
    with pytest.raises(ValueError, match="free weights"):
        whiten_latents(model, features)


def test_a_missing_latent_is_the_prior_where_latents_are_uncertain_and_zero_where_they_are_not():
    for noise in ("none", "dimension"):
        model, features = trained_looking(noise=noise)
        present = {"a": torch.tensor([1.0, 0.0]).double().repeat(150)}
        whole, part = model(features), model(features, present=present)
        prediction, covariance = model.head(whole.latents, present)
        torch.testing.assert_close(prediction, part.prediction)
        torch.testing.assert_close(prediction[::2], whole.prediction[::2])
        by_hand = model.fusion([torch.zeros_like(whole.latents["a"]), whole.latents["b"]])
        torch.testing.assert_close(prediction[1::2], by_hand[1::2])
        if noise == "none":
            assert covariance is None
            continue
        torch.testing.assert_close(covariance, part.covariance)
        noise_of_b = model.latent_variances()[1]
        there = [torch.zeros_like(whole.latents["a"]), whole.latents["b"]]
        expected = model.fusion.moments(there, [torch.ones(5).double(), noise_of_b]).covariance
        torch.testing.assert_close(covariance[1::2], expected[1::2])


# ---- frames: the coordinates of training ---------------------------------------------------------------------------


def whitened_twice(noise: str = "none", modalities: int = 3) -> tuple[FusionModel, FusionModel, dict[str, Tensor]]:
    """A model as trained, the same whitened on two unlike sets of examples in turn, and examples of neither."""
    trained, features = trained_looking(modalities, noise=noise)
    model = copy.deepcopy(trained)
    whiten_latents(model, {name: x[:100] for name, x in features.items()})
    whiten_latents(model, {name: x[100:200] * torch.linspace(1, 3, x.shape[1]) + 2 for name, x in features.items()})
    return trained, model, {name: x[200:] for name, x in features.items()}


@pytest.mark.parametrize("noise", ["none", "dimension"])
def test_shared_latents_are_those_of_training_after_whitening_once_and_twice(noise):
    trained, twice, features = whitened_twice(noise)
    once, before = copy.deepcopy(trained), trained.encode(features)
    whiten_latents(once, features)
    for model in (once, twice):
        assert (model.encode(features)["a"] - before["a"]).abs().max() > 1, "else whitening did nothing"
        for name, z in model.shared_latents(features).items():
            torch.testing.assert_close(z, before[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(features).prediction, trained(features).prediction, rtol=1e-8, atol=1e-8)


def test_float32_models_share_the_latents_of_training_up_to_rounding():
    trained, _, features = whitened_twice("dimension")
    trained, features = trained.float(), {name: x.float() for name, x in features.items()}
    before, model = trained.encode(features), copy.deepcopy(trained)
    for _ in range(2):
        whiten_latents(model, features)
    for name, z in model.shared_latents(features).items():
        torch.testing.assert_close(z, before[name], rtol=1e-4, atol=1e-4 * before[name].detach().abs().max().item())


def test_models_that_were_not_whitened_share_their_own_latents_bit_by_bit():
    for shape in ({}, {"fusion": "concatenation"}, {"spectral_norm": 1.0}):
        model, features = trained_looking(**shape)
        for name, z in model.shared_latents(features).items():
            assert torch.equal(z, model.encode(features)[name])


def test_modalities_that_are_not_given_are_not_asked_for():
    _, model, features = whitened_twice()
    found = model.shared_latents({"b": features["b"][0]})
    assert list(found) == ["b"] and found["b"].shape == (5,)
    torch.testing.assert_close(found["b"], model.shared_latents(features)["b"][0])


def test_what_is_decoded_across_modalities_is_what_the_trained_decoders_say():
    trained, model, features = whitened_twice("dimension")
    latents, own = trained.encode(features), model(features).reconstructions
    for source in features:
        decoded = model.cross_decode({source: features[source]}, source)
        assert list(decoded) == list(model.modalities)
        for name, x in decoded.items():
            torch.testing.assert_close(x, trained.jwae.decoders[name](latents[source]), rtol=1e-4, atol=1e-4)
        assert torch.equal(decoded[source], own[source])


def test_a_frame_undoes_itself_on_any_leading_shape_and_composes_as_its_maps():
    first, second = ((torch.randn(4, 4).double(), torch.randn(4).double()) for _ in range(2))
    frame = Frame(4).double()
    frame.compose(*first)
    frame.compose(*second)
    z = torch.randn(3, 2, 4).double()
    by_hand = torch.stack([first[0] @ (second[0] @ row + second[1]) + first[1] for row in z.flatten(0, 1)])
    torch.testing.assert_close(frame(z), by_hand.unflatten(0, (3, 2)))
    for some in (z, z[0], z[0, 0], z[:0]):
        torch.testing.assert_close(frame.inverse(frame(some)), some, rtol=1e-6, atol=1e-6)


def test_members_of_a_stack_have_frames_of_their_own():
    frames = [whitened_twice(noise)[1].frames["b"] for noise in ("none", "dimension")]
    parameters, buffers = stack_module_state(frames)
    z = torch.randn(2, 7, 5).double()
    found = vmap(lambda p, b, x: functional_call(frames[0], (p, b), x))(parameters, buffers, z)
    for frame, x, y in zip(frames, z, found, strict=True):
        torch.testing.assert_close(y, frame(x))


def test_frames_are_saved_and_loaded_and_a_file_without_them_is_refused(tmp_path):
    trained, model, features = whitened_twice("dimension")
    dims, features = {name: x.shape[1] for name, x in features.items()}, {n: x.float() for n, x in features.items()}
    shape = {"latent_dim": 5, "hidden_dim": 16, "rank": 3, "noise": "dimension"}
    FusionEnsemble.from_members([model.float()], input_dims=dims, **shape).save_pretrained(tmp_path)
    (loaded,) = FusionEnsemble.from_pretrained(tmp_path).members
    before = trained.float().encode(features)
    for name, z in loaded.shared_latents(features).items():
        assert torch.equal(z, model.shared_latents(features)[name])
        torch.testing.assert_close(z, before[name], rtol=1e-3, atol=1e-3)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: x for name, x in state.items() if ".frames." not in name}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"frames.*train the run anew"):
        FusionEnsemble.from_pretrained(tmp_path)
