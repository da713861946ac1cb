"""Search the loss weights of an alignment by Bayesian optimisation, on dev alone; the test split is never looked at.

python -m mmfusion.search --dataset arrays --data digits.npz --target digit --modalities fou kar --hold-out 0.5
python -m mmfusion.search ... --objectives alignment,unique --terms info_nce,transport,stein

A trial is one weighting of the terms (mmfusion.losses.alignment), the prior and the reconstruction, trained without
labels with every seed; all trials of a batch are one stack. The first term's weight is 1: Adam does not see the scale
of a loss. Every trial is trained for all its epochs, so that dev chooses weights and nothing else
(mmfusion.training.alignment_objectives has what it is asked).
"""

import csv
import io
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmfusion.cli import pick_device, run_command
from mmfusion.data.folds import FoldedDataset
from mmfusion.data.registry import DataOptions, check_flags, load_folded
from mmfusion.errors import InputError, check_numbers
from mmfusion.files import write_atomically, write_json, write_text
from mmfusion.losses.alignment import ALIGNMENTS
from mmfusion.metrics.format import counted
from mmfusion.runs.folder import RunConfig, RunFolder, defaults_for
from mmfusion.training.align import OWN_TERMS, AlignmentTraining
from mmfusion.training.alignment_objectives import DIRECTIONS, development, evaluation
from mmfusion.training.search import Range, Search, Setting, load_optuna, search

WEIGHTS = Range(1e-3, 10.0)  # below the least a term is as good as off
OWN_WEIGHT = 0.1  # of prior and reconstruction where nothing was searched, as in experiments.alignment
AXES = {
    "retrieval": "retrieval: mean R@1",
    "classification": "classification: linear probe",
    "alignment": "alignment: centroid gap",
    "unique": "unique: R² that no other modality has",
}
JOURNAL = "trials.jsonl"


@dataclass(frozen=True)
class Config(DataOptions):
    """Search the weights of alignment losses, prior and reconstruction on dev; one objective, or the front of two."""

    objectives: tuple[str, ...] = ("retrieval", "classification")
    """one or two of retrieval, classification, alignment, unique"""
    terms: tuple[str, ...] = ("info_nce", "transport", "stein", "bures")
    """alignment losses that are weighed (docs/alignment.md): by default one of each kind; the first has weight 1"""
    weights: tuple[str, ...] = ()
    """TERM=WEIGHT of the setting that is tried first and marked; by default 1, of prior and reconstruction .1"""
    trials: int = 64
    """settings that are trained"""
    at_once: int = 16
    """settings that are asked for, and trained, at once"""
    search_seed: int = 0
    """of what is asked"""
    seeds: int = 2
    """members of every setting"""
    epochs: int = 30
    """passes over the training part"""
    batch_size: int = AlignmentTraining.batch_size
    """examples per step"""
    latent_dim: int = AlignmentTraining.latent_dim
    """width of the shared space"""
    hidden_dim: int = AlignmentTraining.hidden_dim
    """of the encoders; 0: they are affine"""
    learning_rate: float = AlignmentTraining.learning_rate
    """of Adam, at the start; it falls along a cosine"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""
    name: str | None = None
    """the search is kept in runs/NAME; default: search-DATASET, with a number if that is taken"""
    resume: bool = False
    """go on with the search of that name where it was killed"""

    def check(self) -> None:
        """Raise InputError naming the first flag that makes no sense."""
        check_flags(self)
        if self.tokens:
            raise InputError("--tokens: what is aligned is one vector of each modality; leave the flag out")
        bounds = {"trials": (1, 100_000), "at_once": (1, 1024), "search_seed": (0, 2**31 - 1), "seeds": (1, 100)}
        bounds |= {"epochs": (1, 1e6), "batch_size": (2, 1e6), "latent_dim": (1, 65536), "hidden_dim": (0, 65536)}
        check_numbers(self, bounds | {"learning_rate": (1e-9, 1)})
        _check_names("objectives", self.objective_names, DIRECTIONS)
        _check_names("terms", self.term_names, ALIGNMENTS)
        if len(self.objective_names) > 2:
            raise InputError("--objectives: give one, or two for a front")
        _ = self.start

    @property
    def objective_names(self) -> list[str]:
        """Objectives, also where commas are between them."""
        return _listed(self.objectives)

    @property
    def term_names(self) -> list[str]:
        """Alignment losses, the one of weight 1 first."""
        return _listed(self.terms)

    @property
    def space(self) -> dict[str, Range]:
        """What is searched."""
        return dict.fromkeys((*self.term_names[1:], *OWN_TERMS), WEIGHTS)

    @property
    def start(self) -> Setting:
        """The setting that is tried first. Raises InputError for --weights that are none of this search's."""
        known = {name: OWN_WEIGHT if name in OWN_TERMS else 1.0 for name in (*self.term_names, *OWN_TERMS)}
        for text in _listed(self.weights):
            name, _, number = text.partition("=")
            try:
                value = float(number)
            except ValueError:
                value = 0.0
            if name not in known or not 0 < value < np.inf:
                raise InputError(f"--weights {text}: write TERM=WEIGHT, above 0, of {', '.join(known)}")
            known[name] = value
        unit = known.pop(self.term_names[0])
        for name in known:
            known[name] /= unit
            if known[name] not in WEIGHTS:
                first = "" if unit == 1 else f" times that of {self.term_names[0]}"
                raise InputError(
                    f"--weights {name}={known[name] * unit:g}: give {WEIGHTS.low:g} to {WEIGHTS.high:g}{first}"
                )
        return {name: known[name] for name in self.space}

    @property
    def training(self) -> AlignmentTraining:
        """How every setting is trained."""
        return AlignmentTraining(
            latent_dim=self.latent_dim,
            hidden_dim=self.hidden_dim,
            seeds=self.seeds,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            keep="last",
        )


def _listed(texts: Sequence[str]) -> list[str]:
    return [one for text in texts for one in text.split(",") if one]


def _check_names(flag: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    if not names or len(set(names)) < len(names) or not set(names) <= known.keys():
        raise InputError(f"--{flag} {','.join(names)}: give different ones of {', '.join(known)}")


# ---- the command -------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Load, search, print, and leave search.json, trials.csv and search.png. Raises InputError."""
    config.check()
    load_optuna()
    device = pick_device(config.device)
    folder = RunFolder.claim(config, default_name(config))
    loaded = load_folded(config, str(device))
    check_data(loaded, config)
    data = development(loaded)
    check_classes(data, config)
    if not folder.begin({"experiment": "search", **loaded.description}, device):
        return
    for note in (*loaded.notes, *data.notes):
        print(f"note: {note}")
    (train, dev, _), names = data.folds[0], config.objective_names
    print(
        f"{data.name}: {counted(config.trials, 'setting')} of {', '.join(config.space)}, "
        f"{config.term_names[0]} weighs 1; {len(train)} examples are trained on, {len(dev)} judge"
    )
    start = time.perf_counter()
    found = search(
        config.space,
        evaluation(data, names, config.term_names[0], config.training, device),
        {name: DIRECTIONS[name] for name in names},
        config.trials,
        config.at_once,
        config.search_seed,
        folder.path / JOURNAL,
        [config.start],
        lambda trials: print(
            f"{len(trials)} of {config.trials} tried, {time.perf_counter() - start:.0f} s", flush=True
        ),
    )
    seconds = time.perf_counter() - start
    if not found.front:
        raise InputError(f"all of {config.trials} trials failed: a loss was not finite; lower --learning-rate")
    print(text := report(found, config))
    write_results(folder.path, found, config, text)
    chosen = found.trials[found.chosen]
    folder.close({"chosen": weights_of(chosen.setting, config), "values": chosen.values, "seconds": round(seconds, 1)})
    print(f"\nkept in {folder.path}/: search.json, trials.csv, search.png ({seconds:.0f} s)")


def check_data(data: FoldedDataset, config: Config) -> None:
    """Raise InputError for data of a single modality."""
    if len(data.input_dims) < 2:
        raise InputError(f"--dataset {config.dataset}: has {', '.join(data.input_dims)} alone; an alignment needs two")


def check_classes(data: FoldedDataset, config: Config) -> None:
    """Raise InputError for --objectives classification where train or dev does not hold two classes."""
    if "classification" not in config.objective_names:
        return
    others = ", ".join(name for name in DIRECTIONS if name != "classification")
    if not data.labelled or data.task not in ("binary", "multiclass"):
        raise InputError(f"--objectives classification: {data.name} has no classes; give {others}")
    for part in ("train", "dev"):
        if len(data.pool.target[getattr(data.folds[0], part)].unique()) < 2:
            raise InputError(f"--objectives classification: {part} holds a single class; give {others}")


def weights_of(setting: Setting, config: Config) -> dict[str, float]:
    """All weights, that of the first term too, to three digits."""
    return {name: float(f"{value:.3g}") for name, value in {config.term_names[0]: 1.0, **setting}.items()}


def as_flags(setting: Setting, config: Config) -> str:
    """The setting as flags of this command."""
    return "--weights " + " ".join(f"{name}={value:g}" for name, value in weights_of(setting, config).items())


def report(found: Search, config: Config) -> str:
    """The front (of one objective the five best), the setting that was tried first, and the chosen one as flags."""
    names = list(found.directions)
    shown = found.front if len(names) > 1 else np.argsort(found.losses[:, 0])[: min(5, len(found.trials))].tolist()
    rows = [("trial", *names, *config.space)]
    for i in [*shown, *([] if 0 in shown else [0])]:
        trial = found.trials[i]
        if trial.values is not None:
            mark = ("first" if i == 0 else "") + ("*" if i == found.chosen else "")
            numbers = [f"{value:.3f}" for value in trial.values] + [f"{w:.3g}" for w in trial.setting.values()]
            rows.append((f"{i} {mark}".strip(), *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    failed = sum(trial.values is None for trial in found.trials)
    title = f"the front of {counted(len(found.trials), 'trial')}" if len(names) > 1 else "the best trials"
    nearest = ", the nearest of the front to the best of each" if len(names) > 1 else ""
    return "\n".join(
        [
            f"\n{title}, on dev, mean over {counted(config.seeds, 'seed')}{f'; {failed} failed' if failed else ''}",
            *lines,
            f"\nchosen (*){nearest}; what it scores on dev is the best of many, and too good by that:",
            as_flags(found.trials[found.chosen].setting, config),
        ]
    )


def write_results(folder: Path, found: Search, config: Config, text: str) -> None:
    """search.json, trials.csv and search.png."""
    front, names = found.front, list(found.directions)
    rows = [
        {
            "number": i,
            "weights": {config.term_names[0]: 1.0, **trial.setting},
            "values": None if trial.values is None else dict(zip(names, trial.values, strict=True)),
            "on front": i in front,
        }
        for i, trial in enumerate(found.trials)
    ]
    kept = {"objectives": found.directions, "first": 0, "chosen": found.chosen, "front": front, "trials": rows}
    write_json(folder / "search.json", kept | {"flags": as_flags(found.trials[found.chosen].setting, config)})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["number", *rows[0]["weights"], *names, "on_front"])
    for row in rows:
        values = row["values"] or dict.fromkeys(names, "")
        writer.writerow([row["number"], *row["weights"].values(), *values.values(), int(row["on front"])])
    write_text(folder / "trials.csv", table.getvalue())
    write_text(folder / "table.txt", text.lstrip("\n") + "\n")
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, found, "given weights" if config.weights else "default weights")
    write_atomically(folder / "search.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def draw(figure: Figure, found: Search, first: str) -> None:
    """The front before the trials that it dominates; of one objective every trial and the best so far.

    `first` says what the first trial is.
    """
    axis, names = figure.subplots(), list(found.directions)
    told = [i for i, trial in enumerate(found.trials) if trial.values is not None]
    if len(names) == 1:
        places, values = told, [found.trials[i].values[0] for i in told]
        best = (np.maximum if found.directions[names[0]] == "maximize" else np.minimum).accumulate(values)
        points = dict(zip(told, zip(places, values, strict=True), strict=True))
        axis.step(told, best, where="post", color="#1f6fb4", label="best so far", zorder=1)
        axis.set_xlabel("trial")
        others = told
    else:
        points = {i: found.trials[i].values for i in told}
        others = [i for i in told if i not in found.front]
        line = np.array([points[i] for i in found.front])
        axis.plot(*line.T, "o-", color="#1f6fb4", linewidth=1, label="front", zorder=3)
        axis.set_xlabel(_axis_label(names[0], found))
    if others:
        label = "dominated" if len(names) > 1 else "trials"
        axis.scatter(*zip(*(points[i] for i in others), strict=True), s=18, color="#b5b5b5", label=label, zorder=2)
    if 0 in points:
        axis.scatter(*points[0], marker="D", s=60, color="#d9741a", label=first, zorder=4)
    axis.scatter(
        *points[found.chosen], marker="o", s=170, facecolors="none", edgecolors="black", label="chosen", zorder=5
    )
    axis.set_ylabel(_axis_label(names[-1], found))
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    axis.set_title(f"{counted(len(found.trials), 'weighting')}, scored on dev", fontsize=11)


def _axis_label(name: str, found: Search) -> str:
    return f"{AXES[name]} ({'higher' if found.directions[name] == 'maximize' else 'lower'} is better)"


def default_name(config: Config) -> str:
    """The search's name where none is given."""
    return f"search-{config.dataset}"


def begun(config: Config) -> Config | None:
    """With --resume the settings of that search, so that no flag need be given again."""
    return defaults_for(Config, RunConfig(config.name, config.resume), lambda: default_name(config))


def run(arguments: list[str]) -> int:
    """`python -m mmfusion.search FLAGS`; returns the exit code."""
    return run_command(main, Config, arguments, begun)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
