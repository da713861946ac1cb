"""jWAE -> fusion as one module that takes raw features, and an ensemble of such members that saves and loads.

features --standardise--> x_m --encoder--> z_m --LMF--> --rescale--> prediction: a logit, or a regression's target
                                 z_m --decoder--> reconstruction of x_m
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from jwae_module import JWAE, Noise
from lmf_module import LowRankMultimodalFusion
from mmfusion.dataset import Task
from mmfusion.errors import InputError, check_numbers
from mmfusion.losses.expected import moderated_logits
from mmfusion.metrics.tasks import probabilities
from mmfusion.models.ensemble import Ensemble
from mmfusion.models.heads import ConcatenationHead, Frame, FusedWidthHead, Rescale, Standardise, TensorHead
from mmfusion.models.missing import Missing, MissingPrediction, missing_rows, predict_missing
from mmfusion.models.pretrained import CONFIG, check_shape, find_pretrained, read_config
from mmfusion.models.spectral_norm import normalise_spectrally

Fusion = Literal["lmf", "concatenation", "tensor"]
MOST_WIDTH = 65536  # of a latent, a hidden layer or a rank: beyond it a typing mistake is likelier than a wish


class FusionOutput(NamedTuple):
    """What one model says of one batch."""

    prediction: Tensor  # (..., O): logits, or values in the units of a regression's target
    latents: dict[str, Tensor]  # (..., L) per modality
    standardised: dict[str, Tensor]  # (..., d_m) per modality: what the reconstructions are compared with
    reconstructions: dict[str, Tensor]  # (..., d_m) per modality; empty unless asked for
    variances: dict[str, Tensor] = {}  # noqa: RUF012 (L,) per modality; empty: the latents are certain
    covariance: Tensor | None = None  # (..., O, O) of the prediction; None: it is certain


@dataclass(frozen=True)
class ModelConfig:
    """Widths and rank of the fusion model."""

    latent_dim: int = 32
    """width L of the latents"""
    hidden_dim: int = 128
    """width of the encoders' and decoders' hidden layer"""
    rank: int = 4
    """number of rank-1 terms R; for one logit this is the CP rank of the interaction"""
    noise: Noise = "dimension"
    """noise of the Gaussian latents: none (they are deterministic), or a std learned for each dimension"""
    spectral_norm: float | None = None
    """fix the spectral norm of every weight matrix of encoders and head to this; default: weights are free"""

    def check(self) -> None:
        """Raise InputError naming the first flag out of range."""
        check_numbers(self, {name: (1, MOST_WIDTH) for name in ("latent_dim", "hidden_dim", "rank")})
        if self.spectral_norm is not None and not 0 < self.spectral_norm < math.inf:
            raise InputError(f"--spectral-norm {self.spectral_norm}: give a number above 0, for instance 1")


# nine parameters: config.json of a saved model holds them flat
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
        noise: of the latents (`JWAE`). The LMF head then gives the exact mean and covariance of its output.

    Raises ValueError for an unknown fusion, or noise under a head that cannot integrate over it.
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        latent_dim: int = ModelConfig.latent_dim,
        hidden_dim: int = ModelConfig.hidden_dim,
        rank: int = ModelConfig.rank,
        output_dim: int = 1,
        fusion: Fusion = "lmf",
        active_rank: int | None = None,
        fused_dim: int | None = None,
        spectral_norm: float | None = ModelConfig.spectral_norm,
        noise: Noise = "none",
    ) -> None:
        super().__init__()
        # config.json is written with sorted keys: any other order would not survive saving and loading
        input_dims = dict(sorted(input_dims.items()))
        self.modalities = tuple(input_dims)
        self.standardise = nn.ModuleDict({name: Standardise(dim) for name, dim in input_dims.items()})
        self.jwae = JWAE(input_dims, latent_dim, hidden_dim, noise)
        self.frames = nn.ModuleDict({name: Frame(latent_dim) for name in input_dims})
        widths = [latent_dim] * len(input_dims)
        self.rescale = Rescale(output_dim)
        if fusion not in get_args(Fusion):
            raise ValueError(f"fusion is one of {', '.join(get_args(Fusion))}, not {fusion!r}")
        if noise != "none" and fusion != "lmf":
            raise ValueError(
                f"only LMF integrates over the noise of its latents, {fusion!r} does not: leave noise none"
            )
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

    def latents(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Latents (..., L) of raw features (..., d_m) in the order of `modalities`, as the head takes them."""
        encoded = self.encode(features)
        return [encoded[name] for name in self.modalities]

    def shared_latents(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean latents (..., L) of those modalities (..., d_m) that are given, in the coordinates of training.

        There modalities share a space, as far as training aligned them; whitening gives each coordinates of its own.
        """
        return {name: self.frames[name](z) for name, z in self._given(features).items()}

    def cross_decode(self, features: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """Standardised features (..., d_k) of every modality k, decoded from the latents of one (..., d_source)."""
        own = self._given({source: features[source]})
        shared = self.frames[source](own[source])
        return self.jwae.decode({name: frame.inverse(shared) for name, frame in self.frames.items()} | own)

    def _given(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean latents (..., L), as the head takes them, of those modalities (..., d_m) that are given."""
        return {
            name: self.jwae.encoders[name](self.standardise[name](features[name]))
            for name in self.modalities
            if name in features
        }

    def latent_variances(self) -> list[Tensor]:
        """Variances (L,) of the latents' noise in the order of `modalities`; none of certain latents."""
        variances = self.jwae.noise_variances()
        return [variances[name] for name in self.modalities if variances]

    def forward(
        self,
        features: Mapping[str, Tensor],
        reconstruct: bool = True,
        present: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        joint: bool = True,
    ) -> FusionOutput:
        """Prediction (..., O), latents and, where asked for, reconstructions of raw features (..., d_m).

        `present` (...) holds 1 and 0 for each modality that may be missing. The head sees 0 in place of a missing
        latent, which removes exactly the parts of an LMF prediction that the modality takes part in; where latents are
        uncertain it sees the prior N(0, I), which is 0 with a variance of 1. The latents returned are whole.

        `kept` (..., d_m) multiplies the standardised features that the encoders see: feature dropout. They are
        reconstructed as they were. `joint` as for `LowRankMultimodalFusion.moments`: classes alone need it.
        """
        standardised = {name: module(features[name]) for name, module in self.standardise.items()}
        seen = {name: x * kept[name] for name, x in standardised.items()} if kept else standardised
        latents, variances = self.jwae.posterior(seen)
        reconstructions = self.jwae.decode(latents) if reconstruct else {}
        prediction, covariance = self.head(latents, present, joint)
        return FusionOutput(prediction, latents, standardised, reconstructions, variances, covariance)

    def head(
        self, latents: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None, joint: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Prediction (..., O) of (mean) latents (..., L), and its covariance (..., O, O) where they are uncertain.

        `present` and `joint` as for `forward`.
        """
        means, variances = dict(latents), self.jwae.noise_variances()
        uncertain = bool(variances)
        for name, mask in (present or {}).items():
            means[name] = latents[name] * mask.unsqueeze(-1)
            if uncertain:
                variances[name] = variances[name] * mask.unsqueeze(-1) + (1 - mask.unsqueeze(-1))
        given = [means[name] for name in self.modalities]
        if not uncertain:
            return self.rescale(self.fusion(given)), None
        mean, covariance = self.fusion.moments(given, [variances[name] for name in self.modalities], joint=joint)
        return self.rescale(mean), covariance * self.rescale.std[:, None] * self.rescale.std


class FusionEnsemble(Ensemble):
    """Independently trained members of one shape; takes raw features, gives what every member says.

    `task` says what the outputs are: logits of one of the three kinds of classification, or a regression's values.
    `save_pretrained` writes config.json (the constructor's arguments) and model.safetensors (the weights), the files
    that the Hugging Face hub expects of a model.
    """

    def __init__(
        self,
        input_dims: dict[str, int],
        members: int = 1,
        latent_dim: int = ModelConfig.latent_dim,
        hidden_dim: int = ModelConfig.hidden_dim,
        rank: int = ModelConfig.rank,
        output_dim: int = 1,
        fusion: Fusion = "lmf",
        spectral_norm: float | None = ModelConfig.spectral_norm,
        task: Task = "binary",
        noise: Noise = "none",
    ) -> None:
        super().__init__()
        self.task = task
        self.shape = {
            "input_dims": dict(sorted(input_dims.items())),
            "members": members,
            "latent_dim": latent_dim,
            "hidden_dim": hidden_dim,
            "rank": rank,
            "output_dim": output_dim,
            "fusion": fusion,
            "spectral_norm": spectral_norm,
            "task": task,
            "noise": noise,
        }
        shape = {"spectral_norm": spectral_norm, "noise": noise}
        self.members = nn.ModuleList(
            FusionModel(input_dims, latent_dim, hidden_dim, rank, output_dim, fusion, **shape) for _ in range(members)
        )

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "FusionEnsemble":
        """A saved ensemble, in evaluation mode, from a folder such as runs/demo, or OWNER/NAME of the Hugging Face hub.

        Every weight comes from the file. Raises InputError where one is missing, foreign or not finite, or where
        config.json does not describe an ensemble.
        """
        folder = find_pretrained(source)
        shape = check_shape(read_config(folder), MOST_WIDTH, Fusion, folder / CONFIG)
        ensemble = cls.from_folder(folder, shape)
        if "task" not in shape and ensemble.members[0].rescale.is_fitted:  # saved before models knew their task
            ensemble.task = ensemble.shape["task"] = "regression"
        return ensemble

    def forward(self, features: Mapping[str, Tensor | np.ndarray]) -> Tensor:
        """Logits, or a regression's values, (S, N, O) of raw features (N, d_m).

        Logits of uncertain latents are those of the expected probabilities (`moderated_logits`).
        """
        features = self._tensors(features)
        joint = self.task == "multiclass"
        outputs = [member(features, reconstruct=False, joint=joint) for member in self.members]
        return torch.stack([moderated_logits(x.prediction, x.covariance, self.task) for x in outputs])

    @torch.inference_mode()
    def predict(
        self,
        features: Mapping[str, Tensor | np.ndarray],
        missing: Missing = "error",
        train: Mapping[str, Tensor | np.ndarray] | None = None,
    ) -> Tensor:
        """What every member says of raw features (N, d_m): probabilities (`predict_proba`), or a regression's values.

        Args:
            features: a modality is missing where its key is absent or its row NaN throughout.
            missing, train: as for `predict_missing`, whose `prediction` comes back; "error" refuses what is missing.

        Returns:
            (S, N) for two classes or one value; else (S, N, O).

        Raises ValueError for features that do not fit or are not finite.
        """
        if missing != "error":
            return self.predict_missing(features, missing, train).prediction.to(self.members[0].rescale.mean)
        return probabilities(self(self._tensors(features, caller="predict")), self.task)

    def predict_missing(
        self,
        features: Mapping[str, Tensor | np.ndarray],
        missing: Missing = "prior",
        train: Mapping[str, Tensor | np.ndarray] | None = None,
    ) -> MissingPrediction:
        """Predictions where modalities are missing, their latents integrated out, and by how much that widens them.

        Exact for logits and values (`mmfusion.models.missing`); of classes the *logit* is integrated exactly, and
        `prediction` is the expected probability, which is not the probability of the expected logit.

        Args:
            features: raw, (N, d_m); a modality is missing where its key is absent or its row NaN throughout.
            missing: "prior": latents are N(0, I), as good as the training has made them so; "training": they are those
                of the raw training features `train`, each missing modality's independently of all others.
            train: with "training", raw (n, d_m) of all modalities.

        Raises ValueError: features that do not fit, a row that is NaN in part, no `train`, a head that is not LMF.
        """
        if missing not in ("prior", "training"):
            raise ValueError(f'missing is "error", "prior" or "training", not {missing!r}')
        if (missing == "training") != (train is not None):
            raise ValueError('missing="training" goes with the training features, train; "prior" goes without')
        names = [name for name in self.shape["input_dims"] if name in features]
        whole, gone = missing_rows(self._tensors(features, names), self.shape["input_dims"])
        train = None if train is None else self._tensors(train)
        return predict_missing(self.members, whole, gone, self.task, train)

    def predict_proba(self, features: Mapping[str, Tensor | np.ndarray]) -> Tensor:
        """Probabilities of raw features (N, d_m), tensors or arrays, by every member.

        Returns:
            (S, N) of class 1 of two; (S, N, C) of the classes, summing to 1; (S, N, O) of each label.

        Raises ValueError for a regression (see `predict`), and features that do not fit.
        """
        if self.task == "regression":
            raise ValueError("a regression has no probabilities; `predict` gives its values")
        return self.predict(features)

    def _tensors(
        self,
        features: Mapping[str, Tensor | np.ndarray],
        names: Sequence[str] | None = None,
        caller: str | None = None,
    ) -> dict[str, Tensor]:
        """Float tensors of every modality, or of `names`, whose rows may be NaN.

        With a `caller`, who needs (N, d_m) of all modalities, values are checked too; `forward`, which can be traced,
        looks at no value. Raises ValueError naming the modality, and the row where there is one.
        """
        widths = self.shape["input_dims"]
        if not isinstance(features, Mapping):
            raise ValueError(f"features: give a dict with {', '.join(widths)}; got {type(features).__name__}")
        widths = widths if names is None else {name: widths[name] for name in names}
        absent = [name for name in widths if name not in features]
        go_on = '; give missing="training" or "prior" to integrate over what is missing' if caller == "predict" else ""
        if absent:
            raise ValueError(f"{caller or 'features'} needs every modality; missing: {', '.join(absent)}{go_on}")
        like, tensors = self.members[0].rescale.mean, {}
        for name, width in widths.items():
            try:
                x = torch.as_tensor(features[name], dtype=like.dtype, device=like.device)
            except (TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:80]
                raise ValueError(f"features {name!r}: is no array of numbers ({reason})") from error
            if x.ndim == 0 or x.shape[-1] != width:
                raise ValueError(f"features {name!r}: shape {tuple(x.shape)} does not end in its width {width}")
            if caller is not None and x.ndim != 2:
                raise ValueError(f"features {name!r}: shape {tuple(x.shape)}; {caller} takes (N, {width})")
            if caller is not None or names is not None:
                bad = ~x.isfinite() if names is None else x.isinf()
                if bad.any():
                    row, value = bad.any(-1).nonzero()[0].item(), x[bad][0].item()
                    remedy = go_on if math.isnan(value) else ""
                    raise ValueError(f"features {name!r}: row {row} holds {value}{remedy}")
            tensors[name] = x
        if caller is not None and len({len(x) for x in tensors.values()}) > 1:
            raise ValueError(", ".join(f"{name} has {len(x)} rows" for name, x in tensors.items()))
        return tensors
