"""Does a low rank generalise better? Rank x start x weight decay x step size, with the rank that is really used.

    python -m experiments.rank_ablation --dataset cmu_mosi --data cmu_mosi_utterances.npz --cross-validate 5 --repeats 3

The prediction is the LMF layer's own output, so R bounds the CP rank of the interaction. Beside each score stands the
effective rank of the interaction that was learned (mmfusion.models.decomposition.interaction_rank): where it does not
rise with R, a difference between ranks is not one of rank; and where the latents vary in no more dimensions than the
ranks that the claim favours, a higher one has nothing to bind, and there is no verdict.

Claim, with jWAE, on AUROC or on log loss (regression: MAE or correlation; either will do, corrected for two): ranks 2
and 4, their mean, do better on test than rank 1 and than rank 8, and rank 8 has a lower training loss than they have.

Controls, which decide nothing. A higher rank moves faster under Adam, so that its last epoch is later in the same
course: rank 4 over 8 and over 32 at *matched training loss* (rank 4 at its own step size; the other where its training
loss, interpolated over three step sizes, is the same) and after temperature scaling on dev; random signs at the start
in place of balanced ones; no weight decay; without jWAE.
"""

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import Experiment, Outcome, Run, contrasts_on_test, main, outcomes, verdict_of_rank
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS, as_reported
from mmfusion.metrics.scores import example_losses
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.models.decomposition import interaction_rank
from mmfusion.models.exact import exact_layer, latents_of
from mmfusion.training.grid import JWAE, PLAIN, Grid, Setting, by_fold, by_repeat, per_example

RANKS = (1, 2, 4, 8, 32)
LOW = {"jWAE": (2, 4), "plain": (4,)}  # the ranks that the claim favours
PLAIN_RANKS = (1, 4, 8)
STEPS = (0.5, 2.0)  # times the recipe's learning rate
COMPARED = (8, 32)  # with rank 4, at matched training loss
VARIANTS = {"random start": {"start": "random"}, "decay 0": {"weight_decay": 0.0}}
LOSS_EFFECT = 0.05  # smallest ratio of training losses of interest: 5 %


def settings_of() -> list[Setting]:
    """All rows that share the recipe's step size."""
    rows = [Setting(f"jWAE, rank {rank}", rank, JWAE) for rank in RANKS]
    rows += [Setting(f"plain, rank {rank}", rank, PLAIN) for rank in PLAIN_RANKS]
    return rows + [
        Setting(f"{name}, rank {rank}", rank, JWAE, **changes) for name, changes in VARIANTS.items() for rank in (4, 8)
    ]


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train all rows, rank by rank at other step sizes too; contrasts are paired over seeds and examples."""
    grid = run.grid(data, settings_of(), "rank")
    recipe = run.options.recipe(data.task)
    paced = {1.0: grid}
    for step in STEPS:
        rows = [Setting(f"jWAE, rank {rank}", rank, JWAE) for rank in COMPARED]
        faster = replace(recipe, learning_rate=step * recipe.learning_rate)
        paced[step] = run.grid(data, rows, f"rank step {step:g}", faster)
    named, effects = differences(grid, paced)
    contrasts = contrasts_on_test(data, named, effects)
    verdict, bound = verdict_of_rank(grid, "jWAE, rank 8", verdict_of(contrasts), max(LOW["jWAE"]))
    columns = summary(grid)
    first = PRIMARY[data.task][0]
    score = as_reported(1.0, first)  # 1, or -1 where less is better
    best = max(RANKS, key=lambda rank: score * columns[f"jWAE, rank {rank}"][WORDS[first]].mean())
    least = min(RANKS, key=lambda rank: columns[f"jWAE, rank {rank}"]["train loss"].mean())
    shown = "; ".join(f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts if c.decides)
    return Outcome(
        table(data, columns),
        contrasts,
        verdict,
        f"Best mean {WORDS[first]} at rank {best}, lowest training loss at rank {least}; {shown}.{bound}",
        columns,
        lambda figure: draw(figure, data, columns),
        (13, 4.2),
    )


def summary(grid: Grid) -> dict[str, dict[str, np.ndarray]]:
    """{setting: {column: (S * repeats,)}}: outcomes on test as they are, losses, the rank that is used."""
    data, columns = grid.data, {}
    of = {name: by_repeat(data, values) for name, values in outcomes(grid).items()}
    losses = {part: by_repeat(data, grid.losses(part), part) for part in ("train", "test")}
    for p, setting in enumerate(grid.settings):
        columns[setting.label] = {WORDS[name]: as_reported(values[p], name) for name, values in of.items()}
        columns[setting.label] |= {f"{part} loss": values[p] for part, values in losses.items()}
        columns[setting.label]["rank used"] = by_repeat(data, used_ranks(grid, p))
    return columns


def used_ranks(grid: Grid, place: int) -> np.ndarray:
    """(S, F): effective rank of each member's interaction on its own training part; 0 of a single modality."""
    folds = grid.data.folds
    found = []
    for k, model in enumerate(grid.members([place])):
        rows = folds[k % len(folds)].train
        latents = latents_of(model, {name: x[rows] for name, x in grid.data.pool.features.items()})
        found.append(interaction_rank(exact_layer(model), latents) if len(latents) > 1 else 0.0)
    return np.reshape(found, (len(grid.seeds), len(folds)))


# ---- contrasts ---------------------------------------------------------------------------------------------------


def differences(grid: Grid, paced: dict[float, Grid]) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts as the claim orients them, with the effect of interest of each."""
    data = grid.data
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}

    def add(name: str, values: np.ndarray, claim: str, effect: float, route: str | None = None) -> None:
        named[name], effects[name] = Difference(values, claim, route is not None, route or ""), effect

    # a ratio means the same on every data set
    losses = np.log(by_fold(data, grid.losses("train"), "train"))
    for outcome in PRIMARY[data.task]:
        values, effect, word = grid.outcome(outcome), EFFECTS[outcome], WORDS[outcome]
        for kind, ranks in LOW.items():
            route = word if kind == "jWAE" else None  # the claim is about jWAE-LMF, on either outcome
            places = {rank: grid.index(f"{kind}, rank {rank}") for rank in (1, *ranks, 8)}
            low, less = (of[[places[rank] for rank in ranks]].mean(0) for of in (values, losses))
            said = f"ranks {', '.join(map(str, ranks))}"
            for rank in (1, 8):
                text = f"{said} do better than rank {rank} ({word})"
                add(f"{kind}, {word}: low over rank {rank}", low - values[places[rank]], text, effect, route)
            text = f"rank 8 has a lower training loss than {said} (difference of logarithms)"
            add(f"{kind}, {word}: training loss of low over 8", less - losses[places[8]], text, LOSS_EFFECT, route)
        for name in VARIANTS:
            gain = values[grid.index(f"{name}, rank 4")] - values[grid.index(f"{name}, rank 8")]
            add(f"{name}, {word}: rank 4 over 8", gain, f"rank 4 does better than 8 with {name}", effect)
        lottery = values[grid.index("jWAE, rank 4")] - values[grid.index("random start, rank 4")]
        add(f"{word}: balanced over random start, rank 4", lottery, "balanced signs do better", effect)
        for rank in COMPARED:
            gain = by_fold(data, values[grid.index("jWAE, rank 4")]) - at_matched_loss(grid, paced, rank, outcome)
            text = f"rank 4 does better than rank {rank} at its training loss"
            add(f"{word}: rank 4 over {rank}, matched training loss", gain, text, effect)
    if data.task != "regression":
        tempered = -per_example(data, grid.tempered(), "test", example_losses)
        for rank in COMPARED:
            gain = tempered[grid.index("jWAE, rank 4")] - tempered[grid.index(f"jWAE, rank {rank}")]
            text = f"rank 4 has the lower log loss than rank {rank}, both tempered"
            add(f"log loss: rank 4 over {rank}, temperature scaled", gain, text, EFFECTS["log_loss"])
    return named, effects


def at_matched_loss(grid: Grid, paced: dict[float, Grid], rank: int, outcome: str) -> np.ndarray:
    """(S, F): a rank's outcome where its training loss is that of rank 4, interpolated over the step sizes.

    Beyond the losses that the step sizes reach, that of the nearest one.
    """
    data, label = grid.data, f"jWAE, rank {rank}"
    wanted = np.log(by_fold(data, grid.losses("train")[grid.index("jWAE, rank 4")], "train"))
    reached, values = [], []
    for one in paced.values():
        place = one.index(label)
        reached.append(np.log(by_fold(data, one.losses("train")[place], "train")))
        values.append(by_fold(data, one.outcome(outcome)[place]))
    reached, values = np.stack(reached, -1), np.stack(values, -1)  # (S, F, steps)
    matched = np.empty_like(wanted)
    for place in np.ndindex(wanted.shape):
        order = np.argsort(reached[place])
        matched[place] = np.interp(wanted[place], reached[place][order], values[place][order])
    return matched


# ---- text and figure ---------------------------------------------------------------------------------------------


def table(data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> str:
    """Fixed-width: one line per setting, mean +- std over seeds."""
    names = list(next(iter(columns.values())))
    width = max(map(len, columns))
    lines = [f"loss: {data.loss_name}; rank used: effective rank of the interaction; mean +- std over seeds"]
    lines.append(f"{'':{width}}" + "".join(f"  {name:>16}" for name in names))
    for label, cells in columns.items():
        lines.append(f"{label:{width}}" + "".join(f"  {mean_std(cells[name]):>16}" for name in names))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> None:
    """Over the rank: training loss, both primary outcomes, the rank that is used; band: std over seeds."""
    names = ["train loss", *(WORDS[name] for name in PRIMARY[data.task]), "rank used"]
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for kind, legend, color in (("jWAE", "jWAE-LMF", "C0"), ("plain", "LMF without jWAE", "C1")):
            ranks = [rank for rank in RANKS if f"{kind}, rank {rank}" in columns]
            values = np.array([columns[f"{kind}, rank {rank}"][name] for rank in ranks])  # (ranks, S)
            mean, std = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0.0
            axis.plot(ranks, mean, "o-", color=color, label=legend, markersize=4)
            axis.fill_between(ranks, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axis.minorticks_off()
        axis.set(title=name if name in ("train loss", "rank used") else f"test {name}", xlabel="rank R")
    figure.axes[-1].plot(RANKS, RANKS, ":", color="0.6", label="R itself")
    figure.axes[-1].legend(frameon=False)
    figure.suptitle(f"{data.name}: rank ablation (mean and standard deviation over seeds)")


EXPERIMENT = Experiment(
    "rank_ablation",
    "Ranks 2-4 generalise best; rank 8 has the lowest training loss and generalises worse.",
    "Does a low rank generalise better than a high one, and does the training loss fall with the rank?",
    measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
