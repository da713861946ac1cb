"""Latents of a run in the coordinates of training, which modalities share, and features decoded across modalities."""

import itertools
from typing import NamedTuple

import numpy as np
import torch

from mmfusion.dataset import Split
from mmfusion.models.fusion import FusionModel


class PairLatents(NamedTuple):
    """Mean latents of two modalities, row i of both of one example."""

    names: tuple[str, str]
    x: np.ndarray
    """(n, L), of the first"""
    y: np.ndarray
    """(n, L), of the second"""


@torch.inference_mode()
def shared_latents(member: FusionModel, split: Split) -> dict[str, np.ndarray]:
    """Mean latents (n, L) of each modality in the coordinates of training, in float64."""
    return {name: z.double().numpy() for name, z in member.shared_latents(split.features).items()}


def latent_pairs(member: FusionModel, split: Split) -> list[PairLatents]:
    """Every pair of modalities on a split, in the coordinates of training."""
    latents = shared_latents(member, split)
    return [PairLatents((a, b), latents[a], latents[b]) for a, b in itertools.combinations(latents, 2)]


@torch.inference_mode()
def cross_decoded(member: FusionModel, split: Split) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Standardised features (n, d_m), and what is decoded of them by (whose latent, whose features); in float64."""
    given = {name: split.features[name] for name in member.modalities}
    features = {name: member.standardise[name](x).double().numpy() for name, x in given.items()}
    decoded = {}
    for source in member.modalities:
        of_source = member.cross_decode(given, source)
        decoded |= {(source, name): x.double().numpy() for name, x in of_source.items()}
    return features, decoded
