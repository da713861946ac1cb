"""Alignment of modalities by second moments: of the whole batch, of neighbourhoods, and jointly.

    Stein        logdet mean_m S_m - mean_m logdet S_m                               (Sra, 2016; Cherian et al., 2013)
    CORAL        mean over pairs of |C_m - C_n|_F^2 / (4 L^2)                              (Sun & Saenko, 2016)
    local Bures  mean over examples of tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, A and B covariances of neighbourhoods
    joint        share of the variance of [z_1 / s_1, ..., z_M / s_M] that its k leading components leave out

All covariances are centred: a shift of a whole modality costs nothing. Stein and CORAL do not see which rows are
partners. None needs more than O(M) decompositions, but the local one without a hub.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from jwae_module import products
from mmfusion.losses.modality_pairs import hub_place, modality_pairs, stacked

# below the variance of any latent that carries something; keeps log and root finite where all rows of a batch are equal
_LEAST_VARIANCE = 1e-12


def stein_divergence(latents: Mapping[str, Tensor], shrinkage: float = 0.1) -> Tensor:
    """Jensen-Bregman LogDet (Stein) divergence of the M shrunk covariances from their mean, by M + 1 Choleskys.

        J = logdet(mean_m S_m) - mean_m logdet S_m >= 0,    S = (1 - a) C + a (tr C / L) I

    0 iff all S_m are equal, and C_m then are. The same rotation of all modalities changes nothing; shrinking one of
    them alone raises J without bound.

    Args:
        latents: (B, L) by modality, B >= 2.
        shrinkage: a of (0, 1], a constant: towards the identity times the modality's mean variance, as Ledoit and Wolf
            (2004) shrink, but by a weight that does not depend on the batch. It bounds the condition number of S by
            1 + L (1 - a) / a, so that J exists at B <= L and float32 is enough.

    Returns:
        A scalar in nats; 0 for one modality.

    Raises:
        ValueError: latents that are not (B, L) alike, B < 2, or shrinkage outside (0, 1].
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in (0, 1], got {shrinkage}")
    covariances = _covariances(stacked(latents, least=2))  # (M, L, L)
    identity = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    variances = covariances.diagonal(dim1=-2, dim2=-1).mean(-1) + _LEAST_VARIANCE  # (M,)
    shrunk = (1 - shrinkage) * covariances + shrinkage * variances[:, None, None] * identity
    # without a check of success, which would wait for the device: shrinkage makes them positive definite
    triangles = torch.linalg.cholesky_ex(torch.cat([shrunk.mean(0, keepdim=True), shrunk])).L
    logdets = 2 * triangles.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (1 + M,)
    return logdets[0] - logdets[1:].mean()


def coral(latents: Mapping[str, Tensor]) -> Tensor:
    """Squared Frobenius distance of the covariances over 4 L^2 (Sun & Saenko, 2016), mean over all pairs.

    The mean over all pairs is 2 / (M - 1) sum_m |C_m - mean|^2: no pair is formed. 0 iff all covariances are equal, and
    0 too where all latents are: shrinking every modality lowers it.

    Args:
        latents: (B, L) by modality, B >= 2.

    Returns:
        A scalar, in units of latents^4; 0 for one modality.

    Raises:
        ValueError: latents that are not (B, L) alike, or B < 2.
    """
    covariances = _covariances(stacked(latents, least=2))  # (M, L, L)
    squared = (covariances - covariances.mean(0)).square().sum()
    return squared / (2 * max(len(covariances) - 1, 1) * covariances.shape[-1] ** 2)


def local_bures(
    latents: Mapping[str, Tensor], neighbours: int = 8, hub: str | None = None, epsilon: float = 1e-4
) -> Tensor:
    """Squared Bures distance between the neighbourhoods of an example in two modalities, mean over examples and pairs.

        tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 = tr A + tr B - (2 / k) |X_A X_B^T|_*,    A = X_A^T X_A / k

    X_A and X_B (k, L) are the centred rows of the *same* k examples in the two modalities, the nearest ones (without
    gradient, the example among them) in one modality: the hub, or without a hub in each of the pair in turn. So it sees
    partners. The nuclear norm is that of a (k, k) matrix whose singular values s are smoothed, sqrt(s^2 + eps^2) - eps:
    centred rows are rank-deficient, and the norm itself has no gradient there. 0 iff the covariances of every
    neighbourhood are equal, but for at most 2 eps above 0.

    Args:
        latents: (B, L) by modality, B >= 2.
        neighbours: k, at most B of them.
        hub: compare each modality with this one alone, on its neighbourhoods: M - 1 in place of M (M - 1) problems.
        epsilon: of the smoothing, in units of squared latents.

    Returns:
        A scalar in units of squared latents; 0 for one modality.

    Raises:
        ValueError: latents that are not (B, L) alike, B < 2, fewer than 2 neighbours, epsilon that is not positive, or
            a hub that is none of the modalities.
    """
    if neighbours < 2 or epsilon <= 0:
        raise ValueError(f"neighbours must be at least 2 and epsilon positive, got {neighbours} and {epsilon}")
    z = stacked(latents, least=2)  # (M, B, L)
    pairs = modality_pairs(latents, hub)
    if not pairs:
        return z.new_zeros(())
    size = min(neighbours, z.shape[1])
    found = range(len(z)) if hub is None else [hub_place(latents, hub)]
    total = z.new_zeros(())
    for place in found:
        nearest = _nearest(z[place].detach(), size)  # (B, k)
        compared = [pair for pair in pairs if place in pair]
        local = z[:, nearest]  # (M, B, k, L)
        local = local - local.mean(-2, keepdim=True)
        traces = local.square().sum((-2, -1)).mean(-1) / size  # (M,)
        for a, b in compared:
            # singular values have a gradient where they are equal or 0, which singular vectors have not
            values = torch.linalg.svdvals(products(local[a], local[b]))  # (B, k)
            smoothed = values.square().add(epsilon**2).sqrt() - epsilon
            total = total + traces[a] + traces[b] - 2 / size * smoothed.sum(-1).mean()
    return total / sum(sum(place in pair for pair in pairs) for place in found)


def low_rank_joint_covariance(latents: Mapping[str, Tensor], rank: int) -> Tensor:
    """Share of the joint variance that no `rank` shared factors explain: 0 iff all modalities are linear in them.

        1 - sum_{i <= k} lambda_i / sum_i lambda_i,   lambda the eigenvalues of the joint covariance (M L, M L)

    of the modalities side by side, each divided by its standard deviation, so that each has the same say and none gains
    by shrinking. By Eckart and Young the best covariance of rank k has the blocks F_m F_n^T, F_m (L, k). The likelihood
    of that factor model would not do as a loss: it is unbounded where the residual variance goes to 0, which is the
    aim. One modality alone has a share too: how little of it lies outside k dimensions.

    It rewards latents of k dimensions, so that what keeps their width must come from another term; and it sees factors
    of the joint space, which may belong to few modalities. It needs B > k + 1: below, it is 0.

    Args:
        latents: (B, L) by modality, B >= 2.
        rank: number of shared factors k.

    Returns:
        A scalar in [0, 1).

    Raises:
        ValueError: latents that are not (B, L) alike, B < 2, or rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    z = stacked(latents, least=2)
    z = z - z.mean(1, keepdim=True)
    scaled = z * (z.square().mean((1, 2), keepdim=True) + _LEAST_VARIANCE).rsqrt()
    joint = scaled.transpose(0, 1).flatten(1).double()  # (B, M L)
    # the same eigenvalues but for zeros: those of the smaller side
    gram = products(joint, joint) if joint.shape[0] <= joint.shape[1] else products(joint.T, joint.T)
    values = torch.linalg.eigvalsh(gram)  # ascending
    left_out = values[: max(len(values) - rank, 0)].clamp_min(0).sum()
    return (left_out / (values.sum() + _LEAST_VARIANCE)).to(z.dtype)


def _covariances(z: Tensor) -> Tensor:
    """(M, L, L) of latents (M, B, L)."""
    z = z - z.mean(-2, keepdim=True)
    return products(z.mT, z.mT) / (z.shape[-2] - 1)


def _nearest(z: Tensor, size: int) -> Tensor:
    """(B, k) rows nearest to each row of z (B, L), the row itself among them."""
    norms = z.square().sum(-1)
    distances = norms[:, None] + norms - 2 * products(z, z)
    return distances.topk(size, largest=False).indices
