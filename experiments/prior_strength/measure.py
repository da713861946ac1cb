"""What does the pull to the prior cost, and what does it buy? MMD weights from 0 to 30, certain and Gaussian latents.

    python -m experiments.prior_strength --dataset arrays --data vectors.npz

Mean and covariance of the latents are a choice of coordinates (`mmfusion.models.whitening`): distances are given as
trained, and in the coordinates that have those moments on each training part; both on test. Predictions are the same.

Claim, on both primary outcomes, one route: at weight 1 Gaussian latents are at most an effect of interest worse on test
than at weight 0. Supported: both bounds lie above 0. Not supported: a cost beyond that is shown on either. Positive
control: at the largest weight a cost must be seen, or it is "cannot tell": what has learned nothing has no cost.

What else the prior may buy decides nothing, and is corrected for apart: a lower loss of Gaussian than of certain
latents, a lower loss under noise, and an order of the examples by the variance of the output, Var[y], because of the
latents' noise.
"""

from dataclasses import dataclass

import numpy as np

from experiments.attacked import ATTACKED
from experiments.experiment import Experiment, Outcome, Run, contrasts_on_test, outcomes
from experiments.prior_strength.damage import MISSING, NOISE, damaged, worst_columns
from experiments.prior_strength.doubt import Doubt, measure_doubt
from experiments.prior_strength.latents import latent_columns
from experiments.prior_strength.report import draw, table
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.calibration import aurc_parts
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.training.grid import JWAE, Grid, Setting

WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
KINDS = {"certain": "none", "Gaussian": "dimension"}
RANK = 4


@dataclass
class Kind:
    """What was found of one kind of latents at P weights; S seeds, n test examples."""

    outcomes: dict[str, np.ndarray]
    """{primary outcome: (P, S, n)}, larger is better"""
    losses: np.ndarray
    """(P, S, n)"""
    noisy_losses: np.ndarray
    """(P, S, n), mean over modalities and levels of noise"""
    doubts: list[Doubt]
    """(P,)"""
    columns: dict[str, dict[str, np.ndarray]]
    """{setting: {column: (S,), of ensembles (1,)}}"""


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train both kinds of latents at every weight; contrasts are paired over seeds and test examples."""
    kinds = {}
    for kind, noise in KINDS.items():
        settings = [Setting(f"{kind}, {weight:g}", RANK, JWAE, mmd_weight=weight) for weight in WEIGHTS]
        kinds[kind] = measure_kind(run.grid(data, settings, f"prior {kind}", noise=noise))
    columns = {label: cells for kind in kinds.values() for label, cells in kind.columns.items()}
    cost = contrasts_on_test(data, *costs(data, kinds))
    text = [f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in cost if c.decides]
    verdict, control = verdict_of(cost), ""
    if not any(c.exists == "yes" for c in cost if not c.decides):
        verdict, control = "cannot tell", " No verdict: not even weight 30 is seen to cost anything."
    notes = []
    if len(data.test_rows) > ATTACKED:
        notes.append(f"worst cases: a random {ATTACKED} of the {len(data.test_rows)} test examples, the same for all")
    return Outcome(
        table(data, columns),
        cost + contrasts_on_test(data, gains(kinds)),
        verdict,
        f"Paired on test: {'; '.join(text)}.{control}",
        {label: {name: v.tolist() for name, v in cells.items()} for label, cells in columns.items()},
        lambda figure: draw(figure, data, columns, list(KINDS), WEIGHTS),
        (17, 11),
        notes,
    )


def measure_kind(grid: Grid) -> Kind:
    """Everything about one grid; its models are whitened on the way, which changes no prediction of whole examples."""
    damage = damaged(grid)  # of the models as they were trained: before they are whitened
    scores, losses = grid.scores(), grid.losses()
    columns, doubts = {}, []
    for p, setting in enumerate(grid.settings):
        cells = {"test score": scores[p].mean(-1), "test loss": losses[p].mean(-1)}
        for label, (damaged_scores, damaged_losses) in damage.items():
            cells[f"{label} score"] = damaged_scores[p].mean(-1)
            cells[f"{label} loss"] = damaged_losses[p].mean(-1)
        cells |= latent_columns(grid, p)
        doubts.append(measure_doubt(grid, p))
        columns[setting.label] = cells | worst_columns(grid, p) | doubts[-1].columns
    noisy = np.mean([losses for label, (_, losses) in damage.items() if label != MISSING], axis=0)
    primary = {name: values for name, values in outcomes(grid).items() if name in PRIMARY[grid.data.task]}
    return Kind(primary, losses, noisy, doubts, columns)


def costs(data: FoldedDataset, kinds: dict[str, Kind]) -> tuple[dict[str, Difference], dict[str, float]]:
    """What the pull costs on test, with the effects of interest; that of Gaussian latents at weight 1 decides."""
    on, off = WEIGHTS.index(1.0), WEIGHTS.index(0.0)
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}
    for outcome in PRIMARY[data.task]:
        word, effect = WORDS[outcome], EFFECTS[outcome]
        for kind, found in kinds.items():
            values, decides = found.outcomes[outcome], kind == "Gaussian"
            name, text = f"{kind}: weight 1 no worse than 0, {word}", f"weight 1 is at most {effect:g} worse"
            bound = Difference(values[on] - values[off] + effect, text, decides, "no cost" if decides else "", True)
            cost = Difference(values[off] - values[-1], "weight 30 does worse than 0: a pull can be too strong", False)
            named |= {name: bound, f"{kind}: weight 30 costs {word}": cost}
            effects |= {name: effect, f"{kind}: weight 30 costs {word}": effect}
    return named, effects


def gains(kinds: dict[str, Kind]) -> dict[str, Difference]:
    """What it may buy; none decides."""
    on, off = WEIGHTS.index(1.0), WEIGHTS.index(0.0)
    levels = " and ".join(f"{level:g}" for level in NOISE)
    named = {
        f"{name}: lower loss under noise at weight 1": Difference(
            kind.noisy_losses[off] - kind.noisy_losses[on],
            f"weight 1 has a lower loss than 0 under noise of {levels} standard deviations on one modality",
            False,
        )
        for name, kind in kinds.items()
    }
    named["weight 1: lower loss of Gaussian"] = Difference(
        kinds["certain"].losses[on] - kinds["Gaussian"].losses[on],
        "at weight 1 Gaussian latents have a lower loss on test than certain ones",
        False,
    )
    doubt = kinds["Gaussian"].doubts[on]
    named["Gaussian: Var[y] finds errors at weight 1"] = Difference(
        below_random(doubt.variance, doubt.risk), "the AURC by Var[y] is below that of a random order", False
    )
    return named


def below_random(uncertainty: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """(S, n): the AURC of a random order less that by this uncertainty, as means over examples (`aurc_parts`)."""
    return risk - np.stack([aurc_parts(u, r) for u, r in zip(uncertainty, risk, strict=True)])


EXPERIMENT = Experiment(
    "prior_strength",
    "A prior on the latents costs no discrimination at weight 1.",
    "What does the pull to the prior cost, and what does it buy?",
    measure,
)
