"""Schedule, weight decay and modality dropout of a transformer, compared on dev: what its defaults are chosen by.

    python -m benchmarks.transformer_defaults
    python -m benchmarks.transformer_defaults --dataset mmmo --data mmmo_sequences.npz

The transformer alone (no alignment) on the first fold's training part, scored on its dev part, at the epoch that is
best there; test parts are never looked at. The settings of the jWAE models are among those tried.
"""

import itertools
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.experiment import Run, check_options
from experiments.token_rows import train_rows
from experiments.wma import ALONE, WMAOptions, check, dev_scores, row
from mmfusion.cli import pick_device, run_command
from mmfusion.data.registry import load_folded
from mmfusion.metrics.format import mean_std

ANNEALINGS, DECAYS, DROPOUTS = ("none", "linear"), (0.01, 1.0), (0.0, 0.3)


@dataclass(frozen=True)
class Config(WMAOptions):
    """Compare a transformer's schedule, decay and modality dropout on dev."""

    learning_rate: float = 1e-3
    """of Adam"""


def main(config: Config) -> None:
    """Print a line for every setting, as soon as it is known."""
    check_options(config)
    data = load_folded(replace(config, tokens=True))
    check(data)
    first = replace(data, folds=data.folds[:1])
    print(f"{data.name}: {data.score_name} on dev, n = {len(first.folds[0].dev)}, {config.seeds} seeds")
    for annealing, decay, dropout in itertools.product(ANNEALINGS, DECAYS, DROPOUTS):
        setting = row(first, config, ALONE, config.learning_rate, {"transport": 0.0}, dropout=dropout)
        training = replace(setting.training, annealing=annealing, weight_decay=decay)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(config, Path(folder), pick_device(config.device))
            trained = train_rows(first, [replace(setting, training=training)], run, "transformer")
        label = f"annealing {annealing}, decay {decay:g}, modality dropout {dropout:g}"
        print(f"{label:55} {mean_std(dev_scores(first, trained)[ALONE])}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, Config, sys.argv[1:]))
