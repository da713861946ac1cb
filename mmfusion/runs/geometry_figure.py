"""Figure of two modalities' latents, geometry.png: both in one map with lines between partners, and side by side."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mmfusion.dataset import Dataset, Split, take
from mmfusion.files import write_atomically
from mmfusion.models.fusion import FusionModel
from mmfusion.runs.figure import BLUE, GREY, ORANGE
from mmfusion.runs.shared_space import PairLatents, latent_pairs

Map = Literal["pca", "tsne", "umap"]
GEOMETRY = "geometry.png"
"""in a run's folder"""
MOST_PAIRS = 3
"""of modalities that are drawn: those of three; of more the first ones"""
CLASS_COLOURS = (
    "#2ca02c", "#9467bd", "#d62728", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#7f7f7f", "#1f77b4", "#ff7f0e"
)  # fmt: skip
"""of at most ten; those of the modalities come last"""
LINES = 60
"""partners that are joined, at most"""
MOST_EXAMPLES = 2000
"""that are looked at"""
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}


class Colours(NamedTuple):
    """What examples are coloured by."""

    values: np.ndarray
    """(n,) class numbers, or values"""
    names: list[str]
    """of the classes; empty for values"""
    title: str


class PlanarMap(NamedTuple):
    """Two modalities in the plane."""

    together: tuple[np.ndarray, np.ndarray]
    """(n, 2) each, in one map of all 2n points"""
    apart: tuple[np.ndarray, np.ndarray]
    """(n, 2) each, in a map of its own; the second is turned, or mirrored, such that partners lie nearest"""
    axes: str
    """what the axes of the first are"""


def planar_map(x: np.ndarray, y: np.ndarray, kind: Map, seed: int = 0) -> PlanarMap:
    """Maps of x and y (n, L), n >= 2; the same for the same seed.

    Raises ImportError for UMAP where its package is missing.
    """
    both = np.concatenate([x, y])
    if kind == "pca":
        (whole, shares), maps = principal_plane(both), [principal_plane(z)[0] for z in (x, y)]
        axes = f"{shares[0]:.0%} and {shares[1]:.0%} of the variance"
    else:
        embed = _tsne if kind == "tsne" else _umap
        whole, *maps = (embed(z, seed) for z in (both, x, y))
        axes = "axes have no meaning"
    first, second = (z - z.mean(0) for z in maps)
    return PlanarMap((whole[: len(x)], whole[len(x) :]), (first, second @ rotation(second, first)), axes)


def rotation(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(L, L) orthogonal matrix R, perhaps a reflection, with y R nearest to x, both (n, L) (Schoenemann, 1966)."""
    left, _, right = np.linalg.svd(y.T @ x)
    return left @ right


def principal_plane(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) coordinates of z (n, L) on its two principal axes, 0 where there is no second, and their shares (2,)."""
    centred = z - z.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])  # an axis has none of its own
    plane, shares = np.zeros((len(z), 2)), np.zeros(2)
    plane[:, : len(axes)] = centred @ (axes * signs[:, None]).T
    shares[: len(axes)] = np.square(values[:2]) / max(np.square(values).sum(), 1e-300)
    return plane, shares


def _tsne(z: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE  # a quarter of a second of every command's start

    perplexity = min(30.0, max(1.0, (len(z) - 1) / 3))
    start = "pca" if z.shape[1] > 1 else "random"
    return TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(z).astype(np.float64)


def _umap(z: np.ndarray, seed: int) -> np.ndarray:
    from umap import UMAP  # for those who have it

    # one job: with a seed it takes no more, and warns where it was not told so
    return UMAP(n_neighbors=min(15, len(z) - 1), random_state=seed, n_jobs=1).fit_transform(z).astype(np.float64)


def colours_of(dataset: Dataset, split: Split) -> Colours | None:
    """What the examples of a split are coloured by; None without labels. Of several labels or targets the first."""
    if split.target is None or not dataset.labelled:
        return None
    target = split.target.numpy()
    if dataset.task in ("binary", "multiclass"):
        names = [name.removeprefix("class ") for name in dataset.class_names]
        return Colours(target.astype(int), names, "class")
    column = target.reshape(len(target), -1)[:, 0]
    name = dataset.target_names[0] if dataset.target_names else "target"
    if dataset.task == "multilabel":
        return Colours(column.astype(int), [f"not {name}", name], f"label {name}")
    return Colours(column, [], name)


def at_most(split: Split, most: int = MOST_EXAMPLES, seed: int = 0) -> Split:
    """The split, or `most` of its examples, drawn at random, in its own order."""
    if len(split) <= most:
        return split
    return take(split, np.sort(np.random.default_rng(seed).permutation(len(split))[:most]))


def draw_of_run(path: Path, dataset: Dataset, part: str, member: FusionModel, label: str) -> None:
    """What every run leaves: its first member's latents on one split by PCA, which takes no time."""
    split = at_most(dataset.splits[part])
    title = f"{dataset.name}: {label}, first seed, {part}, n = {len(split)}"
    draw_geometry(path, latent_pairs(member, split), title, colours_of(dataset, split))


def draw_geometry(
    path: Path,
    pairs: Sequence[PairLatents],
    title: str,
    colours: Colours | None = None,
    kinds: Sequence[Map] = ("pca",),
    seed: int = 0,
) -> None:
    """A row of three panels for each pair, the first three, and each kind of map: together, the first, the second.

    Args:
        path: PNG to write.
        pairs: of n >= 2 examples.
        title: of the whole.
        colours: of the examples, for the panels side by side; else the modality's.
        kinds: of maps.
        seed: of the maps, and of which partners are joined.

    Raises ImportError for UMAP where its package is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of every command's start
    from matplotlib.figure import Figure

    shown = list(itertools.product(pairs[:MOST_PAIRS], kinds))
    maps = [planar_map(pair.x, pair.y, kind, seed) for pair, kind in shown]
    figure = Figure(figsize=(15, 5 * len(shown) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    n = len(pairs[0].x)
    joined = np.sort(np.random.default_rng(seed).permutation(n)[:LINES])
    rows = figure.subplots(len(shown), 3, squeeze=False)
    for (pair, kind), found, axes in zip(shown, maps, rows, strict=True):
        _draw_together(axes[0], found, pair.names, TITLES[kind], joined)
        for axis, z, name, color in zip(axes[1:], found.apart, pair.names, (BLUE, ORANGE), strict=True):
            _draw_alone(axis, z, colours, color)
            axis.set_title(f"{name} alone, {TITLES[kind]}", parse_math=False)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.set_aspect("equal", adjustable="datalim")
    figure.suptitle(title, fontsize=14, parse_math=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


def _size(n: int) -> float:
    """Area of a point, so that n of them can be told apart."""
    return float(np.clip(6000 / n, 6, 45))


def _marker_scale(n: int) -> float:
    """By which the points of a legend are wider than those of the panel."""
    return float(np.sqrt(45 / _size(n)))


def _draw_together(axis, found: PlanarMap, names: tuple[str, str], title: str, joined: np.ndarray) -> None:
    x, y = found.together
    for i in joined:
        label = f"partners ({len(joined)} of {len(x)})" if i == joined[0] else None
        axis.plot(*zip(x[i], y[i], strict=True), color=GREY, linewidth=0.6, alpha=0.7, zorder=1, label=label)
    for z, name, color in zip((x, y), names, (BLUE, ORANGE), strict=True):
        axis.scatter(*z.T, s=_size(2 * len(x)), color=color, alpha=0.6, linewidths=0, zorder=2, label=name)
    axis.set_title(f"{names[0]} and {names[1]} in one map, {title}", parse_math=False)
    axis.set_xlabel(found.axes)
    axis.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, markerscale=_marker_scale(2 * len(x))
    )


def _draw_alone(axis, z: np.ndarray, colours: Colours | None, color: str) -> None:
    size = _size(len(z))
    if colours is None:
        axis.scatter(*z.T, s=size, color=color, alpha=0.6, linewidths=0)
    elif colours.names and len(colours.names) <= len(CLASS_COLOURS):
        # in the examples' order: one class would lie over the others
        axis.scatter(*z.T, s=size, c=[CLASS_COLOURS[k] for k in colours.values], alpha=0.7, linewidths=0)
        for name, shade in zip(colours.names, CLASS_COLOURS, strict=False):
            axis.scatter([], [], s=size, color=shade, linewidths=0, label=name[:16])
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02), "ncols": min(len(colours.names), 5)}
        axis.legend(frameon=False, title=colours.title, markerscale=_marker_scale(len(z)), **place)
    else:
        points = axis.scatter(*z.T, s=size, c=colours.values, cmap="viridis", alpha=0.7, linewidths=0)
        axis.figure.colorbar(points, ax=axis, label=colours.title, shrink=0.7)
