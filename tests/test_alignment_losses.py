"""Alignment losses of M modalities: against slow references, what they are 0 at, what they see, where they are safe."""

import itertools
import math

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.func import grad, vmap

from jwae_module import GAUSSIAN_SCALES
from mmfusion.dataset import Dataset, Split
from mmfusion.losses.alignment import ALIGNMENTS
from mmfusion.losses.contrastive import MultilinearCritic, gram_volume_contrast, info_nce, multilinear_contrast
from mmfusion.losses.covariance import coral, local_bures, low_rank_joint_covariance, stein_divergence
from mmfusion.losses.marginal import batch_mmd, batch_transport
from mmfusion.losses.optimal_transport import sinkhorn_divergence, squared_distance_cost
from mmfusion.models.fusion import ModelConfig
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

EXACT = {"rtol": 1e-9, "atol": 1e-11}
NAMES = ("audio", "image", "text", "video", "words")
WITH_HUB = ["info_nce", "transport", "bures", "mmd", "gram", "multilinear"]
MARGINAL = {"transport", "stein", "coral", "mmd"}
LOSSES = {**ALIGNMENTS, "joint": lambda latents: low_rank_joint_covariance(latents, 2)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(modalities: int = 3, batch: int = 9, width: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Latents that agree in part, of different scales."""
    shared = normal(batch, width, seed=seed + 100)
    return {name: (1 + m) * (shared + normal(batch, width, seed=seed + m)) for m, name in enumerate(NAMES[:modalities])}


def permutations_of(latents: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    size = len(next(iter(latents.values())))
    return {m: torch.randperm(size, generator=torch.Generator().manual_seed(seed + i)) for i, m in enumerate(latents)}


def covariance(z: Tensor) -> np.ndarray:
    return np.atleast_2d(np.cov(z.numpy().T))


def cross_entropy(logits: np.ndarray) -> float:
    """Mean over rows of -log softmax at the diagonal."""
    return float(np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)]))


def mean_of_pairs(pair_loss, latents: dict[str, Tensor], hub: str | None = None) -> float:
    pairs = [pair for pair in itertools.combinations(latents, 2) if hub is None or hub in pair]
    return float(np.mean([pair_loss(latents[a], latents[b]) for a, b in pairs]))


# ---- against slow references -----------------------------------------------------------------------------------------


def slow_gram(latents: dict[str, Tensor], anchors: list[str], temperature: float, epsilon: float) -> float:
    unit = {name: (z / z.norm(dim=1, keepdim=True)).numpy() for name, z in latents.items()}
    losses = []
    for anchor in anchors:
        rows = unit[anchor]
        volumes = np.zeros((len(rows), len(rows)))
        for i, j in np.ndindex(volumes.shape):
            vectors = np.stack([rows[i]] + [u[j] for name, u in unit.items() if name != anchor])
            volumes[i, j] = math.sqrt(max(np.linalg.det(vectors @ vectors.T), 0) + epsilon)
        losses += [cross_entropy(-volumes / temperature), cross_entropy(-volumes.T / temperature)]
    return float(np.mean(losses))


@pytest.mark.parametrize("modalities", [2, 3, 5])
@pytest.mark.parametrize("hub", [None, "image"])
def test_gram_equals_determinants_of_every_mixed_tuple(modalities, hub):
    latents = draw(modalities, batch=5, width=6)
    found = gram_volume_contrast(latents, temperature=0.3, hub=hub, epsilon=1e-4).item()
    assert found == pytest.approx(slow_gram(latents, [hub] if hub else list(latents), 0.3, 1e-4), rel=1e-9)


def slow_multilinear(score, latents, permutations, anchors, temperature: float) -> float:
    """`score` takes rows by modality; a mixed tuple that is the anchor's own has no logit."""
    losses = []
    for anchor in anchors:
        size = len(latents[anchor])
        for i in range(size):
            logits = []
            for j in range(size):
                rows = {name: i if name == anchor or i == j else int(permutations[name][j]) for name in latents}
                if i == j or set(rows.values()) != {i}:
                    logits.append(score({name: latents[name][row] for name, row in rows.items()}) / temperature)
                if i == j:
                    own = logits[-1]
            losses.append(math.log(sum(map(math.exp, logits))) - own)
    return float(np.mean(losses))


def inner_product(rows: dict[str, Tensor]) -> float:
    length = len(next(iter(rows.values()))) ** (0.5 - 1 / len(rows))
    return math.prod(length * z / z.norm() for z in rows.values()).sum().item()


@pytest.mark.parametrize("hub", [None, "text"])
@pytest.mark.parametrize("handed", [False, True])
def test_multilinear_contrast_equals_its_loop(hub, handed):
    latents = draw(4, batch=6)
    shifts = {name: (torch.arange(6) + m + 1) % 6 for m, name in enumerate(latents)}
    drawn = permutations_of(latents)
    given = {"permutations": drawn} if handed else {}
    expected = slow_multilinear(inner_product, latents, drawn if handed else shifts, [hub] if hub else latents, 0.4)
    assert multilinear_contrast(latents, 0.4, hub, **given).item() == pytest.approx(expected, rel=1e-9)


def test_a_mixed_tuple_that_is_the_own_one_is_no_negative():
    latents = draw(3, batch=6)
    together = dict.fromkeys(latents, torch.tensor([1, 2, 3, 4, 5, 0]))  # every mixed tuple is some example's own
    expected = slow_multilinear(inner_product, latents, together, latents, 0.4)
    assert multilinear_contrast(latents, 0.4, permutations=together).item() == pytest.approx(expected, rel=1e-9)


def test_multilinear_contrast_of_two_modalities_is_info_nce():
    latents = draw(2)
    torch.testing.assert_close(multilinear_contrast(latents, 0.2), info_nce(latents, 0.2), **EXACT)


CONTRASTS = ("info_nce", "gram", "multilinear")


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_items_of_one_row_each_change_no_bit(name, modalities):
    latents = draw(modalities)
    assert torch.equal(LOSSES[name](latents, items=torch.arange(9.0)), LOSSES[name](latents))


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrast_of_items_equals_a_loop_that_leaves_out_rows_of_the_same_item(name):
    latents, items = draw(2), torch.tensor([0.0, 1, 0, 2, 1, 0, 3, 4, 5])
    a, b = (z / z.norm(dim=1, keepdim=True) for z in latents.values())
    cosines = (a @ b.T).numpy()
    table = (-np.sqrt(1 - cosines**2 + 1e-6) if name == "gram" else cosines) / 0.3
    found = []
    for logits in (table, table.T):
        for i in range(9):
            rivals = [j for j in range(9) if j == i or items[j] != items[i]]
            found.append(np.log(np.exp(logits[i, rivals]).sum()) - logits[i, i])
    assert LOSSES[name](latents, 0.3, items=items).item() == pytest.approx(np.mean(found), rel=1e-9)


def test_mixed_tuple_of_the_anchors_item_is_no_negative_and_one_of_other_items_is():
    latents, items = draw(3, batch=6), torch.tensor([0, 0, 1, 1, 2, 2])
    swapped = dict.fromkeys(latents, torch.tensor([1, 0, 3, 2, 5, 4]))  # mixed tuple j: the other row of j's item
    assert multilinear_contrast(latents, permutations=swapped, items=items) > 0
    assert multilinear_contrast(latents, permutations=swapped, items=items * 0) == 0
    rows = {m: z / z.norm(dim=1, keepdim=True) * 4 ** (1 / 6) for m, z in latents.items()}
    expected = []
    for anchor in latents:
        x, y = (z for m, z in rows.items() if m != anchor)
        for i in range(6):
            own = math.exp((rows[anchor][i] * x[i] * y[i]).sum() / 0.4)
            tuples = [swapped[anchor][j] for j in range(6) if j // 2 != i // 2]
            mixed = sum(math.exp((rows[anchor][i] * x[j] * y[j]).sum() / 0.4) for j in tuples)
            expected.append(math.log(own + mixed) - math.log(own))
    found = multilinear_contrast(latents, 0.4, permutations=swapped, items=items)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_rows_of_one_item_do_not_push_each_other_in_a_stack_of_members(name, modalities):
    stacked = {m: torch.stack([z, 2 * z.flip(0)]) for m, z in draw(modalities).items()}
    items = torch.stack([torch.zeros(9), torch.arange(9.0)])  # all of one item; each its own
    slopes = vmap(grad(lambda z, items: LOSSES[name](z, items=items)))(stacked, items)
    assert all(not g[0].any() for g in slopes.values())
    alone = grad(LOSSES[name])({m: z[1] for m, z in stacked.items()})
    for m, g in slopes.items():
        torch.testing.assert_close(g[1], alone[m], **EXACT)
        assert g[1].any()


def critic(modalities: int = 3, width: int = 4, rank: int | None = None) -> MultilinearCritic:
    torch.manual_seed(0)
    return MultilinearCritic(NAMES[:modalities], width, rank).double()


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_critic_with_identity_factors_is_symile(modalities):
    latents, model = draw(modalities), critic(modalities)
    assert not torch.isclose(model(latents), multilinear_contrast(latents))
    model.set_identity()
    torch.testing.assert_close(model(latents), multilinear_contrast(latents), **EXACT)
    expected = [inner_product({name: z[i] for name, z in latents.items()}) for i in range(9)]
    torch.testing.assert_close(model.score(latents), torch.tensor(expected, dtype=torch.float64), **EXACT)
    with pytest.raises(ValueError, match="rank 4"):
        critic(rank=3).set_identity()


def test_critic_contrasts_the_scores_of_its_layer():
    latents, model = draw(3, batch=6), critic(rank=5)
    with torch.no_grad():
        model.layer.bias.fill_(3.0)
        model.layer.rank_mask[1] = 0
    permutations = permutations_of(latents, 7)

    def score(rows: dict[str, Tensor]) -> float:
        return model.score({name: z[None] for name, z in rows.items()}).item()

    expected = slow_multilinear(score, latents, permutations, latents, 0.6)
    shuffled = dict(reversed(latents.items()))  # by name, in any order
    assert model(shuffled, 0.6, permutations=permutations).item() == pytest.approx(expected, rel=1e-9)
    model.layer.rank_mask[1] = 1
    model(latents).backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name != "layer.bias")


def test_three_way_contrast_sees_what_pairs_cannot():
    a, b = normal(64, 32).sign(), normal(64, 32, seed=1).sign()
    latents = {"a": a, "b": b, "c": a * b}  # exclusive or: any two are independent, the third follows
    assert multilinear_contrast(latents).item() < 0.1
    assert info_nce(latents).item() > math.log(64)


@pytest.mark.parametrize("batch", [3, 20])
def test_stein_equals_log_determinants(batch):
    latents = draw(3, batch=batch)
    shrunk = []
    for z in latents.values():
        c = covariance(z)
        shrunk.append(0.8 * c + 0.2 * np.trace(c) / 4 * np.eye(4))
    expected = np.linalg.slogdet(np.mean(shrunk, 0))[1] - np.mean([np.linalg.slogdet(s)[1] for s in shrunk])
    assert stein_divergence(latents, shrinkage=0.2).item() == pytest.approx(expected, rel=1e-9)


def test_coral_equals_a_loop_over_pairs():
    latents = draw(4)
    expected = mean_of_pairs(lambda x, y: ((covariance(x) - covariance(y)) ** 2).sum() / (4 * 4**2), latents)
    assert coral(latents).item() == pytest.approx(expected, rel=1e-9)


def slow_bures(latents: dict[str, Tensor], size: int, hub: str | None) -> float:
    found = []
    for a, b in itertools.combinations(latents, 2):
        for place in [a, b] if hub is None else [hub]:
            if place not in (a, b):
                continue
            z = latents[place]
            for i in range(len(z)):
                nearest = np.argsort([float((z[i] - row).square().sum()) for row in z])[:size]
                first, second = (np.cov(latents[m][nearest].numpy().T, ddof=0) for m in (a, b))
                root = scipy.linalg.sqrtm(first + 1e-13 * np.eye(len(first)))
                cross = scipy.linalg.sqrtm(root @ second @ root + 1e-13 * np.eye(len(first)))
                found.append(np.trace(first) + np.trace(second) - 2 * np.trace(cross).real)
    return float(np.mean(found))


@pytest.mark.parametrize("hub", [None, "image"])
@pytest.mark.parametrize("size", [3, 7])
def test_local_bures_equals_matrix_roots(hub, size):
    latents = draw(3)
    found = local_bures(latents, size, hub, epsilon=1e-9).item()
    assert found == pytest.approx(slow_bures(latents, size, hub), rel=1e-4)


def test_joint_covariance_is_what_the_best_factors_leave_out():
    latents = draw(3, batch=40)
    scaled = [(z - z.mean(0)) / (z - z.mean(0)).square().mean().sqrt() for z in latents.values()]
    joint = torch.cat(scaled, 1).numpy()
    u, s, vh = np.linalg.svd(joint, full_matrices=False)
    for rank in (1, 3, 6):
        left = joint - (u[:, :rank] * s[:rank]) @ vh[:rank]
        expected = (left**2).sum() / (joint**2).sum()
        assert low_rank_joint_covariance(latents, rank).item() == pytest.approx(expected, rel=1e-9)
    wide = {name: z[:7] for name, z in latents.items()}  # fewer rows than joint columns
    scaled = [z / (z - z.mean(0)).square().mean().sqrt() for z in wide.values()]
    values = np.linalg.eigvalsh(np.cov(torch.cat(scaled, 1).numpy().T))
    assert low_rank_joint_covariance(wide, 2).item() == pytest.approx(1 - values[-2:].sum() / values.sum(), rel=1e-9)


def entropic(x: Tensor, y: Tensor, cost, epsilon: float) -> float:
    c = cost(x, y)
    masses = np.full(len(c), 1 / len(c))
    plan = ot.sinkhorn(masses, masses, c, epsilon, method="sinkhorn_log", numItermax=20000, stopThr=1e-9)
    return (plan * c).sum() + epsilon * (plan * np.log(plan * len(c) ** 2)).sum()


@pytest.mark.parametrize("cost", ["cosine", "squared_distance"])
@pytest.mark.parametrize("hub", [None, "image"])
def test_batch_transport_equals_pot(cost, hub):
    latents = draw(3, batch=6)
    epsilon, every = 0.5, torch.cat(list(latents.values()))
    costs = {"cosine": "cosine", "squared_distance": "sqeuclidean"}

    def table(x: Tensor, y: Tensor) -> np.ndarray:
        return scipy.spatial.distance.cdist(x, y, costs[cost])

    scale = 1.0 if cost == "cosine" else table(every, every).mean()

    def debiased(x: Tensor, y: Tensor) -> float:
        both, of_x, of_y = (entropic(u, v, table, epsilon * scale) for u, v in ((x, y), (x, x), (y, y)))
        return both - of_x / 2 - of_y / 2

    found = batch_transport(latents, hub, cost=cost, epsilon=epsilon, iterations=500).item()
    assert found == pytest.approx(mean_of_pairs(debiased, latents, hub), rel=1e-6)


def test_scale_of_squared_distances_sets_epsilon_and_has_no_gradient():
    latents = draw(2)
    every = torch.cat(list(latents.values()))
    scale = torch.cdist(every, every).square().mean().item()

    def fixed(latents: dict[str, Tensor]) -> Tensor:
        return sinkhorn_divergence(*latents.values(), cost=squared_distance_cost, epsilon=0.3 * scale)

    def relative(latents: dict[str, Tensor]) -> Tensor:
        return batch_transport(latents, cost="squared_distance", epsilon=0.3)

    torch.testing.assert_close(relative(latents), fixed(latents), **EXACT)
    torch.testing.assert_close(grad(relative)(latents), grad(fixed)(latents), **EXACT)


@pytest.mark.parametrize("hub", [None, "image"])
def test_batch_mmd_equals_sums_of_kernels(hub):
    latents = draw(3, batch=6)

    def mmd(x: Tensor, y: Tensor) -> float:
        both = torch.cat([x, y])
        d = scipy.spatial.distance.cdist(both, both, "sqeuclidean")
        total = 0.0
        for scale in GAUSSIAN_SCALES:
            k = np.exp(-d / (2 * scale * d.mean()))
            within = sum(k[a, b] for s in (0, 6) for a in range(s, s + 6) for b in range(s, s + 6) if a != b) / 30
            total += within - 2 * k[:6, 6:].mean()
        return total / len(GAUSSIAN_SCALES)

    assert batch_mmd(latents, hub).item() == pytest.approx(mean_of_pairs(mmd, latents, hub), rel=1e-9)


def test_info_nce_with_a_hub_is_the_mean_over_its_pairs_and_takes_a_learned_temperature():
    latents = draw(4)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    expected = mean_of_pairs(lambda x, y: info_nce({"x": x, "y": y}, 0.3).item(), latents, "text")
    loss = info_nce(latents, temperature, hub="text")
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    step = (info_nce(latents, 0.3 + 1e-5, "text") - info_nce(latents, 0.3 - 1e-5, "text")) / 2e-5
    torch.testing.assert_close(temperature.grad, step, rtol=1e-6, atol=0)


# ---- what they are 0 at, and what they see ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transport", "stein", "coral", "bures"])
def test_zero_where_aligned_and_positive_elsewhere(name):
    z = normal(12, 4)
    # smoothed singular values leave 2 eps of k, at most
    assert abs(LOSSES[name]({"a": z, "b": z.clone(), "c": z.clone()}).item()) < (2e-4 if name == "bures" else 1e-12)
    assert LOSSES[name]({"a": z, "b": z, "c": normal(12, 4, seed=1)}).item() > 1e-2


@pytest.mark.parametrize("epsilon", [1e-4, 0.1, 1.0])
def test_smoothing_leaves_bures_between_zero_and_two_epsilon_at_equality(epsilon):
    z = normal(12, 4)
    assert -1e-12 <= local_bures({"a": z, "b": z}, epsilon=epsilon).item() <= 2 * epsilon


def test_smoothed_bures_has_no_jump_of_its_gradient_at_rank_deficiency():
    z, other = normal(8, 4), torch.cat([normal(8, 1, seed=1), torch.zeros(8, 3, dtype=torch.float64)], 1)
    near = other + 1e-9 * normal(8, 4, seed=2)
    found = [grad(local_bures)({"a": z, "b": b})["b"] for b in (other, near)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_joint_covariance_is_zero_iff_modalities_are_linear_in_the_factors():
    factors = normal(30, 3)
    latents = {name: factors @ normal(3, 5, seed=m) + m for m, name in enumerate(NAMES[:4])}
    assert low_rank_joint_covariance(latents, 3).item() == pytest.approx(0, abs=1e-12)
    assert low_rank_joint_covariance(latents, 2).item() > 1e-2
    latents["audio"] = latents["audio"] + 0.3 * normal(30, 5, seed=9)
    assert low_rank_joint_covariance(latents, 3).item() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_paired_losses_see_which_rows_are_partners(name):
    latents = draw(3, batch=12)
    moved = latents | {"image": latents["image"].roll(5, 0)}
    change = (LOSSES[name](latents) - LOSSES[name](moved)).abs().item()
    assert change < 1e-7 if name in MARGINAL else change > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_names_and_order_of_modalities_do_not_matter(name):
    latents = draw(4)
    given = {}
    if name == "multilinear":  # the default shifts follow the order
        given["permutations"] = permutations_of(latents)
    elif name == "transport":  # Sinkhorn's two sides differ until it has converged
        given["iterations"] = 1000
    expected = LOSSES[name](latents, **given)
    names = dict(zip(latents, ("d", "b", "a", "c"), strict=True))
    turned = {names[m]: latents[m] for m in sorted(latents, key=names.get)}
    if name == "multilinear":
        given["permutations"] = {names[m]: place for m, place in given["permutations"].items()}
    torch.testing.assert_close(LOSSES[name](turned, **given), expected, rtol=1e-7, atol=1e-9)


def test_default_shifts_of_multilinear_depend_on_the_order_by_chance_alone():
    latents = {name: z[:, :8] for name, z in draw(3, batch=64, width=8).items()}
    turned = dict(reversed(latents.items()))
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(s)) for s in range(100)]
    gaps = torch.stack(
        [
            multilinear_contrast({m: z[o] for m, z in latents.items()}, 0.5)
            - multilinear_contrast({m: z[o] for m, z in turned.items()}, 0.5)
            for o in orders
        ]
    )
    assert gaps.abs().max() > 1e-4 and gaps.mean().abs() < 4 * gaps.std() / len(gaps) ** 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_rotation_of_all_modalities_alike_matters_to_coordinatewise_products_alone(name):
    latents = draw(3)
    rotation = torch.linalg.qr(normal(4, 4, seed=5))[0]
    rotated = {m: z @ rotation for m, z in latents.items()}
    change = (LOSSES[name](latents) - LOSSES[name](rotated)).abs().item()
    assert change > 1e-2 if name == "multilinear" else change < 1e-7


@pytest.mark.parametrize("name", ["stein", "coral", "bures", "joint"])
def test_shifting_a_modality_costs_nothing(name):
    latents = draw(3)
    moved = {m: z + 3 * normal(1, 4, seed=i) for i, (m, z) in enumerate(latents.items())}
    torch.testing.assert_close(LOSSES[name](moved), LOSSES[name](latents), rtol=1e-7, atol=1e-9)


def test_shrinking_one_modality_raises_stein():
    z, other = normal(40, 6), normal(40, 6, seed=1)
    found = [stein_divergence({"a": z, "b": scale * other}).item() for scale in (1, 0.1, 0.01, 0.001)]
    assert found[0] > 0 and all(b > a + 1 for a, b in itertools.pairwise(found))


def test_shrinking_one_modality_does_not_help_the_joint_covariance():
    latents = draw(3)
    shrunk = latents | {"audio": 1e-3 * latents["audio"]}
    torch.testing.assert_close(LOSSES["joint"](shrunk), LOSSES["joint"](latents), rtol=1e-5, atol=0)


def test_gram_cannot_tell_exact_alignment_of_three_from_chance():
    z = normal(16, 8)
    assert gram_volume_contrast({"a": z, "b": z}).item() < 0.1
    three = {"a": z, "b": z.clone(), "c": z.clone()}
    assert gram_volume_contrast(three).item() == pytest.approx(math.log(16), abs=1e-6)
    assert all(g.abs().max() < 1e-9 for g in grad(gram_volume_contrast)(three).values())


# ---- gradients, mapping, compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["info_nce", "transport", "stein", "bures", "coral", "gram", "multilinear", "joint"])
def test_gradients_equal_finite_differences(name):
    """Not margin (kinks) and mmd (its kernel widths have no gradient)."""
    more = {"transport": {"epsilon": 0.5, "iterations": 150}, "info_nce": {"temperature": 0.5}}.get(name, {})
    latents = draw(3, batch=5, width=3)

    def loss(*rows: Tensor) -> Tensor:
        return LOSSES[name](dict(zip(latents, rows, strict=True)), **more)

    assert torch.autograd.gradcheck(loss, tuple(z.requires_grad_() for z in latents.values()), atol=1e-6, rtol=1e-4)


def degenerate() -> dict[str, dict[str, Tensor]]:
    z = normal(8, 4).float()
    pair = {"a": z[:2], "b": -z[2:4], "c": z[4:6]}
    return {
        "equal": {m: z.clone() for m in "abc"},
        "opposite": {"a": z, "b": -z, "c": z.clone()},
        "one modality": {"a": z},
        "two rows": pair,
        "two equal rows": {m: torch.ones(2, 4) for m in "abc"},
        "equal rows": {m: torch.full((8, 4), 0.3) for m in "abc"},
        "zeros": {m: torch.zeros(8, 4) for m in "abc"},
        "one collapsed": {"a": z, "b": torch.ones(8, 4), "c": 1e-8 * z},
        "one coordinate": {m: s * z[:, :1] for s, m in enumerate("abc", 1)},
        "large": {m: 1e4 * z.roll(s, 0) for s, m in enumerate("abc", 1)},
    }


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", degenerate())
def test_value_and_gradient_are_finite_where_latents_are_degenerate(name, case):
    latents = degenerate()[case]
    value = LOSSES[name](latents)
    gradient = grad(LOSSES[name])(latents)
    assert value.dtype == torch.float32 and value.shape == () and value.isfinite()
    assert all(g.isfinite().all() for g in gradient.values())
    if case == "one modality" and name != "joint":
        assert value == 0


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    latents = {m: z.bfloat16() for m, z in draw(3).items()}
    expected = LOSSES[name]({m: z.float() for m, z in latents.items()})
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](latents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_enough_for_modalities_that_nearly_agree(name):
    shared = normal(16, 8)
    latents = {m: shared + 0.1 * normal(16, 8, seed=i) for i, m in enumerate("abcdef", 1)}
    single = {m: z.float() for m, z in latents.items()}
    assert LOSSES[name](single).item() == pytest.approx(LOSSES[name](latents).item(), rel=1e-5, abs=1e-6)
    found, expected = grad(LOSSES[name])(single), grad(LOSSES[name])(latents)
    largest = max(g.abs().max().item() for g in expected.values())
    for m in expected:
        torch.testing.assert_close(found[m].double(), expected[m], rtol=0, atol=5e-3 * largest + 1e-6)


def members(count: int = 3) -> dict[str, Tensor]:
    drawn = [draw(3, seed=10 * s) for s in range(count)]
    return {m: torch.stack([latents[m] for latents in drawn]) for m in drawn[0]}


@pytest.mark.parametrize("name", LOSSES)
def test_mapping_over_members_equals_a_loop(name):
    stacked = members()
    found = vmap(grad(LOSSES[name]))(stacked)
    for s in range(3):
        expected = grad(LOSSES[name])({m: z[s] for m, z in stacked.items()})
        for m in expected:
            torch.testing.assert_close(found[m][s], expected[m], **EXACT)


def test_all_compile_without_a_graph_break():
    model = critic()
    torch.compiler.reset()

    def total(latents: dict[str, Tensor]) -> Tensor:
        more = {name: {"hub": "text"} for name in WITH_HUB} | {"transport": {"hub": "text", "iterations": 2}}
        return sum(loss(latents, **more.get(name, {})) for name, loss in LOSSES.items()) + model(latents)

    slope, stacked = vmap(grad(total)), members(2)
    compiled = torch.compile(slope, fullgraph=True, backend="eager")(stacked)
    expected = slope(stacked)
    for m in expected:
        torch.testing.assert_close(compiled[m], expected[m], **EXACT)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_no_pairs_are_refused(name):
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(6, 4\)"):
        LOSSES[name]({"image": torch.zeros(5, 4), "text": torch.zeros(6, 4)})


@pytest.mark.parametrize("name", WITH_HUB)
def test_unknown_hub_is_refused(name):
    with pytest.raises(ValueError, match="hub must be one of audio, image, text, got 'smell'"):
        LOSSES[name](draw(3), hub="smell")


@pytest.mark.parametrize("name", ["stein", "coral", "bures", "mmd", "joint"])
def test_a_batch_of_one_has_no_covariance(name):
    with pytest.raises(ValueError, match="at least 2"):
        LOSSES[name]({m: torch.zeros(1, 4) for m in "ab"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: stein_divergence(z, shrinkage=0.0), "shrinkage"),
        (lambda z: local_bures(z, neighbours=1), "neighbours"),
        (lambda z: local_bures(z, epsilon=0.0), "epsilon"),
        (lambda z: low_rank_joint_covariance(z, 0), "rank"),
        (lambda z: batch_transport(z, cost="manhattan"), "cosine, squared_distance"),
        (lambda z: multilinear_contrast(z, permutations={"audio": torch.arange(9)}), "permutations"),
        (lambda z: critic()({"audio": z["audio"]}), "expected latents of audio, image, text"),
    ],
)
def test_settings_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(3))


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_every_loss_trains_a_stack_of_fusion_models_as_the_alignment_of_a_run(name):
    generator = torch.Generator().manual_seed(0)
    features = {key: torch.randn(40, width, generator=generator) for key, width in {"image": 6, "text": 5}.items()}
    split = Split(features, torch.arange(40.0) % 2, [str(i) for i in range(40)])
    data, method = Dataset("toy", "binary", {"train": split, "dev": split}, "dev"), Method("it", ("image", "text"))
    found = []
    for weight in (0.0, 0.5):
        objective = ObjectiveConfig(alignment=name, alignment_weight=weight)
        training = TrainingConfig(seeds=2, epochs=2, batch_size=16, keep="last")
        (ensemble,), trained = fit_methods(data, [method], ModelConfig(8, 8, 2), objective, training)
        assert np.isfinite(trained.history[-1]["loss"]["alignment"]).all()
        found.append(torch.cat([p.flatten() for p in ensemble.parameters()]))
    assert found[1].isfinite().all() and not torch.equal(*found)
