"""Decomposition of an LMF prediction by modality: exact parts, EMAP, Shapley values, relevance, variance.

    v_T(i) = mean over j, k, ... of y(z_i of the modalities in T, z_j, z_k, ... of the others)

is what the model says of example i when it is told the modalities T alone: every other modality takes all its values
in the data set, each independently of the rest. y is affine in each latent, so these N^(M-|T|) passes are one pass with
the others at their mean. That holds for the whole model as well, whose encoders see one modality each.

    part_S = sum_{T within S} (-1)^(|S| - |T|) v_T        what S says together beyond its subsets; sum_S part_S = y
    EMAP   = v_() + sum_m (v_m - v_())                    the best additive approximation (Hessel & Lee, EMNLP 2020)
    phi_m  = sum_{S with m} part_S / |S|                  Shapley value; sum_m phi_m = y - v_()
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from lmf_module import LowRankMultimodalFusion

Subset = tuple[int, ...]


@torch.no_grad()
def recentred(layer: LowRankMultimodalFusion, means: Sequence[Tensor]) -> LowRankMultimodalFusion:
    """The layer that gives at z - mean what `layer` gives at z: its bias rows are c_m + A_m mean_m, means (d_m,)."""
    layer = deepcopy(layer)
    for projection, mean in zip(layer.projections, means, strict=True):
        projection.bias += projection.weight @ mean  # (R * O,) + (R * O, d_m) (d_m,)
    return layer


@torch.no_grad()
def recentred_parts(
    layer: LowRankMultimodalFusion, latents: Sequence[Tensor], means: Sequence[Tensor] | None = None
) -> dict[Subset, Tensor]:
    """`layer.subset_terms` with the latents' origin moved to `means`, by default those of the latents themselves.

    Args:
        layer: left as it is.
        latents: M tensors (N, d_m).
        means: M tensors (d_m,): what an example is compared with, such as the mean latents of train.

    Returns:
        2^M parts (N, O) keyed by ascending modality indices, small subsets first. Their sum is the layer's output; ()
        is its output at the means.
    """
    means = [z.mean(0) for z in latents] if means is None else means
    return recentred(layer, means).subset_terms([z - mean for z, mean in zip(latents, means, strict=True)])


@torch.no_grad()
def contrast_layer(layer: LowRankMultimodalFusion, contrast: Tensor) -> LowRankMultimodalFusion:
    """The weighted sum of a layer's outputs as a layer of one output: a difference of two logits, or one of many.

    Args:
        layer: of R ranks and O outputs; left as it is.
        contrast: (O,) the outputs' weights; those of weight 0 cost nothing.

    Returns:
        a layer of R ranks for each output of weight other than 0 (of shared factors: R), in the layer's precision.
    """
    chosen = contrast.nonzero().flatten()
    shared, weight = layer.shared_factors, contrast[chosen]
    count = layer.rank if shared else layer.rank * len(chosen)
    with torch.random.fork_rng(devices=[]):  # a new layer draws values that are overwritten here
        made = LowRankMultimodalFusion(layer.input_dims, 1, count).to(layer.bias)
    mask = layer.rank_mask[:, None] if shared else layer.rank_mask
    weights = layer.rank_weights * mask  # (R,), or (R, O) of shared factors
    made.rank_weights.copy_(weights[:, chosen] @ weight if shared else torch.outer(weights, weight).flatten())
    made.bias.copy_((layer.bias[chosen] @ weight)[None])
    rows = (
        torch.arange(layer.rank)
        if shared
        else (torch.arange(layer.rank)[:, None] * layer.output_dim + chosen).flatten()
    )
    for new, old in zip(made.projections, layer.projections, strict=True):
        new.weight.copy_(old.weight[rows])
        new.bias.copy_(old.bias[rows])
    return made.requires_grad_(False)


def interventional_values(
    layer: LowRankMultimodalFusion, latents: Sequence[Tensor], means: Sequence[Tensor] | None = None
) -> dict[Subset, Tensor]:
    """v_T (N, O) of every subset T of the modalities, in closed form; arguments as for `recentred_parts`."""
    parts = recentred_parts(layer, latents, means)
    return {known: sum(part for subset, part in parts.items() if set(subset) <= set(known)) for known in parts}


@torch.no_grad()
def values_by_definition(head: Callable[[list[Tensor]], Tensor], latents: Sequence[Tensor]) -> dict[Subset, Tensor]:
    """v_T (N, O) of any head over latents, by its definition: N^(M - |T|) passes for each example.

    For heads that are not affine in their latents, and to check the closed form against.
    """
    n, modalities = len(latents[0]), range(len(latents))
    values = {}
    for size in range(len(latents) + 1):
        for known in itertools.combinations(modalities, size):
            others = [m for m in modalities if m not in known]
            grid = torch.tensor(list(itertools.product(range(n), repeat=len(others))), dtype=torch.long)  # (n^k, k)
            chosen = {m: latents[m][grid[:, column]] for column, m in enumerate(others)}  # (n^k, d_m) each
            rows = []
            for i in range(n if known else 1):
                given = {m: latents[m][i].expand(len(grid), -1) for m in known}
                rows.append(head([(given | chosen)[m] for m in modalities]).mean(0))  # (n^k, O) -> (O,)
            values[known] = torch.stack(rows).expand(n, -1)
    return values


def emap(values: Mapping[Subset, Tensor]) -> Tensor:
    """The empirical multimodally-additive projection (N, O) of a prediction with the given v_T."""
    alone = [value - values[()] for known, value in values.items() if len(known) == 1]
    return values[()] + sum(alone)


def shapley_values(values: Mapping[Subset, Tensor]) -> Tensor:
    """(..., M): the average, over all orders in which the modalities may be told, of what telling m changes.

        phi_m = sum_{T without m} |T|! (M - |T| - 1)! / M! (v_{T + m} - v_T)

    `values` holds v_T (...) of all 2^M subsets T; phi sums to v_(all) - v_().
    """
    modalities = max(map(len, values))
    shares = []
    for m in range(modalities):
        share = 0.0
        for known, value in values.items():
            if m not in known:
                weight = math.factorial(len(known)) * math.factorial(modalities - len(known) - 1)
                given = tuple(sorted((*known, m)))
                share = share + weight / math.factorial(modalities) * (values[given] - value)
        shares.append(share)
    return torch.stack(shares, dim=-1)


def variance_share(part: Tensor, whole: Tensor) -> float:
    """sum_o cov(part_o, whole_o) / sum_o var(whole_o) over examples; part and whole (n,) or (n, O).

    The shares of parts that sum to the whole sum to 1; one is negative where its part works against the whole, and 0
    where the whole is constant.
    """
    part, whole = part - part.mean(0), whole - whole.mean(0)
    return ((part * whole).sum() / whole.square().sum().clamp_min(1e-30)).item()


@torch.no_grad()
def variance_shares(layer: LowRankMultimodalFusion, latents: Sequence[Tensor]) -> dict[tuple[int, ...], float]:
    """Share of each subset of modalities in the variance of the layer's outputs, about the mean latents.

        share_S = sum_o cov(part_So, y_o) / sum_o var(y_o),    y = sum_S part_S

    The parts are those of `recentred_parts`.

    Args:
        layer: of M modalities and O outputs; left as it is.
        latents: M tensors (n, d_m).

    Returns:
        2^M - 1 shares keyed by ascending modality indices; they sum to 1 (all are 0 where y is constant), and one is
        negative where its part works against the whole.

    Raises ValueError for latents that do not fit the layer.
    """
    parts = recentred_parts(deepcopy(layer).double(), [z.double() for z in latents])  # (n, O) each
    whole = sum(parts.values())
    return {subset: variance_share(part, whole) for subset, part in parts.items() if subset}


def contributions(shares: Mapping[tuple[int, ...], np.ndarray | float], modalities: int) -> np.ndarray:
    """Shares (...) by subset -> (..., M): each subset's share in equal parts to its modalities.

    That is the Shapley value of the game whose worth v(T) is the sum of the shares of all S within T; it sums to what
    the shares sum to.
    """
    return np.stack(
        [sum(np.asarray(share) / len(s) for s, share in shares.items() if m in s) for m in range(modalities)], -1
    )


def imbalance(contribution: np.ndarray) -> np.ndarray:
    """(..., M) -> (...): (largest - 1/M) / (1 - 1/M) of contributions clipped at 0 and normalised to sum 1.

    0 where all contribute alike (or none at all), 1 where one does everything. M is at least 2.
    """
    m = contribution.shape[-1]
    clipped = np.clip(contribution, 0, None)
    total = clipped.sum(-1, keepdims=True)
    share = np.where(total > 0, clipped / np.where(total > 0, total, 1), 1 / m)
    return (share.max(-1) - 1 / m) / (1 - 1 / m)


@torch.no_grad()
@torch.no_grad()
def interaction_rank(layer: LowRankMultimodalFusion, latents: Sequence[Tensor]) -> float:
    """Effective rank of the pairwise interactions: (sum_k s_k^2)^2 / sum_k s_k^4, mean over outputs and pairs.

    s_k are the singular values of S_m^1/2 B S_n^1/2, B the bilinear map of latents m and n with the others at their
    mean, S the latents' covariances: of two modalities `canonical_factors`' spectrum. 0 without an interaction; at most
    the rank R, and the dimension in which the latents vary.

    Args:
        layer: left as it is.
        latents: M >= 2 tensors (N, d_m).
    """
    means = [z.mean(0) for z in latents]
    layer = recentred(layer, means).double()
    linear, constant = [], []
    for projection, z, mean in zip(layer.projections, latents, means, strict=True):
        shape = (layer.rank, -1)
        linear.append(((z - mean).double() @ projection.weight.T).unflatten(-1, shape))  # (N, R, O) or (N, R, 1)
        constant.append(projection.bias.unflatten(-1, shape))
    weights = layer.rank_weights.reshape(layer.rank, -1) * layer.rank_mask[:, None]
    found = []
    for m, n in itertools.combinations(range(len(latents)), 2):
        scale = weights * math.prod([c for k, c in enumerate(constant) if k not in (m, n)], start=1)  # (R, O)
        for o in range(layer.output_dim):
            first, second = (linear[k][..., min(o, linear[k].shape[-1] - 1)] for k in (m, n))
            own = scale[:, min(o, scale.shape[-1] - 1)]
            triangles = [torch.linalg.qr(x, mode="r").R for x in (first, second)]
            squares = torch.linalg.svdvals(triangles[0] * own @ triangles[1].T).square()
            total = squares.square().sum()
            found.append(float(squares.sum() ** 2 / total) if total > 0 else 0.0)
    return sum(found) / len(found)


def relevance_scores(layer: LowRankMultimodalFusion, latents: Sequence[Tensor]) -> dict[Subset, float]:
    """Relevance of each set of modalities after InTense (Varshneya et al., IJCAI 2024), with its norm p = 1.

    InTense fuses blocks of features, one block per set S of modalities and for more than one modality their tensor
    product. It normalises each block as a vector, to mean 0 and mean squared length 1, and takes the norm of the
    weights on it, over the sum of these norms, for the relevance of S. Here the blocks are phi_S = the product of the
    centred latents of S, the weights those of the layer's tensor in these blocks:

        y = v_() + sum_S <W_S, phi_S>,    relevance_S = ||W_S|| sigma_S / sum_S' ||W_S'|| sigma_S',
        sigma_S^2 = E ||phi_S||^2 - ||E phi_S||^2

    (InTense trains with a penalty on these norms and centres products repeatedly against their lower orders. Neither
    is done here: the scores describe a layer as it was trained.) Unlike a share of variance, a relevance does not see
    in which directions the latents vary: only how long they are.

    Args:
        layer: of widths whose product is small enough for `full_tensor`; left as it is.
        latents: M tensors (N, d_m).

    Returns:
        2^M - 1 scores >= 0 that sum to 1 (all 0 for a constant layer).
    """
    means = [z.mean(0) for z in latents]
    centred = [z - mean for z, mean in zip(latents, means, strict=True)]
    tensor = recentred(layer, means).full_tensor()  # (O, d_1 + 1, ..., d_M + 1)
    strength = {}
    for size in range(1, len(latents) + 1):
        for subset in itertools.combinations(range(len(latents)), size):
            block = tensor[(slice(None), *(slice(-1) if m in subset else -1 for m in range(len(latents))))]
            length = torch.stack([centred[m].square().sum(1) for m in subset]).prod(0).mean()  # E ||phi_S||^2
            half = (len(subset) + 1) // 2
            first, second = (_row_products(centred, part) for part in (subset[:half], subset[half:]))
            mean = first.T @ second / len(first)  # E phi_S, (prod d of the first half, prod d of the second)
            variance = (length - mean.square().sum()).clamp_min(0)
            strength[subset] = (block.square().sum() * variance).sqrt().item()
    total = max(sum(strength.values()), 1e-30)
    return {subset: value / total for subset, value in strength.items()}


def _row_products(latents: Sequence[Tensor], subset: Subset) -> Tensor:
    """Row-wise Kronecker product of the latents (N, d_m) of a subset, (N, prod d_m); (N, 1) of ones for none."""
    product = latents[0].new_ones(len(latents[0]), 1)
    for m in subset:
        product = (product.unsqueeze(2) * latents[m].unsqueeze(1)).flatten(1)
    return product
