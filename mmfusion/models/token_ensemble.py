"""Ensembles of models that take sequences: the transformer of `wma`, and LMF over pairs of tokens (`temporal_lmf`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mmfusion.dataset import Task
from mmfusion.errors import InputError, check_numbers
from mmfusion.metrics.tasks import probabilities
from mmfusion.models.ensemble import Ensemble
from mmfusion.models.fusion import MOST_WIDTH, FusionEnsemble
from mmfusion.models.pretrained import CONFIG, check_shape, find_pretrained, read_config
from mmfusion.models.temporal_lmf import Plan, TemporalFusion
from mmfusion.models.vilt import check_vilt
from mmfusion.models.wma import MOST_LAYERS, TokenTransformer
from mmfusion.sequences import Sequences, chunks, token_counts

TokenFusion = Literal["wma", "transport"]
MODELS: dict[TokenFusion, type[nn.Module]] = {"wma": TokenTransformer, "transport": TemporalFusion}


@dataclass(frozen=True)
class TokenConfig:
    """What fuses, and how tokens are fused."""

    fusion: Literal["lmf", "wma", "transport"] = "lmf"
    """lmf: one vector of each modality; wma: a transformer over all tokens, aligned by a Wasserstein distance;
    transport: LMF over pairs of tokens that optimal transport has matched"""
    plan: Plan = "transport"
    """of --fusion transport: which tokens meet; transport, or by their place: diagonal, banded, or uniform"""
    band: float = 0.1
    """of --plan banded: standard deviation of the lag, as a share of the whole duration"""
    transformer_width: int = 128
    """of --fusion wma: width of the tokens"""
    transformer_layers: int = 2
    """of --fusion wma: number of layers"""
    transformer_heads: int = 8
    """of --fusion wma: attention heads of a layer, a divisor of the width"""
    transformer_dropout: float = 0.1
    """of --fusion wma: rate at which channels of what a layer adds are dropped in training"""
    transformer_weights: str | None = None
    """of --fusion wma: folder of a ViLT (config.json, model.safetensors), whose width, layers and heads the transformer
    then has, and whose weights its layers start from"""
    transformer_modality_dropout: float = 0.0
    """of --fusion wma: the transformer's, in place of --modality-dropout, which keeps it from learning"""

    @property
    def takes_tokens(self) -> bool:
        """False where one vector of each modality is all that is read."""
        return self.fusion != "lmf"

    def check(self) -> None:
        """Raise InputError naming the first flag out of range."""
        widths = {name: (1, MOST_WIDTH) for name in ("transformer_width", "transformer_layers", "transformer_heads")}
        widths["transformer_layers"] = (1, MOST_LAYERS)
        rates = {"transformer_dropout": (0, 0.9), "transformer_modality_dropout": (0, 0.9)}
        check_numbers(self, widths | rates | {"band": (1e-3, 1e3)})
        if self.transformer_width % self.transformer_heads:
            raise InputError(
                f"--transformer-heads {self.transformer_heads}: must divide --transformer-width "
                f"{self.transformer_width}, for instance 8 of 128"
            )
        for field in fields(self):
            owner = "wma" if field.name.startswith("transformer") else "transport"
            if field.name != "fusion" and self.fusion != owner and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise InputError(
                    f"--{flag} {getattr(self, field.name)}: is of --fusion {owner}, and this is {self.fusion}; "
                    "leave it out"
                )
        if self.band != TokenConfig.band and self.plan != "banded":
            raise InputError(f"--band {self.band}: is of --plan banded, and this is {self.plan}; leave it out")
        if self.transformer_weights is not None:
            for name in widths:
                if getattr(self, name) != getattr(TokenConfig, name):
                    flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                    raise InputError(f"{flag}: --transformer-weights brings its own; leave one of the two out")
            check_vilt(self.transformer_weights)


def check_compiler_use(tokens: TokenConfig, compiled: bool) -> None:
    """Raise InputError where a model of tokens is to be compiled: batches have as many shapes as lengths."""
    if tokens.takes_tokens and compiled:
        raise InputError(f"--compile: is of models of vectors; leave it out with --fusion {tokens.fusion}")


class TokenEnsemble(Ensemble):
    """Independently trained members of one shape; takes raw sequences, gives what every member says.

    `fusion` names the model ("wma" or "transport"), and `model` holds further arguments of its constructor.
    """

    def __init__(
        self,
        input_dims: dict[str, int],
        members: int = 1,
        output_dim: int = 1,
        fusion: TokenFusion = "wma",
        task: Task = "binary",
        **model: object,
    ) -> None:
        super().__init__()
        self.task = task
        self.shape = {
            "input_dims": dict(sorted(input_dims.items())),
            "members": members,
            "output_dim": output_dim,
            "fusion": fusion,
            "task": task,
            **model,
        }
        build = MODELS[fusion]
        self.members = nn.ModuleList(build(input_dims, output_dim=output_dim, **model) for _ in range(members))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "TokenEnsemble":
        """A saved ensemble, in evaluation mode, as `FusionEnsemble.from_pretrained`. Raises InputError."""
        folder = find_pretrained(source)
        config, path = read_config(folder), folder / CONFIG
        shape = check_shape(config, MOST_WIDTH, TokenFusion, path)
        shape |= _model_arguments(config, path)
        return cls.from_folder(folder, shape)

    @torch.inference_mode()
    def forward(self, features: Mapping[str, Sequences]) -> Tensor:
        """Logits, or a regression's values, (S, N, O) of N raw sequences of each modality."""
        features = self._sequences(features)
        order = token_counts(features).argsort(stable=True)
        device = self.members[0].rescale.mean.device
        outputs = [torch.zeros(len(self.members), 0, self.shape["output_dim"], device=device)]
        for part in chunks(features, order, device):
            outputs.append(torch.stack([member(part).prediction for member in self.members]))
        return torch.cat(outputs, 1)[:, order.argsort()]

    def predict(self, features: Mapping[str, Sequences | Sequence[np.ndarray | Tensor]]) -> Tensor:
        """What every member says: probabilities as `FusionEnsemble.predict`, or a regression's values.

        Args:
            features: of each modality N sequences (T_i, d_m), as `Sequences` or a list of arrays. An empty one is a
                missing modality.

        Raises ValueError for a modality that is not there, or another width.
        """
        return probabilities(self(features), self.task)

    def predict_proba(self, features: Mapping[str, Sequences | Sequence[np.ndarray | Tensor]]) -> Tensor:
        """Probabilities, as `predict`. Raises ValueError for a regression."""
        if self.task == "regression":
            raise ValueError("a regression has no probabilities; `predict` gives its values")
        return self.predict(features)

    def _sequences(self, features: Mapping[str, Sequences | Sequence[np.ndarray | Tensor]]) -> dict[str, Sequences]:
        found = {}
        for name, width in self.shape["input_dims"].items():
            if name not in features:
                raise ValueError(f"features need every modality; missing: {name}")
            x = features[name]
            x = x if isinstance(x, Sequences) else Sequences([torch.as_tensor(part).float() for part in x])
            if x.shape[-1] != width:
                raise ValueError(f"features {name!r}: tokens are {x.shape[-1]} wide, not {width}")
            found[name] = x
        if len({len(x) for x in found.values()}) > 1:
            raise ValueError(", ".join(f"{name} has {len(x)} sequences" for name, x in found.items()))
        return found


def _model_arguments(config: Mapping[str, object], path: Path) -> dict[str, object]:
    """Those of the model's own constructor, checked. Raises InputError naming file and entry."""
    wanted = {"wma": ("width", "layers", "heads", "places", "dropout"), "transport": ("plan", "band")}[config["fusion"]]
    found = {}
    for name in wanted:
        value = config.get(name)
        if name == "plan":
            good = value in get_args(Plan)
        elif name in ("dropout", "band"):
            good = type(value) in (int, float) and 0 <= value <= 1e3
        else:
            good = type(value) is int and 1 <= value <= (MOST_LAYERS if name == "layers" else MOST_WIDTH)
        if not good:
            raise InputError(f"{path}: {name} is {str(value)[:40]!r}, which it cannot be; train the run anew")
        found[name] = value
    if config["fusion"] == "wma":  # what only a transformer that started from given weights has
        epsilon, embedded = config.get("epsilon", 1e-5), config.get("embedded_inputs", [])
        if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
            raise InputError(f"{path}: epsilon is {str(epsilon)[:40]!r}, which it cannot be; train the run anew")
        if not isinstance(embedded, list) or not all(isinstance(name, str) for name in embedded):
            raise InputError(f"{path}: embedded_inputs is {str(embedded)[:40]!r}, no list of names; train the run anew")
        found |= {"epsilon": epsilon, "embedded_inputs": embedded}
    return found


def load_ensemble(source: str | Path) -> FusionEnsemble | TokenEnsemble:
    """A saved ensemble of either kind. Raises InputError."""
    fusion = read_config(find_pretrained(source)).get("fusion")
    return (TokenEnsemble if fusion in get_args(TokenFusion) else FusionEnsemble).from_pretrained(source)
