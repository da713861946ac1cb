"""Exact decomposition of predictions: bias, modalities, sets of modalities, ranks.

    y = v_() + sum_S part_S            S over the sets of modalities, about the mean latents of train

is exact for every member, so its mean over members is the exact account of the members' mean logit. Rank terms belong
to one member (`mmfusion.explain.ranks`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit, logsumexp
from torch import Tensor

from lmf_module import LowRankMultimodalFusion
from mmfusion.dataset import Dataset, Task
from mmfusion.explain.ranks import RankAccount, largest_residual
from mmfusion.explain.saliency import Box, RegionMap
from mmfusion.models.decomposition import Subset, contrast_layer, recentred_parts
from mmfusion.models.exact import exact_layer, latents_of, noise_of
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.certificates import Norm, certified_class_radius, certified_radius, least_change


@dataclass(frozen=True)
class Account:
    """N predictions of S members, taken apart; in logits, or in units of a regression's target."""

    modalities: tuple[str, ...]
    prediction: np.ndarray
    """(S, N), of the models themselves"""
    parts: dict[str, np.ndarray]
    """(S, N) each: "bias", then "image alone", ..., "image x text": they sum to the prediction"""
    residual: float
    """the largest difference between a prediction and the sum of its parts"""
    slope: dict[str, np.ndarray]
    """(S, N) per modality: ||dy/dz_m||_2, what a change of the latent by 1 moves the prediction by at most"""
    radius: dict[str, np.ndarray]
    """(S, N) per modality: the least l_2 change of that latent alone that brings the prediction to 0"""
    latent_std: dict[str, np.ndarray]
    """(S,) per modality: root mean square, over its coordinates, of the latent's standard deviation on train"""
    pairs: np.ndarray | None = None
    """(N, 2) of a choice between more than two classes: the likeliest by the mean probability, and the runner-up, whose
    logits' difference, the margin, is what is accounted for"""
    variance: dict[str, np.ndarray] = field(default_factory=dict)
    """(S, N) of the prediction, by the set of modalities whose latents' noise it comes from, exactly; empty where
    latents are certain"""

    @property
    def std(self) -> np.ndarray:
        """(S, N) of the prediction, because of the latents' noise."""
        return np.sqrt(sum(self.variance.values(), np.zeros_like(self.prediction)))

    @property
    def moderated(self) -> np.ndarray:
        """(S, N) logits, or margins, of the expected probability (`mmfusion.losses.expected`): nearer 0, same sign."""
        return self.prediction / np.sqrt(1 + np.pi / 8 * np.square(self.std))

    def losses(self, target: np.ndarray, task: Task, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """(n,) loss of the mean over members of those rows (`ensemble_losses`)."""
        said = self.prediction if task == "regression" else self.moderated
        return ensemble_losses(said[:, rows], target, task)

    @property
    def seeds_disagree(self) -> np.ndarray:
        """(N,) of classes: True where the mean logit, or margin, speaks against what the mean probability decides for.

        A probability saturates and a logit does not: one far-off seed then outweighs all others in the account.
        """
        decides = expit(self.moderated).mean(0) >= 0.5 if self.pairs is None else True
        return (self.prediction.mean(0) >= 0) != decides


@dataclass(frozen=True)
class Maps:
    """Which regions and words feed one prediction (`saliency`)."""

    regions: RegionMap | None
    box: Box
    """part of the picture that the encoder sees, as fractions of it"""
    words: dict[str, list[tuple[str, float]]]
    """per modality that is encoded from text"""
    notes: list[str]
    """what could not be mapped, and why"""


@dataclass(frozen=True)
class Examples:
    """What N examples look like to a person."""

    ids: list[str]
    texts: dict[str, list[str]]
    """N texts per modality (or the transcript); empty where there are none"""
    targets: list[float | None]
    pictures: dict[str, Path]
    """file of each id; empty where there are no pictures"""

    def __len__(self) -> int:
        return len(self.ids)

    def text(self, row: int) -> str:
        """All texts of one example on one line."""
        return " / ".join(texts[row] for texts in self.texts.values() if texts[row].strip())


@dataclass(frozen=True)
class Explanation:
    """N explained examples, as they are printed, drawn and written to a page."""

    run: str
    row: str
    task: Task
    output: str
    """what is predicted: "logit", or a regression's target"""
    seeds: list[int]
    seed: int
    """whose rank terms `ranks` holds"""
    mapped: str
    """what the maps are of"""
    examples: Examples
    train: Examples
    account: Account
    ranks: RankAccount
    maps: list[Maps | None]
    class_names: tuple[str, ...] = Dataset.class_names
    chances: np.ndarray | None = None
    """(S, N, C) probabilities, with `pairs`"""
    notes: list[str] = field(default_factory=list)
    """what the reader of a score or a prediction must know of the data"""

    @property
    def pairs(self) -> np.ndarray | None:
        """Of the account."""
        return self.account.pairs

    @property
    def chooses(self) -> bool:
        """True of classes, False of values."""
        return self.task != "regression"

    def names(self, row: int) -> tuple[str, str]:
        """What a prediction below and above 0 says, in words."""
        if self.pairs is None:
            return self.class_names[0], self.class_names[1]
        likeliest, other = self.pairs[row]
        return self.class_names[other], self.class_names[likeliest]

    def probability(self, row: int) -> np.ndarray:
        """(S,) of label 1, or of the class that is likeliest by the mean over members; one per member."""
        if self.pairs is not None:
            return self.chances[:, row, self.pairs[row][0]]
        return expit(self.account.moderated[:, row])

    def says(self, row: int) -> int:
        """Number of the class that the mean probability decides for."""
        return int(self.pairs[row, 0]) if self.pairs is not None else int(self.probability(row).mean() >= 0.5)

    def loss(self, row: int) -> float | None:
        """Loss of the mean over members (`ensemble_losses`); None where the example is unlabelled."""
        target = self.examples.targets[row]
        if target is None:
            return None
        if self.pairs is not None:
            return float(-np.log(self.chances[:, row, int(target)].mean()))
        return float(self.account.losses(np.array([target]), self.task, [row])[0])

    def label(self, target: float | None) -> str:
        """A target in words: its class, or a regression's value; empty where there is none."""
        if target is None:
            return ""
        return self.class_names[int(target)] if self.chooses else f"{target:.2f}"


def ensemble_losses(prediction: np.ndarray, target: np.ndarray, task: Task) -> np.ndarray:
    """(N,) loss of the mean over members of predictions (S, N): -log of the mean probability, or squared error."""
    if task == "regression":
        return np.square(prediction.mean(0) - target)
    margin = prediction * (2 * target - 1)
    return -(logsumexp(-np.logaddexp(0, -margin), axis=0) - np.log(len(prediction)))  # no probability underflows


def subset_name(subset: Subset, modalities: Sequence[str]) -> str:
    """ "bias", "image alone", "image x text"."""
    if not subset:
        return "bias"
    return " x ".join(modalities[m] for m in subset) + (" alone" if len(subset) == 1 else "")


@torch.no_grad()
def account_for(
    members: Sequence[FusionModel],
    features: Mapping[str, Tensor],
    train: Mapping[str, Tensor],
    output: int | Tensor = 0,
) -> Account:
    """Take the predictions on raw features (N, d_m) apart, about the mean latents of raw train features (n, d_m).

    `output`: which one; or weights (N, O) of the outputs, for each example its own: a difference of two classes' logits
    comes apart as exactly as a logit does.

    Raises ArithmeticError where the parts of a prediction do not sum to it (within `TOLERANCE`), ValueError for an
    output that is not there.
    """
    modalities = members[0].modalities
    prediction, size, parts, slope, radius, latent_std, variance = [], [], {}, {}, {}, {}, {}
    weights = output
    if not isinstance(output, Tensor):
        outputs = len(members[0].rescale.std)
        if isinstance(output, bool) or output not in range(outputs):
            raise ValueError(f"output {output!r}: give a number from 0 to {outputs - 1}")
        weights = torch.eye(outputs)[int(output)]

    def chosen(values: Tensor) -> Tensor:  # (N, O) -> (N,)
        return (values * weights.double()).sum(-1)

    for member in members:
        layer, latents, reference = exact_layer(member), latents_of(member, features), latents_of(member, train)
        noise, whole = noise_of(member), chosen(layer(latents))
        said = member(features, reconstruct=False).prediction.double()
        prediction.append(chosen(said).numpy())
        size.append(said.abs().amax(-1).numpy())
        for subset, part in recentred_parts(layer, latents, [z.mean(0) for z in reference]).items():
            parts.setdefault(subset_name(subset, modalities), []).append(chosen(part).numpy())
        for m, name in enumerate(modalities):
            gradient = layer.modality_gradient(latents, m)  # (N, O, L)
            gradient = (gradient * weights.double().unsqueeze(-1)).sum(-2)  # (N, L)
            slope.setdefault(name, []).append(torch.linalg.vector_norm(gradient, dim=-1).numpy())
            radius.setdefault(name, []).append(least_change(whole, gradient, 2).numpy())
            latent_std.setdefault(name, []).append(
                (reference[m].var(0) + (noise[m] if noise else 0)).mean().sqrt().item()
            )
        for subset, part in _variance_terms(layer, latents, noise, weights).items():
            variance.setdefault(subset_name(subset, modalities), []).append(part.numpy())
    columns = {name: np.stack(values) for name, values in parts.items()}
    prediction = np.stack(prediction)
    residual = largest_residual(sum(columns.values()), prediction, np.stack(size))
    return Account(
        modalities,
        prediction,
        columns,
        residual,
        *({name: np.array(values) for name, values in part.items()} for part in (slope, radius, latent_std)),
        variance={name: np.stack(values) for name, values in variance.items()},
    )


def _variance_terms(
    layer: LowRankMultimodalFusion, latents: Sequence[Tensor], noise: Sequence[Tensor], weights: Tensor
) -> dict[Subset, Tensor]:
    """(N,) of the weighted sum of outputs by subset; `weights` (O,), or (N, O). Empty where latents are certain."""
    if not noise:
        return {}
    rows, place = weights.double().expand(len(latents[0]), -1).unique(dim=0, return_inverse=True)
    terms: dict[Subset, Tensor] = {}
    for k, contrast in enumerate(rows):
        here = (place == k).nonzero().flatten()
        made = contrast_layer(layer, contrast)
        for subset, part in made.variance_terms([z[here] for z in latents], noise).items():
            terms.setdefault(subset, part.new_empty(len(place)))[here] = part.squeeze(-1)
    return terms


def account_for_margins(
    members: Sequence[FusionModel], features: Mapping[str, Tensor], train: Mapping[str, Tensor], probabilities: Tensor
) -> Account:
    """`account_for` each example's margin: logit of the likeliest class by the mean probability less the runner-up's.

    `probabilities`: (N, C), the mean over members.
    """
    weights = margin_weights(probabilities)
    pairs = torch.stack([weights.argmax(-1), weights.argmin(-1)], -1).numpy()
    return replace(account_for(members, features, train, weights), pairs=pairs)


def margin_weights(probabilities: Tensor) -> Tensor:
    """(N, C) -> weights (N, C) of the logits: 1 of the likeliest class, -1 of the runner-up."""
    first, second = probabilities.topk(2, dim=-1).indices.unbind(-1)  # (N,) each
    eye = torch.eye(probabilities.shape[-1])
    return eye[first] - eye[second]


@torch.no_grad()
def latent_radii(
    members: Sequence[FusionModel], features: Mapping[str, Tensor | np.ndarray], task: Task, norm: Norm = 2
) -> dict[str, np.ndarray]:
    """Least l_p change of one modality's latent that changes what a member says, exact: (S, N) per modality.

    Of a choice between classes it is the least over the other classes (their margin is affine in the latent); of
    several labels, the least over the labels; of a regression, the least change that brings a value to its mean in
    training.

    Args:
        features: raw, (N, d_m).
        norm: p, one of 1, 2 and infinity.
    """
    features = {name: torch.as_tensor(features[name], dtype=torch.float32) for name in members[0].modalities}
    radii: dict[str, list[np.ndarray]] = {name: [] for name in members[0].modalities}
    for member in members:
        layer, latents = exact_layer(member), latents_of(member, features)
        if task == "regression":
            layer.bias -= member.rescale.mean.double()
        for m, name in enumerate(member.modalities):
            if task == "multiclass":
                radius = certified_class_radius(layer, latents, m, norm)
            else:
                radius = certified_radius(layer, latents, m, norm).amin(-1)
            radii[name].append(radius.numpy())
    return {name: np.stack(values) for name, values in radii.items()}
