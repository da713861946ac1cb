"""Batches of S members: whose examples they are, and the random numbers that are handed in with them.

Members with the same seed and fold see the same batches in the same order. The random numbers of an epoch are a
function of (seed, epoch, step) alone, never of a generator's state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfusion.dataset import Fold, Split
from mmfusion.sequences import Sequences, Tokens, token_counts

POOLED_BATCHES = 8  # of sequences, that are sorted by length together


class Batch(NamedTuple):
    """B examples as the objective sees them."""

    features: dict[str, Tensor | Tokens]  # (B, d_m), or sequences of B examples
    target: Tensor  # (B,) or (B, O)
    present: dict[str, Tensor] = {}  # noqa: RUF012 (B,) of 1 and 0 where modalities are dropped; empty where none is
    kept: dict[str, Tensor] = {}  # noqa: RUF012 (B, d_m) of 0 and 1 / (1 - rate) where features are dropped; or empty
    directions: tuple[Tensor, ...] = ()  # one (K, L), where the objective looks at latents along random directions
    uniforms: tuple[Tensor, ...] = ()  # one (B, K) of [0, 1), where the objective asks for them


@dataclass(frozen=True)
class Member:
    """One training among S."""

    seed: int
    loss_weights: Mapping[str, float]
    """weight of each term that the objective names; a term without a weight is an error"""
    weight_decay: float = 0.0
    """decoupled (AdamW), on weight matrices alone"""
    settings: Mapping[str, float | int | str] = field(default_factory=dict)
    """whatever `build` needs to know; part of the checkpoint's identity"""
    dropout: Mapping[str, float] = field(default_factory=dict)
    """rate at which each modality is hidden in training, independently; a modality that is not named is always seen"""
    fold: int = 0
    """which of the folds it is trained on"""
    feature_dropout: float | Mapping[str, float] = 0.0
    """rate at which each feature of each example is set to its mean in training, a multiple of 1/256; of all
    modalities, or of each that is named"""


def epoch_order(seed: int, epoch: int, examples: int) -> Tensor:
    """Order (examples,) in which the members of `seed` see the training examples in `epoch`."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(examples))


def alike_in_length(rows: Tensor, counts: Tensor, batch_size: int, epoch: int) -> Tensor:
    """Rows (n,) such that batches hold examples of like length: padding, and attention to it, cost less.

    Every few batches' examples are sorted by their `counts` (N,) of tokens, stably, and cut into batches anew; these
    follow each other in an order of the epoch's own, the same for all seeds, so that members stacked are all at long
    or all at short ones.
    """
    parts = []
    for k, pool in enumerate(rows.split(POOLED_BATCHES * batch_size)):
        batches = pool[counts[pool].argsort(stable=True)].split(batch_size)
        order = np.random.default_rng([epoch, 5, k]).permutation(len(batches))
        parts.extend(batches[i] for i in order)
    return torch.cat(parts)


def epoch_uniforms(seed: int, epoch: int, examples: int, modalities: int) -> Tensor:
    """Uniform numbers (examples, modalities) of `seed` and `epoch`: a modality of rate p is hidden where they are < p.

    All rates share them, so what is hidden at a low rate is hidden at every higher one too.
    """
    return torch.from_numpy(np.random.default_rng([seed, epoch, 1]).random((examples, modalities), dtype=np.float32))


def batch_bytes(seed: int, epoch: int, step: int, examples: int, features: int) -> Tensor:
    """Uniform bytes (examples, features) of a step: a feature of rate p is dropped where they are < 256 p."""
    generator = np.random.default_rng([seed, epoch, 2, step])
    return torch.from_numpy(generator.integers(0, 256, (examples, features), dtype=np.uint8))


def step_directions(seed: int, epoch: int, step: int, shape: tuple[int, int]) -> Tensor:
    """Normal numbers (K, L) of a step: directions that no coordinate is preferred in."""
    return torch.from_numpy(np.random.default_rng([seed, epoch, 3, step]).standard_normal(shape, dtype=np.float32))


def step_uniforms(seed: int, epoch: int, step: int, shape: tuple[int, int]) -> Tensor:
    """Uniform numbers (B, K) of a step, in [0, 1): what a model drops, which of an example's tokens is looked at."""
    return torch.from_numpy(np.random.default_rng([seed, epoch, 4, step]).random(shape, dtype=np.float32))


class SharedRows:
    """(S, ...) of which entry s is row `row[s]` of K values (K, ...): nothing is copied before it is asked for."""

    def __init__(self, values: Tensor, row: Sequence[int]) -> None:
        self.values, self.row = values, row
        self.shape = torch.Size([len(row), *values.shape[1:]])

    def __getitem__(self, s: int) -> Tensor:
        return self.values[self.row[s]]


class Feed:
    """The training examples on the device, and the batches that each member takes of them."""

    def __init__(
        self,
        data: Split,
        members: list[Member],
        folds: Sequence[Fold],
        batch_size: int,
        device: torch.device,
        directions: tuple[int, int] | None = None,
        uniforms: int = 0,
        stacked: bool = True,
    ) -> None:
        self.directions, self.uniforms, self.stacked = directions, uniforms, stacked
        # many sequences stay where they are, perhaps in a file: a batch of them goes to the device
        self.features = {n: x.held() if isinstance(x, Sequences) else x.to(device) for n, x in data.features.items()}
        self.target = data.target.to(device)
        self.counts = token_counts(data.features)
        # members of one seed and fold share their batches
        keys = sorted({(member.seed, member.fold) for member in members})
        self.orders = [(seed, folds[fold].train) for seed, fold in keys]
        self.row = torch.tensor([keys.index((member.seed, member.fold)) for member in members])  # (S,) into orders
        smallest = min(len(rows) for _, rows in self.orders)
        self.batch_size = min(batch_size, smallest)
        self.steps = smallest // self.batch_size  # a last, smaller batch is left out: all batches weigh the same
        unknown = {name for member in members for name in member.dropout} - set(self.features)
        if unknown:
            raise ValueError(f"dropout of {sorted(unknown)}: the data have modalities {list(self.features)}")
        self.rates = {
            name: torch.tensor([float(member.dropout.get(name, 0)) for member in members], device=device)
            for name in self.features
            if any(member.dropout.get(name, 0) for member in members)
        }  # (S,) of every modality that some member drops
        self.feature_rates = _feature_rates(members, list(self.features), device)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Batches with features (S, B, d_m), target (S, B) and, if a modality is dropped, present (S, B)."""
        device, seen = self.target.device, self.steps * self.batch_size
        orders = [rows[epoch_order(seed, epoch, len(rows))[:seen]] for seed, rows in self.orders]
        if self.counts is not None:
            orders = [alike_in_length(rows, self.counts, self.batch_size, epoch) for rows in orders]
        orders = torch.stack(orders)[self.row].to(device)  # (S, n)
        if self.rates:
            names = list(self.features)
            uniforms = torch.stack([epoch_uniforms(seed, epoch, seen, len(names)) for seed, _ in self.orders])
            uniforms = uniforms[self.row].to(device)  # (S, n, M)
        for k in range(self.steps):
            part = slice(k * self.batch_size, (k + 1) * self.batch_size)
            rows = orders[:, part]  # (S, B)
            present = {
                name: (uniforms[:, part, names.index(name)] >= rate[:, None]).float()
                for name, rate in self.rates.items()
            }
            features = {name: self._rows(x, rows) for name, x in self.features.items()}
            drawn = (
                self._drawn(step_directions, epoch, k, self.directions),
                self._drawn(step_uniforms, epoch, k, (self.batch_size, self.uniforms) if self.uniforms else None),
            )
            yield Batch(features, self.target[rows], present, self._kept(epoch, k, features), *drawn)

    def _rows(self, x: Tensor | Sequences, rows: Tensor) -> Tensor | Tokens:
        """Examples (S, B) on the device; sequences that members share are read once, and copied only for a stack."""
        if not isinstance(x, Sequences):
            return x[rows]
        own = self.row.tolist()
        padded = x.padded(rows[[own.index(k) for k in range(len(self.orders))]].cpu(), rows.device)
        if own == list(range(len(self.orders))):
            return padded
        if not self.stacked:
            return Tokens(SharedRows(padded.values, self.row.tolist()), SharedRows(padded.mask, self.row.tolist()))
        row = self.row.to(rows.device)
        return Tokens(padded.values[row], padded.mask[row])

    def _drawn(
        self, draw: Callable[..., Tensor], epoch: int, step: int, shape: tuple[int, int] | None
    ) -> tuple[Tensor, ...]:
        """One (S, *shape), or nothing."""
        if shape is None:
            return ()
        drawn = torch.stack([draw(seed, epoch, step, shape) for seed, _ in self.orders])
        return (drawn[self.row].to(self.target.device),)

    def _kept(self, epoch: int, step: int, features: dict[str, Tensor | Tokens]) -> dict[str, Tensor]:
        """What each feature (S, B, d_m) is multiplied by, once standardised, in all tokens; empty: none is dropped."""
        if self.feature_rates is None:
            return {}
        widths = [(x.values if isinstance(x, Tokens) else x).shape[-1] for x in features.values()]
        drawn = [batch_bytes(seed, epoch, step, self.batch_size, sum(widths)) for seed, _ in self.orders]
        drawn = torch.stack(drawn).to(self.target.device)[self.row.to(self.target.device)]  # (S, B, all d)
        kept = {}
        for name, part in zip(features, drawn.split(widths, -1), strict=True):
            rates = self.feature_rates[name][:, None, None]
            kept[name] = (part >= 256 * rates).float() / (1 - rates)
        return kept


def _feature_rates(members: Sequence[Member], names: Sequence[str], device: torch.device) -> dict[str, Tensor] | None:
    """{modality: (S,)} rates of feature dropout, multiples of 1/256; None where no feature is dropped."""
    rates = {name: [] for name in names}
    for member in members:
        shared = member.feature_dropout
        own = shared if isinstance(shared, Mapping) else dict.fromkeys(names, shared)
        if unknown := set(own) - set(names):
            raise ValueError(f"feature dropout of {sorted(unknown)}: the data have modalities {list(names)}")
        for name in names:
            rates[name].append(round(256 * own.get(name, 0)) / 256)
    if not any(any(x) for x in rates.values()):
        return None
    return {name: torch.tensor(x, device=device) for name, x in rates.items()}
