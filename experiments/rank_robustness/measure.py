"""Is a low rank more robust, and surer? Certified and attacked scores over the rank at matched accuracy and fit.

    python -m experiments.rank_robustness --dataset cmu_mosi --data mosi.npz --cross-validate 5 --repeats 2

Ranks 1 to 32 with jWAE, 4 and 8 without the prior, without weight decay and under spectral normalisation, 8 under a
strong weight decay and at smaller step sizes. On test examples and standardised features one modality moves at a time,
by an l_2 change of size rho = .05 (.05 sqrt(d): as long as Gaussian noise of .05 standard deviations), mean over
modalities; scores as in mmfusion/robustness/worst_case.py.

Two things pass for robustness and are none of it. *Accuracy*: only examples that both settings of a member get right
count, as a share of these (of a regression, or several labels: what each loses of its own clean score). *Fit*: under
Adam a higher rank moves faster, and is later in the same course; rank 8 is taken where its training loss is that of the
low rank, interpolated over its step sizes, member by member (`matching_weights`).

Claim: ranks 2 and 4, their mean, against rank 8, all at matched training loss, have a higher certified and a higher
attacked score, a smaller interaction |B|_2 and a smaller gradient relative to the margin (the spectral part;
differences of logarithms), and a lower loss after temperature scaling on dev (regression: squared error). One route:
all five must hold. Supported: all five. Not supported: any is shown to be absent, too small or reversed; a rank that is
robust only by its accuracy or its slower training ends there.

Controls decide nothing: the same as trained; weight decay; the prior. Positive control: a strong weight decay and
spectral normalisation at rank 8 regularise by construction; where neither is seen to withstand attack, nothing can be.
A second question inside: does a
low rank resist noise along the trailing principal components of the training features, a vector's high frequencies,
better than rank 8 does, and more so than noise of the same length along the leading ones?
"""

from dataclasses import replace

import numpy as np

from experiments.experiment import SCORE_EFFECT, Experiment, Outcome, Run, contrasts_on_test, verdict_of_rank
from experiments.rank_robustness.members import NOISE, RHO, SHARE, Measures, components_by_fold, measure_members
from experiments.rank_robustness.report import columns_of, draw, table
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.training.grid import JWAE, Setting, by_fold, fold_sizes

RANKS = (1, 2, 4, 8, 32)
LOW, HIGH = (2, 4), 8
NO_PRIOR = ("reconstruction", "alignment")
STEPS = (0.25, 0.5)  # times the recipe's learning rate: rank 8 at less of its training
STRONG_DECAY = 30.0
SPECTRAL_NORM = 1.0
RATIO_EFFECT = 0.05  # smallest ratio of gradients, or interactions, of interest: 5 %
ROUTE = "robust and sure"


def settings_of() -> list[Setting]:
    """All rows that share the recipe's step size and free weights."""
    rows = [Setting(f"jWAE, rank {rank}", rank, JWAE) for rank in RANKS]
    rows += [Setting(f"no prior, rank {rank}", rank, NO_PRIOR) for rank in (4, HIGH)]
    rows += [Setting(f"decay 0, rank {rank}", rank, JWAE, 0.0) for rank in (4, HIGH)]
    return [*rows, Setting(f"decay {STRONG_DECAY:g}, rank {HIGH}", HIGH, JWAE, STRONG_DECAY)]


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train all rows, measure every member, and judge."""
    grid, result, recipe = run.grid(data, settings_of(), "rank robustness"), Measures(), run.options.recipe(data.task)
    components = components_by_fold(data)
    measure_members(grid, components, result)
    spectral = [Setting(f"spectral norm, rank {rank}", rank, JWAE) for rank in (4, HIGH)]
    bound = run.grid(data, spectral, "rank robustness spectral", spectral_norm=SPECTRAL_NORM)
    measure_members(bound, components, result)
    for step in STEPS:
        slower = replace(recipe, learning_rate=step * recipe.learning_rate)
        rows = [Setting(f"step {step:g}, rank {HIGH}", HIGH, JWAE)]
        measure_members(run.grid(data, rows, f"rank robustness step {step:g}", slower), components, result)
    named, effects = differences(data, result)
    contrasts = contrasts_on_test(data, named, effects)
    verdict, suffix = verdict_of_rank(grid, f"jWAE, rank {HIGH}", verdict_of(contrasts))
    shown = "; ".join(f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts if c.decides)
    columns = columns_of(data, result)
    return Outcome(
        table(data, columns),
        contrasts,
        verdict,
        f"Ranks 2 and 4 against {HIGH}: {shown}.{suffix}",
        {label: {name: values.tolist() for name, values in cells.items()} for label, cells in columns.items()},
        lambda figure: draw(figure, data, columns, RANKS),
        (14.0, 4.4),
        [
            f"rho = {RHO:g}; certificates are lower bounds, attacks upper bounds of the worst-case score",
            f"the training loss of rank {LOW[0]}, of rank {LOW[1]} lies within what the step sizes of rank {HIGH} "
            f"reach in {' and '.join(f'{reached(result, rank):.0%}' for rank in LOW)} of the members; beyond, the "
            "nearest stands in",
            f"noise: of length {NOISE:g} sqrt(d), along the first and the last {SHARE:.0%} of the components that vary",
        ],
    )


# ---- matching ----------------------------------------------------------------------------------------------------


def high_rows() -> list[str]:
    """The high rank at every step size."""
    return [f"jWAE, rank {HIGH}", *(f"step {step:g}, rank {HIGH}" for step in STEPS)]


def matching_weights(wanted: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Weights of linear interpolation at the wanted training loss; at the nearest one where it is out of reach.

    Args:
        wanted: (S, F); available: (S, F, K).

    Returns:
        (S, F, K), at least 0, of sum 1.
    """
    weights = np.empty_like(available)
    for place in np.ndindex(wanted.shape):
        order = np.argsort(available[place])
        corners = np.eye(len(order))[order]  # row j: which of the K has the j-th smallest loss
        weights[place] = [np.interp(wanted[place], available[place][order], corner) for corner in corners.T]
    return weights


def weights_of(result: Measures, rank: int) -> np.ndarray:
    """(S, F, K): of each step size of the high rank, such that its training loss is that of a low one."""
    available = np.stack([result.training[label] for label in high_rows()], -1)
    return matching_weights(result.training[f"jWAE, rank {rank}"], available)


def reached(result: Measures, rank: int) -> float:
    """Share of members whose training loss lies between the smallest and the largest of the high rank's."""
    wanted = result.training[f"jWAE, rank {rank}"]
    available = np.stack([result.training[label] for label in high_rows()])
    return float(((wanted >= available.min(0)) & (wanted <= available.max(0))).mean())


def at_equal_score(
    data: FoldedDataset, result: Measures, worst: dict[str, np.ndarray], one: str, other: str
) -> np.ndarray:
    """(S, n): how much more robust one setting is than the other, at matched clean score.

    Its mean over a fold is the difference among that fold's examples that both get right; 0 where there are none.
    """
    if data.task not in ("binary", "multiclass"):
        return (worst[one] - result.clean[one]) - (worst[other] - result.clean[other])
    both = result.clean[one] * result.clean[other]
    share = np.repeat(by_fold(data, both), fold_sizes(data), axis=-1)
    return both * (worst[one] - worst[other]) / np.where(share > 0, share, 1.0)


# ---- contrasts ---------------------------------------------------------------------------------------------------


def differences(data: FoldedDataset, result: Measures) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts as the claim orients them, with the effect of interest of each."""
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}
    sizes, high = fold_sizes(data), f"jWAE, rank {HIGH}"
    weights = {rank: weights_of(result, rank) for rank in LOW}

    def add(name: str, values: np.ndarray, claim: str, effect: float, decides: bool = False) -> None:
        named[name], effects[name] = Difference(values, claim, decides, ROUTE if decides else ""), effect

    def matched(rank: int, values: list[np.ndarray]) -> np.ndarray:
        of = weights[rank] if values[0].shape[-1] == len(sizes) else np.repeat(weights[rank], sizes, axis=1)
        return (of * np.stack(values, -1)).sum(-1)

    def compare(name: str, of, claim: str, effect: float) -> None:
        """Of what of(one label, other label) -> values says: ranks 2 and 4 against the high rank, matched and not."""
        lows = {rank: f"jWAE, rank {rank}" for rank in LOW}
        equal = np.mean([matched(r, [of(low, label) for label in high_rows()]) for r, low in lows.items()], axis=0)
        text = f"ranks 2 and 4 {claim} rank {HIGH}"
        add(f"{name}, matched training loss", equal, f"{text}, at one training loss", effect, True)
        add(f"{name}, as trained", np.mean([of(low, high) for low in lows.values()], axis=0), text, effect)

    worst = {"certified": result.certified, "attacked": result.attacked}
    for name, values in worst.items():
        compare(
            f"{name}: low over {HIGH}",
            lambda one, other, values=values: at_equal_score(data, result, values, one, other),
            f"have a higher {name} score than",
            SCORE_EFFECT,
        )
    for name, ratios in {"|B|_2 / margin": result.interaction, "gradient / margin": result.gradient}.items():
        logs = {label: np.log(np.maximum(x, 1e-12)) for label, x in ratios.items()}
        compare(
            f"{name}: low below {HIGH}",
            lambda one, other, logs=logs: logs[other] - logs[one],
            f"have a smaller {name} (difference of logarithms) than",
            RATIO_EFFECT,
        )
    loss = "squared_error" if data.task == "regression" else "log_loss"
    how = WORDS[loss] if data.task == "regression" else "temperature-scaled log loss"
    compare(
        f"{how}: low below {HIGH}",
        lambda one, other: result.loss[other] - result.loss[one],
        f"have a lower {how} than",
        EFFECTS[loss],
    )

    def attacked(one: str, other: str, claim: str) -> None:
        values = at_equal_score(data, result, result.attacked, one, other)
        add(f"attacked: {one} over {other}", values, claim, SCORE_EFFECT)

    attacked(f"spectral norm, rank {HIGH}", high, "spectral normalisation is seen to withstand attack")
    attacked("jWAE, rank 4", f"spectral norm, rank {HIGH}", "rank 4 withstands more than a normalised high rank")
    attacked("spectral norm, rank 4", "jWAE, rank 4", "spectral normalisation adds to a low rank")
    attacked(f"decay {STRONG_DECAY:g}, rank {HIGH}", high, "a strong weight decay does as a low rank is said to")
    attacked("decay 0, rank 4", f"decay 0, rank {HIGH}", "a low rank withstands more where no weight decays")
    attacked("jWAE, rank 4", "no prior, rank 4", "the prior makes rank 4 withstand more")
    _add_noise(data, result, add)
    return named, effects


def _add_noise(data: FoldedDataset, result: Measures, add) -> None:
    """The second question: what the first primary outcome loses under noise, low ranks beside the high one."""
    outcome = PRIMARY[data.task][0]
    noisy = {"trailing": result.trailing, "leading": result.leading}

    def lost(end: str, rank: int) -> np.ndarray:
        label = f"jWAE, rank {rank}"
        return result.outcome[label] - noisy[end][label]

    gain = {end: lost(end, HIGH) - np.mean([lost(end, rank) for rank in LOW], axis=0) for end in noisy}
    word, effect = WORDS[outcome], EFFECTS[outcome]
    for end, values in gain.items():
        text = f"ranks 2 and 4 lose less {word} than rank {HIGH} under noise along the {end} components"
        add(f"{end} noise, {word}: low loses less", values, text, effect)
    add(
        f"trailing over leading noise, {word}: low loses less",
        gain["trailing"] - gain["leading"],
        "and more so along the trailing than along the leading ones",
        effect,
    )


EXPERIMENT = Experiment(
    "rank_robustness",
    "Low rank is an implicit spectral regulariser that improves adversarial robustness and uncertainty.",
    "Is a low rank more robust to the worst change of an input, and surer, than a high one at the same fit?",
    measure,
    modalities=2,
)
