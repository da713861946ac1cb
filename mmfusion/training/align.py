"""Align M modalities without labels: all seeds, and all weightings of the same losses, trained at once.

ensembles = align(data, [Weighting("contrast", {"info_nce": 1.0})], AlignmentTraining(seeds=5))
ensembles["contrast"].encode(data.pool.features)  # {modality: (S, N, L)}, S seeds x folds
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from jwae_module import mmd_penalty, reconstruction_error
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.losses.alignment import ALIGNMENTS, TEMPERED
from mmfusion.metrics.shared_retrieval import distinct_items, shared_precision
from mmfusion.models.alignment import AlignmentEnsemble, AlignmentModel
from mmfusion.training.feed import Batch, Member
from mmfusion.training.trainer import ModelCall, Problem, Schedule, TrainingData, train

OWN_TERMS = ("prior", "reconstruction")
SHAPE = ("latent_dim", "hidden_dim", "spectral_norm")  # of the model


@dataclass(frozen=True)
class Weighting:
    """One row: which losses align, and how."""

    label: str
    weights: Mapping[str, float]
    """of `mmfusion.losses.alignment.ALIGNMENTS`, and of "prior" (MMD to N(0, I)) and "reconstruction"; others are 0"""
    masking: float = 0.0
    """rate at which each modality of each example is hidden in training"""


@dataclass(frozen=True)
class AlignmentTraining:
    """The space, and how all members are trained."""

    latent_dim: int = 32
    hidden_dim: int = 128
    """of the encoders; 0: they are affine"""
    aligned_dim: int | None = None
    """how many of the latents, the first ones, are aligned and selected by; default: all. The others are the modality's
    own: prior and reconstruction see all of them"""
    spectral_norm: float | None = None
    identity: bool = False
    """start where latents are the standardised features, of modalities whose features share a space already"""
    seeds: int = 5
    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    feature_dropout: float = 0.0
    keep: Literal["best", "last"] = "best"
    """the epoch of the best mean average precision on dev, or the last, at a rate that falls along a cosine"""
    patience: int = 15
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """{loss: its arguments}, where they are not its defaults"""


def alignment_terms(
    model: ModelCall,
    batch: Batch,
    wanted: Collection[str],
    options: Mapping[str, Mapping[str, object]],
    aligned_dim: int | None = None,
    items: bool = False,
) -> dict[str, Tensor]:
    """The wanted terms of one model on one batch, scalars; alignments see the first `aligned_dim` latents.

    With `items` the target says which rows are of one item: no contrast makes them rivals.
    """
    output = model(batch.features, present=batch.present, kept=batch.kept)
    aligned = {name: z[:, :aligned_dim] for name, z in output.latents.items()}
    terms = {}
    for name in wanted:
        if name == "prior":
            terms[name] = torch.vmap(mmd_penalty)(torch.stack(list(output.latents.values()))).mean()
        elif name == "reconstruction":
            terms[name] = reconstruction_error(output.standardised, output.reconstructions)
        else:
            of_contrast = {"temperature": output.temperature, "items": batch.target if items else None}
            given = (of_contrast if name in TEMPERED else {}) | dict(options.get(name, {}))
            terms[name] = ALIGNMENTS[name](aligned, **given)
    return terms


def align(
    data: FoldedDataset,
    weightings: Sequence[Weighting],
    training: AlignmentTraining | None = None,
    *,
    modalities: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> dict[str, AlignmentEnsemble]:
    """Train every weighting with every seed on every fold; {label: its members, seed-major, then fold}.

    Rows that weigh the same losses are trained at once, one such group after another: what a row does not weigh is
    not computed for it.

    Args:
        data: vectors (N, d_m) of two modalities or more; targets are not looked at.
        weightings: the rows.
        modalities: those that are aligned; default: all.
        checkpoint, on_epoch: as `mmfusion.training.trainer.train`, of each group in turn; of several, each has a
            checkpoint with its number.

    Raises ValueError for an unknown loss, a single modality, or an `aligned_dim` that is not 1 to L; NonFiniteLoss and
    InputError as `train`.
    """
    training = training or AlignmentTraining()
    if training.aligned_dim is not None and not 1 <= training.aligned_dim <= training.latent_dim:
        raise ValueError(f"{training.aligned_dim} of {training.latent_dim} latents cannot be aligned")
    features = {name: data.pool.features[name] for name in sorted(modalities or data.pool.features)}
    dims = {name: x.shape[-1] for name, x in features.items()}
    wanted = sorted({name for one in weightings for name, weight in one.weights.items() if weight})
    if unknown := set(wanted) - set(ALIGNMENTS) - set(OWN_TERMS):
        raise ValueError(f"no loss {min(unknown)!r}; known are {', '.join([*ALIGNMENTS, *OWN_TERMS])}")
    if len(dims) < 2:
        raise ValueError(f"two modalities or more are aligned, not {', '.join(dims)} alone")
    shape = {"input_dims": dims, **{name: getattr(training, name) for name in SHAPE}}
    fitted = [_standardised(shape, features, fold) for fold in data.folds]

    def build(member: Member) -> nn.Module:
        model = AlignmentModel(**shape)
        model.standardise.load_state_dict(fitted[member.fold].standardise.state_dict())
        if training.identity:
            model.start_at_identity()
        return model

    pool = replace(data.pool, features=features, target=_items(data.pool))
    places = [place for place, name in enumerate(features) if name in data.pool.shared]
    parts, count = TrainingData(pool, pool, data.folds), training.seeds * len(data.folds)
    groups, ensembles = _by_terms(weightings), {}
    given = {"options": training.options, "aligned_dim": training.aligned_dim}
    for number, (terms, rows) in enumerate(groups.items()):
        terms = terms or wanted  # a row without a loss: 0 times those of the others
        problem = Problem(
            build,
            partial(alignment_terms, wanted=terms, items=bool(places), **given),
            lambda model, features: torch.stack(list(model(features).latents.values()), 1),  # (N, M, L)
            lambda latents, items: mean_precision(latents[..., : training.aligned_dim], dict.fromkeys(places, items)),
        )
        file = checkpoint and (checkpoint.with_stem(f"{checkpoint.stem}-{number}") if len(groups) > 1 else checkpoint)
        members = _members(rows, terms, training, list(dims), len(data.folds))
        options = {"device": device, "checkpoint": file, "on_epoch": on_epoch}
        models = train(problem, members, parts, _schedule(training), **options).models
        for i, row in enumerate(rows):
            ensembles[row.label] = AlignmentEnsemble.from_members(models[i * count : (i + 1) * count], **shape)
    return {one.label: ensembles[one.label] for one in weightings}


def _items(pool: Split) -> Tensor:
    """(N,) numbers that tell losses and the score on dev, as a target, which rows have an item in common; else 0."""
    items = [torch.from_numpy(distinct_items(names)[1]) for names in pool.shared.values()]
    return items[0].float() if items else torch.zeros(len(pool))


def _by_terms(weightings: Sequence[Weighting]) -> dict[tuple[str, ...], list[Weighting]]:
    """Rows by the losses that they weigh, in alphabetical order."""
    groups: dict[tuple[str, ...], list[Weighting]] = {}
    for one in weightings:
        groups.setdefault(tuple(sorted(name for name, weight in one.weights.items() if weight)), []).append(one)
    return groups


def _members(
    rows: Sequence[Weighting], terms: Sequence[str], training: AlignmentTraining, modalities: Sequence[str], folds: int
) -> list[Member]:
    """Of every row every seed on every fold."""
    return [
        Member(
            seed,
            {name: float(one.weights.get(name, 0.0)) for name in terms},
            training.weight_decay,
            {"weighting": one.label},
            {name: one.masking for name in modalities if one.masking},
            fold,
            training.feature_dropout,
        )
        for one in rows
        for seed in range(training.seeds)
        for fold in range(folds)
    ]


def _schedule(training: AlignmentTraining) -> Schedule:
    return Schedule(
        epochs=training.epochs,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        annealing="none" if training.keep == "best" else "cosine",
        patience=training.patience,
        keep=training.keep,
    )


def _standardised(shape: Mapping[str, object], features: Mapping[str, Tensor], fold: Fold) -> AlignmentModel:
    """A model whose standardisation is that of the fold's training part."""
    model = AlignmentModel(**shape)
    for name, x in features.items():
        model.standardise[name].fit(x[fold.train])
    return model


def mean_precision(latents: np.ndarray, shared: Mapping[int, Sequence | np.ndarray] | None = None) -> float:
    """Mean average precision over all ordered pairs of modalities, of latents (N, M, L); 0 of a collapsed one.

    `shared` names the rows' items (N,) of the modality at that place, as `shared_precision`.
    """
    if not latents.any(-1).all():  # a zero vector has no direction
        return 0.0
    by_place = {str(m): latents[:, m] for m in range(latents.shape[1])}
    return shared_precision(by_place, {str(m): items for m, items in (shared or {}).items()})
