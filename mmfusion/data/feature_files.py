"""Files of features that were encoded elsewhere: `id` (or `img`) and `features`, one row each.

image = read_features(Path("clip_image.npz"))
image.of(["img/01235.png"]).shape  # (1, 512)
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mmfusion.data.array_files import read_arrays
from mmfusion.data.array_values import check_modality_name, feature_vectors, strings
from mmfusion.encoders.precomputed import PrecomputedFeatures
from mmfusion.errors import InputError

ID_KEYS = ("img", "id")
VECTOR_KEY = "features"


def read_features(path: Path) -> PrecomputedFeatures:
    """The vectors of an .npz, a folder of .npy files, or .safetensors, by id.

    The file holds `id` or `img` (N,), texts or whole numbers, each once, and `features` (N, d), or one array of any
    other name in its place; .safetensors has no texts, so ids there are whole numbers. Raises InputError naming the
    file and what is wrong with it.
    """
    path = Path(os.path.expanduser(path))
    arrays, identity = read_arrays(path)
    key = next((key for key in ID_KEYS if key in arrays), None)
    listed = ", ".join(map(repr, list(arrays)[:20])) or "none"
    if key is None:
        raise InputError(f"{path}: has neither 'img' nor 'id', its keys are {listed}; add the ids (N,) of its rows")
    others = [name for name in arrays if name not in ID_KEYS]
    name = VECTOR_KEY if VECTOR_KEY in others else others[0] if len(others) == 1 else None
    if name is None:
        raise InputError(f"{path}: has no array {VECTOR_KEY!r}, its keys are {listed}; add the vectors (N, d)")
    ids = strings(arrays[key], f"{path}: {key}")
    vectors = feature_vectors(arrays[name], f"{path}: {name}")
    if len(ids) != len(vectors):
        raise InputError(f"{path}: {key} has {len(ids)} rows and {name} has {len(vectors)}; give each vector one id")
    rows = {one: row for row, one in enumerate(ids)}
    if len(rows) < len(ids):
        twice = next(one for row, one in enumerate(ids) if rows[one] != row)
        raise InputError(f"{path}: {len(ids) - len(rows)} ids occur again, {twice!r:.80} first; keep one row of each")
    return PrecomputedFeatures(torch.from_numpy(vectors), rows, identity, str(path))


def read_feature_flags(flags: Sequence[str]) -> dict[str, PrecomputedFeatures]:
    """Modality -> features, of flags MODALITY=PATH. Raises InputError naming the flag or the file."""
    found: dict[str, PrecomputedFeatures] = {}
    for flag in flags:
        modality, _, path = flag.partition("=")
        if not modality or not path:
            raise InputError(f"--features {flag}: give MODALITY=PATH, such as image=clip_image.npz")
        check_modality_name(modality, f"--features {flag}")
        if modality in found:
            raise InputError(f"--features {flag}: {modality} is given twice; name one file of it")
        found[modality] = read_features(Path(path))
    return found
