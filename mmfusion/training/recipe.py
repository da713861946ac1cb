"""Settings of a training, each declared once: sections of the main script's Config, and the study's common recipe."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from mmfusion.dataset import Task
from mmfusion.errors import InputError, check_numbers, check_types
from mmfusion.losses.token_alignment import Layers, TransportTerm
from mmfusion.models.fusion import ModelConfig, Noise
from mmfusion.training.objective import FIT_TERM, PRIOR_TERMS, Alignment, Prior
from mmfusion.training.trainer import Annealing

INFINITY = float("inf")
REGRESSION_EPOCHS = 60


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised: BCE + mmd * MMD^2 + reconstruction * squared error + alignment * pair alignment."""

    mmd_weight: float = 1.0
    """weight of the MMD to the Gaussian prior; where the three below are 0 too, there is no prior"""
    bures_weight: float = 0.0
    """weight of the 2-Wasserstein distance of the latents' mean and covariance to the prior's"""
    sliced_weight: float = 0.0
    """weight of the sliced Wasserstein distance of the latents to the prior"""
    characteristic_weight: float = 0.0
    """weight of the distance of the latents' characteristic function to the prior's, along random directions"""
    reconstruction_weight: float = 0.1
    """weight of the reconstruction error"""
    alignment_weight: float = 0.1
    """weight of the alignment of one example's latents"""
    alignment: Alignment = "margin"
    """which alignment: the margin ranking loss of the jWAE paper, symmetric InfoNCE, or another of docs/alignment.md"""
    transport_weight: float = 0.1
    """of models of tokens: weight of the Wasserstein distance between the tokens of two modalities"""
    transport_method: Literal["ipot", "sinkhorn", "random"] = "ipot"
    """of models of tokens: where its plan comes from; random is a control"""
    transport_layers: Layers = "last"
    """of models of tokens: which layers' tokens it aligns"""
    transport_warm_up: float = 0.33
    """of models of tokens: share of all steps over which that weight rises from 0 on a straight line"""

    def loss_weights(
        self, task: Task, modalities: Collection[str], active: Collection[str] | None = None
    ) -> dict[str, float]:
        """Weight of each loss term: 1 for the fit, 0 for a regularising term outside `active` (default: all are on).

        A single modality has nothing to be aligned with, and no such term.
        """
        weights = {FIT_TERM[task]: 1.0}
        for field in fields(self):
            term = field.name.removesuffix("_weight")
            if term in PRIOR_TERMS and term not in self.prior:
                continue
            if term in ("transport", field.name):
                continue
            if term != "alignment" or len(modalities) > 1:
                weights[term] = getattr(self, field.name) if active is None or term in active else 0.0
        return weights

    def token_weights(self, task: Task, modalities: Collection[str]) -> dict[str, float]:
        """Weight of each term of `mmfusion.training.objective.token_terms`."""
        weights = {FIT_TERM[task]: 1.0}
        if len(modalities) > 1:
            weights |= {"transport": self.transport_weight, "token_mmd": 0.0}
        return weights | {name: getattr(self, f"{name}_weight") for name in (*self.prior, "reconstruction")}

    @property
    def token_warm_up(self) -> dict[str, float]:
        """{alignment of tokens: share of all steps over which its weight rises}; {} where it is whole at once."""
        return dict.fromkeys(("transport", "token_mmd"), self.transport_warm_up) if self.transport_warm_up else {}

    @property
    def transport_term(self) -> TransportTerm:
        """The alignment of tokens."""
        return TransportTerm(self.transport_method, self.transport_layers)

    @property
    def prior(self) -> tuple[Prior, ...]:
        """The penalties towards the prior that are terms of the loss."""
        # beside the MMD, which a setting of a grid may turn off, what has no weight is not computed
        return tuple(name for name in PRIOR_TERMS if name == "mmd" or getattr(self, f"{name}_weight"))

    def check(self) -> None:
        """Raise InputError naming the first flag out of range."""
        check_types(self)
        names = [field.name for field in fields(self) if field.name.endswith("_weight")]
        check_numbers(self, {name: (0, 1e9) for name in names} | {"transport_warm_up": (0, 1)})


@dataclass(frozen=True)
class TrainingConfig:
    """How members are trained, and which epoch of each is kept."""

    seeds: int = 5
    """number of members, one per seed; all are trained at once"""
    first_seed: int = 0
    """seeds are FIRST .. FIRST + n - 1"""
    epochs: int = 30
    """at most; see --patience"""
    patience: int = 6
    """epochs without a better score on dev (AUROC of two classes) after which a member stops"""
    select_by: Literal["default", "log_loss"] = "default"
    """what the best epoch is: default is AUROC of two classes, log loss of more, MAE of values; log_loss of two too"""
    batch_size: int = 64
    """examples per step"""
    learning_rate: float = 1e-3
    """of Adam"""
    annealing: Annealing = "none"
    """cosine: the learning rate falls to 0 over all epochs along half a cosine; linear: it rises over the first tenth
    of all steps and falls to 0 on a straight line"""
    keep: Literal["best", "last"] = "best"
    """which epoch is kept: the best on the selection split, or the last (nothing stops early, nothing is selected)"""
    weight_decay: float = 1.0
    """decoupled, on weight matrices"""
    modality_dropout: float = 0.3
    """rate at which each modality is hidden in training, of models that have several"""
    feature_dropout: float = 0.0
    """rate at which single features are set to their mean in training"""
    class_weight: Literal["none", "balanced"] = "none"
    """balanced: every class (of a multilabel target, each label's presence and absence) weighs alike in the fit"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""
    compile: bool = False
    """compile the training step (pays on long runs)"""

    def check(self) -> None:
        """Raise InputError naming the first flag out of range."""
        check_types(self)
        bounds = {
            "seeds": (1, 1024),
            "first_seed": (0, 2**31 - 2048),
            "epochs": (1, 1e6),
            "patience": (1, 1e6),
            "batch_size": (2, 1e6),
        }
        check_numbers(self, bounds | {"weight_decay": (0, 1e9)})
        if not 0 < self.learning_rate < INFINITY:
            raise InputError(f"--learning-rate {self.learning_rate}: give a number above 0, for instance 1e-3")
        if not 0 <= self.modality_dropout < 1:
            raise InputError(f"--modality-dropout {self.modality_dropout}: give a rate from 0 up to, not including, 1")
        if not 0 <= self.feature_dropout <= 0.99:
            raise InputError(f"--feature-dropout {self.feature_dropout}: give a rate from 0 to 0.99")
        check_compiler(self.compile)


def check_compiler(wanted: bool) -> None:
    """Raise InputError where --compile is wanted and there is no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if wanted and shutil.which(compiler) is None:
        raise InputError(
            f"--compile: needs a C++ compiler, and {compiler} is not found; install it, or leave the flag out"
        )


@dataclass(frozen=True)
class Recipe:
    """What all experiments train alike, on every data set of classes; docs/recipe.md says how it was chosen.

    `Recipe.of(task)` is that of any task: a regression is trained for longer, since its squared error does not rise, as
    cross-entropy does, with the certainty that longer training brings.
    """

    latent_dim: int = ModelConfig.latent_dim
    """width L of the latents"""
    hidden_dim: int = ModelConfig.hidden_dim
    """width of the encoders' and decoders' hidden layer"""
    noise: Noise = ModelConfig.noise
    """of the latents: none, or a standard deviation learned for each dimension"""
    epochs: int = 15
    """passes over the training part; at most, where the best is kept"""
    keep: Literal["last", "best"] = "last"
    """the last epoch's parameters, with a learning rate that falls to 0 along half a cosine and no split selected upon;
    or the best on dev, at a constant rate, stopped after 10 epochs without a better one"""
    batch_size: int = TrainingConfig.batch_size
    """examples per step"""
    learning_rate: float = TrainingConfig.learning_rate
    """of Adam, at the start"""
    weight_decay: float = TrainingConfig.weight_decay
    """decoupled, on weight matrices: each step takes learning_rate * weight_decay off them, .1 %"""
    modality_dropout: float = TrainingConfig.modality_dropout
    """rate at which each modality is hidden in training"""
    feature_dropout: float = 0.6
    """rate at which single features are set to their mean in training"""
    mmd_weight: float = ObjectiveConfig.mmd_weight
    """weight of the prior where it is on"""
    reconstruction_weight: float = ObjectiveConfig.reconstruction_weight
    """weight of the reconstruction error where it is on"""
    alignment_weight: float = ObjectiveConfig.alignment_weight
    """weight of the pair alignment (margin ranking) where it is on"""

    @classmethod
    def of(cls, task: Task, **changes: object) -> "Recipe":
        """The recipe of a task, with changes."""
        return cls(**({"epochs": REGRESSION_EPOCHS} if task == "regression" else {}) | changes)

    @property
    def objective(self) -> ObjectiveConfig:
        """The weights of the loss terms."""
        return ObjectiveConfig(
            mmd_weight=self.mmd_weight,
            reconstruction_weight=self.reconstruction_weight,
            alignment_weight=self.alignment_weight,
        )
