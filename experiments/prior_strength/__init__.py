"""What does the pull to the prior cost, and what does it buy?"""

from experiments.prior_strength.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
