"""jWAE -> fusion as one module that takes raw features, and an ensemble of such members that saves and loads.

features --standardise--> x_m --encoder--> z_m --LMF--> logit
                                 z_m --decoder--> reconstruction of x_m
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from jwae_module import JWAE
from lmf_module import LowRankMultimodalFusion

Fusion = Literal["lmf", "concatenation"]


class FusionOutput(NamedTuple):
    """What one model says of one batch."""

    logits: Tensor  # (..., O)
    latents: dict[str, Tensor]  # (..., L) per modality
    standardised: dict[str, Tensor]  # (..., d_m) per modality: what the reconstructions are compared with
    reconstructions: dict[str, Tensor]  # (..., d_m) per modality; empty unless asked for


class Standardise(nn.Module):
    """(x - mean) / std per coordinate; mean and std are buffers, so they travel with the weights.

    A coordinate that is constant in training is mapped to 0 there and divided by 1 elsewhere.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and standard deviation from x (N, d), in float64, since N may be large."""
        x = x.double()
        std, mean = torch.std_mean(x, dim=0, correction=0)
        # relative to the coordinate's size: a constant column has a rounding-error std, not 0
        constant = std <= 1e-6 * mean.abs().clamp_min(1e-12)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, torch.ones_like(std), std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ConcatenationHead(nn.Module):
    """The usual alternative to LMF: concatenated latents through one hidden layer.

    Takes the same list of latents (..., d_m) and returns (..., O).
    """

    def __init__(self, input_dims: list[int], output_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(sum(input_dims), hidden_dim), nn.GELU(), nn.Linear(hidden_dim, output_dim)
        )

    def forward(self, latents: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(latents, dim=-1))


class FusionModel(nn.Module):
    """One member: standardisation, jWAE, and a head over the latents.

    Args:
        input_dims: width d_m of each modality; the head takes them in alphabetical order. With one modality the LMF
            head is an affine map of its latent: that is the one-modality baseline.
        latent_dim: L, the width of every latent.
        hidden_dim: width of the encoders' and decoders' hidden layer (and of the concatenation head's).
        rank: R, the number of rank-1 terms of the LMF head.
        output_dim: O; 1 gives the logit itself, so that R is the CP rank of the interaction.
        fusion: "lmf", or "concatenation" for the baseline.
        active_rank: only the first `active_rank` of the R terms take part (default all R).
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        latent_dim: int = 32,
        hidden_dim: int = 128,
        rank: int = 4,
        output_dim: int = 1,
        fusion: Fusion = "lmf",
        active_rank: int | None = None,
    ) -> None:
        super().__init__()
        # config.json is written with sorted keys: any other order would not survive saving and loading
        input_dims = dict(sorted(input_dims.items()))
        self.modalities = tuple(input_dims)
        self.standardise = nn.ModuleDict({name: Standardise(dim) for name, dim in input_dims.items()})
        self.jwae = JWAE(input_dims, latent_dim, hidden_dim)
        widths = [latent_dim] * len(input_dims)
        if fusion == "lmf":
            self.fusion = LowRankMultimodalFusion(widths, output_dim, rank, active_rank=active_rank)
        else:
            self.fusion = ConcatenationHead(widths, output_dim, hidden_dim)

    def fit_standardisation(self, features: Mapping[str, Tensor]) -> None:
        """Fit mean and std of each modality on the training features (N, d_m)."""
        for name, module in self.standardise.items():
            module.fit(features[name])

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents (..., L) of raw features (..., d_m)."""
        return self.jwae.encode({name: module(features[name]) for name, module in self.standardise.items()})

    def forward(self, features: Mapping[str, Tensor], reconstruct: bool = True) -> FusionOutput:
        """Logits (..., O), latents and, where asked for, reconstructions of raw features (..., d_m)."""
        standardised = {name: module(features[name]) for name, module in self.standardise.items()}
        latents = self.jwae.encode(standardised)
        reconstructions = self.jwae.decode(latents) if reconstruct else {}
        logits = self.fusion([latents[name] for name in self.modalities])
        return FusionOutput(logits, latents, standardised, reconstructions)


class FusionEnsemble(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="low-rank-multimodal-fusion",
    tags=["multimodal", "low-rank-fusion", "hateful-memes"],
):
    """Independently trained members of one shape; takes raw features, gives the logits of every member.

    `from_pretrained(folder or hub name)`, `save_pretrained` and `push_to_hub` follow the Hugging Face hub's
    conventions: config.json holds the constructor's arguments, model.safetensors the weights.
    """

    def __init__(
        self,
        input_dims: dict[str, int],
        members: int = 1,
        latent_dim: int = 32,
        hidden_dim: int = 128,
        rank: int = 4,
        output_dim: int = 1,
        fusion: Fusion = "lmf",
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            FusionModel(input_dims, latent_dim, hidden_dim, rank, output_dim, fusion) for _ in range(members)
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (S, N, O) of raw features (N, d_m)."""
        return torch.stack([member(features, reconstruct=False).logits for member in self.members])

    @torch.inference_mode()
    def predict_proba(self, features: Mapping[str, Tensor]) -> Tensor:
        """Probability of the positive class, (S, N), of raw features (N, d_m); for one output."""
        return self(features).squeeze(-1).sigmoid()
