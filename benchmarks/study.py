"""The rank ablation's 160 trainings at once, against a plain loop that trains one model after the other.

    python -m benchmarks.study --data cmu_mosi_utterances.npz

8 ranks x 10 seeds x jWAE on and off, 40 epochs. The plain loop is written as one would write it for one model: eager,
its own batches, AdamW, no term that is switched off; it is timed on a sample of the trainings, spread over the grid,
and scaled. Both sides score the dev part after each epoch. Sides alternate within each round.
"""

import argparse
import platform
import resource
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.rank_ablation import RANKS
from jwae_module import margin_ranking, mmd_penalty, reconstruction_error
from mmfusion.data.folds import FoldedDataset
from mmfusion.data.registry import DataOptions, load_folded
from mmfusion.models.fusion import FusionModel
from mmfusion.training.grid import JWAE, PLAIN, Recipe, Setting, predict_of, selection_score, train_grid

SEEDS = range(10)


def settings() -> list[Setting]:
    """The grid, as rank_ablation has it."""
    kinds = (("jWAE", JWAE), ("plain", PLAIN))
    return [Setting(f"{kind}, rank {rank}", rank, terms) for kind, terms in kinds for rank in RANKS]


def plain_training(data: FoldedDataset, setting: Setting, seed: int, recipe: Recipe) -> nn.Module:
    """One training, without any of the project's machinery for many."""
    torch.manual_seed(seed)
    model = FusionModel(data.input_dims, recipe.latent_dim, recipe.hidden_dim, setting.rank)
    fold = data.folds[0]
    features = {name: x[fold.train] for name, x in data.pool.features.items()}
    target = data.pool.target[fold.train]
    dev = {name: x[fold.dev] for name, x in data.pool.features.items()}
    dev_target = data.pool.target[fold.dev].numpy()
    model.fit_standardisation(features)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    steps = len(target) // recipe.batch_size
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    score = selection_score(data)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(target))
        for k in range(steps):
            rows = order[k * recipe.batch_size : (k + 1) * recipe.batch_size]
            batch = {name: x[rows] for name, x in features.items()}
            present = {name: (torch.rand(len(rows)) >= recipe.modality_dropout).float() for name in batch}
            is_jwae = bool(setting.terms)
            output = model(batch, reconstruct=is_jwae, present=present)
            loss = nn.functional.binary_cross_entropy_with_logits(output.prediction.squeeze(-1), target[rows])
            if is_jwae:
                loss = loss + recipe.mmd_weight * torch.stack([mmd_penalty(z) for z in output.latents.values()]).mean()
                errors = reconstruction_error(output.standardised, output.reconstructions)
                loss = loss + recipe.reconstruction_weight * errors
                loss = loss + recipe.alignment_weight * margin_ranking(output.latents)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            annealing.step()
        with torch.no_grad():
            score(predict_of(data)(model, dev).numpy(), dev_target)
    return model


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="cmu_mosi_utterances.npz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=4, help="plain trainings per round, half of them with jWAE")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    options = parser.parse_args()
    data = load_folded(DataOptions(dataset="cmu_mosi", data=options.data))
    recipe, grid = Recipe(epochs=options.epochs), settings()
    count = len(grid) * len(SEEDS)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, CPU; {count} trainings, "
        f"{recipe.epochs} epochs of {len(data.folds[0].train) // recipe.batch_size} steps"
    )
    rows = []
    for number in range(options.rounds):
        # ranks and both kinds alike
        sample = [
            grid[(i % 2) * len(RANKS) + (number * options.sample + i) % len(RANKS)] for i in range(options.sample)
        ]
        start = time.perf_counter()
        for setting in sample:
            plain_training(data, setting, number, recipe)
        plain = (time.perf_counter() - start) / options.sample * count
        # a fresh compilation each round, as a run from the shell has it
        torch._dynamo.reset()
        compiled = timed(lambda: train_grid(data, grid, SEEDS, recipe, compile=True))
        eager = timed(lambda: train_grid(data, grid, SEEDS, recipe))
        rows.append((plain, compiled, eager))
        print(
            f"round {number + 1}: plain loop {plain:.0f} s (from {options.sample}); "
            f"at once, compiled {compiled:.0f} s, eager {eager:.0f} s",
            flush=True,
        )
    plain, compiled, eager = np.array(rows).T
    for name, seconds in (("compiled, compilation included", compiled), ("eager", eager)):
        ratio = plain / seconds
        print(
            f"at once, {name}: {np.median(seconds):.0f} s, {np.median(ratio):.1f} times faster "
            f"[{ratio.min():.1f}, {ratio.max():.1f}]"
        )
    print(f"most memory held: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
