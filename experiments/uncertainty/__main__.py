"""`python -m experiments.uncertainty`."""

import sys

from experiments.uncertainty.measure import Options, execute
from mmfusion.cli import run_command

sys.exit(run_command(execute, Options, sys.argv[1:]))
