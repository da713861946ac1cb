"""jWAE-LMF beside its baselines on one dataset: scores, parameters, time.

    python -m experiments.baselines --dataset cmu_mosi --data cmu_mosi_utterances.npz

Every method gets the same features and sees the same training examples. The neural ones share recipe, encoders and
seeds, and all but "LMF without jWAE" are trained with the jWAE terms, so that the head is what differs. The claim needs
the main row to do better than every other on AUROC, or on log loss (of a regression MAE or correlation). Nothing is
selected upon, so the dev part is trained on too (unless it is what is tested on, or --hold-out-dev is given). The
neural methods are kept in the run's folder, where `experiments.robustness`, `experiments.uncertainty` and
`mmfusion.explain` read them (rank 1 among them for their sake; it is no baseline, and no contrast is made with it). The
MKL-SVM is deterministic: it has no spread over seeds. The recipe was chosen for jWAE-LMF at rank 4, the MKL-SVM's
C = 1 and p = 2 are defaults.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.experiment import Experiment, Options, Outcome, Run, contrasts_on_test, main
from lmf_module import LowRankMultimodalFusion
from mmfusion.data.folds import FoldedDataset, constant_predictions, only, targets, with_dev_in_training
from mmfusion.metrics.calibration import ensemble_logits
from mmfusion.metrics.classes import ensemble_log_probabilities
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS, example_outcome
from mmfusion.metrics.pooled import pooled_traits
from mmfusion.metrics.scores import Score, binary_scores
from mmfusion.metrics.tasks import probabilities, task_scores
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.models.decomposition import relevance_scores, variance_shares
from mmfusion.models.exact import exact_layer, latents_of
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.models.mkl_svm import MultipleKernelSVM
from mmfusion.runs.outputs import save_ensembles
from mmfusion.training.grid import JWAE, PLAIN, Grid, Setting, by_fold, per_example

RANK = 4
MAIN = f"jWAE-LMF, rank {RANK}"
LOWEST = "jWAE-LMF, rank 1"
SCORES = ("accuracy", "weighted_f1", "auroc", "log_loss")
TENSOR = "tensor product (TFN)"
TENSOR_ENTRIES = 50_000  # of the outer product, for each example: four modalities of 33 would be a million
DIGITS = 3


@dataclass(frozen=True)
class TrainOptions(Options):
    """Flags of `train` alone."""

    hold_out_dev: bool = False
    """keep the dev part out of training: experiments.uncertainty calibrates on it"""


class MethodResult:
    """What one method says of the test examples, and what it cost."""

    def __init__(
        self,
        predictions: np.ndarray,
        parameters: int | None,
        seconds: float,
        ensemble: FusionEnsemble | None = None,
    ) -> None:
        self.predictions = predictions  # (S, n) or (S, n, O), fold after fold; S = 1 where nothing is drawn
        self.parameters = parameters  # that a prediction uses: decoders left out; None for a kernel machine
        self.seconds = seconds  # of training, per model
        self.ensemble = ensemble  # all seeds and folds; None for what is no neural model


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train every method; contrasts are jWAE-LMF against each, paired over seeds and test examples."""
    if not run.options.hold_out_dev:
        data = with_dev_in_training(data)
    methods = neural(data, run) | kernel_machines(data)
    save_ensembles(run.folder, {label: m.ensemble for label, m in methods.items() if m.ensemble is not None})
    nothing = MethodResult(constant_predictions(data), 0, 0.0)
    methods["training mean" if data.task == "regression" else "training majority"] = nothing
    scores = {label: fold_scores(data, m.predictions, m.ensemble is not None) for label, m in methods.items()}
    ensembles = {
        label: fold_scores(data, ensemble_outputs(data, method.predictions), True)
        for label, method in methods.items()
        if len(method.predictions) > 1
    }
    named, effects = differences(data, methods)
    contrasts = contrasts_on_test(data, named, effects)
    verdict = verdict_of(contrasts)
    answer = answer_sentence(data, scores)
    numbers = {
        label: {
            "parameters": methods[label].parameters,
            "seconds": methods[label].seconds,
            **_numbers(by),
            **({"ensemble": _numbers(ensembles[label])} if label in ensembles else {}),
        }
        for label, by in scores.items()
    }
    return Outcome(
        "\n".join(
            [table(data, methods, scores, ensembles), *column_lines(data, methods), *relevance_lines(data, methods)]
        ),
        contrasts,
        verdict,
        answer,
        numbers,
        lambda figure: draw(figure, data, scores),
        (9, 4.5),
        notes_of(data, methods),
    )


def differences(
    data: FoldedDataset, methods: dict[str, "MethodResult"]
) -> tuple[dict[str, Difference], dict[str, float]]:
    """The main row against each, on both outcomes, (S, n); one row of a deterministic method stands for all seeds.

    The margins of a kernel machine are no logits: on the log loss it is not compared.
    """
    named, effects = {}, {}
    for outcome in PRIMARY[data.task]:
        of = partial(example_outcome, outcome=outcome)
        own = per_example(data, methods[MAIN].predictions, "test", of)
        for label, method in methods.items():
            margins = method.ensemble is None and method.parameters is None
            if label in (MAIN, LOWEST) or (outcome == "log_loss" and margins):
                continue
            name = f"over {label}, {WORDS[outcome]}"
            gain = own - per_example(data, method.predictions, "test", of)
            named[name] = Difference(gain, f"{MAIN} does better than {label}", route=outcome)
            effects[name] = EFFECTS[outcome]
    return named, effects


def notes_of(data: FoldedDataset, methods: dict[str, MethodResult]) -> list[str]:
    """What the reader of the scores must know."""
    grown = any(bool(torch.isin(fold.dev, fold.train).any()) for fold in data.folds)
    notes = ["trained on train and dev together, the other experiments on train alone"] if grown else []
    notes.append("the recipe was chosen for jWAE-LMF at rank 4; C and the norm of the MKL-SVM are defaults")
    if len(data.pool.features) > 1 and TENSOR not in methods:
        notes.append(f"{TENSOR} is left out: its outer product has over {TENSOR_ENTRIES} entries for each example")
    return notes


# ---- methods -----------------------------------------------------------------------------------------------------


def neural(data: FoldedDataset, run: Run) -> dict[str, MethodResult]:
    """All neural methods; settings of one shape are trained in one call."""
    lmf = [Setting(MAIN, RANK, JWAE), Setting("LMF without jWAE", RANK, PLAIN), Setting(LOWEST, 1, JWAE)]
    methods = train(data, run, lmf)
    methods |= train(data, run, [Setting("concatenation + MLP", 1, JWAE)], fusion="concatenation")
    if len(data.pool.features) > 1:
        if (run.options.recipe(data.task).latent_dim + 1) ** len(data.pool.features) <= TENSOR_ENTRIES:
            methods |= train(data, run, [Setting(TENSOR, 1, JWAE)], fusion="tensor")
        for name in data.pool.features:
            methods |= train(only(data, [name]), run, [Setting(f"{name} alone", 1, JWAE)])
    return methods


def train(data: FoldedDataset, run: Run, settings: Sequence[Setting], **shape: object) -> dict[str, MethodResult]:
    """Settings of one shape -> methods, by label."""
    start = time.perf_counter()
    grid: Grid = run.grid(data, settings, settings[0].label, **shape)
    seconds = (time.perf_counter() - start) / len(grid.models)
    predictions = grid.predictions()
    return {
        setting.label: MethodResult(predictions[p], parameters(grid.model(p, 0)), seconds, grid.ensemble(p))
        for p, setting in enumerate(settings)
    }


def parameters(model: FusionModel) -> int:
    """Number of trained parameters that a prediction uses."""
    count = sum(p.numel() for name, p in model.named_parameters() if "decoder" not in name)
    layer = model.fusion
    if isinstance(layer, LowRankMultimodalFusion):  # masked ranks use none
        per_rank = sum(p.numel() for p in layer.parameters()) - layer.bias.numel()
        count -= per_rank * (layer.rank - layer.active_rank) // layer.rank
    return count


def fit_kernel_machine(data: FoldedDataset, rows: Tensor, uniform: bool = False) -> MultipleKernelSVM:
    """MKL-SVM on these rows of the pool, for any task: of several classes, one against the rest."""
    machine = MultipleKernelSVM("regression" if data.task == "regression" else "binary", uniform=uniform)
    target = data.pool.target[rows].numpy()
    if data.task == "multiclass":
        target = np.eye(data.output_dim, dtype=np.float32)[target.astype(int)]
    return machine.fit({name: x[rows].numpy() for name, x in data.pool.features.items()}, target)


def kernel_machines(data: FoldedDataset) -> dict[str, MethodResult]:
    """MKL-SVM with learned and with uniform weights, product kernels included."""
    results = {}
    for label, uniform in (("MKL-SVM, learned weights", False), ("MKL-SVM, uniform weights", True)):
        start = time.perf_counter()
        folds = []
        for fold in data.folds:
            machine = fit_kernel_machine(data, fold.train, uniform)
            folds.append(machine.decision({k: x[fold.test].numpy() for k, x in data.pool.features.items()}))
        seconds = (time.perf_counter() - start) / len(data.folds)
        results[label] = MethodResult(np.concatenate(folds)[None].astype(np.float32), None, seconds)
    return results


# ---- scores ------------------------------------------------------------------------------------------------------


FoldScores = dict[str, tuple[np.ndarray, list[float] | None]]


def ensemble_outputs(data: FoldedDataset, predictions: np.ndarray) -> np.ndarray:
    """(1, n[, O]): logits of the members' mean probabilities, or their mean value."""
    if data.task == "regression":
        return predictions.mean(0, keepdims=True)
    together = ensemble_log_probabilities if data.task == "multiclass" else ensemble_logits
    return together(predictions)[None].astype(np.float32)


def fold_scores(data: FoldedDataset, predictions: np.ndarray, are_logits: bool) -> FoldScores:
    """{score: ((S, F), [low, high] over examples where there is one fold)} of test predictions (S, n[, O]).

    Scores of ranks and signs do not mind that a kernel machine's margin is no logit; a log loss would.
    """
    target = targets(data)
    folds, start = [], 0
    for fold in data.folds:
        part = slice(start, start + len(fold.test))
        start = part.stop
        found = predictions[:, part]
        if data.task == "binary":
            chances = 1 / (1 + np.exp(-found.astype(np.float64)))
            folds.append(binary_scores(chances, target[part], names=SCORES if are_logits else SCORES[:-1]))
        else:
            if data.task != "regression":
                found = probabilities(torch.from_numpy(found), data.task).numpy()
            folds.append(task_scores(found, target[part], data.task, label_range=data.label_range))
    return {name: _stack([fold[name] for fold in folds]) for name in folds[0]}


def _numbers(scores: FoldScores) -> dict[str, dict]:
    return {name: {"per seed and fold": values.tolist(), "interval": ends} for name, (values, ends) in scores.items()}


def _stack(folds: list[Score]) -> tuple[np.ndarray, list[float] | None]:
    interval = [folds[0].low, folds[0].high] if len(folds) == 1 else None
    return np.array([fold.members for fold in folds]).T, interval


def column_lines(data: FoldedDataset, methods: dict[str, MethodResult]) -> list[str]:
    """Of a regression with several targets, cross-validated: the main row over each other, pooled over the targets."""
    if data.task != "regression" or data.pool.target.ndim < 2 or data.cut is None:
        return []
    target, scale = targets(data), data.target_scale.numpy()
    errors = {label: np.abs(method.predictions - target) / scale for label, method in methods.items()}  # (S, n, O)
    width = max(map(len, methods))
    lines = [
        "",
        f"MAE / std, less that of {MAIN}: mean over {target.shape[1]} targets (random effects) [95 %], their std",
    ]
    for label, error in errors.items():
        if label == MAIN:
            continue
        gain = np.moveaxis(error.mean(0) - errors[MAIN].mean(0), -1, 0)  # (O, n)
        one = pooled_traits(by_fold(data, gain), data.cut.ratio)
        lines.append(f"{label:{width}}  {one.estimate:+.3f} [{one.low:+.3f}, {one.high:+.3f}]  {one.tau:.3f}")
    return lines


@torch.no_grad()
def relevance_lines(data: FoldedDataset, methods: dict[str, MethodResult]) -> list[str]:
    """What each set of modalities says, on test, by the main row: share of variance, and relevance by InTense."""
    ensemble, names = methods[MAIN].ensemble, list(data.input_dims)
    if len(names) < 2 or (ensemble.shape["latent_dim"] + 1) ** len(names) > TENSOR_ENTRIES:
        return []
    found: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for k, member in enumerate(ensemble.members):
        rows = data.folds[k % len(data.folds)].test
        latents = latents_of(member, {name: x[rows] for name, x in data.pool.features.items()})
        layer = exact_layer(member)
        shares, relevance = variance_shares(layer, latents), relevance_scores(layer, latents)
        for subset, share in shares.items():
            found.setdefault(subset, []).append((share, relevance[subset]))
    lines = ["", f"{MAIN}: share of the prediction's variance, and relevance after InTense, mean +- std over members"]
    for subset, values in found.items():
        cells = "  ".join(mean_std(column, 2) for column in np.transpose(values))
        lines.append(f"{' x '.join(names[m] for m in subset):30}  {cells}")
    return lines


# ---- table and figure --------------------------------------------------------------------------------------------


def table(
    data: FoldedDataset,
    methods: dict[str, MethodResult],
    scores: dict[str, FoldScores],
    ensembles: dict[str, FoldScores],
) -> str:
    """One line per method: parameters, seconds per model, every score; below it what its members say together."""
    names = list(scores[MAIN])
    spread = "[95 % bootstrap interval over examples, each by itself]" if len(data.folds) == 1 else "(std over folds)"
    together = "  mean of its {} members"
    width = max(map(len, [*methods, together]))
    lines = [f"mean +- std over seeds {spread}; seconds of training per model"]
    lines.append(f"{'':{width}}  parameters  seconds" + "".join(f"  {name:^31}" for name in names))
    for label, method in methods.items():
        count = "-" if method.parameters is None else str(method.parameters)
        lines.append(f"{label:{width}}  {count:>10}  {method.seconds:7.2f}{cells(scores[label], names)}".rstrip())
        if label in ensembles:
            row = f"{together.format(len(method.predictions)):{width}}  {'':10}  {'':7}"
            lines.append(f"{row}{cells(ensembles[label], names)}".rstrip())
    return "\n".join(lines)


def cells(scores: FoldScores, names: Sequence[str]) -> str:
    """One cell for each score; "-" where a method has none."""
    return "".join(f"  {cell(*scores[name]) if name in scores else '-':31}" for name in names)


def cell(values: np.ndarray, interval: list[float] | None) -> str:
    """values (S, F) as mean +- std over seeds of the mean over folds."""
    seeds = values.mean(1)
    if interval is not None:
        return mean_std(seeds, DIGITS, interval)
    return f"{mean_std(seeds, DIGITS)} ({values.mean(0).std(ddof=1):.{DIGITS}f})"


def answer_sentence(data: FoldedDataset, scores: dict[str, FoldScores]) -> str:
    """The main row's scores, and which method has the best mean of the primary one."""
    primary = primary_score(data, scores)
    best = (min if primary == "mae" else max)(scores, key=lambda label: scores[label][primary][0].mean())
    own = ", ".join(f"{name} {values.mean():.3f}" for name, (values, _) in scores[MAIN].items())
    return f"{MAIN}: {own}. Best mean {primary}: {best}, {scores[best][primary][0].mean():.3f}."


def primary_score(data: FoldedDataset, scores: dict[str, FoldScores]) -> str:
    """The score that the verdict rests on; the first of the table where that is in none of its columns."""
    primary = PRIMARY[data.task][0]
    return primary if primary in scores[MAIN] else next(iter(scores[MAIN]))


def draw(figure: Figure, data: FoldedDataset, scores: dict[str, FoldScores]) -> None:
    """One row per method: the primary score of every seed as dots, their mean, the interval over examples."""
    axis = figure.subplots()
    name = primary_score(data, scores)
    for row, (label, by) in enumerate(reversed(scores.items())):
        values, interval = by[name]
        seeds = values.mean(1)
        color = "C0" if label == MAIN else "C7"
        if interval is not None:
            axis.plot(interval, [row, row], color=color, linewidth=6, alpha=0.25, solid_capstyle="butt")
        axis.plot(seeds, [row] * len(seeds), "o", color=color, alpha=0.4, markersize=4)
        axis.plot(seeds.mean(), row, "|", color="black", markersize=16)
    axis.set_yticks(range(len(scores)), list(reversed(scores)))
    band = "; band: 95 % interval over examples" if len(data.folds) == 1 else "; mean over folds"
    axis.set(title=f"{data.name}, test (dots: seeds; line: mean{band})", xlabel=name)


EXPERIMENT = Experiment(
    "baselines",
    "jWAE-LMF scores higher than each of its baselines (not one of the study's numbered claims).",
    "How does jWAE-LMF score beside its baselines on the same features?",
    measure,
    options=TrainOptions,
)

if __name__ == "__main__":
    main(EXPERIMENT)
