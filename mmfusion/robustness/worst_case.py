"""Worst-case scores of a model: certified lower bounds, attacks as upper bounds, checks of an attack.

Sizes are relative: an l_p change of size rho has the l_p norm rho |s|_p of rho times the vector s of standard
deviations in training (of standardised features: s = 1 in each of the d coordinates, constant ones too, so rho sqrt(d)
in l_2 and rho in l_inf). Gaussian noise of level rho has that l_2 size too, so curves of noise and of attacks share an
axis.

Scores are per example and larger is better: 1 where the class (of two: the sign of the logit) is right whatever the
change, else 0, which rests on the margins of the true class over every other; of several labels the share that is
right, each label under the change that is worst for it; for a regression minus the worst absolute error in standard
deviations of the target, mean over outputs (the certificate lets every output have a change of its own, the attack has
one for all).
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from lmf_module import LowRankMultimodalFusion
from mmfusion.dataset import Task
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.attacks import Attack, pgd, random_change
from mmfusion.robustness.certificates import (
    FeaturePath,
    Norm,
    certified_change,
    class_contrasts,
    dual,
    feature_path,
    joint_radius,
)

Features = Mapping[str, Tensor]
SIZES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""rho of certificates and attacks"""
STEPS, RESTARTS = 20, 3
"""of an attack; `attack_checks` tells whether more would find more"""
AT_ONCE = 2**22
"""numbers (examples x margins x hidden units) in each of some twenty tensors of a bound through an encoder"""
NAMES: dict[Norm, str] = {1: "l1", 2: "l2", math.inf: "linf"}


@dataclass(frozen=True)
class Criterion:
    """What n predictions are judged by.

    J margins per example: one, or one of each label; K contrasts, sums of outputs that decide them.
    """

    target: Tensor
    """(n, O) of 0 and 1, or values; multiclass: (n, 1) class numbers"""
    task: Task
    scale: Tensor
    """(O,) standard deviation of a regression's target, else 1"""

    def contrasts(self, output: Tensor) -> Tensor:
        """Weights (n, K, O) of outputs (n, O), whose sums are above 0 where a label, or class against class, is right.

        Of labels their signs, K = O; of classes the margins of the true one, K = C - 1; of a regression its outputs.
        """
        if self.task == "multiclass":
            return class_contrasts(self.target.long().squeeze(-1), output.shape[-1]).to(output)
        return torch.diag_embed(torch.ones_like(output) if self.task == "regression" else self._signs(output))

    def margin(self, output: Tensor) -> Tensor:
        """(n, O) outputs -> (n, J): what an attacker makes as small as possible, each by itself; > 0 where right."""
        if self.task == "regression":
            return -((output - self.target).abs() / self.scale).mean(-1, keepdim=True)
        if self.task == "multiclass":
            true = self.target.long()  # (n, 1)
            others = output.scatter(-1, true, -math.inf)
            return output.gather(-1, true) - others.amax(-1, keepdim=True)
        return self._signs(output) * output

    def score(self, margin: Tensor) -> Tensor:
        """(n,): of those margins (n, J)."""
        return (margin if self.task == "regression" else (margin > 0).to(margin.dtype)).mean(-1)

    def weakest(self, sums: Tensor) -> Tensor:
        """What `contrasts` gives (n, K) -> margins (n, J) of classes or labels: a class must beat every other."""
        return sums.amin(-1, keepdim=True) if self.task == "multiclass" else sums

    def certified_margin(self, output: Tensor, rise: Callable[[Tensor], Tensor]) -> Tensor:
        """Lower bound (n, J) on the margins, from rise(weights (n, K, O)) -> (n, K) >= weights . (y' - y)."""
        weights = self.contrasts(output)
        if self.task != "regression":
            return self.weakest((weights @ output.unsqueeze(-1)).squeeze(-1) - rise(-weights))
        error = output - self.target
        worst = torch.maximum(error + rise(weights), rise(-weights) - error)
        return -(worst / self.scale).mean(-1, keepdim=True)

    def _signs(self, output: Tensor) -> Tensor:
        return (2 * self.target - 1).to(output)


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
        gradient = model.fusion.modality_gradient(latents, m) * model.rescale.std.unsqueeze(-1)  # (n, O, L)
        gradient = criterion.contrasts(output) @ gradient  # (n, K, O) (n, O, L) -> (n, K, L)
        steepest = torch.linalg.vector_norm(gradient, ord=dual(norm), dim=-1)
        epsilons = [rho * change_size(stds[name], norm) for rho in sizes]
        scores[name] = torch.stack(
            [criterion.score(criterion.certified_margin(output, lambda _, e=e, g=steepest: e * g)) for e in epsilons]
        )
    return scores


@torch.no_grad()
def joint_scores(
    model: FusionModel, features: Features, criterion: Criterion, stds: Mapping[str, Tensor], sizes=SIZES
) -> dict[str, Tensor]:
    """{pair: (len(sizes), n)}: certified scores when two latents move, each by that l_2 size; of classes or labels."""
    latents, output = _latents(model, features)
    contrasts = criterion.contrasts(output)
    right = (contrasts @ output.unsqueeze(-1)).squeeze(-1) > 0  # (n, K)
    scores = {}
    for m, first in enumerate(model.modalities):
        for n, second in enumerate(model.modalities[m + 1 :], m + 1):
            radius = joint_radius(model.fusion, latents, m, n, contrasts)
            radius = criterion.weakest(torch.where(right, radius, 0.0))  # (n, J)
            # one epsilon for both: the larger of the two sizes
            size = max(change_size(stds[first], 2), change_size(stds[second], 2))
            scores[f"{first} + {second}"] = torch.stack([criterion.score(radius - rho * size) for rho in sizes])
    return scores


@torch.no_grad()
def feature_certificates(
    model: FusionModel, features: Features, criterion: Criterion, name: str, norm: Norm, sizes=SIZES
):
    """(len(sizes), n): certified scores of an LMF model when the standardised features of a modality move."""
    path = feature_path(model, features, name)
    size = change_size(torch.ones(path.weight.shape[1]), norm)

    def margin(epsilon: float) -> Tensor:
        def rise(weights: Tensor) -> Tensor:
            at_once = max(1, AT_ONCE // (weights.shape[1] * path.weight.shape[0]))  # a hundred classes have 99 margins
            chunks = []
            for rows in torch.arange(len(weights)).split(at_once):
                sums = path.take(rows).contrast(weights[rows])
                chunks.append(certified_change(sums, torch.ones_like(sums.output), epsilon, norm))
            return torch.cat(chunks)

        return criterion.certified_margin(path.output, rise)

    return torch.stack([criterion.score(margin(rho * size)) for rho in sizes])


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

    All sizes, ascending, are attacked at once; a change that is found at one is allowed at every larger one, so the
    curve falls.
    """
    count, copies = len(features[name]), len(sizes)
    outputs = outputs_under_change(model, {key: x.repeat(copies, 1) for key, x in features.items()}, name)
    like = torch.zeros_like(features[name]).repeat(copies, 1)
    size = change_size(torch.ones(like.shape[1]), norm)
    epsilon = (size * torch.tensor(sizes)).to(like).repeat_interleave(count)

    def margin(change: Tensor) -> Tensor:
        return torch.cat([criterion.margin(part) for part in outputs(change).split(count)])

    found = _values(_attack_each(margin, like, epsilon, norm, steps=steps, restarts=restarts))
    clean = margin(like)[:count].detach()
    worst = torch.cat([clean[None], found.unflatten(0, (copies, count))]).cummin(0).values[1:]
    return torch.stack([criterion.score(of_size) for of_size in worst])


def _attack_each(
    margin: Callable[[Tensor], Tensor], like: Tensor, epsilon: float | Tensor, norm: Norm, **effort: int
) -> list[Attack]:
    """PGD on every one of J margins by itself, from margin(change) -> (n, J)."""
    with torch.no_grad():
        count = margin(like).shape[1]
    return [pgd(lambda c, j=j: margin(c)[:, j], like, epsilon, norm, **effort) for j in range(count)]


def _values(attacks: list[Attack]) -> Tensor:
    return torch.stack([attack.value for attack in attacks], -1)  # (n, J)


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
        attacks = _attack_each(margin, like, size, norm, steps=(2 * effort - 1) * STEPS, restarts=effort * RESTARTS)
        return float(criterion.score(_values(attacks)).mean())

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
        theirs = outputs_under_change(other, features, name)
        attacks = _attack_each(lambda c: criterion.margin(theirs(c)), like, epsilon, norm, steps=STEPS)
        with torch.no_grad():
            margins = torch.stack([margin(attack.change)[:, j] for j, attack in enumerate(attacks)], -1)
            moved = float(criterion.score(margins).mean())
        text = f"attack on another seed, transferred: {moved:.3f}, own attack {attacked:.3f}"
        checks.append(Check(text, moved >= attacked))
    start = torch.zeros_like(like, requires_grad=True)
    flat = torch.zeros(len(like), dtype=torch.bool, device=like.device)
    for values in margin(start).unbind(-1):
        (gradient,) = torch.autograd.grad(values.sum(), start, retain_graph=True)
        flat |= gradient.flatten(1).norm(dim=1) == 0
    zero = int(flat.sum())
    checks.append(Check(f"examples whose gradient is zero: {zero} of {len(like)}", zero == 0))
    return checks


def _far_check(criterion: Criterion, epsilon: float, attacked: float, attacked_at: Callable[[float], float]) -> Check:
    """A large enough change must bring every sign down, or a regression far from its target."""
    if criterion.task == "regression":
        far = attacked_at(16 * epsilon)
        return Check(f"16 times this size: score {attacked:.3f} -> {far:.3f}", far < attacked)
    factor, left = 1, attacked
    while left > 0 and factor < 10_000:
        factor *= 2
        left = attacked_at(factor * epsilon)
    return Check(f"every example falls at {factor} times this size (left: {left:.3f})", left == 0)


def latent_attack_gap(
    model: FusionModel, features: Features, criterion: Criterion, name: str, norm: Norm, rho: float = 0.2
) -> float:
    """Largest relative difference between PGD on a latent and the closed form, over examples and contrasts.

    |drop by PGD - eps ||g||_q| / (eps ||g||_q), the drop of |w_k . y| of each contrast by itself; should be rounding.
    """
    with torch.no_grad():
        latents, _ = _latents(model, features)
        m = model.modalities.index(name)
        latents = [z.double() for z in latents]
        layer = _double(model.fusion)
        weights = criterion.contrasts(layer(latents))  # (n, K, O)
        y = (weights @ layer(latents).unsqueeze(-1)).squeeze(-1)  # (n, K)
        gradient = weights @ layer.modality_gradient(latents, m)  # (n, K, O) (n, O, L) -> (n, K, L)
        steepest = torch.linalg.vector_norm(gradient, ord=dual(norm), dim=-1)
        epsilon = rho * change_size(latents[m].std(0), norm)

    def margins(change: Tensor) -> Tensor:
        moved = [z + change if k == m else z for k, z in enumerate(latents)]
        return y.sign() * (weights @ layer(moved).unsqueeze(-1)).squeeze(-1)

    attacks = _attack_each(margins, torch.zeros_like(latents[m]), epsilon, norm, steps=STEPS, restarts=RESTARTS)
    drop, exact = y.abs() - _values(attacks), epsilon * steepest
    return float(((drop - exact).abs() / exact.clamp_min(1e-12)).max())


def _double(layer: LowRankMultimodalFusion) -> LowRankMultimodalFusion:
    return deepcopy(layer).double()


def _latents(model: FusionModel, features: Features) -> tuple[list[Tensor], Tensor]:
    latents = model.latents(features)
    return latents, model.rescale(model.fusion(latents))


@torch.no_grad()
def latent_stds(model: FusionModel, features: Features) -> dict[str, Tensor]:
    """{modality: (L,)}: standard deviation of each latent on these (training) features."""
    return {name: z.std(0) for name, z in model.encode(features).items()}
