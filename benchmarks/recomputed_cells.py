"""Five cells of the study's tables, drawn at random, from the raw labels and by other code.

    python -m benchmarks.recomputed_cells --data-root FOLDER [--draw 1]

Reads docs/results/contrasts.csv, draws deciding or other contrasts that compare rows of one grid, and computes each
again: predictions as the runs kept them (runs/reproduce-*/predictions), labels from the data set's own file, scores by
scikit-learn and NumPy, Nadeau and Bengio's interval written out. Nothing of the project is imported. Exit code 1 where
a cell differs by more than rounding.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from scipy.stats import t as student_t
from sklearn.metrics import log_loss, roc_auc_score

TOLERANCE = 2e-5  # predictions are kept in float32
WORDS = r"(?P<word>AUROC|log loss|MAE / std|correlation)"
MAIN = "jWAE-LMF, rank 4"
# experiment -> pattern of a contrast's name, and (rows that are averaged, rows that they are compared with) from it
KNOWN = {
    "baselines": (rf"over (?P<row>.+), {WORDS}", lambda m: ([MAIN], [m["row"]])),
    "rank_ablation": (
        rf"(?P<kind>jWAE|plain), {WORDS}: low over rank (?P<rank>\d+)",
        lambda m: (
            [f"{m['kind']}, rank {r}" for r in ((2, 4) if m["kind"] == "jWAE" else (4,))],
            [f"{m['kind']}, rank {m['rank']}"],
        ),
    ),
    "jwae_ablation": (
        rf"gain of jWAE at \w+ rank \((?P<ranks>[\d, ]+)\), {WORDS}",
        lambda m: tuple([f"{kind}, rank {r}" for r in m["ranks"].split(", ")] for kind in ("enforced", "off")),
    ),
}


def main() -> int:
    """Print a line for each cell; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with the data sets' files")
    parser.add_argument("--contrasts", type=Path, default=Path("docs/results/contrasts.csv"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where experiments.reproduce left its runs")
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--draw", type=int, default=0, help="seed of the draw")
    flags = parser.parse_args()
    cells = [cell for row in csv.DictReader(flags.contrasts.open(encoding="utf-8")) if (cell := known(row, flags))]
    if not cells:
        print(f"error: {flags.contrasts}: no cell whose run is in {flags.runs}, and labels in {flags.data_root}")
        return 2
    differs = False
    for k in np.random.default_rng(flags.draw).choice(len(cells), min(flags.cells, len(cells)), replace=False):
        row, grids, above, below, word, labels = cells[k]
        values = np.mean([scores(grids, name, word, labels) for name in above], 0)
        values = values - np.mean([scores(grids, name, word, labels) for name in below], 0)
        found = interval(values, ratio(grids[above[0]]))
        kept = tuple(float(row[name]) for name in ("estimate", "low", "high"))
        wrong = max(abs(a - b) for a, b in zip(found, kept, strict=True)) > TOLERANCE
        differs |= wrong
        text = "{:+.5f} [{:+.5f}, {:+.5f}]"
        print(f"{row['experiment']} on {row['dataset']}: {row['contrast']}")
        print(f"  table {text.format(*kept)}  here {text.format(*found)}  {'DIFFERS' if wrong else 'equal'}")
    return int(differs)


def known(row: dict, flags: argparse.Namespace) -> tuple | None:
    """What a cell needs, or None where this script does not know how it comes about."""
    pattern, rows_of = KNOWN.get(row["experiment"], ("$^", None))
    match, labels_of = re.fullmatch(pattern, row["contrast"]), LABELS.get(row["dataset"])
    folder = flags.runs / f"reproduce-{row['experiment']}-{row['dataset']}" / "predictions"
    if not match or labels_of is None or not folder.is_dir():
        return None
    grids = {name: grid for path in sorted(folder.glob("*.safetensors")) for name, grid in read(path).items()}
    above, below = rows_of(match)
    files = sorted(flags.data_root.glob(labels_of[0]))
    if not files or any(name not in grids for name in (*above, *below)):
        return None
    return row, grids, above, below, match["word"], labels_of[1](files[0])


def read(path: Path) -> dict[str, tuple[np.ndarray, dict]]:
    """{row: (outputs (S, F, N[, O]), about)}; rows that were trained at another step size are left out."""
    if "-step-" in path.stem:
        return {}
    with safe_open(path, "numpy") as file:
        about, outputs = json.loads(file.metadata()["about"]), file.get_tensor("outputs")
    return {name: (outputs[p], about) for p, name in enumerate(about["rows"])}


def scores(grids: dict, name: str, word: str, labels: dict[str, np.ndarray]) -> np.ndarray:
    """(F,) mean over seeds of a row's score in each fold; larger is better."""
    outputs, about = grids[name]
    target = np.array([labels[one] for one in about["ids"]], np.float64)
    trained = np.unique(np.concatenate([fold["train"] for fold in about["folds"]]))
    spread = target[trained].std(0)
    found = []
    for f, fold in enumerate(about["folds"]):
        y = target[fold["test"]]
        said = outputs[:, f, fold["test"]].astype(np.float64)
        if word == "AUROC":
            found.append(np.mean([roc_auc_score(y, one) for one in said]))
        elif word == "log loss":
            found.append(-np.mean([log_loss(y, 1 / (1 + np.exp(-one))) for one in said]))
        elif word == "correlation":
            x, y = said.reshape(len(said), len(y), -1), y.reshape(len(y), -1)
            found.append(np.mean([np.corrcoef(one[:, o], y[:, o])[0, 1] for one in x for o in range(y.shape[1])]))
        else:
            found.append(-np.mean(np.abs(said - y) / spread))
    return np.array(found)


def ratio(grid: tuple[np.ndarray, dict]) -> float:
    """Mean over folds of examples tested over examples trained on."""
    return float(np.mean([len(fold["test"]) / len(fold["train"]) for fold in grid[1]["folds"]]))


def interval(values: np.ndarray, test_over_train: float) -> tuple[float, float, float]:
    """Estimate and 95 % interval: variance of the mean (1 / J + r) s^2."""
    half = student_t.ppf(0.975, len(values) - 1) * np.sqrt((1 / len(values) + test_over_train) * values.var(ddof=1))
    return values.mean(), values.mean() - half, values.mean() + half


def arrays(key: str, splits: tuple[str, ...], identified: bool = False):
    """Labels of an .npz by the project's ids: SPLIT_NUMBER, or as the file names them."""

    def labels(path: Path) -> dict[str, np.ndarray]:
        with np.load(path) as file:
            return {
                str(file[f"id_{split}"][i]) if identified else f"{split}_{i}": value
                for split in splits
                for i, value in enumerate(file[f"{key}_{split}"])
            }

    return labels


LABELS = {
    "photo_tweets": ("photo_tweets*.npz", arrays("target", ("train", "dev"))),
    "pom": ("pom*.npz", arrays("traits", ("train", "valid", "test"))),
    "mmmo": ("mmmo*.npz", arrays("label", ("train", "dev", "test"))),
    "cmu_mosi": ("cmu_mosi*.npz", arrays("label", ("train", "test"), identified=True)),
}

if __name__ == "__main__":
    sys.exit(main())
