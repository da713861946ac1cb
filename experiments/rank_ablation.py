"""Does a low rank generalise better? Ranks 1 to 32, with and without jWAE, and with a fused width that hides the rank.

    python -m experiments.rank_ablation --dataset cmu_mosi --data cmu_mosi_utterances.npz

The prediction is the LMF layer's own output, so R bounds the CP rank of the interaction. The control with a fused width
(16 LMF outputs and a linear layer) has an interaction of rank up to 16 R: there the rank says little.

The claim is tested as: with jWAE, ranks 2 to 4 (their mean) score higher on test than rank 1 and than rank 8, and
rank 8 has a lower training loss than ranks 2 to 4. All three must hold. Where the latents of rank 8 vary in fewer than
8 effective dimensions there is no verdict: no rank can bind. The recipe was chosen with rank 4.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import SCORE_EFFECT, Experiment, Outcome, Run, contrasts_on_test, main, verdict_of_rank
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.statistics import Difference, combine
from mmfusion.training.grid import JWAE, PLAIN, Grid, Setting

RANKS = (1, 2, 3, 4, 6, 8, 16, 32)
LOW = (2, 3, 4)  # the ranks that the claim favours
FUSED_DIM = 16
DECAYS = (0.1, 1.0, 30.0)  # of the control at the largest rank, beside the recipe's
LOSS_EFFECT = 0.05  # smallest ratio of training losses of interest: 5 %
KINDS = {"jWAE": JWAE, "plain": PLAIN}


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train the grid and its fused-width control; contrasts are paired over seeds and test examples."""
    settings = [Setting(f"{kind}, rank {rank}", rank, terms) for kind, terms in KINDS.items() for rank in RANKS]
    settings += [Setting(f"decay {decay:g}, rank {RANKS[-1]}", RANKS[-1], JWAE, decay) for decay in DECAYS]
    grid = run.grid(data, settings, "rank")
    fused = run.grid(
        data, [Setting(f"fused, rank {rank}", rank, JWAE) for rank in RANKS], "rank fused", fused_dim=FUSED_DIM
    )
    columns = summary(grid) | summary(fused)
    named = differences(grid, fused)
    effects = {name: LOSS_EFFECT if "training loss" in name else SCORE_EFFECT for name in named}
    contrasts = contrasts_on_test(data, named, effects)
    verdict = combine([c.verdict for c in contrasts if c.decides], "all")
    verdict, bound = verdict_of_rank(grid, "jWAE, rank 8", verdict)
    best = max(RANKS, key=lambda rank: columns[f"jWAE, rank {rank}"]["test score"].mean())
    least = min(RANKS, key=lambda rank: columns[f"jWAE, rank {rank}"]["train loss"].mean())
    answer = (
        f"With jWAE the best mean test score is at rank {best}, the lowest training loss at rank {least}; "
        f"ranks 2-4 against rank 1: {contrasts[0].estimate:+.3f} [{contrasts[0].low:+.3f}, {contrasts[0].high:+.3f}], "
        f"against rank 8: {contrasts[1].estimate:+.3f} [{contrasts[1].low:+.3f}, {contrasts[1].high:+.3f}]."
        f"{bound}"
    )
    numbers = {label: {name: list(map(float, v)) for name, v in cells.items()} for label, cells in columns.items()}
    return Outcome(
        table(data, columns),
        contrasts,
        verdict,
        answer,
        numbers,
        lambda figure: draw(figure, data, columns),
        (13, 4.2),
    )


def summary(grid: Grid) -> dict[str, dict[str, np.ndarray]]:
    """{setting: {column: (S,)}}: loss and score in every part, and the ranking score on test."""
    columns: dict[str, dict[str, np.ndarray]] = {setting.label: {} for setting in grid.settings}
    for part in ("train", "dev", "test"):
        losses, scores = grid.losses(part).mean(-1), grid.scores(part).mean(-1)  # (P, S)
        for p, setting in enumerate(grid.settings):
            columns[setting.label] |= {f"{part} loss": losses[p], f"{part} score": scores[p]}
    return columns


def differences(grid: Grid, fused: Grid) -> dict[str, Difference]:
    """Contrasts as the claim orients them: (S, n) over test examples; (S,) log ratios of training losses."""
    named: dict[str, Difference] = {}
    scores, losses = grid.scores(), np.log(grid.losses("train").mean(-1))  # a ratio means the same on every dataset
    for kind in KINDS:
        of = {rank: scores[grid.index(f"{kind}, rank {rank}")] for rank in RANKS}
        loss = {rank: losses[grid.index(f"{kind}, rank {rank}")] for rank in RANKS}
        low, own = np.mean([of[rank] for rank in LOW], axis=0), kind == "jWAE"  # the claim is about jWAE-LMF
        named[f"{kind}: ranks 2-4 over rank 1"] = Difference(
            low - of[1], "ranks 2 to 4 score higher on test than rank 1", own
        )
        named[f"{kind}: ranks 2-4 over rank 8"] = Difference(
            low - of[8], "ranks 2 to 4 score higher on test than rank 8", own
        )
        named[f"{kind}: training loss of 2-4 over 8"] = Difference(
            np.mean([loss[rank] for rank in LOW], axis=0) - loss[8],
            "rank 8 has a lower training loss than ranks 2 to 4 (difference of logarithms)",
            own,
        )
    for decay in DECAYS:
        controlled = scores[grid.index(f"decay {decay:g}, rank {RANKS[-1]}")]
        low = np.mean([scores[grid.index(f"jWAE, rank {rank}")] for rank in LOW], axis=0)
        named[f"ranks 2-4 over rank 32, decay {decay:g}"] = Difference(
            low - controlled,
            f"ranks 2 to 4 score higher than rank 32 with weight decay {decay:g}",
            False,
        )
    narrow = scores[grid.index("jWAE, rank 4")] - scores[grid.index("jWAE, rank 1")]
    wide = fused.scores()[fused.index("fused, rank 4")] - fused.scores()[fused.index("fused, rank 1")]
    named["gain of rank 4 over 1, less with fused width"] = Difference(
        narrow - wide,
        "rank 4 gains more over rank 1 where the output is the prediction than behind a fused width",
        False,
    )
    return named


def table(data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> str:
    """Fixed-width: one line per setting, mean +- std over seeds."""
    names = list(next(iter(columns.values())))
    width = max(map(len, columns))
    lines = [f"score: {data.score_name}; loss: {data.loss_name}; mean +- std over seeds"]
    lines.append(f"{'':{width}}" + "".join(f"  {name:>16}" for name in names))
    for label, cells in columns.items():
        lines.append(f"{label:{width}}" + "".join(f"  {mean_std(cells[name]):>16}" for name in names))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> None:
    """Three panels over the rank: training loss, test loss, test score; band: standard deviation over seeds."""
    axes = figure.subplots(1, 3)
    panels = {
        "train loss": f"training {data.loss_name}",
        "test loss": f"test {data.loss_name}",
        "test score": f"test {data.score_name}",
    }
    kinds = {
        "jWAE": ("jWAE-LMF", "C0"),
        "plain": ("LMF without jWAE", "C1"),
        "fused": (f"jWAE, width {FUSED_DIM}", "C2"),
    }
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for kind, (legend, color) in kinds.items():
            values = np.array([columns[f"{kind}, rank {rank}"][name] for rank in RANKS])  # (ranks, S)
            mean, std = values.mean(1), values.std(1, ddof=1)
            axis.plot(RANKS, mean, "o-", color=color, label=legend, markersize=4)
            axis.fill_between(RANKS, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axis.minorticks_off()
        axis.set(title=label, xlabel="rank R")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{data.name}: rank ablation (mean and standard deviation over seeds)")


EXPERIMENT = Experiment(
    "rank_ablation",
    "Ranks 2-4 generalise best; rank 8 has the lowest training loss and generalises worse.",
    "Does a low rank generalise better than a high one, and does the training loss fall with the rank?",
    measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
