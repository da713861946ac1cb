"""What is expected of an output that is uncertain: probabilities and errors of a Gaussian y, without draws.

B batch, O outputs (C classes). The mean and covariance of y are exact (`LowRankMultimodalFusion.moments`); that y is
Gaussian is not: it is a sum of products of Gaussians. For a Gaussian y the probability of two classes is off by .02 at
most; of classes, at logits of std 2, by .03 on average, a third to two thirds of what ignoring the doubt costs.
"""

import math

import torch
from torch import Tensor

from mmfusion.dataset import Task


def moderated_logits(mean: Tensor, covariance: Tensor | None, task: Task) -> Tensor:
    """Logits (..., O) whose sigmoid or softmax is the expected probability of a Gaussian y; the mean if it is certain.

    Two classes, labels: mean / (1 + pi / 8 var)^(1/2), the probit approximation (MacKay, 1992). More classes: the same
    of every difference of two logits, whose variance needs their covariance,

        p_k ~ 1 / sum_j exp(-(mean_k - mean_j) / (1 + pi / 8 var(y_k - y_j))^(1/2))

    normalised (Lu, Ie and Sha, 2020), which for two classes is the former. A class of much variance may then become
    likelier than the one of the largest mean.

    Args:
        mean: (..., O).
        covariance: (..., O, O), or None.
        task: of a regression the mean comes back.
    """
    if covariance is None or task == "regression":
        return mean
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if task != "multiclass":
        return mean * (1 + math.pi / 8 * variance).rsqrt()
    differences = mean[..., :, None] - mean[..., None, :]  # (..., C, C)
    spread = (variance[..., :, None] + variance[..., None, :] - 2 * covariance).clamp_min(0)
    return -torch.logsumexp(-differences * (1 + math.pi / 8 * spread).rsqrt(), -1)


def expected_absolute_error(error: Tensor, variance: Tensor | None) -> Tensor:
    """E|y - t| of a Gaussian y, the mean of a folded normal; |error| if it is certain.

        s (2 / pi)^(1/2) exp(-e^2 / (2 s^2)) + e erf(e / (s 2^(1/2)))

    Args:
        error: (...) mean of y less the target.
        variance: (...) of y, s^2, or None.
    """
    if variance is None:
        return error.abs()
    std = variance.clamp_min(1e-12).sqrt()  # a root at 0 has no gradient
    ratio = error / std
    return std * (math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2) + ratio * torch.erf(ratio / math.sqrt(2)))
