"""Latents of M modalities as one tensor, and the pairs of modalities that a loss compares: all, or those with a hub."""

from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor

from jwae_module import upcast


def stacked(latents: Mapping[str, Tensor], *, least: int = 1) -> Tensor:
    """(M, B, L), in at least float32, of latents (B, L) by modality.

    Raises:
        ValueError: no modality, latents that are not (B, L) alike, or B below `least`.
    """
    shapes = {name: tuple(z.shape) for name, z in latents.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"paired latents must share one shape (B, L), got {shapes}")
    if next(iter(shapes.values()))[0] < least:
        raise ValueError(f"batches of at least {least} are needed, got {shapes}")
    return upcast(torch.stack(list(latents.values())))


def modality_pairs(names: Iterable[str], hub: str | None = None) -> list[tuple[int, int]]:
    """Positions of the two modalities of each pair: all M (M - 1) / 2 pairs, or the hub with each of the M - 1 others.

    Raises:
        ValueError: a hub that is none of the names.
    """
    names = list(names)
    if hub is None:
        return list(combinations(range(len(names)), 2))
    place = hub_place(names, hub)
    return [(place, other) for other in range(len(names)) if other != place]


def hub_place(names: Iterable[str], hub: str) -> int:
    """Position of the hub among the names.

    Raises:
        ValueError: it is none of them.
    """
    names = list(names)
    if hub not in names:
        raise ValueError(f"hub must be one of {', '.join(names)}, got {hub!r}")
    return names.index(hub)


def paired(z: Tensor, names: Iterable[str], hub: str | None = None) -> tuple[Tensor, Tensor]:
    """Both sides of each of the P pairs of modalities, (P, ...) each, of z (M, ...); P is 0 for one modality.

    Raises:
        ValueError: as `modality_pairs`.
    """
    pairs = modality_pairs(names, hub)
    if not pairs:
        return z[:0], z[:0]
    return tuple(torch.stack([z[place] for place in side]) for side in zip(*pairs, strict=True))
