"""Models of token sequences as the rows of an experiment: trained by folds and seeds, and scored under damage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from experiments.experiment import Run
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Split, pooled, take
from mmfusion.metrics.outcomes import PRIMARY, example_outcome
from mmfusion.models.fusion import FusionEnsemble, ModelConfig
from mmfusion.models.token_ensemble import TokenConfig, TokenEnsemble
from mmfusion.sequences import Sequences
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.grid import per_example
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

Change = Callable[[Split, int], Split]
"""what is done to a split before it is predicted: (split, seed of the draw) -> split"""


@dataclass(frozen=True)
class Row:
    """One method of an experiment, and how it is trained."""

    method: Method
    tokens: TokenConfig = field(default_factory=TokenConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def label(self) -> str:
        """Of the method."""
        return self.method.label


Trained = dict[str, TokenEnsemble | FusionEnsemble]


def train_rows(data: FoldedDataset, rows: Sequence[Row], run: Run, title: str) -> Trained:
    """Every row with every seed on every fold: one ensemble each, seed-major, then fold.

    Rows that differ in their method alone are trained at once.
    """
    stacks: dict[tuple, list[Row]] = {}
    for row in rows:
        stacks.setdefault((row.method.fusion, row.tokens, row.objective, row.training), []).append(row)
    trained: Trained = {}
    for number, ((_, tokens, objective, training), stack) in enumerate(stacks.items(), 1):
        print(f"{title}: {', '.join(row.label for row in stack)}", flush=True)
        ensembles, _ = fit_methods(
            data,
            [row.method for row in stack],
            ModelConfig(noise="none"),
            objective,
            training,
            tokens=tokens,
            device=run.device,
            checkpoint=run.checkpoints / f"{title.replace(' ', '-')}-{number}.safetensors",
        )
        trained |= {row.label: ensemble for row, ensemble in zip(stack, ensembles, strict=True)}
    return {row.label: trained[row.label] for row in rows}


def predictions_on_test(
    data: FoldedDataset, ensemble: TokenEnsemble | FusionEnsemble, change: Change | None = None, draw: int = 0
) -> np.ndarray:
    """(S, n) or (S, n, O) logits or values of every fold's test part, fold after fold, by its own members."""
    return _predicted(data, ensemble, "test", change, draw)


def predictions_on_dev(data: FoldedDataset, ensemble: TokenEnsemble | FusionEnsemble) -> np.ndarray:
    """The same of the parts that are selected on."""
    return _predicted(data, ensemble, "dev", None, 0)


def _predicted(
    data: FoldedDataset,
    ensemble: TokenEnsemble | FusionEnsemble,
    part: str,
    change: Change | None,
    draw: int,
) -> np.ndarray:
    outputs = []
    for number, fold in enumerate(data.folds):
        split = take(data.pool, getattr(fold, part))
        split = split if change is None else change(split, draw)
        members = ensemble.part(number, len(data.folds))
        found = _logits(members, split, data.task)
        outputs.append(found if data.has_columns else found.squeeze(-1))
    return torch.cat(outputs, 1).numpy()


@torch.inference_mode()
def _logits(ensemble: TokenEnsemble | FusionEnsemble, split: Split, task: str) -> Tensor:
    """(S, N, O); of models of vectors a modality whose sequence is empty is missing: its latent is 0."""
    if isinstance(ensemble, TokenEnsemble):
        return ensemble(split.features)
    features = pooled(split).features
    there = {
        name: torch.tensor([float(len(part) > 0) for part in x])
        for name, x in split.features.items()
        if isinstance(x, Sequences)
    }
    outputs = []
    for member in ensemble.members:
        outputs.append(member(features, reconstruct=False, present=there, joint=task == "multiclass").prediction)
    return torch.stack(outputs)


def scores_on_test(data: FoldedDataset, predictions: np.ndarray) -> np.ndarray:
    """(S, n) first primary outcome by test examples, larger is better: AUROC of classes, minus MAE of values."""
    return per_example(data, predictions, "test", partial(example_outcome, outcome=PRIMARY[data.task][0]))


# ---- damage ------------------------------------------------------------------------------------------------------


def hidden(*modalities: str) -> Change:
    """The split without any token of these modalities."""

    def change(split: Split, draw: int) -> Split:
        empty = {name: Sequences([part[:0] for part in split.features[name]]) for name in modalities}
        return replace(split, features=dict(split.features) | empty)

    return change


def gaussian_noise(deviations: Mapping[str, Tensor], amount: float) -> Change:
    """Every channel of every token + amount x its standard deviation (d_m,) in training x a normal number."""

    def change(split: Split, draw: int) -> Split:
        generator = torch.Generator().manual_seed(draw)
        features = {
            name: Sequences(
                [part.float() + amount * deviations[name] * torch.randn(part.shape, generator=generator) for part in x]
            )
            for name, x in sorted(split.features.items())
        }
        return replace(split, features=features)

    return change


def foreign_tokens(share: float) -> Change:
    """Each token replaced with this probability by a token of the same modality of any example of the split."""

    def change(split: Split, draw: int) -> Split:
        generator, features = torch.Generator().manual_seed(draw), {}
        for name, x in sorted(split.features.items()):
            pool = torch.cat([part.float() for part in x])
            parts = []
            for part in x:
                other = pool[torch.randint(len(pool), (len(part),), generator=generator)] if len(pool) else part.float()
                taken = torch.rand(len(part), 1, generator=generator) < share
                parts.append(torch.where(taken, other, part.float()))
            features[name] = Sequences(parts)
        return replace(split, features=features)

    return change


def shuffled_steps(modality: str) -> Change:
    """The steps of one modality in an order drawn for each example."""

    def change(split: Split, draw: int) -> Split:
        generator = torch.Generator().manual_seed(draw)
        x = [part[torch.randperm(len(part), generator=generator)] for part in split.features[modality]]
        return replace(split, features=dict(split.features) | {modality: Sequences(x)})

    return change


def shuffled_study(data: FoldedDataset, modality: str) -> FoldedDataset:
    """The study with the steps of one modality shuffled in every example, training and test: no time is left in it."""
    return replace(data, pool=shuffled_steps(modality)(data.pool, 0))


def channel_deviations(data: FoldedDataset) -> dict[str, Tensor]:
    """(d_m,) standard deviation of each channel over all tokens of the training examples, with a floor above 0."""
    rows = torch.cat([fold.train for fold in data.folds]).unique()
    found = {}
    for name, x in data.pool.features.items():
        tokens = torch.cat([part.float() for part in x[rows]])
        found[name] = tokens.std(0, correction=0).clamp_min(1e-6)
    return found
