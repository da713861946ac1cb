"""The layer against an explicit tensor product, its exact decompositions, and the ways in which PyTorch is used."""

import copy
import itertools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lmf_module import LowRankMultimodalFusion

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def trained_looking(layer: LowRankMultimodalFusion, seed: int) -> LowRankMultimodalFusion:
    """The layer in float64 with no parameter at a special value (the bias starts at 0, the rows at norm 1)."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def draw_latents(layer: LowRankMultimodalFusion, *leading: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*leading, d, generator=generator, dtype=torch.float64) for d in layer.input_dims]


def outer(vectors: list[Tensor]) -> Tensor:
    product = vectors[0]
    for vector in vectors[1:]:
        product = product[..., None] * vector
    return product


def explicit_tensors(layer: LowRankMultimodalFusion) -> list[Tensor]:
    """W_o = sum_r w_r outer_m [A_m[r, o], c_m[r, o]] for each output, one rank-1 tensor after the other."""
    tensors = []
    for o in range(layer.output_dim):
        total = torch.zeros([d + 1 for d in layer.input_dims], dtype=torch.float64)
        for r in range(layer.active_rank):
            row = r if layer.shared_factors else r * layer.output_dim + o
            weight = layer.rank_weights[r, o] if layer.shared_factors else layer.rank_weights[r]
            total = total + weight * outer([torch.cat([p.weight[row], p.bias[row, None]]) for p in layer.projections])
        tensors.append(total)
    return tensors


def naive_fusion(layer: LowRankMultimodalFusion, latents: list[Tensor]) -> Tensor:
    """Zadeh et al.'s tensor fusion, one example and one output at a time: <W_o, outer_m [z_m; 1]> + b_o."""
    leading = latents[0].shape[:-1]
    tensors = explicit_tensors(layer)
    outputs = []
    for example in zip(*[z.reshape(leading.numel(), z.shape[-1]) for z in latents], strict=True):
        interaction = outer([torch.cat([z, z.new_ones(1)]) for z in example])
        outputs.append(torch.stack([(w * interaction).sum() + b for w, b in zip(tensors, layer.bias, strict=True)]))
    return (
        torch.stack(outputs).reshape(*leading, layer.output_dim)
        if outputs
        else layer.bias.new_zeros(*leading, layer.output_dim)
    )


@st.composite
def layers(draw: st.DrawFn, max_modalities: int = 6) -> LowRankMultimodalFusion:
    modalities = draw(st.integers(1, max_modalities))
    dims = draw(st.lists(st.integers(1, 6 if modalities < 4 else 3), min_size=modalities, max_size=modalities))
    rank = draw(st.integers(1, 5) | st.just(17))  # beyond 16 the moments of two modalities have a formula of their own
    layer = LowRankMultimodalFusion(
        dims,
        draw(st.integers(1, 4)),
        rank,
        shared_factors=draw(st.booleans()),
        active_rank=draw(st.none() | st.integers(1, rank)),
    )
    return trained_looking(layer, draw(st.integers(0, 2**16)))


LEADING = st.lists(st.integers(0, 3), max_size=3)
fusion_property = settings(max_examples=60, deadline=None, derandomize=True)


# ---- the function and its decompositions -----------------------------------------------------------------------------


@fusion_property
@given(layers(max_modalities=4), LEADING, st.booleans())
def test_moments_equal_those_of_the_explicit_tensor(layer, leading, shared):
    means = draw_latents(layer, *leading)
    variances = [torch.rand_like(z[(0,) * len(leading)] if shared and 0 not in leading else z) for z in means]
    mean, covariance = layer.moments(means, variances)
    torch.testing.assert_close(mean, layer(means), **EXACT)
    # E[T z (x) T z]: of each modality the second moment of [z_m; 1] in place of the vector
    tensor, first, second = layer.full_tensor(), [], []
    for z, v in zip(means, variances, strict=True):
        one = torch.cat([z, z.new_ones(*leading, 1)], -1)
        noise = torch.diag_embed(torch.cat([v.expand(z.shape), z.new_zeros(*leading, 1)], -1))
        first.append(one)
        second.append(one[..., :, None] * one[..., None, :] + noise)
    letters, doubles = "abcd"[: len(means)], "efgh"[: len(means)]
    operands = ",".join(f"...{a}{b}" for a, b in zip(letters, doubles, strict=True))
    moment = torch.einsum(f"y{letters},z{doubles},{operands}->...yz", tensor, tensor, *second)
    expected = moment - mean[..., :, None] * mean[..., None, :]
    scale = moment.abs().amax().clamp_min(1) if moment.numel() else 1.0
    torch.testing.assert_close(covariance / scale, expected / scale, rtol=0, atol=1e-10)
    apart = layer.moments(means, variances, joint=False).covariance
    own = expected.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(apart.diagonal(dim1=-2, dim2=-1) / scale, own / scale, rtol=0, atol=1e-10)
    if not layer.shared_factors:
        assert apart.count_nonzero() <= own.numel(), "nothing is off the diagonal"
    terms = layer.variance_terms(means, variances)
    assert list(terms) == sorted(terms, key=lambda s: (len(s), s)) and len(terms) == 2 ** len(means) - 1
    total = sum(terms.values())
    torch.testing.assert_close(total / scale, covariance.diagonal(dim1=-2, dim2=-1) / scale, rtol=0, atol=1e-10)


@fusion_property
@given(layers(max_modalities=3))
def test_variance_terms_are_the_sobol_decomposition(layer):
    """Against its definition: what is left of the variance when the other modalities are known, less the subsets'."""
    means = draw_latents(layer, 4)
    variances = [torch.rand_like(z) for z in means]
    terms = layer.variance_terms(means, variances)
    for subset, term in terms.items():
        only = [v if m in subset else torch.zeros_like(v) for m, v in enumerate(variances)]
        # with every other latent at its mean, the variance is that of the subsets within: the parts are orthogonal
        inside = sum(value for other, value in terms.items() if set(other) <= set(subset))
        torch.testing.assert_close(inside, layer.moments(means, only).covariance.diagonal(dim1=-2, dim2=-1))
        assert (term >= 0).all()


def test_moments_of_a_gaussian_latent_agree_with_draws():
    layer = trained_looking(LowRankMultimodalFusion((3, 4, 2), 2, 3), seed=1)
    torch.manual_seed(0)
    means = [torch.randn(d, dtype=torch.float64) for d in (3, 4, 2)]
    variances = [torch.rand(d, dtype=torch.float64) for d in (3, 4, 2)]
    mean, covariance = layer.moments(means, variances)
    drawn = layer([z + v.sqrt() * torch.randn(200_000, len(z)).double() for z, v in zip(means, variances, strict=True)])
    error = drawn.std(0) / 200_000**0.5
    assert ((drawn.mean(0) - mean).abs() < 4 * error).all()
    torch.testing.assert_close(drawn.T.cov() / covariance.trace(), covariance / covariance.trace(), rtol=0, atol=0.03)


def test_moments_refuse_variances_that_do_not_fit():
    layer = LowRankMultimodalFusion((3, 4))
    means = [torch.zeros(5, 3), torch.zeros(5, 4)]
    for wrong in ([torch.ones(3)], [torch.ones(3), torch.ones(3)], [torch.ones(6, 3), torch.ones(4)]):
        with pytest.raises(ValueError, match="do not fit"):
            layer.moments(means, wrong)


@fusion_property
@given(layers(), LEADING)
def test_forward_equals_explicit_tensor_product(layer, leading):
    latents = draw_latents(layer, *leading)
    torch.testing.assert_close(layer(latents), naive_fusion(layer, latents), **EXACT)


@fusion_property
@given(layers(), LEADING)
def test_rank_terms_and_bias_sum_to_the_output(layer, leading):
    latents = draw_latents(layer, *leading)
    terms = layer.rank_terms(latents)
    assert terms.shape == (*leading, layer.rank, layer.output_dim)
    assert not terms[..., layer.active_rank :, :].any()
    torch.testing.assert_close(terms.sum(-2) + layer.bias, layer(latents), **EXACT)


@fusion_property
@given(layers(), LEADING)
def test_subset_terms_sum_to_the_output(layer, leading):
    latents = draw_latents(layer, *leading)
    terms = layer.subset_terms(latents)
    modalities = range(len(layer.input_dims))
    assert list(terms) == [s for size in range(len(modalities) + 1) for s in itertools.combinations(modalities, size)]
    assert all(term.shape == (*leading, layer.output_dim) for term in terms.values())
    torch.testing.assert_close(sum(terms.values()), layer(latents), **EXACT)


@fusion_property
@given(layers(), st.data())
def test_a_missing_modality_drops_exactly_the_subsets_that_hold_it(layer, data):
    m = data.draw(st.integers(0, len(layer.input_dims) - 1))
    latents = draw_latents(layer, 3)
    kept = [term for subset, term in layer.subset_terms(latents).items() if m not in subset]
    latents[m] = torch.zeros_like(latents[m])
    torch.testing.assert_close(sum(kept), layer(latents), **EXACT)


@fusion_property
@given(layers())
def test_full_tensor_contracts_to_the_output(layer):
    latents = draw_latents(layer, 2)
    contracted = layer.full_tensor()
    assert contracted.shape == (layer.output_dim, *[d + 1 for d in layer.input_dims])
    contracted = contracted.expand(2, *contracted.shape)  # (B, O, d_1 + 1, ..., d_M + 1)
    for z in latents:
        extended = F.pad(z, (0, 1), value=1.0).reshape(2, 1, -1, *[1] * (contracted.ndim - 3))
        contracted = (contracted * extended).sum(2)
    torch.testing.assert_close(contracted, layer(latents), **EXACT)


@fusion_property
@given(layers(), LEADING, st.data())
def test_modality_gradient_equals_autograd(layer, leading, data):
    m = data.draw(st.integers(0, len(layer.input_dims) - 1))
    latents = draw_latents(layer, *leading)
    latents[m].requires_grad_()
    outputs = layer(latents)
    # each output row depends on its own latent alone, so the gradient of the sum is the Jacobian
    per_output = [
        torch.autograd.grad(outputs[..., o].sum(), latents[m], retain_graph=True)[0] for o in range(layer.output_dim)
    ]
    torch.testing.assert_close(layer.modality_gradient(latents, m), torch.stack(per_output, -2), **EXACT)


def test_gradient_norm_is_the_exact_worst_case_of_a_bounded_change():
    layer = trained_looking(LowRankMultimodalFusion((5, 4)), seed=1)
    latents = draw_latents(layer, 6)
    gradient = layer.modality_gradient(latents, 0)[:, 0]  # (B, d)
    for step, dual_norm in (
        (-0.3 * gradient.sign(), gradient.abs().sum(-1)),
        (-0.3 * F.normalize(gradient), gradient.norm(dim=-1)),
    ):
        drop = layer(latents)[:, 0] - layer([latents[0] + step, latents[1]])[:, 0]
        torch.testing.assert_close(drop, 0.3 * dual_norm, **EXACT)


# ---- ranks, masks and parameterisations ------------------------------------------------------------------------------


@fusion_property
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_masked_rank_equals_smaller_layer(modalities, outputs, active, masked, shared):
    dims = [4, 3, 2][:modalities]
    options = {"output_dim": outputs, "shared_factors": shared}
    large = trained_looking(LowRankMultimodalFusion(dims, rank=active + masked, active_rank=active, **options), seed=0)
    small = LowRankMultimodalFusion(dims, rank=active, **options).double()
    own = {
        name: value[: p.shape[0]] for (name, value), p in zip(large.named_parameters(), small.parameters(), strict=True)
    }
    small.load_state_dict(own, strict=False)

    latents = draw_latents(large, 5)
    torch.testing.assert_close(large(latents), small(latents), **EXACT)
    large(latents).square().sum().backward()
    small(latents).square().sum().backward()
    for (name, a), b in zip(large.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a.grad[: len(b)], b.grad, msg=name, **EXACT)
        assert not a.grad[len(b) :].any(), f"{name}: masked entries must get a gradient of exactly 0"


@pytest.mark.parametrize("shared", [False, True])
def test_active_rank_starts_at_the_scale_of_the_smaller_layer(shared):
    layer = LowRankMultimodalFusion((5, 5), 3, 8, active_rank=2, shared_factors=shared)
    assert layer.rank_mask.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(layer.rank_weights.abs(), torch.full_like(layer.rank_weights, 2**-0.5))


def test_layers_of_different_active_rank_share_their_initial_factors():
    built = []
    for active in (1, 4):
        torch.manual_seed(3)
        built.append(LowRankMultimodalFusion((6, 5), rank=4, active_rank=active))
    for a, b in zip(built[0].projections.parameters(), built[1].projections.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(built[0].rank_weights.sign(), built[1].rank_weights.sign())


def test_own_and_shared_factors_are_the_same_function_of_one_output():
    own = trained_looking(LowRankMultimodalFusion((4, 3, 5), rank=3), seed=0)
    shared = LowRankMultimodalFusion((4, 3, 5), rank=3, shared_factors=True).double()
    shared.load_state_dict(own.state_dict() | {"rank_weights": own.rank_weights[:, None]})
    latents = draw_latents(own, 7)
    torch.testing.assert_close(own(latents), shared(latents), **EXACT)
    torch.testing.assert_close(own.full_tensor(), shared.full_tensor(), **EXACT)
    torch.testing.assert_close(own.rank_strength(), shared.rank_strength(), **EXACT)


def test_shared_factors_are_theta_times_the_product():
    layer = trained_looking(LowRankMultimodalFusion((4, 3), 6, 2, shared_factors=True), seed=0)
    first, second = draw_latents(layer, 7)
    product = layer.projections[0](first) * layer.projections[1](second)  # (B, R)
    torch.testing.assert_close(layer([first, second]), product @ layer.rank_weights + layer.bias, **EXACT)
    assert layer.projections[0].weight.shape == (2, 4)


def test_one_modality_is_an_affine_map():
    layer = trained_looking(LowRankMultimodalFusion((5,), 2, 3), seed=0)
    tensor = layer.full_tensor()  # (O, d + 1)
    (z,) = draw_latents(layer, 6)
    torch.testing.assert_close(layer([z]), z @ tensor[:, :-1].T + tensor[:, -1], **EXACT)


# ---- initialisation --------------------------------------------------------------------------------------------------


def exact_std(layer: LowRankMultimodalFusion) -> Tensor:
    """Standard deviation (O,) of the outputs for standard normal latents: E[y_r y_s] factors into Gram matrices."""
    weights = (layer.rank_weights * layer.rank_mask).double()
    second = torch.ones(layer.output_dim, layer.rank, layer.rank, dtype=torch.float64)
    mean = torch.ones(layer.rank, layer.output_dim, dtype=torch.float64)
    for p in layer.projections:
        rows = torch.cat([p.weight, p.bias[:, None]], 1).detach().double().unflatten(0, (layer.rank, layer.output_dim))
        second = second * torch.einsum("rod,sod->ors", rows, rows)
        mean = mean * rows[..., -1]
    return (torch.einsum("r,ors,s->o", weights, second, weights) - (weights @ mean).square()).sqrt()


@pytest.mark.parametrize("modalities", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("width", [8, 64, 2048])
def test_output_variance_at_initialisation_is_one_less_the_constant_share(modalities, width):
    torch.manual_seed(modalities * width)
    for rank, active in ((1, 1), (4, 4), (16, 16), (16, 2)):
        layer = LowRankMultimodalFusion([width] * modalities, 16, rank, active_rank=active)
        for p in layer.projections:
            norms = (p.weight.square().sum(1) + p.bias.square()).sqrt()
            torch.testing.assert_close(norms, torch.ones_like(norms))
        variance = exact_std(layer).square()  # (O,), independent draws
        error = variance.std() / 16**0.5
        assert (variance.mean() - (1 - 0.5**modalities)).abs() < 4 * error + 1e-6, f"rank {rank}, active {active}"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("modalities", [2, 3, 5])
@pytest.mark.parametrize("rank", [2, 3, 8])
def test_signs_start_balanced_in_every_prefix_of_the_ranks_for_every_output(rank, modalities, shared):
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        layer = LowRankMultimodalFusion([3] * modalities, 4, rank, shared_factors=shared)
        signs = layer.rank_weights.sign() if shared else layer.rank_weights.sign()[:, None]  # (R, O) or (R, 1)
        for p in layer.projections:
            signs = signs * p.bias.sign().unflatten(0, (rank, -1))
        assert signs.shape == (rank, 4)
        assert signs.cumsum(0).abs().max() <= 1, "positives and negatives differ by at most one in every prefix"
        seen |= {tuple(column) for column in signs.T.tolist()}
    assert len(seen) == 2 ** ((rank + 1) // 2), "which of a pair is positive is drawn"


@pytest.mark.parametrize("shared", [False, True])
def test_a_masked_layer_starts_as_the_layer_of_that_rank_does(shared):
    for active in (1, 2, 3):
        masked = LowRankMultimodalFusion((6, 5, 4), 3, 5, active_rank=active, shared_factors=shared)
        small = LowRankMultimodalFusion((6, 5, 4), 3, active, shared_factors=shared)
        for layer in (masked, small):
            torch.manual_seed(active)
            layer.reset_parameters()
        latents = [torch.randn(7, d) for d in (6, 5, 4)]
        torch.testing.assert_close(masked(latents), small(latents))
        for a, b in zip(masked.parameters(), small.parameters(), strict=True):
            assert torch.equal(a[: len(b)], b)


@pytest.mark.parametrize("dims", [(64, 64), (8, 2048), (100, 73, 100), (16,) * 4])
def test_sampled_output_std_agrees_with_the_exact_one(dims):
    torch.manual_seed(0)
    layer = LowRankMultimodalFusion(dims, 32, 4)
    outputs = layer([torch.randn(4000, d) for d in dims])
    # pooled over 32 outputs; the kurtosis of a product of four Gaussians, 81, still leaves about 3 % of sampling error
    sampled, exact = outputs.std(0).square().mean().sqrt(), exact_std(layer).square().mean().sqrt()
    assert abs(sampled / exact - 1) < 0.1
    assert 0.7 < sampled < 1.3


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
def test_every_subset_of_modalities_starts_with_the_same_share(modalities):
    layer = LowRankMultimodalFusion([7] * modalities, 3, 5)
    for subset in itertools.product([False, True], repeat=modalities):
        # E over standard normal latents of one product's part: |A|^2 of the modalities in the subset, c^2 of the others
        share = math.prod(
            p.weight.square().sum(1) if inside else p.bias.square()
            for inside, p in zip(subset, layer.projections, strict=True)
        )
        torch.testing.assert_close(share, torch.full_like(share, 0.5**modalities))


def test_weights_come_from_the_global_generator():
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(LowRankMultimodalFusion((5, 4), 2, 3).state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
    assert not torch.equal(built[0]["projections.0.weight"], built[2]["projections.0.weight"])


# ---- what is identified ----------------------------------------------------------------------------------------------


def covariance(width: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    return root @ root.T / rank


def mixed(layer: LowRankMultimodalFusion, mixing: Tensor) -> LowRankMultimodalFusion:
    """The same function of two modalities from other factors: P_1 -> G P_1, P_2 -> D^-1 G^-T D P_2 with D = diag(w)."""
    other = copy.deepcopy(layer)
    scale = layer.rank_weights.detach()
    back = torch.linalg.inv(mixing).T * scale / scale[:, None]
    with torch.no_grad():
        for projection, transform in zip(other.projections, (mixing, back), strict=True):
            projection.weight.copy_(transform @ projection.weight)
            projection.bias.copy_(transform @ projection.bias)
    return other


def test_rank_strength_is_the_norm_of_each_rank_one_term():
    layer = trained_looking(LowRankMultimodalFusion((4, 3, 2), 3, 4, active_rank=3), seed=0)
    strength = layer.rank_strength()
    assert not strength[3].any()
    for r in range(3):
        alone = copy.deepcopy(layer)
        alone.rank_mask.copy_(torch.arange(4) == r)
        alone.bias.data.zero_()
        torch.testing.assert_close(strength[r], alone.full_tensor().flatten(1).norm(dim=1), **EXACT)


def test_moving_scale_changes_the_weights_but_not_the_strength():
    layer = trained_looking(LowRankMultimodalFusion((4, 3, 2), 1, 3), seed=0)
    other = copy.deepcopy(layer)
    scales = torch.tensor([[2.0, 0.1, 5.0], [0.5, 3.0, 1.0], [7.0, 1.0, 0.6]], dtype=torch.float64)  # (M, R)
    with torch.no_grad():
        for projection, scale in zip(other.projections, scales, strict=True):
            projection.weight.mul_(scale[:, None])
            projection.bias.mul_(scale)
        other.rank_weights.div_(scales.prod(0))
    latents = draw_latents(layer, 5)
    torch.testing.assert_close(other(latents), layer(latents), **EXACT)
    torch.testing.assert_close(other.rank_strength(), layer.rank_strength(), **EXACT)
    assert ((other.rank_weights / layer.rank_weights).log().abs() > 0.3).all()


@pytest.mark.parametrize("seed", range(5))
def test_mixing_the_ranks_keeps_the_function_and_the_canonical_factors_only(seed):
    torch.manual_seed(seed)
    layer = trained_looking(LowRankMultimodalFusion((6, 5), 1, 3), seed)
    other = mixed(layer, torch.randn(3, 3, dtype=torch.float64))
    latents = draw_latents(layer, 8)
    torch.testing.assert_close(other(latents), layer(latents), **EXACT)
    assert (other.rank_terms(latents) - layer.rank_terms(latents)).abs().max() > 0.1
    assert ((other.rank_strength() / layer.rank_strength()).log().abs() > 1e-3).any()
    covariances = [covariance(6, 6, seed), covariance(5, 5, seed + 1)]
    before, after = layer.canonical_factors(covariances), other.canonical_factors(covariances)
    tolerance = {"rtol": 1e-8, "atol": 1e-8}  # G may be ill-conditioned
    torch.testing.assert_close(after.spectrum, before.spectrum, **tolerance)
    for a, b in zip(after.directions, before.directions, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_canonical_spectrum_does_not_depend_on_the_basis_of_the_latents():
    torch.manual_seed(0)
    layer = trained_looking(LowRankMultimodalFusion((6, 5), 2, 3), seed=0)
    other, covariances = copy.deepcopy(layer), [covariance(6, 6, 1), covariance(5, 5, 2)]
    moved = []
    for projection, s in zip(other.projections, covariances, strict=True):
        basis = torch.randn(len(s), len(s), dtype=torch.float64)
        projection.weight.data = projection.weight.data @ torch.linalg.inv(basis)
        moved.append(basis @ s @ basis.T)
    expected, found = layer.canonical_factors(covariances).spectrum, other.canonical_factors(moved).spectrum
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@fusion_property
@given(
    dims=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    outputs=st.integers(1, 3),
    rank=st.integers(1, 7),
    supports=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    shared=st.booleans(),
    data=st.data(),
)
def test_canonical_factors_rebuild_the_interaction(dims, outputs, rank, supports, shared, data):
    active = data.draw(st.integers(1, rank))
    layer = LowRankMultimodalFusion(dims, outputs, rank, shared_factors=shared, active_rank=active)
    layer = trained_looking(layer, data.draw(st.integers(0, 99)))
    covariances = [covariance(d, min(d, k), seed) for seed, (d, k) in enumerate(zip(dims, supports, strict=True))]
    spectrum, (p, q) = layer.canonical_factors(covariances)

    # against the dense definition; covariances may be singular
    roots = [torch.linalg.eigh(s) for s in covariances]
    roots = [vectors * values.clamp(min=0).sqrt() @ vectors.T for values, vectors in roots]
    dense = torch.linalg.svdvals(roots[0] @ layer.bilinear_map() @ roots[1])  # (O, min(dims))
    k = min(rank, dense.shape[-1])
    torch.testing.assert_close(spectrum[:, :k], dense[:, :k], rtol=1e-6, atol=1e-6)
    assert (spectrum.diff() <= 0).all() and not spectrum[:, min(*dims, active) :].any()

    # z_1^T B z_2 = sum_k s_k (z_1 . p_k) (z_2 . q_k) for latents in the support
    z1, z2 = (z @ s for z, s in zip(draw_latents(layer, 4), covariances, strict=True))
    rebuilt = torch.einsum("ok,bi,oki,bj,okj->bo", spectrum, z1, p, z2, q)
    expected = layer.subset_terms([z1, z2])[(0, 1)].detach()
    torch.testing.assert_close(rebuilt, expected, rtol=1e-6, atol=1e-6 * (1 + expected.abs().max().item()))

    # coordinates of unit variance, uncorrelated within a modality; no direction where there is no weight
    alive = torch.diag_embed((spectrum > 0).double())
    for directions, s in zip((p, q), covariances, strict=True):
        torch.testing.assert_close(directions @ s @ directions.mT, alive, rtol=1e-6, atol=1e-6)
    assert (p.gather(-1, p.abs().argmax(-1, keepdim=True)) >= 0).all()


def test_canonical_factors_of_a_float32_layer_stay_float32():
    layer = LowRankMultimodalFusion((6, 5), rank=3)
    z = torch.randn(4, 6)  # fewer examples than coordinates: the covariance is singular up to rounding
    spectrum, (p, _) = layer.canonical_factors([z.T.cov(), torch.eye(5)])
    assert spectrum.dtype == p.dtype == torch.float32
    torch.testing.assert_close(p[0] @ z.T.cov() @ p[0].T, torch.eye(3), rtol=1e-3, atol=1e-3)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "shared"), [(1, False), (2, False), (2, True)])
def test_product_is_float32_under_autocast(outputs, shared):
    torch.manual_seed(0)
    layer = LowRankMultimodalFusion((16, 16, 16), outputs, 3, shared_factors=shared)
    latents = [torch.randn(32, 16) for _ in range(3)]
    projected = [
        F.linear(z.bfloat16(), p.weight.bfloat16(), p.bias.bfloat16()).float().unflatten(-1, (3, -1))
        for z, p in zip(latents, layer.projections, strict=True)
    ]
    expected = (math.prod(projected) * layer.rank_weights.reshape(3, -1)).sum(-2) + layer.bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(latents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # bfloat16 resolves 4e-3
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_half_precision_products_do_not_overflow():
    layer = LowRankMultimodalFusion((4,) * 4, rank=1).half()
    with torch.no_grad():
        for p in layer.projections:
            p.weight.fill_(8.0)
        layer.rank_weights.fill_(1e-4)
    # the product of four projections of 32, 1e6, does not fit into float16; the output, 105, does
    output = layer([torch.ones(1, 4, dtype=torch.float16)] * 4)
    assert output.dtype == torch.float16 and 50 < output.item() < 200


# ---- as PyTorch is used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dims", [(5,), (5, 4), (5, 4, 3, 2)])
def test_every_parameter_is_registered_and_moved_by_a_step(dims, shared):
    torch.manual_seed(0)
    layer = LowRankMultimodalFusion(dims, 2, 3, shared_factors=shared)
    names = {f"projections.{m}.{kind}" for m in range(len(dims)) for kind in ("weight", "bias")} | {
        "rank_weights",
        "bias",
    }
    assert set(dict(layer.named_parameters())) == names
    assert set(layer.state_dict()) == names | {"rank_mask"}
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer([torch.randn(8, d) for d in dims]).square().sum().backward()
    optimizer.step()
    assert all((layer.state_dict()[name] != before[name]).all() for name in names)


def test_copies_conversions_and_state_keep_the_function():
    layer = LowRankMultimodalFusion((5, 4), 2, 3, active_rank=2)
    latents = [torch.randn(6, d) for d in (5, 4)]
    loaded = LowRankMultimodalFusion((5, 4), 2, 3)
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), loaded):
        assert torch.equal(other(latents), layer(latents))
    expected = layer(latents)
    double = layer.double()([z.double() for z in latents])
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected)
    assert layer.to(torch.bfloat16)([z.bfloat16() for z in latents]).dtype == torch.bfloat16
    assert layer.to("meta")([z.to("meta") for z in latents]).shape == (6, 2)


def test_batches_of_one_and_none():
    layer = LowRankMultimodalFusion((5, 4, 3), 2, 3)
    full = [torch.randn(3, d) for d in (5, 4, 3)]
    torch.testing.assert_close(layer([z[:1] for z in full]), layer(full)[:1])
    torch.testing.assert_close(layer([z[0] for z in full]), layer(full)[0])
    empty = layer([z[:0] for z in full])
    assert empty.shape == (0, 2)
    empty.sum().backward()
    assert not layer.bias.grad.any()


def test_latents_are_left_as_they_were():
    layer = LowRankMultimodalFusion((5, 4), 2, 3)
    latents = [torch.randn(6, d) for d in (5, 4)]
    kept = [z.clone() for z in latents]
    layer(latents), layer.rank_terms(latents), layer.subset_terms(latents), layer.modality_gradient(latents, 0)
    assert all(torch.equal(a, b) for a, b in zip(latents, kept, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_stacked_weights_and_masks_equals_a_loop(shared):
    members = [LowRankMultimodalFusion((5, 4), 2, 4, active_rank=k, shared_factors=shared).double() for k in (1, 2, 4)]
    parameters, buffers = stack_module_state(members)
    latents = draw_latents(members[0], 6)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], (parameters, buffers), (latents,)).square().mean()

    stacked = vmap(grad(loss))(parameters, buffers)
    for s, member in enumerate(members):
        member(latents).square().mean().backward()
        for name, p in member.named_parameters():
            torch.testing.assert_close(stacked[name][s], p.grad, **EXACT)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    layer = LowRankMultimodalFusion((5, 4, 3), 2, 3, active_rank=2)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    latents = [torch.randn(6, d) for d in (5, 4, 3)]
    torch.testing.assert_close(compiled(latents), layer(latents))
    compiled(latents).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(latents).square().sum().backward()
    for a, p in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


@pytest.mark.parametrize("shared", [False, True])
def test_exports_with_a_dynamic_batch(shared):
    layer = LowRankMultimodalFusion((5, 4), 2, 3, shared_factors=shared)
    batch = torch.export.Dim("batch")
    latents = [torch.randn(6, d) for d in (5, 4)]
    exported = torch.export.export(layer, (latents,), dynamic_shapes=([{0: batch}, {0: batch}],)).module()
    for size in (2, 6, 31):
        latents = [torch.randn(size, d) for d in (5, 4)]
        torch.testing.assert_close(exported(latents), layer(latents))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "shown"),
    [
        ([(6, 5)], r"\(6, 5\)"),
        ([(6, 5), (6, 4), (6, 4)], r"\(6, 4\), \(6, 4\)"),
        ([(6, 5), (6, 3)], r"\(6, 3\)"),
        ([(6, 5), (1, 4)], r"\(1, 4\)"),  # would broadcast silently
        ([(6, 5), ()], r"\(\)"),
        ([], r"\[\]"),
    ],
)
def test_latents_that_do_not_fit_are_refused_with_their_shapes(shapes, shown):
    layer = LowRankMultimodalFusion((5, 4))
    latents = [torch.zeros(shape) for shape in shapes]
    for call in (layer, layer.rank_terms, layer.subset_terms, lambda z: layer.modality_gradient(z, 0)):
        with pytest.raises(ValueError, match=rf"\(5, 4\).*{shown}"):
            call(latents)


def test_one_tensor_is_no_sequence_of_latents():
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        LowRankMultimodalFusion((5, 5))(torch.zeros(2, 5))


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_dims": ()},
        {"input_dims": (4, 0)},
        {"input_dims": (4, 4), "output_dim": 0},
        {"input_dims": (4, 4), "rank": 0},
        {"input_dims": (4, 4), "active_rank": 0},
        {"input_dims": (4, 4), "rank": 2, "active_rank": 3},
    ],
)
def test_sizes_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"at least 1|between 1"):
        LowRankMultimodalFusion(**arguments)


def test_two_modality_methods_refuse_other_layers():
    three = LowRankMultimodalFusion((4, 3, 2))
    with pytest.raises(ValueError, match="this layer has 3"):
        three.bilinear_map()
    with pytest.raises(ValueError, match="this layer has 3"):
        three.canonical_factors([torch.eye(4), torch.eye(3), torch.eye(2)])
    two = LowRankMultimodalFusion((4, 3))
    for covariances in ([torch.eye(4)], [torch.eye(4), torch.eye(4)], [torch.eye(4), torch.ones(3)]):
        with pytest.raises(ValueError, match="need covariances"):
            two.canonical_factors(covariances)
    with pytest.raises(IndexError, match="modality 2"):
        two.modality_gradient([torch.zeros(1, 4), torch.zeros(1, 3)], 2)


def test_layer_sits_in_a_sequential_model():
    assert isinstance(LowRankMultimodalFusion((4, 3)), nn.Module)
    assert "rank=4" in repr(LowRankMultimodalFusion((4, 3)))
