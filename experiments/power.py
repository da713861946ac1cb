"""Could an experiment have found the effect? Power and false support of finished runs, and a check by planted effects.

    python -m experiments.power runs/rank_ablation-cmu_mosi runs/jwae_ablation-cmu_mosi
    python -m experiments.power --check rank_ablation --replicates 10 --dataset cmu_mosi --data FILE \\
        --plant interaction --plant-rank 3 --plant-strength 0.5

The first simulates each run's verdict from the spread of its contrasts over folds (mmfusion.metrics.power) and draws
the curves. The second trains the experiment on as many plantings (functions and labels anew), and prints how often the
verdict is "supported" beside what the simulation says of the same spread; --keep FILE adds that to a table.
"""

import csv
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import binomtest

from experiments.corpora import OF_A_RUN
from experiments.experiment import Experiment, Options, Run, check_options, load_study, options_of
from experiments.results_summary import POWER
from mmfusion.cli import pick_device, run_command
from mmfusion.distributed import current_processes
from mmfusion.errors import InputError
from mmfusion.files import read_regular_file, write_atomically, write_text
from mmfusion.metrics.power import checked_claim, checked_values, false_support, power_curve, simulate, size_needed
from mmfusion.runs.folder import MARK_OF_COMPLETION, RUNS
from mmfusion.runs.settings import MOST_BYTES

STRENGTHS = (0.5, 1.0, 2.0, 3.0)  # times the effect of interest
CURVE = np.linspace(0, 4, 33)
SUPPORTED = 2  # place in mmfusion.metrics.power.VERDICTS


@dataclass(frozen=True)
class Config:
    """Power, false support and the size needed, of runs that are complete."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or their names in runs/"""
    figure: Path = Path("power.png")
    """file that the curves are drawn into"""
    draws: int = 10_000
    """simulated runs of each strength"""


@dataclass(frozen=True)
class Design:
    """The deciding contrasts of one run: what a simulation needs."""

    values: np.ndarray
    """(C, J) over folds"""
    ratio: float
    routes: list[str]
    effects: np.ndarray
    """(C,)"""
    floors: np.ndarray
    """(C,) 0 where a contrast is about its sign alone"""

    @property
    def rule(self) -> tuple[np.ndarray, float, list[str], np.ndarray]:
        """Arguments that every function of mmfusion.metrics.power begins with."""
        return self.values, self.ratio, self.routes, self.effects


def design_of(contrasts: Sequence[Mapping[str, object]], where: str) -> Design:
    """The contrasts that decide. Raises InputError, beginning with `where`, where they hold no values over folds."""
    deciding = [c for c in contrasts if c.get("decides", True)]
    if not deciding:
        raise InputError(f"{where}: no contrast decides its verdict; power is about those that do")
    try:
        values = np.array([c["fold_values"] for c in deciding], np.float64)
        ratios = {float(c["ratio"]) for c in deciding}
        effects = np.array([c["effect"] for c in deciding], np.float64)
        routes = [str(c["route"]) for c in deciding]
        if len(ratios) != 1:
            raise ValueError("contrasts over folds of different sizes")
        checked_claim(checked_values(values).shape[1], min(ratios), routes, effects)
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{where}: its deciding contrasts hold no values over two folds or more, the same for all; run the "
            "experiment anew"
        ) from None
    floors = effects * [not c["sign_only"] for c in deciding]
    return Design(values, ratios.pop(), routes, effects, floors)


# ---- finished runs -----------------------------------------------------------------------------------------------


def read_results(run: Path) -> dict:
    """results.json of a run, by its folder or its name. Raises InputError."""
    folder = run if run.is_dir() or not (RUNS / run).is_dir() else RUNS / run
    path = folder / MARK_OF_COMPLETION
    text = read_regular_file(path, MOST_BYTES, "give the folder of a complete run of an experiment")
    try:
        results = json.loads(text)
        return {key: results[key] for key in ("experiment", "dataset", "examples", "verdict", "contrasts")}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is no experiment's; give the folder of a complete run of one") from None


def report(config: Config) -> None:
    """Print a line for each run, and draw the curves. Raises InputError."""
    if not config.runs:
        raise InputError("RUN: give the folder of a complete run, or --check and the name of an experiment")
    if config.draws < 100:
        raise InputError(f"--draws {config.draws}: give at least 100")
    rows, curves = [], {}
    for run in config.runs:
        results = read_results(run)
        design = design_of(results["contrasts"], str(run))
        examples = sum(results["examples"].values())
        key = (results["experiment"], results["dataset"])
        if key in curves:  # the same question once more
            key = (results["experiment"], f"{results['dataset']} ({run.name})")
        curves[key] = power_curve(*design.rule, CURVE, draws=config.draws, floors=design.floors)[:, SUPPORTED]
        powers = power_curve(*design.rule, STRENGTHS, draws=config.draws, floors=design.floors)[:, SUPPORTED]
        wrong = false_support(*design.rule, draws=config.draws, floors=design.floors)
        needed = size_needed(*design.rule, examples, POWER, config.draws, floors=design.floors)
        rows.append((*key, results["verdict"], powers, wrong, examples, needed))
    print(table(rows))
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, curves)
    write_atomically(config.figure, lambda path: figure.savefig(path, dpi=100, format="png"))
    print(f"\nThe curves: {config.figure}")


def table(rows: Sequence[tuple]) -> str:
    """One line per run: power at multiples of the effect of interest, false support, and the size for a power of .8."""
    names = [f"{experiment} on {dataset}" for experiment, dataset, *_ in rows]
    width = max(map(len, names))
    head = "".join(f"{f'x {strength:g}':>7}" for strength in STRENGTHS)
    lines = [f"{'probability of `supported` at':{width}}{head}  false support  examples  needed  verdict"]
    for name, (_, _, verdict, powers, wrong, examples, needed) in zip(names, rows, strict=True):
        cells = "".join(f"{power:7.2f}" for power in powers)
        size = "-" if needed is None else f"{needed}"
        lines.append(f"{name:{width}}{cells}  {wrong:13.3f}  {examples:8}  {size:>6}  {verdict}")
    lines += [
        "",
        f"x 1: the smallest effect of interest. needed: examples for a power of {POWER:g} there, same folds.",
    ]
    return "\n".join(lines)


def draw(figure: Figure, curves: Mapping[tuple[str, str], np.ndarray]) -> None:
    """A panel for each experiment, a curve for each dataset."""
    experiments = list(dict.fromkeys(experiment for experiment, _ in curves))
    figure.set_size_inches(4.2 * min(3, len(experiments)), 3.4 * -(-len(experiments) // 3))
    axes = figure.subplots(-(-len(experiments) // 3), min(3, len(experiments)), squeeze=False).ravel()
    for axis, experiment in zip(axes, experiments, strict=False):
        for (own, dataset), curve in curves.items():
            if own == experiment:
                axis.plot(CURVE, curve, label=dataset)
        axis.axhline(POWER, color="0.7", linewidth=0.8, linestyle="--")
        axis.set(title=experiment, xlabel="true effect / effect of interest", ylim=(0, 1.02), xlim=(0, CURVE[-1]))
        axis.legend(frameon=False)
    for axis in axes[len(experiments) :]:
        axis.set_axis_off()
    axes[0].set_ylabel('probability of "supported"')


# ---- planted effects ---------------------------------------------------------------------------------------------


def check(experiment: Experiment, options: Options) -> None:
    """Train the experiment on planted effects; print how often it is supported, beside the simulation."""
    if options.plant is None:
        raise InputError("--plant: --check needs a planted effect; give interaction, imbalance, dropout or calibration")
    if not 2 <= options.replicates <= 1000:
        raise InputError(f"--replicates {options.replicates}: give 2 to 1000")
    check_options(options)
    device = pick_device(options.device)
    verdicts, designs = [], []
    for number in range(options.replicates):
        verdict, design = planted_outcome(experiment, replace(options, plant_seed=number), device)
        verdicts.append(verdict)
        designs.append(design)
        estimates = " ".join(f"{value:+.4f}" for value in design.values.mean(1))
        print(f"planting {number}: {verdict:14} deciding contrasts {estimates}", flush=True)
    found = planted_summary(verdicts, designs)
    print(said(found))
    if options.keep is not None:
        keep(options, experiment, found)


def keep(options: Options, experiment: Experiment, found: Mapping[str, float]) -> None:
    """Add a line to the file of --keep, in place of one of the same experiment and flags."""
    flags = [f"--dataset {options.dataset}" if options.data is None else Path(options.data).name]
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name.startswith("plant") and one.name != "plant_seed" and value != getattr(Options, one.name):
            flags.append(f"--{one.name.replace('_', '-')} {value}")
    row = {"experiment": experiment.name, "flags": " ".join(flags)} | {key: str(x) for key, x in found.items()}
    rows = []
    if options.keep.exists():
        text = read_regular_file(options.keep, MOST_BYTES, "give another file to --keep").decode("utf-8", "replace")
        rows = [one for one in csv.DictReader(io.StringIO(text)) if one.keys() == row.keys()]
        if not rows:
            raise InputError(f"{options.keep}: holds no table of plantings; give another file to --keep")
    rows = [one for one in rows if (one["experiment"], one["flags"]) != (row["experiment"], row["flags"])] + [row]
    text = io.StringIO()
    table = csv.DictWriter(text, row, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(options.keep, text.getvalue())


def planted_outcome(experiment: Experiment, options: Options, device: torch.device) -> tuple[str, Design]:
    """Verdict and deciding contrasts on one planting. Raises InputError as the experiment does."""
    data = load_study(experiment, options, str(device))
    with tempfile.TemporaryDirectory() as place:
        outcome = experiment.measure(data, Run(options, Path(place), device))
    return outcome.verdict, design_of(
        [asdict(contrast) for contrast in outcome.contrasts], f"--check {experiment.name}"
    )


def planted_summary(verdicts: Sequence[str], designs: Sequence[Design]) -> dict[str, float]:
    """Share of supported verdicts with its 95 % interval, beside what the spread over folds lets expect.

    The true effects are taken to be the mean estimates over all plantings; the simulation is averaged over them.
    """
    count = sum(verdict == "supported" for verdict in verdicts)
    found = binomtest(count, len(verdicts)).proportion_ci()
    true = np.mean([design.values.mean(1) for design in designs], axis=0)  # (C,)
    at = np.mean(
        [simulate(*one.rule, np.stack([true, 0 * true]), floors=one.floors)[:, SUPPORTED] for one in designs], axis=0
    )
    names = ("replicates", "supported", "low", "high", "simulated", "none")
    return dict(zip(names, (len(verdicts), count, found.low, found.high, float(at[0]), float(at[1])), strict=True))


def said(found: Mapping[str, float]) -> str:
    """`planted_summary` in words."""
    agrees = found["low"] <= found["simulated"] <= found["high"]
    return (
        f"supported in {found['supported']} of {found['replicates']} plantings: "
        f"{found['supported'] / found['replicates']:.2f} [{found['low']:.2f}, {found['high']:.2f}]; simulated at the "
        f"mean estimates {found['simulated']:.2f}, at no effect {found['none']:.3f}\n"
        f"the simulation lies {'inside' if agrees else 'outside'} the interval"
    )


def experiment_named(name: str) -> Experiment:
    """The experiment of that module. Raises InputError."""
    here = Path(__file__).parent
    for file, module in ((here / f"{name}.py", name), (here / name / "measure.py", f"{name}.measure")):
        if name.isidentifier() and file.is_file():
            found = getattr(importlib.import_module(f"experiments.{module}"), "EXPERIMENT", None)
            if isinstance(found, Experiment) and name not in OF_A_RUN:
                return found
    raise InputError(f"--check {name}: is no experiment that trains on a data set; give one, such as rank_ablation")


def run(arguments: list[str]) -> int:
    """`python -m experiments.power RUN ...` or `--check EXPERIMENT FLAGS`; returns the exit code."""
    if "--check" not in arguments:
        return run_command(report, Config, arguments)
    place = arguments.index("--check")
    try:
        experiment = experiment_named("".join(arguments[place + 1 : place + 2]))
    except InputError as error:
        current_processes().stop(error)
    own = [("replicates", int, 10), ("keep", Path | None, None)]
    options = make_dataclass("Options", own, bases=(options_of(experiment),), frozen=True)
    return run_command(lambda config: check(experiment, config), options, arguments[:place] + arguments[place + 2 :])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
