"""What inner folds of the training examples say of interaction, rank, amount of data and modalities.

Everything is measured on examples that the members have not seen, and never on a test split: train and the selection
split are pooled and cut into K inner folds. d[s, n] is the paired difference of seed s on example n throughout
(`mmfusion.metrics.statistics`); the score is `FoldedDataset.score_name`: accuracy, or -MAE / std of the target.

    interaction   score of a fusion model - score of its EMAP, the best additive approximation of that very model
                  (Hessel & Lee, EMNLP 2020); about 0, or below, where the modalities only add up
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

from mmfusion.data.array_cuts import cut_folds
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Dataset, Fold, Split, Task, take
from mmfusion.errors import InputError, check_numbers
from mmfusion.metrics.scores import example_losses, example_scores
from mmfusion.metrics.statistics import (
    Contrast,
    Difference,
    corrected_contrasts,
    crossed_bootstrap,
    grouped,
    seeds_needed,
    variance_components,
)
from mmfusion.models.decomposition import contributions, recentred, variance_shares
from mmfusion.models.exact import exact_layer, latents_of
from mmfusion.training.grid import Grid, Setting, per_example, train_grid
from mmfusion.training.recipe import Recipe

TERMS = ("mmd", "reconstruction")  # the pair alignment would let a left-out modality shape the others' encoders
MOST_SUBSETS = 10  # modalities: 2^10 parts of the variance
POWER = float(ndtri(0.975) + ndtri(0.8))


@dataclass(frozen=True)
class Budget:
    """What a diagnosis may cost: seconds to minutes, not an answer's last digit."""

    seeds: int = 2
    """trainings of every setting on every inner fold"""
    inner_folds: int = 3
    """inner folds, cut from train and dev"""
    inner_epochs: int = 25
    """passes over an inner training part; the last epoch is kept"""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """ranks that are compared"""
    effect: float = 0.01
    """smallest difference of score that would matter to you"""
    most_examples: int = 4000
    """more are not used: as many are drawn at random"""

    def check(self) -> None:
        """Raise InputError naming the first flag out of range."""
        bounds = {"seeds": (2, 64), "inner_folds": (2, 50), "inner_epochs": (1, 10_000), "effect": (1e-6, 10)}
        check_numbers(self, bounds | {"most_examples": (20, 1e7)})
        if not self.ranks or min(self.ranks) < 1 or max(self.ranks) > 64 or len(set(self.ranks)) < len(self.ranks):
            given = " ".join(map(str, self.ranks))
            raise InputError(f"--ranks {given}: give different ranks from 1 to 64, such as 1 2 4")


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
    full: float
    """score of all modalities at `reference_rank`"""
    reference_rank: int
    interaction: Contrast | None
    """full model less its EMAP; None for one modality"""
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
    def enough_data(self) -> bool:
        """True where the smallest effect of interest would be seen."""
        return self.detectable <= self.budget.effect


def diagnose(
    datasets: Dataset | Sequence[Dataset], budget: Budget | None = None, device: str | torch.device = "cpu"
) -> Diagnosis:
    """Train small grids on inner folds of the training examples, and say what they support.

    Args:
        datasets: one, or the folds of one, of which the first's training and selection examples are taken.
        budget: default about a minute for 2000 examples of six modalities on two cores.
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
        _settings(names, ranks, reference),
        list(range(budget.seeds)),
        _recipe(data, budget),
        device=device,
        title=f"diagnose {data.name}",
    )
    scores = _scores(grid)
    groups = _groups(data)

    full = scores[f"rank {reference}"]
    interaction = loss = None
    rank_contrasts: list[Contrast] = []
    if several:
        additive = emap_outputs(grid, grid.index(f"rank {reference}"))
        gap = full - per_example(data, additive, "test", example_scores)
        claim = "the modalities interact: the model is better than the additive part of itself"
        interaction = corrected_contrasts(
            {"fusion over its EMAP": Difference(grouped(gap, groups), claim)}, budget.effect
        )[0]
        of_model = grid.losses()[grid.index(f"rank {reference}")]
        loss = float((per_example(data, additive, "test", example_losses) - of_model).mean())
        pairs = [(low, high) for k, low in enumerate(ranks) for high in ranks[k + 1 :]]
        rank_contrasts = _rank_contrasts(scores, pairs, groups, budget.effect)
    detectable, examples_needed, more_seeds = _power(scores, ranks, full - chance_scores(data), groups, budget.effect)
    beaten = {c.name.split(" over ")[1] for c in rank_contrasts if c.verdict == "supported"}
    supported = next((rank for rank in ranks if f"rank {rank}" not in beaten), ranks[-1])
    parts = _parts(grid, grid.index(f"rank {reference}")) if len(names) <= MOST_SUBSETS else {}
    return Diagnosis(
        name=data.name,
        task=data.task,
        score=data.score_name,
        examples=len(data.test_rows),
        groups=None if groups is None else len(set(groups)),
        chance=float(chance_scores(data).mean()),
        full=float(full.mean()),
        reference_rank=reference,
        interaction=interaction,
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
        notes=data.notes,
    )


# ---- data and trainings --------------------------------------------------------------------------------------------


def inner_folds(dataset: Dataset, budget: Budget) -> FoldedDataset:
    """Train and selection split of a dataset, pooled and cut into inner folds; other splits are left alone."""
    splits = [dataset.splits[name] for name in dict.fromkeys(("train", dataset.selection))]
    columns = [c for c in splits[0].metadata if all(c in split.metadata for split in splits)]
    count = sum(map(len, splits))
    pool = Split(
        {name: torch.cat([split.features[name] for split in splits]) for name in sorted(splits[0].features)},
        torch.cat([split.target for split in splits]),
        [str(i) for i in range(count)],
        {c: [value for split in splits for value in split.metadata[c]] for c in columns},
    )
    notes = ["test examples were not looked at: all figures are of inner folds of train and dev"]
    if count > budget.most_examples:
        rows = np.sort(np.random.default_rng(0).choice(count, budget.most_examples, replace=False))
        pool = take(pool, rows)
        notes.append(f"{budget.most_examples} of {count} examples, drawn at random, were used")
    is_classes = dataset.task in ("binary", "multiclass")
    cuts, cut_notes = cut_folds(pool, budget.inner_folds, is_classes, 0, dataset.name)
    folds = [Fold(torch.from_numpy(rest), torch.from_numpy(test), torch.from_numpy(test)) for rest, test in cuts]
    kept = (dataset.provenance, dataset.label_range, dataset.class_names)
    return FoldedDataset(dataset.name, dataset.task, pool, folds, [*notes, *cut_notes], *kept)


def _settings(names: Sequence[str], ranks: Sequence[int], reference: int) -> list[Setting]:
    """Every rank with all modalities; each modality alone; all but each."""

    def hidden(kept: Sequence[str]) -> dict[str, float]:
        return {name: float(name not in kept) for name in names} if len(names) > 1 else {}

    settings = [Setting(f"rank {rank}", rank, TERMS, dropout=hidden(names)) for rank in ranks]
    if len(names) > 1:
        settings += [Setting(f"{name} alone", reference, TERMS, dropout=hidden([name])) for name in names]
    if len(names) > 2:  # of two, without one is the other alone
        settings += [
            Setting(f"without {name}", reference, TERMS, dropout=hidden([n for n in names if n != name]))
            for name in names
        ]
    return settings


def _scores(grid: Grid) -> dict[str, np.ndarray]:
    """{setting: (S, n)}; what a setting's models were trained without is hidden from them in testing too."""
    found = {}
    for place, setting in enumerate(grid.settings):
        hidden = [name for name, rate in setting.dropout.items() if rate == 1]
        found[setting.label] = grid.without(hidden, [place])[0]
    return found


def _recipe(data: FoldedDataset, budget: Budget) -> Recipe:
    # the study's recipe decays by 10, which turns latents into lines on which no rank can bind (docs/recipe.md)
    return Recipe(
        latent_dim=16,
        epochs=budget.inner_epochs,
        batch_size=64 if len(data.pool) < 1500 else 128,
        learning_rate=5e-3,
        weight_decay=1.0,
        modality_dropout=0.0,
    )


def _groups(data: FoldedDataset) -> list[str] | None:
    """Group of each tested example, fold after fold."""
    groups = data.pool.metadata.get("group")
    return None if groups is None else [groups[i] for i in data.test_rows.tolist()]


# ---- figures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def emap_outputs(grid: Grid, place: int) -> np.ndarray:
    """(S, n[, O]): the EMAP of every member of a setting on the tested examples, about their own mean latents.

    M + 1 passes: y is affine in each latent, so the others' average is their mean (`mmfusion.models.decomposition`).
    """
    data, seeds = grid.data, []
    for s in range(len(grid.seeds)):
        outputs = []
        for f, fold in enumerate(data.folds):
            member = grid.model(place, s, f)
            latents = latents_of(member, {name: x[fold.test] for name, x in data.pool.features.items()})
            layer = recentred(exact_layer(member), [z.mean(0) for z in latents])
            centred = [z - z.mean(0) for z in latents]
            zeros = [torch.zeros_like(z) for z in latents]
            base = layer(zeros)  # (n, O)
            alone = [layer([*zeros[:m], z, *zeros[m + 1 :]]) - base for m, z in enumerate(centred)]
            outputs.append((base + sum(alone)).numpy())
        seeds.append(np.concatenate(outputs))
    stacked = np.stack(seeds)
    return stacked if data.has_columns else stacked[..., 0]


def _rank_contrasts(
    scores: dict[str, np.ndarray], pairs: Sequence[tuple[int, int]], groups: Sequence[str] | None, effect: float
) -> list[Contrast]:
    named = {
        f"rank {high} over rank {low}": Difference(
            grouped(scores[f"rank {high}"] - scores[f"rank {low}"], groups), f"rank {high} scores higher"
        )
        for low, high in pairs
    }
    return corrected_contrasts(named, effect) if named else []


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
            name: Difference(grouped(full - without, groups), f"{name} holds what the others do not")
            for name, without in others.items()
        }
        lost = list(corrected_contrasts(named, effect))
    shares = contributions(parts, len(names)) if parts else np.full(len(names), np.nan)
    found = []
    for m, name in enumerate(names):
        alone = scores[f"{name} alone"] if len(names) > 1 else full
        interval = crossed_bootstrap(grouped(alone, groups))
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


def chance_scores(data: FoldedDataset) -> np.ndarray:
    """(n,) scores of a constant: the class (or label) that is most frequent in an inner training part; the median."""
    said = []
    for fold in data.folds:
        train = data.pool.target[fold.train]
        if data.task == "multiclass":
            row = torch.bincount(train.long(), minlength=data.output_dim).float()
        elif data.task == "regression":
            row = train.median(0).values
        else:
            row = (train.mean(0) >= 0.5).float() - 0.5  # a logit
        said.append(row.expand(len(fold.test), *row.shape))
    constant = torch.cat(said).numpy()[None]
    return per_example(data, constant, "test", example_scores)[0]
