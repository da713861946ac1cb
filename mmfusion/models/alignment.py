"""M modalities in one space: the jWAE's encoders, trained so that latents of one example lie together.

features --standardise--> x_m --encoder--> z_m: near the z of the other modalities of the same example
                                z_m --decoder--> reconstruction of x_m, or of x_k from z_m (cross-decoding)
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jwae_module import JWAE
from mmfusion.models.ensemble import Ensemble
from mmfusion.models.fusion import MOST_WIDTH
from mmfusion.models.heads import Standardise
from mmfusion.models.pretrained import CONFIG, check_shape, find_pretrained, read_config
from mmfusion.models.spectral_norm import normalise_spectrally

TEMPERATURE = 0.07
LEAST_TEMPERATURE = 0.01  # as CLIP (Radford et al., 2021): logits beyond 100 make training unstable


class AlignmentOutput(NamedTuple):
    """What one model says of one batch."""

    latents: dict[str, Tensor]  # (B, L) per modality
    standardised: dict[str, Tensor]  # (B, d_m) per modality: what the reconstructions are compared with
    reconstructions: dict[str, Tensor]  # (B, d_m) per modality
    temperature: Tensor  # () of the contrastive losses


class AlignmentModel(nn.Module):
    """One member: standardisation, jWAE, and a temperature that is learned.

    Args:
        input_dims: width d_m of each modality.
        latent_dim: L, the width of the shared space.
        hidden_dim: width of the encoders' and decoders' hidden layer; 0: they are affine.
        spectral_norm: every weight matrix of the encoders is divided by its spectral norm and multiplied by this;
            default: weights are free.
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        latent_dim: int = 32,
        hidden_dim: int = 128,
        spectral_norm: float | None = None,
    ) -> None:
        super().__init__()
        input_dims = dict(sorted(input_dims.items()))
        self.modalities = tuple(input_dims)
        self.standardise = nn.ModuleDict({name: Standardise(dim) for name, dim in input_dims.items()})
        self.jwae = JWAE(input_dims, latent_dim, hidden_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        if spectral_norm is not None:
            normalise_spectrally(self.jwae.encoders, spectral_norm)

    def forward(
        self,
        features: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> AlignmentOutput:
        """Latents of raw features (B, d_m).

        Where `present` (B,) hides a modality of an example, its latent is the mean of the example's other ones, without
        a gradient: it neither draws them nor is drawn. `kept` (B, d_m) multiplies what the encoders see.
        """
        standardised = {name: self.standardise[name](features[name]) for name in self.modalities}
        seen = {name: x * kept[name] if kept else x for name, x in standardised.items()}
        latents = self.jwae.encode(seen)
        decoded = self.jwae.decode(latents)
        temperature = self.log_temperature.exp().clamp_min(LEAST_TEMPERATURE)
        return AlignmentOutput(_without_hidden(latents, present or {}), standardised, decoded, temperature)

    @torch.no_grad()
    def start_at_identity(self) -> None:
        """Let encoders and decoders be the identity: latents are the standardised features, for a space that is shared.

        Raises ValueError unless they are affine and every modality is as wide as the latents.
        """
        affine = [*self.jwae.encoders.values(), *self.jwae.decoders.values()]
        if any(not isinstance(one, nn.Linear) or one.in_features != one.out_features for one in affine):
            raise ValueError(f"the identity has affine encoders of one width: {self.jwae.input_dims}")
        for one in affine:
            nn.init.eye_(one.weight)
            nn.init.zeros_(one.bias)

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents (N, L) of those modalities (N, d_m) that are given."""
        return {
            name: self.jwae.encoders[name](self.standardise[name](features[name]))
            for name in self.modalities
            if name in features
        }

    def cross_decode(self, features: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """Standardised features (N, d_k) of every modality k, decoded from the latents of one (N, d_source)."""
        z = self.encode({source: features[source]})[source]
        return self.jwae.decode(dict.fromkeys(self.modalities, z))


def _without_hidden(latents: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The latents, those of hidden modalities replaced by the mean of the example's others."""
    if not present:
        return dict(latents)
    z = torch.stack(list(latents.values()))  # (M, B, L)
    ones = torch.ones_like(z[0, :, 0])
    there = torch.stack([present.get(name, ones) for name in latents]).unsqueeze(-1)  # (M, B, 1)
    mean = ((z * there).sum(0) / there.sum(0).clamp_min(1)).detach()
    # an example of which nothing is left keeps its own latents: they have no partner to lie beside
    hidden = (there == 0) & (there.sum(0) > 0)
    return dict(zip(latents, torch.where(hidden, mean, z), strict=True))


class AlignmentEnsemble(Ensemble):
    """Independently trained members of one shape. Their spaces differ: similarities are averaged, not latents."""

    kind: ClassVar[dict[str, object]] = {"fusion": "alignment"}

    def __init__(
        self,
        input_dims: dict[str, int],
        members: int = 1,
        latent_dim: int = 32,
        hidden_dim: int = 128,
        spectral_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.shape = {
            "input_dims": dict(sorted(input_dims.items())),
            "members": members,
            "latent_dim": latent_dim,
            "hidden_dim": hidden_dim,
            "spectral_norm": spectral_norm,
        }
        self.members = nn.ModuleList(
            AlignmentModel(input_dims, latent_dim, hidden_dim, spectral_norm) for _ in range(members)
        )

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "AlignmentEnsemble":
        """A saved ensemble, in evaluation mode, from a folder or OWNER/NAME of the hub. Raises InputError."""
        folder = find_pretrained(source)
        shape = check_shape(read_config(folder), MOST_WIDTH, Literal["alignment"], folder / CONFIG, affine=True)
        known = ("input_dims", "members", "latent_dim", "hidden_dim", "spectral_norm")
        return cls.from_folder(folder, {name: shape[name] for name in known if name in shape})

    @torch.inference_mode()
    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents (S, N, L) of those modalities (N, d_m) that are given."""
        found = [member.encode(features) for member in self.members]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    @torch.inference_mode()
    def similarity(self, queries: Mapping[str, Tensor], gallery: Mapping[str, Tensor]) -> Tensor:
        """Cosine similarities (Q, G) of one modality's features to another's, mean over members."""
        (x,), (y,) = self.encode(queries).values(), self.encode(gallery).values()
        return (F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT).mean(0)
