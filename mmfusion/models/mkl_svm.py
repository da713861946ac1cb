"""Support vector machine on a learned sum of the modalities' kernels: the additive ancestor of low-rank fusion.

    f(x) = b + sum_k beta_k sum_i a_i K_k(x_i, x),    beta >= 0, ||beta||_p = 1
    min over beta, w, b of  1/2 sum_k ||w_k||^2 / beta_k + C sum_i loss(y_i, f(x_i))

One Gaussian kernel per modality, and with products=True one for every set of two or more modalities: the product of
their kernels, whose features are the products of theirs. Given the machine, the weights have a closed form (Kloft,
Brefeld, Sonnenburg & Zien, lp-norm multiple kernel learning, JMLR 2011): with ||w_k||^2 = beta_k^2 a^T K_k a, a the
signed dual coefficients,

    beta_k = ||w_k||^(2 / (p + 1)) / (sum_j ||w_j||^(2 p / (p + 1)))^(1 / p)

and the two are solved in turn, each step lowering the objective.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC, SVR

from mmfusion.dataset import Task

_NOTHING = 1e-12
"""variance in feature space below which a kernel (of features that never vary) carries nothing"""


@dataclass(eq=False)
class MultipleKernelSVM:
    """Multiple-kernel SVM on named feature matrices, one output or many (each then has its own machine and weights).

    Memory: all kernels of the training set at once, 8 N^2 bytes for each of the 2^M - 1 (M without products).
    Raises ValueError for a setting out of its range.
    """

    task: Task = "binary"
    norm: float = 2.0
    """p of the weights' norm, >= 1; 1 makes them sparse, large ones make them equal"""
    regularisation: float = 1.0
    """C, the price of the loss"""
    products: bool = True
    """whether products of modalities' kernels take part"""
    uniform: bool = False
    """equal weights of the same norm instead of learned ones"""
    epsilon: float = 0.1
    """regression: half-width of the tube without loss, in standard deviations of the training target"""
    iterations: int = 50
    """most machines solved per output"""
    tolerance: float = 1e-3
    """the weights are found when none moves more than this"""

    kernel_names: list[tuple[str, ...]] = field(init=False, repr=False, default_factory=list)
    """modalities in each of the K kernels, after `fit`"""
    weights: dict[tuple[str, ...], float] = field(init=False, repr=False, default_factory=dict)
    """beta by kernel, after `fit`; the mean over outputs, whose p-norm is then at most 1"""
    weights_per_output: np.ndarray = field(init=False, repr=False, default_factory=lambda: np.empty((0, 0)))
    """(O, K), every row of p-norm 1"""
    objectives: list[list[float]] = field(init=False, repr=False, default_factory=list)
    """per output the objective after each machine; falls, up to the solver's own tolerance"""

    def __post_init__(self) -> None:
        if self.task not in ("binary", "regression"):
            raise ValueError(f'task is "binary" or "regression", not {self.task!r}')
        if not 1 <= self.norm < np.inf:
            raise ValueError(f"norm is a finite number from 1 upwards, not {self.norm}")
        if not (self.regularisation > 0 and self.epsilon >= 0 and self.iterations >= 1 and self.tolerance >= 0):
            raise ValueError(f"regularisation > 0, epsilon >= 0, iterations >= 1, tolerance >= 0 do not hold: {self}")

    def fit(self, features: Mapping[str, np.ndarray], target: np.ndarray) -> "MultipleKernelSVM":
        """Standardise, build the kernels, solve for machine and weights.

        Args:
            features: (N, d_m) per modality.
            target: (N,) or (N, O); binary: of 0 and 1, both in every output.

        Raises ValueError where shapes do not fit, a value is not finite, or a binary output holds one class alone.
        Warns (ConvergenceWarning) where the weights still move after `iterations` machines.
        """
        arrays, target = _checked_features(features), np.asarray(target, np.float64)
        examples = {len(x) for x in arrays.values()}
        if target.ndim not in (1, 2) or examples != {len(target)} or target.size == 0:
            raise ValueError(f"target {target.shape} is not (N,) or (N, O) with the N of features {_shapes(arrays)}")
        self._check_target(target)
        self._shift = {name: x.mean(0) for name, x in arrays.items()}
        self._inverse_std = {name: _inverse_std(x) for name, x in arrays.items()}
        self._train = {name: self._standardised(name, x) for name, x in arrays.items()}
        sizes = range(1, len(arrays) + 1 if self.products else 2)
        self.kernel_names = [names for size in sizes for names in combinations(arrays, size)]
        self._factors = np.ones(len(self.kernel_names))
        kernels = self._kernels(self._train)  # (K, N, N)
        # multiplicative normalisation (Kloft et al. 2011): variance 1 in feature space
        spread = np.array([np.diagonal(k).mean() - k.mean() for k in kernels])
        self._factors = np.divide(1, spread, out=np.zeros_like(spread), where=spread > _NOTHING)
        kernels *= self._factors[:, None, None]

        self._vector = target.ndim == 1
        columns = target.reshape(len(target), -1)
        binary = self.task == "binary"
        # SVR runs on the standardised target: epsilon and C then mean the same for every output
        self._target_shift = np.zeros(columns.shape[1]) if binary else columns.mean(0)
        std = np.ones(columns.shape[1]) if binary else columns.std(0)
        self._target_std = np.where(std > 0, std, 1.0)
        columns = (columns - self._target_shift) / self._target_std
        solved = [self._alternate(kernels, y) for y in columns.T]
        self._machines = [machine for machine, _, _ in solved]
        self.weights_per_output = np.stack([beta for _, beta, _ in solved])
        self.objectives = [objectives for _, _, objectives in solved]
        self.weights = dict(zip(self.kernel_names, self.weights_per_output.mean(0).tolist(), strict=True))
        return self

    def decision(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """Margin of class 1 (binary), or the value in the target's units (regression).

        Args:
            features: (N, d_m) of the modalities and widths fitted, in any order.

        Returns:
            (N,) or (N, O), as the target was.

        Raises ValueError where modalities or widths differ from those fitted, and before `fit` (NotFittedError).
        """
        if not self.kernel_names:
            raise NotFittedError("decision before fit")
        arrays = _checked_features(features)
        widths = {name: x.shape[1] for name, x in arrays.items()}
        fitted = {name: x.shape[1] for name, x in self._train.items()}
        if widths != fitted or len({len(x) for x in arrays.values()}) > 1:
            raise ValueError(f"features {_shapes(arrays)} do not fit the widths fitted: {fitted}")
        kernels = self._kernels({name: self._standardised(name, x) for name, x in arrays.items()})
        values = []
        for machine, beta in zip(self._machines, self.weights_per_output, strict=True):
            kernel = np.tensordot(beta * self._factors, kernels, 1)  # (K,) x (K, N', N) -> (N', N)
            values.append(machine.decision_function(kernel) if self.task == "binary" else machine.predict(kernel))
        decisions = np.stack(values, axis=1) * self._target_std + self._target_shift  # (N', O)
        return decisions[:, 0] if self._vector else decisions

    def _check_target(self, target: np.ndarray) -> None:
        if not np.isfinite(target).all():
            raise ValueError(f"target of shape {target.shape} holds NaN or infinity")
        if self.task == "binary":
            if not np.isin(target, (0, 1)).all():
                raise ValueError(f"a binary target is of 0 and 1; this one of shape {target.shape} is not")
            if (target.min(0) == target.max(0)).any():
                raise ValueError(f"target of shape {target.shape} holds one class alone")

    def _standardised(self, name: str, x: np.ndarray) -> np.ndarray:
        return (x - self._shift[name]) * self._inverse_std[name]

    def _kernels(self, z: Mapping[str, np.ndarray]) -> np.ndarray:
        """Kernels between standardised examples and the training set, not normalised: (K, N', N)."""
        single = {name: rbf_kernel(z[name], train, gamma=1 / train.shape[1]) for name, train in self._train.items()}
        return np.stack([np.prod([single[name] for name in names], axis=0) for names in self.kernel_names])

    def _alternate(self, kernels: np.ndarray, y: np.ndarray) -> tuple[SVC | SVR, np.ndarray, list[float]]:
        """Machine, the weights (K,) that it was solved with, and the objective after every machine."""
        beta = np.full(len(kernels), len(kernels) ** (-1 / self.norm))
        objectives: list[float] = []
        for step in range(self.iterations):
            machine = self._solve(np.tensordot(beta, kernels, 1), y)
            a = np.zeros(len(y))
            a[machine.support_] = machine.dual_coef_[0]
            quadratic = (kernels @ a) @ a  # a^T K_k a: (K, N, N) @ (N,) -> (K, N) @ (N,) -> (K,)
            objectives.append(self._dual_objective(a, y) - beta @ quadratic / 2)
            if self.uniform:
                break
            moved = closed_form_weights(beta**2 * quadratic, self.norm)
            change = np.abs(moved - beta).max()
            if change <= self.tolerance:
                break
            if step == self.iterations - 1:
                message = f"kernel weights still move by {change:.1g} after {self.iterations} machines"
                warnings.warn(message, ConvergenceWarning, stacklevel=3)
                break
            beta = moved
        return machine, beta, objectives

    def _solve(self, kernel: np.ndarray, y: np.ndarray) -> SVC | SVR:
        if self.task == "binary":
            return SVC(C=self.regularisation, kernel="precomputed").fit(kernel, y)
        return SVR(C=self.regularisation, epsilon=self.epsilon, kernel="precomputed").fit(kernel, y)

    def _dual_objective(self, a: np.ndarray, y: np.ndarray) -> float:
        """The dual objective without its quadratic term; equals the primal one at the machine's optimum."""
        if self.task == "binary":
            return float(np.abs(a).sum())
        return float(y @ a - self.epsilon * np.abs(a).sum())


def closed_form_weights(squared_norms: np.ndarray, norm: float) -> np.ndarray:
    """Weights of p-norm 1 that minimise sum_k ||w_k||^2 / beta_k (Kloft et al. 2011, their closed-form update).

    Args:
        squared_norms: (K,) ||w_k||^2, not negative; all zero gives equal weights.
        norm: p >= 1.

    Returns:
        (K,), not negative.
    """
    # a^T K a of a kernel that is only semi-definite can round below 0
    norms = np.sqrt(np.maximum(squared_norms, 0.0))
    if not norms.any():
        return np.full(len(norms), len(norms) ** (-1 / norm))
    norms = norms / norms.max()  # the weights do not depend on the scale, but small powers would underflow
    return norms ** (2 / (norm + 1)) / (norms ** (2 * norm / (norm + 1))).sum() ** (1 / norm)


def _checked_features(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(x, np.float64) for name, x in features.items()}
    if not arrays or any(x.ndim != 2 or x.shape[1] == 0 for x in arrays.values()):
        raise ValueError(f"features are (N, d) per modality, not {_shapes(arrays)}")
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{name} of shape {x.shape} holds NaN or infinity")
    return arrays


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in arrays.items()}


def _inverse_std(x: np.ndarray) -> np.ndarray:
    """1 / std per coordinate, 0 for one that never varies in training: it then stays 0 in testing as well."""
    varies = x.min(0) < x.max(0)
    std = x.std(0)
    varies &= std > 0  # a spread that underflows
    return np.divide(1, std, out=np.zeros_like(std), where=varies)
