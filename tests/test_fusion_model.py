"""The fusion model and its ensemble: raw features in, the same logits out after saving and loading."""

import pytest
import torch

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


def test_latents_come_in_the_order_that_the_head_takes_them():
    torch.manual_seed(0)
    model = FusionModel(UNSORTED)
    raw = {name: torch.randn(4, d) for name, d in UNSORTED.items()}
    latents, encoded = model.latents(raw), model.encode(raw)
    assert model.modalities == ("audio", "text", "video")
    for z, name in zip(latents, model.modalities, strict=True):
        torch.testing.assert_close(z, encoded[name], atol=0, rtol=0)
    torch.testing.assert_close(model.rescale(model.fusion(latents)), model(raw).prediction)
