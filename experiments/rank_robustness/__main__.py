"""`python -m experiments.rank_robustness`."""

from experiments.experiment import main
from experiments.rank_robustness import EXPERIMENT

main(EXPERIMENT)
