"""jWAE -> fusion as one module that takes raw features, and an ensemble of such members that saves and loads.

features --standardise--> x_m --encoder--> z_m --LMF--> --rescale--> prediction: a logit, or a regression's target
                                 z_m --decoder--> reconstruction of x_m
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from jwae_module import JWAE, info_nce, margin_ranking, mmd_penalty, reconstruction_error
from lmf_module import LowRankMultimodalFusion
from spectral_normalisation import normalise_spectrally

Fusion = Literal["lmf", "concatenation", "tensor"]


class FusionOutput(NamedTuple):
    """What one model says of one batch."""

    prediction: Tensor  # (..., O): logits, or values in the units of a regression's target
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


class Rescale(nn.Module):
    """x * std + mean per output, so that a regression learns a standardised target; the identity unless fitted."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, target: Tensor) -> None:
        """Take mean and standard deviation from a regression's training targets, (N,) or (N, O)."""
        std, mean = torch.std_mean(target.double().reshape(len(target), -1), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


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


class TensorHead(nn.Module):
    """Tensor fusion (TFN; Zadeh et al., EMNLP 2017) with a linear readout: a free weight for every entry of the outer
    product of the [z_m; 1]. LMF is this head with its weight tensor, (d_1 + 1) x ... x (d_M + 1) per output, at rank R.

    Takes a list of latents (..., d_m) and returns (..., O).
    """

    def __init__(self, input_dims: list[int], output_dim: int) -> None:
        super().__init__()
        self.readout = nn.Linear(math.prod(d + 1 for d in input_dims), output_dim)

    def forward(self, latents: list[Tensor]) -> Tensor:
        product = F.pad(latents[0], (0, 1), value=1.0)
        for z in latents[1:]:
            product = (product.unsqueeze(-1) * F.pad(z, (0, 1), value=1.0).unsqueeze(-2)).flatten(-2)
        return self.readout(product)  # (..., prod_m (d_m + 1)) -> (..., O)


class FusedWidthHead(nn.Module):
    """LMF into `fused_dim` outputs and a linear layer over them, as the published models have it.

    The prediction's CP rank is then bounded by rank * fused_dim, not by the rank. Takes a list of latents (..., d_m)
    and returns (..., O).
    """

    def __init__(self, layer: LowRankMultimodalFusion, output_dim: int) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(layer.output_dim, output_dim)

    def forward(self, latents: list[Tensor]) -> Tensor:
        return self.readout(self.layer(latents))


class FusionModel(nn.Module):
    """One member: standardisation, jWAE, and a head over the latents.

    Args:
        input_dims: width d_m of each modality; the head takes them in alphabetical order. With one modality the LMF
            head is an affine map of its latent: that is the one-modality baseline.
        latent_dim: L, the width of every latent.
        hidden_dim: width of the encoders' and decoders' hidden layer (and of the concatenation head's).
        rank: R, the number of rank-1 terms of the LMF head.
        output_dim: O; 1 gives the logit itself, so that R is the CP rank of the interaction.
        fusion: "lmf"; for the baselines "concatenation", or "tensor" for the explicit tensor product.
        active_rank: only the first `active_rank` of the R terms take part (default all R).
        fused_dim: LMF into this many outputs, and a linear layer over them; default: LMF gives the outputs itself.
        spectral_norm: every weight matrix of the encoders and of the head is divided by its spectral norm and
            multiplied by this; default: weights are free.
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
        fused_dim: int | None = None,
        spectral_norm: float | None = None,
    ) -> None:
        super().__init__()
        # config.json is written with sorted keys: any other order would not survive saving and loading
        input_dims = dict(sorted(input_dims.items()))
        self.modalities = tuple(input_dims)
        self.standardise = nn.ModuleDict({name: Standardise(dim) for name, dim in input_dims.items()})
        self.jwae = JWAE(input_dims, latent_dim, hidden_dim)
        widths = [latent_dim] * len(input_dims)
        self.rescale = Rescale(output_dim)
        if fusion == "concatenation":
            self.fusion = ConcatenationHead(widths, output_dim, hidden_dim)
        elif fusion == "tensor":
            self.fusion = TensorHead(widths, output_dim)
        else:
            layer = LowRankMultimodalFusion(widths, fused_dim or output_dim, rank, active_rank=active_rank)
            self.fusion = FusedWidthHead(layer, output_dim) if fused_dim else layer
        if spectral_norm is not None:
            normalise_spectrally(self.jwae.encoders, spectral_norm)
            normalise_spectrally(self.fusion, spectral_norm)

    def fit_standardisation(self, features: Mapping[str, Tensor]) -> None:
        """Fit mean and std of each modality on the training features (N, d_m)."""
        for name, module in self.standardise.items():
            module.fit(features[name])

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents (..., L) of raw features (..., d_m)."""
        return self.jwae.encode({name: module(features[name]) for name, module in self.standardise.items()})

    def forward(
        self, features: Mapping[str, Tensor], reconstruct: bool = True, present: Mapping[str, Tensor] | None = None
    ) -> FusionOutput:
        """Prediction (..., O), latents and, where asked for, reconstructions of raw features (..., d_m).

        `present` (...) holds 1 and 0 for each modality that may be missing: the head sees 0 in place of its latent,
        which removes exactly the parts of an LMF prediction that the modality takes part in. The latents returned are
        whole.
        """
        standardised = {name: module(features[name]) for name, module in self.standardise.items()}
        latents = self.jwae.encode(standardised)
        reconstructions = self.jwae.decode(latents) if reconstruct else {}
        seen = dict(latents)
        for name, mask in (present or {}).items():
            seen[name] = latents[name] * mask.unsqueeze(-1)
        prediction = self.rescale(self.fusion([seen[name] for name in self.modalities]))
        return FusionOutput(prediction, latents, standardised, reconstructions)


def loss_terms(
    output: FusionOutput,
    target: Tensor,
    task: Literal["binary", "regression"] = "binary",
    alignment: Literal["margin", "info_nce"] = "margin",
    target_scale: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """The named terms whose weighted sum a fusion model is trained on, as scalars of one batch.

    Args:
        output: of `FusionModel.forward` with reconstructions.
        target: (B,) of 0 and 1, or for a regression (B,) or (B, O).
        task: "binary" gives the term "bce" on logits, "regression" the term "absolute_error".
        alignment: which loss aligns the latents of one example; a single modality has nothing to be aligned with, and
            then there is no such term.
        target_scale: () or (O,), what a regression's errors are divided by: the standard deviation of the targets.
    """
    prediction = output.prediction if target.ndim > 1 else output.prediction.squeeze(-1)
    if task == "binary":
        terms = {"bce": F.binary_cross_entropy_with_logits(prediction, target)}
    else:
        terms = {"absolute_error": ((prediction - target) / target_scale).abs().mean()}
    terms["mmd"] = torch.stack([mmd_penalty(z) for z in output.latents.values()]).mean()
    terms["reconstruction"] = reconstruction_error(output.standardised, output.reconstructions)
    if len(output.latents) > 1:
        align = info_nce if alignment == "info_nce" else margin_ranking
        terms["alignment"] = align(output.latents)
    return terms


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
        spectral_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            FusionModel(input_dims, latent_dim, hidden_dim, rank, output_dim, fusion, spectral_norm=spectral_norm)
            for _ in range(members)
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (S, N, O) of raw features (N, d_m)."""
        return torch.stack([member(features, reconstruct=False).prediction for member in self.members])

    @torch.inference_mode()
    def predict_proba(self, features: Mapping[str, Tensor]) -> Tensor:
        """Probability of the positive class, (S, N), of raw features (N, d_m); for one output."""
        return self(features).squeeze(-1).sigmoid()
