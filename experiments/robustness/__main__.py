"""`python -m experiments.robustness`."""

import sys

from experiments.robustness.measure import run

sys.exit(run(sys.argv[1:]))
