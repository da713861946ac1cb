"""Schedule, decay, modality dropout and warm-up of the alignment, compared on dev: what a transformer's defaults are.

    python -m benchmarks.transformer_defaults
    python -m benchmarks.transformer_defaults --dataset mmmo --data mmmo_sequences.npz

The transformer alone (no alignment), then with the term at main's weight, on the first fold's training part, scored on
its dev part, at the epoch that is best there; test parts are never looked at. The settings of the jWAE models are among
those tried.
"""

import itertools
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.experiment import Run, check_options
from experiments.token_rows import Row, train_rows
from experiments.wma import ALONE, WMAOptions, check, dev_scores, row
from mmfusion.cli import pick_device, run_command
from mmfusion.data.folds import FoldedDataset
from mmfusion.data.registry import load_folded
from mmfusion.metrics.format import mean_std
from mmfusion.training.recipe import ObjectiveConfig

ANNEALINGS, DECAYS, DROPOUTS = ("none", "linear"), (0.01, 1.0), (0.0, 0.3)
WARM_UPS = (0.0, ObjectiveConfig.transport_warm_up, 1.0)


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
        label = f"annealing {annealing}, decay {decay:g}, modality dropout {dropout:g}"
        alone = row(first, config, ALONE, config.learning_rate, {"transport": 0.0}, dropout=dropout)
        training = replace(alone.training, annealing=annealing, weight_decay=decay)
        print(f"{label:55} {score(first, config, replace(alone, training=training))}", flush=True)
    weight = ObjectiveConfig().transport_weight
    for share in WARM_UPS:
        label = f"with the term, warm-up over {share:g} of all steps"
        aligned = row(first, replace(config, warm_up=share), ALONE, config.learning_rate, {"transport": weight})
        training = replace(aligned.training, annealing="none")
        print(f"{label:55} {score(first, config, replace(aligned, training=training))}", flush=True)


def score(data: FoldedDataset, config: Config, setting: Row) -> str:
    """Mean and spread over seeds of a setting's score on dev."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder), pick_device(config.device))
        return mean_std(dev_scores(data, train_rows(data, [setting], run, "transformer"))[ALONE])


if __name__ == "__main__":
    sys.exit(run_command(main, Config, sys.argv[1:]))
