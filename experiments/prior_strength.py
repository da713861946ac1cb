"""What does the pull to the prior cost, and what does it buy? MMD weights from 0 to 30, certain and Gaussian latents.

    python -m experiments.prior_strength --dataset arrays --data vectors.npz

Mean and covariance of the latents are a choice of coordinates (`mmfusion.models.whitening`): distances are given as
trained, and in the coordinates that have those moments on each training part; both on test. Predictions are the same.

The claim is tested as: at weight 1 Gaussian latents score at most `SCORE_EFFECT` worse on test than at weight 0, and
not significantly worse at all. That a pull can cost something is seen at the largest weight, a contrast of its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.experiment import SCORE_EFFECT, Experiment, Options, Outcome, Run, contrasts_on_test, main
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.prior import PriorCheck, check_prior
from mmfusion.metrics.statistics import Difference, combine
from mmfusion.models.fusion import FusionModel
from mmfusion.models.whitening import whiten_latents
from mmfusion.training.grid import JWAE, Grid, Setting

WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
KINDS = {"certain": "none", "Gaussian": "dimension"}
RANK = 4
PANELS = ("test score", "test loss", "missing score", "eigenvalue", "eigenvalue whitened", "enforced")


@dataclass(frozen=True)
class PriorOptions(Options):
    """What does the pull to the prior cost, and what does it buy?"""

    weight_decay: float = 1.0
    """of weight matrices; the study's 10 lays latents on a line, where no prior can hold"""


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train both kinds of latents at every weight; contrasts are paired over seeds and test examples."""
    columns: dict[str, dict[str, np.ndarray]] = {}
    named: dict[str, Difference] = {}
    for kind, noise in KINDS.items():
        settings = [Setting(f"{kind}, {weight:g}", RANK, JWAE, mmd_weight=weight) for weight in WEIGHTS]
        grid = run.grid(data, settings, f"prior {kind}", noise=noise)
        columns |= summary(grid)
        scores, losses = grid.scores(), grid.losses()
        on, off = (grid.index(f"{kind}, {weight:g}") for weight in (1.0, 0.0))
        named[f"{kind}: weight 1 no worse than 0"] = Difference(
            scores[on] - scores[off] + SCORE_EFFECT, f"weight 1 scores at most {SCORE_EFFECT} worse", kind == "Gaussian"
        )
        named[f"{kind}: lower loss at weight 1"] = Difference(
            losses[off] - losses[on], "weight 1 has a lower loss on test", False
        )
        named[f"{kind}: weight 30 costs score"] = Difference(
            scores[off] - scores[-1], "weight 30 scores worse than 0: a pull can be too strong", False
        )
    contrasts = contrasts_on_test(data, named)
    text = [f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in contrasts]
    numbers = {label: {name: v.tolist() for name, v in cells.items()} for label, cells in columns.items()}
    return Outcome(
        table(data, columns),
        contrasts,
        combine([c.verdict for c in contrasts if c.decides], "all"),
        f"Paired on test: {'; '.join(text)}.",
        numbers,
        lambda figure: draw(figure, data, columns),
        (13, 7.6),
    )


def summary(grid: Grid) -> dict[str, dict[str, np.ndarray]]:
    """{setting: {column: (S,)}}; whitens the grid's models, which changes no prediction of whole examples."""
    places = range(len(grid.settings))
    missing = np.mean([grid.without([name], places) for name in grid.data.input_dims], axis=0)  # as they were trained
    scores, losses = grid.scores(), grid.losses()
    found = {}
    for p, setting in enumerate(grid.settings):
        as_trained, whitened = latent_checks(grid, p)
        found[setting.label] = {
            "test score": scores[p].mean(-1),
            "test loss": losses[p].mean(-1),
            "missing score": missing[p].mean(-1),
            "eigenvalue": _of(as_trained, lambda check: check.follows["largest eigenvalue"].value),
            "eigenvalue whitened": _of(whitened, lambda check: check.follows["largest eigenvalue"].value),
            "in the ball whitened": _of(whitened, lambda check: check.follows["share in the 95 % ball"].value),
            "dimension of means": _of(whitened, lambda check: check.dimension_of_means),
            "share no noise": _of(whitened, lambda check: check.share_of_means),
            "enforced": _of(whitened, lambda check: float(check.enforced)),
        }
    return found


def latent_checks(grid: Grid, place: int) -> tuple[list[list[PriorCheck]], list[list[PriorCheck]]]:
    """Per seed, the checks on test of every fold and modality: as trained, and whitened on the fold's training part."""
    as_trained, whitened = [], []
    for s in range(len(grid.seeds)):
        before, after = [], []
        for f, fold in enumerate(grid.data.folds):
            model, pool = grid.model(place, s, f), grid.data.pool.features
            before += checks(model, {name: x[fold.test] for name, x in pool.items()})
            whiten_latents(model, {name: x[fold.train] for name, x in pool.items()})
            after += checks(model, {name: x[fold.test] for name, x in pool.items()})
        as_trained.append(before)
        whitened.append(after)
    return as_trained, whitened


@torch.inference_mode()
def checks(model: FusionModel, features: dict[str, torch.Tensor]) -> list[PriorCheck]:
    """One per modality, on raw features (n, d_m)."""
    latents, variances = model.latents(features), model.latent_variances() or [None] * len(model.modalities)
    return [
        check_prior(z.double().numpy(), None if v is None else v.double().numpy())
        for z, v in zip(latents, variances, strict=True)
    ]


def _of(checks_of_seeds: list[list[PriorCheck]], what) -> np.ndarray:
    """(S,) mean over folds and modalities."""
    return np.array([np.mean([what(check) for check in one]) for one in checks_of_seeds])


def table(data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> str:
    """One line per kind and weight, mean +- std over seeds."""
    names = list(next(iter(columns.values())))
    width = max(map(len, columns))
    lines = [
        f"score: {data.score_name}; loss: {data.loss_name}; mean +- std over seeds; latents: on test",
        "whitened: in the coordinates of mean 0 and covariance I on train, in which the model says the same",
        f"{'':{width}}" + "".join(f"  {name:>20}" for name in names),
    ]
    for label, cells in columns.items():
        lines.append(f"{label:{width}}" + "".join(f"  {mean_std(cells[name]):>20}" for name in names))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, columns: dict[str, dict[str, np.ndarray]]) -> None:
    """Six panels over the weight, a line for each kind; band: standard deviation over seeds."""
    titles = dict(zip(PANELS, PANELS, strict=True)) | {
        "test score": f"test {data.score_name}",
        "test loss": f"test {data.loss_name}",
        "missing score": f"test {data.score_name}, one modality missing",
        "eigenvalue": "largest eigenvalue, as trained",
        "eigenvalue whitened": "largest eigenvalue, whitened",
        "enforced": "share of seeds, folds, modalities\nin which the prior holds (whitened)",
    }
    for axis, name in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for kind in KINDS:
            values = np.array([columns[f"{kind}, {weight:g}"][name] for weight in WEIGHTS])  # (weights, S)
            mean, std = values.mean(1), values.std(1, ddof=1)
            line = axis.plot(range(len(WEIGHTS)), mean, "o-", markersize=4, label=f"{kind} latents")[0]
            axis.fill_between(range(len(WEIGHTS)), mean - std, mean + std, color=line.get_color(), alpha=0.15, lw=0)
        axis.set_xticks(range(len(WEIGHTS)), [f"{weight:g}" for weight in WEIGHTS])
        axis.set(title=titles[name], xlabel="weight of the MMD", yscale="log" if name == "eigenvalue" else "linear")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{data.name}: strength of the prior (mean and standard deviation over seeds)")


EXPERIMENT = Experiment(
    "prior_strength",
    "A prior on the latents costs no discrimination at weight 1.",
    "What does the pull to the prior cost, and what does it buy?",
    measure,
    options=PriorOptions,
)

if __name__ == "__main__":
    main(EXPERIMENT)
