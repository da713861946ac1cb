"""Do rank factors correspond to distinct semantic interactions? What is identified of them, and what that tells.

    python -m experiments.rank_semantics --dataset cmu_mosi --data cmu_mosi_utterances.npz

Rank-4 jWAE-LMF. Its components on the test examples, and what identifies them:
- two modalities: s_k (z_1 - mean_1).p_k (z_2 - mean_2).q_k of `canonical_factors`, in the order of s_k. The layer's own
  rank terms are "not identified" if a random mixing of the ranks leaves the function unchanged (to `EXACT` of its
  standard deviation) and the matched correlation of the terms before and after is below `SAME`;
- three or more: the layer's rank terms, in the order of their share of the prediction's variance in training. They are
  unique if the k-ranks of the factors, as functions on the training latents, sum to at least 2 (R + 1) + M - 1, the
  bias b being one more rank-1 term (Kruskal 1977; Sidiropoulos & Bro 2000). As a check that decides nothing, the
  factors are shaken and refitted to the same function.
With several outputs everything is done for each output; means over outputs and folds are reported.

Verdict: all of (a) components of different seeds, matched, correlate more than permuted ones, (b) for any probe, a
component tells it beyond what the prediction tells, as an interval over seeds and as a permutation test over examples
(Holm over the probes; added after a simulation: seeds share the test examples, and without it a probe of pure noise
passes too often). (b) without probes, and (a) with two seeds, is "cannot tell"; three or more modalities without
Kruskal's condition in every layer is "not identified". That the components are *distinct* stands in the table and is no
part of the rule; nor is that what they tell is an *interaction*: rank terms of three modalities hold main effects too.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.experiment import SCORE_EFFECT, Experiment, Outcome, Run, contrasts_on_test
from experiments.rank_semantics.components import (
    Parts,
    ablation,
    other_terms,
    parts_of,
    per_seed,
    pseudovalues,
    stabilities,
)
from experiments.rank_semantics.lexicon import Probe, probe, probes_of
from experiments.rank_semantics.planted_factors import Recovery, planted_recoveries
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.statistics import LEVEL
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, combine, route_corrected
from mmfusion.models.identifiability import EXACT
from mmfusion.training.grid import JWAE, Setting

RANK = 4
EFFECT = 0.1  # smallest correlation (or recovery) of interest, above that of chance
SAME = 0.9  # matched correlation from which terms pass for the same
STABLE = "components are stable over seeds"
TELLS = "a component tells {}"


@dataclass
class SemanticsResult:
    """All that the table and the figure show."""

    share: np.ndarray  # (S, K) of the prediction's variance
    std: np.ndarray  # (S, K) of the components, in standard deviations of the prediction's target
    lost: np.ndarray  # (K, S, n) of the score, where a component is replaced by its training mean
    stable: dict[str, tuple[np.ndarray, np.ndarray]]  # {what: (S, S) own, null}
    probes: dict[str, Probe]
    two: bool  # two modalities
    change: float  # of the function by other terms, in its standard deviations, largest over seeds
    after: np.ndarray  # (S,) matched correlation of the layers' terms and those
    kruskal: float  # share of layers in which the condition holds
    smallest: float  # singular value of the factors
    planted: dict[int, Recovery]
    components: str  # what they are


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train, take apart, compare; see the module's docstring for the rule of the verdict."""
    grid = run.grid(data, [Setting(f"jWAE, rank {RANK}", RANK, JWAE)], "semantics")
    folds, seeds = data.folds, range(len(run.seeds))
    features = data.pool.features
    parts = [[parts_of(grid.model(0, s, f), features, rows) for f, rows in enumerate(folds)] for s in seeds]
    values, notes = probes_of(data)
    planted = {}
    if run.options.dataset == "demo":  # synthetic, needs no data set; goes with the demo so that it runs anywhere
        planted = planted_recoveries(run.seeds, run.device, run.checkpoints)
    two = len(features) == 2
    others = np.array([other_terms(grid.model(0, s), features, folds[0], s) for s in seeds])  # (S, 2)
    result = SemanticsResult(
        share=np.array([np.mean([p.share.mean(0) for p in member], 0) for member in parts]),
        std=np.array([np.mean([(p.std / _scale(p, data)).mean(0) for p in member], 0) for member in parts]),
        lost=ablation(parts, data),
        stable=stabilities(parts, two),
        probes={
            name: probe(
                [[p.components for p in member] for member in parts],
                [[p.prediction for p in member] for member in parts],
                [column[fold.test.numpy()] for fold in folds],
            )
            for name, column in values.items()
        },
        two=two,
        change=float(others[:, 0].max()),
        after=others[:, 1],
        kruskal=float(np.mean([p.kruskal for member in parts for p in member])),
        smallest=min(p.smallest for member in parts for p in member),
        planted=planted,
        components="canonical components" if two else "rank terms",
    )
    named, effects = differences(result)
    contrasts = contrasts_on_test(data, named, effects)
    verdict = judge_semantics(contrasts, result)
    notes += notes_of(result, data)
    return Outcome(
        table(result, data),
        contrasts,
        verdict,
        answer(result),
        numbers(result),
        lambda figure: draw(figure, data, result),
        (4.2 * (2 + bool(result.probes) + bool(planted)), 4.4),
        notes,
    )


def _scale(part: Parts, data: FoldedDataset) -> np.ndarray:
    """(O, 1): what a component's size is compared with: the target's deviation, 1 for logits."""
    return data.target_scale.numpy()[:, None]


def differences(result: SemanticsResult) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts as the claim orients them, and the smallest effect of interest of each."""
    named = {}
    own, null = result.stable["components"]
    if len(own) > 2:  # two seeds make one pair, without any spread
        named[STABLE] = Difference(
            pseudovalues(own - null), "matched components of two seeds correlate more than permuted ones"
        )
    for name, one in result.probes.items():
        claim = f"the component that tells the {name} best does so beyond the prediction and beyond chance"
        named[TELLS.format(name)] = Difference(one.partial_association - one.null, claim)
    lost = "dropping the strongest component lowers the score"
    named[lost] = Difference(
        result.lost[0], "the test score is lower where that component is replaced by its mean", False
    )
    if result.planted:
        two, three = result.planted[2], result.planted[3]
        named["2 modalities: canonical over raw"] = Difference(
            two.canonical - two.raw, "canonical factors are the planted ones", False
        )
        named["3 modalities: raw factors recovered above null"] = Difference(
            three.raw - three.null, "so are rank factors", False
        )
    return named, {name: SCORE_EFFECT if name == lost else EFFECT for name in named}


def judge_semantics(contrasts: Sequence[Contrast], result: SemanticsResult) -> Verdict:
    """The rule of the module's docstring."""
    of = {c.name: c.verdict for c in contrasts}
    probes: list[Verdict] = []
    p_values = np.array([one.p for one in result.probes.values()])
    corrected = route_corrected(p_values, p_values > -1, list(result.probes)) if len(p_values) else p_values
    for name, p in zip(result.probes, corrected, strict=True):
        over_seeds = of[TELLS.format(name)]
        probes.append("cannot tell" if over_seeds == "supported" and p >= LEVEL else over_seeds)
    parts: list[Verdict] = [of.get(STABLE, "cannot tell"), combine(probes, "any") if probes else "cannot tell"]
    return combine(parts if result.two or result.kruskal == 1 else [*parts, "not identified"], "all")


def raw_verdict(result: SemanticsResult) -> str:
    """What is identified of the layers' own rank terms."""
    if result.two:
        unidentified = result.change < EXACT and result.after.mean() < SAME
        return (
            f"raw rank terms {'are not identified' if unidentified else 'were not shown to be arbitrary'}: random "
            f"mixings change the function by {result.change:.0e} of its std, and leave a matched correlation of "
            f"{result.after.mean():.2f}"
        )
    return (
        f"Kruskal's condition, under which the terms are unique, holds in {result.kruskal:.0%} of the layers; shaken "
        f"and refitted to the same function (within {result.change:.0e} of its std) their matched correlation is "
        f"{result.after.mean():.2f}"
    )


def notes_of(result: SemanticsResult, data: FoldedDataset) -> list[str]:
    """What the reader of the verdict must know."""
    notes = []
    if not result.two:
        notes.append(
            "Kruskal's condition is sufficient, not necessary; smallest singular value of factors scaled to unit mean "
            f"square {result.smallest:.1e}"
        )
    notes.append("stability: seeds share pairs, so its interval is of jackknife pseudo-values, not of means per seed")
    if result.probes:
        notes.append(
            "probes: intervals are over seeds, on these test examples, and their p is too small for that; "
            "the verdict also asks for p (permuted), over examples"
        )
        if "speaker" in result.probes:
            notes.append("probes: the features carry the speaker (voice, face, wording) by themselves")
        if "group" in data.pool.metadata:
            notes.append("probes: examples are permuted one by one, as if those of one group were not alike")
    unfitted = {m: int((one.r2 < 0.95).sum()) for m, one in result.planted.items() if (one.r2 < 0.95).any()}
    notes += [f"planted, {m} modalities: {n} training(s) did not fit (R^2 < .95)" for m, n in unfitted.items()]
    return notes


def answer(result: SemanticsResult) -> str:
    """One sentence of numbers."""
    own, null = (per_seed(x).mean() for x in result.stable["components"])
    given = per_seed(result.stable["given the prediction"][0]).mean()
    text = (
        f"{result.components.capitalize()} of two seeds, matched, correlate {own:.2f} (permuted {null:.2f}; "
        f"{given:.2f} given the prediction)"
    )
    if result.probes:
        name, one = max(result.probes.items(), key=lambda item: (item[1].partial_association - item[1].null).mean())
        text += (
            f"; the probe told best is {name}, {one.partial_association.mean():.2f} (permuted {one.null.mean():.2f})"
        )
    return f"{text}; {raw_verdict(result)}."


def table(result: SemanticsResult, data: FoldedDataset) -> str:
    """Fixed width, mean +- std over seeds: components, stability, probes, planted factors."""
    unit_of = "logits" if data.task == "binary" else "target std"
    lines = [
        f"{result.components}, strongest first; mean +- std over seeds",
        f"{'':4}{f'std ({unit_of})':>20}{'share of variance':>20}{'score lost without':>20}",
    ]
    for k, lost in enumerate(result.lost):
        cells = (mean_std(result.std[:, k]), mean_std(result.share[:, k]), mean_std(lost.mean(-1), 4))
        lines.append(f"{k + 1:<4}" + "".join(f"{cell:>20}" for cell in cells))
    lines += ["", f"{'matched |correlation| of two seeds':36}{'own':>18}{'permuted':>18}"]
    for kind, pairs in result.stable.items():
        lines.append(f"{kind:36}" + "".join(f"{mean_std(per_seed(x)):>18}" for x in pairs))
    how = "mixing" if result.two else "refit"
    lines.append(f"{f'raw terms before and after a {how}':36}{mean_std(result.after):>18}")
    if result.probes:
        lines += ["", f"{'probe':12}{'told best':>18}{'permuted':>18}{'p (permuted)':>14}   best component 1 .. {RANK}"]
    for name, one in result.probes.items():
        shares = " ".join(f"{share:.2f}" for share in best_shares(one))
        lines.append(
            f"{name:12}{mean_std(one.partial_association):>18}{mean_std(one.null):>18}{one.p:14.3f}   {shares}"
        )
    for (a, b), share in distinct(result).items():
        lines.append(f"{a} and {b}: told best by different components in {share:.0%} of trainings")
    if result.planted:
        lines += ["", f"{'planted factors, similarity':28}{'R^2':>18}{'raw':>18}{'canonical':>18}{'random (95 %)':>18}"]
    for m, one in result.planted.items():
        canonical = "-" if one.canonical is None else mean_std(one.canonical)
        cells = (mean_std(one.r2), mean_std(one.raw), canonical, f"{one.null:.3f} ({one.null95:.3f})")
        lines.append(f"{f'{m} modalities':28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def best_shares(one: Probe) -> np.ndarray:
    """(K,) share of trainings (seeds x folds x outputs) in which each component tells the probe best."""
    return np.bincount(one.best.ravel(), minlength=RANK) / one.best.size


def distinct(result: SemanticsResult) -> dict[tuple[str, str], float]:
    """{(probe, probe): share of trainings in which different components tell them best}."""
    pairs = itertools.combinations(result.probes.items(), 2)
    return {(a, b): float((x.best != y.best).mean()) for (a, x), (b, y) in pairs}


def numbers(result: SemanticsResult) -> dict[str, object]:
    """Everything in the table, JSON-able; lists over seeds."""
    entries = {
        "std": result.std.tolist(),
        "share": result.share.tolist(),
        "score lost": result.lost.mean(-1).T.tolist(),
        "stability": {kind: [per_seed(x).tolist() for x in pairs] for kind, pairs in result.stable.items()},
        "probes": {
            name: {
                "told": one.partial_association.tolist(),
                "permuted": one.null.tolist(),
                "p": one.p,
                "best": one.best.tolist(),
            }
            for name, one in result.probes.items()
        },
        "different best components": {f"{a}, {b}": share for (a, b), share in distinct(result).items()},
        "other terms": {"largest change": result.change, "matched correlation": result.after.tolist()},
        "kruskal": {"share of layers": result.kruskal, "smallest singular value": result.smallest},
    }
    for m, one in result.planted.items():
        entries[f"planted, {m} modalities"] = {
            key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in one._asdict().items()
        }
    return entries


# ---- figure ------------------------------------------------------------------------------------------------------


def draw(figure: Figure, data: FoldedDataset, result: SemanticsResult) -> None:
    """Stability, ablation, probes, planted factors; a dot per seed, a bar for the mean, a line for chance."""
    stable = {kind: (per_seed(own), per_seed(null).mean()) for kind, (own, null) in result.stable.items()}
    stable["before/after mixing" if result.two else "before/after refit"] = (result.after, None)
    axes = iter(figure.subplots(1, 2 + bool(result.probes) + bool(result.planted), squeeze=False)[0])
    bars(
        next(axes),
        {kind.replace(" ", "\n").replace("/", "/\n"): values for kind, values in stable.items()},
        f"{result.components} of two seeds",
        "matched |correlation|",
        (0, 1.05),
    )
    lost = {f"{k + 1}": (x.mean(-1), None) for k, x in enumerate(result.lost)}
    axis = next(axes)
    bars(axis, lost, "one component dropped", f"{data.score_name} lost on test", None)
    axis.set_xlabel("component, strongest first")
    axis.axhline(0, color="black", linewidth=0.8)
    if result.probes:
        partial_association = {name: (one.partial_association, one.null.mean()) for name, one in result.probes.items()}
        bars(
            next(axes), partial_association, "told by the best component", "association given the prediction", (0, None)
        )
    if result.planted:
        cells = {}
        for m, one in result.planted.items():
            cells[f"{m} modal.\nraw"] = (one.raw, one.null)
            if one.canonical is not None:
                cells[f"{m} modal.\ncanonical"] = (one.canonical, one.null)
        bars(next(axes), cells, "planted factors recovered", "similarity to the planted", (0, 1.05))
    figure.suptitle(f"{data.name}: rank factors (bar: mean; dots: seeds; dashed: chance)")


def bars(
    axis: Axes,
    cells: dict[str, tuple[np.ndarray, float | None]],
    title: str,
    label: str,
    limits: tuple[float, float | None] | None,
) -> None:
    """A bar for each label: mean of the seeds' values, the values themselves, and chance where there is one."""
    for x, (values, chance) in enumerate(cells.values()):
        axis.bar(x, values.mean(), color="C0", alpha=0.35, width=0.7)
        axis.plot(x + np.linspace(-0.15, 0.15, len(values)), values, "o", color="C0", markersize=3)
        if chance is not None:
            axis.plot([x - 0.4, x + 0.4], [chance] * 2, "--", color="C3", linewidth=1.5)
    axis.set_xticks(range(len(cells)), list(cells))
    axis.set(title=title, ylabel=label, ylim=limits)


EXPERIMENT = Experiment(
    "rank_semantics",
    "Rank factors correspond to distinct semantic interactions.",
    "Are rank factors identified, stable over seeds, and do they tell what the prediction alone does not?",
    measure,
    modalities=2,
)
