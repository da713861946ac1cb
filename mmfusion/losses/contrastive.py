"""Contrastive losses that align the latents of one example.

Of pairs of modalities: symmetric InfoNCE, and the jWAE paper's margin ranking. Of tuples of all M modalities: the
volume that they span (GRAM), their multilinear inner product (Symile), and an LMF layer as a critic in its place.

Where several rows are of one item, as the captions of one image, `items` says so: these are no rivals of each other.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jwae_module import off_diagonal_mean, products, upcast
from lmf_module import LowRankMultimodalFusion
from mmfusion.losses.modality_pairs import hub_place, paired, stacked


def info_nce(
    latents: Mapping[str, Tensor],
    temperature: float | Tensor = 0.07,
    hub: str | None = None,
    items: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE on cosine similarities: each row must pick its partner among the B rows of the other modality.

    Args:
        latents: (B, L) by modality; row i of every modality belongs to example i.
        temperature: divides the similarities, a scalar; 0.07 is where CLIP (Radford et al., 2021) starts.
        hub: compare each modality with this one alone, M - 1 pairs; default all M (M - 1) / 2.
        items: (B,) number of each row's item; default: every row is an item of its own.

    Returns:
        A scalar, the mean over both directions and all pairs of modalities; log B when nothing is aligned, 0 for one
        modality.

    Raises:
        ValueError: latents that are not (B, L) alike, or a hub that is none of them.
    """
    similarities, matched = _pair_similarities(latents, hub)
    if not len(matched):
        return matched.sum()
    return _both_directions(similarities / temperature, items)  # (P, B, B)


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


def gram_volume_contrast(
    latents: Mapping[str, Tensor],
    temperature: float | Tensor = 0.07,
    hub: str | None = None,
    epsilon: float = 1e-6,
    items: Tensor | None = None,
) -> Tensor:
    """GRAM (Cicchetti et al., ICLR 2025): an example's M unit vectors must span less volume than mixed ones.

        V(i, j) = sqrt(det G + epsilon),   G the Gram matrix of row i of the anchor and row j of all others

    Row i of the anchor must pick the others' tuple i among B by logits -V / temperature, and the tuple the row. For two
    modalities V is the sine of their angle: opposite vectors count as aligned. For three or more V is 0 for every
    linear dependence: once two of the others agree, mixed tuples have no volume either. Exact alignment of all is thus
    not the minimum but log B, with a gradient of 0.

    Args:
        latents: (B, L) by modality; row i of every modality belongs to example i.
        temperature: divides the volumes, which lie in [0, 1].
        hub: the anchor; default each modality in turn, at M times the cost.
        epsilon: inside the root, which has no gradient at volume 0; above what float32 rounding leaves of det G.
        items: as `info_nce`.

    Returns:
        A scalar, mean over both directions and the anchors; log B when nothing is aligned, 0 for one modality.

    Raises:
        ValueError: latents that are not (B, L) alike, or a hub that is none of them.
    """
    unit = F.normalize(stacked(latents), dim=-1)  # (M, B, L)
    if len(unit) < 2:
        return unit.new_zeros(())
    tuples = unit.transpose(0, 1)  # (B, M, L)
    gram = products(tuples, tuples)  # (B, M, M)
    logits = []
    for anchor, others in _anchors(latents, hub):
        adjugate, determinant = _adjugate(gram[:, others][:, :, others])  # (B, M - 1, M - 1), (B,)
        c = products(unit[anchor], tuples[:, others])  # (B_j, B_i, M - 1): cosines of row i with what tuple j holds
        # det [[1, c^T], [c, G]] = det G - c^T adj(G) c, without a division that a singular G would not allow
        squared = determinant - (products(c, adjugate) * c).sum(-1).T  # (B_i, B_j)
        logits.append(-(squared.clamp_min(0) + epsilon).sqrt() / temperature)
    return _both_directions(torch.stack(logits), items)


def multilinear_contrast(
    latents: Mapping[str, Tensor],
    temperature: float | Tensor = 0.07,
    hub: str | None = None,
    permutations: Mapping[str, Tensor] | None = None,
    items: Tensor | None = None,
) -> Tensor:
    """Symile (Saporta et al., NeurIPS 2024): InfoNCE whose similarity is the inner product of M vectors.

        s(i, j) = sum_k z_ik prod_m z^m_{p_m(j) k}   of row i of the anchor and, at j != i, others from B mixed tuples

    At j = i stands the example's own tuple. The others are permuted each by itself, so that negatives break the pairs
    among them too: what three modalities say only together (c = a xor b) is seen, which no pairwise loss does. A mixed
    tuple that happens to be the anchor's own is left out (the published loss keeps it, being rare there).

    Rows have length L^(1/2 - 1/M), at which s is the cosine for two modalities and has its standard deviation, L^-1/2,
    for unrelated rows at every M.

    Args:
        latents: (B, L) by modality; row i of every modality belongs to example i.
        temperature: divides the inner products.
        hub: the only anchor; default the mean over every modality as anchor.
        permutations: of the B rows, (B,) integers by modality. Default cyclic shifts by 1, 2, ..., M in the order of
            the modalities, none for two modalities (then it is `info_nce`). For three or more the loss is unchanged by
            renaming modalities where permutations are handed in, else on average over shuffled batches.
        items: as `info_nce`; a mixed tuple all of whose rows are of the anchor's item is no rival.

    Returns:
        A scalar; log B when nothing is aligned, 0 for one modality.

    Raises:
        ValueError: latents that are not (B, L) alike, a hub that is none of them, or permutations that do not fit.
    """
    rows = _multilinear_rows(stacked(latents))
    return _multilinear_loss(rows, None, latents, temperature, hub, permutations, items)


class MultilinearCritic(nn.Module):
    """An LMF layer as trainable critic of tuples, s = sum_r w_r prod_m (A_m[r] z_m + c_m[r]), in Symile's place.

    Symile is its case R = L, A_m[r] = e_r, c = 0, w = 1 (`set_identity`), where every modality must use the same
    coordinates; here each has its own factors, and the rows c_m let it score subsets of the modalities too.

    Args:
        modalities: their names.
        latent_dim: width L of every latent.
        rank: number of rank terms R; default L.

    Raises:
        ValueError: as `LowRankMultimodalFusion`.
    """

    def __init__(self, modalities: Sequence[str], latent_dim: int, rank: int | None = None) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.layer = LowRankMultimodalFusion([latent_dim] * len(self.modalities), 1, rank or latent_dim)

    @torch.no_grad()
    def set_identity(self) -> None:
        """Make the critic Symile's inner product.

        Raises:
            ValueError: the rank is not the latent width.
        """
        if self.layer.rank != self.layer.input_dims[0]:
            raise ValueError(f"identity factors need rank {self.layer.input_dims[0]}, this layer has {self.layer.rank}")
        for projection in self.layer.projections:
            nn.init.eye_(projection.weight)
            projection.bias.zero_()
        self.layer.rank_weights.fill_(1)
        self.layer.bias.zero_()

    def score(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Score (B,) of the tuples that rows (B, L) of all modalities form, scaled as in `multilinear_contrast`."""
        rows = _multilinear_rows(stacked(self._ordered(latents)))
        return self.layer(list(rows))[..., 0]

    def forward(
        self,
        latents: Mapping[str, Tensor],
        temperature: float | Tensor = 0.07,
        hub: str | None = None,
        permutations: Mapping[str, Tensor] | None = None,
        items: Tensor | None = None,
    ) -> Tensor:
        """`multilinear_contrast` of the critic's scores, a scalar; arguments and errors as there."""
        latents = self._ordered(latents)
        rows = _multilinear_rows(stacked(latents))
        factors = [upcast(project(z)) for z, project in zip(rows, self.layer.projections, strict=True)]  # M of (B, R)
        weights = self.layer.rank_weights * self.layer.rank_mask  # (R,); the bias would cancel
        return _multilinear_loss(factors, weights, latents, temperature, hub, permutations, items)

    def _ordered(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if latents.keys() != set(self.modalities):
            raise ValueError(f"expected latents of {', '.join(self.modalities)}, got {', '.join(latents)}")
        return {name: latents[name] for name in self.modalities}


def _multilinear_rows(z: Tensor) -> Tensor:
    """Rows (M, B, L) of length L^(1/2 - 1/M)."""
    return F.normalize(z, dim=-1) * z.shape[-1] ** (1 / 2 - 1 / len(z))


def _multilinear_loss(
    factors: Sequence[Tensor],
    weights: Tensor | None,
    names: Mapping[str, Tensor],
    temperature: float | Tensor,
    hub: str | None,
    permutations: Mapping[str, Tensor] | None,
    items: Tensor | None,
) -> Tensor:
    """Mean over anchors of the cross-entropy of sum_r w_r prod_m p_mr, factors p, M of (B, R), and weights (R,)."""
    if len(factors) < 2:
        return factors[0].new_zeros(())
    batch, device = len(factors[0]), factors[0].device
    places = _permutations(names, batch, permutations, device)  # (M, B)
    rows = torch.arange(batch, device=device)
    mixed = [p[place] for p, place in zip(factors, places, strict=True)]  # M of (B, R)
    items = rows if items is None else items
    own = rows[:, None] == rows  # (B, B)
    losses = []
    for anchor, others in _anchors(names, hub):
        first = factors[anchor] if weights is None else factors[anchor] * weights  # (B, R)
        positive = (first * _product(factors, others)).sum(-1)  # (B,)
        logits = torch.where(own, positive[:, None], products(first, _product(mixed, others)))  # (B, B)
        false_negative = (items[places[others]][:, None] == items[:, None]).all(0) & ~own
        logits = (logits / temperature).masked_fill(false_negative, -torch.inf)
        losses.append(F.cross_entropy(logits, rows))
    return torch.stack(losses).mean()


def _product(factors: Sequence[Tensor], chosen: list[int]) -> Tensor:
    """Elementwise product (B, R) of some of the factors; `torch.prod` looks for zeros in its gradient."""
    return reduce(torch.mul, [factors[m] for m in chosen])


def _permutations(
    names: Mapping[str, Tensor], batch: int, given: Mapping[str, Tensor] | None, device: torch.device
) -> Tensor:
    """(M, B) integers: which row of modality m stands in mixed tuple j."""
    if given is None:
        rows = torch.arange(batch, device=device)
        # the only other of two modalities needs no mixing, and shifted its own row would be hidden by the diagonal
        shifts = [0, 0] if len(names) == 2 else range(1, len(names) + 1)
        return torch.stack([rows.roll(-shift) for shift in shifts])
    shapes = {name: tuple(place.shape) for name, place in given.items()}
    if shapes != dict.fromkeys(names, (batch,)):
        raise ValueError(f"permutations must be ({batch},) of {', '.join(names)}, got {shapes}")
    return torch.stack([given[name] for name in names])


def _anchors(names: Mapping[str, Tensor], hub: str | None) -> list[tuple[int, list[int]]]:
    """Positions of each anchor, every modality or the hub alone, and of the others."""
    everything = range(len(names))
    anchors = everything if hub is None else [hub_place(names, hub)]
    return [(anchor, [m for m in everything if m != anchor]) for anchor in anchors]


def _adjugate(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Adjugate (..., n, n) and determinant (...) by Faddeev and LeVerrier: polynomials, with a gradient at any rank.

    In float64: float32 loses 1e-5 of cosines near 1 at n = 5. Results have the dtype of the matrices (symmetric).
    """
    dtype, matrices = matrices.dtype, matrices.double()
    size = matrices.shape[-1]
    identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    partial = identity.expand_as(matrices)
    for k in range(1, size + 1):
        product = products(matrices, partial)  # both symmetric, the transpose does not matter
        coefficient = -product.diagonal(dim1=-2, dim2=-1).sum(-1) / k  # of the characteristic polynomial
        if k < size:
            partial = product + coefficient[..., None, None] * identity
    return ((-1) ** (size - 1) * partial).to(dtype), ((-1) ** size * coefficient).to(dtype)


def _both_directions(logits: Tensor, items: Tensor | None = None) -> Tensor:
    """Cross-entropy of rows and of columns, mean over problems (P, B, B) whose partners are on the diagonal."""
    rows = torch.arange(logits.shape[-1], device=logits.device)
    if items is not None:
        false_negative = (items[:, None] == items) & (rows[:, None] != rows)  # (B, B)
        logits = logits.masked_fill(false_negative, -torch.inf)
    partner = rows.repeat(len(logits))
    both = [F.cross_entropy(rows.flatten(0, 1), partner) for rows in (logits, logits.mT)]
    return (both[0] + both[1]) / 2


def _pair_similarities(latents: Mapping[str, Tensor], hub: str | None = None) -> tuple[Tensor, Tensor]:
    """Cosine similarities in each of the P pairs of modalities: of all rows (P, B, B), and of the partners (P, B)."""
    a, b = paired(F.normalize(stacked(latents), dim=-1), latents, hub)  # (P, B, L)
    if not len(a):
        return a.new_zeros(0, a.shape[1], a.shape[1]), a.new_zeros(0, a.shape[1])
    # the partners anew: a diagonal read is not vectorised, and its kernel took a fifth of a compiled training step
    return products(a, b), (a * b).sum(-1)
