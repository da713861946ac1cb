"""Does the jWAE help, and at which rank? The prior off, weak and enforced, over the rank.

    python -m experiments.jwae_ablation --dataset cmu_mosi --data cmu_mosi_utterances.npz --cross-validate 5 --repeats 3

"Off": certain latents and the fit alone. "Weak": certain latents with the jWAE's terms at their usual weights, which do
not bring them to the prior. "Enforced": latents with Gaussian noise and the same terms; whether they follow N(0, I) is
measured (`mmfusion.metrics.prior`) and stands in the table. "Noise alone": Gaussian latents
without the terms, which tells the noise from the pull.

Claim, of classes, on AUROC or on log loss (corrected for two): enforced does better than off at low and at medium rank,
and at high rank off is no more than an effect of interest worse. Of a regression: at some rank it costs MAE. Where the
latents of "enforced" do not follow the prior in half of all members there is no verdict: the claim is about a prior
that is there.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import Experiment, Outcome, Run, contrasts_on_test, main, outcomes
from experiments.prior_strength.latents import latent_columns
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS, as_reported
from mmfusion.metrics.verdicts import Difference, Verdict, verdict_of
from mmfusion.training.grid import JWAE, PLAIN, Grid, Setting, by_repeat

BANDS = {"low": (2,), "medium": (8,), "high": (32,)}
RANKS = tuple(rank for ranks in BANDS.values() for rank in ranks)
LEVELS = {
    "off": ("none", PLAIN),
    "weak": ("none", JWAE),
    "noise alone": ("dimension", PLAIN),
    "enforced": ("dimension", JWAE),
}
LEAST_ENFORCED = 0.5  # share of members, folds and modalities


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train both kinds of latents; contrasts are paired over seeds and test examples."""
    grids = {}
    for noise in ("none", "dimension"):
        rows = [level for level, (kind, _) in LEVELS.items() if kind == noise]
        settings = [Setting(f"{row}, rank {rank}", rank, LEVELS[row][1]) for row in rows for rank in RANKS]
        grids[noise] = run.grid(data, settings, f"jwae {noise}", noise=noise)
    named, effects = differences(data, grids)
    contrasts = contrasts_on_test(data, named, effects)
    columns = {label: cells for grid in grids.values() for label, cells in summary(grid).items()}
    verdict, held = verdict_of_prior(columns, verdict_of(contrasts))
    text = [f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts if c.decides]
    part = "MAE" if data.task == "regression" else "classification"
    return Outcome(
        table(data, columns),
        contrasts,
        verdict,
        f"{'; '.join(text)}. {held}",
        columns,
        lambda figure: draw(figure, data, columns),
        (15, 4.2),
        [f"this dataset tests the claim's part on {part}, not the other"],
    )


def differences(data: FoldedDataset, grids: dict[str, Grid]) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts as the claim orients them, and the effect of interest of each."""
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}
    for outcome in PRIMARY[data.task]:
        values = {
            setting.label: of
            for grid in grids.values()
            for setting, of in zip(grid.settings, grid.outcome(outcome), strict=True)
        }
        word, effect = WORDS[outcome], EFFECTS[outcome]

        def gain(level: str, ranks: tuple[int, ...], values: dict = values, base: str = "off") -> np.ndarray:
            return np.mean([values[f"{level}, rank {r}"] - values[f"{base}, rank {r}"] for r in ranks], axis=0)

        for band, ranks in BANDS.items():
            place = f"at {band} rank ({', '.join(map(str, ranks))})"
            change = gain("enforced", ranks)
            if data.task == "regression":
                route = f"{outcome} {band}" if outcome == "mae" else None
                claim = (f"cost of jWAE {place}, {word}", -change, f"jWAE does worse {place}", effect)
            elif band == "high":
                route = outcome
                claim = (f"plain no worse {place}, {word}", effect - change, f"off hardly worse {place}", effect)
            else:
                route = outcome
                claim = (f"gain of jWAE {place}, {word}", change, f"jWAE does better {place}", effect)
            name, difference, text, effects[claim[0]] = claim
            is_bound = name.startswith("plain no worse")
            named[name] = Difference(difference, text, route is not None, route or "", is_bound)
        for level, base in (("weak", "off"), ("noise alone", "off"), ("enforced", "noise alone")):
            name = f"{level} over {base}, all ranks, {word}"
            named[name] = Difference(gain(level, RANKS, base=base), f"{level} does better than {base}", False)
            effects[name] = effect
    return named, effects


def summary(grid: Grid) -> dict[str, dict[str, np.ndarray]]:
    """{setting: {column: (S * repeats,)}}: outcomes on test as they are, training loss, the latents' measures."""
    data = grid.data
    of = {name: by_repeat(data, values) for name, values in outcomes(grid).items()}
    losses = by_repeat(data, grid.losses("train"), "train")
    columns = {}
    for p, setting in enumerate(grid.settings):
        cells = {WORDS[name]: as_reported(values[p], name) for name, values in of.items()} | {"train loss": losses[p]}
        latents = latent_columns(grid, p)
        kept = ("eigenvalue", "enforced", "dimension of means", "share no noise")
        columns[setting.label] = cells | {name: latents[name] for name in kept}
    return columns


def verdict_of_prior(columns: dict[str, dict[str, np.ndarray]], verdict: Verdict) -> tuple[Verdict, str]:
    """The verdict, or none where the prior does not hold; with a sentence."""
    share = float(np.mean([columns[f"enforced, rank {rank}"]["enforced"].mean() for rank in RANKS]))
    weak = float(np.mean([columns[f"weak, rank {rank}"]["enforced"].mean() for rank in RANKS]))
    text = f"The prior holds in {share:.0%} of the members of 'enforced', in {weak:.0%} of 'weak'."
    return (verdict, text) if share >= LEAST_ENFORCED else ("not identified", f"No verdict. {text}")


def table(data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> str:
    """One line per level and rank, mean +- std over seeds."""
    names = list(next(iter(columns.values())))
    width = max(map(len, columns))
    lines = [
        "mean +- std over seeds; eigenvalue: largest of the latents' covariance; enforced: share of modalities and "
        "folds in which the prior holds, whitened"
    ]
    lines.append(f"{'':{width}}" + "".join(f"  {name:>18}" for name in names))
    for label, cells in columns.items():
        lines.append(f"{label:{width}}" + "".join(f"  {mean_std(cells[name]):>18}" for name in names))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> None:
    """Both primary outcomes, training loss and how far the prior holds over the rank, one colour per level."""
    names = [*(WORDS[name] for name in PRIMARY[data.task]), "train loss", "enforced"]
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for shift, level in enumerate(LEVELS):
            values = np.array([columns[f"{level}, rank {rank}"][name] for rank in RANKS])  # (ranks, S)
            place = np.arange(len(RANKS)) + 0.12 * (shift - 1.5)
            spread = values.std(1, ddof=1) if values.shape[1] > 1 else None
            axis.errorbar(place, values.mean(1), spread, fmt="o", markersize=4, capsize=2, label=level)
        axis.set_xticks(range(len(RANKS)), [str(rank) for rank in RANKS])
        axis.set(title="share in which the prior holds" if name == "enforced" else name, xlabel="rank R")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LEVELS), frameon=False)
    figure.suptitle(f"{data.name}: the prior off, weak and enforced (mean and standard deviation over seeds)")


EXPERIMENT = Experiment(
    "jwae_ablation",
    "jWAE improves classification at low and medium rank; at high rank plain LMF is as good or better, "
    "and jWAE may worsen MAE.",
    "Does a prior on the latents, off, weak or enforced, help, and at which rank?",
    measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
