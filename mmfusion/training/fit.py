"""Fit jWAE-LMF or a baseline on one dataset, or on the folds of one, all seeds at once.

ensembles, trained = fit_methods(dataset, [Method("jWAE-LMF", ("image", "text"))], ModelConfig(), ObjectiveConfig(),
                                 TrainingConfig(seeds=5))
ensembles[0].predict(dataset.splits["test"].features)  # (S, N)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmfusion.data.folds import FoldedDataset, fold_datasets, only, target_scale
from mmfusion.dataset import Dataset, Fold
from mmfusion.metrics.tasks import balanced_weights, selection_score
from mmfusion.models.fusion import Fusion, FusionEnsemble, FusionModel, ModelConfig
from mmfusion.models.whitening import whiten_latents
from mmfusion.training.objective import DIRECTIONAL, DIRECTIONS, PRIOR_TERMS, Term, objective, predict
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig
from mmfusion.training.trainer import Member, Problem, Schedule, Trained, TrainingData, train


@dataclass(frozen=True)
class Method:
    """One line of the score table: a model trained with every seed."""

    label: str
    modalities: tuple[str, ...]
    fusion: Fusion = "lmf"
    active_rank: int | None = None
    """the first k of the model's rank terms; default: all"""
    prior: bool = True
    """trained with the MMD to the prior, at the weight of the objective"""

    @property
    def has_rank(self) -> bool:
        """False for one modality: its head is an affine map."""
        return len(self.modalities) > 1


def fit_methods(
    datasets: Dataset | Sequence[Dataset],
    methods: Sequence[Method],
    model: ModelConfig,
    objectives: ObjectiveConfig,
    training: TrainingConfig,
    *,
    further_terms: Mapping[str, tuple[float, Term]] | None = None,
    class_weights: Tensor | None = None,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> tuple[list[FusionEnsemble], Trained]:
    """Train every seed of every method on every fold at once, each member kept at its best epoch, or its last.

    Args:
        datasets: one, with splits `train` and the one it names for selection; or the folds of one.
        methods: of one shape: the same modalities and fusion; they may differ in active rank and prior.
        model, objectives, training: sections of the main script's Config.
        further_terms: {name: (weight, term)} added to the objective.
        class_weights: what an example of each class weighs (`mmfusion.training.objective.fit_loss`); default: what
            `training.class_weight` says.
        checkpoint: file to save progress to, and to go on from where it exists.
        on_epoch: called with each epoch's record, {"epoch", "loss": {term: [S]}, "score": [S]}, method-major.

    Returns:
        one ensemble per method, of all its members, seed-major, then fold; and what `train` returns of all members.

    Raises:
        ValueError: methods of several shapes.
        NonFiniteLoss, InputError: as `mmfusion.training.trainer.train`.
    """
    modalities, fusion = methods[0].modalities, methods[0].fusion
    if any((method.modalities, method.fusion) != (modalities, fusion) for method in methods):
        raise ValueError("methods trained at once must have the same modalities and the same fusion")
    datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    first, (data, target) = datasets[0], _training_data(datasets, modalities)
    shape = {
        "input_dims": {name: first.input_dims[name] for name in modalities},
        "latent_dim": model.latent_dim,
        "hidden_dim": model.hidden_dim,
        "rank": model.rank if methods[0].has_rank else 1,
        "output_dim": first.output_dim,
        "fusion": fusion,
        "spectral_norm": model.spectral_norm,
        "noise": model.noise if fusion == "lmf" else "none",
    }
    fitted = [_fitted(shape, data, fold, first.task) for fold in data.folds]

    def build(member: Member) -> FusionModel:
        built = FusionModel(**shape, active_rank=member.settings["active_rank"])
        built.standardise.load_state_dict(fitted[member.fold].standardise.state_dict())
        built.rescale.load_state_dict(fitted[member.fold].rescale.state_dict())
        return built

    scale = target_scale(target) if first.task == "regression" else None
    if class_weights is None and training.class_weight == "balanced":
        class_weights = balanced_weights(target, first.task, first.output_dim)
    terms = {
        "task": first.task,
        "alignment": objectives.alignment,
        "scale": 1.0 if scale is None else scale.to(device),
        "class_weights": None if class_weights is None else class_weights.to(device),
        "prior": objectives.prior,
        "further": {name: term for name, (_, term) in (further_terms or {}).items()},
    }
    problem = Problem(
        build,
        lambda model, batch: objective(model, batch, **terms),
        partial(predict, task=first.task),
        selection_score(first.task, scale, training.select_by == "log_loss", class_weights),
        (DIRECTIONS, model.latent_dim) if set(objectives.prior) & set(DIRECTIONAL) else None,
    )
    schedule = Schedule(
        epochs=training.epochs,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        annealing=training.annealing,
        patience=training.patience,
        keep=training.keep,
        compile=training.compile,
    )
    term_weights = objectives.loss_weights(first.task, modalities)
    term_weights |= {name: weight for name, (weight, _) in (further_terms or {}).items()}
    members = _members(methods, term_weights, training, len(data.folds))
    trained = train(problem, members, data, schedule, device=device, checkpoint=checkpoint, on_epoch=on_epoch)
    if fusion == "lmf" and model.spectral_norm is None:
        give_prior(trained.models, members, data)
    count = training.seeds * len(data.folds)
    ensembles = [
        FusionEnsemble.from_members(trained.models[i * count : (i + 1) * count], **shape, task=first.task)
        for i in range(len(methods))
    ]
    return ensembles, trained


def give_prior(models: Sequence[FusionModel], members: Sequence[Member], data: TrainingData) -> None:
    """Mean 0 and covariance I to the latents of those that were trained towards the prior (`whiten_latents`)."""
    for model, member in zip(models, members, strict=True):
        if any(member.loss_weights.get(name) for name in PRIOR_TERMS):
            rows = data.folds[member.fold].train
            whiten_latents(model, {name: x[rows] for name, x in data.train.features.items()})


def _training_data(datasets: Sequence[Dataset], modalities: Sequence[str]) -> tuple[TrainingData, Tensor]:
    """What is trained and selected on, of these modalities alone; and the targets of all that any fold trains on."""
    if len(datasets) > 1:
        pooled: FoldedDataset = only(fold_datasets(datasets), modalities)
        rows = torch.cat([fold.train for fold in pooled.folds]).unique()
        return TrainingData(pooled.pool, pooled.pool, pooled.folds), pooled.pool.target[rows]
    train_split, selection = (
        replace(split, features={name: split.features[name] for name in modalities})
        for split in (datasets[0].splits["train"], datasets[0].splits[datasets[0].selection])
    )
    fold = Fold(torch.arange(len(train_split)), torch.arange(len(selection)))
    return TrainingData(train_split, selection, [fold]), train_split.target


def _fitted(shape: dict[str, object], data: TrainingData, fold: Fold, task: str) -> FusionModel:
    """A model whose standardisation, and a regression's rescaling, are those of the fold's training part."""
    model = FusionModel(**shape)
    model.fit_standardisation({name: x[fold.train] for name, x in data.train.features.items()})
    if task == "regression":
        model.rescale.fit(data.train.target[fold.train])
    return model


def _members(
    methods: Sequence[Method], weights: Mapping[str, float], training: TrainingConfig, folds: int
) -> list[Member]:
    """Every method with every seed on every fold, in this order."""
    modalities = methods[0].modalities
    return [
        Member(
            seed,
            weights if method.prior else weights | {name: 0.0 for name in PRIOR_TERMS if name in weights},
            training.weight_decay,
            {"active_rank": method.active_rank},
            {name: training.modality_dropout for name in modalities if len(modalities) > 1},
            fold,
            training.feature_dropout,
        )
        for method in methods
        for seed in range(training.first_seed, training.first_seed + training.seeds)
        for fold in range(folds)
    ]
