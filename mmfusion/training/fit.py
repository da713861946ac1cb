"""Fit jWAE-LMF or a baseline on one dataset, or on the folds of one, all seeds at once.

ensembles, trained = fit_methods(dataset, [Method("jWAE-LMF", ("image", "text"))], ModelConfig(), ObjectiveConfig(),
                                 TrainingConfig(seeds=5))
ensembles[0].predict(dataset.splits["test"].features)  # (S, N)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfusion.data.folds import FoldedDataset, fold_datasets, target_scale
from mmfusion.dataset import Dataset, Fold, Split, pooled
from mmfusion.metrics.tasks import balanced_weights, selection_score
from mmfusion.models.fusion import Fusion, FusionEnsemble, FusionModel, ModelConfig
from mmfusion.models.token_ensemble import MODELS, TokenConfig, TokenEnsemble, TokenFusion
from mmfusion.models.vilt import TransformerStart, own_embeddings, read_vilt
from mmfusion.models.whitening import whiten_latents
from mmfusion.training.feed import Member
from mmfusion.training.objective import (
    DIRECTIONAL,
    DIRECTIONS,
    PRIOR_TERMS,
    Term,
    objective,
    predict,
    predict_tokens,
    token_objective,
)
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig
from mmfusion.training.trainer import Problem, Schedule, Trained, TrainingData, train


@dataclass(frozen=True)
class Method:
    """One line of the score table: a model trained with every seed."""

    label: str
    modalities: tuple[str, ...]
    fusion: Fusion | TokenFusion = "lmf"
    active_rank: int | None = None
    """the first k of the model's rank terms; default: all"""
    prior: bool = True
    """trained with the MMD to the prior, at the weight of the objective"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """of loss terms, where they are not those of the objective"""
    modality_dropout: float | None = None
    """default: that of the training"""

    @property
    def takes_tokens(self) -> bool:
        """False for models of one vector a modality; they see the mean of a sequence's tokens."""
        return self.fusion in MODELS

    @property
    def has_rank(self) -> bool:
        """False for one modality: its head is an affine map."""
        return len(self.modalities) > 1


def fit_methods(
    datasets: Dataset | Sequence[Dataset] | FoldedDataset,
    methods: Sequence[Method],
    model: ModelConfig,
    objectives: ObjectiveConfig,
    training: TrainingConfig,
    *,
    tokens: TokenConfig | None = None,
    further_terms: Mapping[str, tuple[float, Term]] | None = None,
    class_weights: Tensor | None = None,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> tuple[list[FusionEnsemble | TokenEnsemble], Trained]:
    """Train every seed of every method on every fold at once, each member kept at its best epoch, or its last.

    Args:
        datasets: one, with splits `train` and the one it names for selection; or the folds of one, pooled or not.
        methods: of one shape: the same modalities and fusion; they may differ in active rank and prior.
        model, objectives, training: sections of the main script's Config.
        tokens: a further section, for methods that take tokens; default as its class.
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
    if not isinstance(datasets, FoldedDataset):
        datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    first = datasets if isinstance(datasets, FoldedDataset) else datasets[0]
    data, target = _training_data(datasets, methods[0])
    if fusion == "wma":  # benchmarks.transformer_defaults: what helps the jWAE models keeps it from learning
        training = replace(training, modality_dropout=(tokens or TokenConfig()).transformer_modality_dropout)
    family = family_of(methods[0], data.train, first, model, tokens)
    fitted = [_fitted(family, data, fold, first.task) for fold in data.folds]

    def build(member: Member) -> nn.Module:
        built = family.build(member.settings["active_rank"])
        built.standardise.load_state_dict(fitted[member.fold].standardise.state_dict())
        built.rescale.load_state_dict(fitted[member.fold].rescale.state_dict())
        if family.start is not None:
            family.start.fill(built)
        return built

    scale = target_scale(target) if first.task == "regression" else None
    if class_weights is None and training.class_weight == "balanced":
        class_weights = balanced_weights(target, first.task, first.output_dim)
    terms = {
        "task": first.task,
        "scale": 1.0 if scale is None else scale.to(device),
        "class_weights": None if class_weights is None else class_weights.to(device),
        "prior": objectives.prior,
    }
    score = selection_score(first.task, scale, training.select_by == "log_loss", class_weights)
    of_terms = objectives.token_weights if methods[0].takes_tokens else objectives.loss_weights
    term_weights = of_terms(first.task, modalities)
    if fusion == "wma":  # has no jWAE
        term_weights = {n: w for n, w in term_weights.items() if n not in (*PRIOR_TERMS, "reconstruction")}
    term_weights |= {name: weight for name, (weight, _) in (further_terms or {}).items()}
    members = _members(methods, term_weights, training, len(data.folds))
    directions = (DIRECTIONS, model.latent_dim) if set(term_weights) & set(DIRECTIONAL) else None
    if methods[0].takes_tokens:
        if further_terms:
            raise ValueError("further terms are of models of one vector a modality, not of tokens")
        # what no member weighs is not computed: transport plans alone are a tenth of a transformer's step
        weighed = {name for member in members for name, weight in member.loss_weights.items() if weight}
        members = [
            replace(member, loss_weights={n: w for n, w in member.loss_weights.items() if n in weighed})
            for member in members
        ]
        transport = objectives.transport_term
        problem = Problem(
            build,
            lambda model, batch: token_objective(model, batch, **terms, transport=transport, wanted=weighed),
            partial(predict_tokens, task=first.task),
            score,
            directions,
            fitted[0].uniforms,
        )
    else:
        further = {name: term for name, (_, term) in (further_terms or {}).items()}
        alignment = objectives.alignment
        problem = Problem(
            build,
            lambda model, batch: objective(model, batch, **terms, alignment=alignment, further=further),
            partial(predict, task=first.task),
            score,
            directions,
        )
    schedule = Schedule(
        epochs=training.epochs,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        annealing=training.annealing,
        patience=training.patience,
        keep=training.keep,
        compile=training.compile,
        # a transformer's products are wide enough to fill a CPU member by member, and its attention is fused there
        stacked=fusion != "wma" or torch.device(device).type != "cpu",
        warm_up=objectives.token_warm_up if methods[0].takes_tokens else {},
    )
    trained = train(problem, members, data, schedule, device=device, checkpoint=checkpoint, on_epoch=on_epoch)
    if fusion == "lmf" and model.spectral_norm is None:
        give_prior(trained.models, members, data)
    count = training.seeds * len(data.folds)
    ensembles = [
        family.ensemble.from_members(trained.models[i * count : (i + 1) * count], **family.shape, task=first.task)
        for i in range(len(methods))
    ]
    return ensembles, trained


def give_prior(models: Sequence[FusionModel], members: Sequence[Member], data: TrainingData) -> None:
    """Mean 0 and covariance I to the latents of those that were trained towards the prior (`whiten_latents`)."""
    for model, member in zip(models, members, strict=True):
        if any(member.loss_weights.get(name) for name in PRIOR_TERMS):
            rows = data.folds[member.fold].train
            whiten_latents(model, {name: x[rows] for name, x in data.train.features.items()})


@dataclass(frozen=True)
class Family:
    """Models of one shape, and the ensemble of them."""

    ensemble: type[FusionEnsemble] | type[TokenEnsemble]
    shape: dict[str, object]
    """arguments of the ensemble's constructor, `members` and `task` apart"""
    start: TransformerStart | None = None
    """initial layers of every member, where they are not drawn"""

    def build(self, active_rank: int | None = None) -> nn.Module:
        """One member, its weights drawn from torch's generator."""
        if self.ensemble is FusionEnsemble:
            return FusionModel(**self.shape, active_rank=active_rank)
        shape = {name: value for name, value in self.shape.items() if name != "fusion"}
        ranks = {} if self.shape["fusion"] == "wma" else {"active_rank": active_rank}
        return MODELS[self.shape["fusion"]](**shape, **ranks)


def family_of(
    method: Method, train: Split, dataset: Dataset | FoldedDataset, model: ModelConfig, tokens: TokenConfig | None
) -> Family:
    """The models of a method, as the configs' sections have them; `train` holds its features."""
    tokens = tokens or TokenConfig()
    shape: dict[str, object] = {
        "input_dims": {name: train.features[name].shape[-1] for name in method.modalities},
        "output_dim": dataset.output_dim,
        "fusion": method.fusion,
    }
    if method.fusion == "wma":
        longest = max(x.shape[1] for x in train.features.values())
        shape |= {
            "width": tokens.transformer_width,
            "layers": tokens.transformer_layers,
            "heads": tokens.transformer_heads,
            "places": longest,
            "dropout": tokens.transformer_dropout,
        }
        if tokens.transformer_weights is None:
            return Family(TokenEnsemble, shape)
        start = read_vilt(tokens.transformer_weights)
        shape |= start.shape
        shape["embedded_inputs"] = own_embeddings(dataset.provenance, shape["input_dims"], shape["width"])
        return Family(TokenEnsemble, shape, start)
    rank = model.rank if method.has_rank else 1
    shape |= {"latent_dim": model.latent_dim, "hidden_dim": model.hidden_dim, "rank": rank}
    if method.fusion == "transport":
        return Family(TokenEnsemble, shape | {"plan": tokens.plan, "band": tokens.band})
    noise = model.noise if method.fusion == "lmf" else "none"
    return Family(FusionEnsemble, shape | {"spectral_norm": model.spectral_norm, "noise": noise})


def _training_data(datasets: Sequence[Dataset] | FoldedDataset, method: Method) -> tuple[TrainingData, Tensor]:
    """What is trained and selected on, as the method takes it; and the targets of all that any fold trains on."""
    if isinstance(datasets, FoldedDataset) or len(datasets) > 1:
        folded = datasets if isinstance(datasets, FoldedDataset) else fold_datasets(datasets)
        rows = torch.cat([fold.train for fold in folded.folds]).unique()
        pool = _taken(folded.pool, replace(method, modalities=tuple(sorted(method.modalities))))
        return TrainingData(pool, pool, folded.folds), pool.target[rows]
    splits = datasets[0].splits
    train_split, selection = (_taken(splits[name], method) for name in ("train", datasets[0].selection))
    fold = Fold(torch.arange(len(train_split)), torch.arange(len(selection)))
    return TrainingData(train_split, selection, [fold]), train_split.target


def _taken(split: Split, method: Method) -> Split:
    """The method's modalities: sequences where it takes tokens, else one vector each."""
    own = replace(split, features={name: split.features[name] for name in method.modalities})
    return own if method.takes_tokens else pooled(own)


def _fitted(family: Family, data: TrainingData, fold: Fold, task: str) -> nn.Module:
    """A model whose standardisation, and a regression's rescaling, are those of the fold's training part."""
    model = family.build()
    for name, x in data.train.features.items():
        model.standardise[name].fit(x[fold.train])
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
            _weights(method, weights),
            training.weight_decay,
            {"active_rank": method.active_rank},
            {name: _dropout(method, training) for name in modalities if len(modalities) > 1},
            fold,
            training.feature_dropout,
        )
        for method in methods
        for seed in range(training.first_seed, training.first_seed + training.seeds)
        for fold in range(folds)
    ]


def _weights(method: Method, weights: Mapping[str, float]) -> dict[str, float]:
    """The objective's, but for what the method says otherwise."""
    without = {} if method.prior else {name: 0.0 for name in PRIOR_TERMS if name in weights}
    unknown = set(method.weights) - set(weights)
    if unknown:
        raise ValueError(f"{method.label!r} weighs {min(unknown)!r}; its loss terms are {', '.join(weights)}")
    return dict(weights) | without | dict(method.weights)


def _dropout(method: Method, training: TrainingConfig) -> float:
    return training.modality_dropout if method.modality_dropout is None else method.modality_dropout
