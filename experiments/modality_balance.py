"""Does robustness depend on how evenly the modalities contribute, and which of them go together well?

    python -m experiments.modality_balance --dataset cmu_mosi --data cmu_mosi_utterances.npz

Every subset of the modalities is trained with the others always hidden (dropout rate 1) and tested without them: same
shapes, same initial values, same batches. The pair alignment is off in all of this experiment, since it would let a
left-out modality shape the encoders of the others in training. What each modality contributes is read off the exact
split of the prediction's variance by subsets of modalities (`LowRankMultimodalFusion.subset_terms`); to vary the
balance, the full set is also trained with one modality dropped at times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from experiments.experiment import SCORE_EFFECT, Experiment, Outcome, Run, contrasts_on_test, main
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.scores import example_scores
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, combine
from mmfusion.models.decomposition import contributions, imbalance, variance_shares
from mmfusion.training.grid import Grid, Setting, per_example

RANK = 4
TERMS = ("mmd", "reconstruction")
RATES = (0.3, 0.6)  # at which one modality of the full set is dropped in training, to vary the balance
CORRELATION_EFFECT = 0.3  # smallest rank correlation of interest
BALANCE = "more imbalance goes with a larger worst drop"
OVER_SINGLE = "all modalities over the best single one (chosen on dev)"


@dataclass(frozen=True)
class Balance:
    """Of P settings that see all M modalities, S seeds each."""

    labels: list[str]
    shares: dict[tuple[int, ...], np.ndarray]
    """(P, S) of the prediction's variance on test per subset of modalities; sums to 1 over the subsets"""
    contributions: np.ndarray
    """(P, S, M)"""
    imbalance: np.ndarray
    """(P, S) in [0, 1]"""
    drops: np.ndarray
    """(P, S, M) loss of test score where that modality is missing"""

    @property
    def worst_drop(self) -> np.ndarray:
        """(P, S): of the modality whose absence costs most."""
        return self.drops.max(-1)


@dataclass(frozen=True)
class BalanceResult:
    """What table, figure and results.json show."""

    task: str
    names: tuple[str, ...]
    """the M modalities"""
    subsets: dict[str, tuple[str, ...]]
    test: dict[str, np.ndarray]
    """{subset: (S, n)} scores of the members that saw that subset alone"""
    dev: dict[str, np.ndarray]
    balance: Balance
    chance: float
    """score of a coin, or of the training mean"""


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train subsets and full-set variants; score every subset, then relate imbalance to the worst drop."""
    names = tuple(data.input_dims)
    subsets = {label(subset): subset for size in range(1, len(names) + 1) for subset in combinations(names, size)}
    settings = [
        Setting(text, RANK, TERMS, dropout={name: 1.0 for name in names if name not in subset})
        for text, subset in subsets.items()
    ]
    settings += [Setting(f"{name} dropped at {p}", RANK, TERMS, dropout={name: p}) for name in names for p in RATES]
    grid = run.grid(data, settings, "balance")
    result = BalanceResult(
        data.task,
        names,
        subsets,
        subset_scores(grid, subsets, "test"),
        subset_scores(grid, subsets, "dev"),
        measure_balance(grid, range(len(subsets) - 1, len(settings))),  # the full set comes last of the subsets
        chance_score(data),
    )
    named = differences(result)
    effects = {name: CORRELATION_EFFECT if name == BALANCE else SCORE_EFFECT for name in named}
    contrasts = contrasts_on_test(data, named, effects)

    def draw_all(figure: Figure) -> None:
        figure.suptitle(f"{data.name}: contributions of the modalities and robustness to a missing one")
        draw(figure, result)

    return Outcome(
        table(result),
        contrasts,
        verdict_of(contrasts),
        answer(contrasts),
        numbers_of(result),
        draw_all,
        (14.5, 5.0),
        notes_of(data, names),
    )


def label(subset: Sequence[str]) -> str:
    """Name of a subset of the modalities."""
    return "+".join(subset)


# ---- contributions -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_balance(grid: Grid, places: Sequence[int]) -> Balance:
    """Shares, contributions and drops of these settings' members on the test examples; shares are means over folds."""
    data, names = grid.data, list(grid.data.input_dims)
    by_setting: list[list[dict[tuple[int, ...], float]]] = []
    for p in places:
        by_seed = []
        for s in range(len(grid.seeds)):
            result = []
            for f, fold in enumerate(data.folds):
                model = grid.model(p, s, f)
                latents = model.latents({name: x[fold.test] for name, x in data.pool.features.items()})
                result.append(variance_shares(model.fusion, latents))
            by_seed.append({subset: float(np.mean([shares[subset] for shares in result])) for subset in result[0]})
        by_setting.append(by_seed)
    shares = {
        subset: np.array([[seed[subset] for seed in by_seed] for by_seed in by_setting]) for subset in by_setting[0][0]
    }
    places = list(places)
    complete = grid.scores()[places].mean(-1)  # (P, S)
    drops = [complete - grid.without([name], places).mean(-1) for name in names]
    contribution = contributions(shares, len(names))
    labels = ["no dropout", *(grid.settings[p].label for p in places[1:])]
    return Balance(labels, shares, contribution, imbalance(contribution), np.stack(drops, -1))


# ---- scores ------------------------------------------------------------------------------------------------------


def subset_scores(grid: Grid, subsets: Mapping[str, tuple[str, ...]], part: str) -> dict[str, np.ndarray]:
    """{subset: (S, n)}: scores of the members that saw that subset alone, tested on it alone."""
    names = grid.data.input_dims
    return {
        text: grid.without([name for name in names if name not in subset], [grid.index(text)], part)[0]
        for text, subset in subsets.items()
    }


def best_single(subset: Sequence[str], dev: Mapping[str, np.ndarray]) -> str:
    """Which modality of the subset scores highest alone on dev; never chosen on test."""
    return max(subset, key=lambda name: dev[name].mean())


def chance_score(data: FoldedDataset) -> float:
    """Test score of a coin, 1/2 whatever the classes' shares; for a regression that of the training part's mean."""
    if data.task == "binary":
        return 0.5
    means = [data.pool.target[fold.train].mean(0).expand_as(data.pool.target[fold.test]) for fold in data.folds]
    return float(per_example(data, torch.cat(means).numpy()[None], "test", example_scores).mean())


# ---- contrasts and verdict ---------------------------------------------------------------------------------------


def differences(result: BalanceResult) -> dict[str, Difference]:
    """Contrasts: (S,) rank correlations; (S, n) between pairs of modalities, and of all against the best single."""
    test, dev, balance = result.test, result.dev, result.balance
    correlations = rank_correlations(balance.imbalance, balance.worst_drop)
    named = {BALANCE: Difference(correlations, f"{BALANCE}, over {len(balance.labels)} settings of all modalities")}
    pairs = [text for text, subset in result.subsets.items() if len(subset) == 2]
    for two in combinations(pairs, 2):
        # oriented by dev, so that the test examples have no say in which difference is claimed
        higher, lower = sorted(two, key=lambda text: -dev[text].mean())
        named[f"{higher} over {lower}"] = Difference(test[higher] - test[lower], f"{higher} scores higher than {lower}")
    full, best = label(result.names), best_single(result.names, dev)
    named[OVER_SINGLE] = Difference(
        test[full] - test[best], f"{full} scores higher than {best}, the best single one on dev", False
    )
    return named


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of x and y (P, S) over the settings -> (S,); 0 where one is constant: no order there."""
    constant = (np.ptp(x, axis=0) == 0) | (np.ptp(y, axis=0) == 0)
    return np.array([0.0 if constant[s] else spearmanr(x[:, s], y[:, s]).statistic for s in range(x.shape[1])])


def verdict_of(contrasts: Sequence[Contrast]) -> Verdict:
    """The balance matters, and (with three or more modalities) some pair is better than another."""
    pairs = [c.verdict for c in contrasts[1:] if c.decides]
    return combine([contrasts[0].verdict, *([combine(pairs, "any")] if pairs else [])], "all")


def notes_of(data: FoldedDataset, names: Sequence[str]) -> list[str]:
    """What the reader of the verdict must know."""
    notes = [
        "the balance is varied by dropping modalities in training, which also trains for their absence: the "
        "correlation may be due to either; its interval is over seeds, on these test examples"
    ]
    if len(names) == 2:
        notes.append("two modalities are one pair: the verdict is that of the balance alone")
    if any(bool(torch.isin(fold.dev, fold.test).any()) for fold in data.folds):
        notes.append(
            "dev shares examples with test: pairs are oriented, and the best single chosen, on tested examples"
        )
    return notes


def answer(contrasts: Sequence[Contrast]) -> str:
    """The estimates in one sentence."""
    first, last = contrasts[0], contrasts[-1]
    text = (
        f"Rank correlation of imbalance and worst drop {first.estimate:+.2f} [{first.low:+.2f}, {first.high:+.2f}]; "
        f"all modalities over the best single one {last.estimate:+.3f} [{last.low:+.3f}, {last.high:+.3f}]"
    )
    pairs = [f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts[1:-1]]
    return "; ".join([text, *pairs]) + "."


# ---- text and figure ---------------------------------------------------------------------------------------------


def numbers_of(result: BalanceResult) -> dict[str, object]:
    """Everything in table and figure, one number per seed, JSON-able."""
    names, balance, mean_drop = result.names, result.balance, result.balance.drops.mean(-1)
    of_settings = {
        text: {
            "share of variance": {label([names[m] for m in s]): x[p].tolist() for s, x in balance.shares.items()},
            "contribution": {name: balance.contributions[p, :, m].tolist() for m, name in enumerate(names)},
            "imbalance": balance.imbalance[p].tolist(),
            "drop without": {name: balance.drops[p, :, m].tolist() for m, name in enumerate(names)},
            "mean drop": mean_drop[p].tolist(),
            "worst drop": balance.worst_drop[p].tolist(),
        }
        for p, text in enumerate(balance.labels)
    }
    parts = {"dev": result.dev, "test": result.test}
    return {
        "subsets": {s: {part: x[s].mean(1).tolist() for part, x in parts.items()} for s in result.subsets},
        "best single on dev": best_single(names, result.dev),
        "coin or training mean": result.chance,
        "settings of all modalities": of_settings,
        "rank correlation of imbalance and mean drop": rank_correlations(balance.imbalance, mean_drop).tolist(),
    }


def table(result: BalanceResult) -> str:
    """Fixed-width: one line per subset, then two per setting that sees all modalities; mean +- std over seeds."""
    names, balance, test, dev = result.names, result.balance, result.test, result.dev
    score, constant = ("accuracy", "a coin") if result.task == "binary" else ("-MAE / std", "training mean")
    width = max(map(len, [*result.subsets, *balance.labels, constant]))
    lines = [f"score: {score}, mean +- std over seeds; each subset trained and tested without the other modalities"]
    lines.append(f"{'':{width}}  {'dev':>16}  {'test':>16}  {'over its best single modality (by dev)':>38}")
    for text, subset in result.subsets.items():
        best = best_single(subset, dev)
        over = "-" if len(subset) == 1 else f"{mean_std((test[text] - test[best]).mean(1))} over {best}"
        cells = (mean_std(dev[text].mean(1)), mean_std(test[text].mean(1)))
        lines.append(f"{text:{width}}  {cells[0]:>16}  {cells[1]:>16}  {over:>38}")
    lines.append(f"{constant:{width}}  {'':16}  {result.chance:>16.3f}")
    parts = {label([names[m] for m in s]): x for s, x in balance.shares.items()}
    losses = {f"{name} contributes": balance.contributions[..., m] for m, name in enumerate(names)}
    losses |= {"imbalance": balance.imbalance, "mean drop": balance.drops.mean(-1), "worst drop": balance.worst_drop}
    titles = (
        "trained on all modalities: share of the prediction's variance by subset, about the mean latents",
        "and what they lose where a modality is missing: score complete - score without it",
    )
    for title, columns, digits in zip(titles, (parts, losses), (2, 3), strict=True):
        lines += ["", title, f"{'':{width}}" + "".join(f"  {text:>17}" for text in columns)]
        for p, text in enumerate(balance.labels):
            lines.append(f"{text:{width}}" + "".join(f"  {mean_std(x[p], digits):>17}" for x in columns.values()))
    return "\n".join(lines)


def draw(figure: Figure, result: BalanceResult) -> None:
    """Scores of the subsets, shares of variance of the full-set settings, imbalance against the worst drop."""
    left, middle, right = figure.subplots(1, 3)
    binary, chance, balance = result.task == "binary", result.chance, result.balance
    scores = np.array([values.mean(1) for values in result.test.values()])  # (subsets, S)
    # bars begin at what knowing nothing scores, so that a negative score reads like an accuracy
    left.bar(
        range(len(scores)), scores.mean(1) - chance, bottom=chance, yerr=scores.std(1, ddof=1), capsize=3, color="0.6"
    )
    left.use_sticky_edges = False  # room below the line that the bars stand on
    left.axhline(chance, color="black", linewidth=0.8, label="a coin" if binary else "training mean")
    left.set_xticks(range(len(scores)), [text.replace("+", "+\n") for text in result.test], fontsize=8)
    left.set(
        title="each subset alone (std over seeds)", ylabel="test accuracy" if binary else "test -MAE / std of target"
    )
    below = {"frameon": False, "fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
    left.legend(**below)

    places = np.arange(len(balance.labels))
    upper, lower = np.zeros(len(places)), np.zeros(len(places))
    for k, (subset, values) in enumerate(balance.shares.items()):
        mean = values.mean(1)
        text = label([result.names[m] for m in subset])
        middle.barh(places, mean, left=np.where(mean >= 0, upper, lower), color=f"C{k}", label=text)
        upper, lower = upper + np.clip(mean, 0, None), lower + np.clip(mean, None, 0)
    middle.axvline(0, color="black", linewidth=0.8)
    middle.set_yticks(places, balance.labels)
    middle.invert_yaxis()
    middle.set(title="trained on all: whose variance? (mean)", xlabel="share of the prediction's variance")
    middle.legend(ncols=2, **below)

    for p, text in enumerate(balance.labels):
        # the colour of the modality that is dropped, as in the middle; the marker tells the rate
        color, marker = ("black", "o") if p == 0 else (f"C{(p - 1) // len(RATES)}", "^s"[(p - 1) % len(RATES)])
        right.scatter(balance.imbalance[p], balance.worst_drop[p], s=26, alpha=0.75, c=color, marker=marker, label=text)
    right.axhline(0, color="black", linewidth=0.6)
    right.set(title="one dot per seed", xlabel="imbalance (0: all contribute alike)", ylabel="worst drop of test score")
    right.legend(ncols=2, **below)


EXPERIMENT = Experiment(
    "modality_balance",
    "Robustness depends on the balance of the modalities' contributions; some pairs work better than others.",
    "Do models whose modalities contribute unevenly lose more when one is missing, and are some pairs better?",
    measure,
    modalities=2,
)

if __name__ == "__main__":
    main(EXPERIMENT)
