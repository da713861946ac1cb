"""One estimate over several corpora, or over several traits of one corpus, beside the rows of each.

    y_i = mu + u_i + e_i,    u_i ~ N(0, tau^2),    e_i ~ N(0, v_i),    i = 1 .. k
    mu^ = sum w_i y_i / sum w_i,    w_i = 1 / (v_i + tau^2)

tau^2 by restricted maximum likelihood; interval of mu by Hartung and Knapp (Statistics in Medicine 2001):
mu^ +- t_{k-1} sqrt(q / sum w_i), q = sum w_i (y_i - mu^)^2 / (k - 1). q is taken as at least 1 (Knapp and Hartung
2003), since two or three estimates that agree by chance would otherwise make an interval of next to no width. A new
corpus lies within mu^ +- t_{k-2} sqrt(tau^2 + q / sum w_i) (Higgins, Thompson and Spiegelhalter 2009).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import t as student_t

LEVEL = 0.05
_GRID = 200  # points at which the restricted likelihood is looked at first: it may have two maxima


@dataclass(frozen=True)
class Pooled:
    """Mean over corpora with its uncertainty, and how far corpora lie apart."""

    estimate: float
    low: float
    high: float
    """95 % interval of the mean"""
    tau: float
    """standard deviation of the true values, in the units of the estimate"""
    prediction_low: float | None
    prediction_high: float | None
    """95 % interval for a corpus that was not measured; None for fewer than three, which say nothing of it"""
    p: float
    """two-sided, of a mean of 0"""


def pooled(estimates: Sequence[float] | np.ndarray, standard_errors: Sequence[float] | np.ndarray) -> Pooled:
    """Random-effects estimate over k independent estimates, of one corpus each.

    One estimate alone is refused: its own interval, whose degrees of freedom are not known here, says what it says.
    The standard errors are taken as known. Estimates from the same examples, such as the traits of one corpus, are not
    independent: `pooled_traits`.

    Args:
        estimates: (k,), k at least 2.
        standard_errors: (k,), each > 0.

    Raises ValueError for other shapes, k < 2, NaN or infinity, or a standard error that is not positive.
    """
    y, v = np.asarray(estimates, np.float64), np.asarray(standard_errors, np.float64) ** 2
    if y.ndim != 1 or y.shape != v.shape or len(y) < 2:
        raise ValueError(f"estimates and standard errors are (k,), k at least 2, not {y.shape} and {v.shape}")
    if not (np.isfinite(y).all() and np.isfinite(v).all() and (np.asarray(standard_errors) > 0).all()):
        raise ValueError(f"estimates {y.tolist()} with standard errors {list(standard_errors)}: finite, errors above 0")
    tau2 = reml_variance(y, v)
    w = 1 / (v + tau2)
    mean = float(w @ y / w.sum())
    q = max(1.0, float(w @ (y - mean) ** 2) / (len(y) - 1))
    return _summary(mean, q / w.sum(), tau2, len(y) - 1, len(y) - 2)


def reml_variance(estimates: np.ndarray, variances: np.ndarray) -> float:
    """tau^2 >= 0 of largest restricted likelihood.

        -2 l(tau^2) = sum log(v_i + tau^2) + log sum w_i + sum w_i (y_i - mu^)^2

    Args:
        estimates, variances: (k,), variances > 0.
    """
    scale = float(estimates.var(ddof=1) + variances.max())

    def deviance(tau2: np.ndarray) -> np.ndarray:
        w = 1 / (variances + np.asarray(tau2)[..., None])  # (..., k)
        total = w.sum(-1)
        residuals = estimates - (w @ estimates / total)[..., None]
        return -np.log(w).sum(-1) + np.log(total) + (w * residuals**2).sum(-1)

    points = np.concatenate([[0.0], scale * np.geomspace(1e-6, 10, _GRID)])
    values = deviance(points)
    best = int(np.argmin(values))
    if best == 0 and values[0] <= deviance(points[1] / 100):
        return 0.0
    bounds = (points[max(best - 1, 0)], points[min(best + 1, _GRID)])
    return float(minimize_scalar(deviance, bounds=bounds, method="bounded", options={"xatol": 1e-10 * scale}).x)


def pooled_traits(values: np.ndarray, ratio: float) -> Pooled:
    """Mean over T traits of one corpus, whose estimates share their examples and so their errors.

    With S the traits' covariance over folds times (1 / J + r), B the variance of the T estimates and c the mean of S
    off its diagonal,  Var(mean) = B / T + max(0, c),  tau^2 = max(0, B - mean of S's diagonal + c): the errors that
    all traits have in common do not show in B. Student's t with min(T, J) - 1 degrees of freedom.

    Args:
        values: (T, J) differences of each trait over (repeat, fold), both at least 2.
        ratio: n_test / n_train of a fold, > 0 (Nadeau and Bengio 2003).

    Raises ValueError for other shapes, NaN or infinity, or a ratio that is not positive.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or min(x.shape) < 2 or not np.isfinite(x).all():
        raise ValueError(f"values of traits are (T, J), both at least 2 and finite, not of shape {x.shape}")
    if not 0 < ratio < np.inf:
        raise ValueError(f"ratio {ratio}: test examples for each training example, above 0")
    traits, folds = x.shape
    s = np.cov(x) * (1 / folds + ratio)  # (T, T)
    diagonal = float(np.trace(s)) / traits
    common = (float(s.sum()) / traits - diagonal) / (traits - 1)
    between = float(x.mean(1).var(ddof=1))
    tau2, variance = max(0.0, between - diagonal + common), between / traits + max(0.0, common)
    return _summary(float(x.mean()), variance, tau2, min(traits, folds) - 1, min(traits, folds) - 2)


def _summary(mean: float, variance: float, tau2: float, freedom: int, freedom_of_new: int) -> Pooled:
    error = variance**0.5
    half = student_t.ppf(1 - LEVEL / 2, freedom) * error
    p = 2 * student_t.sf(abs(mean) / error, freedom) if error > 0 else float(mean == 0)
    low = high = None
    if freedom_of_new >= 1:
        width = float(student_t.ppf(1 - LEVEL / 2, freedom_of_new) * (tau2 + variance) ** 0.5)
        low, high = mean - width, mean + width
    return Pooled(mean, float(mean - half), float(mean + half), tau2**0.5, low, high, float(p))
