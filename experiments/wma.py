"""Does aligning tokens make fusion more robust? A transformer with and without a Wasserstein term between its tokens.

    python -m experiments.wma --dataset mustard --data sarcasm_data.json --text-encoder MODEL_FOLDER

The source (Zhi et al., TMLR 2025) claims +.9 points clean, +2.5 under noise, +2.1 with missing modalities, mean over
its data sets. Rows: the transformer alone, with the term ("WMA"), with the MMD between one token of each modality in
its place, with both, and with the term under random plans (right masses, no knowledge of the tokens); the first two
with modality dropout; LMF over transported pairs of tokens; and two models of the mean tokens, jWAE-LMF and
concatenation.

Learning rate and weight are chosen on the first fold's dev part by successive halving over learning rates: two seeds,
all weights at once, a third of the epochs, then the better half for all of them; the transformer alone by its own best
rate, the one with the term by its own best rate and weight. The other rows take the rate of the row that they are a
control of. Every member keeps its best epoch on dev (patience 5; linear decay after a warm-up).

Conditions on the test parts: clean; Gaussian noise on the tokens of 4 q standard deviations of each channel, and tokens
replaced by others' with probability q, q = .25, .5, .75; a modality missing with probability .25, .5, .75, each alone
and either (with equal chance). An additive score is linear in that probability, so these are exact, without a mask
being drawn. Verdicts: the term's gain over the transformer alone, by the common rule, at the size that the source
claims, for each of its three claims. Random plans, dropout and MMD are controls and decide nothing. Whether these
settings can show a gain at all is seen on planted sequences: two modalities that say the same, one of them clearly,
where modality dropout must gain with missing modalities; what the term gains there stands beside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import SCORE_EFFECT, Experiment, Options, Outcome, Run, contrasts_on_test, main
from experiments.planted_tokens import PLANTED, planted_copies
from experiments.token_rows import (
    Change,
    Row,
    Trained,
    channel_deviations,
    foreign_tokens,
    gaussian_noise,
    hidden,
    predictions_on_dev,
    predictions_on_test,
    scores_on_test,
    train_rows,
)
from mmfusion.data.folds import FoldedDataset, target_scale
from mmfusion.dataset import take
from mmfusion.errors import InputError, check_numbers
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.tasks import selection_score
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.models.token_ensemble import TokenConfig
from mmfusion.runs.tokens import measure_tokens
from mmfusion.sequences import Sequences
from mmfusion.training.fit import Method
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

RATES = (1e-3, 3e-4, 1e-4)  # learning rates tried; the source's range is 1e-3 to 1e-5
WEIGHTS = (0.1, 0.2, 1.0, 5.0)  # of the term, the source's
LEVELS = (0.25, 0.5, 0.75)
NOISE = 4.0  # standard deviations at level 1
DROPOUT = 0.3
CLAIMED = {"clean": 0.009, "noise": 0.025, "missing": 0.021}
ALONE, ALIGNED = "transformer", "transformer + WMA"
RANDOM, MMD = "transformer + random plans", "transformer + MMD"
DROPPED, BOTH = "transformer + dropout", "transformer + dropout + WMA"
MMD_BOTH = "transformer + MMD + WMA"


@dataclass(frozen=True)
class WMAOptions(Options):
    """Flags of this experiment."""

    width: int = 64
    """of the transformer"""
    layers: int = 2
    """of the transformer"""
    heads: int = 8
    """of the transformer"""
    warm_up: float = 0.0
    """share of all steps over which the weight of an alignment rises from 0; the source names none"""
    tune: bool = True
    """choose learning rate and weight on dev; else 3e-4 and .1"""


@dataclass(frozen=True)
class Chosen:
    """What the tuning found."""

    rate_alone: float = 3e-4
    rate_aligned: float = 3e-4
    weight: float = 0.1


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Tune, train every row, score all under every condition; contrasts are paired over seeds and test examples."""
    check(data)
    options: WMAOptions = run.options
    check_numbers(options, {"warm_up": (0, 1)})
    chosen, tried = tune(data, run) if options.tune else (Chosen(), {})
    trained = train_rows(data, rows(data, options, chosen), run, "wma")
    scores = {label: condition_scores(data, ensemble) for label, ensemble in trained.items()}
    contrasts = contrasts_on_test(data, differences(scores), effects())
    planted = control(data, run, chosen)
    tokens = {label: of_tokens(data, ensemble) for label, ensemble in trained.items() if label.startswith(ALONE)}
    deciding = [c for c in contrasts if c.decides]
    answer = "; ".join(
        f"{c.name.split(':')[0]} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}] ({c.verdict}; claimed {c.effect:+.3f})"
        for c in deciding
    )
    numbers: dict[str, object] = {
        "chosen": asdict(chosen),
        "tried on dev": tried,
        "scores": {
            label: {kind: values.mean(1).tolist() for kind, values in of.items()} for label, of in scores.items()
        },
        "tokens": tokens,
        "planted": {label: {kind: values.tolist() for kind, values in of.items()} for label, of in planted.items()},
    }
    notes = [
        f"chosen on the dev part of the first fold: learning rate {chosen.rate_alone:g} alone, {chosen.rate_aligned:g} "
        f"with the term, weight {chosen.weight:g}"
    ]
    gains = {
        label: float((planted[label]["missing"] - planted[ALONE]["missing"]).mean()) for label in list(planted)[1:]
    }
    notes.append(
        f"positive control, planted copies ({PLANTED} trained on, same settings), gain with missing modalities: "
        + ", ".join(f"{label} {gain:+.3f}" for label, gain in gains.items())
    )
    verdict = verdict_of(contrasts)
    if gains[DROPPED] < SCORE_EFFECT:
        notes.append("in the control modality dropout gained nothing: these settings could not have shown a gain")
        verdict = "cannot tell"
    lost = scores[ALONE]["clean"].mean() - scores[ALONE]["noise"].mean()
    if lost < 0.01:
        notes.append(f"the noise costs the transformer {lost:.3f}: there is next to nothing for the term to mend")
    return Outcome(
        table(data, scores, tokens),
        contrasts,
        verdict,
        answer + ".",
        numbers,
        lambda figure: draw(figure, data, scores),
        (13.0, 4.8),
        notes,
    )


def check(data: FoldedDataset) -> None:
    """Raise InputError where there is nothing to align."""
    if not any(isinstance(x, Sequences) and x.shape[1] > 1 for x in data.pool.features.values()):
        raise InputError(f"{data.name}: has one vector a modality, and no tokens to align")


def control(data: FoldedDataset, run: Run, chosen: Chosen) -> dict[str, dict[str, np.ndarray]]:
    """{row: {"clean" | "noise" | "missing": (S,)}} scores on planted copies, at what was chosen on the data."""
    copies = planted_copies(data)
    labels = (ALONE, ALIGNED, RANDOM, DROPPED)
    stack = [one for one in rows(copies, run.options, chosen) if one.label in labels]
    scores = {label: condition_scores(copies, one) for label, one in train_rows(copies, stack, run, "planted").items()}
    return {label: {kind: scores[label][kind].mean(1) for kind in CLAIMED} for label in labels}


# ---- rows and tuning ---------------------------------------------------------------------------------------------


def row(
    data: FoldedDataset,
    options: WMAOptions,
    label: str,
    rate: float,
    weights: Mapping[str, float],
    *,
    dropout: float = 0.0,
    plan: str = "ipot",
    seeds: int | None = None,
    epochs: int | None = None,
) -> Row:
    """A transformer's row."""
    method = Method(label, tuple(data.input_dims), "wma", weights=weights, modality_dropout=dropout)
    tokens = TokenConfig(
        "wma",
        transformer_width=options.width,
        transformer_layers=options.layers,
        transformer_heads=options.heads,
    )
    training = TrainingConfig(
        seeds=seeds or options.seeds,
        epochs=epochs or options.epochs or 20,
        patience=5,
        learning_rate=rate,
        annealing="linear",
        weight_decay=0.01,
    )
    return Row(method, tokens, ObjectiveConfig(transport_method=plan, transport_warm_up=options.warm_up), training)


def tune(data: FoldedDataset, run: Run) -> tuple[Chosen, dict[str, dict[str, float]]]:
    """Learning rates and weight by dev scores of the first fold: {rate: {weight: mean over two seeds}} as well."""
    first = replace(data, folds=data.folds[:1])
    options: WMAOptions = run.options
    whole = options.epochs or 20
    tried: dict[str, dict[str, float]] = {}
    rates: Sequence[float] = RATES
    for stage, epochs in enumerate((max(1, whole // 3), whole)):
        if stage:
            rates = sorted(rates, key=lambda rate: -max(tried[f"{rate:g}"].values()))[: (len(rates) + 1) // 2]
        for rate in rates:
            stack = [
                row(first, options, f"{weight:g}", rate, {"transport": weight}, seeds=2, epochs=epochs)
                for weight in (0.0, *WEIGHTS)
            ]
            trained = train_rows(first, stack, run, f"tune {stage} {rate:g}")
            tried[f"{rate:g}"] = {label: float(np.mean(of)) for label, of in dev_scores(first, trained).items()}
    finals = [f"{rate:g}" for rate in rates]
    alone = max(finals, key=lambda rate: tried[rate]["0"])
    pairs = [(rate, weight) for rate in finals for weight in (f"{w:g}" for w in WEIGHTS)]
    aligned = max(pairs, key=lambda pair: tried[pair[0]][pair[1]])
    return Chosen(float(alone), float(aligned[0]), float(aligned[1])), tried


def dev_scores(data: FoldedDataset, trained: Trained) -> dict[str, list[float]]:
    """The selection score of each seed on dev of the one fold that there is."""
    rows_of_dev = data.folds[0].dev
    target = data.pool.target[rows_of_dev].numpy()
    scale = target_scale(data.pool.target[data.folds[0].train]) if data.task == "regression" else None
    score = selection_score(data.task, scale, False, None)
    return {
        label: [float(score(prediction, target)) for prediction in predictions_on_dev(data, ensemble)]
        for label, ensemble in trained.items()
    }


def rows(data: FoldedDataset, options: WMAOptions, chosen: Chosen) -> list[Row]:
    """All rows, the transformer alone first."""
    none, term = {"transport": 0.0}, {"transport": chosen.weight}
    mmd = {"transport": 0.0, "token_mmd": chosen.weight}
    alone, aligned = chosen.rate_alone, chosen.rate_aligned
    names = tuple(data.input_dims)
    recipe = options.recipe(data.task)
    plain = TrainingConfig(
        seeds=options.seeds,
        epochs=recipe.epochs,
        annealing="cosine",
        keep="last",
        weight_decay=recipe.weight_decay,
        modality_dropout=recipe.modality_dropout,
        feature_dropout=recipe.feature_dropout,
    )
    return [
        row(data, options, ALONE, alone, none),
        row(data, options, ALIGNED, aligned, term),
        row(data, options, RANDOM, aligned, term, plan="random"),
        row(data, options, MMD, aligned, mmd),
        row(data, options, MMD_BOTH, aligned, mmd | term),
        row(data, options, DROPPED, alone, none, dropout=DROPOUT),
        row(data, options, BOTH, aligned, term, dropout=DROPOUT),
        Row(Method("transport-LMF, aligned", names, "transport"), TokenConfig("transport"), training=plain),
        Row(Method("jWAE-LMF of mean tokens", names), training=plain),
        Row(Method("concatenation of mean tokens", names, "concatenation"), training=plain),
    ]


# ---- conditions --------------------------------------------------------------------------------------------------


def condition_scores(data: FoldedDataset, ensemble: object) -> dict[str, np.ndarray]:
    """{"clean" | "noise" | "missing" | single conditions: (S, n)} additive scores of the test examples."""
    found = {"clean": scored(data, ensemble)}
    deviations = channel_deviations(data)
    for level in LEVELS:
        found[f"input noise {level:g}"] = scored(data, ensemble, gaussian_noise(deviations, NOISE * level))
        found[f"foreign tokens {level:g}"] = scored(data, ensemble, foreign_tokens(level))
    without = {name: scored(data, ensemble, hidden(name)) for name in data.input_dims}
    for name, gone in without.items():
        found[f"without {name}"] = gone
    # linear in the probability of being missing, so the mean over the levels is that at their mean
    level = float(np.mean(LEVELS))
    either = np.mean(list(without.values()), axis=0)
    at_level = [(1 - level) * found["clean"] + level * gone for gone in (*without.values(), either)]
    found["missing"] = np.mean(at_level, axis=0)
    found["noise"] = np.mean(
        [values for name, values in found.items() if name.split()[0] in ("input", "foreign")], axis=0
    )
    return found


def scored(data: FoldedDataset, ensemble: object, change: Change | None = None) -> np.ndarray:
    """(S, n)."""
    return scores_on_test(data, predictions_on_test(data, ensemble, change))


def differences(scores: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Difference]:
    """The three claims, and for each the controls that decide nothing."""
    pairs = [(ALIGNED, ALONE, True), (ALIGNED, RANDOM, False), (DROPPED, ALONE, False), (BOTH, DROPPED, False)]
    return {
        f"{kind}: {one} over {other}": Difference(
            scores[one][kind] - scores[other][kind], f"{one} scores higher than {other} ({kind})", decides
        )
        for kind in CLAIMED
        for one, other, decides in pairs
    }


def effects() -> dict[str, float]:
    """The effect of interest of each contrast: what the source claims."""
    probe = {label: {kind: np.zeros((2, 2)) for kind in CLAIMED} for label in (ALONE, ALIGNED, RANDOM, DROPPED, BOTH)}
    return {name: CLAIMED[name.split(":")[0]] for name in differences(probe)}


def of_tokens(data: FoldedDataset, ensemble: object) -> dict[str, dict[str, list[float]]]:
    """What became of the tokens on the first fold's test part, by member: `mmfusion.runs.tokens.TokenReport`."""
    split = take(data.pool, data.folds[0].test)
    found = [measure_tokens(member, split, data.task) for member in ensemble.part(0, len(data.folds)).members]
    return {
        kind: {key: [getattr(one, kind)[key] for one in found] for key in getattr(found[0], kind)}
        for kind in ("variance", "distance", "effective")
    }


# ---- text and figure ---------------------------------------------------------------------------------------------


def table(data: FoldedDataset, scores: Mapping[str, Mapping[str, np.ndarray]], tokens: Mapping[str, dict]) -> str:
    """One line per row: mean +- std over seeds of each kind of condition, without each modality, and the tokens."""
    kinds = [*CLAIMED, *(f"without {name}" for name in data.input_dims)]
    width = max(map(len, scores))
    lines = [f"score: {data.score_name}", f"{'':{width}}" + "".join(f"  {kind:^16}" for kind in kinds)]
    for label, of in scores.items():
        cells = "".join(f"  {mean_std(of[kind].mean(1)):16}" for kind in kinds)
        lines.append(f"{label:{width}}{cells}".rstrip())
    lines += ["", "reliance on one modality: what is lost without it, largest less smallest"]
    for label in (ALONE, ALIGNED, DROPPED):
        of = scores[label]
        lost = np.array([(of["clean"] - of[f"without {name}"]).mean(1) for name in data.input_dims])
        lines.append(f"{label:{width}}  {mean_std(lost.max(0) - lost.min(0))}")
    lines += ["", "tokens of the last layer, first fold: relative variance of each modality; transport; tokens met"]
    for label, found in tokens.items():
        cells = [*found["variance"].values(), *found["distance"].values(), *found["effective"].values()]
        lines.append(f"{label:{width}}  " + "  ".join(mean_std(values) for values in cells))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, scores: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Score against the level of each noise, and clean, under noise and with missing modalities by row."""
    axes = figure.subplots(1, 3)
    shown = {ALONE: "#8a8a8a", ALIGNED: "#1f6fb4", RANDOM: "#d9741a", DROPPED: "#5a9e4b"}
    for axis, kind in zip(axes[:2], ("input noise", "foreign tokens"), strict=True):
        for label, color in shown.items():
            curves = [scores[label]["clean"], *(scores[label][f"{kind} {level:g}"] for level in LEVELS)]
            values = np.array([curve.mean(1) for curve in curves])  # (levels, S)
            axis.plot((0, *LEVELS), values.mean(1), "o-", color=color, label=label)
            spread = values.std(1, ddof=1)
            axis.fill_between((0, *LEVELS), values.mean(1) - spread, values.mean(1) + spread, color=color, alpha=0.15)
        axis.set(title=kind, xlabel="level", ylabel=f"test {data.score_name}")
    axes[0].legend(frameon=False, fontsize=8)
    labels = list(scores)
    for k, (kind, color) in enumerate(zip(CLAIMED, ("#1f6fb4", "#d9741a", "#5a9e4b"), strict=True)):
        means = [scores[label][kind].mean(1) for label in labels]
        place, spread = np.arange(len(labels)) + 0.2 * (k - 1), [m.std(ddof=1) for m in means]
        axes[2].errorbar([m.mean() for m in means], place, xerr=spread, fmt="o", color=color, label=kind)
    axes[2].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[2].invert_yaxis()
    axes[2].locator_params(axis="x", nbins=4)
    axes[2].legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes[2].set(title="by row (line: std over seeds)")
    figure.suptitle(f"{data.name}: does aligning tokens make fusion more robust?")


EXPERIMENT = Experiment(
    "wma",
    "Wasserstein modality alignment gains .9 points clean, 2.5 under noise, 2.1 with missing modalities (Zhi et al.).",
    "Does aligning tokens make fusion more robust?",
    measure,
    modalities=2,
    options=WMAOptions,
    tokens=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
