"""Does the prior make the joint latent space linear? Rank needed, probes and interpolations, prior off and enforced.

    python -m experiments.latent_linearity --dataset cmu_mosi --data mosi.npz --cross-validate 5 --repeats 2

"Off": certain latents and the fit alone. "Enforced": Gaussian latents with the jWAE's terms (`jwae_ablation`).

Claim, one route, all four, each enforced over off, on the task's first primary outcome where there is one:
- rank: less is lost at rank 1 against rank 8;
- probes: an RBF kernel gains less over a linear one (ridges on the joined latents of rank 8, fitted on a fold's
  training part, strength and width chosen on dev);
- paths: half way between the latents of two test examples, data are less sparse than at the ends: log of the ratio of
  distances to the 10th neighbour in training, less that of Gaussian draws, in four principal components made white;
- predictions change monotonically along the straight path between more pairs (of several outputs, their mean share).

Supported: all four. Not supported: one is shown to be absent or reversed. Where the prior does not hold in half of the
members of "enforced" (test latents, whitened on training), or the latents of rank 8 leave it nothing to bind, there
is no verdict.

What the four can not say. A prior that ruins rank 8 loses nothing at rank 1, either: rank 8 and the linear probe
themselves stand beside as controls. The likelihood of a path under N(0, I) is no measure: with |z|^2 convex it is never
below the mean of its ends, by |z - z'|^2 / 8 half way, which is the latents' scale, and white latents have one scale;
so sparsity against Gaussian draws takes its place: 0 where means are Gaussian, positive where a path leaves the data
(`test_latent_linearity`: clusters and shells). Positive control of the rank: `--plant interaction --plant-rank 4
--plant-strength 0.9`, where rank 1 must lose much, against `--plant-strength 0`. "Noise alone", Gaussian latents
without the terms, tells the noise from the pull.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits  # scikit-learn needs it too
from torch import Tensor

from experiments.experiment import Experiment, Outcome, Run, contrasts_on_test, main, outcomes, verdict_of_rank
from experiments.jwae_ablation import LEAST_ENFORCED
from experiments.prior_strength.latents import latent_columns
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS, as_reported, example_outcome
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.models.fusion import FusionModel
from mmfusion.training.grid import JWAE, PLAIN, Grid, Setting, by_fold, by_repeat, per_example

LEVELS = {"off": ("none", PLAIN), "noise alone": ("dimension", PLAIN), "enforced": ("dimension", JWAE)}
RANKS = (1, 2, 8, 32)
LOW, MEDIUM = 1, 8
WITHIN = 0.01  # of the score of the largest rank: the rank needed is the smallest that comes so close
STRENGTHS, WIDTHS = (0.1, 1.0, 10.0, 100.0), (0.1, 0.3, 1.0)  # of ridges; of kernels, over the latents' dimension
BASIS = 500  # training examples that kernels are taken with
COMPONENTS = 4  # of each modality's latents, where distances are taken
PAIRS, STEPS = 300, 11  # pairs of test examples of a fold, points on a path
NEIGHBOUR = 10
RATIO_EFFECT, SHARE_EFFECT = 0.05, 0.05
ROUTE = "linear"


@dataclass
class Linearity:
    """What the members of one level say of their latents."""

    linear: np.ndarray
    """(S, n) first primary outcome of the linear probe"""
    rbf: np.ndarray
    """(S, n)"""
    excess: np.ndarray
    """(S, F) sparsity half way, less that of Gaussian draws; mean over modalities"""
    monotone: np.ndarray
    """(S, F) share of pairs"""


def settings_of(noise: str) -> list[Setting]:
    """Rows of one kind of latents; of "noise alone" those two ranks that are compared."""
    rows = []
    for level, (kind, terms) in LEVELS.items():
        ranks = RANKS if level != "noise alone" else (LOW, MEDIUM)
        rows += [Setting(f"{level}, rank {rank}", rank, terms) for rank in ranks if kind == noise]
    return rows


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train all levels, take the latents of rank 8 apart, and judge."""
    kinds = ("none", "dimension")
    grids = {noise: run.grid(data, settings_of(noise), f"linearity {noise}", noise=noise) for noise in kinds}
    identified, bound = verdict_of_rank(grids["dimension"], f"enforced, rank {MEDIUM}", "supported")
    places = {level: (grids[kind], grids[kind].index(f"{level}, rank {MEDIUM}")) for level, (kind, _) in LEVELS.items()}
    with threadpool_limits(1, "blas"):  # many small fits, over which threads would fight
        found = {level: linearity(*place) for level, place in places.items()}
    # whitens those members: after everything that asks for their latents as trained
    latents = {level: latent_columns(*place) for level, place in places.items()}
    named, effects = differences(data, grids, found)
    contrasts = contrasts_on_test(data, named, effects)
    share = float(latents["enforced"]["enforced"].mean())
    held = share >= LEAST_ENFORCED and identified == "supported"
    columns = summary(data, grids, found, latents)
    shown = "; ".join(f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts if c.decides)
    text = f"The prior holds in {share:.0%} of the members of 'enforced'."
    return Outcome(
        table(data, columns),
        contrasts,
        verdict_of(contrasts) if held else "not identified",
        f"{shown}. {text}{bound}",
        {label: {name: np.asarray(x).tolist() for name, x in cells.items()} for label, cells in columns.items()},
        lambda figure: draw(figure, data, columns),
        (15, 4.2),
        [f"rank needed: the smallest within {WITHIN:g} of rank {RANKS[-1]}, fold by fold"],
    )


# ---- measures of latents -----------------------------------------------------------------------------------------


def linearity(grid: Grid, place: int) -> Linearity:
    """Probes and paths of every member of a setting, in the coordinates of training."""
    data, outcome = grid.data, PRIMARY[grid.data.task][0]
    said: dict[str, list] = {"linear": [], "rbf": []}
    found: dict[str, list] = {"excess": [], "monotone": []}
    for s in range(len(grid.seeds)):
        seed: dict[str, list] = {name: [] for name in (*said, *found)}
        for f, fold in enumerate(data.folds):
            model = grid.model(place, s, f)
            for kernel in said:
                seed[kernel].append(probe(data, model, fold, kernel))
            for name, value in paths(model, data.pool.features, fold, seed=f).items():
                seed[name].append(value)
        for name in said:
            said[name].append(np.concatenate(seed[name]))
        for name in found:
            found[name].append(seed[name])

    def of(*given) -> np.ndarray:
        return example_outcome(*given, outcome)

    scores = {name: per_example(data, np.stack(x), "test", of) for name, x in said.items()}
    return Linearity(**scores, **{name: np.array(x) for name, x in found.items()})


@torch.inference_mode()
def probe(data: FoldedDataset, model: FusionModel, fold: Fold, kernel: str) -> np.ndarray:
    """(n[, O]): a ridge's predictions on test, from the joined latents; what it needs is chosen on dev.

    The kernel "rbf" by Nystroem's method, exact up to BASIS examples trained on; beyond, its cost is not cubic in them.
    """
    latents = [z.double() for z in model.latents(dict(data.pool.features))]
    # every modality of one scale, directions within it as they were trained
    scaled = [(z - z[fold.train].mean(0)) / z[fold.train].var(0).mean().clamp_min(1e-12).sqrt() for z in latents]
    joined, target = torch.cat(scaled, -1).numpy(), data.pool.target.double().numpy()
    if data.task == "multiclass":
        aim = np.eye(data.output_dim)[target.astype(int)]
    else:
        aim = target if data.task == "regression" else 2 * target - 1
    mean = aim[fold.train.numpy()].mean(0)
    train, dev, test = (joined[rows.numpy()] for rows in fold)
    outcome, best = PRIMARY[data.task][0], (-np.inf, None)
    for width in (1.0,) if kernel == "linear" else WIDTHS:
        inputs = train, dev, test
        if kernel == "rbf":
            basis = Nystroem(gamma=width / joined.shape[1], n_components=min(BASIS, len(train)), random_state=0)
            inputs = basis.fit_transform(train), basis.transform(dev), basis.transform(test)
        for strength in STRENGTHS:
            ridge = Ridge(strength, fit_intercept=False).fit(inputs[0], aim[fold.train.numpy()] - mean)
            said = ridge.predict(inputs[1]) + mean
            score = example_outcome(said[None], target[fold.dev.numpy()], data.task, outcome).mean()
            best = max(best, (score, ridge.predict(inputs[2]) + mean), key=lambda one: one[0])
    return best[1].astype(np.float32)


@torch.inference_mode()
def paths(model: FusionModel, features: dict[str, Tensor], fold: Fold, seed: int = 0) -> dict[str, float]:
    """Excess of sparsity, and share of monotone predictions, on paths between latents of test examples."""
    rng = np.random.default_rng(seed)
    latents = model.latents(features)
    first, second = (fold.test[rng.integers(0, len(fold.test), PAIRS)] for _ in range(2))
    apart = first != second
    first, second = first[apart], second[apart]
    excess = []
    for z in latents:
        white = principal(z.double().numpy(), fold.train.numpy())
        given = white[fold.train], white[first], white[second]
        excess.append(sparsity(*given) - sparsity(*(rng.standard_normal(x.shape) for x in given)))
    steps = torch.linspace(0, 1, STEPS)[:, None, None]
    named = zip(model.modalities, latents, strict=True)
    path = {name: torch.lerp(z[first], z[second], steps) for name, z in named}  # (STEPS, pairs, L)
    change = model.head(path)[0].diff(dim=0)  # (STEPS - 1, pairs, O)
    slack = 1e-6 * change.abs().amax(0)  # rounding is no turn
    monotone = ((change >= -slack).all(0) | (change <= slack).all(0)).double().mean()
    return {"excess": float(np.mean(excess)), "monotone": float(monotone)}


def principal(z: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(N, L) -> (N, k): leading principal components over these rows, of mean 0 and variance 1 there; k at most 4.

    Few, and as many for all levels: among points in many dimensions all distances are alike.
    """
    centred = z - z[rows].mean(0)
    _, values, directions = np.linalg.svd(centred[rows], full_matrices=False)
    kept = slice(0, max(1, min(COMPONENTS, int((values > 1e-6 * values[0]).sum()))))
    scale = np.maximum(values[kept], 1e-12) / (len(rows) - 1) ** 0.5
    return centred @ directions[kept].T / scale


def sparsity(train: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Mean log distance to the 10th training point half way between pairs (P, L), less that at their ends."""
    tree = cKDTree(train)

    def distance(x: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(tree.query(x, [NEIGHBOUR])[0][:, 0], 1e-12))

    return float((distance((first + second) / 2) - (distance(first) + distance(second)) / 2).mean())


# ---- contrasts ---------------------------------------------------------------------------------------------------


def differences(
    data: FoldedDataset, grids: dict[str, Grid], found: dict[str, Linearity]
) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts as the claim orients them, with the effect of interest of each."""
    outcome = PRIMARY[data.task][0]
    word, effect = WORDS[outcome], EFFECTS[outcome]
    values = {
        setting.label: of
        for grid in grids.values()
        for setting, of in zip(grid.settings, grid.outcome(outcome), strict=True)
    }
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}

    def add(name: str, values: np.ndarray, claim: str, effect: float, decides: bool) -> None:
        named[name], effects[name] = Difference(values, claim, decides, ROUTE if decides else ""), effect

    lost = {level: values[f"{level}, rank {MEDIUM}"] - values[f"{level}, rank {LOW}"] for level in LEVELS}
    for level, base, decides in (("enforced", "off", True), ("enforced", "noise alone", False)):
        over, one, other = f"{level} over {base}", found[level], found[base]
        gains = (other.rbf - other.linear) - (one.rbf - one.linear)
        add(f"rank: {over}, {word}", lost[base] - lost[level], f"less is lost at rank {LOW}", effect, decides)
        add(f"probes: {over}, {word}", gains, "an RBF kernel gains less over a linear one", effect, decides)
        add(f"paths: {over}", other.excess - one.excess, "paths stay nearer to the data", RATIO_EFFECT, decides)
        add(f"monotone: {over}", one.monotone - other.monotone, "more paths are monotone", SHARE_EFFECT, decides)
    rank = values[f"enforced, rank {MEDIUM}"] - values[f"off, rank {MEDIUM}"]
    add(f"rank {MEDIUM}: enforced over off, {word}", rank, f"the prior does not ruin rank {MEDIUM}", effect, False)
    linear = found["enforced"].linear - found["off"].linear
    add(f"linear probe: enforced over off, {word}", linear, "nor a linear probe", effect, False)
    return named, effects


def rank_needed(data: FoldedDataset, values: dict[int, np.ndarray]) -> np.ndarray:
    """{rank: (S, n)} -> (S, F): the smallest whose score is within `WITHIN` of the largest rank's."""
    ranks = sorted(values)
    scores = np.stack([by_fold(data, values[rank]) for rank in ranks])  # (ranks, S, F)
    return np.array(ranks)[(scores >= scores[-1] - WITHIN).argmax(0)]


def summary(
    data: FoldedDataset, grids: dict[str, Grid], found: dict[str, Linearity], latents: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """{level: {column: (S * repeats,)}}; of the latents' checks (S,)."""
    first, columns = PRIMARY[data.task][0], {}
    for level, (noise, _) in LEVELS.items():
        grid, one = grids[noise], found[level]
        scores = outcomes(grid)[first]
        own = {s.rank: scores[p] for p, s in enumerate(grid.settings) if s.label.startswith(f"{level},")}
        cells = {f"rank {rank}": as_reported(by_repeat(data, own[rank]), first) for rank in (LOW, MEDIUM)}
        if RANKS[-1] in own:
            cells["rank needed"] = by_repeat(data, rank_needed(data, own))
        for name, probe in (("linear probe", one.linear), ("RBF probe", one.rbf)):
            cells[name] = as_reported(by_repeat(data, probe), first)
        for name in ("excess", "monotone"):
            cells[name] = by_repeat(data, getattr(one, name))
        cells |= {name: latents[level][name] for name in ("dimension of means", "share no noise", "enforced")}
        columns[level] = cells
    return columns


# ---- text and figure ---------------------------------------------------------------------------------------------


def table(data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> str:
    """One line per level, mean +- std over seeds and repeats."""
    names = list(columns["off"])
    width = max(map(len, columns))
    lines = [
        f"ranks and probes: {WORDS[PRIMARY[data.task][0]]}; excess: sparsity half way less that of Gaussian draws; "
        "mean +- std over seeds and repeats"
    ]
    lines.append(f"{'':{width}}" + "".join(f"  {name:>18}" for name in names))
    for level, cells in columns.items():
        texts = [mean_std(cells[name]) if name in cells else "-" for name in names]
        lines.append(f"{level:{width}}" + "".join(f"  {text:>18}" for text in texts))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> None:
    """Ranks, probes, excess of sparsity and monotone paths, a bar per level; dots: seeds and repeats."""
    word = WORDS[PRIMARY[data.task][0]]
    panels = {
        f"{word}, rank {LOW} and {MEDIUM}": (f"rank {LOW}", f"rank {MEDIUM}"),
        f"{word} of probes": ("linear probe", "RBF probe"),
        "excess of sparsity half way": ("excess",),
        "share of monotone paths": ("monotone",),
    }
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for k, level in enumerate(columns):
            for j, name in enumerate(names):
                values, place = columns[level][name], k + 0.35 * (j - (len(names) - 1) / 2)
                axis.plot([place] * len(values), values, "os"[j], color=f"C{k}", markersize=4)
                axis.plot([place - 0.1, place + 0.1], [values.mean()] * 2, color=f"C{k}")
        axis.set_xticks(range(len(columns)), list(columns))
        axis.set_title(title, fontsize=10)
    figure.suptitle(
        f"{data.name}: the prior and the linearity of the latent space (left, right: as the title names them)"
    )


EXPERIMENT = Experiment(
    "latent_linearity",
    "The prior makes the joint latent space linear: a lower rank, a linear probe and straight paths suffice.",
    "Does a prior on the latents make the space linear?",
    measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
