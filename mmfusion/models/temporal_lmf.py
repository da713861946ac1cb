"""LMF over pairs of steps or tokens: y = sum_ij P_ij LMF(x_i, y_j), P a coupling of two sequences.

    layer = TemporalLMF([32, 32], rank=4, plan="transport")
    layer([x, y], [x_mask, y_mask])  # (B, T_1, 32), (B, T_2, 32) -> (B, 1)

Given P this is multilinear in the two sequences, so everything that `LowRankMultimodalFusion` takes apart exactly is
exact here too, pair by pair. With P uniform, P_ij = a_i b_j, it is LMF of the two means; the parts of one modality
alone depend on P through its margins alone, which all plans have in common: nothing but the interaction can feel which
step meets which.

More than two modalities meet through a hub, the first of them: y = sum_i a_i LMF(x_i, y(i), z(i)), where y(i) is the
mean of the y_j by P_ij / a_i. That is the sum over triples under the coupling in which y_j and z_k are independent
given the step x_i that both were matched with.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack
from torch import Tensor, nn

from jwae_module import JWAE
from lmf_module import LowRankMultimodalFusion
from mmfusion.losses.optimal_transport import cosine_cost
from mmfusion.losses.transport_plans import sinkhorn
from mmfusion.models.decomposition import recentred_parts
from mmfusion.models.heads import Rescale, Standardise
from mmfusion.models.tokens import TokenOutput, draw_tokens, hide, step_times, uniform_mass
from mmfusion.sequences import Tokens

Plan = Literal["transport", "diagonal", "banded", "uniform"]
EPSILON = 0.1  # of the transport between latents, whose cosine costs lie between 0 and 2
ITERATIONS = 30


class TemporalLMF(LowRankMultimodalFusion):
    """An LMF layer of sequences: M of (..., T_m, d_m) with masks (..., T_m) -> (..., O).

    Args:
        input_dims, output_dim, rank, active_rank: as of `LowRankMultimodalFusion`.
        plan: which coupling of the hub's steps with another modality's.
            "transport": entropic optimal transport by the cosine distance of their vectors, without a gradient.
            "diagonal": step i with step i, over the steps that all modalities have; all with all where there is none.
            "banded": entropic transport by the lag of their times, each from 0 at the first to 1 at the last step.
            "uniform": all with all.
        band: standard deviation of the lag in a banded plan, as a share of the whole duration.

    Raises ValueError for an unknown plan, a band that is not positive, or transport between vectors of several widths,
    and as `LowRankMultimodalFusion`.
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int = 1,
        rank: int = 4,
        *,
        active_rank: int | None = None,
        plan: Plan = "transport",
        band: float = 0.1,
    ) -> None:
        super().__init__(input_dims, output_dim, rank, active_rank=active_rank)
        if plan not in get_args(Plan):
            raise ValueError(f"plan is one of {', '.join(get_args(Plan))}, not {plan!r}")
        if not band > 0:
            raise ValueError(f"band must be positive, got {band}")
        if plan == "transport" and len(set(input_dims)) > 1:
            raise ValueError(f"transport compares vectors by their angle: give them one width, not {list(input_dims)}")
        self.plan, self.band = plan, band

    def forward(self, latents: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> Tensor:
        """Fuse sequences (..., T_m, d_m); masks (..., T_m) hold 1 and 0, default: all steps are there.

        A sequence without any step counts as one step at 0, the mean of the prior.
        """
        mass, partners = self.met(latents, masks)
        return self._sum(super().forward(partners), mass)

    def parts(
        self, latents: Sequence[Tensor], masks: Sequence[Tensor] | None, means: Sequence[Tensor]
    ) -> dict[tuple[int, ...], Tensor]:
        """What each subset of modalities adds, (..., O), about the vectors `means` (d_m,): they sum to the output.

        Subsets of one modality do not depend on the plan, but for the error of its iterations.
        """
        mass, partners = self.met(latents, masks)
        return {subset: self._sum(part, mass) for subset, part in recentred_parts(self, partners, means).items()}

    def plans(self, latents: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The coupling (..., T_1, T_m) of the first modality with each other one; of mass 1, without a gradient."""
        return self._couplings(*self._filled(latents, masks))

    def contributions(self, latents: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> Tensor:
        """What each pair of steps adds: P_ij LMF(x_i, y_j), (..., T_1, T_2, O); they sum to the output.

        Raises ValueError unless there are two modalities.
        """
        if len(self.input_dims) != 2:
            raise ValueError(f"pairs are of two modalities, this layer has {len(self.input_dims)}")
        latents, masks = self._filled(latents, masks)
        (plan,) = self._couplings(latents, masks)
        return plan.unsqueeze(-1) * self.pair_scores(latents)

    def pair_scores(self, latents: Sequence[Tensor]) -> Tensor:
        """LMF(x_i, y_j) of every pair of two modalities' steps, (..., T_1, T_2, O)."""
        x, y = latents
        n, m = x.shape[-2], y.shape[-2]
        both = [x.unsqueeze(-2).expand(*x.shape[:-1], m, -1), y.unsqueeze(-3).expand(*y.shape[:-2], n, *y.shape[-2:])]
        return super().forward(both)

    def step_gradient(self, latents: Sequence[Tensor], m: int, masks: Sequence[Tensor] | None = None) -> Tensor:
        """dy / dx_i of every step of modality m at this plan, (..., O, T_m, d_m), exact: y is affine in all of them."""
        mass, partners = self.met(latents, masks)
        slope = self.modality_gradient(partners, m) * mass[..., None, None]  # (..., T_1, O, d_m)
        if m == 0:
            return slope.transpose(-3, -2)
        return torch.einsum("...ij,...iod->...ojd", _given_the_row(self.plans(latents, masks)[m - 1]), slope)

    def met(self, latents: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Mass (..., T_1) of the hub's steps, and the hub's vectors beside what each met, M of (..., T_1, d_m).

        The layer's own exact decompositions of the latter, summed with these masses, are those of the output.
        """
        latents, masks = self._filled(latents, masks)
        plans = self._couplings(latents, masks)
        partners = [_given_the_row(plan) @ x for plan, x in zip(plans, latents[1:], strict=True)]  # (..., T_1, d_m)
        # all plans have the same row sums, those of transport up to the error of its iterations
        mass = plans[-1].sum(-1) if plans else uniform_mass(masks[0])
        return mass, [latents[0], *partners]

    @staticmethod
    def _sum(values: Tensor, mass: Tensor) -> Tensor:
        return (values * mass.unsqueeze(-1)).sum(-2)

    def _filled(self, latents: Sequence[Tensor], masks: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Vectors with 0 at padding, and masks of which none is empty."""
        masks = [x.new_ones(x.shape[:-1]) for x in latents] if masks is None else list(masks)
        whole = []
        for k, (x, mask) in enumerate(zip(latents, masks, strict=True)):
            # where, not a product: what stands at padding may be infinite
            whole.append(torch.where((mask != 0).unsqueeze(-1), x, 0))
            mask = mask.to(x.dtype)
            empty = (mask.sum(-1, keepdim=True) == 0).to(mask)  # (..., 1)
            first = (torch.arange(mask.shape[-1], device=mask.device) == 0).to(mask)
            masks[k] = mask + empty * first
        return whole, masks

    def _couplings(self, latents: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """(..., T_1, T_m) of the first modality with each other one, of mass 1 and of the same row sums."""
        if self.plan == "diagonal":
            return _diagonal(masks)
        return [self._coupling(latents[0], x, masks[0], mask) for x, mask in zip(latents[1:], masks[1:], strict=True)]

    def _coupling(self, x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor) -> Tensor:
        """(..., T_1, T_2) of mass 1."""
        a, b = uniform_mass(x_mask), uniform_mass(y_mask)
        if self.plan == "uniform":
            return a.unsqueeze(-1) * b.unsqueeze(-2)
        if self.plan == "banded":
            lag = step_times(x_mask).unsqueeze(-1) - step_times(y_mask).unsqueeze(-2)
            cost = (lag / self.band).square() / 2
            return sinkhorn(cost, a, b, epsilon=1.0, iterations=ITERATIONS).plan
        cost = cosine_cost(x.detach(), y.detach())
        return sinkhorn(cost, a, b, epsilon=EPSILON, iterations=ITERATIONS, kernel="exponential").plan


def _diagonal(masks: Sequence[Tensor]) -> list[Tensor]:
    """Couplings (..., T_1, T_m) of steps i with i, the same mass on all that every mask has."""
    length = min(mask.shape[-1] for mask in masks)
    shared = masks[0][..., :length]
    for mask in masks[1:]:
        shared = shared * mask[..., :length]
    diagonal = torch.diag_embed(uniform_mass(shared))  # (..., length, length)
    nothing = (shared.sum(-1) == 0).to(shared)[..., None, None]
    plans = []
    for mask in masks[1:]:
        rows, columns = masks[0].shape[-1] - length, mask.shape[-1] - length
        independent = uniform_mass(masks[0]).unsqueeze(-1) * uniform_mass(mask).unsqueeze(-2)
        plans.append(F.pad(diagonal, (0, columns, 0, rows)) + nothing * independent)
    return plans


def _given_the_row(plan: Tensor) -> Tensor:
    """(..., n, m) -> the same with rows of sum 1, or 0 where a row has no mass."""
    return plan / plan.sum(-1, keepdim=True).clamp_min(1e-12)


def coupling_range(scores: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Least and largest sum_ij P_ij scores_ij over all couplings P of masses a (n,) and b (m,), scores (n, m).

    Exact: the sum is linear in P, so these are two linear programmes. What a prediction could be, whatever the plan.
    """
    if abs(a.sum() - b.sum()) > 1e-6:
        raise ValueError(f"masses of sums {a.sum():g} and {b.sum():g} have no coupling")
    n, m = scores.shape
    rows, columns = kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m), format="csr")
    constraints = {"A_eq": vstack([rows, columns[:-1]]), "b_eq": np.concatenate([a, b[:-1]]), "method": "highs"}
    least, largest = (linprog(sign * scores.ravel(), **constraints) for sign in (1, -1))
    if least.status or largest.status:
        raise ValueError(f"no coupling found: {least.message} {largest.message}")
    return float(least.fun), float(-largest.fun)


class TemporalFusion(nn.Module):
    """One member: every token through the jWAE's encoder of its modality, then `TemporalLMF` over the latents.

    The prior, and the decoders, are those of a jWAE whose examples are single tokens, one drawn from each sequence.

    Args:
        input_dims: width d_m of each modality; the hub is the first by name.
        latent_dim, hidden_dim: of the encoders, as `FusionModel`.
        rank, output_dim, active_rank: of the layer.
        plan, band: as `TemporalLMF`.
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        latent_dim: int = 32,
        hidden_dim: int = 128,
        rank: int = 4,
        output_dim: int = 1,
        plan: Plan = "transport",
        band: float = 0.1,
        active_rank: int | None = None,
    ) -> None:
        super().__init__()
        input_dims = dict(sorted(input_dims.items()))
        self.modalities = tuple(input_dims)
        self.standardise = nn.ModuleDict({name: Standardise(dim) for name, dim in input_dims.items()})
        self.jwae = JWAE(input_dims, latent_dim, hidden_dim)
        widths = [latent_dim] * len(input_dims)
        self.fusion = TemporalLMF(widths, output_dim, rank, active_rank=active_rank, plan=plan, band=band)
        self.rescale = Rescale(output_dim)

    @property
    def uniforms(self) -> int:
        """How many uniform numbers `forward` takes for each example."""
        return len(self.modalities)

    def latents(
        self, features: Mapping[str, Tokens], present: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Latents (B, T_m, L) of every token and their masks (B, T_m), in the order of `modalities`."""
        seen = hide(features, present)
        encoded = self.jwae.encode({name: self.standardise[name](seen[name].values) for name in self.modalities})
        return [encoded[name] for name in self.modalities], [seen[name].mask for name in self.modalities]

    def forward(
        self,
        features: Mapping[str, Tokens],
        present: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        uniforms: Tensor | None = None,
    ) -> TokenOutput:
        """Prediction (B, O) of raw tokens (B, T_m, d_m); what finite numbers stand at padding never matters.

        `present` (B,) hides a modality where it is 0; `kept` (B, d_m) multiplies the standardised tokens that the
        encoders see. With `uniforms` (B, M), one token of each example comes back with its latent and reconstruction.
        """
        seen = hide(features, present)
        standardised = {name: self.standardise[name](features[name].values) for name in self.modalities}
        inputs = {name: x * kept[name].unsqueeze(-2) if kept else x for name, x in standardised.items()}
        encoded = self.jwae.encode(inputs)
        masks = {name: seen[name].mask for name in self.modalities}
        prediction = self.rescale(self.fusion(list(encoded.values()), list(masks.values())))
        layers = [{name: Tokens(x, masks[name]) for name, x in encoded.items()}]
        if uniforms is None:
            return TokenOutput(prediction, layers)
        whole = {name: features[name].mask for name in self.modalities}
        latents = draw_tokens(encoded, whole, uniforms)
        own = draw_tokens(standardised, whole, uniforms)
        return TokenOutput(prediction, layers, latents, own, self.jwae.decode(latents))
