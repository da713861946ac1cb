"""Rank terms of one member's predictions: canonical components of two modalities, else the layer's own.

Nothing matches the ranks of different members. For three or more modalities the terms are the layer's own, which sum to
y - b. With two modalities the layer's own are not identified (`lmf_module`); the canonical components are, and these
sum to the part of both modalities together:

    part_12 = sum_k s_k u_k v_k,    u_k = (z_1 - mean_1) . p_k,  v_k = (z_2 - mean_2) . q_k

with u_k and v_k of variance 1 on train and s_k the standard deviation of the component if they were independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmfusion.models.decomposition import contrast_layer, recentred_parts
from mmfusion.models.exact import exact_layer, latents_of
from mmfusion.models.fusion import FusionModel

TOLERANCE = 1e-5  # of what an account sums to, relative to the largest output above 1 of that example


@dataclass(frozen=True)
class RankAccount:
    """The rank terms of N predictions of one member."""

    canonical: bool
    """canonical components of two modalities; else the layer's own rank terms"""
    weight: np.ndarray
    """(N, R) what the product of the coordinates is multiplied by: s_k, or w_r; the same in every row unless these
    account for margins between different classes"""
    std: np.ndarray
    """(N, R) standard deviation of each term on train"""
    coordinates: np.ndarray
    """(N, R, M) what is multiplied: of variance 1 on train for canonical components, A_m[r] z_m + c_m[r] else"""
    terms: np.ndarray
    """(N, R)"""
    raw_terms: np.ndarray
    """(N, R) the layer's own rank terms; with the layer's own bias they sum to the prediction"""
    raw_bias: np.ndarray
    """(N,) the layer's own bias"""
    residual: float
    """the largest difference between the sum of the terms and what they sum to"""
    neighbours: np.ndarray
    """(N, R, k) rows of train that are nearest in the coordinates of that rank, nearest first"""


def largest_residual(total: np.ndarray, whole: np.ndarray, size: np.ndarray | float = 0.0) -> float:
    """Largest difference; raises ArithmeticError where it is more than rounding.

    `size`: of the outputs that `whole` is a difference of, if it is one: they are rounded at theirs.
    """
    difference = np.abs(total - whole)
    if not (difference <= TOLERANCE * np.maximum(np.maximum(1, size), np.abs(whole))).all():
        raise ArithmeticError(f"an account misses what it accounts for by {np.nanmax(difference):.1e}")
    return float(difference.max(initial=0.0))


def join_rank_accounts(parts: Mapping[int, RankAccount], place: np.ndarray) -> RankAccount:
    """One account of N examples from those of their groups; `place` (N,) says in which group an example is.

    Groups keep the order of their examples. All have the same number of ranks.
    """
    order = np.argsort(place, kind="stable")  # rows of the joined account, group after group
    back = np.argsort(order, kind="stable")
    joined = {
        name: np.concatenate([getattr(parts[k], name) for k in sorted(parts)])[back]
        for name in ("weight", "std", "coordinates", "terms", "raw_terms", "raw_bias", "neighbours")
    }
    first = parts[min(parts)]
    return RankAccount(canonical=first.canonical, residual=max(part.residual for part in parts.values()), **joined)


class RankComponents:
    """The terms that one member's ranks contribute: canonical components for two modalities, else the layer's own."""

    def __init__(self, member: FusionModel, train: Mapping[str, Tensor], output: int | Tensor = 0) -> None:
        """Of one output, or of the outputs weighed by a Tensor (O,): a difference of two has the ranks of both.

        `train`: raw features (n, d_m) that means, covariances and neighbours are taken from.
        """
        self.member = member
        layer = exact_layer(member)
        contrast = torch.eye(layer.output_dim)[output] if isinstance(output, int) else output
        self.layer = contrast_layer(layer, contrast.double())
        reference = latents_of(member, train)
        self.means = [z.mean(0) for z in reference]
        self.canonical = len(reference) == 2
        if self.canonical:
            # a ridge of 1e-9: the identity then holds off the span of train too, should it have few examples
            covariances = [z.T.cov() for z in reference]
            covariances = [c + 1e-9 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype) for c in covariances]
            spectrum, directions = self.layer.canonical_factors(covariances)
            self.weight, self.directions = spectrum[0], [p[0] for p in directions]  # (R,), (R, L) each
        else:
            self.weight = self.layer.rank_weights
        self.train_coordinates = self.coordinates(reference)  # (n, R, M)
        self.train_terms = self.terms(reference)  # (n, R)

    @property
    def rank(self) -> int:
        """R; masked ranks are counted and contribute 0."""
        return self.layer.rank

    def coordinates(self, latents: Sequence[Tensor]) -> Tensor:
        """(N, R, M): what is multiplied in each term."""
        if self.canonical:
            pairs = zip(latents, self.means, self.directions, strict=True)
            return torch.stack([(z - mean) @ direction.T for z, mean, direction in pairs], -1)
        return torch.stack([p(z) for z, p in zip(latents, self.layer.projections, strict=True)], -1)

    def terms(self, latents: Sequence[Tensor]) -> Tensor:
        """(N, R), differentiable in float64 latents (N, L)."""
        if self.canonical:
            return self.weight * self.coordinates(latents).prod(-1)
        return self.layer.rank_terms(latents)[..., 0]

    @torch.no_grad()
    def account(self, features: Mapping[str, Tensor], neighbours: int, skip: Sequence[int | None]) -> RankAccount:
        """Rank terms of raw features (N, d_m), and for each rank the rows of train that are nearest.

        `skip` (N,): the row of train that is the example itself, which is no neighbour of its own.
        """
        latents = latents_of(self.member, features)
        terms, coordinates = self.terms(latents), self.coordinates(latents)
        raw = self.layer.rank_terms(latents)[..., 0]
        whole = self.layer(latents)[..., 0] - self.layer.bias[0]
        together = recentred_parts(self.layer, latents, self.means)[(0, 1)][:, 0] if self.canonical else whole
        residual = largest_residual(terms.sum(-1).numpy(), together.numpy())
        scale = self.train_coordinates.std(0).clamp_min(1e-12)  # (R, M)
        nearest = []
        for r in range(self.rank):
            distance = torch.cdist(coordinates[:, r] / scale[r], self.train_coordinates[:, r] / scale[r])  # (N, n)
            for row, own in enumerate(skip):
                if own is not None:
                    distance[row, own] = torch.inf
            nearest.append(distance.topk(min(neighbours, distance.shape[1]), largest=False).indices)
        return RankAccount(
            self.canonical,
            np.broadcast_to(self.weight.numpy(), terms.shape),
            np.broadcast_to(self.train_terms.std(0).numpy(), terms.shape),
            coordinates.numpy(),
            terms.numpy(),
            raw.numpy(),
            np.full(len(terms), self.layer.bias.item()),
            residual,
            torch.stack(nearest, 1).numpy(),
        )
