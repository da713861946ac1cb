"""Do rank factors correspond to distinct, stable components?."""

from experiments.rank_semantics.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
