"""Sequences of which it is known what a model of tokens can gain: the positive controls of `temporal` and `wma`."""

from dataclasses import replace

import torch

from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.sequences import Sequences

PLANTED = 400  # examples trained on


def planted_steps(data: FoldedDataset, seed: int = 0) -> FoldedDataset:
    """Two classes by the sign of the mean over 8 steps of a_t b_t, a_t and b_t in 8 noisy channels each."""
    generator = torch.Generator().manual_seed(seed)
    count, steps = 2 * PLANTED, 8
    a, b = torch.randn(2, count, steps, generator=generator)
    target = ((a * b).mean(1) > 0).float()
    directions = torch.randn(2, 8, generator=generator)
    features = {
        name: Sequences(list(x[..., None] * direction + 0.3 * torch.randn(count, steps, 8, generator=generator)))
        for name, x, direction in zip(data.input_dims, (a, b), directions, strict=True)
    }
    return _study(data, "planted steps", features, target)


def planted_copies(data: FoldedDataset, seed: int = 0) -> FoldedDataset:
    """Two modalities that say the same, one clearly and one with noise: a model leans on the first and need not.

    Four tokens each, of 16 channels: u_t A + .05 noise, and the same u_t B + noise in an order drawn for each example,
    u_t in 4 dimensions; two classes by the sign of the mean over tokens of one direction of u_t.
    """
    generator = torch.Generator().manual_seed(seed)
    count, steps, hidden, width = 5 * PLANTED // 2, 4, 4, 16
    u = torch.randn(count, steps, hidden, generator=generator)
    target = ((u @ torch.randn(hidden, generator=generator)).mean(1) > 0).float()
    maps = torch.randn(2, hidden, width, generator=generator) / hidden**0.5
    order = torch.rand(count, steps, generator=generator).argsort(1)
    shuffled = u.gather(1, order[..., None].expand(-1, -1, hidden))
    features = {
        name: Sequences(list(x @ to_channels + noise * torch.randn(count, steps, width, generator=generator)))
        for name, x, to_channels, noise in zip(data.input_dims, (u, shuffled), maps, (0.05, 2.0), strict=False)
    }
    return _study(data, "planted copies", features, target)


def _study(data: FoldedDataset, name: str, features: dict[str, Sequences], target: torch.Tensor) -> FoldedDataset:
    """One fold: the first examples for training, as many last ones for testing; selected on what is between, if any."""
    order = torch.arange(len(target))
    train, dev, test = order[:PLANTED], order[PLANTED:-PLANTED], order[-PLANTED:]
    pool = Split(features, target, [str(k) for k in order.tolist()])
    fold = Fold(train, dev if len(dev) else train, test)
    plain = {"notes": [], "provenance": {}, "label_range": None, "class_names": ("below 0", "above 0")}
    return replace(data, name=name, task="binary", pool=pool, folds=[fold], **plain)
