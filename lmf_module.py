"""Low-rank multimodal fusion (Liu et al., 2018), and the exact decompositions that it permits.

    y = b + sum_r w_r * prod_m (A_m[r] z_m + c_m[r])                     (their Eq. 8; Eqs. 6-7 misplace the sum)

R ranks, M modalities, modality m of width d_m, O outputs. The bias rows c_m stand for the constant 1 that the paper
appends to every z_m. y is affine in each z_m, so whatever this module returns beside y is exact, not approximate.

What is identified, that is: on what must two layers that compute the same function agree?
- The function, `full_tensor`, `subset_terms`, `modality_gradient`, `bilinear_map`: always.
- `rank_weights` or a factor's norm alone: never, because scale moves freely between the weight and the factors.
- `rank_terms` and `rank_strength`, up to the order of the ranks: for three or more modalities if the factors satisfy
  Kruskal's condition (the CP decomposition is then unique). For two modalities never, if R > 1: A_1 -> G A_1,
  A_2 -> G^-T A_2 is the same function for every invertible G. There, `canonical_factors` are what is identified.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CanonicalFactors(NamedTuple):
    """Ordered components of a two-modality layer's interaction; see `LowRankMultimodalFusion.canonical_factors`."""

    spectrum: Tensor
    """(O, R), descending, >= 0, in units of the output"""
    directions: tuple[Tensor, Tensor]
    """p (O, R, d_1) and q (O, R, d_2); 0 where the spectrum is 0"""


class Moments(NamedTuple):
    """What is known of the output where the latents are uncertain; see `LowRankMultimodalFusion.moments`."""

    mean: Tensor
    """(..., O)"""
    covariance: Tensor
    """(..., O, O)"""


class LowRankMultimodalFusion(nn.Module):
    """Fuse M latents into O outputs by a sum of R products of affine maps.

    At initialisation every row [A_m[r], c_m[r]] has norm 1, half of its square in c_m[r], and w_r = +-1/sqrt(R): for
    independent standard normal latents each product then has second moment 1, whatever M and d_m, and every subset of
    the modalities starts with the same share of it, 2^-M. (In a random row c^2 is about 1/d: nearly all of the product
    is then the interaction of all modalities, whose gradient vanishes wherever one factor is small, and training stalls
    there for some seeds. Xavier on an (R, d + 1, O) tensor reads it as a convolution kernel, and the output's std is
    (2/O)^(M/2).)

    The signs s_r = sign(w_r prod_m c_m[r]) start balanced: ranks 2i and 2i + 1 have opposite ones, for every output. A
    factor's sign can be moved into another, so s_r is all that the signs of w and c amount to: it ties what rank r says
    of each modality alone to what it says of all together, and no small step changes it. Were all s_r alike (random
    signs: 1 start in 2^(R-1)), what each modality says alone could not be fitted without an unwanted interaction.

    Args:
        input_dims: widths d_1, ..., d_M of the latents; M = 1 is an affine map.
        output_dim: number of outputs O. With O = 1 the output is the logit itself and R bounds its tensor's CP rank.
        rank: number of rank terms R.
        shared_factors: one set of factors for all outputs, y = b + Theta^T prod_m (A_m z_m + c_m) with Theta (R, O), in
            place of own factors for each output (Liu et al.). For O = 1 both are the same function.
        active_rank: keep only the first k rank terms (`rank_mask`). The layer is then exactly the rank-k layer, and
            what is masked gets a gradient of exactly 0; layers that differ in k alone can be stacked, trained at once.

    Raises:
        ValueError: no modality, or a width, output_dim, rank or active_rank out of range.
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int = 1,
        rank: int = 4,
        *,
        shared_factors: bool = False,
        active_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.input_dims = tuple(input_dims)
        self.output_dim = output_dim
        self.rank = rank
        self.active_rank = rank if active_rank is None else active_rank
        self.shared_factors = shared_factors
        if not self.input_dims or min(self.input_dims) < 1:
            raise ValueError(f"input_dims must be one or more widths of at least 1, got {self.input_dims}")
        if output_dim < 1 or rank < 1:
            raise ValueError(f"output_dim and rank must be at least 1, got {output_dim} and {rank}")
        if not 1 <= self.active_rank <= rank:
            raise ValueError(f"active_rank must lie between 1 and the rank {rank}, got {self.active_rank}")

        # one row of factors per rank and output, or per rank alone; size 1 broadcasts over the outputs
        self._split = (rank, 1 if shared_factors else output_dim)
        self.projections = nn.ModuleList(nn.Linear(d, self._split[0] * self._split[1]) for d in self.input_dims)
        self.rank_weights = nn.Parameter(torch.empty((rank, output_dim) if shared_factors else (rank,)))
        self.bias = nn.Parameter(torch.empty(output_dim))
        self.register_buffer("rank_mask", (torch.arange(rank) < self.active_rank).to(self.bias.dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw unit rows [A_m[r], c_m[r]] and weights +-1/sqrt(active rank) from torch's global generator.

        Rank by rank: the first k ranks of a layer are those of a layer of rank k, drawn from the same generator state.
        """
        balance = torch.zeros_like(self.bias)  # (O,) positive less negative signs so far: -1, 0 or 1
        for r in range(self.rank):
            rows = slice(r * self._split[1], (r + 1) * self._split[1])
            weights = self.rank_weights[r]  # (), or (O,) of shared factors
            sign = _random_signs(weights)
            product = sign
            for layer in self.projections:
                layer.weight[rows] = F.normalize(torch.randn_like(layer.weight[rows]), dim=1) * 0.5**0.5
                layer.bias[rows] = _random_signs(layer.bias[rows])
                product = product * layer.bias[rows]  # (O,)
                layer.bias[rows] *= 0.5**0.5
            wanted = torch.where(balance == 0, _random_signs(balance), -balance)
            balance += wanted
            if self.shared_factors:
                sign = sign * product * wanted
            else:
                self.projections[-1].bias[rows] *= product * wanted
            self.rank_weights[r] = sign * self.active_rank**-0.5
        self.bias.zero_()

    def extra_repr(self) -> str:
        sizes = f"input_dims={self.input_dims}, output_dim={self.output_dim}, rank={self.rank}"
        return f"{sizes}, active_rank={self.active_rank}, shared_factors={self.shared_factors}"

    def forward(self, latents: Sequence[Tensor]) -> Tensor:
        """Fuse the latents.

        Args:
            latents: M tensors (..., d_m) with the same leading dimensions, any number of them and of any size.

        Returns:
            y (..., O) in the dtype of the bias. Under autocast the product is taken in float32: in half precision a
            product of M factors over- or underflows.

        Raises:
            ValueError: wrong number of modalities, wrong widths, or leading dimensions that differ.
        """
        product, *others = self._project(latents)
        for p in others:
            product = product * p  # (..., R * O), or (..., R) of shared factors
        weights, bias = self._weights(), self.bias
        with _no_autocast(product.device.type):  # it would round the product again
            if self._split[1] == 1:
                y = F.linear(product, weights.T, _upcast(bias))  # (..., R) (R, O) -> (..., O)
            else:
                y = (product.unflatten(-1, self._split) * weights).sum(-2) + bias  # (..., R, O) -> (..., O)
        return y.to(bias.dtype)

    def rank_terms(self, latents: Sequence[Tensor]) -> Tensor:
        """Split the output into the R weighted products; their sum over R, plus the bias, is the output.

        Identified for three or more modalities under Kruskal's condition, not for two (module docstring).

        Returns:
            (..., R, O); masked ranks are 0.
        """
        terms = self._weights()  # (R, O), or (R, 1) for own factors
        for p in self._project(latents):
            terms = terms * p.unflatten(-1, self._split)  # (..., R, O)
        return terms

    def subset_terms(self, latents: Sequence[Tensor]) -> dict[tuple[int, ...], Tensor]:
        """Split the output into what each subset of the modalities contributes together.

        Multiplied out, the products give sum_r w_r prod_{m in S} A_m[r] z_m prod_{m not in S} c_m[r] for each subset S.
        The terms sum to the output, and z_m = 0 removes exactly those whose subset holds m. They are identified, but
        relative to the origin of the latents: shifting a latent moves parts of a term to smaller subsets.

        Returns:
            2^M tensors (..., O) keyed by ascending modality indices, small subsets first; () holds what no latent
            moves, b + sum_r w_r prod_m c_m[r].
        """
        self._check(latents)
        partial = {(): self._weights()}
        for m, (z, layer) in enumerate(zip(latents, self.projections, strict=True)):
            linear = _upcast(F.linear(z, layer.weight)).unflatten(-1, self._split)  # (..., R, O)
            constant = _upcast(layer.bias).unflatten(-1, self._split)  # (R, O)
            without = {subset: term * constant for subset, term in partial.items()}
            partial = without | {(*subset, m): term * linear for subset, term in partial.items()}
        terms = {subset: partial[subset].sum(-2) for subset in sorted(partial, key=lambda s: (len(s), s))}
        terms[()] = (terms[()] + self.bias).expand(*latents[0].shape[:-1], self.output_dim)
        return terms

    def moments(self, means: Sequence[Tensor], variances: Sequence[Tensor], *, joint: bool = True) -> Moments:
        """Exact mean and covariance of the output where the latents are uncertain.

        For latents that are independent of each other, with uncorrelated coordinates, Gaussian or not,

            E[y] = y(means),    E[f_mr f_mt] = f_mr f_mt + A_m[r] diag(variances_m) A_m[t]^T   at the means,

        f_mr = A_m[r] z_m + c_m[r], and y_o y_p is a sum of products of such pairs: O(R^2 O^2) numbers an example,
        O(R^2) of shared factors. Of two modalities the same sum is, with B from `bilinear_map`,

            Cov[y] = sum_m (dy/dz_m) diag(variances_m) (dy/dz_m)^T + sum_ij variances_1i variances_2j B_ij B_ij^T,

        O(O d_m) numbers an example whatever the rank; taken where there are more than 16 products to pair.

        Args:
            means: M tensors (..., d_m), as for `forward`.
            variances: M tensors, each broadcast to its mean: (d_m,) where all examples share them; 0 is certainty.
            joint: False leaves out how outputs vary together, 0 off the diagonal: O in place of O^2.

        Raises:
            ValueError: as `forward`, or variances that do not fit their means.
        """
        self._check(means, variances)
        shape = (*means[0].shape[:-1], self.output_dim, self.output_dim)
        if len(means) == 2 and self.rank * self.output_dim > 16:
            return Moments(
                self(means), self._covariance_of_two(means, variances, joint).to(self.bias.dtype).expand(shape)
            )
        with _no_autocast(means[0].device.type):
            # K = R * O products, or R of shared factors; where outputs are taken apart (O, K), K = R
            apart = not (joint or self.shared_factors)
            weights = self._weights()
            product = torch.ones_like(weights[:, 0]) if self.shared_factors else weights.expand(self._split).flatten()
            product = product.unflatten(-1, self._split).mT if apart else product
            covariance = None  # (..., K, K)
            for mean, variance, layer in zip(means, variances, self.projections, strict=True):
                f, rows, v = _upcast(layer(mean)), _upcast(layer.weight), _upcast(variance)[..., None, :]
                if apart:
                    f, rows, v = (
                        f.unflatten(-1, self._split).mT,
                        rows.unflatten(0, self._split).transpose(0, 1),
                        v[..., None, :, :],
                    )
                own = (rows * v) @ rows.mT  # (..., K, K)
                added = product[..., :, None] * product[..., None, :] * own
                # what the products of all factors so far vary by, without a difference of two large numbers
                if covariance is None:
                    covariance = added
                else:
                    covariance = added + covariance * torch.addcmul(own, f[..., :, None], f[..., None, :])
                product = product * f
            if self.shared_factors:
                covariance = weights.T @ covariance @ weights
            elif apart:
                covariance = covariance.sum((-2, -1)).diag_embed()
            else:
                covariance = covariance.unflatten(-1, self._split).sum(-2).unflatten(-2, self._split).sum(-3)
        return Moments(self(means), covariance.to(self.bias.dtype).expand(shape))

    def _covariance_of_two(self, means: Sequence[Tensor], variances: Sequence[Tensor], joint: bool) -> Tensor:
        """`moments` of two modalities: (..., O, O), or that of one example where all have the same."""
        with _no_autocast(means[0].device.type):
            first, second = (_upcast(v) for v in variances)
            weights = self._weights().expand(self.rank, self.output_dim)
            rows = [self._rows(m)[..., :-1] for m in (0, 1)]  # (R, O, d_m)
            interaction = self.bilinear_map()
            others = weights * self._factor(means[1], 1), weights * self._factor(means[0], 0)  # (..., R, O)
            gradients = [torch.einsum("...ro,roi->...oi", f, own) for f, own in zip(others, rows, strict=True)]
            pairs = interaction[:, None] * interaction if joint else interaction.square()  # (O, O, d_1, d_2), (O, ...)
            equation = "...i,opij,...j->...op" if joint else "...i,oij,...j->...o"
            covariance = torch.einsum(equation, first, pairs, second)
            for gradient, variance in zip(gradients, (first, second), strict=True):
                scaled = gradient * variance[..., None, :]
                covariance = covariance + (scaled @ gradient.mT if joint else (scaled * gradient).sum(-1))
        return covariance if joint else covariance.diag_embed()

    def variance_terms(self, means: Sequence[Tensor], variances: Sequence[Tensor]) -> dict[tuple[int, ...], Tensor]:
        """Split the output's variance exactly into what each subset of the modalities is responsible for.

        The functional analysis of variance of a multilinear function: the part of y that depends on the subset S and
        averages to 0 over each of its members is sum_r w_r prod_{m in S} A_m[r] (z_m - mean_m) prod_{m not in S} f_mr,
        with the variance that is returned. Divided by their sum these are the Sobol indices.

        Args:
            means, variances: as for `moments`.

        Returns:
            2^M - 1 tensors (..., O) keyed by ascending modality indices, small subsets first; they sum to the diagonal
            of the covariance.

        Raises:
            ValueError: as `moments`.
        """
        self._check(means, variances)
        with _no_autocast(means[0].device.type):
            weights = self._weights()  # (R, O), or (R, 1) for own factors
            partial = {(): weights[:, None] * weights}
            for m, (mean, variance) in enumerate(zip(means, variances, strict=True)):
                f, rows = self._factor(mean, m), _upcast(self._rows(m)[:, : self._split[1], :-1])
                own = torch.einsum("rod,...d,tod->...rto", rows, _upcast(variance), rows)
                product = f[..., :, None, :] * f[..., None, :, :]  # (..., R, R, O)
                without = {subset: part * product for subset, part in partial.items()}
                partial = without | {(*subset, m): part * own for subset, part in partial.items()}
            # each is a variance: what is below 0 is rounding
            terms = {subset: part.sum((-3, -2)).clamp_min(0) for subset, part in partial.items() if subset}
        shape = (*means[0].shape[:-1], self.output_dim)
        return {
            subset: terms[subset].to(self.bias.dtype).expand(shape)
            for subset in sorted(terms, key=lambda s: (len(s), s))
        }

    def modality_gradient(self, latents: Sequence[Tensor], m: int) -> Tensor:
        """Jacobian dy/dz_m in closed form; it does not depend on z_m, so y is exactly affine along it.

        A change of z_m by at most eps in l_p thus moves y by at most eps ||dy/dz_m||_q, q dual to p; this is attained.

        Returns:
            (..., O, d_m).

        Raises:
            IndexError: no modality m.
        """
        if not 0 <= m < len(self.input_dims):
            raise IndexError(f"modality {m} of a layer with {len(self.input_dims)} modalities")
        projected = self._project(latents)
        coefficient = self._weights().expand(*latents[m].shape[:-1], self.rank, self.output_dim)
        for n, p in enumerate(projected):
            if n != m:
                coefficient = coefficient * p.unflatten(-1, self._split)  # (..., R, O)
        return torch.einsum("...ro,rod->...od", coefficient, self._rows(m)[..., :-1])  # (..., O, d_m)

    def full_tensor(self) -> Tensor:
        """The interaction tensor that the factors stand for; for small widths, it has O prod_m (d_m + 1) entries.

        Returns:
            (O, d_1 + 1, ..., d_M + 1). Contracted with every [z_m; 1] it gives y; the bias b sits in its last corner.
        """
        operands: list[Tensor | list[int]] = [self._weights().expand(self.rank, self.output_dim), [0, 1]]
        for m in range(len(self.input_dims)):
            operands += [self._rows(m), [0, 1, m + 2]]
        tensor = torch.einsum(*operands, [1, *range(2, len(self.input_dims) + 2)])  # (O, d_1 + 1, ..., d_M + 1)
        last_corner = [pad for d in reversed(self.input_dims) for pad in (d, 0)]
        return tensor + F.pad(self.bias.view(-1, *[1] * len(self.input_dims)), last_corner)

    def rank_strength(self) -> Tensor:
        """Frobenius norm of each rank-1 term, |w_r| prod_m ||[A_m[r], c_m[r]]||.

        Moving scale between the factors and the weight does not change it, unlike |w_r| alone. For independent standard
        normal latents it is the root mean square of the rank's term. Mixing the ranks of a two-modality layer (G in the
        module docstring) does change it.

        Returns:
            (R, O); masked ranks are 0.
        """
        strength = self._weights().abs().expand(self.rank, self.output_dim)
        for m in range(len(self.input_dims)):
            strength = strength * torch.linalg.vector_norm(self._rows(m), dim=-1)  # (R, O)
        return strength

    def bilinear_map(self) -> Tensor:
        """B = sum_r w_r a_r c_r^T of two modalities, so that subset_terms[(0, 1)] = z_1^T B z_2.

        Returns:
            (O, d_1, d_2).

        Raises:
            ValueError: the layer has not two modalities.
        """
        first, second = self._two_factors("bilinear_map")
        weights = self._weights().expand(self.rank, self.output_dim)
        return torch.einsum("ro,roi,roj->oij", weights, first, second)  # (O, d_1, d_2)

    @torch.no_grad()
    def canonical_factors(self, covariances: Sequence[Tensor]) -> CanonicalFactors:
        """Singular value decomposition of S_1^1/2 B S_2^1/2, taken back to the latents: the identified rank factors.

            z_1^T B z_2 = sum_k s_k (z_1 . p_k) (z_2 . q_k),     var(z_1 . p_k) = var(z_2 . q_k) = 1,

        the coordinates of one modality being uncorrelated. s_k is the standard deviation of component k when z_1 and
        z_2 are centred and independent. The spectrum is identified; so are the directions, up to rotations among equal
        s_k and a common sign, fixed here by a positive largest entry of p_k. They describe the interaction alone: what
        is linear in one latent is in `subset_terms`. No gradient.

        A covariance may be singular: its root and pseudo-inverse come from its eigenvectors, without those whose
        eigenvalue is below rounding, and the identity then holds for latents in its support. B is never formed: beside
        two eigendecompositions this is a QR of two (d_m, R) and the SVD of one (R, R) per output, in float64.

        Args:
            covariances: S_1 (d_1, d_1) and S_2 (d_2, d_2) of the latents, symmetric, positive semi-definite.

        Returns:
            spectrum (O, R) and directions ((O, R, d_1), (O, R, d_2)); 0 beyond the rank of S_1^1/2 B S_2^1/2.

        Raises:
            ValueError: the layer has not two modalities, or a covariance has a wrong shape.
        """
        factors = self._two_factors("canonical_factors")
        # torch.cov of a single column is a scalar
        covariances = [s.reshape(1, 1) if s.ndim == 0 else s for s in covariances]
        shapes = [tuple(s.shape) for s in covariances]
        if shapes != [(d, d) for d in self.input_dims]:
            raise ValueError(f"latents of widths {self.input_dims} need covariances (d_m, d_m), got {shapes}")

        bases, triangles = [], []
        for rows, covariance in zip(factors, covariances, strict=True):
            root, inverse_root = _symmetric_roots(covariance)
            q, r = torch.linalg.qr(root @ rows.double().permute(1, 2, 0))  # (O, d_m, R) = (O, d_m, k) (O, k, R)
            bases.append(inverse_root @ q)
            triangles.append(r)
        weights = self._weights().expand(self.rank, self.output_dim).T.double()
        core = (triangles[0] * weights[:, None, :]) @ triangles[1].mT  # (O, k_1, k_2)
        u, s, vh = torch.linalg.svd(core, full_matrices=False)

        # a component of no weight has no direction: what the SVD returns for it is rounding
        alive = s > s[:, :1] * self.rank * torch.finfo(s.dtype).eps
        p, q = (bases[0] @ u).mT * alive[..., None], (bases[1] @ vh.mT).mT * alive[..., None]  # (O, k, d_m)
        sign = p.gather(-1, p.abs().argmax(-1, keepdim=True)).sign()
        pad = self.rank - s.shape[-1]  # R may exceed a width, the spectrum not
        dtype = self.bias.dtype
        directions = tuple(F.pad(x * sign, (0, 0, 0, pad)).to(dtype) for x in (p, q))
        return CanonicalFactors(F.pad(s * alive, (0, pad)).to(dtype), directions)

    def _project(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """A_m z_m + c_m of each modality, (..., R * O), or (..., R) of shared factors; checks the shapes."""
        self._check(latents)
        return [_upcast(layer(z)) for z, layer in zip(latents, self.projections, strict=True)]

    def _factor(self, z: Tensor, m: int) -> Tensor:
        """A_m z + c_m of one modality, (..., R, O), or (..., R, 1) of shared factors."""
        return _upcast(self.projections[m](z)).unflatten(-1, self._split)

    def _check(self, latents: Sequence[Tensor], variances: Sequence[Tensor] | None = None) -> None:
        if isinstance(latents, Tensor):  # would iterate over its rows
            raise ValueError(f"latents must be a sequence of tensors, got one tensor of shape {tuple(latents.shape)}")
        if isinstance(latents, Mapping):  # would iterate over its keys
            names = ", ".join(map(repr, latents))
            raise ValueError(
                f"latents must be a sequence of tensors, got a dict; pass [latents[name] for name in ({names})]"
            )
        shapes = [z.shape for z in latents]
        leading = shapes[0][:-1] if shapes else ()
        if shapes != [(*leading, d) for d in self.input_dims]:
            found = [tuple(shape) for shape in shapes]
            raise ValueError(
                f"expected {len(self.input_dims)} latents (..., d_m), widths {self.input_dims}, got {found}"
            )
        if variances is None:
            return
        found = [tuple(v.shape) for v in variances]
        if len(found) != len(shapes) or any(
            len(v) > len(z) or any(a not in (b, 1) for a, b in zip(reversed(v), reversed(z), strict=False))
            for v, z in zip(found, shapes, strict=False)
        ):
            raise ValueError(f"variances {found} do not fit means of shapes {[tuple(shape) for shape in shapes]}")

    def _weights(self) -> Tensor:
        """Masked weights, (R, 1), or Theta (R, O) of shared factors."""
        weights = self.rank_weights if self.shared_factors else self.rank_weights[:, None]
        return _upcast(weights * self.rank_mask[:, None])

    def _rows(self, m: int) -> Tensor:
        """[A_m, c_m], (R, O, d_m + 1); shared factors are repeated for each output."""
        layer = self.projections[m]
        rows = torch.cat([layer.weight, layer.bias[:, None]], dim=1).unflatten(0, self._split)
        return rows.expand(self.rank, self.output_dim, -1)

    def _two_factors(self, method: str) -> tuple[Tensor, Tensor]:
        """A_1 (R, O, d_1) and A_2 (R, O, d_2), without the bias rows."""
        if len(self.input_dims) != 2:
            raise ValueError(f"{method} is defined for two modalities, this layer has {len(self.input_dims)}")
        return self._rows(0)[..., :-1], self._rows(1)[..., :-1]


def _random_signs(like: Tensor) -> Tensor:
    return torch.randint_like(like, 2) * 2 - 1


def _upcast(x: Tensor) -> Tensor:
    """float32 in place of half precision; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _no_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off, on devices that have it (the meta device has not)."""
    # by name: `torch.amp.is_autocast_available` breaks the graph in torch 2.11
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _symmetric_roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """S^1/2 and the pseudo-inverse of it, float64 (d, d), from the eigenvectors of S (d, d)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    # the rounding that matters is that of the dtype in which the covariance came
    keep = values > values.max() * len(values) * torch.finfo(covariance.dtype).eps
    root = torch.where(keep, values, 0).sqrt()
    inverse_root = torch.where(keep, values, torch.inf).rsqrt()
    return (vectors * root) @ vectors.mT, (vectors * inverse_root) @ vectors.mT
