"""Search for the recipe that experiments train by, on inner folds of training parts alone.

    python -m experiments.recipe_search --dataset mustard --data sarcasm_data.json --text-encoder MODEL_FOLDER
    python -m experiments.recipe_search --dataset arrays --data vectors.npz --out runs/search-tweets.json
    python -m experiments.recipe_search --over runs/search-mustard.json runs/search-tweets.json
    python -m experiments.recipe_search --dataset pom --data pom.npz --vary epochs=15,40,80 weight_decay=1,3 --seeds 3

The first two score every candidate on one data set and write a file; the third reads several files and writes the
common choice: the candidate with the least loss, in units of what predicting the training part's mean or class shares
costs, mean over the data sets; with --least-dimension, of those whose latents carry that many dimensions on every data
set. Candidates are a random design (Bergstra & Bengio, 2012): every value of an axis is drawn equally often, so that
the mean over all candidates with a value says what the value does. The last command asks whether one data set wants
other values of a few axes: it scores all their combinations beside the present recipe, seed by seed.

Only the first fold's training part is looked at, cut into inner folds by whole groups where there are groups. Where a
data set is cross-validated, those examples are tested by the other folds: what is chosen has seen their labels.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mmfusion.cli import pick_device, run_command
from mmfusion.data.array_cuts import cut_dev, cut_folds
from mmfusion.data.folds import FoldedDataset, constant_predictions
from mmfusion.data.registry import DataOptions, check_flags, load_folded
from mmfusion.dataset import Fold, Task, take
from mmfusion.errors import InputError, check_numbers
from mmfusion.files import read_regular_file, write_json
from mmfusion.metrics.scores import example_losses
from mmfusion.metrics.tasks import selection_score
from mmfusion.training.grid import JWAE, Grid, Recipe, Setting, per_example, train_grid

RANK = 4
SPACE: dict[str, tuple[float | int | str, ...]] = {
    "noise": ("none", "dimension"),
    "keep": ("last", "best"),
    "latent_dim": (16, 32),
    "hidden_dim": (32, 128),
    "epochs": (15, 40),
    "weight_decay": (0.01, 0.1, 1.0, 3.0, 10.0),
    "modality_dropout": (0.0, 0.3),
    "feature_dropout": (0.0, 0.3, 0.6),
    "mmd_weight": (0.1, 0.3, 1.0, 3.0),
}
MOST_BYTES = 64 << 20  # of a finished search
AXIS_BOUNDS = {
    "latent_dim": (1, 4096),
    "hidden_dim": (1, 65536),
    "epochs": (1, 100_000),
    "weight_decay": (0, 1e3),
    "modality_dropout": (0, 0.99),
    "feature_dropout": (0, 0.99),
    "mmd_weight": (0, 1e9),
}
ALIKE = ("noise", "keep", "latent_dim", "hidden_dim", "epochs")  # of all that train at once

Candidate = dict[str, float | int | str]
Found = dict[str, float | list[float]]


@dataclass(frozen=True)
class Config(DataOptions):
    """Score random recipes on inner folds of a training part, or choose one over several such searches."""

    over: tuple[Path, ...] = ()
    """finished searches (--out of each) to choose over, in place of a data set"""
    least_dimension: float = 0.0
    """with --over: least effective dimension of Cov(mu) of a recipe that may be chosen; no rank above it could bind"""
    candidates: int = 40
    """random recipes to score; the present one comes first"""
    vary: tuple[str, ...] = ()
    """AXIS=VALUE,VALUE,...: in place of random recipes, all combinations of these values, the rest as at present"""
    inner_folds: int = 3
    """inner folds of the training part"""
    seeds: int = 2
    """seeds of every candidate"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""
    out: Path | None = None
    """file to write; default: runs/search-DATASET.json (--vary: runs/vary-DATASET.json), or runs/recipe.json"""


def design(count: int, seed: int = 0) -> list[Candidate]:
    """`count` candidates, first the present recipe of classes; in the others each value is drawn equally often."""
    rng = np.random.default_rng(seed)
    columns = []
    for values in SPACE.values():
        repeated = list(itertools.islice(itertools.cycle(values), count - 1))
        columns.append([repeated[i] for i in rng.permutation(count - 1)])
    present = {name: getattr(Recipe(), name) for name in SPACE}
    return [present, *(dict(zip(SPACE, row, strict=True)) for row in zip(*columns, strict=True))]


def combinations(axes: Sequence[str], task: Task) -> list[Candidate]:
    """The task's present recipe, then all other combinations of the values of `axes` (as for --vary) with its rest.

    Raises InputError for an axis or a value that does not exist.
    """
    values = dict(map(_read_axis, axes))
    present = {name: getattr(Recipe.of(task), name) for name in SPACE}
    crossed = [present | dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    return [present, *(candidate for candidate in crossed if candidate != present)]


def _read_axis(text: str) -> tuple[str, list[float | int | str]]:
    """AXIS=VALUE,VALUE,... -> (axis, values)."""
    name, _, listed = text.partition("=")
    if name not in SPACE:
        raise InputError(f"--vary {text}: an axis is one of {', '.join(SPACE)}; write for instance epochs=15,40")
    kind = type(SPACE[name][0])
    try:
        values = [kind(value) for value in listed.split(",")]
    except ValueError as error:
        raise InputError(f"--vary {text}: write for instance {name}={','.join(map(str, SPACE[name]))}") from error
    for value in values:
        if kind is str and value not in SPACE[name]:
            raise InputError(f"--vary {text}: {name} is one of {', '.join(map(str, SPACE[name]))}")
        if kind is not str and not AXIS_BOUNDS[name][0] <= value <= AXIS_BOUNDS[name][1]:
            raise InputError("--vary {}: {} goes from {:g} to {:g}".format(text, name, *AXIS_BOUNDS[name]))
    return name, values


def inner(data: FoldedDataset, folds: int, with_dev: bool) -> FoldedDataset:
    """The first fold's training part (and its dev part, unless that is tested on) cut into inner folds.

    `with_dev`: a tenth of each inner training part is cut off to select an epoch on; else all of it is trained on.
    """
    first = data.folds[0]
    known = first.train if torch.isin(first.dev, data.test_rows).any() else torch.cat([first.train, first.dev]).unique()
    split = take(data.pool, known)
    ids = {key: int(row) for key, row in zip(split.ids, known, strict=True)}
    by_class = data.task in ("binary", "multiclass")
    made = []
    for rest, test in cut_folds(split, folds, by_class, 0, data.name, data.class_names)[0]:
        train = take(split, rest)
        dev = train
        if with_dev:
            train, dev, _ = cut_dev(train, by_class, 0, data.name, data.class_names)
        parts = (train.ids, dev.ids, take(split, test).ids)
        made.append(Fold(*(torch.tensor([ids[key] for key in part]) for part in parts)))
    return replace(data, folds=made)


def search(data: FoldedDataset, candidates: Sequence[Candidate], config: Config) -> list[Found]:
    """Loss in units of no information, selection score and dimension of the latents of every candidate."""
    found: dict[int, Found] = {}
    device = pick_device(config.device)
    order = sorted(range(len(candidates)), key=lambda i: str([candidates[i][name] for name in ALIKE]))
    groups = itertools.groupby(order, key=lambda i: [candidates[i][name] for name in ALIKE])
    for number, (shared, places) in enumerate(groups, 1):
        places = list(places)
        recipe = replace(Recipe(), **dict(zip(ALIKE, shared, strict=True)))
        cut = inner(data, config.inner_folds, recipe.keep == "best")
        settings = [setting(str(i), candidates[i], cut) for i in places]
        grid = train_grid(cut, settings, range(config.seeds), recipe, device=device, title=f"group {number}")
        found |= {i: judged(grid, p) for p, i in enumerate(places)}
    return [found[i] for i in range(len(candidates))]


def setting(label: str, candidate: Candidate, data: FoldedDataset) -> Setting:
    """The part of a candidate in which members that train at once may differ."""
    return Setting(
        label,
        RANK,
        JWAE,
        weight_decay=candidate["weight_decay"],
        dropout={name: candidate["modality_dropout"] for name in data.input_dims if len(data.input_dims) > 1},
        mmd_weight=candidate["mmd_weight"],
        feature_dropout=candidate["feature_dropout"],
    )


def judged(grid: Grid, place: int) -> Found:
    """Loss of each seed, mean over inner test examples, and its spread; score of each; dimension of the means."""
    data = grid.data
    losses = grid.losses()[place].mean(-1) / uninformed_loss(data)  # (S,)
    score = selection_score(data.task, data.target_scale)
    values = [
        [
            score(grid.outputs[place, s, f, fold.test.numpy()], data.pool.target[fold.test].numpy())
            for f, fold in enumerate(data.folds)
        ]
        for s in range(len(grid.seeds))
    ]  # (S, F)
    return {
        "loss": float(losses.mean()),
        "loss_std": float(losses.std(ddof=1)) if len(losses) > 1 else 0.0,
        "score": float(np.mean(values)),
        "dimension": grid.latent_dimension(str(grid.settings[place].label)),
        "losses": losses.tolist(),
        "scores": np.mean(values, 1).tolist(),
    }


def uninformed_loss(data: FoldedDataset) -> float:
    """Loss on the test parts of predicting each training part's mean, or its shares of the classes."""
    return float(per_example(data, constant_predictions(data), "test", example_losses).mean())


def described(candidate: Candidate) -> str:
    """The candidate in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in candidate.items())


def table(candidates: Sequence[Candidate], losses: np.ndarray, dimension: np.ndarray, best: int = 8) -> str:
    """The best candidates, the present one, and the mean over the candidates with each value; losses (candidates,)."""
    lines = ["loss in units of no information; least dimension of the latents; recipe"]
    for i in np.argsort(losses)[:best]:
        lines.append(f"{losses[i]:.4f}  {dimension[i]:5.1f}  {described(candidates[i])}")
    lines.append(f"{losses[0]:.4f}  {dimension[0]:5.1f}  the present recipe")
    lines.append("mean over the candidates with a value:")
    for name, values in SPACE.items():
        means = {v: losses[[k for k, c in enumerate(candidates) if k and c[name] == v]].mean() for v in values}
        lines.append(f"  {name:18} " + "   ".join(f"{value}: {mean:.4f}" for value, mean in means.items()))
    return "\n".join(lines)


def differences(candidates: Sequence[Candidate], found: Sequence[Found]) -> str:
    """Every candidate less the present recipe, seed by seed, the best first: mean and standard deviation over seeds."""
    lines = [
        "loss in units of no information, score, least dimension of the latents; "
        "less the present recipe's: loss, score (mean +- std over seeds)"
    ]
    for i in sorted(range(len(found)), key=lambda i: found[i]["loss"]):
        gaps = [np.subtract(found[i][key], found[0][key]) for key in ("losses", "scores")]
        cells = "   ".join(f"{gap.mean():+.4f} +- {gap.std(ddof=1):.4f}" for gap in gaps)
        changed = {name: value for name, value in candidates[i].items() if value != candidates[0][name]}
        what = described(changed) or "the present recipe"
        lines.append(f"{found[i]['loss']:.4f}  {found[i]['score']:.4f}  {found[i]['dimension']:5.1f}   {cells}  {what}")
    return "\n".join(lines)


def choose(paths: Sequence[Path], least_dimension: float = 0.0) -> tuple[dict[str, object], str]:
    """The choice over finished searches and its table. Raises InputError for a file that is none, or another design."""
    files = [_read(path) for path in paths]
    candidates = files[0]["candidates"]
    for path, file in zip(paths, files, strict=True):
        if file["candidates"] != candidates:
            raise InputError(f"{path}: scored other candidates than {paths[0]}; search again, with one --candidates")
    losses = np.array([[row["loss"] for row in file["found"]] for file in files])  # (data sets, candidates)
    dimension = np.array([[row["dimension"] for row in file["found"]] for file in files]).min(0)
    mean = losses.mean(0)
    allowed = np.flatnonzero(dimension >= least_dimension)
    if not len(allowed):
        raise InputError(
            f"--least-dimension {least_dimension:g}: no candidate reaches it; the best has {dimension.max():.1f}"
        )
    chosen = int(allowed[mean[allowed].argmin()])
    names = [str(file["dataset"]) for file in files]
    text = [f"{len(files)} data sets: {', '.join(names)}", table(candidates, mean, dimension)]
    text.append(f"chosen: {mean[chosen]:.4f}  {dimension[chosen]:5.1f}  {described(candidates[chosen])}")
    for name, row in zip(names, losses, strict=True):
        text.append(f"  {name}: {row[chosen]:.4f}, present recipe {row[0]:.4f}, its own best {row.min():.4f}")
    result = {"recipe": candidates[chosen], "loss": float(mean[chosen]), "present": float(mean[0]), "datasets": names}
    return result, "\n".join(text)


def _read(path: Path) -> dict[str, object]:
    try:
        file = json.loads(read_regular_file(path, MOST_BYTES, "give the --out of a finished search", "--over"))
        known = all(set(row) >= {"loss", "dimension"} for row in file["found"])
        if not known or not file["found"] or len(file["found"]) != len(file["candidates"]):
            raise ValueError
        if any(set(one) != set(SPACE) for one in file["candidates"]):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--over {path}: is no finished search of this version; search again") from error
    return file


def main(config: Config) -> None:
    """Search on one data set, or choose over several searches."""
    if config.over:
        result, text = choose(config.over, config.least_dimension)
        out = config.out or Path("runs/recipe.json")
    else:
        fewest = 2 if config.vary else 1  # a spread over seeds
        check_numbers(config, {"candidates": (6, 1000), "inner_folds": (2, 20), "seeds": (fewest, 100)})
        check_flags(config)
        if config.tokens:
            raise InputError("--tokens: the search is of models of one vector of each modality; leave the flag out")
        data = load_folded(config, str(pick_device(config.device)))
        if not data.labelled:
            raise InputError(f"--dataset {config.dataset}: has no labels; the search needs some, give other data")
        candidates = combinations(config.vary, data.task) if config.vary else design(config.candidates)
        found = search(data, candidates, config)
        result = {"dataset": data.name, "candidates": candidates, "found": found, "seeds": config.seeds}
        result |= {"inner_folds": config.inner_folds, "present": asdict(Recipe.of(data.task))}
        losses, dimension = (np.array([row[key] for row in found]) for key in ("loss", "dimension"))
        rows = differences(candidates, found) if config.vary else table(candidates, losses, dimension)
        text = f"{data.name}: {config.seeds} seeds, {config.inner_folds} inner folds\n{rows}"
        out = config.out or Path(f"runs/{'vary' if config.vary else 'search'}-{data.name}.json")
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(run_command(main, Config, sys.argv[1:]))
