"""What a trained run loses to corruption, missing modalities and attacks."""

from experiments.robustness.measure import EXPERIMENT, Options, run

__all__ = ["EXPERIMENT", "Options", "run"]
