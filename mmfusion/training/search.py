"""Bayesian optimisation of settings that train as one stack: ask for a batch, train it at once, tell, go on.

found = search({"transport": Range(1e-3, 10)}, evaluate, {"R@1": "maximize"}, trials=64, journal=Path("trials.jsonl"))
found.trials[found.chosen].setting

The tree-structured Parzen estimator asks (TPE: Bergstra et al., 2011; of several objectives Ozaki et al., 2022; package
optuna), after ten random settings. Within a batch nothing is known yet of the settings asked before: they count as bad
ones, so that the next lies elsewhere. Trial i is asked with a generator of its own, seeded by (seed, i): a search that
was broken off, and goes on from its journal, asks what a whole one asks.
"""

import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from mmfusion.errors import InputError
from mmfusion.files import read_regular_file, write_text

MOST_BYTES = 64 << 20  # of a journal: a trial has some 300
REMEDY = "give the journal of this very search, or a new path"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = True
    """uniform in the logarithm; else in the number itself"""

    def __post_init__(self) -> None:
        """Raise ValueError for a range without numbers, or whose least has no logarithm."""
        if not (math.isfinite(self.high) and self.low < self.high) or (self.log and self.low <= 0):
            raise ValueError(f"no range: {self}")

    def __contains__(self, value: object) -> bool:
        """True for a number inside."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """One of several texts or numbers, without an order."""

    values: tuple[str | float, ...]

    def __contains__(self, value: object) -> bool:
        """True for one of them."""
        return value in self.values


Space = Mapping[str, Range | Choice]
Setting = dict[str, float | str]
Direction = Literal["maximize", "minimize"]
Evaluate = Callable[[list[Setting]], Sequence[float | Sequence[float]]]


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it."""

    setting: Setting
    values: tuple[float, ...] | None
    """of the objectives; None where one of them was no finite number: failed, never chosen"""


@dataclass(frozen=True)
class Search:
    """All trials, in the order in which they were asked."""

    directions: dict[str, Direction]
    trials: list[Trial]

    @property
    def losses(self) -> np.ndarray:
        """(n, K): objectives with the sign that makes less better; NaN where a trial failed."""
        signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in self.directions.values()])
        missing = (math.nan,) * len(signs)
        return np.array([missing if one.values is None else one.values for one in self.trials]) * signs

    @property
    def front(self) -> list[int]:
        """Trials that no other one is better than in one objective without being worse in another; by the first."""
        return sorted(pareto_front(self.losses), key=lambda i: tuple(self.losses[i]))

    @property
    def chosen(self) -> int:
        """The best trial; of several objectives the one of the front that is nearest to the best of each.

        Distances are Euclidean, every objective in units of its range over the front. Raises ValueError where all
        trials failed.
        """
        front = self.front
        if not front:
            raise ValueError(f"all of {len(self.trials)} trials failed: none can be chosen")
        losses = self.losses[front]  # (F, K)
        spread = np.ptp(losses, axis=0)
        scaled = (losses - losses.min(0)) / np.where(spread > 0, spread, 1.0)
        return front[int(np.square(scaled).sum(1).argmin())]


def pareto_front(losses: np.ndarray) -> list[int]:
    """Rows of losses (n, K) that no row dominates: at most as large everywhere, and smaller somewhere. NaN: never."""
    finite = np.flatnonzero(np.isfinite(losses).all(1))
    return [
        int(i) for i in finite if not ((losses[finite] <= losses[i]).all(1) & (losses[finite] < losses[i]).any(1)).any()
    ]


def search(
    space: Space,
    evaluate: Evaluate,
    directions: Mapping[str, Direction],
    trials: int = 64,
    batch: int = 16,
    seed: int = 0,
    journal: Path | None = None,
    first: Sequence[Setting] = (),
    on_batch: Callable[[list[Trial]], None] | None = None,
) -> Search:
    """Look for the settings that are best by one objective, or for the Pareto front of several.

    Args:
        space: what is searched, by name.
        evaluate: at most `batch` settings -> the values of the objectives of each, (n, K), for one objective also (n,).
            They belong on dev, or on inner folds; a value that is not finite says that the trial failed.
        directions: of the K objectives, by name.
        trials: in all, those of the journal counted.
        journal: JSON lines; every batch is written to it as soon as it is told. Where it exists, its trials are not
            evaluated again. What a search asks does not depend on where it was broken off, as long as `evaluate` gives
            a setting the same values whatever is beside it.
        first: settings that are tried before any is asked for.
        on_batch: called with all trials so far, after each batch.

    Raises InputError where optuna is missing, and for a damaged journal or one of another search; ValueError for
    settings outside the space, and for values of another shape.
    """
    _check(space, directions, trials, batch, first)
    asker = _Asker(space, list(directions.values()), seed)
    header = _header(space, directions, batch, seed, first)
    told = [] if journal is None else _read_journal(journal, header, space, len(directions))[:trials]
    for start in range(0, trials, batch):
        given = [*(trial.setting for trial in told), *first[len(told) :]]
        settings = [
            asker.ask(number, given[number] if number < len(given) else None)
            for number in range(start, min(start + batch, trials))
        ]
        known = max(0, len(told) - start)
        if new := settings[known:]:
            values = _values(evaluate(new), len(new), len(directions))
            told += [Trial(*one) for one in zip(new, values, strict=True)]
            if journal is not None:
                _write_journal(journal, header, told)
            if on_batch is not None:
                on_batch(list(told))
        for number in range(start, start + len(settings)):
            asker.tell(number, told[number].values)
    return Search(dict(directions), told)


class _Asker:
    """Optuna's study in memory, and one sampler for each trial."""

    def __init__(self, space: Space, directions: Sequence[Direction], seed: int) -> None:
        self.optuna, self.seed, self.several = load_optuna(), seed, len(directions) > 1
        kinds = self.optuna.distributions
        self.distributions = {
            name: kinds.FloatDistribution(one.low, one.high, log=one.log)
            if isinstance(one, Range)
            else kinds.CategoricalDistribution(one.values)
            for name, one in space.items()
        }
        with self._quietly():
            self.study = self.optuna.create_study(directions=list(directions))

    def ask(self, number: int, setting: Setting | None) -> Setting:
        """Begin trial `number`: of this setting, or of one that is asked for."""
        with self._quietly():
            if setting is not None:
                running = self.optuna.trial.TrialState.RUNNING
                trial = self.optuna.trial.create_trial(state=running, params=setting, distributions=self.distributions)
                self.study.add_trial(trial)
                return dict(setting)
            own = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
            # the joint density finds one optimum sooner, and draws a front together
            self.study.sampler = self.optuna.samplers.TPESampler(
                multivariate=not self.several, constant_liar=True, seed=int(own)
            )
            return dict(self.study.ask(self.distributions).params)

    def tell(self, number: int, values: tuple[float, ...] | None) -> None:
        """End trial `number`."""
        states = self.optuna.trial.TrialState
        with self._quietly():
            self.study.tell(number, values, state=states.FAIL if values is None else states.COMPLETE)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Within, optuna logs warnings alone, and nothing of what is experimental in it."""
        logging = self.optuna.logging
        before = logging.get_verbosity()
        logging.set_verbosity(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
                yield
        finally:
            logging.set_verbosity(before)


def load_optuna() -> ModuleType:
    """The package optuna. Raises InputError where it is missing."""
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        remedy = "pip install optuna (or this package's extra: pip install .[search])"
        raise InputError(f"the search needs the package optuna: {remedy}") from error


def _check(
    space: Space, directions: Mapping[str, Direction], trials: int, batch: int, first: Sequence[Setting]
) -> None:
    """Raise ValueError for arguments that make no search."""
    if not space or not directions or trials < 1 or batch < 1:
        raise ValueError(f"no search: {len(space)} axes, {len(directions)} objectives, {trials} trials by {batch}")
    if wrong := [name for name, one in directions.items() if one not in ("maximize", "minimize")]:
        raise ValueError(f"direction {directions[wrong[0]]!r} of {wrong[0]}: maximize or minimize")
    for setting in first:
        if not _lies_in(space, setting):
            raise ValueError(f"setting {setting} is not in the space {dict(space)}")


def _lies_in(space: Space, setting: object) -> bool:
    return (
        isinstance(setting, dict)
        and setting.keys() == space.keys()
        and all(value in space[name] for name, value in setting.items())
    )


def _values(found: Sequence, count: int, objectives: int) -> list[tuple[float, ...] | None]:
    """Objectives (n, K) row by row; None where one is not finite. Raises ValueError for another shape."""
    values = np.asarray(found, dtype=float)
    if values.shape != (count, objectives) and not (objectives == 1 and values.shape == (count,)):
        raise ValueError(f"{count} settings and {objectives} objectives, but values of shape {values.shape}")
    rows = values.reshape(count, objectives)
    return [tuple(row.tolist()) if np.isfinite(row).all() else None for row in rows]


# ---- journal -----------------------------------------------------------------------------------------------------


def _header(
    space: Space, directions: Mapping[str, Direction], batch: int, seed: int, first: Sequence[Setting]
) -> dict[str, object]:
    """What two searches must share for one to go on with the other's journal; as JSON gives it back."""
    axes = [[name, type(one).__name__, asdict(one)] for name, one in space.items()]
    objectives = [list(one) for one in directions.items()]
    known = {"space": axes, "objectives": objectives, "batch": batch, "seed": seed, "first": list(first)}
    return json.loads(json.dumps(known))


def _write_journal(path: Path, header: Mapping[str, object], trials: Sequence[Trial]) -> None:
    """One line of what is searched, then one for each trial; the file is replaced as a whole."""
    lines = [{"search": header}, *({"number": i, **asdict(trial)} for i, trial in enumerate(trials))]
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def _read_journal(path: Path, header: Mapping[str, object], space: Space, objectives: int) -> list[Trial]:
    """The trials of a journal; none where there is no file. A last line that is no JSON is dropped, with a note.

    Raises InputError naming the line of any other damage, and what is other than in this search.
    """
    if not path.exists() and not path.is_symlink():
        return []
    lines = read_regular_file(path, MOST_BYTES, REMEDY).decode(errors="replace").removesuffix("\n").split("\n")
    found = [_parsed(line) for line in lines]
    begun = found[0].get("search") if isinstance(found[0], dict) else None
    if not isinstance(begun, dict):
        raise InputError(f"{path}: line 1 names no search; {REMEDY}")
    for name, value in header.items():
        if begun.get(name) != value:
            raise InputError(f"{path}: is of a search with another {name}; {REMEDY}")
    if found[-1] is None:
        found.pop()
        print(f"note: {path}: line {len(lines)}, the last, is cut short; that trial is done again")
    return [_trial(line, path, i, space, objectives) for i, line in enumerate(found[1:])]


def _parsed(line: str) -> object:
    """The JSON of a line; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _trial(line: object, path: Path, number: int, space: Space, objectives: int) -> Trial:
    """One line of a journal. Raises InputError."""
    line = line if isinstance(line, dict) else {}
    values = line.get("values", ())
    is_told = values is None or (
        isinstance(values, list)
        and len(values) == objectives
        and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    )
    if line.get("number") != number or not is_told or not _lies_in(space, line.get("setting")):
        raise InputError(f"{path}: line {number + 2} is damaged: it is not trial {number} of this search; {REMEDY}")
    return Trial(line["setting"], None if values is None else tuple(map(float, values)))
