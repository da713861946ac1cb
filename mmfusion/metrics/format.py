"""Numbers as text: a mean with its spread, the same in every table."""

from collections.abc import Sequence

import numpy as np


def mean_std(
    values: np.ndarray | Sequence[float], digits: int = 3, interval: tuple[float, float] | Sequence[float] | None = None
) -> str:
    """ "0.998 +- 0.001": mean and standard deviation (n - 1 in the denominator) of values (S,), one per seed.

    One value has no spread, and no "+-". With an `interval` (low, high) it follows: "0.998 +- 0.001 [0.993, 1.000]".
    """
    values = np.asarray(values, np.float64)
    text = f"{values.mean():.{digits}f}"
    if values.size > 1:
        text += f" +- {values.std(ddof=1):.{digits}f}"
    if interval is not None:
        low, high = interval
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def counted(number: int, noun: str) -> str:
    """ "1 seed", "5 seeds"."""
    return f"{number} {noun}" + "s" * (number != 1)
