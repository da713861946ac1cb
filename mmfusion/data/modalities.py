"""What an estimator takes as X: a dict of arrays, a list of arrays, or one array with column slices."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_array, validate_data
from torch import Tensor

ALL = "x"
"""the one modality of an array without column slices"""
Modalities = Mapping[str, np.ndarray] | Sequence[np.ndarray] | np.ndarray


def read_modalities(
    estimator: BaseEstimator,
    X: Modalities,
    columns: Mapping[str, slice | Sequence[int]] | None,
    widths: Mapping[str, int] | None,
    *,
    allow_missing: bool = False,
) -> dict[str, Tensor]:
    """float32 (N, d_m) per modality, in the order of their names.

    Args:
        estimator: keeps `n_features_in_` of the one-array form.
        X: {name: (N, d_m)}, a list of these (named m0, m1, ...), or one array (N, d).
        columns: of one array, {name: columns}; default: one modality of all columns.
        widths: those it was fitted on; None while it is fitted.
        allow_missing: keys may be absent, elements of a list None, and values NaN.

    Raises ValueError as scikit-learn does.
    """
    finite = "allow-nan" if allow_missing else True
    listed = isinstance(X, list | tuple) and np.ndim(next((x for x in X if x is not None), None)) == 2
    if listed or (isinstance(X, Mapping) and not issparse(X)):
        named = dict(X) if isinstance(X, Mapping) else {f"m{m}": x for m, x in enumerate(X) if x is not None}
        arrays = {
            str(name): check_array(x, dtype=np.float32, ensure_all_finite=finite, input_name=str(name))
            for name, x in named.items()
        }
        lengths = {name: len(x) for name, x in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"modalities have different numbers of examples: {lengths}")
        if widths is not None:
            if (absent := sorted(set(widths) - set(arrays))) and not allow_missing:
                raise ValueError(f"X lacks the modalities {absent}; it was fitted on {sorted(widths)}")
            arrays = {name: arrays[name] for name in widths if name in arrays}
            wrong = {name: x.shape[1] for name, x in arrays.items() if x.shape[1] != widths[name]}
            if wrong:
                raise ValueError(f"widths {wrong} of X are not those it was fitted on, {dict(widths)}")
    else:
        x = validate_data(estimator, X, reset=widths is None, dtype=np.float32, ensure_all_finite=finite)
        arrays = {}
        for name, chosen in ({ALL: slice(None)} if columns is None else columns).items():
            try:
                arrays[str(name)] = x[:, chosen]
            except IndexError as error:
                raise ValueError(f"modalities[{name!r}]: {error}") from error
            if arrays[str(name)].shape[1] == 0:
                raise ValueError(f"modalities[{name!r}]: no column of the {x.shape[1]} of X")
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in sorted(arrays.items())}
