"""Checks of what a run is given from Python before its folder is begun: methods, further terms of the objective."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmfusion.dataset import Dataset
from mmfusion.models.fusion import FusionModel, ModelConfig
from mmfusion.training.feed import Batch
from mmfusion.training.fit import Method
from mmfusion.training.objective import Term
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

TRIED = 8  # examples that a further term is called on


class Sections(Protocol):
    """What a run's config holds, whichever command it is of."""

    training: TrainingConfig
    model: ModelConfig
    objective: ObjectiveConfig


def _untrained(method: Method, dataset: Dataset, config: Sections) -> FusionModel:
    """A model of a method as it is before training. Raises ValueError where there is none."""
    widths = {name: dataset.input_dims[name] for name in method.modalities}
    rank = config.model.rank if method.has_rank else 1
    with torch.random.fork_rng(devices=[]):
        return FusionModel(
            widths,
            config.model.latent_dim,
            config.model.hidden_dim,
            rank,
            dataset.output_dim,
            method.fusion,
            method.active_rank,
        )


def check_stacks(stacks: Sequence[Sequence[Method]], dataset: Dataset, config: Sections) -> None:
    """Raise ValueError naming the first method that cannot be trained on the dataset, or not in its stack."""
    if not stacks or not all(stacks):
        raise ValueError("stacks: give at least one method, and no empty stack")
    labels: set[str] = set()
    for stack in stacks:
        for method in stack:
            where = f"stacks: method {method.label!r}"
            if method.label in labels:
                raise ValueError(f"{where} is there twice; give each a label of its own")
            labels.add(method.label)
            unknown = [name for name in method.modalities if name not in dataset.input_dims]
            if unknown or not method.modalities:
                known = ", ".join(dataset.input_dims)
                raise ValueError(f"{where} takes {unknown[0] if unknown else 'no modality'}; the data have {known}")
            if (method.modalities, method.fusion) != (stack[0].modalities, stack[0].fusion):
                raise ValueError(f"{where} has another shape than {stack[0].label!r}; give it a stack of its own")
            try:
                _untrained(method, dataset, config)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    first = stacks[0][0]
    if first.fusion != "lmf" and not first.takes_tokens:
        raise ValueError(f"stacks: the first method, {first.label!r}, is the one explained, and needs fusion='lmf'")


def check_terms(
    further_terms: Mapping[str, tuple[float, Term]],
    stacks: Sequence[Sequence[Method]],
    dataset: Dataset,
    config: Sections,
    device: torch.device,
) -> None:
    """Call every further term once, on an untrained model of each stack and a few examples.

    Raises ValueError naming a term that fails there, or returns anything but a scalar.
    """
    split = dataset.splits["train"]
    for name, (_, term) in further_terms.items():
        for stack in stacks:
            features = {m: split.features[m][:TRIED].to(device) for m in stack[0].modalities}
            target, present = split.target[:TRIED].to(device), {}
            if config.training.modality_dropout > 0 and len(features) > 1:
                present = {m: torch.ones(len(target), device=device) for m in features}
            batch = Batch(features, target, present)
            output = _untrained(stack[0], dataset, config).to(device)(features, present=present)
            where = f"further_terms: {name!r}"
            try:
                value = term(output, batch)
            except Exception as error:  # the user's own code
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                raise ValueError(f"{where} fails on {TRIED} examples of {stack[0].label!r} ({reason})") from error
            if not isinstance(value, Tensor) or value.ndim:
                found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(f"{where} returns {found}; a term is a scalar tensor, such as a mean over the batch")
