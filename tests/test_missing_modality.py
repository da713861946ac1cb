"""A modality that is missing at prediction time is integrated out: closed forms against draws and definitions."""

import numpy as np
import pytest
import torch

from mmfusion.models.exact import exact_layer
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.models.missing import empirical, expected_probability, integrated_moments, standard_normal

DIMS = {"audio": 5, "text": 4, "video": 3}
DRAWS = 400_000


def ensemble(task: str = "binary", outputs: int = 1, members: int = 2, rank: int = 3) -> FusionEnsemble:
    torch.manual_seed(0)
    return FusionEnsemble(DIMS, members, 6, 8, rank, outputs, task=task).eval()


def features(count: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, width, generator=generator) for name, width in DIMS.items()}


def drawn(layer, latents, gone, distributions, count=DRAWS):
    """(draws, O) outputs of one example whose latents `gone` are drawn."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for m, z in enumerate(latents):
        if m not in gone:
            rows.append(z.expand(count, -1))
        elif distributions[m].sample is None:
            rows.append(torch.randn(count, z.shape[-1], generator=generator, dtype=torch.float64))
        else:
            sample = distributions[m].sample
            rows.append(sample[torch.randint(len(sample), (count,), generator=generator)])
    return layer(rows)


@pytest.mark.parametrize("kind", ["prior", "training"])
@pytest.mark.parametrize("gone", [(0,), (0, 2), (0, 1, 2)])
@torch.no_grad()
def test_mean_and_variance_over_missing_latents_are_those_of_draws(gone, kind):
    member = ensemble("multilabel", 2).members[0]
    layer = exact_layer(member)
    latents = [z.double() for z in member.latents(features(3))]
    train = [1.5 * z.double().pow(2) for z in member.latents(features(40, seed=2))]  # skewed: no Gaussian
    distributions = [standard_normal(6) if kind == "prior" else empirical(z) for z in train]
    missing = torch.tensor([[m in gone for m in range(3)]] * 3)
    mean, covariance = integrated_moments(layer, latents, missing, distributions)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    p, error = expected_probability(layer, latents, missing, distributions, "multilabel")
    assert (error > 0).all() == (len(gone) > 1)
    for i in range(3):
        y = drawn(layer, [z[i : i + 1] for z in latents], gone, distributions)
        noise = 6 * y.std(0) / DRAWS**0.5
        assert ((y.mean(0) - mean[i]).abs() < noise + 1e-12).all()
        torch.testing.assert_close(y.var(0), variance[i], rtol=0.05, atol=1e-12)
        sigmoid = y.sigmoid()
        assert ((sigmoid.mean(0) - p[i]).abs() < 6 * (sigmoid.std(0) / DRAWS**0.5 + error[i])).all()


@torch.no_grad()
def test_variance_of_one_missing_latent_is_its_gradient_through_the_covariance():
    member = ensemble("multiclass", 3).members[0]
    layer, latents = exact_layer(member), [z.double() for z in member.latents(features())]
    distribution = empirical(latents[1] * 2)
    missing = torch.tensor([[False, True, False]] * 7)
    known = [standard_normal(6), distribution, standard_normal(6)]
    variance = integrated_moments(layer, latents, missing, known).covariance.diagonal(dim1=-2, dim2=-1)
    gradient = layer.modality_gradient(latents, 1)  # (N, O, L)
    wanted = torch.einsum("noi,ij,noj->no", gradient, distribution.covariance, gradient)
    torch.testing.assert_close(variance, wanted)


@pytest.mark.parametrize("task, outputs", [("binary", 1), ("multiclass", 3), ("multilabel", 2), ("regression", 2)])
@pytest.mark.parametrize("kind", ["prior", "training"])
def test_absent_keys_and_rows_of_nan_say_the_same_and_given_rows_stay(task, outputs, kind):
    model, x = ensemble(task, outputs), features()
    train = {"train": features(30, seed=3)} if kind == "training" else {}
    absent = {name: value for name, value in x.items() if name != "text"}
    nan = x | {"text": torch.full_like(x["text"], torch.nan)}
    some = x | {"text": torch.where(torch.arange(7)[:, None] < 3, torch.nan, x["text"])}
    whole = model.predict_missing(absent, kind, **train)
    for a, b in zip(whole, model.predict_missing(nan, kind, **train), strict=True):
        torch.testing.assert_close(a, b)
    mixed = model.predict_missing(some, kind, **train)
    torch.testing.assert_close(mixed.prediction[:, :3], whole.prediction[:, :3])
    torch.testing.assert_close(mixed.prediction[:, 3:].float(), model.predict(x)[:, 3:], rtol=1e-5, atol=1e-6)
    assert (mixed.std[:, :3] > 0).all() and (mixed.std[:, 3:] == 0).all() and (mixed.error[:, 3:] == 0).all()
    torch.testing.assert_close(model.predict(absent, kind, **train), whole.prediction.float())
    summary = whole.over_members()
    np.testing.assert_allclose(summary.prediction, whole.prediction.mean(0).numpy())
    if task == "multiclass":
        torch.testing.assert_close(whole.prediction.sum(-1), torch.ones(2, 7).double())


def test_expected_logit_under_the_prior_is_that_of_a_latent_of_zero():
    model, x = ensemble(), features()
    absent = {name: value for name, value in x.items() if name != "audio"}
    expected = model.predict_missing(absent).output
    member = model.members[1]
    zero = member(x, reconstruct=False, present={"audio": torch.zeros(7)}).prediction
    torch.testing.assert_close(expected[1].float(), zero, rtol=1e-5, atol=1e-6)


def test_the_expected_probability_is_not_that_of_the_expected_logit():
    model = ensemble()
    with torch.no_grad():
        for member in model.members:
            member.fusion.bias += 2
            member.fusion.rank_weights *= 4
    found = model.predict_missing({"text": features()["text"]})
    assert (found.prediction - found.output.squeeze(-1).sigmoid()).abs().max() > 0.05


@pytest.mark.parametrize(
    "spoil, kind, words",
    [
        (lambda x: x | {"text": x["text"] * torch.nan}, "error", "'text': row 0 holds nan; give missing="),
        (lambda x: {"audio": x["audio"]}, "error", "predict needs every modality; missing: text, video; give missing"),
        (lambda x: x | {"text": x["text"] / 0}, "prior", "'text': row 0 holds -?inf"),
        (lambda x: {}, "prior", "every one of audio, text, video is absent"),
        (lambda x: x | {"text": torch.where(torch.arange(4) == 1, torch.nan, x["text"])}, "prior", "NaN in part"),
        (lambda x: x, "training", "training features"),
        (lambda x: x, "guess", "not 'guess'"),
        (lambda x: {"audio": x["audio"], "text": x["text"][:2]}, "prior", "different numbers"),
        (lambda x: {"audio": x["audio"][:, :2]}, "prior", "width 5"),
    ],
)
def test_mistakes_are_one_line(spoil, kind, words):
    with pytest.raises(ValueError, match=words) as caught:
        ensemble().predict(spoil(features()), kind)
    assert "\n" not in str(caught.value)


def test_a_head_that_is_no_lmf_is_refused():
    model = FusionEnsemble(DIMS, 1, 6, 8, 2, fusion="concatenation").eval()
    with pytest.raises(ValueError, match="LMF head"):
        model.predict({"audio": features()["audio"]}, "prior")
