"""Start of a transformer over tokens from the weights of ViLT (Kim et al., 2021), read from a folder.

A block of ViLT is a `mmfusion.models.wma.TransformerLayer`: layer norm, attention, layer norm, two affine maps about a
GELU, each part beside a shortcut. The kinds of tokens and the last layer norm are taken over too. Projections, places
and the readout are not; but tokens that are ViLT's own embeddings enter as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmfusion.errors import InputError
from mmfusion.files import WEIGHT_BYTES, check_regular_file, read_regular_file
from mmfusion.models.fusion import MOST_WIDTH
from mmfusion.models.pretrained import CONFIG, MOST_CONFIG_BYTES, WEIGHTS
from mmfusion.models.wma import MOST_LAYERS, TokenTransformer

MODEL_TYPE = "vilt"
KINDS = {"text": 0, "image": 1}  # rows of its table of kinds; a third is that of a second picture
# what a config.json of this type means where it says nothing, and the range of each number
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "modality_type_vocab_size": 2,
}
BOUNDS = {name: (1, MOST_WIDTH) for name in DEFAULTS} | {
    "num_hidden_layers": (1, MOST_LAYERS),
    "modality_type_vocab_size": (len(KINDS), MOST_WIDTH),
}
# our name of each part of a block -> theirs, where the two are one tensor
BLOCK = {
    "before_attention": "layernorm_before",
    "project_out": "attention.output.dense",
    "before_hidden": "layernorm_after",
    "hidden": "intermediate.dense",
    "readout": "output.dense",
}
ATTENTION = ("query", "key", "value")
REMEDY = "give a folder that save_pretrained() of a ViLT model wrote"


@dataclass(frozen=True)
class TransformerStart:
    """Initial values of the layers of every member."""

    shape: dict[str, object]
    """arguments of `TokenTransformer`: width, layers, heads, hidden_dim, epsilon"""
    state: dict[str, Tensor]
    """{name in `TokenTransformer`: value} of its layers and last layer norm"""
    kinds: dict[str, Tensor]
    """{modality: (W,)} of those that ViLT knows"""

    @torch.no_grad()
    def fill(self, model: TokenTransformer) -> None:
        """Give a model these layers; it keeps its readout, and its projections but those of `embedded_inputs`.

        Those become the inverse of their standardisation, which must be fitted, and their places 0: the tokens enter
        as they are.
        """
        of_layers = {n: p for n, p in model.state_dict().items() if n.startswith(("layers.", "norm."))}
        if {n: p.shape for n, p in of_layers.items()} != {n: x.shape for n, x in self.state.items()}:
            raise ValueError(f"the model's layers have another shape than {self.shape}")
        for name, value in self.state.items():
            of_layers[name].copy_(value)  # a state dict shares its memory with the parameters
        for name, kind in self.kinds.items():
            if name in model.kinds:
                model.kinds[name].copy_(kind)
        for name in model.embedded_inputs:
            standardise, project = model.standardise[name], model.project[name]
            project.weight.copy_(standardise.std.diag())
            project.bias.copy_(standardise.mean)
            model.places[name].zero_()  # the embeddings know their places


def check_vilt(folder: str | Path, flag: str = "--transformer-weights") -> None:
    """Raise InputError naming `flag` unless `folder` holds a ViLT of safetensors; its tensors are not read."""
    _Folder(folder, flag).check()


def read_vilt(folder: str | Path, flag: str = "--transformer-weights") -> TransformerStart:
    """The layers of the ViLT in `folder` (config.json, model.safetensors), in float32.

    Raises InputError naming `flag`: no such folder, another kind of model, tensors that are missing, of another shape
    than config.json says, or no finite numbers.
    """
    return _Folder(folder, flag).read()


def own_embeddings(provenance: Mapping[str, object], input_dims: Mapping[str, int], width: int) -> list[str]:
    """The modalities whose tokens are embeddings of a ViLT of this width, by what a dataset records of its encoders."""
    encoders = provenance.get("encoders")
    encoders = encoders if isinstance(encoders, Mapping) else {}
    kinds = {name: how.get("encoder") for name, how in encoders.items() if isinstance(how, Mapping)}
    of_vilt = {name for name, kind in kinds.items() if isinstance(kind, Mapping) and kind.get("model") == MODEL_TYPE}
    return [name for name, dim in input_dims.items() if name in of_vilt and dim == width]


class _Folder:
    """A folder in Hugging Face's layout, and what its config.json says."""

    def __init__(self, folder: str | Path, flag: str) -> None:
        self.path, self.flag, self.where = Path(folder).expanduser(), flag, f"{flag} {folder}"
        if not self.path.is_dir():
            raise InputError(f"{self.where}: no such folder; {REMEDY}")
        content = read_regular_file(self.path / CONFIG, MOST_CONFIG_BYTES, REMEDY, flag)
        try:
            config = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.where}: its config.json is no JSON; {REMEDY}") from error
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != MODEL_TYPE:
            raise InputError(f"{self.where}: its config.json is of model_type {str(kind)[:40]!r}, not vilt; {REMEDY}")
        self.has_bias = config.get("qkv_bias", True) is not False
        self.sizes = self._sizes(config)
        self.epsilon = config.get("layer_norm_eps", 1e-12)
        if type(self.epsilon) not in (int, float) or not 0 < self.epsilon < 1:
            raise InputError(f"{self.where}: layer_norm_eps is {str(self.epsilon)[:40]}, no number between 0 and 1")
        if config.get("hidden_act", "gelu") != "gelu":
            raise InputError(f"{self.where}: hidden_act is {str(config['hidden_act'])[:40]!r}; only gelu is known")

    def _sizes(self, config: Mapping[str, object]) -> dict[str, int]:
        sizes = {name: config.get(name, default) for name, default in DEFAULTS.items()}
        for name, value in sizes.items():
            low, high = BOUNDS[name]
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{self.where}: {name} is {str(value)[:40]}, no whole number from {low} to {high}")
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise InputError(
                f"{self.where}: num_attention_heads {sizes['num_attention_heads']} do not divide hidden_size "
                f"{sizes['hidden_size']}; {REMEDY}"
            )
        return sizes

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        """{name of a tensor: its shape}."""
        width, hidden = self.sizes["hidden_size"], self.sizes["intermediate_size"]
        norm = {"weight": (width,), "bias": (width,)}
        square = {"weight": (width, width), "bias": (width,)}
        attention = square if self.has_bias else {"weight": (width, width)}
        block = {f"attention.attention.{part}": attention for part in ATTENTION} | {
            "layernorm_before": norm,
            "layernorm_after": norm,
            "attention.output.dense": square,
            "intermediate.dense": {"weight": (hidden, width), "bias": (hidden,)},
            "output.dense": {"weight": (width, hidden), "bias": (width,)},
        }
        count, kinds = self.sizes["num_hidden_layers"], self.sizes["modality_type_vocab_size"]
        parts = {f"encoder.layer.{i}.{part}": x for i in range(count) for part, x in block.items()}
        parts |= {"layernorm": norm, "embeddings.token_type_embeddings": {"weight": (kinds, width)}}
        return {f"{part}.{kind}": shape for part, of_part in parts.items() for kind, shape in of_part.items()}

    def check(self) -> None:
        self._tensors(with_values=False)

    def _tensors(self, with_values: bool) -> dict[str, Tensor]:
        """{name: float32 tensor} of all that is wanted, a head or not; empty if only checked."""
        path = self.path / WEIGHTS
        if not path.exists():
            raise InputError(f"{self.where}: holds no {WEIGHTS}, and other files of weights are not read; {REMEDY}")
        check_regular_file(path, WEIGHT_BYTES, REMEDY, self.flag)
        wanted, found = self._wanted(), {}
        try:
            with safe_open(path, framework="pt") as file:
                held = set(file.keys())
                prefix = "" if "layernorm.weight" in held else f"{MODEL_TYPE}."
                for name, shape in wanted.items():
                    if prefix + name not in held:
                        raise InputError(f"{self.where}: {WEIGHTS} lacks {name}; {REMEDY}")
                    there = tuple(file.get_slice(prefix + name).get_shape())
                    if there != shape:
                        raise InputError(
                            f"{self.where}: {name} is {there}, where config.json leads to {shape}; {REMEDY}"
                        )
                if with_values:
                    found = {name: file.get_tensor(prefix + name).float() for name in wanted}
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{self.where}: {WEIGHTS} cannot be read ({reason}); {REMEDY}") from error
        bad = next((name for name, value in found.items() if not value.isfinite().all()), None)
        if bad:
            raise InputError(f"{self.where}: {bad} holds values that are no finite numbers; {REMEDY}")
        return found

    def read(self) -> TransformerStart:
        theirs, width = self._tensors(with_values=True), self.sizes["hidden_size"]
        state = {}
        for i in range(self.sizes["num_hidden_layers"]):
            block = f"encoder.layer.{i}"
            attention = [f"{block}.attention.attention.{part}" for part in ATTENTION]
            none = torch.zeros(width)
            state[f"layers.{i}.project_in.weight"] = torch.cat([theirs[f"{name}.weight"] for name in attention])
            state[f"layers.{i}.project_in.bias"] = torch.cat([theirs.get(f"{name}.bias", none) for name in attention])
            for ours, part in BLOCK.items():
                for kind in ("weight", "bias"):
                    state[f"layers.{i}.{ours}.{kind}"] = theirs[f"{block}.{part}.{kind}"]
        state |= {f"norm.{kind}": theirs[f"layernorm.{kind}"] for kind in ("weight", "bias")}
        table = theirs["embeddings.token_type_embeddings.weight"]
        shape = {
            "width": width,
            "layers": self.sizes["num_hidden_layers"],
            "heads": self.sizes["num_attention_heads"],
            "hidden_dim": self.sizes["intermediate_size"],
            "epsilon": self.epsilon,
        }
        return TransformerStart(shape, state, {name: table[row] for name, row in KINDS.items()})
