"""What inner folds of the training examples say of interaction, rank, amount of data and modalities.

Everything is measured on examples that the members have not seen, and never on a test split: train and the selection
split are pooled and cut into K inner folds. d[s, n] is the paired difference of seed s on example n throughout
(`mmfusion.metrics.statistics`); the score is accuracy, balanced
accuracy where a class prevails (`mmfusion.diagnose.inner.inner_scoring`), or -MAE / std of the target.

    interaction   score of a fusion model - score of its EMAP, the best additive approximation of that very model
                  (Hessel & Lee, EMNLP 2020): about 0, or below, where it only adds up; and less a linear readout of
                  the same latents, fitted anew: about 0 where interactions are used but not needed
    rank          the smallest rank that no larger one beats, over all pairs of ranks, Holm's correction
    detectable    (z_.975 + z_.8) standard errors of the difference between the two largest ranks, from its variance
                  components: what these examples and seeds would show in four cases of five between two models as
                  alike as these (of one modality: between the model and a constant)
    modality      its score alone, what is lost where a model is trained without it, and its share of the prediction's
                  variance (Shapley value of the exact parts)
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri

from mmfusion.dataset import Dataset, Task
from mmfusion.diagnose.additive import emap_outputs, readout_outputs
from mmfusion.diagnose.inner import (
    Budget,
    chance_scores,
    hidden_scores,
    inner_folds,
    inner_recipe,
    inner_scoring,
    inner_settings,
    tested_groups,
)
from mmfusion.metrics.scores import example_losses
from mmfusion.metrics.statistics import crossed_bootstrap, grouped, seeds_needed, variance_components
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, corrected_contrasts, verdict_of
from mmfusion.models.decomposition import contributions, variance_shares
from mmfusion.models.exact import exact_layer, latents_of
from mmfusion.training.grid import Grid, per_example, train_grid

MOST_SUBSETS = 10  # modalities: 2^10 parts of the variance
POWER = float(ndtri(0.975) + ndtri(0.8))


@dataclass(frozen=True)
class Modality:
    """What one modality carries; scores are means over seeds and examples."""

    name: str
    alone: float
    """score of models that see it alone"""
    alone_interval: tuple[float, float]
    """95 %, over seeds and examples"""
    lost_without: Contrast | None
    """score of all modalities less that of models trained without it; None of the only one"""
    share: float
    """of the variance of the held-out predictions of models of all; NaN where there are too many modalities"""


@dataclass(frozen=True)
class Diagnosis:
    """What inner folds say; contrasts are differences of `score`, larger is better."""

    name: str
    task: Task
    score: str
    examples: int
    groups: int | None
    """how many groups the examples come in, which are what is resampled then"""
    chance: float
    """score of the most frequent class, label by label, or of the median, of each inner training part"""
    over_chance: list[Contrast]
    """of every rank, and of every modality alone, less the constant"""
    full: float
    """score of all modalities at `reference_rank`"""
    reference_rank: int
    interaction: Contrast | None
    """full model less its EMAP; None for one modality"""
    over_readout: Contrast | None
    """full model less a linear readout of its latents, fitted anew: whether interactions are needed"""
    interaction_loss: float | None
    """by how much the EMAP's loss (cross-entropy, or squared error / variance) is larger than the model's"""
    rank_scores: dict[int, np.ndarray]
    """{rank: (S,) score}"""
    rank_contrasts: list[Contrast]
    """of every pair of ranks, larger less smaller"""
    rank: int
    """the smallest that no larger one beats"""
    detectable: float
    """smallest difference that these examples and seeds show with a power of 80 %"""
    examples_needed: int
    """about how many show `budget.effect` in the limit of many seeds (groups, where examples come in groups)"""
    seeds_needed: int | None
    """to see `budget.effect` on these examples; None where no number of seeds would do"""
    modalities: list[Modality]
    parts: dict[tuple[str, ...], float]
    """share of the predictions' variance of every set of modalities; empty where there are too many"""
    budget: Budget
    trainings: int
    seconds: float
    notes: list[str]

    @property
    def interacts(self) -> Verdict | None:
        """The interaction is used, and it is needed; None for one modality."""
        if self.interaction is None:
            return None
        return verdict_of([self.interaction, self.over_readout])

    @property
    def learns(self) -> bool:
        """True where anything beats a constant."""
        return any(contrast.verdict == "supported" for contrast in self.over_chance)

    @property
    def enough_data(self) -> bool:
        """True where the smallest effect of interest would be seen."""
        return self.detectable <= self.budget.effect


def diagnose(
    datasets: Dataset | Sequence[Dataset], budget: Budget | None = None, device: str | torch.device = "cpu"
) -> Diagnosis:
    """Train small grids on inner folds of the training examples, and say what they support.

    Args:
        datasets: one, or the folds of one, of which the first's training and selection examples are taken.
        budget: default: 2000 examples of six modalities, 649 numbers each, take about a minute on two quiet cores.
        device: where the members are trained.

    Raises InputError where there are too few examples for the inner folds, or a setting is out of range.
    """
    started = time.perf_counter()
    budget = budget or Budget()
    budget.check()
    data = inner_folds(datasets if isinstance(datasets, Dataset) else datasets[0], budget)
    names = list(data.input_dims)
    several = len(names) > 1
    ranks = sorted(budget.ranks) if several else [1]
    reference = min(ranks, key=lambda rank: (abs(rank - 4), rank))
    grid = train_grid(
        data,
        inner_settings(names, ranks, reference),
        list(range(budget.seeds)),
        inner_recipe(data, budget),
        device=device,
        title=f"diagnose {data.name}",
    )
    scoring = inner_scoring(data)
    scores, chance = hidden_scores(grid, scoring.of), chance_scores(data, scoring.of)
    groups = tested_groups(data)
    compared = [*(f"rank {rank}" for rank in ranks), *(f"{name} alone" for name in names if several)]
    over_chance = corrected_contrasts(
        {
            f"{label} over a constant": Difference(scores[label] - chance, f"{label} tells something", route=label)
            for label in compared
        },
        budget.effect,
        clusters=groups,
    )

    full = scores[f"rank {reference}"]
    interaction = over_readout = loss = None
    rank_contrasts: list[Contrast] = []
    if several:
        place = grid.index(f"rank {reference}")
        additive, readout = emap_outputs(grid, place), readout_outputs(grid, place)
        gaps = [full - per_example(data, said, "test", scoring.of) for said in (additive, readout)]
        claims = {
            "fusion over its EMAP": "the model makes use of interactions",
            "fusion over a linear readout": "interactions are needed: a linear readout of the same latents does worse",
        }
        named = {name: Difference(d, claims[name]) for name, d in zip(claims, gaps, strict=True)}
        interaction, over_readout = corrected_contrasts(named, budget.effect, clusters=groups)
        loss = float((per_example(data, additive, "test", example_losses) - grid.losses()[place]).mean())
        pairs = [(low, high) for k, low in enumerate(ranks) for high in ranks[k + 1 :]]
        rank_contrasts = _rank_contrasts(scores, pairs, groups, budget.effect)
    detectable, examples_needed, more_seeds = _power(scores, ranks, full - chance, groups, budget.effect)
    beaten = {c.name.split(" over ")[1] for c in rank_contrasts if c.verdict == "supported"}
    supported = next((rank for rank in ranks if f"rank {rank}" not in beaten), ranks[-1])
    parts = _parts(grid, grid.index(f"rank {reference}")) if len(names) <= MOST_SUBSETS else {}
    return Diagnosis(
        name=data.name,
        task=data.task,
        score=scoring.name,
        examples=len(data.test_rows),
        groups=None if groups is None else len(set(groups)),
        chance=float(chance.mean()),
        over_chance=list(over_chance),
        full=float(full.mean()),
        reference_rank=reference,
        interaction=interaction,
        over_readout=over_readout,
        interaction_loss=loss,
        rank_scores={rank: scores[f"rank {rank}"].mean(1) for rank in ranks},
        rank_contrasts=rank_contrasts,
        rank=supported,
        detectable=detectable,
        examples_needed=examples_needed,
        seeds_needed=more_seeds,
        modalities=_modalities(names, scores, full, parts, groups, budget.effect),
        parts={tuple(names[m] for m in subset): share for subset, share in parts.items()},
        budget=budget,
        trainings=len(grid.models),
        seconds=time.perf_counter() - started,
        notes=[*data.notes, *([scoring.note] if scoring.note else [])],
    )


# ---- figures -------------------------------------------------------------------------------------------------------


def _rank_contrasts(
    scores: dict[str, np.ndarray], pairs: Sequence[tuple[int, int]], groups: Sequence[str] | None, effect: float
) -> list[Contrast]:
    named = {
        f"rank {high} over rank {low}": Difference(
            scores[f"rank {high}"] - scores[f"rank {low}"], f"rank {high} scores higher", route=f"{low}, {high}"
        )
        for low, high in pairs
    }
    return corrected_contrasts(named, effect, clusters=groups) if named else []


def _modalities(
    names: Sequence[str],
    scores: dict[str, np.ndarray],
    full: np.ndarray,
    parts: dict[tuple[int, ...], float],
    groups: Sequence[str] | None,
    effect: float,
) -> list[Modality]:
    lost: list[Contrast | None] = [None] * len(names)
    if len(names) > 1:
        others = {
            name: scores[f"without {name}" if len(names) > 2 else f"{names[1 - k]} alone"]
            for k, name in enumerate(names)
        }
        named = {
            name: Difference(full - without, f"{name} holds what the others do not", route=name)
            for name, without in others.items()
        }
        lost = list(corrected_contrasts(named, effect, clusters=groups))
    shares = contributions(parts, len(names)) if parts else np.full(len(names), np.nan)
    found = []
    for m, name in enumerate(names):
        alone = scores[f"{name} alone"] if len(names) > 1 else full
        interval = crossed_bootstrap(alone, clusters=groups)
        found.append(Modality(name, float(alone.mean()), (interval.low, interval.high), lost[m], float(shares[m])))
    return found


@torch.no_grad()
def _parts(grid: Grid, place: int) -> dict[tuple[int, ...], float]:
    """Share of each subset in the variance of held-out predictions, mean over seeds and folds."""
    shares = []
    for s in range(len(grid.seeds)):
        for f, fold in enumerate(grid.data.folds):
            member = grid.model(place, s, f)
            features = {name: x[fold.test] for name, x in grid.data.pool.features.items()}
            shares.append(variance_shares(exact_layer(member), latents_of(member, features)))
    return {subset: float(np.mean([share[subset] for share in shares])) for subset in shares[0]}


def _power(
    scores: dict[str, np.ndarray],
    ranks: Sequence[int],
    over_chance: np.ndarray,
    groups: Sequence[str] | None,
    effect: float,
) -> tuple[float, int, int | None]:
    """Smallest difference that is seen with a power of 80 %; examples, and seeds, that `effect` needs."""
    d = over_chance
    if len(ranks) > 1:
        d = scores[f"rank {ranks[-1]}"] - scores[f"rank {ranks[-2]}"]
    d = grouped(d, groups)
    seeds, units = d.shape
    v = variance_components(d)
    variance = v.seed / seeds + v.example / units + v.interaction / (seeds * units)
    examples = math.ceil(v.example * (POWER / effect) ** 2)
    return POWER * variance**0.5, max(1, examples), seeds_needed(d, effect)
