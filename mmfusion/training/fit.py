"""Fit jWAE-LMF or a baseline on one dataset, all seeds at once.

ensembles, trained = fit(dataset, [Method("jWAE-LMF", ("image", "text"))], ModelConfig(), ObjectiveConfig(),
                         TrainingConfig(seeds=5))
ensembles[0].predict_proba(dataset.splits["test"].features)  # (S, N)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from mmfusion.dataset import Dataset
from mmfusion.models.fusion import Fusion, FusionEnsemble, FusionModel, ModelConfig
from mmfusion.training.objective import objective, predict
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


# over 60 lines, a third of them docstring: one training from the dataset to the ensembles
def fit(
    dataset: Dataset,
    methods: Sequence[Method],
    model: ModelConfig,
    objectives: ObjectiveConfig,
    training: TrainingConfig,
    *,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> tuple[list[FusionEnsemble], Trained]:
    """Train every seed of every method at once, each member kept at its best epoch on the selection split (AUROC).

    Args:
        dataset: binary, with splits `train` and the one it names for selection.
        methods: of one shape: the same modalities and fusion; they may differ in active rank and prior.
        model, objectives, training: sections of the main script's Config.
        checkpoint: file to save progress to, and to go on from where it exists.
        on_epoch: called with each epoch's record, {"epoch", "loss": {term: [S]}, "score": [S]}, method-major.

    Returns:
        one ensemble of all seeds per method, and what `train` returns of all members.

    Raises:
        ValueError: methods of several shapes.
        NonFiniteLoss, InputError: as `mmfusion.training.trainer.train`.
    """
    modalities, fusion = methods[0].modalities, methods[0].fusion
    if any((method.modalities, method.fusion) != (modalities, fusion) for method in methods):
        raise ValueError("methods trained at once must have the same modalities and the same fusion")
    shape = {
        "input_dims": {name: dataset.input_dims[name] for name in modalities},
        "latent_dim": model.latent_dim,
        "hidden_dim": model.hidden_dim,
        "rank": model.rank if methods[0].has_rank else 1,
        "fusion": fusion,
        "spectral_norm": model.spectral_norm,
    }
    train_split, selection = (
        replace(split, features={name: split.features[name] for name in modalities})
        for split in (dataset.splits["train"], dataset.splits[dataset.selection])
    )
    fitted = FusionModel(**shape)
    fitted.fit_standardisation(train_split.features)
    standardisation = fitted.standardise.state_dict()

    def build(member: Member) -> FusionModel:
        built = FusionModel(**shape, active_rank=member.settings["active_rank"])
        built.standardise.load_state_dict(standardisation)
        return built

    problem = Problem(
        build,
        lambda model, batch: objective(model, batch, alignment=objectives.alignment),
        predict,
        lambda logits, target: roc_auc_score(target, logits),
    )
    trained = train(
        problem,
        _members(methods, objectives, training),
        TrainingData(train_split, selection),
        Schedule(
            epochs=training.epochs,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            patience=training.patience,
            compile=training.compile,
        ),
        device=device,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    seeds = training.seeds
    ensembles = [
        FusionEnsemble.from_members(trained.models[i * seeds : (i + 1) * seeds], **shape) for i in range(len(methods))
    ]
    return ensembles, trained


def _members(methods: Sequence[Method], objectives: ObjectiveConfig, training: TrainingConfig) -> list[Member]:
    """Every method with every seed, method-major."""
    modalities = methods[0].modalities
    weights = objectives.loss_weights("binary", modalities)
    return [
        Member(
            seed,
            weights if method.prior else {**weights, "mmd": 0.0},
            training.weight_decay,
            {"active_rank": method.active_rank},
            {name: training.modality_dropout for name in modalities if len(modalities) > 1},
        )
        for method in methods
        for seed in range(training.seeds)
    ]
