"""What does a trained run lose when its inputs are corrupted, missing, or attacked?

    python -m experiments.robustness runs/demo
    python -m experiments.robustness runs/demo --groups input features latents missing --pixels 8

Every row of the run (jWAE-LMF, its baselines, lower rank, no prior), late fusion (the mean of the one-modality rows)
and, beside experiments.baselines, the MKL-SVM see the same corrupted examples. Scores are accuracy (of several labels,
the share that is right), or -MAE in standard deviations of the target, of each example; nothing is scaled across
methods. Of each curve over severity:

- area: trapezoid rule over severity, from the clean point on, divided by the range: a mean score;
- drop: clean minus the score at the largest severity;
- effective robustness: mean over severities of (score - clean) minus the same of late fusion (Liang et al. 2021).

Beside them stands what epochs are selected by: AUROC, or -log loss of more classes or labels. Contrasts are on the
task's two primary outcomes (mmfusion.metrics.outcomes): AUROC and log loss, or MAE and correlation.

Worst cases are certified from below and attacked from above (mmfusion/robustness/worst_case.py
defines sizes rho).

The claim is tested as: in every group of conditions that was measured, jWAE-LMF loses less of either primary outcome
than late fusion. All must hold. Where late fusion is not above a constant prediction by the smallest effect of
interest, by the first of them, it has nothing to lose: cannot tell. The other contrasts (rank 1, without the prior,
concatenation) do not decide, and a row that scores less has less to lose. Differences are means over the conditions of
a group; draws are averaged.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

from experiments.experiment import Experiment, Outcome, begun, contrasts_on_test, record
from experiments.robustness.corruption_curves import CorruptionResult, curves_csv, group_summary, measure_corrupted
from experiments.robustness.corruption_grid import LATE_FUSION, Condition, Group, Predictor, check_flags, conditions
from experiments.robustness.figure import draw
from experiments.robustness.pixel_attack import PixelAttack, attack_pixels
from experiments.robustness.worst_cases import ATTACKED, WorstCases, measure_worst_cases, worst_table
from mmfusion.cli import pick_device, run_command
from mmfusion.data.folds import constant_predictions
from mmfusion.errors import InputError
from mmfusion.files import write_safetensors, write_text
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS, example_outcome
from mmfusion.metrics.tasks import SELECTION
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.robustness.worst_case import SIZES
from mmfusion.runs.folder import RunFolder
from mmfusion.runs.load import TrainedRun, load_run
from mmfusion.training.grid import per_example


@dataclass(frozen=True)
class Options:
    """Measure what a trained run loses when its inputs are corrupted, missing, or attacked."""

    run: tyro.conf.Positional[Path]
    """folder of a run of main_hateful_memes.py, mmfusion.train or experiments.baselines, such as runs/demo"""
    groups: tuple[Group, ...] = ("features", "latents", "missing")
    """input encodes every test example anew for each corruption and severity, or pools its corrupted steps"""
    draws: int = 3
    """times that every random corruption is drawn"""
    attack_seeds: int = 2
    """seeds, the first ones, whose members are attacked; certificates on latents are for all"""
    pixels: int = 0
    """memes whose pixels are attacked through the image encoder; pictures before and after are kept"""
    device: str = "auto"
    """where inputs are encoded, as they were in training: cpu, cuda, ...; everything else is on the CPU"""
    name: str | None = None
    """results are kept in runs/NAME; default: robustness-RUN, with a number if that is taken"""
    resume: bool = False
    """measure again in the folder of that name where a kill left it"""


def default_name(options: Options) -> str:
    """The name of its folder where none is given."""
    return f"robustness-{options.run.resolve().name}"


def main(options: Options) -> None:
    """Load, measure, and leave table, figure, curves, masks and results in the run's folder. Raises InputError."""
    check_options(options)
    device = pick_device(options.device)
    run_folder = RunFolder.claim(options, default_name(options))
    run = load_run(options.run, str(device))
    if options.pixels and (run.memes is None or "image" in run.memes.given):
        raise InputError(f"--pixels {options.pixels}: {options.run} has no pictures; leave the flag out")
    wanted = conditions(run, options.groups, options.draws)
    start = time.perf_counter()
    # beside main_hateful_memes.py there is no kernel machine to compare with
    predictor = Predictor(run, str(device), kernel_machine="dataset" in run.settings)
    if not run_folder.is_complete:
        predictor.prepare(wanted)  # may find a picture gone: before anything is written
    description = {"experiment": EXPERIMENT.name, "models": run.identity, **run.data.description}
    if not run_folder.begin(description, device):
        return
    outcome, kept = measure(predictor, options, wanted)
    for name, text in kept.texts.items():
        write_text(run_folder.path / name, text)
    if kept.masks:
        write_safetensors(run_folder.path / "masks.safetensors", kept.masks)
    for attack in kept.pixels:
        attack.save(run_folder.path / "pixels")
    record(
        EXPERIMENT,
        run.data,
        outcome,
        run_folder,
        seeds=len(run.seeds),
        recipe={"run": run.settings},
        seconds=time.perf_counter() - start,
        device=device,
    )
    print(
        f"and curves.csv{', masks.safetensors' if kept.masks else ''}{', pixels/' if kept.pixels else ''} beside them"
    )


def check_options(options: Options) -> None:
    """Raise InputError for flags out of range."""
    check_flags(options.groups, options.draws)
    for name, least in (("attack_seeds", 0), ("pixels", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {least}")


@dataclass
class KeptTensors:
    """What is written beside table, figure and results."""

    texts: dict[str, str]
    masks: dict[str, torch.Tensor]
    pixels: list[PixelAttack]


def measure(predictor: Predictor, options: Options, wanted: Sequence[Condition]) -> tuple[Outcome, KeptTensors]:
    """All curves, worst cases and contrasts of a run."""
    run = predictor.run
    result = measure_corrupted(predictor, wanted)
    worst = measure_worst_cases(run, options.attack_seeds)
    pixels = attack_pixels(run, options.pixels, predictor.device) if options.pixels else []
    named, effects = differences(run, result)
    contrasts = contrasts_on_test(run.data, named, effects) if named else []
    verdict = "cannot tell"
    notes = [
        f"sizes rho are relative to the standard deviations in training; features: first {worst.seeds} seed(s); on "
        f"{min(ATTACKED, len(run.data.test_rows))} of the {len(run.data.test_rows)} test examples",
        "a row that scores less has less to lose: compare losses beside the clean scores",
    ]
    if "dataset" in run.settings and "missing" in options.groups:
        notes.append("rows of several modalities were trained with modality dropout, those of one without")
    if LATE_FUSION not in result.clean:
        notes.append("no late fusion: the run has not every modality alone; no verdict")
    elif (lead := lead_over_constant(run, predictor.clean(LATE_FUSION))) < EFFECTS[PRIMARY[run.task][0]]:
        notes.append(f"late fusion is {lead:+.3f} from a constant prediction: it has nothing to lose; no verdict")
    elif named:
        verdict = verdict_of(contrasts)
    masks = {
        f"{c.where}/{c.level:g}/{c.draw}/{name}": torch.from_numpy(mask).to(torch.uint8)
        for c in wanted
        if c.group == "missing"
        for name, mask in predictor.masks(c).items()
    }
    outcome = Outcome(
        table(run, result, worst, pixels),
        contrasts,
        verdict,
        answer(run, result, worst),
        numbers(result, worst, pixels),
        lambda figure: draw(figure, run, result, worst),
        (15.0, 8.4),
        notes,
    )
    return outcome, KeptTensors({"curves.csv": curves_csv(result)}, masks, pixels)


OVER_LATE_FUSION = "loses less than late fusion: "


def lead_over_constant(run: TrainedRun, predictions: np.ndarray) -> float:
    """First primary outcome of these clean predictions (S, n[, O]) less that of the training shares (or mean)."""
    of = partial(example_outcome, outcome=PRIMARY[run.task][0])
    ours, constant = (per_example(run.data, x, "test", of) for x in (predictions, constant_predictions(run.data)))
    return float(ours.mean() - constant.mean())


def differences(run: TrainedRun, result: CorruptionResult) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts (S, n): how much less the main row loses than another, by outcome and group; effects of interest."""
    others = {LATE_FUSION: OVER_LATE_FUSION}
    candidates = ("jWAE-LMF, rank 1", run.prior_free_row, "concatenation + MLP")
    others |= {row: f"loses less than {row}: " for row in candidates if row in result.clean}
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}
    for outcome, groups in result.changes.items():
        for row, text in others.items():
            for group, change in groups.items():
                if row in change:
                    name = f"{text}{group}, {WORDS[outcome]}"
                    claim = f"{run.main_row} loses less {WORDS[outcome]} than {row}, mean over the group's conditions"
                    named[name] = Difference(change[run.main_row] - change[row], claim, row == LATE_FUSION)
                    effects[name] = EFFECTS[outcome]
    return named, effects


# ---- text --------------------------------------------------------------------------------------------------------


def table(run: TrainedRun, result: CorruptionResult, worst: WorstCases, pixels: Sequence[PixelAttack]) -> str:
    """Corruption by group, worst cases by modality, checks, pixel attacks."""
    width = max(map(len, result.clean))
    groups = list(next(iter(result.changes.values())))
    lines = [
        f"score: {run.data.score_name}, mean +- std over seeds; per group of conditions (mean over its curves): area,",
        "drop at the largest severity, effective robustness (change against that of late fusion)",
        f"{'':{width}}  {'clean':>15}"
        + "".join(f"  {group + ': area':>15} {'drop':>7} {'effective':>9}" for group in groups),
    ]
    for row, clean in result.clean.items():
        cells = f"  {mean_std(clean.mean(1)):>15}"
        for group in groups:
            summary = group_summary(result, group, row)
            if summary is None:
                cells += f"  {'-':>15} {'-':>7} {'-':>9}"
                continue
            effective = f"{summary['effective'].mean():+.3f}" if "effective" in summary else "-"
            cells += f"  {mean_std(summary['area']):>15} {summary['drop'].mean():7.3f} {effective:>9}"
        lines.append(f"{row:{width}}{cells}")
    if run.task != "regression":  # whose selection score is the score above
        lines += ["", *selection_table(run, result, width)]
    lines += ["", *worst_table(worst, width)]
    if worst.checks:
        lines += ["", "checks of the attack on features (Carlini et al. 2019) and of PGD on latents"]
        lines += [f"  {'ok ' if check.holds else 'NOT'}  {check.text}" for check in worst.checks]
    if pixels:
        lines += ["", "attack on pixels through the image encoder, rounded to 8 bits as saved (pixels/)"]
        lines += [f"  {attack.line}" for attack in pixels]
        flipped = sum(attack.flipped for attack in pixels)
        lines.append(f"  {flipped} of {len(pixels)} change their sign")
    return "\n".join(lines)


def selection_table(run: TrainedRun, result: CorruptionResult, width: int) -> list[str]:
    """What epochs were selected by, clean and under every group of conditions: it sees what the class alone hides."""
    lines = [
        f"{SELECTION[run.task]} of all test examples, mean +- std over seeds; per group the mean over its conditions",
        f"{'':{width}}" + "".join(f"  {name:>17}" for name in result.selection),
    ]
    for row in result.selection["clean"]:
        cells = [mean_std(rows[row]) if row in rows else "-" for rows in result.selection.values()]
        lines.append(f"{row:{width}}" + "".join(f"  {cell:>17}" for cell in cells))
    return lines


def answer(run: TrainedRun, result: CorruptionResult, worst: WorstCases) -> str:
    """The main row in one sentence."""
    parts = []
    for group in next(iter(result.changes.values())):
        summary = group_summary(result, group, run.main_row)
        effective = f", effective {summary['effective'].mean():+.3f}" if "effective" in summary else ""
        parts.append(f"{group}: drop {summary['drop'].mean():.3f}{effective}")
    text = f"{run.main_row}, clean {result.clean[run.main_row].mean():.3f}. " + "; ".join(parts)
    keys = [key for key in worst.certified if key[0] == run.main_row and key[2] == "l2"]
    middle = len(SIZES) // 2
    for _, name, norm in keys:
        certified, attacked = (x[run.main_row, name, norm][middle].mean() for x in (worst.certified, worst.attacked))
        clean = worst.clean[run.main_row][: worst.seeds].mean()
        text += (
            f"; worst case of {name} at rho {SIZES[middle]:g} ({norm}), first {worst.seeds} seed(s), "
            f"clean {clean:.3f}: between {certified:.3f} and {attacked:.3f}"
        )
    return text + "."


def numbers(result: CorruptionResult, worst: WorstCases, pixels: Sequence[PixelAttack]) -> dict[str, object]:
    """Everything measured, JSON-able."""

    def flat(of: Mapping[tuple, np.ndarray]) -> dict[str, list]:
        return {" | ".join(key): values.tolist() for key, values in of.items()}

    return {
        "clean": {row: x.mean(1).tolist() for row, x in result.clean.items()},
        "curves": {
            f"{group} | {curve} | {row}": {
                "levels": c.levels.tolist(),
                "mean": c.scores.mean((1, 2)).tolist(),
                "std over seeds": c.scores.mean(2).std(1, ddof=min(1, c.scores.shape[1] - 1)).tolist(),
                "std over draws": c.scores.mean(1).std(1, ddof=min(1, c.scores.shape[2] - 1)).tolist(),
                "area": c.area.tolist(),
                "drop": c.drop.tolist(),
            }
            for (group, curve), rows in result.curves.items()
            for row, c in rows.items()
        },
        "selection score": {
            group: {row: values.tolist() for row, values in rows.items()} for group, rows in result.selection.items()
        },
        "sizes": list(SIZES),
        "latent, exact": flat(worst.latent),
        "two latents, certified": flat(worst.joint),
        "features, certified": flat(worst.certified),
        "features, attacked": flat(worst.attacked),
        "checks": {check.text: check.holds for check in worst.checks},
        "pixels": [attack.line for attack in pixels],
    }


EXPERIMENT = Experiment(
    "robustness",
    "Under corruption and with missing modalities jWAE-LMF loses less than late fusion (no numbered claim).",
    "What does the run lose when its inputs are corrupted, missing or attacked, beside its baselines?",
    measure,
)


def run(arguments: list[str]) -> int:
    """`python -m experiments.robustness RUN FLAGS`."""
    return run_command(main, Options, arguments, begun(Options, default_name))
