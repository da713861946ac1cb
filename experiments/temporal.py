"""Does it matter which step meets which? LMF over pairs of steps under five couplings, trained and tested under each.

    python -m experiments.temporal --dataset mmmo --data mmmo_sequences.npz

diagonal: step i with step i. banded: steps whose times are near. transport: steps whose latents are near, by optimal
transport. uniform: all with all, which is LMF of the means of the two sequences. shuffled: the diagonal, after the
steps of the second modality have been put in an order drawn for each example, in training and in test.

What a modality says alone depends on a coupling through its margins alone, and these are the same: only the part that
two modalities say together can feel time. Where that part has no share of the output's variance no coupling can help,
so its share stands in the table.

Verdict: in some coupling of diagonal, banded and transport (a route each) the AUROC, or minus the MAE of a regression,
exceeds that of the uniform one; and (a control that does not decide) the diagonal exceeds the shuffled one. Whether the
experiment could have found it at all is shown on planted sequences of the same size, trained by the same settings: y =
sign of the mean over steps of a_t b_t, which the means of the sequences say nothing of.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.experiment import Experiment, Options, Outcome, Run, contrasts_on_test, main
from experiments.planted_tokens import PLANTED, planted_steps
from experiments.token_rows import Row, Trained, predictions_on_test, scores_on_test, shuffled_study, train_rows
from mmfusion.data.folds import FoldedDataset, targets
from mmfusion.errors import InputError
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.tasks import probabilities, task_scores
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.models.token_ensemble import TokenConfig
from mmfusion.runs.tokens import part_shares
from mmfusion.sequences import Sequences
from mmfusion.training.fit import Method
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

RANK = 4
TIMED = ("diagonal", "banded", "transport")
COUPLINGS = (*TIMED, "uniform", "shuffled")
SHOWN = {"binary": ("accuracy", "auroc"), "multiclass": ("accuracy",), "multilabel": ("map",), "regression": ("mae",)}


@dataclass(frozen=True)
class TemporalOptions(Options):
    """Flags of this experiment."""

    align: float = 0.1
    """weight of the Wasserstein distance between the modalities' latents, in all couplings alike"""
    band: float = TokenConfig.band
    """standard deviation of the lag in the banded coupling, as a share of the whole duration"""


def rows(data: FoldedDataset, options: TemporalOptions, coupling: str) -> list[Row]:
    """The one row of a coupling."""
    recipe = options.recipe(data.task)
    plan = "diagonal" if coupling == "shuffled" else coupling
    training = TrainingConfig(
        seeds=options.seeds,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        annealing="cosine",
        keep="last",
        weight_decay=recipe.weight_decay,
        modality_dropout=0.0,
        feature_dropout=recipe.feature_dropout,
    )
    method = Method(coupling, tuple(data.input_dims), "transport", active_rank=RANK)
    tokens = TokenConfig("transport", plan=plan, band=options.band)
    return [Row(method, tokens, ObjectiveConfig(transport_weight=options.align, transport_warm_up=0.0), training)]


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train under every coupling; contrasts are paired over seeds and test examples."""
    check(data)
    second = list(data.input_dims)[1]
    found = {name: _trained(data, run, name, "temporal") for name in COUPLINGS}
    scores = {name: scores_on_test(data, one.predictions) for name, one in found.items()}
    named = {
        f"{name} over uniform": Difference(scores[name] - scores["uniform"], f"{name} pairs predict better", route=name)
        for name in TIMED
    }
    named["diagonal over shuffled"] = Difference(
        scores["diagonal"] - scores["shuffled"], f"the order of {second}'s steps matters", False
    )
    contrasts = contrasts_on_test(data, named)
    planted = planted_steps(data)
    control = {
        name: scores_on_test(planted, _trained(planted, run, name, "planted").predictions)
        for name in ("diagonal", "uniform")
    }
    gain = (control["diagonal"] - control["uniform"]).mean()
    verdict = verdict_of(contrasts)
    estimates = "; ".join(f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts)
    numbers = {
        name: {
            "scores": {score: values.tolist() for score, values in one.scores.items()},
            "share of the interaction": one.interaction,
        }
        for name, one in found.items()
    } | {"planted": {name: values.mean(1).tolist() for name, values in control.items()}}
    notes = [
        f"positive control, planted steps ({PLANTED} trained on, same settings): AUROC diagonal "
        f"{control['diagonal'].mean():.3f}, uniform {control['uniform'].mean():.3f}"
    ]
    if gain < 0.1:
        notes.append("the control gained less than .1: these settings could not have shown that time matters")
        verdict = "cannot tell"
    return Outcome(
        table(data, found),
        contrasts,
        verdict,
        f"{estimates}. Planted control: {gain:+.2f}.",
        numbers,
        lambda figure: draw(figure, data, found),
        (9.0, 4.4),
        notes,
    )


def check(data: FoldedDataset) -> None:
    """Raise InputError where there are no sequences of two modalities, or no steps to speak of."""
    lengths = {name: x.lengths for name, x in data.pool.features.items() if isinstance(x, Sequences)}
    if len(lengths) != 2 or len(data.input_dims) != 2:
        raise InputError(f"{data.name}: pairs of steps are of two modalities, it has {', '.join(data.input_dims)}")
    short = [name for name, counts in lengths.items() if counts.double().mean() < 2]
    if short:
        raise InputError(f"{data.name}: {short[0]} has one step an example: no coupling differs from another")


@dataclass(frozen=True)
class _Found:
    """Of one coupling."""

    predictions: np.ndarray
    scores: dict[str, np.ndarray]
    """{score: (S,)}"""
    interaction: list[float]
    """(members,) share of the output's variance that the modalities have together"""


def _trained(data: FoldedDataset, run: Run, coupling: str, title: str) -> _Found:
    study = shuffled_study(data, list(data.input_dims)[1]) if coupling == "shuffled" else data
    trained: Trained = train_rows(study, rows(data, run.options, coupling), run, f"{title} {coupling}")
    ensemble = trained[coupling]
    predictions = predictions_on_test(study, ensemble)
    shares = []
    for k, member in enumerate(ensemble.members):
        test = study.folds[k % len(study.folds)].test
        features = {name: x[test] for name, x in study.pool.features.items()}
        shares.append(part_shares(member, features, study.task)[" x ".join(member.modalities)])
    return _Found(predictions, _scores(data, predictions), shares)


def _scores(data: FoldedDataset, predictions: np.ndarray) -> dict[str, np.ndarray]:
    """{score: (S,)} on all test examples."""
    values = torch.from_numpy(predictions)
    if data.task != "regression":
        values = probabilities(values if data.has_columns else values[..., None], data.task)
    found = task_scores(values.numpy(), targets(data), data.task, SHOWN[data.task], data.label_range, resamples=0)
    return {name: np.array(found[name].members) for name in SHOWN[data.task]}


def table(data: FoldedDataset, found: Mapping[str, _Found]) -> str:
    """One line per coupling: scores, mean +- std over seeds, and the interaction's share of the variance."""
    names = SHOWN[data.task]
    lines = [f"{'coupling':12}" + "".join(f"  {name:^16}" for name in names) + "  share of the interaction"]
    for coupling, one in found.items():
        cells = "".join(f"  {mean_std(one.scores[name]):16}" for name in names)
        lines.append(f"{coupling:12}{cells}  {mean_std(one.interaction)}")
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, found: Mapping[str, _Found]) -> None:
    """Scores by coupling, a dot per seed; and the interaction's share."""
    left, right = figure.subplots(1, 2)
    name = SHOWN[data.task][0]
    for k, (coupling, one) in enumerate(found.items()):
        color = "#8a8a8a" if coupling in ("uniform", "shuffled") else "#1f6fb4"
        left.plot(np.full(len(one.scores[name]), k), one.scores[name], "o", color=color, alpha=0.5)
        left.plot(k, one.scores[name].mean(), "_", color="black", markersize=22)
        right.plot(np.full(len(one.interaction), k), one.interaction, "o", color=color, alpha=0.5)
        right.plot(k, np.mean(one.interaction), "_", color="black", markersize=22)
    for axis in (left, right):
        axis.set_xticks(range(len(found)), list(found), rotation=20)
    left.set(title=f"{name} on the test examples", ylabel=name)
    right.set(title="what the modalities say together", ylabel="share of the output's variance")
    right.axhline(0, color="black", linewidth=0.6)
    figure.suptitle(f"{data.name}: which step meets which (dots: seeds; line: mean)")


EXPERIMENT = Experiment(
    "temporal",
    "Fusing steps that belong together in time predicts better than fusing the sequences' means (announced, no claim).",
    "Does it matter which step of one modality meets which of the other?",
    measure,
    modalities=2,
    options=TemporalOptions,
    tokens=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
