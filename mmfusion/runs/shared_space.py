"""Latents of a run in coordinates that two modalities share, and features decoded across them.

A run gives the latents of each modality the prior's mean and covariance after training (`mmfusion.models.whitening`):
coordinates of its own, in which the latents of partners lie anywhere. What is left of the space that they were
trained in is then a rotation away. It is the one that brings partners of the training split nearest:

    R = argmin_{R^T R = I} sum_i |x_i - R y_i|^2 = U V^T,    U S V^T = sum_i x_i y_i^T            (Schoenemann, 1966)

Latents that were never whitened (no prior, another head, --spectral-norm) are taken as they are.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch

from mmfusion.dataset import Split
from mmfusion.models.fusion import FusionModel
from mmfusion.runs.prior import latents_of_split

WHITE = 0.1  # root mean square; dev trained on too, which `train` lacks, moves the moments by less


class PairLatents(NamedTuple):
    """Mean latents of two modalities, row i of both of one example."""

    names: tuple[str, str]
    x: np.ndarray
    """(n, L), of the first, as the model has them"""
    y: np.ndarray
    """(n, L), of the second, in the first one's coordinates"""


class CommonFrame:
    """How the latents of one modality of a member are read in the coordinates of another.

    Args:
        member: a fusion model of vectors.
        train: the split that it was trained on.
    """

    def __init__(self, member: FusionModel, train: Split) -> None:
        self.member, found = member, latents_of_split(member, train)
        self.names = list(found)
        self.turned = all(is_white(*of_one) for of_one in found.values())
        """whether the latents were whitened, and are turned"""
        self._turns = {}
        for a, b in itertools.combinations(self.names, 2):
            turn = rotation(found[b][0], found[a][0]) if self.turned else np.eye(found[a][0].shape[1])
            self._turns |= {(b, a): turn, (a, b): turn.T}  # there and back

    def pairs(self, split: Split) -> list[PairLatents]:
        """Every pair of modalities on a split."""
        latents = {name: z for name, (z, _) in latents_of_split(self.member, split).items()}
        pairs = itertools.combinations(self.names, 2)
        return [PairLatents((a, b), latents[a], latents[b] @ self._turns[b, a]) for a, b in pairs]

    @torch.inference_mode()
    def cross_decoded(self, split: Split) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
        """Standardised features (n, d_m), and what is decoded of them by (whose latent, whose features)."""
        latents = {name: z for name, (z, _) in latents_of_split(self.member, split).items()}
        standardise = self.member.standardise
        features = {name: standardise[name](split.features[name]).double().numpy() for name in self.names}
        decoded = {}
        for source, name in itertools.product(self.names, repeat=2):
            z = latents[source] if source == name else latents[source] @ self._turns[source, name]
            like = self.member.standardise[name].mean
            decoded[source, name] = self.member.jwae.decoders[name](torch.from_numpy(z).to(like)).double().numpy()
        return features, decoded


def is_white(means: np.ndarray, variances: np.ndarray | None = None) -> bool:
    """Whether latents (n, L) with these variances of their noise (L,) have mean 0 and covariance I, or nearly.

    A coordinate without any variance does not speak against it: whitening leaves it so.
    """
    covariance = np.atleast_2d(np.cov(means, rowvar=False))
    if variances is not None:
        covariance = covariance + np.diag(variances)
    wanted = np.diag((covariance.diagonal() > 1e-6).astype(float))
    off = covariance - wanted
    errors = means.mean(0), off.diagonal(), off[~np.eye(len(off), dtype=bool)]
    return all(np.square(error).mean() < WHITE**2 for error in errors if error.size)


def rotation(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(L, L) orthogonal matrix R, a reflection perhaps, whose y R lies nearest to x; both (n, L)."""
    left, _, right = np.linalg.svd(y.T @ x)
    return left @ right
