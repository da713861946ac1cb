"""Does a trained run know what it does not know: calibration, selective prediction, conformal sets, disagreement.

    python -m experiments.baselines --dataset mustard --data sarcasm_data.json --hold-out-dev --name sarcasm
    python -m experiments.uncertainty runs/sarcasm

For one member (mean and spread over seeds) and the ensemble (mean of the members' probabilities), of the run's main row
and of its row without the prior (or, where the run has that one, without any term of the jWAE), on clean test examples
and under every corruption. All that is fitted is fitted on the dev part of an example's own fold, and never on
corrupted examples: one temperature (of the ensemble on its mean probability's log-odds, of more than two classes on
the logarithms), the conformal quantile (of several labels, one each), and for a regression the residual variance.
Conventions: a classifier's confidence is the probability of the class it says, its risk the error rate and its ECE that
of this confidence (of two classes, of the second's probability); of several labels all are means over labels; a
regression's uncertainty is the members' standard deviation, its risk the absolute error, and its predictive
distribution a Gaussian about the members' mean whose variance is the members' plus the residual variance. Regressions
are measured in units of the target's standard deviation, mean over outputs.

The rule, written before any result: four differences decide, those of the ensembles' NLL (as they are, no temperature)
and AURC, on clean examples and in the mean over the corrupted conditions, each without the prior less with it; all must
hold (one route), each with a smallest effect of interest of .01 (nats; AURC). A run that cut its data anew
(--cross-validate) gives one number for each fold, and an interval over folds; a run of one test part pairs examples and
seeds: since an ensemble is no mean of its members, seed s stands in it by what leaving it out changes (the jackknife),
and an example stands in the AURC likewise (`calibration.aurc_parts`). The AURC of several folds is that of each fold by
itself. Without a prior-free row or corrupted conditions there is no verdict: too few data.

Beside it, of Gaussian latents: the exact variance of the logit, Var[y], mean over members, as an order of the
ensemble's errors, against the expected probability and against what the members disagree in; and its root over |E[y]|,
since the variance of a product grows with the product. That decides nothing.

Controls: labels planted with `--plant calibration --plant-strength 1` are coins, and all confidence is overconfidence:
a prior that calibrates lowers the NLL there most, and no order of errors is better than another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.stats import norm
from tqdm import tqdm

from experiments.experiment import Experiment, Outcome, contrasts_on_test, record
from experiments.robustness.corruption_grid import LEVELS, Condition, Group, Predictor, check_flags, conditions
from experiments.uncertainty.figure import draw
from experiments.uncertainty.orders import order_differences, orders_of
from experiments.uncertainty.predictors import (
    ENSEMBLE,
    PARTS,
    RAW,
    SCALED,
    ClassPredictor,
    MethodPredictors,
    held_out_targets,
)
from experiments.uncertainty.report import UncertaintyResult, averaged, numbers_of, table
from mmfusion.cli import pick_device
from mmfusion.data.folds import FoldedDataset
from mmfusion.errors import InputError
from mmfusion.metrics import calibration
from mmfusion.metrics.calibration import detection
from mmfusion.metrics.scores import example_losses
from mmfusion.metrics.statistics import grouped
from mmfusion.metrics.verdicts import Contrast, Difference, verdict_of
from mmfusion.runs.folder import RunFolder
from mmfusion.runs.load import TrainedRun, load_run

NLL_EFFECT = 0.01  # nats
AURC_EFFECT = 0.01
DETECTION_RESAMPLES = 500
ALPHAS = (0.05,)  # beside --alpha
CLAIM = "The jWAE improves uncertainty: lower NLL and lower AURC of the ensemble than without it (or its prior)."
DECIDING = ("NLL, clean", "NLL, corrupted", "AURC, clean", "AURC, corrupted")


# ---- measurements ------------------------------------------------------------------------------------------------


def measure(run: TrainedRun, predictor: Predictor, chosen: Sequence[Condition], alpha: float) -> Outcome:
    """Judge both rows clean and under the chosen conditions; contrasts are paired over seeds and test examples."""
    data = run.data
    rows = [row for row in (run.main_row, run.prior_free_row) if row is not None]
    targets = held_out_targets(data, sorted({alpha, *ALPHAS}, reverse=True))
    dev = {row: targets.in_units(predictor.clean(row, "dev")) for row in rows}
    result = UncertaintyResult(
        targets,
        {name: MethodPredictors(x, targets) for name, x in dev.items()},
        {row: targets.in_units(predictor.clean(row)) for row in rows},
    )
    for name, row in result.rows.items():
        result.clean[name] = row.measures(result.outputs[name], floor=True)
        result.parts[name] = {f"{part}, clean": row.by_seed(result.outputs[name], of) for part, of in PARTS.items()}
        result.orders[name] = orders_of(row, result.outputs[name], predictor.variances(name))
    measure_corrupted(result, predictor, chosen, _groups(data, "test"))
    contrasts = contrasts_on_test(data, *differences(result))
    complete = sum(c.decides for c in contrasts) == len(DECIDING)
    verdict = verdict_of(contrasts) if complete else "cannot tell"

    def draw_all(figure: Figure) -> None:
        figure.suptitle(f"{data.name}: uncertainty of {len(run.seeds)} members and their ensemble, test")
        draw(figure, result)

    notes = notes_of(run, result, dev[run.main_row])
    return Outcome(
        table(result), contrasts, verdict, answer(contrasts, result), numbers_of(result), draw_all, (13.5, 10.4), notes
    )


def measure_corrupted(
    result: UncertaintyResult,
    predictor: Predictor,
    chosen: Sequence[Condition],
    groups: Sequence[str] | None,
) -> None:
    """Fill in what concerns corruptions; the draws of one condition are averaged."""
    draws: dict[tuple[str, str, float], list[Condition]] = {}
    for condition in chosen:
        draws.setdefault((condition.group, condition.curve, condition.level), []).append(condition)
    for key, same in tqdm(draws.items(), desc="corruptions", unit="condition", mininterval=0.5):
        result.corrupted[key], result.detected[key] = {}, {}
        for name, row in result.rows.items():
            drawn = [result.targets.in_units(predictor.corrupted(name, condition)) for condition in same]
            result.corrupted[key][name] = averaged([row.measures(x) for x in drawn])
            for part, of in PARTS.items():
                here = np.mean([row.by_seed(x, of) for x in drawn], axis=0) / len(draws)
                result.parts[name][f"{part}, corrupted"] = result.parts[name].get(f"{part}, corrupted", 0) + here
            clean = row.ensemble.disagreement(result.outputs[name])
            spoiled = [row.ensemble.disagreement(x) for x in drawn]
            # of a missing modality, the examples that lack it: the others are the clean examples themselves
            affected = np.stack([predictor.affected(condition) for condition in same])
            result.detected[key][name] = {
                score: detection(
                    values, np.stack([x[score] for x in spoiled]), groups, DETECTION_RESAMPLES, affected=affected
                )
                for score, values in clean.items()
            }


def differences(result: UncertaintyResult) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts by name, each (S, n) with its claim, and their smallest effects of interest."""
    named, first = {}, result.rows[result.main]
    if len(result.rows) > 1:
        ours, other = result.parts.values()
        named |= {
            name: Difference(
                other[name] - ours[name], f"the ensemble has a lower {name.split(',')[0]} with the prior, {where}"
            )
            for name in DECIDING
            if name in ours
            for where in [name.split(", ")[1]]
        }
        alone = [result.rows[name].member_losses(result.outputs[name]) for name in result.rows]
        named["member's NLL, clean"] = Difference(
            alone[1] - alone[0], "a member has a lower NLL with the prior, clean", False
        )
        if SCALED in first.ensemble.scalings:
            scaled = [
                row.by_seed(result.outputs[name], lambda p, x: p.losses(x, SCALED)) for name, row in result.rows.items()
            ]
            claim = "the ensemble has a lower NLL with the prior, clean, after temperature scaling"
            named["NLL after scaling, clean"] = Difference(scaled[1] - scaled[0], claim, False)
    named |= order_differences(result.orders[result.main])
    outputs = result.outputs[result.main]
    gain = first.member_losses(outputs) - first.ensemble.losses(outputs)
    named["ensemble over member, NLL"] = Difference(gain, "the ensemble has a lower NLL than its members, clean", False)
    return named, {name: AURC_EFFECT if name.startswith("AURC") else NLL_EFFECT for name in named}


# ---- words -------------------------------------------------------------------------------------------------------


def answer(contrasts: Sequence[Contrast], result: UncertaintyResult) -> str:
    """The deciding estimates in one sentence."""
    own = result.clean[result.main][ENSEMBLE][RAW]
    text = f"Ensemble of {result.main}: NLL {own['NLL']:.3f}, AURC {own['AURC']:.3f}"
    gains = [f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts if c.decides]
    return f"{text}. " + (
        f"Lower with the prior by: {'; '.join(gains)}." if gains else "There is no row without prior."
    )


def notes_of(run: TrainedRun, result: UncertaintyResult, dev: np.ndarray) -> list[str]:
    """What the reader of the numbers must know."""
    notes = []
    if run.prior_free_row is None:
        notes.append("the run has no row without the prior: the claim is not judged")
    elif "without" in run.prior_free_row:
        notes.append(f"\"{run.prior_free_row}\" has none of the jWAE's terms: its effect is not the prior's alone")
    if not result.corrupted:
        notes.append("no corruption was looked at, so the claim is not judged")
    if "hold_out_dev" not in run.settings:
        notes.append("the epoch was selected on dev, which is also what temperature and conformal sets are fitted on")
    notes += shift_note(run.data, result, dev)
    for name, row in result.rows.items():
        if isinstance(row.ensemble, ClassPredictor):
            fitted = row.ensemble.temperature
            if ends := [f"{t:g}" for t in fitted if t in calibration.TEMPERATURES]:
                folds = f"{len(ends)} of {len(fitted)} folds" if len(fitted) > 1 else "the one fold"
                notes.append(f"temperature of the ensemble {name} is at its bound in {folds}: {', '.join(ends)}")
            raw, scaled = (result.clean[name][ENSEMBLE][scaling]["NLL"] for scaling in (RAW, SCALED))
            if scaled - raw > NLL_EFFECT:
                smallest = min(len(fold.dev) for fold in run.data.folds)
                notes.append(
                    f"the temperature fitted on dev ({smallest} examples) raises the ensemble's NLL on test, {name}: "
                    f"{raw:.3f} to {scaled:.3f}"
                )
    other = result.clean[list(result.rows)[-1]][ENSEMBLE][RAW]["AURC"]
    if run.prior_free_row is not None and other < AURC_EFFECT:
        notes.append(f"AURC without the prior is {other:.4f}: no prior could lower it by the effect of interest")
    first = [next(iter(by_row[result.main].values())) for by_row in result.detected.values()]
    if less := sum(d.high < 0.5 for d in first):
        notes.append(
            f"in {less} of {len(first)} conditions the members disagree less on corrupted examples than on clean"
        )
    if result.targets.task in ("binary", "multilabel"):
        notes.append("a temperature changes no conformal set: it keeps the order of the margins within a fold")
    elif result.targets.task == "multiclass":
        notes.append("conformal sets are of the raw probabilities: of several classes a temperature would change them")
    return notes


def shift_note(data: FoldedDataset, result: UncertaintyResult, dev: np.ndarray) -> list[str]:
    """A note where the ensemble's loss on dev and on test differ by more than their 95 % intervals allow."""
    parts, sentences = [], []
    for part, outputs in (("dev", dev), ("test", result.outputs[result.main])):
        target = getattr(result.targets, part)
        predictor = result.rows[result.main].ensemble
        mean = predictor.combine(outputs) if isinstance(predictor, ClassPredictor) else outputs.mean(0)
        losses = example_losses(mean[None], target, result.targets.task)
        units = grouped(losses, _groups(data, part))[0]
        parts.append((units.mean(), units.std(ddof=1) / len(units) ** 0.5))
        sentences.append(f"{part} {parts[-1][0]:.3f} +- {norm.ppf(0.975) * parts[-1][1]:.3f}")
    (dev_mean, dev_error), (test_mean, test_error) = parts
    if abs(test_mean - dev_mean) <= norm.ppf(0.975) * np.hypot(dev_error, test_error):
        return []
    loss = f"{data.loss_name} of the ensemble of {result.main}, 95 %"
    return [
        f"dev is not like test ({loss}: {', '.join(sentences)}): what is fitted on dev need not hold, nor the coverage"
    ]


def _groups(data: FoldedDataset, part: str) -> list[str] | None:
    """What each example of a part, fold after fold, must be resampled with."""
    names = data.pool.metadata.get("group")
    return None if names is None else [names[row] for fold in data.folds for row in getattr(fold, part)]


# ---- command line ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Does a trained run know what it does not know?"""

    run: tyro.conf.Positional[Path]
    """folder of a finished run, such as runs/demo, trained with --hold-out-dev"""
    draws: int = 3
    """random corruptions per kind and level, averaged"""
    alpha: float = 0.1
    """share of targets that conformal sets may miss; .05 is reported as well"""
    groups: tuple[Group, ...] = ("features", "latents", "missing")
    """what is corrupted; input encodes every picture and text anew"""
    name: str | None = None
    """what is found is kept in runs/NAME; default: uncertainty-RUN, with a number if that is taken"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""
    resume: bool = False
    """measure again in the folder of that name where a kill left it"""


def default_name(options: Options) -> str:
    """The name of its folder where none is given."""
    return f"uncertainty-{options.run.resolve().name}"


def execute(options: Options) -> None:
    """Load the run, measure, print, and leave table.txt, figure.png and results.json in a folder of its own."""
    check_flags(options.groups, options.draws)
    if not 0 < options.alpha < 1:
        raise InputError(f"--alpha {options.alpha}: give a share between 0 and 1, such as 0.1")
    device = pick_device(options.device)
    run_folder = RunFolder.claim(options, default_name(options))
    trained = load_run(options.run, str(device))
    refuse(trained)
    data, predictor = trained.data, Predictor(trained, str(device))
    start = perf_counter()
    chosen = [c for c in conditions(trained, options.groups, options.draws) if c.level in LEVELS]
    if "input" in options.groups and not run_folder.is_complete:
        predictor.prepare(chosen)  # may find a picture gone: before anything is written
    description = {"experiment": EXPERIMENT.name, "models": trained.identity, **data.description}
    if not run_folder.begin(description, device):
        return
    for note in data.notes:
        print(f"note: {note}")
    outcome = measure(trained, predictor, chosen, options.alpha)
    record(
        EXPERIMENT,
        data,
        outcome,
        run_folder,
        seeds=len(trained.seeds),
        recipe={},
        seconds=perf_counter() - start,
        device=device,
    )


def refuse(run: TrainedRun) -> None:
    """Raise InputError where nothing can be calibrated: no dev part of its own, or no ensemble."""
    if run.trained_on_dev:
        raise InputError(
            f"{run.folder}: was trained on its dev part, so nothing is left to calibrate on; "
            "train it with `python -m experiments.baselines ... --hold-out-dev`"
        )
    for fold in run.data.folds:
        if set(fold.dev.tolist()) & set(fold.test.tolist()):
            raise InputError(
                f"{run.folder}: dev is what is tested on ({run.data.name} has no other labelled split), so nothing is "
                "left to calibrate on; give a run on a dataset with a test split"
            )
    if len(run.seeds) < 2:
        raise InputError(f"{run.folder}: has one seed, and an ensemble needs two; train it with more")


EXPERIMENT = Experiment(
    "uncertainty",
    CLAIM,
    "Are the ensemble's probabilities right, does it know its errors, and is the prior to thank?",
    measure,
)
