"""Low-rank multimodal fusion: everything that the top-level modules and the experiments import."""

import os

# OpenMP's threads wait by spinning: two jobs on two cores then take three to eight times as long. Has an effect where
# this package is imported before torch, as in every command of the project.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.2.0.dev0"
