"""Grid of settings x seeds x folds, trained in one call, with every member's predictions of the pool."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmfusion.data.folds import FoldedDataset, targets
from mmfusion.dataset import Task
from mmfusion.metrics.calibration import fit_temperature
from mmfusion.metrics.outcomes import Outcome, example_outcome
from mmfusion.metrics.prior import carried_dimension
from mmfusion.metrics.scores import example_losses, example_scores
from mmfusion.metrics.tasks import selection_score
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.sequences import CHUNK_EXAMPLES, chunks
from mmfusion.training.feed import Member
from mmfusion.training.objective import objective, predict
from mmfusion.training.recipe import ObjectiveConfig, Recipe
from mmfusion.training.trainer import Problem, Schedule, TrainingData, train


@dataclass(frozen=True)
class Setting:
    """One row of a grid."""

    label: str
    rank: int
    terms: tuple[str, ...] = ("mmd", "reconstruction", "alignment")
    """regularising terms that are on; the others have weight 0"""
    weight_decay: float | None = None
    """default: the recipe's"""
    dropout: Mapping[str, float] | None = None
    """rate at which each modality is hidden in training; default: the recipe's, for all"""
    mmd_weight: float | None = None
    """weight of the prior where it is on; default: the recipe's"""
    feature_dropout: float | Mapping[str, float] | None = None
    """rate at which single features are set to their mean in training, of all modalities or of each that is named;
    default: the recipe's"""
    start: Literal["balanced", "random"] = "balanced"
    """signs of the rank factors: as the layer begins, or each drawn by itself, as in other implementations"""


MEMBERS_AT_ONCE = 64  # keeps two experiments side by side below 4 GB; the rest of a grid follows in further blocks
MEMORY = 4 << 30  # bytes: half of it for the members' numbers, or all for what uncertain latents need beside
JWAE = ("mmd", "reconstruction", "alignment")
PLAIN: tuple[str, ...] = ()


@dataclass
class Grid:
    """P settings x S seeds x F folds of trained members."""

    data: FoldedDataset
    settings: list[Setting]
    seeds: list[int]
    models: list[FusionModel]
    """setting-major, then seed, then fold"""
    outputs: np.ndarray
    """(P, S, F, N) or (P, S, F, N, O): what each member says of every example of the pool"""
    shape: dict[str, object]
    """arguments of every member's FusionModel, the rank apart"""

    def ensemble(self, setting: int) -> FusionEnsemble:
        """All members of a setting, seed-major, then fold, as one model that saves and loads."""
        models = self.members([setting])
        shape = {name: value for name, value in self.shape.items() if name != "fused_dim"}
        rank = self.settings[setting].rank
        return FusionEnsemble.from_members(models, **shape, rank=rank, task=self.data.task)

    def model(self, setting: int, seed: int, fold: int = 0) -> FusionModel:
        """The member of one setting, seed and fold, by their indices."""
        return self.models[(setting * len(self.seeds) + seed) * len(self.data.folds) + fold]

    def index(self, label: str) -> int:
        """Place of the setting of that label."""
        return [setting.label for setting in self.settings].index(label)

    def predictions(self, part: str = "test") -> np.ndarray:
        """(P, S, n[, O]): predictions on that part of every fold, fold after fold."""
        return select(self.data, self.outputs, part)

    def members(self, places: Sequence[int]) -> list[FusionModel]:
        """All members of these settings: setting-major, then seed, then fold."""
        block = len(self.seeds) * len(self.data.folds)
        return [model for p in places for model in self.models[p * block : (p + 1) * block]]

    def without(
        self, missing: Sequence[str], places: Sequence[int], part: str = "test", of: Callable = example_scores
    ) -> np.ndarray:
        """(len(places), S, n): additive scores of these settings where the latents in `missing` are zero."""
        outputs = outputs_of(self.data, self.members(places), missing)
        outputs = outputs.reshape(len(places), *self.outputs.shape[1:])
        return per_example(self.data, select(self.data, outputs, part), part, of)

    @torch.inference_mode()
    def latent_dimension(self, label: str) -> float:
        """`carried_dimension` on a setting's own training parts: mean over members, least of the modalities.

        An interaction between latents of fewer dimensions than its rank has a rank of their dimension.
        """
        found = []
        for k, model in enumerate(self.members([self.index(label)])):
            rows = self.data.folds[k % len(self.data.folds)].train
            latents = model.latents({name: x[rows] for name, x in self.data.pool.features.items()})
            noise = model.latent_variances() or [None] * len(latents)
            pairs = zip(latents, noise, strict=True)
            found.append([carried_dimension(z.numpy(), None if v is None else v.numpy()) for z, v in pairs])
        return float(np.min(np.mean(found, axis=0)))

    def scores(self, part: str = "test") -> np.ndarray:
        """(P, S, n): additive score of each example, larger is better (mmfusion.metrics.scores.example_scores)."""
        return per_example(self.data, self.predictions(part), part, example_scores)

    def losses(self, part: str = "test") -> np.ndarray:
        """(P, S, n): loss of each example (mmfusion.metrics.scores.example_losses)."""
        return per_example(self.data, self.predictions(part), part, example_losses)

    def outcome(self, name: Outcome, part: str = "test", threshold: bool = False) -> np.ndarray:
        """(P, S, n): an outcome by examples, larger is better, its mean over a fold that fold's score.

        `threshold`: of two classes, the accuracy at the threshold that does best on each fold's dev part.
        """
        predictions = self.predictions(part)
        if threshold and self.data.task == "binary":
            predictions = predictions - np.repeat(self.thresholds(), fold_sizes(self.data, part), axis=-1)
        return per_example(self.data, predictions, part, partial(example_outcome, outcome=name))

    def tempered(self) -> np.ndarray:
        """(P, S, n[, O]): test logits over the temperature that each member's own dev part asks for; of classes."""
        predictions, dev = self.predictions(), self.predictions("dev")
        trailing, axis = [1] * (predictions.ndim - 2), 2
        result, target = [], np.split(targets(self.data, "dev"), np.cumsum(fold_sizes(self.data, "dev"))[:-1])
        parts = (
            np.split(x, np.cumsum(fold_sizes(self.data, part))[:-1], axis)
            for x, part in ((predictions, "test"), (dev, "dev"))
        )
        for test, seen, label in zip(*parts, target, strict=True):
            members = seen.reshape(-1, *seen.shape[axis:])
            found = np.array([fit_temperature(one, label) for one in members]).reshape(seen.shape[:axis])
            result.append(test / found.reshape(*found.shape, *trailing))
        return np.concatenate(result, axis)

    def thresholds(self) -> np.ndarray:
        """(P, S, F): logit at and above which most examples of dev are right when called positive; two classes."""
        parts = np.split(self.predictions("dev"), np.cumsum(fold_sizes(self.data, "dev"))[:-1], axis=-1)
        found = [
            best_thresholds(part, self.data.pool.target[fold.dev].numpy())
            for part, fold in zip(parts, self.data.folds, strict=True)
        ]
        return np.stack(found, -1)


def best_thresholds(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(..., n) logits, (n,) of 0 and 1 -> (...): half way between the two logits where accuracy is largest.

    Of several places the one nearest to 0.
    """
    order = np.argsort(logits, -1, kind="stable")
    ascending = np.take_along_axis(logits, order, -1)
    positive = np.take_along_axis(np.broadcast_to(target == 1, logits.shape), order, -1)
    none = np.zeros_like(ascending[..., :1])
    # cut k: the k lowest are called negative
    right = np.concatenate([none, np.cumsum(~positive, -1)], -1)
    right = right + positive.sum(-1, keepdims=True) - np.concatenate([none, np.cumsum(positive, -1)], -1)
    ends = np.concatenate([ascending[..., :1] - 2, ascending, ascending[..., -1:] + 2], -1)
    places = (ends[..., :-1] + ends[..., 1:]) / 2
    best = right == right.max(-1, keepdims=True)
    nearest = np.where(best, np.abs(places), np.inf).argmin(-1)
    return np.take_along_axis(places, nearest[..., None], -1)[..., 0]


def by_fold(data: FoldedDataset, values: np.ndarray, part: str = "test") -> np.ndarray:
    """(..., n) over that part's examples, fold after fold -> (..., F): mean over each fold's."""
    ends = np.cumsum(fold_sizes(data, part))[:-1]
    return np.stack([one.mean(-1) for one in np.split(values, ends, axis=-1)], -1)


def by_repeat(data: FoldedDataset, values: np.ndarray, part: str = "test") -> np.ndarray:
    """(..., S, n) or (..., S, F) -> (..., S * repeats): one score for each seed and repeat, mean over its folds."""
    folds = values if values.shape[-1] == len(data.folds) else by_fold(data, values, part)
    return folds.reshape(*folds.shape[:-2], folds.shape[-2] * data.repeats, -1).mean(-1)


def fold_sizes(data: FoldedDataset, part: str = "test") -> list[int]:
    """Number of examples in that part of each fold."""
    return [len(getattr(fold, part)) for fold in data.folds]


def select(data: FoldedDataset, outputs: np.ndarray, part: str) -> np.ndarray:
    """(..., F, N[, O]) -> (..., n[, O]): each fold's own part of the pool, fold after fold."""
    axis = -3 if data.has_columns else -2
    folds = [np.take(outputs, f, axis=axis) for f in range(len(data.folds))]
    rows = [getattr(fold, part).numpy() for fold in data.folds]
    return np.concatenate([np.take(x, r, axis=axis + 1) for x, r in zip(folds, rows, strict=True)], axis=axis + 1)


def per_example(data: FoldedDataset, predictions: np.ndarray, part: str, of: Callable) -> np.ndarray:
    """(..., n[, O]) -> (..., n) by `of`, fold by fold, in units of the target's deviation.

    `of` is (members, examples[, O]), target, task -> (members, examples): example_scores, example_losses or
    example_outcome of one name.
    """
    target, scale = targets(data, part), data.target_scale.numpy()
    if data.task == "regression":  # so that outputs, and datasets, weigh alike
        scale = scale if target.ndim > 1 else scale[0]
        predictions, target = predictions / scale, target / scale
    own = 2 if data.has_columns else 1  # axes of one member's predictions
    lead = predictions.shape[:-own]
    members = predictions.reshape(-1, *predictions.shape[-own:])
    ends = np.cumsum(fold_sizes(data, part))
    folds = [
        of(members[:, b - k : b], target[b - k : b], data.task)
        for b, k in zip(ends, fold_sizes(data, part), strict=True)
    ]
    return np.concatenate(folds, 1).reshape(*lead, -1)


# a little over 60 lines: one call from settings to predictions, nothing in it of use elsewhere
def train_grid(
    data: FoldedDataset,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    compile: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    title: str = "train",
    **shape: object,
) -> Grid:
    """Train every setting with every seed on every fold; those of one rank at once, as many as `members_at_once` says.

    `shape` holds further arguments of every FusionModel: fusion, fused_dim, spectral_norm, noise (default: the
    recipe's; none where the head is no LMF, or one of fused width).
    """
    shape = {
        "input_dims": data.input_dims,
        "latent_dim": recipe.latent_dim,
        "hidden_dim": recipe.hidden_dim,
        "output_dim": data.output_dim,
        # the covariance of the R * fused_dim products of an LMF of fused width takes a gigabyte for each member
        "noise": recipe.noise if shape.get("fusion", "lmf") == "lmf" and not shape.get("fused_dim") else "none",
        **shape,
    }
    fitted = [_fitted({**shape, "rank": 1}, data, fold.train) for fold in data.folds]

    def build(member: Member) -> FusionModel:
        model = FusionModel(**shape, rank=member.settings["rank"])
        if member.settings.get("start") == "random":
            with torch.no_grad():
                model.fusion.rank_weights.mul_(torch.randint(2, model.fusion.rank_weights.shape) * 2 - 1)
        model.standardise.load_state_dict(fitted[member.fold].standardise.state_dict())
        model.rescale.load_state_dict(fitted[member.fold].rescale.state_dict())
        return model

    scale = data.target_scale.to(device)
    problem = Problem(
        build,
        lambda model, batch: objective(model, batch, data.task, scale=scale),
        partial(predict, task=data.task),
        selection_score(data.task),
    )
    schedule = Schedule(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        annealing="cosine" if recipe.keep == "last" else "none",
        keep=recipe.keep,
        compile=compile,
    )
    pool = TrainingData(data.pool, data.pool, data.folds)
    members = _members(data, settings, seeds, recipe)
    blocks = _blocks(members, lambda rank: members_at_once({**shape, "rank": rank}, recipe.batch_size, data.task))
    models: list[FusionModel] = [None] * len(members)  # type: ignore[list-item]
    text = f"{title}, {len(members)} trainings"
    with tqdm(total=len(members) * recipe.epochs, desc=text, unit="epoch", mininterval=0.5) as bar:
        for number, block in enumerate(blocks, 1):
            file = checkpoint and checkpoint.with_stem(f"{checkpoint.stem}-{number}")
            count = len(block)
            step = {"device": device, "checkpoint": file, "on_epoch": lambda _, count=count: bar.update(count)}
            trained = train(problem, [members[k] for k in block], pool, schedule, **step).models
            for place, model in zip(block, trained, strict=True):
                models[place] = model
    outputs = outputs_of(data, models)
    outputs = outputs.reshape(len(settings), len(seeds), len(data.folds), *outputs.shape[1:])
    return Grid(data, list(settings), list(seeds), models, outputs, shape)


def _blocks(members: Sequence[Member], most: Callable[[int], int]) -> list[list[int]]:
    """Places of the members that are trained together: of one rank, as what an output's variance takes goes with R^2.

    Blocks of one rank are of equal size, so that compilation meets one shape, or two.
    """
    blocks = []
    for rank in dict.fromkeys(member.settings["rank"] for member in members):
        places = [k for k, member in enumerate(members) if member.settings["rank"] == rank]
        blocks += [part.tolist() for part in np.array_split(places, math.ceil(len(places) / most(int(rank))))]
    return blocks


def members_at_once(shape: Mapping[str, object], batch_size: int, task: Task) -> int:
    """Members whose training fits into memory together: at most MEMBERS_AT_ONCE.

    Of each number of the encoders and decoders there are six: the model, the stack, its gradient, Adam's moments, and
    what is made on the way. The variance of an output takes R^2 O numbers an example, the covariance of classes
    R^2 O^2 (of two modalities and more than a few products, O max(R, L) and as much again for each class), about six
    times for each modality until the gradient is known.
    """
    weights = 2 * int(shape["hidden_dim"]) * sum(d + int(shape["latent_dim"]) for d in shape["input_dims"].values())
    most = max(1, min(MEMBERS_AT_ONCE, MEMORY // (2 * 4 * 6 * weights)))
    if shape["noise"] == "none":
        return most
    outputs = int(shape.get("fused_dim") or shape["output_dim"])
    joint = task == "multiclass" or bool(shape.get("fused_dim"))
    rank, entries = int(shape["rank"]), outputs**2 if joint else outputs
    of_two = len(shape["input_dims"]) == 2 and rank * outputs > 16  # as `LowRankMultimodalFusion.moments` has it
    numbers = entries * (max(rank, int(shape["latent_dim"])) if of_two else rank**2)
    examples = max(6 * batch_size * len(shape["input_dims"]), 4 * CHUNK_EXAMPLES)
    return max(1, min(most, MEMORY // (4 * numbers * examples)))


def _members(data: FoldedDataset, settings: Sequence[Setting], seeds: Sequence[int], recipe: Recipe) -> list[Member]:
    """Every setting with every seed on every fold, in this order."""
    apart = 1000 if data.repeats > 1 else 0  # another start for every repeat
    return [
        Member(
            seed + apart * (fold // (len(data.folds) // data.repeats)),
            _objective(setting, recipe).loss_weights(data.task, data.input_dims, setting.terms),
            recipe.weight_decay if setting.weight_decay is None else setting.weight_decay,
            {"rank": setting.rank} | ({} if setting.start == "balanced" else {"start": setting.start}),
            _dropout(setting, recipe, data),
            fold,
            recipe.feature_dropout if setting.feature_dropout is None else setting.feature_dropout,
        )
        for setting in settings
        for seed in seeds
        for fold in range(len(data.folds))
    ]


@torch.inference_mode()
def outputs_of(data: FoldedDataset, models: Sequence[FusionModel], missing: Sequence[str] = ()) -> np.ndarray:
    """(members, N[, O]): predictions of every model on the whole pool; the latents in `missing` are zero."""
    parts = list(chunks(data.pool.features, torch.arange(len(data.pool))))
    outputs = [torch.cat([predict(model, part, data.task, missing) for part in parts]) for model in models]
    return np.stack([output.numpy() for output in outputs])


def _fitted(shape: dict, data: FoldedDataset, rows: Tensor) -> FusionModel:
    model = FusionModel(**shape)
    model.fit_standardisation({name: x[rows] for name, x in data.pool.features.items()})
    if data.task == "regression":
        model.rescale.fit(data.pool.target[rows])
    return model


def _objective(setting: Setting, recipe: Recipe) -> ObjectiveConfig:
    weight = recipe.mmd_weight if setting.mmd_weight is None else setting.mmd_weight
    return replace(recipe.objective, mmd_weight=weight)


def _dropout(setting: Setting, recipe: Recipe, data: FoldedDataset) -> dict[str, float]:
    if setting.dropout is not None:
        return dict(setting.dropout)
    # of one modality alone nothing would be left
    return {name: recipe.modality_dropout for name in data.pool.features} if len(data.pool.features) > 1 else {}
