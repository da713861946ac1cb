"""Is a low rank more robust, and surer? Certified and attacked scores over the rank, prior on and off, with controls.

    python -m experiments.rank_robustness --dataset cmu_mosi --data cmu_mosi_utterances.npz

Ranks 1 to 32 with and without the MMD to the prior; rank 32 under other weight decays; ranks 4 and 32 under spectral
normalisation; rank 4 under other rates of modality dropout. All on test examples and standardised features, one
modality moving at a time, by an l_2 change of size rho = .05 (.05 sqrt(d): as long as Gaussian noise of .05 standard
deviations), mean over modalities; scores as in mmfusion/robustness/worst_case.py.

Robustness is compared at matched clean accuracy: only examples that both settings of a seed get right can count, so
that a model is not called robust because it was right more often; the difference is a share of all test examples. For a
regression, or several labels, the losses of score are compared.

The claim is tested as: with the prior, ranks 2 to 4 (mean of 2 and 4) against rank 32 have a higher certified score, a
higher attacked score, a lower loss on test (NLL, or squared error), and a smaller gradient relative to the margin
(difference of logarithms). All four must hold. The controls do not decide: they say whether weight decay or spectral
normalisation at rank 32 does as much.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.experiment import (
    SCORE_EFFECT,
    Experiment,
    Outcome,
    Run,
    contrasts_on_test,
    main,
    verdict_of_rank,
)
from mmfusion.data.folds import FoldedDataset, only
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.scores import example_scores
from mmfusion.metrics.verdicts import Difference, combine
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.certificates import feature_path, gelu_slope, pair_norm
from mmfusion.robustness.corruptions import add_noise
from mmfusion.robustness.worst_case import (
    Criterion,
    attacked_scores,
    change_size,
    feature_certificates,
    latent_scores,
    latent_stds,
)
from mmfusion.training.grid import JWAE, Grid, Setting, outputs_of, per_example, select

RANKS = (1, 2, 4, 8, 16, 32)
LOW, HIGH = (2, 4), 32
NO_PRIOR = ("reconstruction", "alignment")
DECAYS = (0.1, 1.0, 30.0)
DROPOUTS = (0.0, 0.1, 0.2, 0.5)
SPECTRAL_NORM = 1.0
RHO = 0.05
RESTARTS = 2  # of the attack: more change nothing (experiments.robustness checks that), and there are many members
NOISE = 0.5  # level of the Gaussian noise on all features, in standard deviations
RATIO_EFFECT = 0.05  # smallest ratio of gradients of interest: 5 %
DECIDES = (
    "certified: ranks 2-4 over 32",
    "attacked: ranks 2-4 over 32",
    "loss: ranks 2-4 below 32",
    "gradient: ranks 2-4 below 32",
)


@dataclass
class RankRobustnessResult:
    """Of every setting: per example (S, n), or per seed (S,)."""

    clean: dict[str, np.ndarray]
    certified: dict[str, np.ndarray]
    attacked: dict[str, np.ndarray]
    latent: dict[str, np.ndarray]
    noisy: dict[str, np.ndarray]
    missing: dict[str, np.ndarray]
    """score where one modality is missing, mean over modalities"""
    loss: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    """(S,) median over examples of |dy/dx|_2 sqrt(d) / |y| (regression: / std of target), mean over modalities"""
    interaction: dict[str, np.ndarray]
    """(S,) median over examples of |B|_2 |s_1| |s_2| / |y|, mean over pairs; s: stds of the latents in training"""
    norm: dict[str, np.ndarray]
    """(S,) mean over examples and pairs of |B|_2, raw"""


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train both grids, measure every member, and judge."""
    settings = [
        Setting(f"{kind}, rank {rank}", rank, terms)
        for kind, terms in (("prior", JWAE), ("no prior", NO_PRIOR))
        for rank in RANKS
    ]
    settings += [Setting(f"decay {decay:g}, rank {HIGH}", HIGH, JWAE, decay) for decay in DECAYS]
    settings += [
        Setting(f"dropout {rate:g}, rank 4", 4, JWAE, dropout=dict.fromkeys(data.input_dims, rate)) for rate in DROPOUTS
    ]
    spectral = [Setting(f"spectral norm, rank {rank}", rank, JWAE) for rank in (4, HIGH)]
    grids = [
        run.grid(data, settings, "rank robustness"),
        run.grid(data, spectral, "rank robustness spectral", spectral_norm=SPECTRAL_NORM),
    ]
    result = examine(data, grids)
    named = differences(data, result)
    effects = {name: RATIO_EFFECT if name.startswith("gradient") else SCORE_EFFECT for name in named}
    contrasts = contrasts_on_test(data, named, effects)
    verdict = combine([c.verdict for c in contrasts if c.decides], "all")
    verdict, bound = verdict_of_rank(grids[0], f"prior, rank {HIGH}", verdict)
    by_name = {c.name: c for c in contrasts}
    answer = "Ranks 2-4 against 32: " + ", ".join(
        f"{name.split(':')[0]} {by_name[name].estimate:+.3f} [{by_name[name].low:+.3f}, {by_name[name].high:+.3f}]"
        for name in DECIDES
    )
    return Outcome(
        table(data, result),
        contrasts,
        verdict,
        answer + "." + bound,
        {label: {key: v.tolist() for key, v in cells.items()} for label, cells in per_seed(result).items()},
        lambda figure: draw(figure, data, result),
        (14.0, 4.4),
        [
            f"rho = {RHO:g}; certificates are lower bounds, attacks upper bounds of the worst-case score",
            "modality dropout is the recipe's .3 wherever no rate is named",
        ],
    )


# ---- measures ----------------------------------------------------------------------------------------------------


def examine(data: FoldedDataset, grids: list[Grid]) -> RankRobustnessResult:
    """Measure every setting of every grid."""
    result = RankRobustnessResult(*({} for _ in range(10)))
    noisy_pool = _with_noise(data)
    for grid in grids:
        places = range(len(grid.settings))
        scores, losses = grid.scores(), grid.losses()
        missing = np.mean([grid.without([name], places) for name in data.input_dims], axis=0)
        noisy = outputs_of(noisy_pool, grid.models).reshape(grid.outputs.shape)
        noisy = per_example(data, select(data, noisy, "test"), "test", example_scores)
        for p, setting in enumerate(grid.settings):
            label = setting.label
            result.clean[label], result.loss[label] = scores[p], losses[p]
            result.missing[label], result.noisy[label] = missing[p], noisy[p]
            by_seed = [_examine_seed(data, grid, p, s) for s in range(len(grid.seeds))]
            for name in ("certified", "attacked", "latent", "gradient", "interaction", "norm"):
                getattr(result, name)[label] = np.array([seed[name] for seed in by_seed])
    return result


def _with_noise(data: FoldedDataset) -> FoldedDataset:
    """The same examples with Gaussian noise on every feature, in units of the first fold's training part."""
    rng = np.random.default_rng(0)
    rows = data.folds[0].train
    features = {name: add_noise(x, NOISE, x[rows].std(0), rng) for name, x in sorted(data.pool.features.items())}
    probed = only(data, list(features))
    probed.pool.features.update(features)
    return probed


def _examine_seed(data: FoldedDataset, grid: Grid, p: int, s: int) -> dict[str, np.ndarray | float]:
    """(n,) scores over all folds' test parts, and three numbers, of one setting and seed."""
    parts: dict[str, list] = {}
    for f, fold in enumerate(data.folds):
        model = grid.model(p, s, f)
        features = {name: x[fold.test] for name, x in data.pool.features.items()}
        train = {name: x[fold.train] for name, x in data.pool.features.items()}
        target = data.pool.target[fold.test].reshape(len(fold.test), -1)
        criterion = Criterion(target, data.task, data.target_scale)
        stds = latent_stds(model, train)
        worst = {
            "certified": [feature_certificates(model, features, criterion, m, 2, (RHO,)) for m in model.modalities],
            "attacked": [
                attacked_scores(model, features, criterion, m, 2, (RHO,), restarts=RESTARTS) for m in model.modalities
            ],
            "latent": list(latent_scores(model, features, criterion, stds, 2, (RHO,)).values()),
        }
        for name, values in worst.items():
            parts.setdefault(name, []).append(torch.stack(values).mean(0)[0].numpy())
        for name, value in geometry(model, features, stds, criterion).items():
            parts.setdefault(name, []).append(value)
    return {
        name: np.concatenate(values) if isinstance(values[0], np.ndarray) else float(np.mean(values))
        for name, values in parts.items()
    }


@torch.no_grad()
def geometry(model: FusionModel, features: dict, stds: dict, criterion: Criterion) -> dict[str, float]:
    """Gradient and interaction relative to the margin, and the raw spectral norm of the interaction."""
    latents = model.latents(features)
    gradients, interactions, norms = [], [], []
    for m, name in enumerate(model.modalities):
        path = feature_path(model, features, name)
        contrasts = criterion.contrasts(path.output)
        path = path.contrast(contrasts)
        margins = path.output  # (n, K)
        size = criterion.scale.expand_as(margins) if criterion.task == "regression" else margins.abs()
        gradient = (path.coefficient * gelu_slope(path.activation).unsqueeze(1)) @ path.weight  # (n, K, H) (H, d)
        length = torch.linalg.vector_norm(gradient, dim=-1) * gradient.shape[-1] ** 0.5
        gradients.append((length / size).median().item())
        for n in range(m + 1, len(latents)):
            b = pair_norm(model.fusion, latents, m, n) * model.rescale.std  # (n, O)
            norms.append(b.mean().item())
            b = (contrasts.abs() @ b.unsqueeze(-1)).squeeze(-1)  # (n, K), of a margin at most that
            units = change_size(stds[name], 2) * change_size(stds[model.modalities[n]], 2)
            interactions.append((b * units / size).median().item())
    return {
        "gradient": float(np.mean(gradients)),
        "interaction": float(np.mean(interactions)) if interactions else 0.0,
        "norm": float(np.mean(norms)) if norms else 0.0,
    }


# ---- contrasts ---------------------------------------------------------------------------------------------------


def at_equal_score(
    data: FoldedDataset, result: RankRobustnessResult, worst: dict[str, np.ndarray], one: str, other: str
) -> np.ndarray:
    """(S, n): how much more robust one setting is than the other, at matched clean score."""
    if data.task in ("binary", "multiclass"):
        both_right = result.clean[one] * result.clean[other]
        return both_right * (worst[one] - worst[other])
    return (worst[one] - result.clean[one]) - (worst[other] - result.clean[other])


def differences(data: FoldedDataset, result: RankRobustnessResult) -> dict[str, Difference]:
    """All contrasts; positive is as the claim has it."""
    high = f"prior, rank {HIGH}"

    def low_over(other: str, worst: dict[str, np.ndarray]) -> np.ndarray:
        return np.mean([at_equal_score(data, result, worst, f"prior, rank {r}", other) for r in LOW], axis=0)

    def low_mean(of: dict[str, np.ndarray]) -> np.ndarray:
        return np.mean([of[f"prior, rank {r}"] for r in LOW], axis=0)

    at = "where both are right" if data.task in ("binary", "multiclass") else "relative to the clean score"
    named = {
        DECIDES[0]: Difference(
            low_over(high, result.certified),
            f"ranks 2 and 4 are certified more often than rank {HIGH}, {at}",
        ),
        DECIDES[1]: Difference(
            low_over(high, result.attacked),
            f"ranks 2 and 4 withstand attack more often than rank {HIGH}, {at}",
        ),
        DECIDES[2]: Difference(result.loss[high] - low_mean(result.loss), "ranks 2 and 4 have a lower test loss"),
        DECIDES[3]: Difference(
            np.log(result.gradient[high]) - np.mean([np.log(result.gradient[f"prior, rank {r}"]) for r in LOW], axis=0),
            "ranks 2 and 4 have a smaller gradient relative to the margin (difference of logarithms)",
        ),
    }
    controls = [f"decay {decay:g}, rank {HIGH}" for decay in DECAYS] + [f"spectral norm, rank {HIGH}"]
    for label in controls:
        named[f"attacked: ranks 2-4 over {label}"] = Difference(
            low_over(label, result.attacked),
            f"ranks 2 and 4 withstand attack more often than {label}, {at}",
            False,
        )
    on, off = "prior, rank 4", "no prior, rank 4"
    for name, worst in (("certified", result.certified), ("attacked", result.attacked)):
        named[f"{name}: prior over none, rank 4"] = Difference(
            at_equal_score(data, result, worst, on, off),
            f"with the prior, rank 4 is more robust ({name}), {at}",
            False,
        )
    named["loss: prior below none, rank 4"] = Difference(
        result.loss[off] - result.loss[on], "the prior lowers the test loss", False
    )
    named["attacked: spectral norm over free, rank 4"] = Difference(
        at_equal_score(data, result, result.attacked, "spectral norm, rank 4", on),
        f"spectral normalisation makes rank 4 withstand attack more often, {at}",
        False,
    )
    masked, whole = "dropout 0.2, rank 4", "dropout 0, rank 4"
    named["missing: dropout .2 over 0, rank 4"] = Difference(
        (result.missing[masked] - result.clean[masked]) - (result.missing[whole] - result.clean[whole]),
        "trained with each modality hidden at .2, rank 4 loses less when one is missing",
        False,
    )
    return named


# ---- text and figure ---------------------------------------------------------------------------------------------


def per_seed(result: RankRobustnessResult) -> dict[str, dict[str, np.ndarray]]:
    """{setting: {column: (S,)}}."""
    columns = {
        "clean": result.clean,
        "certified": result.certified,
        "attacked": result.attacked,
        "latent worst": result.latent,
        "feature noise": result.noisy,
        "one missing": result.missing,
        "test loss": result.loss,
        "gradient/margin": result.gradient,
        "|B|/margin": result.interaction,
        "|B|_2": result.norm,
    }
    return {
        label: {name: x[label].mean(1) if x[label].ndim == 2 else x[label] for name, x in columns.items()}
        for label in result.clean
    }


def table(data: FoldedDataset, result: RankRobustnessResult) -> str:
    """One line per setting: mean +- std over seeds."""
    cells = per_seed(result)
    names = list(next(iter(cells.values())))
    width = max(map(len, cells))
    lines = [
        f"score: {data.score_name}; loss: {data.loss_name}; mean +- std over seeds; worst cases at rho = {RHO:g}, "
        f"noise of {NOISE:g} std",
        f"{'':{width}}" + "".join(f"  {name:>16}" for name in names),
    ]
    for label, row in cells.items():
        lines.append(f"{label:{width}}" + "".join(f"  {mean_std(row[name]):>16}" for name in names))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, result: RankRobustnessResult) -> None:
    """Over the rank: clean, attacked and certified scores; loss; gradient relative to the margin."""
    axes = figure.subplots(1, 4)
    cells = per_seed(result)
    panels = {
        "clean (solid), attacked (dashed), certified (dotted)": ("clean", "attacked", "certified"),
        f"test {data.loss_name}": ("test loss",),
        "gradient / margin": ("gradient/margin",),
        "|B|_2 / margin, relative": ("|B|/margin",),
    }
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for kind, color in (("prior", "C0"), ("no prior", "C1")):
            for name, style in zip(names, ("-", "--", ":"), strict=False):
                values = np.array([cells[f"{kind}, rank {rank}"][name] for rank in RANKS])  # (ranks, S)
                mean, std = values.mean(1), values.std(1, ddof=1)
                axis.plot(
                    RANKS, mean, style, marker="o", color=color, markersize=3, label=kind if style == "-" else None
                )
                axis.fill_between(RANKS, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        for label, marker, color in (
            (f"decay 30, rank {HIGH}", "^", "C2"),
            (f"spectral norm, rank {HIGH}", "v", "C3"),
            ("spectral norm, rank 4", "v", "C4"),
        ):
            rank = HIGH if label.endswith(str(HIGH)) else 4
            axis.plot(
                rank, cells[label][names[-1] if len(names) > 1 else names[0]].mean(), marker, color=color, label=label
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rank R")
    axes[0].set_ylabel(data.score_name)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{data.name}: rank and worst cases (rho = {RHO:g}; mean and std over seeds; controls: certified)")


EXPERIMENT = Experiment(
    "rank_robustness",
    "Low rank is an implicit spectral regulariser that improves adversarial robustness and uncertainty.",
    "Is a low rank more robust to the worst change of an input, and surer, than a high one?",
    measure,
    modalities=2,
)

if __name__ == "__main__":
    main(EXPERIMENT)
