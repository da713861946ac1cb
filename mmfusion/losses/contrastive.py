"""Contrastive losses that align the latents of one example: symmetric InfoNCE, and the jWAE paper's margin ranking."""

from collections.abc import Mapping
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
    similarities, matched = _pair_similarities(latents)
    if not len(matched):
        return matched.sum()
    logits = similarities / temperature  # (P, B, B)
    partner = torch.arange(logits.shape[-1], device=logits.device).repeat(len(logits))
    both = [F.cross_entropy(rows.flatten(0, 1), partner) for rows in (logits, logits.mT)]
    return (both[0] + both[1]) / 2


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
    similarities, matched = _pair_similarities(latents)
    if not len(matched):
        return matched.sum()
    slack = margin - matched  # (P, B)
    # the sum of max(x, 0) is half that of x and |x|: without the mask of relu's gradient
    sums = [x + x.abs() for x in (slack[:, :, None] + similarities, slack[:, None] + similarities)]
    return off_diagonal_mean(sums[0] + sums[1], 4 * max(margin, 0.0)).mean() / 4  # a row is no rival of itself


def _pair_similarities(latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosine similarities in each of the P pairs of modalities: of all rows (P, B, B), and of the partners (P, B)."""
    shapes = {name: tuple(z.shape) for name, z in latents.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"paired latents must share one shape (B, L), got {shapes}")
    unit = F.normalize(upcast(torch.stack(list(latents.values()))), dim=-1)  # (M, B, L)
    pairs = list(combinations(unit, 2))
    if not pairs:
        return unit.new_zeros(0, unit.shape[1], unit.shape[1]), unit.new_zeros(0, unit.shape[1])
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))  # (P, B, L)
    # the partners anew: a diagonal read is not vectorised, and its kernel took a fifth of a compiled training step
    return products(a, b), (a * b).sum(-1)
