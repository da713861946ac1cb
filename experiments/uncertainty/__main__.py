"""`python -m experiments.uncertainty`."""

import sys

from experiments.experiment import begun
from experiments.uncertainty.measure import Options, default_name, execute
from mmfusion.cli import run_command

sys.exit(run_command(execute, Options, sys.argv[1:], begun(Options, default_name)))
