"""Named arrays in a file: .npz, a folder of .npy files, or .safetensors.

    arrays, identity = read_arrays(Path("features.npz"))
    arrays["image_train"].shape, identity["sha256"]

Nothing in such a file is run, and its headers are checked against its size before memory is taken.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mmfusion.data.pickles import PLAIN_REMEDY, HoldsObjects, check_array_header, file_identity, load_npz
from mmfusion.errors import InputError
from mmfusion.files import DATA_BYTES, check_regular_file, in_units

REMEDY = "give an .npz, a folder of .npy files, or .safetensors"
WIDE = (torch.float16, torch.float32, torch.float64)  # float dtypes that NumPy has too


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """All arrays by key, in the file's order, and the file's identity: name without folder, and SHA-256.

    The keys of a folder are the names of its .npy files. bfloat16 and float8 become float32. Raises InputError naming
    the file (and the array) where it cannot be read, is damaged, or claims more numbers than it has.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):  # unlike Path's own, it takes names that are too long
        return _read_folder(path)
    check_regular_file(path, DATA_BYTES, REMEDY)
    if path.suffix not in (".npz", ".safetensors"):
        raise InputError(f"{path}: is of a kind that is not read; {REMEDY}")
    arrays = load_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    return arrays, file_identity(path)


def arrays_identity(arrays: Mapping[str, np.ndarray]) -> dict[str, object]:
    """SHA-256 of arrays in memory: keys, types, shapes and values, whatever the order of the keys."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        x = np.ascontiguousarray(arrays[key])
        digest.update(f"{key!r} {x.dtype.str} {x.shape}\0".encode())
        digest.update(repr(x.tolist()).encode() if x.dtype.hasobject else x.tobytes())
    return {"sha256": digest.hexdigest()}


def _read_folder(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    try:
        files = sorted(Path(path, name) for name in os.listdir(path) if name.endswith(".npy"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not files:
        raise InputError(f"{path}: holds no .npy file; {REMEDY}")
    arrays = {file.stem: _read_npy(file) for file in files}
    digests = [f"{file.name} {file_identity(file)['sha256']}" for file in files]
    return arrays, {"file": path.absolute().name, "sha256": hashlib.sha256("\n".join(digests).encode()).hexdigest()}


def _read_npy(path: Path) -> np.ndarray:
    check_regular_file(path, DATA_BYTES)
    try:
        with open(path, "rb") as file:
            check_array_header(file, path.stat().st_size, path.name)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # damaged headers end in any of a dozen inside numpy
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        remedy = PLAIN_REMEDY if isinstance(error, HoldsObjects) else "save it again"
        raise InputError(f"{path}: is not a readable array of plain numbers ({reason}); {remedy}") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors as arrays; the library checks the header's offsets against the file's size."""
    try:
        with safe_open(path, framework="pt") as file:
            arrays = {}
            for key in file.keys():
                x = file.get_tensor(key)
                arrays[key] = (x.float() if x.is_floating_point() and x.dtype not in WIDE else x).numpy()
            return arrays
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        size = in_units(path.stat().st_size)
        raise InputError(f"{path}: is not a whole .safetensors ({reason}; it has {size}); save it again") from error
