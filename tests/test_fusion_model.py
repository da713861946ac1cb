"""The fusion model and its ensemble: raw features in, the same logits out after saving and loading."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfusion.errors import InputError
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.models.heads import Standardise

DIMS = {"image": 7, "text": 5}
UNSORTED = {"text": 5, "audio": 4, "video": 6}  # config.json is written with sorted keys


def features(examples: int = 9, scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: scale * torch.randn(examples, d, generator=rng) + 3 for name, d in DIMS.items()}


def test_standardised_training_features_have_mean_0_and_std_1_and_constant_columns_give_0():
    x = torch.randn(200, 4) * torch.tensor([1e-3, 1.0, 1e3, 1.0]) + torch.tensor([5.0, 0.0, -7.0, 0.0])
    x[:, 3] = 0.1
    module = Standardise(4)
    module.fit(x)
    y = module(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    assert (module(x + 1)[:, 3] - 1).abs().max() < 1e-5


def test_standardisation_makes_the_units_of_the_features_irrelevant():
    a, b = FusionModel(DIMS), FusionModel(DIMS)
    b.load_state_dict(a.state_dict())
    a.fit_standardisation(features())
    b.fit_standardisation(features(scale=1.0) | {"image": 100 * features()["image"]})
    scaled = features() | {"image": 100 * features()["image"]}
    torch.testing.assert_close(a(features()).prediction, b(scaled).prediction, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["lmf", "concatenation"])
@pytest.mark.parametrize("modalities", [("image",), ("text",), ("image", "text")])
def test_saved_ensemble_repeats_its_predictions_exactly(tmp_path, fusion, modalities):
    dims = {name: DIMS[name] for name in modalities}
    ensemble = FusionEnsemble(dims, members=3, latent_dim=4, hidden_dim=6, rank=2, fusion=fusion)
    for member in ensemble.members:
        member.fit_standardisation(features())
    ensemble.save_pretrained(tmp_path)
    again = FusionEnsemble.from_pretrained(tmp_path)
    x = {name: features()[name] for name in modalities}
    assert torch.equal(again(x), ensemble(x))
    assert again(x).shape == (3, 9, 1)


@pytest.mark.parametrize("fusion", ["lmf", "concatenation"])
def test_saved_ensemble_keeps_its_modalities_apart_in_any_order(tmp_path, fusion):
    ensemble = FusionEnsemble(UNSORTED, members=1, latent_dim=4, fusion=fusion)
    ensemble.save_pretrained(tmp_path)
    x = {name: torch.randn(9, d) for name, d in UNSORTED.items()}
    assert torch.equal(FusionEnsemble.from_pretrained(tmp_path)(x), ensemble(x))


def test_saved_mask_is_loaded_with_the_weights(tmp_path):
    ensemble = FusionEnsemble(DIMS, members=1, latent_dim=4, rank=3)
    ensemble.members[0].fusion.rank_mask[1:] = 0
    ensemble.save_pretrained(tmp_path)
    assert FusionEnsemble.from_pretrained(tmp_path).members[0].fusion.rank_mask.tolist() == [1, 0, 0]


def test_ensemble_is_its_members():
    ensemble = FusionEnsemble(DIMS, members=2, latent_dim=4)
    for s, member in enumerate(ensemble.members):
        torch.testing.assert_close(ensemble(features())[s], member(features()).prediction)


def test_probabilities_are_the_logits_sigmoid_and_every_example_has_its_own():
    ensemble = FusionEnsemble(DIMS, members=2, latent_dim=4)
    p = ensemble.predict_proba(features())
    torch.testing.assert_close(p, ensemble(features()).squeeze(-1).sigmoid())
    torch.testing.assert_close(ensemble.predict_proba({k: v[3:4] for k, v in features().items()}), p[:, 3:4])


def test_order_of_the_given_dict_does_not_matter():
    model = FusionModel(DIMS, latent_dim=4)
    x = features()
    torch.testing.assert_close(model(x).prediction, model({"text": x["text"], "image": x["image"]}).prediction)


def test_reconstructions_are_made_only_when_asked_for():
    model = FusionModel(DIMS, latent_dim=4)
    assert model(features(), reconstruct=False).reconstructions == {}
    assert model(features()).reconstructions["image"].shape == (9, 7)


# ---- a saved model is the model, or is refused


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    FusionEnsemble(DIMS, members=2, latent_dim=4, hidden_dim=6, rank=2).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def drop(state):
    del state["members.1.jwae.encoders.image.0.weight"]


def spoil(state):
    state["members.0.fusion.rank_weights"][0] = float("nan")


def broadcast(state):
    name = "members.0.fusion.projections.0.weight"
    state[name] = state[name][:, :1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"members\.1\.jwae\.encoders\.image\.0\.weight is missing"),
        (lambda state: state.update(extra=torch.ones(3)), r"extra is \(3,\), not a part of this model"),
        (broadcast, r"projections\.0\.weight is \(2, 1\), not \(2, 4\)"),
        (spoil, r"rank_weights holds values that are no finite numbers"),
        (lambda state: state.clear() or state.update(a=torch.ones(1)), "tensors differ"),
    ],
    ids=["partial", "larger", "would broadcast", "NaN", "foreign"],
)
def test_weights_that_are_not_the_models_own_are_refused(saved, change, message):
    edit_weights(saved, change)
    with pytest.raises(InputError, match=message):
        FusionEnsemble.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "sum"}, 'fusion is "sum"; known are lmf, concatenation, tensor'),
        ({"latent_dim": "8"}, 'latent_dim is "8", not a whole number'),
        ({"hidden_dim": 10**9}, "hidden_dim is 1000000000, not a whole number from 1 to 65536"),
        ({"rank": True}, "rank is true"),
        ({"input_dims": {}}, "input_dims is {}"),
        ({"input_dims": {"image": -1}}, "not a width from 1"),
        ({"spectral_norm": 0}, "spectral_norm is 0, not a number above 0"),
        ({"members": 3}, "is missing"),
    ],
)
def test_config_that_describes_no_model_is_refused(saved, change, message):
    edit_config(saved, **change)
    with pytest.raises(InputError, match=message):
        FusionEnsemble.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null"])
def test_config_that_is_no_object_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        FusionEnsemble.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_fifo_in_place_of_a_model_file_does_not_hang(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(InputError, match=name):
        FusionEnsemble.from_pretrained(saved)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "no_such_folder", Path("a/b")])
def test_folder_that_is_not_there_is_spoken_of_as_a_folder(source):
    with pytest.raises(InputError, match="no such folder"):
        FusionEnsemble.from_pretrained(source)


def test_saving_leaves_config_and_weights_alone(saved):
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors"}


def test_outputs_of_a_fused_width_taken_apart_keep_their_variances():
    model = FusionModel({"a": 3, "b": 4}, latent_dim=5, output_dim=3, fused_dim=6, noise="dimension").double()
    latents = {name: torch.randn(7, 5).double() for name in "ab"}
    mean, joint = model.head(latents)
    alone, apart = model.head(latents, joint=False)
    torch.testing.assert_close(alone, mean)
    torch.testing.assert_close(apart, joint.diagonal(dim1=-2, dim2=-1).diag_embed())
    assert joint[:, 0, 1].abs().min() > 0


def test_unknown_fusion_is_an_error():
    with pytest.raises(ValueError, match="fusion is one of lmf, concatenation, tensor"):
        FusionModel(DIMS, fusion="sum")


def test_latents_come_in_the_order_that_the_head_takes_them():
    torch.manual_seed(0)
    model = FusionModel(UNSORTED)
    raw = {name: torch.randn(4, d) for name, d in UNSORTED.items()}
    latents, encoded = model.latents(raw), model.encode(raw)
    assert model.modalities == ("audio", "text", "video")
    for z, name in zip(latents, model.modalities, strict=True):
        torch.testing.assert_close(z, encoded[name], atol=0, rtol=0)
    torch.testing.assert_close(model.rescale(model.fusion(latents)), model(raw).prediction)
