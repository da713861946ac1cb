"""The penalty against slow references and z-tests, the alignment losses against loops, and the prior after training."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from jwae_module import GAUSSIAN_SCALES, JWAE, mmd_penalty, reconstruction_error
from mmfusion.losses.contrastive import info_nce, margin_ranking

EXACT = {"rtol": 1e-10, "atol": 1e-12}
small_examples = settings(max_examples=25, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the autoencoder -------------------------------------------------------------------------------------------------


def test_latents_and_reconstructions_keep_names_order_and_leading_shape():
    model = JWAE({"text": 6, "image": 10}, latent_dim=4, hidden_dim=8)
    latents, reconstructions = model({"image": torch.randn(2, 3, 10), "text": torch.randn(2, 3, 6)})
    assert list(latents) == list(reconstructions) == ["text", "image"]
    assert {name: tuple(z.shape) for name, z in latents.items()} == {"text": (2, 3, 4), "image": (2, 3, 4)}
    assert {name: tuple(x.shape) for name, x in reconstructions.items()} == {"text": (2, 3, 6), "image": (2, 3, 10)}


def test_modalities_do_not_mix():
    model = JWAE({"text": 6, "image": 10}, 4)
    features = {"text": torch.randn(3, 6), "image": torch.randn(3, 10)}
    before = model(features)
    after = model(features | {"image": torch.randn(3, 10)})
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old["text"], new["text"]) and not torch.equal(old["image"], new["image"])


def test_every_parameter_is_moved_by_a_step_and_saved():
    model = JWAE({"text": 6, "image": 10}, 4, 8)
    before = copy.deepcopy(model.state_dict())
    assert set(before) == {name for name, _ in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    features = {"text": torch.randn(5, 6), "image": torch.randn(5, 10)}
    reconstruction_error(features, model(features)[1]).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "features",
    [{"image": (5, 10)}, {"image": (5, 10), "text": (5, 7)}, {"image": (5, 10), "text": (5, 6), "audio": (5, 3)}],
)
def test_features_that_do_not_fit_are_refused_with_their_shapes(features):
    model = JWAE({"image": 10, "text": 6}, 4)
    with pytest.raises(ValueError, match=r"'text': 6.*\(5, 10\)"):
        model.encode({name: torch.zeros(shape) for name, shape in features.items()})
    with pytest.raises(ValueError, match=r"latents.*\(5, 3\)"):
        model.decode({"image": torch.zeros(5, 4), "text": torch.zeros(5, 3)})


@pytest.mark.parametrize("arguments", [({}, 4), ({"image": 0}, 4), ({"image": 5}, 0), ({"image": 5}, 4, -1)])
def test_sizes_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        JWAE(*arguments)


def test_without_a_hidden_layer_encoders_and_decoders_are_affine():
    model, x = JWAE({"image": 5}, 4, 0), torch.randn(3, 5)
    zero = model.encode({"image": torch.zeros(3, 5)})["image"]
    one, two = (model.encode({"image": scale * x})["image"] - zero for scale in (1.0, 2.0))
    torch.testing.assert_close(two, 2 * one)
    assert model.decode({"image": one})["image"].shape == (3, 5)


# ---- the penalty: values ---------------------------------------------------------------------------------------------


def gaussian_kernel(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.exp(-(a[:, None] - b[None]).square().sum(-1) / (2 * scale * a.shape[1]))


def sampled_mmd(z: Tensor, prior: Tensor, kernel, scales) -> Tensor:
    """The two-sample U-statistic, written with explicit differences and an explicit off-diagonal."""
    total = z.new_zeros(())
    for scale in scales:
        for sample in (z, prior):
            off = ~torch.eye(len(sample), dtype=torch.bool)
            total = total + kernel(sample, sample, scale)[off].mean()
        total = total - 2 * kernel(z, prior, scale).mean()
    return total / len(scales)


@pytest.mark.parametrize("width", [2, 8, 32])
def test_closed_form_is_the_sampled_gaussian_estimator_averaged_over_the_prior(width):
    z = 0.7 * normal(24, width).exp() - 0.5  # far from the prior: all three terms matter
    draws = torch.stack(
        [sampled_mmd(z, normal(64, width, seed=s), gaussian_kernel, GAUSSIAN_SCALES) for s in range(1, 801)]
    )
    standard_error = draws.std() / len(draws) ** 0.5
    deviation = (mmd_penalty(z) - draws.mean()) / standard_error
    assert abs(deviation) < 4, f"{deviation:.1f} standard errors"
    assert mmd_penalty(z) > 20 * standard_error  # else the comparison would say nothing


def test_closed_form_has_about_half_the_noise_of_the_sampled_gaussian_estimator():
    closed, sampled = [], []
    for s in range(400):
        z, prior = normal(64, 16, seed=2 * s), normal(64, 16, seed=2 * s + 1)
        closed.append(mmd_penalty(z))
        sampled.append(sampled_mmd(z, prior, gaussian_kernel, GAUSSIAN_SCALES))
    ratio = torch.stack(closed).std() / torch.stack(sampled).std()
    assert 0.4 < ratio < 0.6  # 1/2 +- 3 standard errors: each std is known to 5 %, n = 400


@pytest.mark.parametrize("width", [2, 16, 64])
def test_penalty_is_unbiased_under_the_prior(width):
    draws, batch = 4000, 16
    values = vmap(mmd_penalty)(normal(draws, batch, width, seed=width))
    standard_error = values.std() / draws**0.5
    assert abs(values.mean()) < 3.5 * standard_error
    # the test has power: with the diagonal in the mean (a V-statistic) the bias is near 1/B
    assert 1 / batch > 20 * standard_error


def test_penalty_does_not_depend_on_order_or_rotation():
    z = normal(20, 5) * 1.4 + 0.3
    rotation = torch.linalg.qr(normal(5, 5, seed=1))[0]
    torch.testing.assert_close(mmd_penalty(z.flip(0) @ rotation), mmd_penalty(z), **EXACT)


@pytest.mark.parametrize("alternative", ["scale", "shift", "skew", "correlation"])
@pytest.mark.parametrize("width", [2, 16])
def test_penalty_rises_with_the_distance_from_the_prior(alternative, width):
    z = normal(1000, width)
    moved = {
        "scale": lambda t: (1 + t) * z,
        "shift": lambda t: z + t,
        "skew": lambda t: ((t * z).exp() - math.exp(t * t / 2)) / (math.exp(2 * t * t) - math.exp(t * t)) ** 0.5,
        "correlation": lambda t: (1 - t) ** 0.5 * z + t**0.5 * normal(1000, 1, seed=1),
    }[alternative]
    values = [mmd_penalty(moved(t)) for t in (0.2, 0.5, 0.9)]
    assert 0 < values[0] < values[1] < values[2]


# ---- the penalty: gradients and precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 8, 32, 128])
@pytest.mark.parametrize("scale", [0.1, 0.3, 3.0, 10.0])
def test_gradient_is_alive_and_points_to_the_scale_of_the_prior(scale, width):
    z = (scale * normal(128, width)).float().requires_grad_()
    (gradient,) = torch.autograd.grad(mmd_penalty(z), z)
    slope = (gradient * z).sum().item()  # d MMD^2 / d log(scale)
    assert math.copysign(1, slope) == math.copysign(1, scale - 1)
    assert 0.02 < abs(slope) < 0.35
    # no row is forgotten; a point in the middle of a scattered cloud has little to answer for
    assert (gradient.norm(dim=1) > 1e-3 * gradient.norm(dim=1).max()).float().mean() > 0.95


@pytest.mark.parametrize("width", [2, 32, 128])
def test_gradient_pulls_a_shifted_cloud_back(width):
    for shift in (0.3, 2.0, 10.0):
        z = (normal(128, width) + shift).requires_grad_()
        (gradient,) = torch.autograd.grad(mmd_penalty(z), z)
        assert gradient.sum() * shift > 0.01


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_float32_is_enough(scale):
    z = scale * normal(256, 128)
    torch.testing.assert_close(mmd_penalty(z.float()).double(), mmd_penalty(z), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalty_and_alignment_are_float32_under_autocast(dtype):
    latents = {"image": normal(32, 16).float(), "text": normal(32, 16, seed=1).float()}
    expected = [mmd_penalty(latents["image"]), info_nce(latents), margin_ranking(latents)]
    with torch.autocast("cpu", dtype=dtype):
        found = [mmd_penalty(latents["image"]), info_nce(latents), margin_ranking(latents)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)
    assert mmd_penalty(latents["image"].to(dtype)).dtype == torch.float32


def test_inputs_are_left_as_they_were():
    latents = {"image": normal(8, 4), "text": normal(8, 4, seed=1)}
    kept = copy.deepcopy(latents)
    mmd_penalty(latents["image"]), info_nce(latents), margin_ranking(latents), reconstruction_error(latents, latents)
    assert all(torch.equal(latents[name], kept[name]) for name in latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": torch.zeros(1, 4)}, r"\(1, 4\)"),
        ({"z": torch.zeros(3, 2, 4)}, r"\(3, 2, 4\)"),
        ({"z": torch.zeros(3, 4), "scales": ()}, "positive"),
        ({"z": torch.zeros(3, 4), "scales": (1.0, 0.0)}, "positive"),
    ],
)
def test_penalty_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        mmd_penalty(**arguments)


# ---- reconstruction and alignment ------------------------------------------------------------------------------------


def test_reconstruction_error_is_one_for_the_mean_of_standardised_inputs_and_counts_modalities_alike():
    features = {"image": normal(50, 40), "text": normal(50, 3, seed=1)}
    features = {name: (x - x.mean(0)) / x.std(0, correction=0) for name, x in features.items()}
    mean = {name: torch.zeros_like(x) for name, x in features.items()}
    torch.testing.assert_close(reconstruction_error(features, mean).item(), 1.0)
    one_perfect = mean | {"text": features["text"]}  # 3 of 43 coordinates, but 1 of 2 modalities
    torch.testing.assert_close(reconstruction_error(features, one_perfect).item(), 0.5)


def test_reconstruction_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 1\)"):
        reconstruction_error({"a": torch.zeros(4, 3)}, {"a": torch.zeros(4, 1)})


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


@small_examples
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 99))
def test_alignment_losses_equal_their_loops(batch, width, seed):
    a, b = normal(batch, width, seed=seed), normal(batch, width, seed=seed + 100)
    s = [[cosine(a[i], b[j]) for j in range(batch)] for i in range(batch)]
    hinges = nce = 0.0
    for i in range(batch):
        for j in range(batch):
            if i != j:
                hinges += max(0.0, 0.3 - s[i][i] + s[i][j]) + max(0.0, 0.3 - s[i][i] + s[j][i])
        nce -= s[i][i] / 0.5 - math.log(sum(math.exp(s[i][j] / 0.5) for j in range(batch)))
        nce -= s[i][i] / 0.5 - math.log(sum(math.exp(s[j][i] / 0.5) for j in range(batch)))
    latents = {"image": a, "text": b}
    assert margin_ranking(latents, margin=0.3).item() == pytest.approx(hinges / 2 / (batch * (batch - 1)), abs=1e-9)
    assert info_nce(latents, temperature=0.5).item() == pytest.approx(nce / 2 / batch, abs=1e-9)


@pytest.mark.parametrize("loss", [info_nce, margin_ranking])
def test_alignment_is_a_mean_over_pairs_of_modalities(loss):
    latents = {name: normal(6, 4, seed=seed) for seed, name in enumerate(("image", "text", "audio"))}
    pairs = [("image", "text"), ("image", "audio"), ("text", "audio")]
    expected = torch.stack([loss({a: latents[a], b: latents[b]}) for a, b in pairs]).mean()
    torch.testing.assert_close(loss(latents), expected, **EXACT)
    assert loss({"image": latents["image"]}) == 0


@pytest.mark.parametrize("loss", [info_nce, margin_ranking])
def test_alignment_prefers_true_pairs_and_ignores_length(loss):
    z = normal(16, 8)
    aligned, broken = {"image": z, "text": z}, {"image": z, "text": z.roll(1, 0)}
    assert loss(aligned) < 0.1 * loss(broken)
    torch.testing.assert_close(loss({"image": z, "text": 7 * z}), loss(aligned), **EXACT)


def test_info_nce_of_indistinguishable_rows_is_log_of_the_batch():
    latents = {"image": torch.ones(10, 4), "text": torch.ones(10, 4)}
    assert info_nce(latents).item() == pytest.approx(math.log(10), rel=1e-6)
    assert margin_ranking({"image": torch.ones(1, 4), "text": torch.ones(1, 4)}) == 0


@pytest.mark.parametrize("loss", [info_nce, margin_ranking])
def test_alignment_refuses_rows_that_are_no_pairs(loss):
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(6, 4\)"):
        loss({"image": torch.zeros(5, 4), "text": torch.zeros(6, 4)})
    with pytest.raises(ValueError, match=r"\(2, 5, 4\)"):
        loss({"image": torch.zeros(2, 5, 4), "text": torch.zeros(2, 5, 4)})


# ---- torch.func and torch.compile ------------------------------------------------------------------------------------


def all_terms(model: JWAE, weights: dict[str, Tensor], features: dict[str, Tensor]) -> Tensor:
    latents, reconstructions = functional_call(model, weights, (features,))
    penalty = sum(mmd_penalty(z) for z in latents.values())
    alignment = info_nce(latents) + margin_ranking(latents)
    return penalty + alignment + reconstruction_error(features, reconstructions)


@pytest.mark.parametrize("compiled", [False, True])
def test_stacked_models_equal_a_loop(compiled):
    members = [JWAE({"image": 7, "text": 5}, 3, 6).double() for _ in range(3)]
    weights, _ = stack_module_state(members)
    features = {"image": normal(3, 8, 7), "text": normal(3, 8, 5, seed=1)}

    def step(weights, features):
        return vmap(grad_and_value(lambda *inputs: all_terms(members[0], *inputs)))(weights, features)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    gradients, values = run(weights, features)
    for s, member in enumerate(members):
        own = {name: x[s] for name, x in features.items()}
        loss = all_terms(member, dict(member.named_parameters()), own)
        loss.backward()
        torch.testing.assert_close(values[s], loss, rtol=1e-9, atol=1e-9)
        for name, p in member.named_parameters():
            torch.testing.assert_close(gradients[name][s], p.grad, rtol=1e-9, atol=1e-9)


# ---- the prior, after training ---------------------------------------------------------------------------------------

BATCH = 256


def skewed_inputs(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Modalities (n, 12) and (n, 9): noisy mixtures of four Gamma(2) sources, two of them shared, shifted from 0."""
    mixing = torch.Generator().manual_seed(0)
    sources = -(torch.rand(n, 4, generator=generator) * torch.rand(n, 4, generator=generator)).log() / 2**0.5
    image = sources[:, :3] @ torch.randn(3, 12, generator=mixing) / 3**0.5 + 1
    text = sources[:, 1:] @ torch.randn(3, 9, generator=mixing) / 3**0.5 - 1
    return {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in (("image", image), ("text", text))}


def train_and_encode(mmd_weight: float, seed: int = 0) -> dict[str, Tensor]:
    """Latents (8000, 3) of fresh inputs, after 800 steps of reconstruction + mmd_weight * penalty."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = JWAE({"image": 12, "text": 9}, latent_dim=3, hidden_dim=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        features = skewed_inputs(BATCH, generator)
        latents, reconstructions = model(features)
        loss = reconstruction_error(features, reconstructions)
        if mmd_weight:
            loss = loss + mmd_weight * torch.stack([mmd_penalty(z) for z in latents.values()]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model.encode(skewed_inputs(8000, generator))


def distance_from_prior(z: Tensor) -> dict[str, float]:
    """Errors of the mean and covariance (largest entry) and of the kurtosis (root mean square over the coordinates).

    In standard errors that a training batch drawn from N(0, I) has, for a batch is all that the penalty ever sees:
    sqrt(1/B) for a mean, sqrt(2/B) for a variance, sqrt(24/B) for a kurtosis. The 8000 examples measure each of them
    six times as finely.
    """
    kurtosis = ((z - z.mean(0)) / z.std(0)).pow(4).mean(0)
    return {
        "mean": z.mean(0).abs().max().item() / (1 / BATCH) ** 0.5,
        "covariance": (z.T.cov() - torch.eye(z.shape[1])).abs().max().item() / (2 / BATCH) ** 0.5,
        "kurtosis": (kurtosis - 3).square().mean().sqrt().item() / (24 / BATCH) ** 0.5,
    }


def test_the_penalty_enforces_the_prior_and_its_absence_does_not():
    pulled, free = train_and_encode(mmd_weight=100.0), train_and_encode(mmd_weight=0.0)
    for name in pulled:
        with_penalty, without = distance_from_prior(pulled[name]), distance_from_prior(free[name])
        for moment in with_penalty:
            assert with_penalty[moment] < 3, f"{name}: {with_penalty}"
            assert without[moment] > max(3, 1.5 * with_penalty[moment]), f"{name}: {with_penalty} against {without}"
