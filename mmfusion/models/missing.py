"""Predictions where a modality is missing: its latent is integrated out, in closed form.

    y = b + sum_r w_r prod_m f_mr,    f_mr = A_m[r] z_m + c_m[r]

is affine in each latent. Where the missing latents are independent of each other and of what is given, with mean mu_m
and covariance C_m,

    E[y]   = y with every missing z_m replaced by mu_m
    Var[y] = sum_rs w_r w_s (prod_m E[f_mr f_ms] - prod_m E[f_mr] E[f_ms]),
    E[f_mr f_ms] = E[f_mr] E[f_ms] + a_mr^T C_m a_ms    of a missing modality, f_mr f_ms of a given one

exactly, whatever the latents' distribution. With one modality missing that is g^T C g, g = dy/dz_m.

Of classes it is the *logit* that is integrated exactly. A probability is no linear function of it: the probability of
the expected logit is not the expected probability, which is found by quadrature, by going through the training
latents, or by draws with a stated standard error (`expected_probability`).

N examples, M modalities, L width of a latent, R ranks, O outputs, S members.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmf_module import LowRankMultimodalFusion, Moments
from mmfusion.dataset import Task
from mmfusion.losses.expected import moderated_logits
from mmfusion.metrics.tasks import probabilities
from mmfusion.models.exact import Member, exact_layer, latents_of, noise_of

Missing = Literal["error", "prior", "training"]
"""what is done where a modality is missing: refuse; integrate over the prior N(0, I); over the training latents"""
DRAWS = 4096
NODES = 64  # of Gauss-Hermite: errs by less than 1e-6 up to a logit's standard deviation of 5
MOST_VALUES = 4_000_000  # logits, or products of two ranks, held at once


class LatentDistribution(NamedTuple):
    """Of one missing latent, independent of everything else."""

    mean: Tensor
    """(L,)"""
    covariance: Tensor
    """(L, L)"""
    sample: Tensor | None = None
    """(n, L) values that it takes with equal probability; None: it is Gaussian"""


class MissingPrediction(NamedTuple):
    """What members say where modalities are missing; torch (S, N, ...), or the members' summary in numpy (N, ...)."""

    prediction: Tensor | np.ndarray
    """(S, N) or (S, N, O) as `FusionEnsemble.predict`: the expected probability, or a regression's expected value"""
    output: Tensor | np.ndarray
    """(S, N, O) expected logits or values, exact"""
    std: Tensor | np.ndarray
    """(S, N, O) exact standard deviation of the logits or values over the missing latents; 0 where none is missing"""
    error: Tensor | np.ndarray
    """shape of `prediction`: its standard error, 0 where no draw was needed"""

    def over_members(self) -> "MissingPrediction":
        """Means over members (N, ...) in numpy; of `std` the root mean square, of `error` that of the mean."""
        prediction, output, std, error = (x.double().cpu().numpy() for x in self)
        return MissingPrediction(
            prediction.mean(0),
            output.mean(0),
            np.sqrt(np.square(std).mean(0)),
            np.sqrt(np.square(error).sum(0)) / len(error),
        )


def standard_normal(width: int) -> LatentDistribution:
    """The prior N(0, I) of a latent of that width."""
    return LatentDistribution(torch.zeros(width).double(), torch.eye(width).double())


def empirical(latents: Tensor) -> LatentDistribution:
    """That of training latents (n, L), each with probability 1/n. Raises ValueError for none."""
    if not len(latents):
        raise ValueError(f"latents {tuple(latents.shape)} hold no example")
    latents = latents.double()
    centred = latents - latents.mean(0)
    return LatentDistribution(latents.mean(0), centred.T @ centred / len(latents), latents)


def with_noise(known: LatentDistribution, variances: Tensor) -> LatentDistribution:
    """The same with independent noise (L,) on top, of which no draws are known."""
    return LatentDistribution(known.mean, known.covariance + torch.diag(variances))


def missing_rows(features: Mapping[str, Tensor], widths: Mapping[str, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Features of every modality without NaN, and which are missing, bool (N, M) in the order of `widths`.

    A modality is missing where its key is absent, or its row is NaN throughout; such rows come back as 0.

    Raises ValueError naming the modality: no modality at all, a row that is NaN in part.
    """
    given = {name: features[name] for name in widths if name in features}
    if not given:
        raise ValueError(
            f"features: every one of {', '.join(widths)} is absent; how many examples there are is unknown"
        )
    first = next(iter(given.values()))
    whole, missing = {}, []
    for name, width in widths.items():
        x = given.get(name, first.new_full((len(first), width), torch.nan))
        nan = x.isnan()
        gone = nan.all(-1)  # (N,)
        in_part = (nan.any(-1) & ~gone).nonzero().flatten().tolist()
        if in_part:
            raise ValueError(f"features {name!r}: row {in_part[0]} is NaN in part; a missing row is NaN throughout")
        whole[name] = x.masked_fill(gone.unsqueeze(-1), 0.0)
        missing.append(gone)
    lengths = {name: len(x) for name, x in whole.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"modalities have different numbers of examples: {lengths}")
    return whole, torch.stack(missing, -1)


@torch.no_grad()
def integrated_moments(
    layer: LowRankMultimodalFusion,
    latents: Sequence[Tensor],
    missing: Tensor,
    distributions: Sequence[LatentDistribution],
    variances: Sequence[Tensor] | None = None,
) -> Moments:
    """Mean (N, O) and covariance (N, O, O) of a layer's output over the missing latents, exact (module docstring).

    Args:
        layer: in float64.
        latents: M tensors (N, L); rows that are missing may hold anything finite.
        missing: bool (N, M).
        distributions: M, of every latent.
        variances: M tensors (L,) of the noise of latents that are given; default 0.
    """
    outputs = layer.output_dim
    mean = torch.empty(len(missing), outputs, dtype=layer.bias.dtype)
    covariance = torch.empty(len(missing), outputs, outputs, dtype=layer.bias.dtype)
    size = max(1, MOST_VALUES // (layer.rank * outputs) ** 2)
    for pattern in missing.unique(dim=0):
        gone = pattern.nonzero().flatten().tolist()
        turned, centres, spreads = deepcopy(layer), {}, {}
        for m in gone:  # coordinates in which the missing latent is uncorrelated
            spreads[m], axes = torch.linalg.eigh(distributions[m].covariance)
            centres[m] = axes.T @ distributions[m].mean
            turned.projections[m].weight.copy_(layer.projections[m].weight @ axes)
        for rows in (missing == pattern).all(1).nonzero().flatten().split(size):
            means = [centres[m].expand(len(rows), -1) if m in gone else z[rows] for m, z in enumerate(latents)]
            spread = [
                spreads[m].clamp_min(0)
                if m in gone
                else (torch.zeros_like(z[0]) if variances is None else variances[m])
                for m, z in enumerate(latents)
            ]
            mean[rows], covariance[rows] = turned.moments(means, spread)
    return Moments(mean, covariance)


@torch.no_grad()
def expected_probability(
    layer: LowRankMultimodalFusion,
    latents: Sequence[Tensor],
    missing: Tensor,
    distributions: Sequence[LatentDistribution],
    task: Task,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Expected probabilities over the missing latents, (N,) or (N, O), and their standard errors.

    - One Gaussian latent missing, sigmoids: each logit is Gaussian, Gauss-Hermite quadrature with 64 nodes; error 0.
    - One latent missing whose values are known, at most `DRAWS` of them: the mean over all; error 0.
    - Else: the mean over `DRAWS` draws of the missing latents, with its standard error.

    Args as for `integrated_moments`; `task` is no regression, `seed` that of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, covariance = integrated_moments(layer, latents, missing, distributions)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    result = probabilities(mean, task)  # right where nothing is missing
    error = torch.zeros_like(result)
    for pattern in missing.unique(dim=0):
        gone = pattern.nonzero().flatten().tolist()
        rows = (missing == pattern).all(1).nonzero().flatten()
        if not gone:
            continue
        if len(gone) == 1 and distributions[gone[0]].sample is None and task != "multiclass":
            nodes, node_weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(NODES))
            logits = mean[rows, None] + nodes[:, None] * variance[rows, None].sqrt()  # (n, nodes, O)
            p = logits.sigmoid() * (node_weights / node_weights.sum())[:, None]
            p = p.sum(1)
            result[rows] = p.squeeze(-1) if task == "binary" else p
            continue
        known = distributions[gone[0]].sample if len(gone) == 1 else None
        complete = known is not None and len(known) <= DRAWS
        product = _weights(layer)  # (draws, R, O) of the missing
        for m in gone:
            z = known if complete else _draw(distributions[m], generator)
            product = product * _factor(layer, m, z)
        size = max(1, MOST_VALUES // (len(product) * layer.output_dim))
        for chunk in rows.split(size):
            given = torch.ones(len(chunk), layer.rank, layer.output_dim).double()
            for m, z in enumerate(latents):
                if m not in gone:
                    given = given * _factor(layer, m, z[chunk])
            logits = torch.einsum("nro,dro->ndo", given, product) + layer.bias  # (n, draws, O)
            p = probabilities(logits, task)  # (n, draws) or (n, draws, O)
            result[chunk] = p.mean(1)
            if not complete:
                error[chunk] = p.std(1) / len(product) ** 0.5
    return result, error


@torch.no_grad()
def predict_missing(
    members: Sequence[Member],
    features: Mapping[str, Tensor],
    missing: Tensor,
    task: Task,
    train: Mapping[str, Tensor] | None = None,
) -> MissingPrediction:
    """What every member says of raw features (N, d_m) of which modalities are missing, bool (N, M).

    The missing latents follow the prior, or, with the raw features `train` (n, d_m), each member's training latents,
    every missing modality's independently of all others. Raises ValueError where a head is not LMF.
    """
    parts: list[list[Tensor]] = [[], [], [], []]
    for seed, member in enumerate(members):
        layer = exact_layer(member)
        latents = [z.cpu() for z in latents_of(member, features)]
        noise = [v.cpu() for v in noise_of(member)]
        if train is None:
            distributions = [standard_normal(z.shape[-1]) for z in latents]
        else:
            distributions = [empirical(z.cpu()) for z in latents_of(member, train)]
            if noise:
                distributions = [with_noise(known, v) for known, v in zip(distributions, noise, strict=True)]
        mean, covariance = integrated_moments(layer, latents, missing.cpu(), distributions, noise or None)
        if task == "regression" or noise:
            p = probabilities(moderated_logits(mean, covariance, task), task)
            error = torch.zeros_like(p)
        else:
            p, error = expected_probability(layer, latents, missing.cpu(), distributions, task, seed)
        std = covariance.diagonal(dim1=-2, dim2=-1)
        if noise:  # what the missing latents add to what there is anyway
            whole = integrated_moments(layer, latents, torch.zeros_like(missing.cpu()), distributions, noise)
            std = std - whole.covariance.diagonal(dim1=-2, dim2=-1)
        for part, value in zip(parts, (p, mean, std.clamp_min(0).sqrt(), error), strict=True):
            part.append(value)
    return MissingPrediction(*(torch.stack(part) for part in parts))


def _factor(layer: LowRankMultimodalFusion, m: int, z: Tensor) -> Tensor:
    """f_mr (n, R, O) of latents (n, L)."""
    return layer.projections[m](z).unflatten(-1, (layer.rank, -1)).expand(-1, layer.rank, layer.output_dim)


def _weights(layer: LowRankMultimodalFusion) -> Tensor:
    """(R, O)."""
    weights = layer.rank_weights if layer.shared_factors else layer.rank_weights[:, None]
    return weights.expand(layer.rank, layer.output_dim)


def _draw(distribution: LatentDistribution, generator: torch.Generator) -> Tensor:
    """(DRAWS, L)."""
    if distribution.sample is not None:
        return distribution.sample[torch.randint(len(distribution.sample), (DRAWS,), generator=generator)]
    noise = torch.randn(DRAWS, len(distribution.mean), generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(distribution.covariance)
    return distribution.mean + noise * values.clamp_min(0).sqrt() @ vectors.T
