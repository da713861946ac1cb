"""The waterfall of one account: where each part's bar begins and ends; the figure and the page draw it."""

from dataclasses import dataclass

import numpy as np

from mmfusion.explain.account import Explanation


@dataclass(frozen=True)
class Waterfall:
    """K parts, one bar each, and last the bar of their sum; means over members."""

    names: list[str]
    """K + 1: the parts, then what is predicted"""
    values: np.ndarray
    """(K + 1,) the parts, then their sum"""
    starts: np.ndarray
    """(K + 1,) each part begins where the one before ends; the sum begins at `origin`"""
    ends: np.ndarray
    """(K + 1,)"""
    spread: np.ndarray
    """(K + 1,) standard deviation over members; 0 for one member"""
    origin: float
    """where the sum's bar begins: 0, or for a regression the prediction at the mean latents"""

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest value drawn, whiskers included; never equal."""
        low = min(self.origin, self.starts.min(), (self.ends - self.spread).min())
        high = max(self.origin, self.starts.max(), (self.ends + self.spread).max())
        return float(low), float(max(high, low + 1e-9))


def waterfall(explanation: Explanation, row: int) -> Waterfall:
    """The bars of example `row`."""
    account = explanation.account
    parts = [part[:, row] for part in account.parts.values()]
    members = [*parts, account.prediction[:, row]]
    means = np.array([part.mean() for part in parts])
    ends = np.append(np.cumsum(means), means.sum())
    # a value is drawn from what the model predicts at the mean latents: beside it the parts would be slivers
    regression = explanation.task == "regression"
    origin = float(means[0]) if regression else 0.0
    starts = np.append(ends[:-1] - means, origin)
    starts[0] = origin if regression else starts[0]
    spread = np.array([x.std(ddof=1) if len(x) > 1 else 0.0 for x in members])
    return Waterfall([*account.parts, explanation.output], np.append(means, means.sum()), starts, ends, spread, origin)
