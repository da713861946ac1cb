"""Worst-case scores of a model: certified lower bounds, attacks as upper bounds, checks of an attack.

Sizes are relative: an l_p change of size rho has the l_p norm rho |s|_p of rho times the vector s of standard
deviations in training (of standardised features: s = 1 in each of the d coordinates, constant ones too, so rho sqrt(d)
in l_2 and rho in l_inf). Gaussian noise of level rho has that l_2 size too, so curves of noise and of attacks share an
axis.

Scores are per example and larger is better: 1 where the sign of the logit is right whatever the change, else 0; for a
regression minus the worst absolute error in standard deviations of the target, mean over outputs (the certificate lets
every output have a change of its own, the attack has one for all).
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from lmf_module import LowRankMultimodalFusion
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.attacks import pgd, random_change
from mmfusion.robustness.certificates import FeaturePath, Norm, certified_change, dual, feature_path, joint_radius

Features = Mapping[str, Tensor]
SIZES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""rho of certificates and attacks"""
STEPS, RESTARTS = 20, 3
"""of an attack; `attack_checks` tells whether more would find more"""
NAMES: dict[Norm, str] = {1: "l1", 2: "l2", math.inf: "linf"}


@dataclass(frozen=True)
class Criterion:
    """What n predictions are judged by."""

    target: Tensor
    """(n, O)"""
    binary: bool
    scale: Tensor
    """(O,) standard deviation of a regression's target, else 1"""

    def margin(self, output: Tensor) -> Tensor:
        """(n, O) outputs -> (n,): what an attacker makes as small as possible; above 0 where a sign is right."""
        if self.binary:
            return ((2 * self.target - 1) * output).squeeze(-1)
        return -((output - self.target).abs() / self.scale).mean(-1)

    def score(self, margin: Tensor) -> Tensor:
        """(n,): of that margin."""
        return (margin > 0).to(margin.dtype) if self.binary else margin

    def certified_margin(self, output: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Lower bound (n,) on the margin, from change(direction (n, O)) -> (n, O) >= direction * (y' - y)."""
        if self.binary:
            sign = 2 * self.target - 1
            return (sign * output - change(-sign)).squeeze(-1)
        error, one = output - self.target, torch.ones_like(output)
        worst = torch.maximum(error + change(one), change(-one) - error)
        return -(worst / self.scale).mean(-1)


def change_size(std: Tensor, norm: Norm) -> float:
    """|s|_p of standard deviations s (d,): the size 1 of a change."""
    return float(torch.linalg.vector_norm(std, ord=norm))


@torch.no_grad()
def latent_scores(
    model: FusionModel, features: Features, criterion: Criterion, stds: Mapping[str, Tensor], norm: Norm, sizes=SIZES
) -> dict[str, Tensor]:
    """{modality: (len(sizes), n)}: exact worst-case scores of an LMF model when that latent moves."""
    latents, output = _latents(model, features)
    scores = {}
    for m, name in enumerate(model.modalities):
        gradient = model.fusion.modality_gradient(latents, m)  # (n, O, L)
        steepest = torch.linalg.vector_norm(gradient, ord=dual(norm), dim=-1) * model.rescale.std
        epsilons = [rho * change_size(stds[name], norm) for rho in sizes]
        scores[name] = torch.stack(
            [criterion.score(criterion.certified_margin(output, lambda _, e=e, g=steepest: e * g)) for e in epsilons]
        )
    return scores


@torch.no_grad()
def joint_scores(
    model: FusionModel, features: Features, criterion: Criterion, stds: Mapping[str, Tensor], sizes=SIZES
) -> dict[str, Tensor]:
    """{pair: (len(sizes), n)}: certified scores when two latents move, each by that l_2 size; for one logit."""
    latents, output = _latents(model, features)
    correct = criterion.margin(output) > 0
    scores = {}
    for m, first in enumerate(model.modalities):
        for n, second in enumerate(model.modalities[m + 1 :], m + 1):
            radius = joint_radius(model.fusion, latents, m, n).squeeze(-1)
            # one epsilon for both: the larger of the two sizes
            size = max(change_size(stds[first], 2), change_size(stds[second], 2))
            scores[f"{first} + {second}"] = torch.stack([(correct & (radius > rho * size)).float() for rho in sizes])
    return scores


@torch.no_grad()
def feature_certificates(
    model: FusionModel, features: Features, criterion: Criterion, name: str, norm: Norm, sizes=SIZES
):
    """(len(sizes), n): certified scores of an LMF model when the standardised features of a modality move."""
    path = feature_path(model, features, name)
    size = change_size(torch.ones(path.weight.shape[1]), norm)
    return torch.stack(
        [
            criterion.score(
                criterion.certified_margin(path.output, lambda d, rho=rho: certified_change(path, d, rho * size, norm))
            )
            for rho in sizes
        ]
    )


def outputs_under_change(model: FusionModel, features: Features, name: str) -> FeaturePath | Callable[[Tensor], Tensor]:
    """change (n, d) of one modality's standardised features -> outputs (n, O); for any head."""
    if isinstance(model.fusion, LowRankMultimodalFusion):
        return feature_path(model, features, name)
    with torch.no_grad():
        latents = model.encode(features)
        x = model.standardise[name](features[name])

    def outputs(change: Tensor) -> Tensor:
        moved = latents | {name: model.jwae.encoders[name](x + change)}
        return model.rescale(model.fusion([moved[key] for key in model.modalities]))

    return outputs


def attacked_scores(
    model: FusionModel,
    features: Features,
    criterion: Criterion,
    name: str,
    norm: Norm,
    sizes=SIZES,
    *,
    steps: int = STEPS,
    restarts: int = RESTARTS,
) -> Tensor:
    """(len(sizes), n): scores under PGD on the standardised features of one modality.

    A change that is found at one size is allowed at every larger one, so the curve falls.
    """
    outputs = outputs_under_change(model, features, name)
    like = torch.zeros_like(features[name])
    size = change_size(torch.ones(like.shape[1]), norm)
    worst, scores = criterion.margin(outputs(like)).detach(), []
    for rho in sizes:
        attack = pgd(lambda c: criterion.margin(outputs(c)), like, rho * size, norm, steps=steps, restarts=restarts)
        worst = torch.minimum(worst, attack.value)
        scores.append(criterion.score(worst))
    return torch.stack(scores)


@torch.no_grad()
def clean_scores(model: FusionModel, features: Features, criterion: Criterion) -> Tensor:
    """(n,): scores where nothing moves."""
    return criterion.score(criterion.margin(model(features, reconstruct=False).prediction))


# ---- checks (Carlini et al. 2019) --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that must hold of an attack that is to be believed."""

    text: str
    holds: bool


def attack_checks(
    model: FusionModel,
    other: FusionModel | None,
    features: Features,
    criterion: Criterion,
    name: str,
    norm: Norm,
    rho: float,
) -> list[Check]:
    """The checks on one model, any head, and one modality; `other` is a model of another seed, if there is one."""
    outputs = outputs_under_change(model, features, name)
    like = torch.zeros_like(features[name])
    epsilon = rho * change_size(torch.ones(like.shape[1]), norm)

    def margin(change: Tensor) -> Tensor:
        return criterion.margin(outputs(change))

    def attacked_at(size: float, effort: int = 1) -> float:
        attack = pgd(margin, like, size, norm, steps=(2 * effort - 1) * STEPS, restarts=effort * RESTARTS)
        return float(criterion.score(attack.value).mean())

    attacked, stronger = attacked_at(epsilon), attacked_at(epsilon, effort=3)
    checks = [
        Check(
            f"five times the steps and three times the restarts: score {attacked:.3f} -> {stronger:.3f}",
            attacked - stronger <= 0.01,
        ),
        _far_check(criterion, epsilon, attacked, attacked_at),
    ]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        noise = torch.stack([margin(random_change(like, epsilon, norm, generator)) for _ in range(10)]).amin(0)
        noisy = float(criterion.score(noise).mean())
    checks.append(
        Check(f"random changes of this size, worst of 10: {noisy:.3f}, attack {attacked:.3f}", noisy >= attacked)
    )
    if other is not None:
        with torch.no_grad():
            moved = float(criterion.score(margin(_attack_of(other, features, criterion, name, epsilon, norm))).mean())
        text = f"attack on another seed, transferred: {moved:.3f}, own attack {attacked:.3f}"
        checks.append(Check(text, moved >= attacked))
    start = torch.zeros_like(like, requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(start).sum(), start)
    zero = int((gradient.flatten(1).norm(dim=1) == 0).sum())
    checks.append(Check(f"examples whose gradient is zero: {zero} of {len(like)}", zero == 0))
    return checks


def _far_check(criterion: Criterion, epsilon: float, attacked: float, attacked_at: Callable[[float], float]) -> Check:
    """A large enough change must bring every sign down, or a regression far from its target."""
    if not criterion.binary:
        far = attacked_at(16 * epsilon)
        return Check(f"16 times this size: score {attacked:.3f} -> {far:.3f}", far < attacked)
    factor, left = 1, attacked
    while left > 0 and factor < 10_000:
        factor *= 2
        left = attacked_at(factor * epsilon)
    return Check(f"every example falls at {factor} times this size (left: {left:.3f})", left == 0)


def _attack_of(
    model: FusionModel, features: Features, criterion: Criterion, name: str, epsilon: float, norm: Norm
) -> Tensor:
    outputs = outputs_under_change(model, features, name)
    with torch.enable_grad():
        return pgd(
            lambda c: criterion.margin(outputs(c)), torch.zeros_like(features[name]), epsilon, norm, steps=STEPS
        ).change


def latent_attack_gap(model: FusionModel, features: Features, name: str, norm: Norm, rho: float = 0.2) -> float:
    """Largest relative difference between PGD on a latent and the closed form, over examples and outputs.

    |drop by PGD - eps ||g||_q| / (eps ||g||_q), the drop of |y_o| of each output by itself; should be rounding.
    """
    with torch.no_grad():
        latents, _ = _latents(model, features)
        m = model.modalities.index(name)
        latents = [z.double() for z in latents]
        layer = _double(model.fusion)
        y = layer(latents)
        steepest = torch.linalg.vector_norm(layer.modality_gradient(latents, m), ord=dual(norm), dim=-1)
        epsilon = rho * change_size(latents[m].std(0), norm)
    worst = 0.0
    for o in range(y.shape[1]):

        def margin(change: Tensor, o: int = o) -> Tensor:
            moved = [z + change if k == m else z for k, z in enumerate(latents)]
            return y[:, o].sign() * layer(moved)[:, o]

        value = pgd(margin, torch.zeros_like(latents[m]), epsilon, norm, steps=STEPS, restarts=RESTARTS).value
        drop, exact = y[:, o].abs() - value, epsilon * steepest[:, o]
        worst = max(worst, float(((drop - exact).abs() / exact.clamp_min(1e-12)).max()))
    return worst


def _double(layer: LowRankMultimodalFusion) -> LowRankMultimodalFusion:
    return deepcopy(layer).double()


def _latents(model: FusionModel, features: Features) -> tuple[list[Tensor], Tensor]:
    latents = model.latents(features)
    return latents, model.rescale(model.fusion(latents))


@torch.no_grad()
def latent_stds(model: FusionModel, features: Features) -> dict[str, Tensor]:
    """{modality: (L,)}: standard deviation of each latent on these (training) features."""
    return {name: z.std(0) for name, z in model.encode(features).items()}
