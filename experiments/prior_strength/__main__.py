"""`python -m experiments.prior_strength`."""

from experiments.experiment import main
from experiments.prior_strength.measure import EXPERIMENT

main(EXPERIMENT)
