"""Checkpoint files: tensors and progress of a training, with a checksum, validated before anything is used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmfusion.errors import InputError
from mmfusion.files import write_safetensors


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, object]) -> None:
    """Write tensors and JSON-able progress atomically. Raises InputError where the file cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(progress)
    write_safetensors(path, tensors, {"progress": text, "sha256": _digest(tensors, text)})


def read_checkpoint(
    path: Path, shapes: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(tensors on the CPU, progress) of a checkpoint that holds the tensors of `shapes`, and all or none of `optional`.

    Raises InputError where the file is of another training or has changed since it was written.
    """
    try:
        if not path.is_file():  # a FIFO: opening one waits for ever
            raise ValueError("is no regular file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            wanted = {**shapes, **(optional if names & set(optional) else {})}
            if names != set(wanted):
                raise ValueError(f"{len(names ^ set(wanted))} tensors too many or missing")
            for name, shape in wanted.items():
                if tuple(file.get_slice(name).get_shape()) != tuple(shape):
                    raise ValueError(f"{name} has another shape")
            tensors = {name: file.get_tensor(name) for name in wanted}
        if metadata.get("sha256") != _digest(tensors, metadata.get("progress", "")):
            raise ValueError("its contents do not agree with its checksum")
        return tensors, json.loads(metadata["progress"])
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: damaged checkpoint ({reason}); delete it to train this model anew") from error


def _digest(tensors: Mapping[str, Tensor], progress: str) -> str:
    """SHA-256 of names, types and values, and of the progress: any flipped bit shows."""
    digest = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
