"""One prediction of a model of tokens, taken apart: which token met which, and what came of it.

LMF over pairs of tokens is exact: the contributions of all pairs sum to the output. A transformer has no such sum; of
each of its tokens stands what the output loses without it, and those numbers sum to nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from lmf_module import LowRankMultimodalFusion
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError
from mmfusion.explain.account import subset_name
from mmfusion.explain.text import plain
from mmfusion.losses.optimal_transport import cosine_cost
from mmfusion.losses.transport_plans import ipot, marginals
from mmfusion.metrics.format import counted, mean_std
from mmfusion.models.temporal_lmf import TemporalFusion, coupling_range
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.models.wma import TokenTransformer
from mmfusion.runs.encode import RunEncoders
from mmfusion.runs.load import TrainedRun
from mmfusion.sequences import Sequences, Tokens

REFERENCE = 1000  # training examples whose mean token is what an example is compared with
MOST_PAIRS = 40_000  # of which a linear programme takes seconds: more have no bounds
SHOWN = 8  # pairs, or tokens of each modality, that are printed


@dataclass(frozen=True)
class TokenExplanation:
    """One example; the numbers of S members, or their mean."""

    run: str
    row: str
    key: str
    text: str
    target: str
    """the label in words, empty where there is none"""
    names: dict[str, list[str]]
    """what each token is called, by modality"""
    value: np.ndarray
    """(S,) logits, or values"""
    probability: np.ndarray | None
    """(S,) of the class that a logit above 0 means"""
    class_names: tuple[str, ...]
    said: str
    """what is taken apart: "logit", or a value's name"""
    worth: dict[str, np.ndarray]
    """(T_m,) what each token adds, mean over members: with all it met, or (a transformer) what is lost without it"""
    pairs: np.ndarray | None
    """(T_1, T_2) what each pair of tokens adds, mean over members; they sum to the mean value"""
    plan: np.ndarray | None
    """(T_1, T_2) mass of each pair, mean over members; of a transformer, what its alignment would match"""
    residual: float
    """largest difference of a member's value and the sum of its pairs"""
    parts: dict[str, np.ndarray]
    """{subset of modalities: (S,)} about the mean tokens of train; they sum to the value"""
    bounds: tuple[float, float] | None
    """least and largest value under any plan of the same masses, mean over members"""
    radius: dict[str, np.ndarray]
    """{modality: (S,)} least change of all its latents together that changes the decision while the plan stands, in
    their rms deviation on train"""
    picture: Path | None
    exact: bool


class TokenExplainer:
    """A run's members of one fold, which take tokens."""

    def __init__(self, run: TrainedRun, device: str, fold: int = 0, output: int = 0) -> None:
        """Raises InputError naming the flag of a choice that the run does not offer."""
        if fold >= len(run.datasets):
            raise InputError(f"--fold {fold}: this run has folds 0 to {len(run.datasets) - 1}")
        self.run, self.encoders, self.output = run, RunEncoders(run, device), output
        self.dataset: Dataset = run.datasets[fold]
        self.ensemble: TokenEnsemble = run.ensembles[run.main_row].part(fold, len(run.datasets))
        if run.task == "multiclass":
            raise InputError(
                f"{run.folder}: chooses between {len(self.dataset.class_names)} classes; models of tokens are "
                "explained for two classes, labels and values"
            )
        outputs = self.ensemble.shape["output_dim"]
        if output >= outputs:
            raise InputError(f"--output {output}: this run's outputs are 0 to {outputs - 1}")
        self.modalities = list(self.ensemble.shape["input_dims"])
        train = self.dataset.splits["train"]
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(train))[:REFERENCE])
        self.reference = {name: train.features[name][rows] for name in self.modalities}

    def meme(self, image: Path, text: str) -> TokenExplanation:
        """One meme that need not be of the run's data. Raises InputError."""
        if self.encoders.lacking is not None:
            raise InputError(f"--image {image}: {self.encoders.lacking}; give --ids or --split")
        features = self.encoders.encode([image], [text], flag="--image ")
        return self._explain(features, str(image), {"text": text}, None, image)

    def example(self, split: str, row: int) -> TokenExplanation:
        """One example of the run's own data."""
        part: Split = self.dataset.splits[split]
        features = {name: part.features[name][row : row + 1] for name in self.modalities}
        texts = {name: values[row] for name, values in self.run.texts(self.dataset, split).items()}
        target = None if part.target is None else float(part.target.reshape(len(part), -1)[row, self.output])
        key = part.ids[row]
        picture = self.run.image_paths([key]).get(key) if self.run.memes else None
        return self._explain(features, key, texts, target, picture)

    @torch.inference_mode()
    def losses(self, split: Split) -> np.ndarray:
        """(N,) loss of the members' mean on a labelled split."""
        p = self.ensemble.predict(split.features).mean(0).reshape(len(split), -1)[:, self.output].numpy()
        target = split.target.reshape(len(split), -1)[:, self.output].numpy()
        if self.run.task == "regression":
            return (p - target) ** 2
        return -np.log(np.clip(np.where(target > 0, p, 1 - p), 1e-12, None))

    @torch.no_grad()
    def _explain(
        self,
        features: Mapping[str, Sequences],
        key: str,
        texts: Mapping[str, str],
        target: float | None,
        picture: Path | None,
    ) -> TokenExplanation:
        tokens = {name: features[name].padded() for name in self.modalities}
        found = [
            self._of_lmf(member, tokens) if isinstance(member, TemporalFusion) else self._of_transformer(member, tokens)
            for member in self.ensemble.members
        ]
        value = np.array([one["value"] for one in found])

        def mean(name: str) -> np.ndarray | None:
            return None if found[0].get(name) is None else np.mean([one[name] for one in found], axis=0)

        def stacked(name: str) -> dict[str, np.ndarray]:
            return {k: np.array([one[name][k] for one in found]) for k in found[0].get(name, {})}

        worth = {name: np.mean([one["worth"][name] for one in found], axis=0) for name in self.modalities}
        regression = self.run.task == "regression"
        names = self.dataset.target_names
        binary = self.run.task == "binary"
        classes = self.dataset.class_names if binary or regression else (f"no {names[self.output]}", names[self.output])
        said = "logit" if not regression else (names[self.output] if names else "value")
        label = "" if target is None else f"{target:.2f}" if regression else classes[int(target)]
        return TokenExplanation(
            run=str(self.run.folder),
            row=self.run.main_row,
            key=key,
            text=" / ".join(text for text in texts.values() if text.strip()),
            target=label,
            names={name: self._called(name, len(tokens[name].mask[0].nonzero()), texts) for name in self.modalities},
            value=value,
            probability=None if regression else expit(value),
            class_names=classes,
            said=said,
            worth=worth,
            pairs=mean("pairs"),
            plan=mean("plan"),
            residual=max(one.get("residual", 0.0) for one in found),
            parts=stacked("parts"),
            bounds=None if found[0].get("bounds") is None else tuple(np.mean([one["bounds"] for one in found], axis=0)),
            radius=stacked("radius"),
            picture=picture,
            exact="pairs" in found[0],
        )

    def _called(self, name: str, count: int, texts: Mapping[str, str]) -> list[str]:
        """Words of a text, cells of a square picture by row and column, else numbers."""
        if count == 0:
            return ["(nothing)"]  # counts as one token at 0
        if name in texts and self.run.encoders is not None:
            words = self.encoders.words(texts[name])
            if len(words) == count:
                return words
        side = round(count**0.5)
        if name == "image" and side * side == count and self.run.memes is not None:
            return [f"cell {k // side + 1},{k % side + 1}" for k in range(count)]
        return [f"{k + 1}" for k in range(count)]

    def _of_lmf(self, member: TemporalFusion, tokens: Mapping[str, Tokens]) -> dict[str, object]:
        """Value, pairs, plan, parts, bounds and radii of one member."""
        layer = member.fusion
        latents, masks = member.latents(tokens)
        scale, mean = member.rescale.std[self.output], member.rescale.mean[self.output]
        raw = layer(latents, masks)[0, self.output] * scale + mean
        found: dict[str, object] = {"value": raw.item()}
        centres, deviations = self._reference_latents(member)
        parts = layer.parts(latents, masks, centres)
        found["parts"] = {
            subset_name(subset, self.modalities) if subset else "bias": part[0, self.output].item() * scale.item()
            + (0.0 if subset else mean.item())
            for subset, part in parts.items()
        }
        offset = 0.0 if self.run.task != "regression" else float(mean)
        found["radius"] = {}
        for m, name in enumerate(self.modalities):
            gradient = layer.step_gradient(latents, m, masks)[0, self.output] * scale
            size = gradient.norm().clamp_min(1e-12) * deviations[m]
            found["radius"][name] = float((raw - offset).abs() / size)
        if len(self.modalities) == 2:
            pairs = layer.contributions(latents, masks)[0, :, :, self.output] * scale
            plan = layer.plans(latents, masks)[0][0]
            pairs = pairs + plan * mean
            found |= {"pairs": pairs.numpy(), "plan": plan.numpy(), "residual": abs(pairs.sum() - raw).item()}
            scores = layer.pair_scores(latents)[0, :, :, self.output] * scale + mean
            if all(mask.any() for mask in masks) and plan.numel() <= MOST_PAIRS:
                # the plan's own masses: those of a diagonal one are not all tokens' alike
                a, b = (plan.double().sum(k) / plan.double().sum() for k in (1, 0))
                found["bounds"] = coupling_range(scores.double().numpy(), a.numpy(), b.numpy())
            found["worth"] = dict(zip(self.modalities, (pairs.sum(1).numpy(), pairs.sum(0).numpy()), strict=True))
        else:
            mass, partners = layer.met(latents, masks)
            of_hub = (LowRankMultimodalFusion.forward(layer, partners)[0, :, self.output] * scale + mean) * mass[0]
            found["worth"] = {name: self._without(member, tokens, name, raw) for name in self.modalities[1:]}
            found["worth"][self.modalities[0]] = of_hub.numpy()
        return found

    def _of_transformer(self, member: TokenTransformer, tokens: Mapping[str, Tokens]) -> dict[str, object]:
        """Value, what it loses without each token, and what its alignment would match."""
        output = member(tokens)
        raw = output.prediction[0, self.output]
        found: dict[str, object] = {"value": raw.item()}
        found["worth"] = {name: self._without(member, tokens, name, raw) for name in self.modalities}
        if len(self.modalities) == 2:
            (x, x_mask), (y, y_mask) = (output.layers[-1][name] for name in self.modalities)
            found["plan"] = ipot(cosine_cost(x, y), marginals(x_mask), marginals(y_mask))[0].numpy()
        return found

    def _without(
        self, member: TemporalFusion | TokenTransformer, tokens: Mapping[str, Tokens], name: str, raw: Tensor
    ) -> np.ndarray:
        """(T,) what the value loses as one token of a modality after the other is hidden."""
        x = tokens[name]
        count = x.mask.shape[-1]
        masks = x.mask.expand(count, -1) * (1 - torch.eye(count))
        tried = {key: Tokens(y.values.expand(count, -1, -1), y.mask.expand(count, -1)) for key, y in tokens.items()}
        tried[name] = Tokens(tried[name].values, masks)
        return (raw - member(tried).prediction[:, self.output]).numpy()

    def _reference_latents(self, member: TemporalFusion) -> tuple[list[Tensor], list[float]]:
        """Mean (L,) and rms deviation from it of the latents of each modality's tokens on part of train."""
        tokens = {name: x.padded() for name, x in self.reference.items()}
        latents, masks = member.latents(tokens)
        means, deviations = [], []
        for z, mask in zip(latents, masks, strict=True):
            own = z[mask.bool()]
            means.append(own.mean(0))
            deviations.append(own.std(0, correction=0).square().mean().sqrt().item())
        return means, deviations


def sentence(one: TokenExplanation) -> str:
    """What the model says, how sure, whether that is right."""
    seeds = counted(len(one.value), "seed")
    if one.probability is None:
        verdict = f"; the target is {one.target}" if one.target else ""
        return f"{one.said} {one.value.mean():.2f} ({seeds}){verdict}."
    positive = bool(one.probability.mean() >= 0.5)
    chosen = one.probability.mean() if positive else 1 - one.probability.mean()
    agree = int(((one.probability >= 0.5) == positive).sum())
    name = one.class_names[int(positive)]
    verdict = "" if not one.target else f"; {'right' if one.target == name else 'wrong'}: labelled {one.target}"
    return f"{name[:1].upper()}{name[1:]} with probability {chosen:.2f} ({agree} of {seeds} agree){verdict}."


def largest(one: TokenExplanation, count: int = SHOWN) -> list[tuple[str, float]]:
    """The pairs, or tokens, that move the value most."""
    if one.pairs is not None:
        first, second = one.names.values()
        place = np.argsort(-np.abs(one.pairs), axis=None)[:count]
        rows, columns = np.unravel_index(place, one.pairs.shape)
        return [(f"{first[i]} x {second[j]}", float(one.pairs[i, j])) for i, j in zip(rows, columns, strict=True)]
    every = [(f"{name} {word}", float(v)) for name, words in one.names.items()
             for word, v in zip(words, one.worth[name], strict=True)]  # fmt: skip
    return sorted(every, key=lambda pair: -abs(pair[1]))[:count]


def print_tokens(one: TokenExplanation) -> None:
    """One explained example as text."""
    print(f"{sentence(one)}\n{plain(one.key)}  {plain(one.text)[:200]!r}")
    print(f"{one.run}: {one.row}, {counted(len(one.value), 'seed')}; {one.said} {mean_std(one.value)}")
    if one.parts:
        print(f"\nthe {one.said}, taken apart exactly about the mean token of train (mean +- std over seeds)")
        for name, part in one.parts.items():
            print(f"  {name:24}  {mean_std(part)}")
        print(f"  {'sum':24}  {mean_std(sum(one.parts.values()))}")
    if one.pairs is not None:
        print(f"\npairs that add most to the {one.said}, mean over seeds (all pairs sum to it, to {one.residual:.0e})")
    elif one.exact:
        print(f"\ntokens that add most to the {one.said}, mean over seeds")
    else:
        print(f"\ntokens without which the {one.said} changes most, mean over seeds (they sum to nothing)")
    for name, value in largest(one):
        print(f"  {plain(name):40} {value:+.3f}")
    if one.bounds is not None:
        low, high = one.bounds
        print(f"\nunder any plan of the same masses the {one.said} lies between {low:.2f} and {high:.2f}")
    if one.radius:
        cells = ", ".join(f"{name} {mean_std(radius)}" for name, radius in one.radius.items())
        print(f"least change of all latents of a modality that changes the decision, at this plan only: {cells}")
        print("(in their rms deviation on train; the plan moves with the tokens, so this is no certificate)")
