"""Contrastive losses that align the latents of one example: symmetric InfoNCE, and the jWAE paper's margin ranking."""

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from jwae_module import off_diagonal_mean, products, upcast


def info_nce(latents: Mapping[str, Tensor], temperature: float = 0.07) -> Tensor:
    """Symmetric InfoNCE on cosine similarities: each row must pick its partner among the B rows of the other modality.

    Args:
        latents: (B, L) by modality; row i of every modality belongs to example i.
        temperature: divides the similarities; 0.07 is where CLIP (Radford et al., 2021) starts.

    Returns:
        A scalar, the mean over both directions and all pairs of modalities; log B when nothing is aligned, 0 for one
        modality.

    Raises:
        ValueError: latents that are not (B, L) alike.
    """
    losses = []
    for similarities, _ in _pair_similarities(latents):
        logits = similarities / temperature  # (B, B)
        partner = torch.arange(len(logits), device=logits.device)
        losses += [F.cross_entropy(logits, partner), F.cross_entropy(logits.T, partner)]
    return _mean(losses, latents)


def margin_ranking(latents: Mapping[str, Tensor], margin: float = 0.2) -> Tensor:
    """Bidirectional hinge ranking loss, the pair alignment of the jWAE paper.

        mean_{i != j} 1/2 { [margin - s_ii + s_ij]_+ + [margin - s_ii + s_ji]_+ },  s the cosine similarity

    The published code of Mahajan et al. (2019) takes the same hinges with margin 0.2, but sums them over the batch
    (optionally the hardest negative alone); the mean keeps the weight of the term independent of the batch size.

    Args:
        latents: (B, L) by modality; row i of every modality belongs to example i.
        margin: by how much the partner must be more similar than any other row.

    Returns:
        A scalar, the mean over all pairs of modalities; 0 for one modality, or for B < 2.

    Raises:
        ValueError: latents that are not (B, L) alike.
    """
    losses = []
    for similarities, matched in _pair_similarities(latents):
        hinges = _positive_part(margin - matched[:, None] + similarities) + _positive_part(
            margin - matched + similarities
        )
        losses.append(off_diagonal_mean(hinges, 2 * max(margin, 0.0)) / 2)  # a row is no rival of itself
    return _mean(losses, latents)


def _positive_part(x: Tensor) -> Tensor:
    """max(x, 0), without the boolean mask of relu's gradient: compiled, storing it costs more than all else here."""
    return (x + x.abs()) / 2


def _pair_similarities(latents: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarities of every pair of modalities: of all rows (B, B), and of the partners (B,)."""
    shapes = {name: tuple(z.shape) for name, z in latents.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"paired latents must share one shape (B, L), got {shapes}")
    unit = [F.normalize(upcast(z), dim=-1) for z in latents.values()]
    for a, b in combinations(unit, 2):
        # the partners anew: a diagonal read is not vectorised, and its kernel took a fifth of a compiled training step
        yield products(a, b), (a * b).sum(-1)


def _mean(losses: list[Tensor], latents: Mapping[str, Tensor]) -> Tensor:
    """Mean of the pair losses; 0 where a single modality leaves nothing to align."""
    return torch.stack(losses).mean() if losses else upcast(next(iter(latents.values()))).new_zeros(())
