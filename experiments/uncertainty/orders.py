"""Orders of the ensemble's errors: by expected probability, by what members disagree in, by the exact Var[y]."""

import numpy as np

from experiments.uncertainty.predictors import ClassPredictor, MethodPredictors, fold_aurc_parts
from mmfusion.metrics.verdicts import Difference

PROBABILITY, VARIANCE, RELATIVE = "expected probability", "Var[y], exact", "sd of y over |E[y]|, exact"


def orders_of(row: MethodPredictors, outputs: np.ndarray, variances: np.ndarray | None) -> dict[str, np.ndarray]:
    """{score: (n,)}: share of every test example in the AURC of the ensemble's risk, in the order of that score.

    Args:
        variances: (S, n[, O]) of the outputs under the latents' noise, in the square of what the data came in.
    """
    targets, (own, risk) = row.ensemble.targets, row.ensemble.ranking(outputs)
    classes = isinstance(row.ensemble, ClassPredictor)
    scores = {PROBABILITY: own} if classes else {}
    scores |= row.ensemble.disagreement(outputs)
    if variances is not None:
        of_latents = variances.reshape(*variances.shape[:2], -1)
        scores[VARIANCE] = (of_latents / np.square(targets.scale)).mean((0, 2))
        if targets.task in ("binary", "multilabel"):  # Var[y] grows with |E[y]|: the confident vary most
            mean = outputs.reshape(of_latents.shape) * np.sqrt(1 + np.pi / 8 * of_latents)  # of the probit's logits
            scores[RELATIVE] = -(np.abs(mean.mean(0)) / np.sqrt(of_latents.mean(0))).mean(1)
    return {name: fold_aurc_parts(targets, score, risk) for name, score in scores.items()}


def order_differences(orders: dict[str, np.ndarray]) -> dict[str, Difference]:
    """What Var[y] orders the main row's errors better by than every other score, (1, n)."""
    if VARIANCE not in orders:
        return {}
    return {
        f"AURC, by Var[y] over {score}": Difference(
            (parts - orders[VARIANCE])[None], f"Var[y] orders the ensemble's errors better than {score}", False
        )
        for score, parts in orders.items()
        if score not in (VARIANCE, RELATIVE)
    }
