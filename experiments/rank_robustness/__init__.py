"""Experiment of how rank bears on worst cases and calibration; `EXPERIMENT` is what the command runs."""

from experiments.rank_robustness.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
