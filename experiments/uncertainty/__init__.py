"""Calibration, abstention and prediction sets of a trained run."""

from experiments.uncertainty.measure import EXPERIMENT, Options, execute

__all__ = ["EXPERIMENT", "Options", "execute"]
