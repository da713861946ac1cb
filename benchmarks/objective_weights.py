"""What the weights of the objective do: the score on held-out data, and how near the latents come to the prior.

    python -m benchmarks.objective_weights
    python -m benchmarks.objective_weights --mustard sarcasm_data.json --mustard-folds folds.json --text-encoder FOLDER

One term's weight is varied at a time, from the defaults; latents are certain, nothing is dropped out. Every setting
and seed of a table is one member of one stack, and members of one seed share initial values and batches, so that
differences between settings are paired. No test split takes part: the demo is scored on its dev split, MUStARD
(utterance against context, Castro et al. 2019) by an inner five-fold cross-validation of the training part of its first
released fold.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from mmfusion.data.folds import FoldedDataset, fold_datasets, with_dev_in_training
from mmfusion.data.memes import MemesConfig, load_memes
from mmfusion.data.mustard import load_mustard
from mmfusion.dataset import Split, take
from mmfusion.distributed import Processes
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.losses.contrastive import margin_ranking
from mmfusion.metrics.format import mean_std
from mmfusion.models.fusion import FusionModel
from mmfusion.training.feed import Batch, Member
from mmfusion.training.objective import objective, predict
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig
from mmfusion.training.trainer import Problem, Schedule, TrainingData, train

DEFAULT = {
    "bce": 1.0,
    "mmd": ObjectiveConfig.mmd_weight,
    "reconstruction": ObjectiveConfig.reconstruction_weight,
    "alignment": 0.0,  # InfoNCE
    "margin": ObjectiveConfig.alignment_weight,
}
CHANGES = [
    *({"mmd": weight} for weight in (0.0, 0.1, 1.0, 10.0)),
    *({"reconstruction": weight} for weight in (0.0, 0.1, 1.0)),
    *({"margin": weight} for weight in (0.0, 0.1, 1.0)),
    *({"margin": 0.0, "alignment": weight} for weight in (0.01, 0.1)),
]


def settings() -> list[dict[str, float]]:
    """The defaults first, then every single change of them."""
    changed = [DEFAULT | change for change in CHANGES]
    return [DEFAULT, *(s for s in changed if s != DEFAULT)]


def objective_with_margin(model, batch: Batch) -> dict[str, Tensor]:
    """The main script's terms, with the margin ranking loss beside InfoNCE."""
    margin = {"margin": lambda output, batch: margin_ranking(output.latents)}
    return objective(model, batch, alignment="info_nce", further=margin)


@torch.inference_mode()
def distance_from_prior(model: FusionModel, features: dict[str, Tensor]) -> tuple[float, float]:
    """Mean over modalities and coordinates of |mean|, and of |std - 1|, of held-out latents: 0 and 0 under N(0, I)."""
    latents = torch.cat(list(model.encode(features).values()), dim=1)
    return latents.mean(0).abs().mean().item(), (latents.std(0) - 1).abs().mean().item()


def measure(train_split: Split, held_out: Split, seeds: int, epochs: int) -> np.ndarray:
    """(settings, seeds, 3): AUROC at the best epoch, |mean| and |std - 1| there."""
    dims = {name: x.shape[1] for name, x in train_split.features.items()}

    def build(_: Member) -> FusionModel:
        model = FusionModel(dims)
        model.fit_standardisation(train_split.features)
        return model

    members = [Member(seed, weights, TrainingConfig.weight_decay) for weights in settings() for seed in range(seeds)]
    schedule = Schedule(
        epochs=epochs, batch_size=TrainingConfig.batch_size, learning_rate=TrainingConfig.learning_rate, patience=epochs
    )
    score = lambda logits, target: roc_auc_score(target, logits)  # noqa: E731
    trained = train(
        Problem(build, objective_with_margin, predict, score), members, TrainingData(train_split, held_out), schedule
    )
    rows = [
        (best, *distance_from_prior(model, held_out.features))
        for best, model in zip(trained.best_score, trained.models, strict=True)
    ]
    return np.array(rows).reshape(len(settings()), seeds, 3)


def mustard(annotations: Path, folds: Path, encoder: str, cache_dir: Path) -> FoldedDataset:
    """The first fold alone: utterance and context vectors, target sarcasm; its test part is not used."""
    return fold_datasets(load_mustard(annotations, EncoderConfig(text_encoder=encoder), cache_dir, folds=folds)[:1])


def print_table(title: str, results: np.ndarray) -> None:
    """results (settings, runs, 3); differences of AUROC are paired with the default over runs."""
    print(f"\n{title}")
    print("  mmd reconstr.  InfoNCE  margin            AUROC     minus default   |mean|  |std-1|")
    for weights, runs in zip(settings(), results, strict=True):
        difference = runs[:, 0] - results[0, :, 0]
        print(
            f"{weights['mmd']:5g} {weights['reconstruction']:9g} {weights['alignment']:8g} {weights['margin']:7g}   "
            f"{mean_std(runs[:, 0])} "
            f"{difference.mean():+8.3f} +- {difference.std(ddof=1):.3f}   "
            f"{runs[:, 1].mean():6.2f} {runs[:, 2].mean():8.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cache-dir", type=Path, default=MemesConfig.cache_dir)
    parser.add_argument("--mustard", type=Path, help="sarcasm_data.json as released")
    parser.add_argument("--mustard-folds", type=Path, help="the five released folds, as JSON")
    parser.add_argument("--text-encoder", help="for MUStARD: a local folder or a Hugging Face name")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; first row: the defaults")

    dataset = load_memes(MemesConfig(cache_dir=options.cache_dir), EncoderConfig(), Processes())
    start = time.perf_counter()
    results = measure(dataset.splits["train"], dataset.splits["dev"], options.seeds, options.epochs)
    seconds = time.perf_counter() - start
    print_table(f"demo, dev, n = 192, {options.seeds} seeds, {options.epochs} epochs ({seconds:.0f} s)", results)

    if options.mustard:
        data = mustard(options.mustard, options.mustard_folds, options.text_encoder, options.cache_dir)
        split = take(data.pool, with_dev_in_training(data).folds[0].train)
        folds = StratifiedKFold(5, shuffle=True, random_state=0).split(np.zeros(len(split)), split.target)
        start = time.perf_counter()
        results = np.concatenate(
            [measure(take(split, a), take(split, b), options.seeds, options.epochs) for a, b in folds], axis=1
        )
        seconds = time.perf_counter() - start
        title = f"MUStARD, inner 5-fold of fold 0's training part, n = {len(split)}, {options.seeds} seeds"
        print_table(f"{title}, {options.epochs} epochs ({seconds:.0f} s)", results)


if __name__ == "__main__":
    main()
