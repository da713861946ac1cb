"""Data whose truth is known: a label that hangs on shared, unique and synergistic factors by shares that are dials.

    score = sqrt(a) s + sqrt(b / M) sum_m u_m + sqrt(c) prod_{m <= D} v_m + sqrt(1 - a - b - c) e,   label = [score > 0]

a, b, c are the shares of the score's variance that are shared, unique and synergistic; s, u_m, v_m and the noise e
are independent N(0, 1). Modality m sees a copy of the shared factor, sqrt(r) s + sqrt(1 - r) e_m, which correlates by
the alignment r with every other modality's copy; its own u_m; and v_m. These three and further coordinates, that say
nothing, are turned by a random rotation, x_m = Q_m f_m: f_m is N(0, I) whatever the dials, so nothing shows in a
modality's own distribution. `mmfusion.data.synthetic_truth` has the best accuracy that is possible.
"""

import string
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError, check_numbers, check_types

MOST_MODALITIES = 8
MOST_ORDER = 4
CLASS_NAMES = ("score below 0", "score above 0")
FACTORS = 3  # coordinates of a modality that are factors: copy of the shared one, unique, synergistic
_MIXING = 1_000_003  # what the draw of the rotations is seeded with, beside the seed


@dataclass(frozen=True)
class SyntheticConfig:
    """What the label hangs on, and what stands between the factors and the features."""

    widths: tuple[int, ...] = (16, 16)
    """width d_m of each modality, at least 3; M of them, 2 to 8, named a, b, c, ..."""
    shared: float = 0.3
    """share of the score's variance that is the shared factor's"""
    unique: float = 0.3
    """share that is unique: of M factors, one in each modality, an equal part each"""
    synergy: float = 0.3
    """share that is synergistic: a product of factors, one in each of the first `order` modalities"""
    order: int = 2
    """number of factors in that product, 2 to 4 and at most M"""
    alignment: float = 1.0
    """correlation between two modalities' copies of the shared factor; 1: they are the same"""
    gaussian: float = 0.0
    """standard deviation of Gaussian noise on every feature, whose own is 1"""
    heavy: float = 0.0
    """scale of Student's t noise with two degrees of freedom (infinite variance) on every feature"""
    foreign: float = 0.0
    """rate at which a modality's features are those of another example"""
    dropout: float = 0.0
    """rate at which single features are 0"""
    missing: float = 0.0
    """rate at which a modality is missing in test: a row of NaN, as `Run.predict(..., missing=)` takes it"""
    train: int = 4000
    """number of examples"""
    dev: int = 1000
    """number of examples"""
    test: int = 4000
    """number of examples"""
    task: Literal["binary", "regression"] = "binary"
    """the target: the sign of the score, or the score itself"""
    seed: int = 0
    """of all draws"""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the M modalities."""
        return tuple(string.ascii_lowercase[: len(self.widths)])

    @property
    def label_noise(self) -> float:
        """Share of the score's variance that nothing explains."""
        return max(0.0, 1.0 - self.shared - self.unique - self.synergy)

    def check(self) -> None:
        """Raise InputError naming the first dial out of range."""
        check_types(self)
        bounds: dict[str, tuple[float, float]] = dict.fromkeys(("shared", "unique", "synergy", "alignment"), (0, 1))
        bounds |= dict.fromkeys(("foreign", "dropout", "missing"), (0, 0.99))
        bounds |= dict.fromkeys(("gaussian", "heavy"), (0, 1e3))
        bounds |= dict.fromkeys(("train", "dev", "test"), (2, 10_000_000))
        check_numbers(self, bounds | {"order": (2, MOST_ORDER), "seed": (0, 2**31 - 1)})
        total = self.shared + self.unique + self.synergy
        if total > 1 + 1e-9:
            raise InputError(
                f"shared {self.shared:g} + unique {self.unique:g} + synergy {self.synergy:g} = {total:g}: shares of "
                "the score's variance sum to at most 1; lower one"
            )
        if not 2 <= len(self.widths) <= MOST_MODALITIES:
            raise InputError(f"--widths: {len(self.widths)} modalities; give 2 to {MOST_MODALITIES} widths")
        if wrong := [w for w in self.widths if not isinstance(w, int) or isinstance(w, bool) or w < FACTORS]:
            raise InputError(f"--widths {wrong[0]}: give whole numbers of at least {FACTORS}, one for each factor")
        if self.order > len(self.widths):
            raise InputError(f"--order {self.order}: there are {len(self.widths)} modalities; give no more, or widths")


@dataclass(frozen=True)
class Factors:
    """What N examples are made of; every column is N(0, 1)."""

    shared: np.ndarray
    """(N,) the shared factor s"""
    copies: np.ndarray
    """(N, M) what each modality sees of it"""
    unique: np.ndarray
    """(N, M)"""
    synergistic: np.ndarray
    """(N, M); the first `order` columns take part in the product"""
    label_noise: np.ndarray
    """(N,)"""

    def __len__(self) -> int:
        return len(self.shared)


def draw_factors(config: SyntheticConfig, examples: int, rng: np.random.Generator) -> Factors:
    """Factors of N examples."""
    count = len(config.widths)
    shared, noise = rng.standard_normal((2, examples))
    own, unique, synergistic = rng.standard_normal((3, examples, count))
    copies = config.alignment**0.5 * shared[:, None] + (1 - config.alignment) ** 0.5 * own
    return Factors(shared, copies, unique, synergistic, noise)


def scores_of(config: SyntheticConfig, factors: Factors) -> np.ndarray:
    """(N,) scores, of variance 1: their sign is the label."""
    count = len(config.widths)
    return (
        config.shared**0.5 * factors.shared
        + (config.unique / count) ** 0.5 * factors.unique.sum(1)
        + config.synergy**0.5 * factors.synergistic[:, : config.order].prod(1)
        + config.label_noise**0.5 * factors.label_noise
    )


def rotations(config: SyntheticConfig) -> list[np.ndarray]:
    """Q_m (d_m, d_m), orthogonal, of each modality: features are x_m = Q_m f_m, so Q_m^T x_m has the factors first."""
    rng = np.random.default_rng([config.seed, _MIXING])
    return [np.linalg.qr(rng.standard_normal((width, width)))[0] for width in config.widths]


def features_of(
    config: SyntheticConfig, factors: Factors, rng: np.random.Generator, missing: float = 0.0
) -> dict[str, np.ndarray]:
    """Features (N, d_m) of each modality: rotated, and then noise of the four kinds in the order of the dials.

    With `missing`, rows are NaN throughout at that rate, each modality by itself.
    """
    examples, features = len(factors), {}
    for m, (name, mixing) in enumerate(zip(config.modalities, rotations(config), strict=True)):
        own = np.stack([factors.copies[:, m], factors.unique[:, m], factors.synergistic[:, m]], 1)
        nothing = rng.standard_normal((examples, len(mixing) - FACTORS))
        x = np.concatenate([own, nothing], 1) @ mixing.T  # (N, d_m) @ (d_m, d_m)
        x += config.gaussian * rng.standard_normal(x.shape)
        x += config.heavy * rng.standard_t(2, x.shape)
        origin = np.arange(examples)
        is_foreign = rng.random(examples) < config.foreign
        origin[is_foreign] += rng.integers(1, examples, is_foreign.sum())  # never the example itself
        x = x[origin % examples]
        x[rng.random(x.shape) < config.dropout] = 0
        x[rng.random(examples) < missing] = np.nan
        features[name] = x
    return features


def synthetic(config: SyntheticConfig | None = None) -> Dataset:
    """The dataset of these dials: train, dev and test, drawn independently of each other's sizes.

    What is missing is missing in test alone: no training of the house takes NaN (it hides modalities itself).

    Raises InputError naming a dial out of range.
    """
    config = config or SyntheticConfig()
    config.check()
    splits = {}
    for number, name in enumerate(("train", "dev", "test")):
        rng = np.random.default_rng([config.seed, number])
        factors = draw_factors(config, getattr(config, name), rng)
        x = features_of(config, factors, rng, config.missing if name == "test" else 0.0)
        scores = scores_of(config, factors)
        target = scores if config.task == "regression" else scores > 0
        splits[name] = Split(
            {modality: torch.from_numpy(values.astype(np.float32)) for modality, values in x.items()},
            torch.from_numpy(target.astype(np.float32)),
            [f"{name}_{row}" for row in range(len(factors))],
        )
    dials = asdict(config) | {"widths": list(config.widths)}
    return Dataset("synthetic", config.task, splits, "dev", provenance={"dials": dials}, class_names=CLASS_NAMES)
