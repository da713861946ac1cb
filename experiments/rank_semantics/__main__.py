"""`python -m experiments.rank_semantics`."""

from experiments.experiment import main
from experiments.rank_semantics.measure import EXPERIMENT

main(EXPERIMENT)
