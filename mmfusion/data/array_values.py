"""Checks of single arrays that users bring: float32 vectors, targets, texts. Each error is one line."""

import re

import numpy as np
import torch
from torch import nn

from mmfusion.data.pooling import occupied_steps
from mmfusion.errors import InputError, printable
from mmfusion.sequences import Sequences

MODALITY = re.compile(r"\w[\w-]{0,59}")
TAKEN = nn.ModuleDict()  # models keep a module per modality, under its name


def check_modality_name(name: str, where: str) -> None:
    """Raise InputError beginning with `where` for a name that no part of a model, and no folder, can have."""
    if not MODALITY.fullmatch(name):
        shown = printable(name)[:60]
        raise InputError(
            f"{where}: modality '{shown}' has a name of other signs than letters, digits, _ and -; rename it"
        )
    if hasattr(TAKEN, name):
        raise InputError(f"{where}: modality {name!r} has a name that PyTorch's modules use themselves; rename it")


def plain_array(value: object, where: str) -> np.ndarray:
    """A NumPy array without objects: lists, tensors and pandas' columns of texts are taken."""
    try:
        x = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{where}: is no array of NumPy ({reason}); rows need one length, tensors the CPU") from error
    if x.dtype.kind == "O":
        if x.size and all(isinstance(one, str) for one in x.ravel()):
            return x.astype(str)
        raise InputError(f"{where}: holds Python objects; give an array of numbers, or of texts")
    return x


def feature_vectors(x: np.ndarray, where: str) -> np.ndarray:
    """float32 (N, d), finite."""
    _check_real(x, where)
    if x.ndim > 2:
        raise InputError(
            f"{where}: has shape {x.shape}, a sequence per example; pool its steps first "
            "(mmfusion.data.pooling.pool_over_time) to one vector (N, d), or keep them with --tokens"
        )
    if x.ndim == 0 or 0 in x.shape:
        raise InputError(f"{where}: has shape {x.shape}; expected (N, d) with at least one row and column")
    with np.errstate(over="ignore"):
        values = np.array(x, np.float32)  # a copy: arrays from a file may be read-only
    check_finite_rows(values, x, where)
    return values if x.ndim == 2 else values[:, None]


def feature_sequences(x: np.ndarray, where: str) -> Sequences:
    """N sequences float32 (T_i, d), finite, of (N, T, d); of (N, d), or (N,), one token each.

    Steps that are all zero, or NaN throughout, are padding.
    """
    if x.ndim < 3:
        return Sequences(list(torch.from_numpy(feature_vectors(x, where)).unsqueeze(1)))
    _check_real(x, where)
    if x.ndim > 3 or 0 in x.shape:
        raise InputError(f"{where}: has shape {x.shape}; expected (N, T, d) with at least one row, step and column")
    parts = []
    for row, steps in enumerate(x):
        with np.errstate(over="ignore"):
            values = np.array(steps, np.float32)
        kept = occupied_steps(values) & ~np.isnan(values).all(-1)
        if not np.isfinite(values[kept]).all():
            step, column = np.argwhere(kept[:, None] & ~np.isfinite(values))[0]
            value = f"{steps[step, column]}{_beyond(steps[step, column])}"
            remedy = "leave that step out (NaN throughout), or fill the value in"
            raise InputError(f"{where}: step {step} of row {row} holds {value}; {remedy}")
        parts.append(torch.from_numpy(values[kept]))
    return Sequences(parts)


def _check_real(x: np.ndarray, where: str) -> None:
    if x.dtype.kind not in "biuf":
        what = "texts, which must be encoded first" if x.dtype.kind in "US" else f"{x.dtype}, not real numbers"
        raise InputError(f"{where}: holds {what}; leave it out with --ignore")


def _beyond(value: np.number) -> str:
    return ", beyond the range of float32" if np.isfinite(value) else ""


def check_finite_rows(values: np.ndarray, raw: np.ndarray, where: str) -> None:
    """Raise InputError naming the first row of `values` (N, ...) that is not finite, and its value in `raw`."""
    finite = np.isfinite(values)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        value = f"{raw[place]}{_beyond(raw[place])}"
        raise InputError(f"{where}: row {place[0]} holds {value}; leave that example out, or fill the value in")


def target_values(x: np.ndarray, where: str) -> np.ndarray:
    """(N,) or (N, O) numbers, finite, or (N,) texts."""
    if x.dtype.kind not in "biufUS":
        raise InputError(f"{where}: is of type {x.dtype}; expected numbers or texts")
    if x.ndim not in (1, 2) or 0 in x.shape:
        raise InputError(f"{where}: has shape {x.shape}; expected (N,) or (N, O) with at least one row")
    if x.dtype.kind in "US":
        return np.array(strings(x.reshape(len(x), -1)[:, 0], where)) if x.size == len(x) else x.astype(str)
    check_finite_rows(x, x, where)
    return x


def strings(x: np.ndarray, where: str) -> list[str]:
    """N strings of (N,) texts or whole numbers."""
    if x.ndim != 1 or x.dtype.kind not in "USiub":
        raise InputError(f"{where}: has shape {x.shape} of {x.dtype}; expected (N,) texts or whole numbers")
    try:
        texts = [one.decode("utf-8", "replace") if isinstance(one, bytes) else str(one) for one in x.tolist()]
    except ValueError as error:  # numbers beyond Unicode's, which a damaged file may hold
        raise InputError(f"{where}: holds texts that are not Unicode; save the file again") from error
    return [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair can be printed nowhere
