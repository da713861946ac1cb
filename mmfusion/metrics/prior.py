"""Do latents follow N(0, I), and do they carry anything? n examples, L width of a latent.

Four numbers of the aggregate latents (mean and noise of the encoder together), each beside the range that draws of the
prior give at the same n and L; and two of the means alone, since a latent that is all noise follows the prior too.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.stats import chi2

BALL = 0.95
DRAWS, TAIL = 400, 0.01
NUMBERS = ("largest eigenvalue", "effective dimension", "share in the 95 % ball", "mean |std - 1|")


class Follows(NamedTuple):
    """One of the four numbers, and its range (1 to 99 %) under the prior."""

    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Within the range."""
        return self.low <= self.value <= self.high


class PriorCheck(NamedTuple):
    """What is known of the latents of one modality on one split."""

    follows: dict[str, Follows]
    """by the names in `NUMBERS`"""
    dimension_of_means: float
    """effective dimension of Cov(mu), 1 to L: how many directions tell examples apart"""
    share_of_means: float
    """tr Cov(mu) / (tr Cov(mu) + tr mean s^2): 1 where latents are certain, 0 where they are all noise"""
    enforced: bool
    """no eigenvalue above 2, an effective dimension of three quarters of L, 92 to 98 % in the ball, mean |std - 1| at
    most .1; or within the range of the prior, where that is wider"""


def check_prior(means: np.ndarray, variances: np.ndarray | None = None, seed: int = 0) -> PriorCheck:
    """Compare latents with N(0, I).

    Args:
        means: (n, L), n >= 2.
        variances: of their noise, (L,) or (n, L); default 0. It is drawn once for every example.
        seed: of the draw.

    Raises ValueError for another shape.
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"means must be (n, L) with n of at least 2, got {means.shape}")
    n, width = means.shape
    z, noise = np.asarray(means, np.float64), 0.0
    covariance = np.atleast_2d(np.cov(z, rowvar=False))
    if variances is not None:
        noise = np.broadcast_to(variances, z.shape).astype(np.float64)
        z = z + np.sqrt(noise) * np.random.default_rng(seed).standard_normal(z.shape)
        noise = noise.mean(0).sum()
    numbers, (low, high) = _numbers(z).tolist(), (x.tolist() for x in _ranges(n, width))
    follows = {name: Follows(*x) for name, *x in zip(NUMBERS, numbers, low, high, strict=True)}
    bounds = ((-np.inf, 2), (0.75 * width, np.inf), (0.92, 0.98), (-np.inf, 0.1))
    enforced = [
        min(least, number.low) <= number.value <= max(most, number.high)
        for number, (least, most) in zip(follows.values(), bounds, strict=True)
    ]
    carried = float(np.trace(covariance))
    return PriorCheck(
        follows,
        _effective_dimension(np.linalg.eigvalsh(covariance)),
        carried / (carried + float(noise)) if carried + float(noise) > 0 else 0.0,
        bool(all(enforced)),
    )


def carried_dimension(means: np.ndarray, variances: np.ndarray | None = None) -> float:
    """Effective dimension of Cov(mu) of latents (n, L) whose noise has `variances` (L,), whatever their coordinates.

    It is taken where the latents' covariance with their noise is I, of the eigenvalues of (Cov(mu) + diag s^2)^-1
    Cov(mu): shares of each direction that are no noise. Without noise there is no such unit, and it is that of Cov(mu)
    as it stands.
    """
    covariance = np.atleast_2d(np.cov(np.asarray(means, np.float64), rowvar=False))
    if variances is not None:
        # LMF absorbs any scale of a latent, noise included: only their ratio means something
        scale = np.sqrt(np.maximum(np.asarray(variances, np.float64), 1e-12))
        ratio = np.linalg.eigvalsh(covariance / scale / scale[:, None]).clip(0)
        return _effective_dimension(ratio / (1 + ratio))
    return _effective_dimension(np.linalg.eigvalsh(covariance))


def _numbers(z: np.ndarray) -> np.ndarray:
    """The four of (n, L)."""
    eigenvalues = np.linalg.eigvalsh(np.atleast_2d(np.cov(z, rowvar=False)))
    inside = (np.square(z).sum(1) <= chi2.ppf(BALL, z.shape[1])).mean()
    spread = np.abs(z.std(0, ddof=1) - 1).mean()
    return np.array([eigenvalues[-1], _effective_dimension(eigenvalues), inside, spread])


def _effective_dimension(eigenvalues: np.ndarray) -> float:
    """(tr S)^2 / tr S^2, the participation ratio; 0 of a point."""
    square = np.square(eigenvalues).sum()
    return float(eigenvalues.sum() ** 2 / square) if square > 0 else 0.0


@cache
def _ranges(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the four numbers over draws (n, L) of the prior."""
    generator = np.random.default_rng([n, width])
    drawn = np.stack([_numbers(generator.standard_normal((n, width))) for _ in range(DRAWS)])
    return np.quantile(drawn, TAIL, axis=0), np.quantile(drawn, 1 - TAIL, axis=0)
