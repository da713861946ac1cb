"""Geometry of the latents of a trained run: do partners lie together, and can one modality be decoded from another?

python -m mmfusion.geometry runs/demo                      measures beside their nulls, cross-decoding, geometry.png
python -m mmfusion.geometry runs/demo --map umap --split dev --out dev.png

Nothing is trained. Of several seeds one member is looked at, since each has a space of its own.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from mmfusion.cli import pick_device, run_command
from mmfusion.data.folds import tested_split
from mmfusion.dataset import Dataset, Split
from mmfusion.errors import InputError, check_numbers
from mmfusion.metrics.cross_decoding import CrossDecoding, measure_cross_decoding
from mmfusion.metrics.format import counted
from mmfusion.metrics.geometry import Measure, measure_alignment
from mmfusion.metrics.neighbourhoods import NEIGHBOURS, PLANE_NEIGHBOURS
from mmfusion.models.fusion import FusionModel
from mmfusion.runs.geometry_figure import GEOMETRY, MOST_EXAMPLES, MOST_PAIRS, Map, at_most, colours_of, draw_geometry
from mmfusion.runs.load import TrainedRun, load_run
from mmfusion.runs.shared_space import PairLatents, cross_decoded, latent_pairs

LEAST = 8  # examples: the neighbourhoods need some
DEFAULT_MAPS: tuple[Map, ...] = ("pca", "tsne")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure and draw the latents of a run, two modalities at a time, beside what they are without alignment."""

    run: tyro.conf.Positional[Path]
    """folder of a finished run, such as runs/demo"""
    split: str | None = None
    """examples of this split; default: the one that is tested on"""
    map: Literal["both", "pca", "tsne", "umap"] = "both"
    """of the figure; both: PCA and t-SNE; umap needs the package umap-learn"""
    max_examples: int = MOST_EXAMPLES
    """of a larger split as many are drawn at random"""
    member: int = 0
    """which of the run's seeds, counted from 0"""
    permutations: int = 100
    """draws of each null; 0 leaves nulls out"""
    seed: int = 0
    """of all draws, and of the maps"""
    out: Path | None = None
    """PNG to write; default: geometry.png in the run's folder"""
    device: str = "auto"
    """of encoders, where features are not in the cache: cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""


def main(config: Config) -> None:
    """Load, measure, print, draw. Raises InputError for what the user can put right."""
    check(config)
    run = load_run(config.run, str(pick_device(config.device)))
    if len(run.ensembles[run.main_row].shape["input_dims"]) < 2:
        raise InputError(f"{config.run}: has latents of one modality alone; give a run of two modalities or more")
    members = run.members(run.main_row)
    if config.member >= len(members):
        raise InputError(f"--member {config.member}: the run has {counted(len(members), 'seed')}, counted from 0")
    dataset = run.datasets[0]
    name, split = chosen_split(run, config.split)
    whole = len(split)
    split = at_most(split, config.max_examples, config.seed)
    if len(split) < LEAST:
        raise InputError(f"{config.run}: split {name} has {counted(len(split), 'example')}; {LEAST} are needed")
    member = members[config.member]
    pairs = latent_pairs(member, split)
    size = f"n = {len(split)}" + (f" of {whole}, drawn at random" if len(split) < whole else "")
    folds = f", fold 1 of {len(run.datasets)}" if len(run.datasets) > 1 else ""
    where = f"{run.main_row}, seed {run.seeds[config.member]}{folds}, {name}, {size}"
    print(f"latents of {where}")
    print_measures(config, pairs, class_numbers(dataset, split))
    print_decoded(config, run, member, split)
    kinds = DEFAULT_MAPS if config.map == "both" else (config.map,)
    out = config.out or config.run / GEOMETRY
    draw_geometry(out, pairs, f"{dataset.name}: {where}", colours_of(dataset, split), kinds, config.seed)
    left_out = f" ({MOST_PAIRS} of {len(pairs)} pairs, the first)" if len(pairs) > MOST_PAIRS else ""
    print(f"\ndrawn in {out}{left_out}")


def check(config: Config) -> None:
    """Raise InputError naming the first flag that makes no sense, before anything is loaded."""
    bounds = {"max_examples": (LEAST, 20_000), "member": (0, 10_000), "permutations": (0, 10_000)}
    check_numbers(config, bounds | {"seed": (0, 2**31 - 1)})
    if config.map == "umap" and importlib.util.find_spec("umap") is None:
        raise InputError("--map umap: needs the package umap-learn; install it, or take pca or tsne")
    if config.out is not None and (config.out.is_dir() or config.out.suffix.lower() != ".png"):
        raise InputError(f"--out {config.out}: what is written is a .png file; name it so")


def chosen_split(run: TrainedRun, name: str | None) -> tuple[str, Split]:
    """Name and examples of the split. Raises InputError for one that is not there."""
    splits = run.datasets[0].splits
    name = tested_split(run.datasets[0]) if name is None else name
    if name not in splits:
        raise InputError(f"--split {name}: {run.folder} has {', '.join(splits)}")
    return name, splits[name]


def class_numbers(dataset: Dataset, split: Split) -> np.ndarray | None:
    """(n,) classes of the examples; None where there are none, or too many or few for clusters."""
    if dataset.task not in ("binary", "multiclass") or split.target is None or not dataset.labelled:
        return None
    classes = split.target.numpy().astype(int)
    return classes if 2 <= len(np.unique(classes)) <= len(classes) / 2 else None


# ---- measures ----------------------------------------------------------------------------------------------------


def print_measures(config: Config, pairs: Sequence[PairLatents], classes: np.ndarray | None) -> None:
    """The measures of every pair of modalities, each beside its null; then those of each modality."""
    of_each: dict[str, dict[str, Measure]] = {}
    for pair in pairs:
        measures, neighbours = measured(config, pair, classes)
        print(f"\n{f'{pair.names[0]} and {pair.names[1]}':24} value   without alignment: mean [2.5 %, 97.5 %]")
        for name, one in measures.items():
            if name[-5:] in (" of x", " of y"):
                of_each.setdefault(pair.names[name.endswith("y")], {})[name[:-5]] = one
            else:
                print(f"{name:22} {one.value:7.3f}{'   ' + _null(one) if one.null else ''}")
    width = max(22, *map(len, of_each))
    print(f"\n{'of each modality':{width}}" + "".join(f"  {name:>19}" for name in next(iter(of_each.values()))))
    for modality, measures in of_each.items():
        print(f"{modality:{width}}" + "".join(f"  {one.value:19.3f}" for one in measures.values()))
    if neighbours:
        print(neighbours)


def measured(config: Config, pair: PairLatents, classes: np.ndarray | None) -> tuple[dict[str, Measure], str]:
    """Every measure of a pair, and what is to be said of its neighbourhoods.

    Few examples have smaller neighbourhoods. Raises InputError where the latents have no geometry.
    """
    distinct = min(len(np.unique(z, axis=0)) for z in (pair.x, pair.y))
    k, plane = min(NEIGHBOURS, len(pair.x) // 2), min(PLANE_NEIGHBOURS, distinct - 1)
    try:
        found = measure_alignment(pair.x, pair.y, classes, config.permutations, config.seed, k, plane)
    except ValueError as error:
        raise InputError(f"{config.run}: latents of {' and '.join(pair.names)} cannot be measured ({error})") from error
    fewer = (k, plane) != (NEIGHBOURS, PLANE_NEIGHBOURS)
    note = f"few examples: {k} neighbours, {plane} of the curvature, in place of {NEIGHBOURS} and {PLANE_NEIGHBOURS}"
    return found, note if fewer else ""


def _null(one: Measure) -> str:
    return f"{one.null_mean:7.3f} [{one.null_low:.3f}, {one.null_high:.3f}]   {one.null}"


# ---- cross-decoding ----------------------------------------------------------------------------------------------


def print_decoded(config: Config, run: TrainedRun, member: FusionModel, split: Split) -> None:
    """R^2 and Frechet distance of every ordered pair, beside ceiling, floor and nulls; or why there are none."""
    if run.settings.get("reconstruction_weight", 1) == 0:
        print("\nno cross-decoding: the run's decoders were not trained (--reconstruction-weight 0)")
        return
    features, decoded = cross_decoded(member, split)
    try:
        found = measure_cross_decoding(features, decoded, permutations=config.permutations, seed=config.seed)
    except ValueError as error:
        raise InputError(f"{config.run}: cross-decoding cannot be measured ({error})") from error
    width = max(24, *(len(f"{a} to {b}") for a, b in found))
    print("\nfeatures decoded from another modality's latent, in standard deviations of train")
    titles = (f"{'R^2':>8}", f"{'permuted partners':^26}", f"{'own latent':>10}")
    print(f"{'':{width}}" + "".join(titles) + "   Frechet / d   own latent   real halves   mean alone")
    for pair, one in found.items():
        print(f"{f'{pair[0]} to {pair[1]}':{width}}{_decoded_cells(one)}")


def _decoded_cells(one: CrossDecoding) -> str:
    null = f"{one.r2.null_mean:.3f} [{one.r2.null_low:.3f}, {one.r2.null_high:.3f}]" if one.r2.null else ""
    cells = f"{one.r2.value:8.3f}{null:^26}{one.own_r2:10.3f}"
    distances = (one.frechet, one.own_frechet, one.floor_frechet, one.mean_frechet)
    return cells + "".join(f"{x:{w}.3f}" for x, w in zip(distances, (14, 13, 14, 13), strict=True))


def run(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
