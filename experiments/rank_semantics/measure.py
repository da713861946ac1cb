"""Do rank factors correspond to distinct semantic interactions? What is identified of them, and what that tells.

    python -m experiments.rank_semantics --dataset cmu_mosi --data mosi.npz --cross-validate 5 --repeats 2

Rank-4 jWAE-LMF. Its components on the test examples, and what identifies them:
- two modalities: s_k (z_1 - mean_1).p_k (z_2 - mean_2).q_k of `canonical_factors`, in the order of s_k. The layer's own
  rank terms are "not identified" if a random mixing of the ranks leaves the function unchanged (to `EXACT` of its
  standard deviation) and the matched correlation of the terms before and after is below `SAME`;
- three or more: the layer's rank terms, in the order of their share of the prediction's variance in training. They are
  unique if the k-ranks of the factors, as functions on the training latents, sum to at least 2 (R + 1) + M - 1, the
  bias b being one more rank-1 term (Kruskal 1977; Sidiropoulos & Bro 2000). As a check that decides nothing, the
  factors are shaken and refitted to the same function.
With several outputs everything is done for each output, and means over outputs are reported. Every fold is trained from
three starts at least: a pair of starts that saw the same examples is what stability is measured on.

A route for each probe (polarity, length, speaker), any of which will do (Holm): (a) a component tells the probe beyond
what the prediction tells and beyond permuted probes, and (b) what the components that tell it best in two starts say
beyond the prediction correlates more than permuted, so that it is one component and not another in every start. (a)
must hold in a permutation test over examples, too: folds of several repeats share theirs. Supported: a probe with both.
Not supported: of every probe, (a) or (b) is shown to be absent or too small. With two starts of one fold, "cannot
tell". "Not identified" where there are no probes, for then nothing was asked, and for three or more modalities without
Kruskal's condition in every layer. Stability of all components decides nothing: it holds of main effects that no probe
names. That components are *distinct* stands in the table and is no part of the rule; nor is that what they tell is an
*interaction*: rank terms of three modalities hold main effects too. Positive control: planted factors
(`planted_factors`, with the demo).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from experiments.experiment import SCORE_EFFECT, Experiment, Outcome, Run, contrasts_on_test
from experiments.rank_semantics.components import (
    Parts,
    ablation,
    other_terms,
    over_pairs,
    parts_of,
    stabilities,
)
from experiments.rank_semantics.lexicon import probe, probes_of
from experiments.rank_semantics.planted_factors import planted_recoveries
from experiments.rank_semantics.report import SemanticsResult, answer, draw, numbers, table
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.statistics import LEVEL
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, route_corrected, verdict_of
from mmfusion.training.grid import JWAE, Setting

RANK = 4
EFFECT = 0.1  # smallest correlation (or recovery) of interest, above that of chance
STARTS = 3  # of every fold, at least: a stability needs pairs
STABLE = "components are stable over starts"
TELLS = "a component tells {}"
ONE = "one component tells {}"


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train, take apart, compare; see the module's docstring for the rule of the verdict."""
    run = replace(run, options=replace(run.options, seeds=max(STARTS, run.options.seeds)))
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
        share=np.moveaxis([[p.share.mean(0) for p in member] for member in parts], -1, 0),
        std=np.moveaxis([[(p.std / _scale(p, data)).mean(0) for p in member] for member in parts], -1, 0),
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
    if (values := over_pairs(own - null)) is not None:
        named[STABLE] = Difference(values, "matched components of two starts correlate more than permuted ones", False)
    for name, one in result.probes.items():
        claim = f"the component that tells the {name} best does so beyond the prediction and beyond chance"
        named[TELLS.format(name)] = Difference(one.partial_association - one.null, claim, route=name)
        if (values := over_pairs(one.same - one.same_null)) is not None:
            claim = f"what the components say that tell the {name} best in two starts is alike, beyond chance"
            named[ONE.format(name)] = Difference(values, claim, route=name)
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
    if not result.probes or (not result.two and result.kruskal < 1):
        return "not identified"
    p_values = np.array([one.p for one in result.probes.values()])
    corrected = route_corrected(p_values, p_values > -1, list(result.probes))
    chance = {TELLS.format(name) for name, p in zip(result.probes, corrected, strict=True) if p >= LEVEL}
    judged = [
        replace(c, verdict="cannot tell") if c.name in chance and c.verdict == "supported" else c for c in contrasts
    ]
    verdict = verdict_of(judged)
    has_pairs = any(c.name == STABLE for c in contrasts)
    return verdict if has_pairs or verdict == "not supported" else "cannot tell"


def notes_of(result: SemanticsResult, data: FoldedDataset) -> list[str]:
    """What the reader of the verdict must know."""
    notes = []
    if not result.two:
        notes.append(
            "Kruskal's condition is sufficient, not necessary; smallest singular value of factors scaled to unit mean "
            f"square {result.smallest:.1e}"
        )
    if len(data.folds) == 1:
        notes.append(
            "stability: seeds share pairs, so its interval is of jackknife pseudo-values, not of means per seed"
        )
    if result.probes:
        if len(data.folds) == 1:
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


EXPERIMENT = Experiment(
    "rank_semantics",
    "Rank factors correspond to distinct semantic interactions.",
    "Are rank factors identified, stable over starts, and do they tell what the prediction alone does not?",
    measure,
    modalities=2,
)
