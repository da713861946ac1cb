"""Do rank factors correspond to distinct, stable components? (claim 5)."""

from experiments.rank_semantics.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
