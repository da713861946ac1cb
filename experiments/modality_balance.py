"""Does robustness depend on how evenly the modalities contribute, and do some pairs go together better than others?

    python -m experiments.modality_balance --dataset cmu_mosi --data FILE --cross-validate 5 --repeats 2 --seeds 1

Balance is turned by a dial that moves signal from one modality to another: of every feature's variance a share, its
reliability, stays the example's own, the rest is another example's, drawn once, in training and at test alike. The
reliabilities of the modalities sum to 1 at every setting, so that what all say together changes as little as it can.
(Noise on one modality alone leaves less to lose, and the worst drop falls as balance goes.) Nothing is ever hidden in
training, so no member is trained for an absence; dropping modalities in training would mix balance and practice.
What each modality contributes is read off the exact split of the prediction's variance by subsets of
modalities (mmfusion.models.decomposition); imbalance is 0 where all contribute alike, 1 where one does everything. The
worst drop is what the modality costs whose absence at test costs most.

Claim, on AUROC or on log loss (regression: MAE or correlation; a route each): over the settings of the dial, fold by
fold, with growing imbalance (a) the worst drop rises and (b) the score that it leaves falls, so that neither a better
nor a worse complete model explains both; and, of three or more modalities, (c) the pair that does best on a fold's dev
part does better on its test part than the pair that does worst there. A worst drop that does not move, or falls, ends
in "not supported". Where the dial does not move the imbalance there is no verdict.

Controls: labels planted with `--plant imbalance --plant-strength 0` hang on all modalities alike: (a) and (b)
must hold, (c) only at a higher strength; with `--plant calibration --plant-strength 1` labels are coins, there is
nothing to lose, and the claim must fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.experiment import Experiment, Outcome, Run, contrasts_on_test, main
from experiments.modality_subsets import (
    RANK,
    TERMS,
    Scores,
    chosen,
    label,
    on_dev,
    subset_scores,
    subset_settings,
    without,
)
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS
from mmfusion.metrics.outcomes import Outcome as Score
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, verdict_of
from mmfusion.models.decomposition import contributions, imbalance, variance_shares
from mmfusion.training.grid import Grid, Setting, by_fold, by_repeat

TURNS = (0.3, 0.6, 0.9)  # of the dial towards one modality: 0 all alike, 1 it alone says something; of many the last
MANY = 4
RANGE = 0.1  # of imbalance, a small turn: a slope is of interest where that makes an effect of interest of an outcome
LEAST_RANGE = 0.05  # standard deviation of imbalance over the dial's settings, below which it was not turned


@dataclass(frozen=True)
class Balance:
    """Of P settings that see all M modalities, S seeds and F folds each, on the folds' test parts."""

    labels: list[str]
    shares: dict[tuple[int, ...], np.ndarray]
    """(P, S, F) of the prediction's variance per subset of modalities; sums to 1 over the subsets"""
    complete: dict[Score, np.ndarray]
    """{outcome: (P, S, F)} larger is better"""
    drops: dict[Score, np.ndarray]
    """{outcome: (P, S, F, M)} loss where that modality is missing"""

    @property
    def contributions(self) -> np.ndarray:
        """(P, S, F, M)."""
        return contributions(self.shares, max(map(len, self.shares)))

    @property
    def imbalance(self) -> np.ndarray:
        """(P, S, F) in [0, 1]."""
        return imbalance(self.contributions)

    def worst_drop(self, outcome: Score) -> np.ndarray:
        """(P, S, F): of the modality whose absence costs most."""
        return self.drops[outcome].max(-1)


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train subsets and the dial's settings; relate imbalance to the worst drop, and compare the pairs."""
    names = tuple(data.input_dims)
    subsets = {label(one): one for size in (1, 2) for one in combinations(names, size)} | {label(names): names}
    grid = run.grid(data, subset_settings(names, subsets), "balance subsets")
    turns = TURNS if len(names) < MANY else TURNS[-1:]
    dial = {"all alike": (names[0], 0.0)} | {f"to {name}, {turn:g}": (name, turn) for name in names for turn in turns}
    balances = []
    for text, (name, turn) in dial.items():
        turned = with_reliability(data, reliabilities(names, name, turn))
        balances.append(
            measure_balance(run.grid(turned, [Setting(text, RANK, TERMS, dropout={})], f"balance {text}"), 0)
        )
    balance = joined(balances)
    scores = {part: subset_scores(grid, subsets, part) for part in ("dev", "test")}
    named, effects = differences(names, balance, scores)
    contrasts = contrasts_on_test(data, named, effects)
    verdict, moved = verdict_of_dial(balance, verdict_of(contrasts))
    return Outcome(
        table(data, names, balance, scores["test"]),
        contrasts,
        verdict,
        answer(contrasts) + moved,
        numbers_of(data, names, balance, scores),
        lambda figure: draw(figure, data, names, balance, scores["test"]),
        (14.5, 5.0),
        ["two modalities are one pair: the verdict is that of the balance alone"] if len(names) == 2 else [],
    )


def reliabilities(names: Sequence[str], favoured: str, turn: float) -> dict[str, float]:
    """{modality: share of signal}, summing to 1: all alike at 0, the favoured one's 1 at 1."""
    rest = (1 - turn) / len(names)
    return {name: rest + turn * (name == favoured) for name in names}


def with_reliability(data: FoldedDataset, reliability: Mapping[str, float]) -> FoldedDataset:
    """The same study with part of each modality's features those of another example: mean and covariance stay.

        x_i' = mean + sqrt(r) (x_i - mean) + sqrt(1 - r) (x_j - mean)

    so that every direction of the features keeps the same share r of its variance. j is the same at all r.
    """
    mixed = {}
    for k, (name, x) in enumerate(sorted(data.pool.features.items())):
        other = torch.from_numpy(np.random.default_rng(k).permutation(len(x)))
        mean, own = x.mean(0), reliability[name]
        mixed[name] = mean + own**0.5 * (x - mean) + (1 - own) ** 0.5 * (x[other] - mean)
    return replace(data, pool=replace(data.pool, features=mixed))


# ---- contributions -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_balance(grid: Grid, place: int) -> Balance:
    """Shares, scores and drops of one setting's members, as of P = 1 settings."""
    data, names, folds = grid.data, list(grid.data.input_dims), len(grid.data.folds)
    found = []
    for k, model in enumerate(grid.members([place])):
        rows = data.folds[k % folds].test
        latents = model.latents({name: x[rows] for name, x in data.pool.features.items()})
        found.append(variance_shares(model.fusion, latents))
    shape = (1, len(grid.seeds), folds)
    shares = {subset: np.reshape([one[subset] for one in found], shape) for subset in found[0]}
    complete, drops = {}, {}
    for outcome in PRIMARY[data.task]:
        complete[outcome] = by_fold(data, grid.outcome(outcome)[[place]])  # (1, S, F)
        missing = [by_fold(data, without(grid, [name], place, outcome)) for name in names]
        drops[outcome] = np.stack([complete[outcome] - one for one in missing], -1)
    return Balance([grid.settings[place].label], shares, complete, drops)


def joined(balances: Sequence[Balance]) -> Balance:
    """The settings of all, one after another."""

    def along(of: str) -> dict:
        parts = [getattr(one, of) for one in balances]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return Balance(
        [text for one in balances for text in one.labels], along("shares"), along("complete"), along("drops")
    )


# ---- contrasts and verdict ---------------------------------------------------------------------------------------


def differences(
    names: Sequence[str], balance: Balance, scores: Mapping[str, Scores]
) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts (S, F) with the effect of interest of each: slopes, pairs, and all against the best single modality."""
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}

    def add(name: str, values: np.ndarray, claim: str, effect: float, route: str | None = None) -> None:
        named[name], effects[name] = Difference(values, claim, route is not None, route or ""), effect

    for outcome, complete in balance.complete.items():
        word, effect = WORDS[outcome], EFFECTS[outcome]
        drop, dev, test = balance.worst_drop(outcome), scores["dev"][outcome], scores["test"][outcome]
        text, unit = "the worst drop rises with imbalance", effect / RANGE
        add(f"{word}: worst drop over imbalance", slopes(balance.imbalance, drop), text, unit, word)
        text, left = "the score without the worst modality falls with imbalance", complete - drop
        add(f"{word}: score left, fall over imbalance", -slopes(balance.imbalance, left), text, unit, word)
        pairs = [one for one in test if one.count("+") == 1 and len(names) > 2]
        if pairs:
            best, worst = (chosen(test, pairs, on_dev(dev, pairs, one)) for one in (True, False))
            text = "the pair that is best on dev does better than the one that is worst there"
            add(f"{word}: best pair over worst pair", best - worst, text, effect, word)
        over = test[label(names)] - chosen(test, names, on_dev(dev, names))
        add(f"{word}: all over the best single modality", over, "all do better than the best on dev", effect)
        mean_drop = balance.drops[outcome].mean(-1)
        add(
            f"{word}: mean drop over imbalance",
            slopes(balance.imbalance, mean_drop),
            "so does the mean",
            effect / RANGE,
        )
    return named, effects


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(S, F): least-squares slope of y on x over P settings, both (P, S, F); 0 where x does not vary."""
    x = x - x.mean(0)
    numerator, denominator = (x * y).sum(0), (x * x).sum(0)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 1e-12)


def verdict_of_dial(balance: Balance, verdict: Verdict) -> tuple[Verdict, str]:
    """The verdict, or none where the dial did not move the imbalance; with a sentence."""
    moved = float(balance.imbalance.std(0).mean())
    text = f" Imbalance varies by {moved:.2f} (standard deviation) over the settings of the dial."
    return (verdict, text) if moved >= LEAST_RANGE else ("not identified", f"{text} That is too little for a verdict.")


def answer(contrasts: Sequence[Contrast]) -> str:
    """The estimates that decide in one sentence."""
    return "; ".join(f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts if c.decides) + "."


# ---- text and figure ---------------------------------------------------------------------------------------------


def numbers_of(
    data: FoldedDataset,
    names: Sequence[str],
    balance: Balance,
    scores: Mapping[str, Scores],
) -> dict[str, object]:
    """Everything in table and figure, JSON-able: (S * repeats,) each, of the dial also (S, F)."""
    of_settings = {
        text: {
            "share of variance": {
                label([names[m] for m in s]): by_repeat(data, x[p]).tolist() for s, x in balance.shares.items()
            },
            "contribution": {name: balance.contributions[p, ..., m].tolist() for m, name in enumerate(names)},
            "imbalance": balance.imbalance[p].tolist(),
            "score": {WORDS[one]: x[p].tolist() for one, x in balance.complete.items()},
            "worst drop": {WORDS[one]: balance.worst_drop(one)[p].tolist() for one in balance.drops},
            "drop without": {
                WORDS[one]: {name: drops[p, ..., m].tolist() for m, name in enumerate(names)}
                for one, drops in balance.drops.items()
            },
        }
        for p, text in enumerate(balance.labels)
    }
    of_subsets = {
        part: {
            WORDS[one]: {text: by_repeat(data, x).tolist() for text, x in by_subset.items()}
            for one, by_subset in by_outcome.items()
        }
        for part, by_outcome in scores.items()
    }
    return {"subsets": of_subsets, "settings of all modalities": of_settings}


def table(
    data: FoldedDataset,
    names: Sequence[str],
    balance: Balance,
    test: Scores,
) -> str:
    """Fixed-width: one line per subset, then one per setting of the dial; mean +- std over seeds."""
    words = {outcome: WORDS[outcome] for outcome in test}
    width = max(map(len, [*next(iter(test.values())), *balance.labels]))
    lines = ["mean +- std over seeds, larger is better (losses and errors negative)", "subsets, the others never seen"]
    lines.append(f"{'':{width}}" + "".join(f"  {word:>17}" for word in words.values()))
    for text in next(iter(test.values())):
        cells = [mean_std(by_repeat(data, by_subset[text])) for by_subset in test.values()]
        lines.append(f"{text:{width}}" + "".join(f"  {cell:>17}" for cell in cells))
    columns = {f"{name} contributes": balance.contributions[..., m] for m, name in enumerate(names)}
    columns |= {"imbalance": balance.imbalance}
    columns |= {word: balance.complete[outcome] for outcome, word in words.items()}
    columns |= {f"worst drop, {word}": balance.worst_drop(outcome) for outcome, word in words.items()}
    wide = [max(17, len(text)) for text in columns]
    lines += ["", "the dial, and what is lost where the worst modality is missing"]
    lines.append(f"{'':{width}}" + "".join(f"  {text:>{w}}" for text, w in zip(columns, wide, strict=True)))
    for p, text in enumerate(balance.labels):
        cells = [mean_std(by_repeat(data, x[p])) for x in columns.values()]
        lines.append(f"{text:{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, wide, strict=True)))
    return "\n".join(lines)


def draw(
    figure: Figure,
    data: FoldedDataset,
    names: Sequence[str],
    balance: Balance,
    test: Scores,
) -> None:
    """Contributions along the dial, and imbalance against the worst drop by both outcomes, a dot per fold."""
    left, *others = figure.subplots(1, 1 + len(test))
    places, below = np.arange(len(balance.labels)), np.zeros(len(balance.labels))
    for m, name in enumerate(names):
        mean = balance.contributions[..., m].mean((1, 2))
        left.barh(places, mean, left=below, color=f"C{m}", label=name)
        below = below + mean
    left.set_yticks(places, balance.labels)
    left.invert_yaxis()
    left.set(title="whose variance? (mean)", xlabel="share of the prediction's variance")
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    levels = (len(places) - 1) // len(names)
    for axis, outcome in zip(others, test, strict=True):
        for p, text in enumerate(balance.labels):
            color, marker = ("black", "o") if p == 0 else (f"C{(p - 1) // levels}", "^sD"[(p - 1) % levels])
            x, y = balance.imbalance[p].ravel(), balance.worst_drop(outcome)[p].ravel()
            axis.scatter(x, y, s=22, alpha=0.7, c=color, marker=marker, label=text)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(title="one dot per seed and fold", xlabel="imbalance", ylabel=f"worst drop of test {WORDS[outcome]}")
    handles, texts = others[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower right", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(f"{data.name}: contributions of the modalities and robustness to a missing one")


EXPERIMENT = Experiment(
    "modality_balance",
    "Robustness depends on the balance of the modalities' contributions; some pairs work better than others.",
    "Do models whose modalities contribute unevenly lose more when one is missing, and are some pairs better?",
    measure,
    modalities=2,
)

if __name__ == "__main__":
    main(EXPERIMENT)
