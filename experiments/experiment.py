"""Frame of every experiment: flags, the run's folder, table, figure, results.json, and a verdict by rule.

An experiment is a function from a study to an `Outcome`; everything around it is here. A verdict is never written by
hand: it follows from the contrasts' intervals (mmfusion.metrics.verdicts).
"""

import contextlib
import io
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmfusion.cli import pick_device, run_command
from mmfusion.data.folds import FoldedDataset
from mmfusion.data.registry import StudyOptions, check_flags, load_folded
from mmfusion.dataset import Task
from mmfusion.distributed import end_process, join_processes, leave_processes
from mmfusion.errors import InputError
from mmfusion.files import write_atomically, write_safetensors, write_text
from mmfusion.metrics.outcomes import PRIMARY
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, corrected_contrasts
from mmfusion.runs.folder import RunConfig, RunFolder, defaults_for
from mmfusion.training.grid import Grid, Recipe, Setting, train_grid

Settings = TypeVar("Settings")
SCORE_EFFECT = 0.01
"""smallest effect of interest: one point of accuracy, or a hundredth of the target's standard deviation"""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Flags of every experiment."""

    seeds: int = 10
    """seeds 0 .. n - 1, shared by all settings, so that differences between settings are paired"""
    epochs: int | None = None
    """passes over the training part; default: 15, of a regression 60"""
    hidden_dim: int = Recipe.hidden_dim
    """width of the encoders' and decoders' hidden layer"""
    weight_decay: float = Recipe.weight_decay
    """decoupled, on weight matrices"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""
    compile: bool = False
    """compile the training step: twice as fast, after half a minute"""
    name: str | None = None
    """the run is kept in runs/NAME; default: EXPERIMENT-DATASET, with a number if that is taken"""
    resume: bool = False
    """go on with the run of that name where it was killed"""

    def recipe(self, task: Task) -> Recipe:
        """The common recipe with what the flags change of it."""
        changes = {"hidden_dim": self.hidden_dim, "weight_decay": self.weight_decay}
        return Recipe.of(task, **changes if self.epochs is None else changes | {"epochs": self.epochs})


@dataclass
class Run:
    """How an experiment trains; made from the flags."""

    options: Options
    folder: Path
    """where files are left"""
    device: torch.device
    checkpoints: Path | None = None
    """where killed trainings go on from; default: in that folder"""

    def __post_init__(self) -> None:
        if self.checkpoints is None:
            self.checkpoints = self.folder / "checkpoints"

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return list(range(self.options.seeds))

    def grid(
        self,
        data: FoldedDataset,
        settings: Sequence[Setting],
        title: str,
        recipe: Recipe | None = None,
        **shape: object,
    ) -> Grid:
        """Train settings x seeds x folds in one call; a killed run goes on from the checkpoint of that title.

        What every member says of every example is kept in the run's folder (`keep_predictions`).
        """
        grid = train_grid(
            data,
            settings,
            self.seeds,
            recipe or self.options.recipe(data.task),
            compile=self.options.compile,
            device=self.device,
            checkpoint=self.checkpoints / f"{title.replace(' ', '-')}.safetensors",
            title=title,
            **shape,
        )
        keep_predictions(grid, self.folder / "predictions" / f"{title.replace(' ', '-')}.safetensors")
        return grid


def keep_predictions(grid: Grid, path: Path) -> None:
    """Outputs (P, S, F, N[, O]) with what is needed to score them again: row labels, ids, and each fold's rows."""
    folds = [{part: rows.tolist() for part, rows in fold._asdict().items()} for fold in grid.data.folds]
    about = {"rows": [setting.label for setting in grid.settings], "ids": list(grid.data.pool.ids), "folds": folds}
    about |= {"task": grid.data.task, "dataset": grid.data.name}
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, {"outputs": torch.from_numpy(grid.outputs)}, {"about": json.dumps(about)})


@dataclass
class Outcome:
    """What an experiment found."""

    table: str
    """fixed-width text"""
    contrasts: list[Contrast]
    verdict: Verdict
    answer: str
    """the question's answer in one sentence of numbers, made from the contrasts"""
    numbers: dict[str, object]
    """everything in the table, JSON-able"""
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (12.0, 4.2)
    """of the figure, in inches"""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """One question."""

    name: str
    claim: str
    """of the study, in its words as far as they can be tested"""
    question: str
    measure: Callable[..., Outcome]
    """(study, run) -> outcome; of a question about a trained run, whatever its own command makes of it"""
    modalities: int = 1
    """least number of modalities that the question needs"""
    options: type[Options] = Options
    """flags, where the experiment has some of its own"""
    tokens: bool = False
    """of sequences of tokens or steps, not of one vector a modality"""
    labels: bool = True
    """False where data without labels will do"""
    check: Callable[[FoldedDataset, Options], None] = lambda data, options: None
    """raises InputError for flags of its own that do not fit each other or the data, before anything is written"""


def contrasts_on_test(
    data: FoldedDataset,
    named: dict[str, Difference],
    effect: float | dict[str, float] = SCORE_EFFECT,
    least_folds: int = 2,
) -> list[Contrast]:
    """Contrasts of differences over the test examples or the folds, by the inference that the data allow.

    Of `least_folds` or more it is Nadeau and Bengio's. Of one test part, or of fewer folds, it is the bootstrap
    over seeds and examples, of whole groups where there are any, which speaks of these training sets alone.
    """
    groups = data.pool.metadata.get("group")
    clusters = None if groups is None else [groups[row] for row in data.test_rows]
    cut = data.cut if len(data.folds) >= least_folds else None
    return corrected_contrasts(named, effect, cut=cut, clusters=clusters)


def outcomes(grid: Grid) -> dict[str, np.ndarray]:
    """{outcome: (P, S, n)}: the task's primary outcomes by test examples and, of two classes, the accuracy.

    The accuracy is that at the threshold which does best on each fold's dev part: it stands second.
    """
    found = {name: grid.outcome(name) for name in PRIMARY[grid.data.task]}
    return found | ({"accuracy": grid.outcome("accuracy", threshold=True)} if grid.data.task == "binary" else {})


# ---- command line ------------------------------------------------------------------------------------------------


def run(experiment: Experiment, arguments: list[str]) -> int:
    """`python -m experiments.NAME FLAGS`: 0, or 2 after one line that says what to put right."""
    config = options_of(experiment)
    default = lambda options: f"{experiment.name}-{options.dataset}"  # noqa: E731
    return run_command(lambda options: execute(experiment, options), config, arguments, begun(config, default))


def begun(config: type[Settings], default: Callable[[Settings], str]) -> Callable[[Settings], Settings | None]:
    """For `run_command`: with --resume the settings of the run to go on with, so that no flag need be given again."""
    return lambda options: defaults_for(config, RunConfig(options.name, options.resume), lambda: default(options))


def options_of(experiment: Experiment) -> type[Options]:
    """Options whose --help begins with the experiment's question."""
    return type("Options", (experiment.options,), {"__doc__": experiment.question})


def execute(experiment: Experiment, options: Options) -> None:
    """Load, measure, print, and leave table.txt, figure.png and results.json in the run's folder."""
    check_options(options)
    if options.tokens and not experiment.tokens:
        raise InputError(f"--tokens: {experiment.name} is about one vector of each modality; leave the flag out")
    device = pick_device(options.device)
    processes = join_processes(str(device))
    with processes.together():
        run_folder = RunFolder.claim(options, f"{experiment.name}-{options.dataset}")
        data = load_study(experiment, options, processes.device)
    goes_on = False
    with processes.together():
        if processes.is_main:
            goes_on = run_folder.begin({"experiment": experiment.name, **data.description}, device)
    goes_on, folder = processes.gather((goes_on, run_folder.path))[0]
    if goes_on and processes.is_main:
        for note in data.notes:
            print(f"note: {note}")
        start = time.perf_counter()
        outcome = experiment.measure(data, Run(options, folder, torch.device(processes.device)))
        seconds = time.perf_counter() - start
        record(
            experiment,
            data,
            outcome,
            run_folder,
            seeds=options.seeds,
            recipe=asdict(options.recipe(data.task)),
            seconds=seconds,
            device=device,
        )
    elif goes_on:
        help_to_train(experiment, data, options, folder, torch.device(processes.device))
    leave_processes()


def load_study(experiment: Experiment, options: Options, device: str) -> FoldedDataset:
    """The data that the experiment works on. Raises InputError where they are not what its question needs."""
    data = load_folded(replace(options, tokens=True) if experiment.tokens else options, device)
    if len(data.input_dims) < experiment.modalities:
        raise InputError(
            f"--dataset {options.dataset}: has {', '.join(data.input_dims)} alone; {experiment.name} needs "
            f"{experiment.modalities} modalities"
        )
    if experiment.labels and not data.labelled:
        raise InputError(f"--dataset {options.dataset}: has no labels; {experiment.name} needs some, give other data")
    experiment.check(data, options)
    return data


def help_to_train(
    experiment: Experiment, data: FoldedDataset, options: Options, folder: Path, device: torch.device
) -> None:
    """Measure beside the main process, which alone keeps files and prints: every training shares out its members."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        shutil.copy(folder / "run.json", place)
        experiment.measure(data, Run(options, Path(place), device, folder / "checkpoints"))


def record(
    experiment: Experiment,
    data: FoldedDataset,
    outcome: Outcome,
    run_folder: RunFolder,
    *,
    seeds: int,
    recipe: dict[str, object],
    seconds: float,
    device: torch.device,
) -> None:
    """Print what came out, and leave table.txt, figure.png and results.json in the run's folder."""
    folder = run_folder.path
    text = render(experiment, data, seeds, outcome)
    print(text)
    write_text(folder / "table.txt", text)
    figure = Figure(figsize=outcome.size, layout="constrained")
    FigureCanvasAgg(figure)
    outcome.draw(figure)
    write_atomically(folder / "figure.png", lambda path: figure.savefig(path, dpi=100, format="png"))
    results = {
        "experiment": experiment.name,
        "claim": experiment.claim,
        "question": experiment.question,
        "dataset": data.name,
        "task": data.task,
        "examples": {part: len(rows) for part, rows in zip(("train", "dev", "test"), data.folds[0], strict=True)},
        "folds": len(data.folds),
        "repeats": data.repeats,
        "seeds": seeds,
        "recipe": recipe,
        "verdict": outcome.verdict,
        "answer": outcome.answer,
        "contrasts": [asdict(contrast) for contrast in outcome.contrasts],
        "table": outcome.table,
        "numbers": outcome.numbers,
        "notes": data.notes + outcome.notes,
        "seconds": round(seconds, 1),
        "resumed": run_folder.resume,
        "peak_memory_gb": round(peak_memory_gb(), 2),
        "torch": torch.__version__,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }
    run_folder.close(results)
    print(
        f"\nkept in {folder}/: table.txt, figure.png, results.json ({seconds:.0f} s, {peak_memory_gb():.1f} GB at most)"
    )


def check_options(options: Options) -> None:
    """Raise InputError for flags out of range or without a use, before anything is loaded."""
    check_flags(options)
    if options.seeds < 2 and options.cross_validate is None:
        raise InputError(f"--seeds {options.seeds}: give at least 2; one seed has no spread")
    for name in ("epochs", "hidden_dim"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: give at least 1")
    if options.cross_validate is not None and not 2 <= options.cross_validate <= 100:
        raise InputError(f"--cross-validate {options.cross_validate}: give a number of folds from 2 to 100")
    if not 1 <= options.repeats <= 100:
        raise InputError(f"--repeats {options.repeats}: give a number from 1 to 100")
    if options.repeats > 1 and options.cross_validate is None:
        raise InputError(f"--repeats {options.repeats}: repeats what --cross-validate cuts; give that, too")
    if not 0 <= options.weight_decay * Recipe.learning_rate < 1:
        raise InputError(f"--weight-decay {options.weight_decay}: give at least 0 and less than 1000")


def peak_memory_gb() -> float:
    """Most memory that this process has held, in 10^9 bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- text --------------------------------------------------------------------------------------------------------


def render(experiment: Experiment, data: FoldedDataset, seeds: int, outcome: Outcome) -> str:
    """The printed page: question, table, contrasts, verdict."""
    repeats = "" if data.repeats == 1 else f"{data.repeats} x "
    folds = "" if len(data.folds) == 1 else f", {repeats}{len(data.folds) // data.repeats} folds"
    lines = [
        "",
        f"{experiment.name} on {data.name}: {len(data.test_rows.unique())} test examples{folds}, {seeds} seeds",
        experiment.question,
        "",
        outcome.table,
        "",
        contrast_table(outcome.contrasts),
        "",
        f"claim: {experiment.claim}",
        f"verdict: {outcome.verdict}. {outcome.answer}",
    ]
    return "\n".join(lines + [f"note: {note}" for note in outcome.notes]) + "\n"


def contrast_table(contrasts: Sequence[Contrast]) -> str:
    """One line per contrast: estimate, 95 % interval, p, the two statements, power, verdict."""
    width = max((len(c.name) for c in contrasts), default=0)
    head = f"{'contrast (positive: as claimed)':{width}}  estimate [95 % interval]     p       "
    lines = [f"{head}there is     it matters   power  verdict"]
    for c in contrasts:
        verdict = c.verdict if c.decides else f"({c.verdict})"
        lines.append(
            f"{c.name:{width}}  {c.estimate:+.4f} [{c.low:+.4f}, {c.high:+.4f}]  {c.p_corrected:6.4f}  {c.exists:11}"
            f"  {c.matters:11}  {c.power:4.2f}  {verdict} (of interest: {c.effect:g})"
        )
    lines.append("power: of finding an effect of interest of that size; in brackets: does not decide")
    return "\n".join(lines)


def verdict_of_rank(grid: Grid, label: str, verdict: Verdict, over: int | None = None) -> tuple[Verdict, str]:
    """The verdict, or none where the latents of the setting at the largest rank leave that rank nothing to bind.

    A rank that is compared with a lower one, `over`, needs more dimensions than that; else as many as itself. Returns
    the verdict with a sentence for the answer, which says how many dimensions tell examples apart.
    """
    rank, dimension = grid.settings[grid.index(label)].rank, grid.latent_dimension(label)
    text = f"The latents of '{label}' vary in {dimension:.1f} effective dimensions, "
    if over is not None:
        if dimension > over:
            return verdict, f" {text}more than rank {over} can bind."
        return "not identified", f" No verdict about rank. {text}no more than rank {over} can bind."
    if dimension >= rank:
        return verdict, f" {text}no fewer than its rank."
    return "not identified", f" No verdict about rank. {text}fewer than its rank: a higher one has nothing to bind."


def main(experiment: Experiment) -> None:
    """Entry point of an experiment's file."""
    end_process(run(experiment, sys.argv[1:]))
