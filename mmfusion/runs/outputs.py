"""Files of a run: metrics.jsonl, saved models, predictions as CSV."""

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from torch import Tensor
from tqdm import tqdm

from mmfusion.dataset import Dataset, Split, Task
from mmfusion.errors import InputError
from mmfusion.files import write_text
from mmfusion.models.fusion import FusionEnsemble

EVENTS = "tensorboard"


class MetricsLog:
    """metrics.jsonl: one line per method and epoch, on disk as soon as the epoch is over.

    It is written anew when a run is resumed: the training replays the epochs that its checkpoint holds. With `events`
    the same numbers go into event files for TensorBoard, in the folder `tensorboard`.
    """

    def __init__(self, folder: Path, task: Task = "binary", events: bool = False) -> None:
        """Raises InputError where `events` is wanted and the package tensorboard is not there."""
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.score = "dev_auroc" if task == "binary" else "dev_score"
        self._writer_class = _event_writer() if events else None

    def __enter__(self) -> "MetricsLog":
        try:
            self._file: TextIO = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        shutil.rmtree(self.folder / EVENTS, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextmanager
    def stack(self, methods: Sequence[str], members: int, epochs: int) -> Iterator[Callable[[dict], None]]:
        """A progress bar, and a callback for the epochs of methods trained in one stack, `members` of each in turn."""
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=epochs, desc=f"train {methods[0]}", unit="epoch", mininterval=0.5))
            writers = []
            if self._writer_class is not None:
                places = [str(self.folder / EVENTS / plain_name(method)) for method in methods]
                writers = [stack.enter_context(self._writer_class(place)) for place in places]

            def on_epoch(record: dict) -> None:
                for i, method in enumerate(methods):
                    part = slice(i * members, (i + 1) * members)
                    loss = {term: values[part] for term, values in record["loss"].items()}
                    score = record["score"][part]
                    line = {"method": method, "epoch": record["epoch"], "loss": loss, self.score: score}
                    self._write(json.dumps(line) + "\n")
                    if writers:
                        means = {f"loss/{term}": values for term, values in loss.items()} | {self.score: score}
                        for name, values in means.items():
                            writers[i].add_scalar(name, float(np.mean(values)), record["epoch"])
                bar.update()
                bar.set_postfix({self.score: f"{sum(record['score'][:members]) / members:.3f}"})

            yield on_epoch

    def _write(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); make room, then --resume") from error


class SilentLog:
    """What a process that does not write has in place of `MetricsLog`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def stack(self, methods: Sequence[str], members: int, epochs: int) -> Iterator[None]:
        """Nothing is called."""
        yield None


def _event_writer() -> type:
    """torch's SummaryWriter. Raises InputError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # for those who ask for it alone
    except ImportError as error:
        raise InputError("--tensorboard: needs the package tensorboard; install it, or leave the flag out") from error
    return SummaryWriter


def plain_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w-]+", "-", label)


def save_ensembles(folder: Path, ensembles: Mapping[str, FusionEnsemble]) -> None:
    """The first ensemble into `folder` itself, the others (baselines) into folders below it; all can be loaded.

    config.json holds the constructor's arguments (Hugging Face hub convention) and, under "run", all of run.json.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for i, (label, ensemble) in enumerate(ensembles.items()):
        place = folder if i == 0 else folder / "baselines" / plain_name(label)
        # weights first: a folder with a config.json is whole
        ensemble.save_pretrained(place, {"method": label, "run": run})


def plain_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula: one that begins like a formula gets an apostrophe before it."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_predictions(
    folder: Path, dataset: Dataset, parts: Mapping[str, Split], predictions: Mapping[str, Tensor]
) -> None:
    """predictions_PART.csv for every part: id, label (empty where unlabelled), what is predicted, and each seed's word.

    Two classes: mean probability of class 1, and one per seed. More classes: the likeliest of the mean probabilities,
    these, and the likeliest of each seed. Labels or values: for each, the target, the mean, and one per seed.

    Args:
        parts: {part: its examples}.
        predictions: {part: (S, N) or (S, N, O)}, probabilities or values.
    """
    for name, split in parts.items():
        p = predictions[name].numpy()
        if dataset.task == "multiclass":
            columns = _class_columns(split, p, dataset.class_names)
        elif p.ndim == 2:
            called = "probability" if dataset.task == "binary" else "prediction"
            columns = _value_columns(split, p, dataset.task == "binary", "label", called, "")
        else:
            names = dataset.target_names or [f"target_{o}" for o in range(p.shape[2])]
            columns = {}
            for o, output in enumerate(names):
                target = None if split.target is None else split.target[:, o]
                own = Split({}, target, split.ids)
                whole = dataset.task == "multilabel"
                columns |= _value_columns(own, p[..., o], whole, output, f"{output}_predicted", f"{output}_")
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["id", *map(plain_cell, columns)])
        table.writerows(zip(map(plain_cell, split.ids), *columns.values(), strict=True))
        write_text(folder / f"predictions_{name}.csv", text.getvalue())


def _value_columns(
    split: Split, p: np.ndarray, whole: bool, label: str, mean: str, prefix: str
) -> dict[str, Sequence[object]]:
    """Columns of one output: target, mean over seeds, one per seed; p is (S, N)."""
    targets: Sequence[object] = [""] * len(split)
    if split.target is not None:
        targets = (split.target.int() if whole else split.target).tolist()
    # repr of a float32 reads back as the same float32
    columns = {label: targets, mean: [str(value) for value in p.mean(0)]}
    return columns | {f"{prefix}seed_{seed}": [str(value) for value in values] for seed, values in enumerate(p)}


def _class_columns(split: Split, p: np.ndarray, names: Sequence[str]) -> dict[str, Sequence[object]]:
    """Columns of a choice between classes: target, choice, mean probability of each, each seed's choice."""
    shown = [plain_cell(name) for name in names]
    targets = [""] * len(split) if split.target is None else [shown[int(c)] for c in split.target.tolist()]
    mean = p.mean(0)  # (N, C)
    columns: dict[str, Sequence[object]] = {"label": targets, "prediction": [shown[c] for c in mean.argmax(1)]}
    columns |= {f"probability_{name}": [str(value) for value in mean[:, c]] for c, name in enumerate(names)}
    return columns | {f"seed_{s}": [shown[c] for c in values.argmax(1)] for s, values in enumerate(p)}
