"""Reading a saved model: config.json and model.safetensors, checked before a single weight is used."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from jwae_module import Noise
from mmfusion.dataset import Task
from mmfusion.errors import InputError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_CONFIG_BYTES = 2**24  # with all of run.json inside, a config of 10,000 skipped images has 1 MB


def find_pretrained(source: str | Path) -> Path:
    """The folder of a saved model: a local one, or a snapshot of a repository of the Hugging Face hub.

    Raises InputError where there is no such folder, or no such repository that can be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise InputError(f"{source}: no such folder; give that of a run, such as runs/demo, or OWNER/NAME of the hub")
    from huggingface_hub import snapshot_download  # not needed for folders

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's client raises a dozen kinds, from OSError to its own
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{source}: neither a folder here nor a model of the hub that can be read ({reason})"
        ) from error


def read_config(folder: Path) -> dict[str, object]:
    """config.json as a dict. Raises InputError."""
    path = folder / CONFIG
    try:
        if not path.is_file():  # a FIFO too: opening one waits for ever
            raise InputError(f"{path}: no such file; {folder} holds no saved model")
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise InputError(f"{path}: is larger than {MOST_CONFIG_BYTES >> 20} MB, so no model's; train the run anew")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); train the run anew") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object; train the run anew")
    return config


def check_shape(
    config: Mapping[str, object], widths: int, fusion: object, path: Path, affine: bool = False
) -> dict[str, object]:
    """The constructor's arguments among the entries of a config.json, each of a type and size that it may have.

    Args:
        widths: largest width, rank or number of members.
        fusion: a Literal of the fusions that there are.
        affine: whether encoders may have a hidden layer of width 0, and then none.

    Raises InputError naming file and entry.
    """
    whole = ("members", "latent_dim", "hidden_dim", "rank", "output_dim")
    for name in whole:
        value, least = config.get(name, 1), 0 if affine and name == "hidden_dim" else 1
        if type(value) is not int or not least <= value <= widths:
            raise InputError(f"{path}: {name} is {json.dumps(value)[:40]}, not a whole number from {least} to {widths}")
    dims = config.get("input_dims")
    if not isinstance(dims, dict) or not dims or not all(type(d) is int and 1 <= d <= widths for d in dims.values()):
        raise InputError(f"{path}: input_dims is {json.dumps(dims)[:60]}, not a width from 1 to {widths} per modality")
    if config.get("fusion", "lmf") not in get_args(fusion):
        known = ", ".join(get_args(fusion))
        raise InputError(f"{path}: fusion is {json.dumps(config['fusion'])[:40]}; known are {known}")
    if config.get("task", "binary") not in get_args(Task):
        raise InputError(f"{path}: task is {json.dumps(config['task'])[:40]}; known are {', '.join(get_args(Task))}")
    if config.get("noise", "none") not in get_args(Noise):
        raise InputError(f"{path}: noise is {json.dumps(config['noise'])[:40]}; known are {', '.join(get_args(Noise))}")
    bound = config.get("spectral_norm")
    if bound is not None and not (type(bound) in (int, float) and 0 < bound < math.inf):
        raise InputError(f"{path}: spectral_norm is {json.dumps(bound)[:40]}, not a number above 0")
    return {
        name: config[name]
        for name in (*whole, "input_dims", "fusion", "spectral_norm", "task", "noise")
        if name in config
    }


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a safetensors file that holds exactly its tensors, all of them finite.

    Shapes are compared by the file's header before anything is read. Raises InputError.
    """
    remedy = "it is of another model, or damaged: train the run anew"
    if not path.is_file():
        raise InputError(f"{path}: no such file; train the run anew")
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            different = [name for name in {**wanted, **held} if wanted.get(name) != held.get(name)]
            if different:
                name = different[0]
                raise InputError(
                    f"{path}: {name} is {held.get(name, 'missing')}, not {wanted.get(name, 'a part of this model')} "
                    f"({len(different)} of {len(wanted)} tensors differ); {remedy}"
                )
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); {remedy}") from error
    bad = [name for name, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    if bad:
        raise InputError(f"{path}: {bad[0]} holds values that are no finite numbers; {remedy}")
    with torch.no_grad():
        model.load_state_dict(state)
