"""Does a model know its errors? Calibration, and risk where the doubtful examples are left out.

S seeds, n test examples of all folds. AURC (mmfusion.metrics.calibration) is the mean risk over all shares of examples
kept, the least uncertain first; risk is an error (of labels their share), or the absolute error in standard deviations
of the target. The AURC of a random order is the mean risk.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.prior_strength.latents import latent_distances
from experiments.uncertainty.predictors import PREDICTORS, ClassPredictor, GaussianPredictor, held_out_targets
from mmfusion.dataset import Task
from mmfusion.metrics.calibration import aurc
from mmfusion.sequences import CHUNK_EXAMPLES
from mmfusion.training.grid import Grid


class Doubt(NamedTuple):
    """Of one setting, on test."""

    risk: np.ndarray
    """(S, n) of single members"""
    variance: np.ndarray | None
    """(S, n) Var[y] because of the latents' noise (`output_variance`); None of certain latents"""
    ensemble_risk: np.ndarray
    """(n,)"""
    ensemble_variance: np.ndarray | None
    """(n,) mean of the members' Var[y]"""
    columns: dict[str, np.ndarray]
    """(S,) of members, (1,) of their ensemble; what does not exist is not there"""


def measure_doubt(grid: Grid, place: int) -> Doubt:
    """Calibration and AURC of one setting, whose models must be whitened for the distance to be Mahalanobis'."""
    targets = held_out_targets(grid.data, alphas=())
    dev, test = (targets.in_units(grid.predictions(part)[place]) for part in ("dev", "test"))
    kind, seeds = PREDICTORS[grid.data.task], range(len(grid.seeds))
    members, ensemble = [kind(dev[[s]], targets) for s in seeds], kind(dev, targets)
    risk = np.stack([member.ranking(test[[s]])[1] for s, member in enumerate(members)])  # (S, n)
    ensemble_risk = ensemble.ranking(test)[1]
    disagreement = next(iter(ensemble.disagreement(test).values()))  # mutual information, or std of the members
    distance = latent_distances(grid, place)
    columns = {
        "AURC random": risk.mean(-1),
        "AURC distance": _aurc_of_each(distance, risk),
        "ensemble AURC random": ensemble_risk.mean(keepdims=True),
        "ensemble AURC disagreement": _aurc_of_each([disagreement], [ensemble_risk]),
    }
    if isinstance(ensemble, ClassPredictor):  # a value alone has neither
        alone, together = [member.measures(test[[s]]) for s, member in enumerate(members)], ensemble.measures(test)
        for name, measure in (("ECE", "ECE, equal width"), ("AURC confidence", "AURC")):
            columns[name] = np.array([found[measure] for found in alone])
            columns[f"ensemble {name}"] = np.array([together[measure]])
    own, shared = output_variances(grid, place, ensemble, test)
    if own is not None:
        columns["AURC Var[y]"] = _aurc_of_each(own, risk)
        columns["ensemble AURC Var[y]"] = _aurc_of_each([shared], [ensemble_risk])
    return Doubt(risk, own, ensemble_risk, shared, columns)


def _aurc_of_each(uncertainty, risk) -> np.ndarray:
    return np.array([aurc(u, r) for u, r in zip(uncertainty, risk, strict=True)])


@torch.inference_mode()
def output_variances(
    grid: Grid, place: int, ensemble: ClassPredictor | GaussianPredictor, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Var[y] of every member (S, n), and of their ensemble the mean (n,); None where latents are certain.

    Of classes a member's is of the margin between its own two likeliest, in the mean between the ensemble's.

    Args:
        ensemble: which says what `test`, the members' outputs on test (S, n[, O]), come to.
    """
    data = grid.data
    together = ensemble.logits(test) if isinstance(ensemble, ClassPredictor) else test.mean(0)
    own, shared = np.empty(test.shape[:2]), np.empty(test.shape[:2])
    for s in range(len(grid.seeds)):
        start = 0
        for f, fold in enumerate(data.folds):
            for rows in fold.test.split(CHUNK_EXAMPLES):
                output = grid.model(place, s, f)({n: x[rows] for n, x in data.pool.features.items()}, reconstruct=False)
                if output.covariance is None:
                    return None, None
                part = slice(start, start + len(rows))
                for variances, said in ((own, test[s]), (shared, together)):
                    variances[s, part] = output_variance(
                        output.covariance.double(), torch.from_numpy(said[part]), data.task, data.target_scale
                    )
                start = part.stop
    return own, shared.mean(0)


def output_variance(covariance: Tensor, said: Tensor, task: Task, scale: Tensor) -> Tensor:
    """(n,) variance of what is said, from the covariance (n, O, O) of the outputs.

    Of two classes Var[logit]; of labels its mean; of a regression the mean of Var[y] / scale^2 with scale (O,); of more
    classes that of the margin between the two likeliest, by their logits `said` (n, C):
    Var[y_a - y_b] = C_aa + C_bb - 2 C_ab. The slope in one latent grows with the others, and with it the variance: a
    large logit has more of it than a small one, so of classes it may well order the errors worse than chance.
    """
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)  # (n, O)
    if task != "multiclass":
        return (diagonal / scale.to(diagonal).square()).mean(-1)
    first, second = said.topk(2).indices.T  # (n,) each
    each = torch.arange(len(said))
    return diagonal[each, first] + diagonal[each, second] - 2 * covariance[each, first, second]
