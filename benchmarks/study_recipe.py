"""How the experiments' recipe was chosen: scores of its settings on training data alone, no test split.

    python -m benchmarks.study_recipe --dataset mustard --data sarcasm_data.json --text-encoder MODEL_FOLDER
    python -m benchmarks.study_recipe --dataset pom --data pom_audio_video.npz

A dataset with one fold is cross-validated on its train and dev parts together (5 folds, whole groups where it has
groups); one with several is scored on each fold's own dev part. In MUStARD the dev examples of one fold are test
examples of another, so there the choice has seen labels of test examples, though never in a fold that tests them.
"""

import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.model_selection import GroupKFold, KFold

from mmfusion.cli import run_command
from mmfusion.data.folds import FoldedDataset
from mmfusion.data.registry import DataOptions, load_folded
from mmfusion.dataset import Fold
from mmfusion.metrics.format import mean_std
from mmfusion.training.grid import JWAE, Recipe, Setting, selection_score, train_grid
from mmfusion.training.objective import predict

# one thing at a time, from the recipe
CHANGES: list[dict[str, float | int]] = [
    {},
    *({"weight_decay": value} for value in (0.01, 1.0, 3.0, 30.0)),
    *({"modality_dropout": value} for value in (0.0, 0.5)),
    *({"mmd_weight": value} for value in (0.0, 0.1, 1.0)),
    *({"hidden_dim": value} for value in (16, 64, 128)),
    {"hidden_dim": 128, "weight_decay": 3.0},
    *({"latent_dim": value} for value in (16, 64)),
    *({"epochs": value} for value in (20, 80)),
    *({"learning_rate": value} for value in (3e-4, 3e-3)),
]


@dataclass(frozen=True)
class Config(DataOptions):
    """Score the recipe and single changes of it on training data alone."""

    seeds: int = 3
    """seeds of every setting"""


def inner(data: FoldedDataset) -> FoldedDataset:
    """The same study with folds that leave every test part out."""
    if len(data.folds) > 1:
        return replace(data, folds=[Fold(fold.train, fold.dev, fold.dev) for fold in data.folds])
    known = torch.cat([data.folds[0].train, data.folds[0].dev]).unique()
    groups = data.pool.metadata.get("group")
    if groups is None:
        cuts = KFold(5, shuffle=True, random_state=0).split(known)
    else:
        cuts = GroupKFold(5).split(known, groups=[groups[row] for row in known])
    parts = [(known[torch.from_numpy(a)], known[torch.from_numpy(b)]) for a, b in cuts]
    return replace(data, folds=[Fold(a, b, b) for a, b in parts])


def main(config: Config) -> None:
    """Print one line per setting: mean +- std over seeds of the mean over folds."""
    data = inner(load_folded(config))
    score = selection_score(data)
    name = "AUROC" if data.task == "binary" else "-MAE"
    print(f"{data.name}: jWAE-LMF, rank 4, {config.seeds} seeds, {len(data.folds)} inner folds, {name}")
    for change in CHANGES:
        start = time.perf_counter()
        recipe = replace(Recipe(), **change)
        grid = train_grid(data, [Setting("jWAE", 4, JWAE)], range(config.seeds), recipe, title=str(change))
        values = []
        for s in range(config.seeds):
            folds = []
            for f, fold in enumerate(data.folds):
                features = {key: x[fold.dev] for key, x in data.pool.features.items()}
                with torch.inference_mode():
                    prediction = predict(grid.model(0, s, f), features, data.task).numpy()
                folds.append(score(prediction, data.pool.target[fold.dev].numpy()))
            values.append(np.mean(folds))
        label = ", ".join(f"{key} {value}" for key, value in change.items()) or "the recipe"
        seconds = time.perf_counter() - start
        print(f"{label:36} {mean_std(values, 4)}  ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, Config, sys.argv[1:]))
