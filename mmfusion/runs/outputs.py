"""Files of a run: metrics.jsonl, saved models, predictions as CSV."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

from mmfusion.dataset import Dataset
from mmfusion.errors import InputError
from mmfusion.files import write_text
from mmfusion.models.fusion import FusionEnsemble


class MetricsLog:
    """metrics.jsonl: one line per method and epoch, on disk as soon as the epoch is over.

    It is written anew when a run is resumed: the training replays the epochs that its checkpoint holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "MetricsLog":
        try:
            self._file: TextIO = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextmanager
    def stack(self, methods: Sequence[str], seeds: int, epochs: int) -> Iterator[Callable[[dict], None]]:
        """A progress bar, and a callback for the epochs of methods trained in one stack (members method-major)."""
        with tqdm(total=epochs, desc=f"train {methods[0]}", unit="epoch", mininterval=0.5) as bar:

            def on_epoch(record: dict) -> None:
                for i, method in enumerate(methods):
                    part = slice(i * seeds, (i + 1) * seeds)
                    loss = {term: values[part] for term, values in record["loss"].items()}
                    line = {
                        "method": method,
                        "epoch": record["epoch"],
                        "loss": loss,
                        "dev_auroc": record["score"][part],
                    }
                    self._write(json.dumps(line) + "\n")
                bar.update()
                bar.set_postfix(dev_auroc=f"{sum(record['score'][:seeds]) / seeds:.3f}")

            yield on_epoch

    def _write(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); make room, then --resume") from error


def save_ensembles(folder: Path, ensembles: Mapping[str, FusionEnsemble]) -> None:
    """The first ensemble into `folder` itself, the others (baselines) into folders below it; all can be loaded.

    config.json holds the constructor's arguments (Hugging Face hub convention) and, under "run", all of run.json.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for i, (label, ensemble) in enumerate(ensembles.items()):
        place = folder if i == 0 else folder / "baselines" / re.sub(r"[^\w-]+", "-", label)
        # weights first: a folder with a config.json is whole
        ensemble.save_pretrained(place, {"method": label, "run": run})


def plain_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula: one that begins like a formula gets an apostrophe before it."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_predictions(folder: Path, dataset: Dataset, probabilities: Mapping[str, Tensor]) -> None:
    """predictions_SPLIT.csv for every split: id, label (empty where unlabelled), mean probability, one per seed."""
    for name, split in dataset.splits.items():
        p = probabilities[name].numpy()  # (S, N)
        labels = [""] * len(split) if split.target is None else split.target.int().tolist()
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["id", "label", "probability", *(f"seed_{seed}" for seed in range(len(p)))])
        for n, (key, label) in enumerate(zip(split.ids, labels, strict=True)):
            # repr of a float32 reads back as the same float32
            table.writerow([plain_cell(key), label, str(p[:, n].mean()), *(str(value) for value in p[:, n])])
        write_text(folder / f"predictions_{name}.csv", text.getvalue())
