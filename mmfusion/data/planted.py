"""Labels planted over the features of any dataset: a positive control whose truth is known.

Features stay as they are. Of each modality, z_m are its leading principal components over the pool (found without
labels), outliers cut, white, turned at random. Over the pool, L and I have mean 0 and variance 1,

    f = sqrt(1 - s) L + sqrt(s) I,    L ~ sum_m sqrt(share_m) a_m . z_m,
    I ~ sum_{r <= k} (u_r . z_1)(v_r . z_2) less its regression on all z,    Cov(L, I) = 0
    label ~ Bernoulli(sigmoid(g f / noise)),    of a regression g f + noise N(0, 1)

a_m are unit vectors, u_r orthonormal, v_r too; g = 1. What the strength is, from 0 to 1:

    interaction     s, the share of the logit's variance that is a product of two modalities, of rank k; 0: none. No
                    interaction is not rank 1: a sum z_1 + z_2 is a product of (1 + e z_m) less a constant in the limit
                    of small e alone, so a fusion of rank 1 may lag behind higher ones at 0 too
    imbalance       share of one modality in L, from 1 / M at 0 (balanced) to 1 at 1; no interaction
    dropout         share of one modality in L, from 0 (it says nothing) to 1 (it alone says something); no interaction
    calibration     1 - g: at 1 labels are thrown with a coin, and all confidence is overconfidence; no interaction.
                    No strength makes an overfitting model calibrated: this kind has a truth, and no null

The product is of two modalities, the first in alphabetical order, whatever their number: its rank is a matrix's, and a
low-rank fusion of more modalities holds it with constant factors. Modalities that depend on each other beyond linearly
may let a sum of curved functions say a part of I.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.special import expit

from mmfusion.data.folds import FoldedDataset
from mmfusion.data.planted_truth import Truth, variance_one
from mmfusion.dataset import Dataset, pooled
from mmfusion.errors import InputError, check_numbers, check_types

PlantedKind = Literal["interaction", "imbalance", "dropout", "calibration"]
PLANTED_KINDS: tuple[PlantedKind, ...] = get_args(PlantedKind)
COMPONENTS = 8  # of each modality, at most
_CUT = 3.0  # standard deviations; a few outliers would otherwise be all of a product's variance
_LEAST_VARIANCE = 1e-6  # of the largest component: what is smaller is rounding
_FUNCTION, _LABELS = 0, 1  # what draws are seeded with, beside the seed


@dataclass(frozen=True)
class PlantedConfig:
    """What is planted."""

    kind: PlantedKind = "interaction"
    """interaction, imbalance, dropout or calibration"""
    rank: int = 2
    """rank k of the interaction, 1 to 8"""
    strength: float = 0.5
    """0 to 1; what it is hangs on the kind"""
    seed: int = 0
    """of the function that is planted and of the labels' draw"""
    noise: float = 0.3
    """of the label, beside a deviation of 1 of f"""
    modality: str | None = None
    """imbalance, dropout: the one that matters; default: audio, where there is none the first"""

    def check(self) -> None:
        """Raise InputError naming the first flag out of range."""
        flags = PlantedFlags(self.kind, self.rank, self.strength, self.seed, self.noise)
        check_types(flags)
        bounds = {"plant_rank": (1, COMPONENTS), "plant_strength": (0, 1), "plant_seed": (0, 2**31 - 1)}
        check_numbers(flags, bounds | {"plant_noise": (0.01, 100)})


@dataclass(frozen=True)
class PlantedFlags:
    """The same under the names of the command line's flags, for messages."""

    plant: PlantedKind
    plant_rank: int
    plant_strength: float
    plant_seed: int
    plant_noise: float


def plant(data: FoldedDataset, config: PlantedConfig) -> tuple[FoldedDataset, Truth]:
    """The dataset with planted labels in place of its own, and what is true of them.

    A binary target stays binary, a regression of one value stays one; folds and features stay.

    Raises InputError for a flag out of range, and for data that it cannot be done on: several targets or classes, none,
    features that are missing, too few modalities or components.
    """
    config.check()
    if data.task not in ("binary", "regression") or data.has_columns:
        raise InputError(
            f"--plant: {data.name} has a {data.task} target of {data.output_dim} outputs; labels are planted in place "
            "of a binary target or a regression of one value, give such data"
        )
    if not data.labelled:
        raise InputError(f"--plant: {data.name} has no labels that others could stand for; give data that has")
    components = _components_of_all(data, config)
    truth = _truth_of(data, config, components)
    rng = np.random.default_rng([config.seed, _LABELS])
    mean = truth.logit
    if data.task == "binary":
        target = rng.random(len(mean)) < expit(mean / config.noise)
    else:
        target = mean + config.noise * rng.standard_normal(len(mean))
    target = torch.from_numpy(target.astype(np.float32))
    tested = data.test_rows
    if data.task == "binary" and len(target[tested].unique()) < 2:
        raise InputError(f"--plant-seed {config.seed}: all planted test labels are of one class; give another seed")
    best = truth.best(tested.numpy())
    said = ", ".join(f"{name} {value:.4f}" for name, value in best.items())
    note = f"labels are planted ({config.kind}, strength {config.strength:g}); knowing the truth gives on test {said}"
    planted = replace(
        data,
        name=f"{data.name} with planted {config.kind}",
        pool=replace(data.pool, target=target),
        notes=[*data.notes, note],
        provenance=data.provenance | {"planted": asdict(config) | {"best": best}},
        label_range=None,
        class_names=Dataset.class_names,
    )
    return planted, truth


def components_of(features: np.ndarray, count: int = COMPONENTS) -> np.ndarray:
    """(N, q) leading principal components of standardised features (N, d); both cut at three deviations; then white.

    q is `count`, or the number of directions in which the features vary at all.
    """
    x = features.astype(np.float64)
    x = x - x.mean(0)
    spread = x.std(0)
    x = np.divide(x, spread, out=np.zeros_like(x), where=spread > 1e-9 * max(1.0, spread.max(initial=0)))
    x = np.clip(x, -_CUT, _CUT)
    x -= x.mean(0)
    z = np.clip(_principal(x, count), -_CUT, _CUT)
    z -= z.mean(0)
    if not z.size:
        return z
    values, vectors = eigh(z.T @ z / len(z))  # (q,), (q, q)
    return z @ (vectors / values**0.5) @ vectors.T  # symmetric: no eigenvectors of values that are nearly equal


def _principal(x: np.ndarray, count: int) -> np.ndarray:
    """(N, q) principal components of centred x (N, d), of variance 1; the largest of each one's loadings is positive.

    Without that the sign, and so every planted label, would hang on the rounding of the machine.
    """
    examples, width = x.shape
    size = min(examples, width)
    largest = (max(0, size - count), size - 1)  # all others would take most of the time
    if width <= examples:
        values, vectors = eigh(x.T @ x / examples, subset_by_index=largest)  # (q,), (d, q), ascending
        z = x @ vectors
    else:
        values, z = eigh(x @ x.T / examples, subset_by_index=largest)  # (q,), (N, q)
    values, z = values[::-1], z[:, ::-1]
    z = z[:, values > _LEAST_VARIANCE * max(values.max(initial=0), 1e-300)]
    if not z.size:
        return z
    loadings = x.T @ z  # (d, q)
    signs = np.sign(loadings[np.abs(loadings).argmax(0), np.arange(z.shape[1])])
    return z * signs / z.std(0)


def _components_of_all(data: FoldedDataset, config: PlantedConfig) -> dict[str, np.ndarray]:
    """{modality: (N, q_m)} white components, turned at random by the seed."""
    rng = np.random.default_rng([config.seed, _FUNCTION])
    turned = {}
    for name, x in sorted(pooled(data.pool).features.items()):
        if not bool(x.isfinite().all()):
            raise InputError(f"--plant: {name} of {data.name} holds missing values; give data without")
        z = components_of(x.numpy())
        if not z.shape[1]:
            raise InputError(f"--plant: {name} of {data.name} is the same in every example; leave it out")
        turned[name] = z @ np.linalg.qr(rng.standard_normal((z.shape[1],) * 2))[0]  # (N, q) @ (q, q)
    return turned


def _truth_of(data: FoldedDataset, config: PlantedConfig, components: dict[str, np.ndarray]) -> Truth:
    """f as constant, linear and bilinear coefficients of the components."""
    rng = np.random.default_rng([config.seed, _FUNCTION, 1])
    names = list(components)
    shares = _shares(names, config)
    linear = {}
    for name, z in components.items():
        direction = rng.standard_normal(z.shape[1])
        linear[name] = shares[name] ** 0.5 * direction / np.linalg.norm(direction)
    scale = sum(components[name] @ linear[name] for name in names).std()  # z has mean 0: so has L
    gain = 1 - config.strength if config.kind == "calibration" else 1.0
    share = config.strength if config.kind == "interaction" else 0.0
    linear = {name: gain * (1 - share) ** 0.5 / scale * b for name, b in linear.items()}
    constant, pair, bilinear = 0.0, None, None
    if config.kind == "interaction":
        if len(names) < 2:
            raise InputError(f"--plant interaction: {data.name} has {names[0]} alone; give data of two modalities")
        pair = (names[0], names[1])
        widths = [components[name].shape[1] for name in pair]
        if config.rank > min(widths):
            raise InputError(
                f"--plant-rank {config.rank}: {' and '.join(pair)} of {data.name} vary in {widths[0]} and {widths[1]} "
                f"components; give at most {min(widths)}"
            )
        bilinear = np.eye(*widths)  # z are turned at random, so these are random orthonormal u_r and v_r
        bilinear[config.rank :] = 0
        constant, removed, scale = variance_one(components, pair, bilinear)
        constant, bilinear = share**0.5 * constant, share**0.5 * bilinear / scale
        linear = {name: b + share**0.5 * removed[name] for name, b in linear.items()}
    return Truth(data.task, components, constant, linear, pair, bilinear, config.noise)


def _shares(names: list[str], config: PlantedConfig) -> dict[str, float]:
    """{modality: its share of L's variance, were the modalities independent}; they sum to 1."""
    count = len(names)
    if config.kind not in ("imbalance", "dropout"):
        if config.modality is not None:
            raise InputError(f"--plant-modality {config.modality}: has no use with --plant {config.kind}; leave it out")
        return dict.fromkeys(names, 1 / count)
    chosen = config.modality or ("audio" if "audio" in names else names[0])
    if chosen not in names:
        raise InputError(f"--plant-modality {chosen}: there are {', '.join(names)}; give one of these")
    if count < 2:
        raise InputError(f"--plant {config.kind}: needs two modalities, and there is {chosen} alone")
    own = config.strength if config.kind == "dropout" else 1 / count + config.strength * (1 - 1 / count)
    return {name: own if name == chosen else (1 - own) / (count - 1) for name in names}
