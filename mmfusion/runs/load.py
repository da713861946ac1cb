"""Loading of a finished run: its models, its data and its encoders.

Three commands leave models behind: `python main_hateful_memes.py`, `python -m mmfusion.train` and `python -m
experiments.baselines`; `mmfusion.train.fit` leaves what the second does.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from hateful_memes_loader import find_annotations, image_paths
from mmfusion.data.array_files import read_arrays
from mmfusion.data.arrays import ArraysConfig, dataset_from_arrays, describe_arrays, load_arrays, with_kept
from mmfusion.data.folds import FoldedDataset, datasets_of, fold_datasets
from mmfusion.data.memes import MemesConfig, MemesSource, find_source, load_memes
from mmfusion.data.registry import CORPORA, StudyOptions, folded, load_datasets, memes_source, text_encoders
from mmfusion.dataset import Dataset, Task
from mmfusion.distributed import Processes
from mmfusion.encoders.frozen import EncoderConfig, compute_dtype
from mmfusion.errors import InputError
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.models.pretrained import read_config
from mmfusion.models.token_ensemble import TokenConfig, TokenEnsemble, load_ensemble
from mmfusion.runs.folder import is_complete, same_data
from mmfusion.runs.settings import config_from, read_run

Settings = TypeVar("Settings")

ARRAYS = "arrays.npz"
"""arrays that were given from Python are kept in the run's own folder"""
MODEL_KEEPERS = ("baselines", "train")  # experiments whose runs keep models; "train" is what baselines was called
TEXT_COLUMNS = {modality: column for corpus in CORPORA.values() for modality, column in corpus.texts.items()}
"""columns of the metadata that hold what a modality was encoded from"""


@dataclass(frozen=True)
class TrainedRun:
    """What a run has learned, and from what."""

    folder: Path
    data: FoldedDataset
    """all examples in one pool, and the folds"""
    datasets: list[Dataset]
    """as loaded, one per fold: splits that the study leaves out, and unlabelled ones, are here, unless it cut the data
    anew or planted labels: then they are the study's own folds"""
    ensembles: dict[str, FusionEnsemble | TokenEnsemble]
    """{row: all its members, seed-major, then fold}; jWAE-LMF first"""
    seeds: list[int]
    settings: dict[str, object]
    """as in run.json"""
    encoders: EncoderConfig | None
    """None where the features came as they are from a file"""
    memes: MemesSource | None
    """for runs on memes: where they lie"""
    cache_dir: Path
    trained_on_dev: bool

    @property
    def task(self) -> Task:
        """One of `mmfusion.dataset.Task`."""
        return self.data.task

    @property
    def main_row(self) -> str:
        """jWAE-LMF at the run's rank."""
        return next(iter(self.ensembles))

    @property
    def prior_free_row(self) -> str | None:
        """The same model trained without the prior (and, in `experiments.baselines`, without any jWAE term)."""
        return next((row for row in ("LMF without jWAE", "jWAE-LMF, no prior") if row in self.ensembles), None)

    @property
    def identity(self) -> str:
        """SHA-256 of the main row's weights: which models a measurement was made of."""
        return hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()

    def members(self, row: str, fold: int = 0) -> list[FusionModel]:
        """The members of one row that were trained on one fold, one per seed."""
        return list(self.ensembles[row].members)[fold :: len(self.data.folds)]

    def image_paths(self, ids: Sequence[str]) -> dict[str, Path]:
        """The image file of each id; for runs on memes. Raises InputError where the folder is gone.

        A run whose image features came from a file needs no pictures: without their folder there are none.
        """
        if "image" in self.memes.given:
            with contextlib.suppress(InputError):
                return image_paths(ids, self.memes.jsonl.parent, self.memes.img_dir)
            return {}
        return image_paths(ids, self.memes.jsonl.parent, self.memes.img_dir)

    def texts(self, dataset: Dataset, split: str) -> dict[str, list[str]]:
        """What the modalities that were encoded from text were encoded from, example by example."""
        if self.encoders is None:
            return {}
        metadata = dataset.splits[split].metadata
        given = self.memes.given if self.memes else ()
        names = [name for name in dataset.input_dims if TEXT_COLUMNS.get(name) in metadata and name not in given]
        return {name: metadata[TEXT_COLUMNS[name]] for name in names}


def load_run(folder: Path, device: str = "cpu", with_tokens: bool = False) -> TrainedRun:
    """Read models and data of a finished run; the data are those that its settings name, encoded or from the cache.

    `with_tokens`: a run whose models take sequences will do; else it is refused.

    A run of CUDA is read on a machine without it, and the other way round, from the features that it was trained on.

    Raises InputError where the folder holds no such run, or the data are no longer those that it was trained on.
    """
    begun = _read_run(folder)
    settings, path = begun["settings"], folder / "run.json"
    # runs of before kept paths as they were typed: relative to the folder that holds runs/
    started_in = folder.absolute().parent.parent
    settings |= {
        name: str(started_in / settings[name])
        for name in ("cache_dir", "data", "folds", "audio", "visual", "jsonl", "img_dir")
        if isinstance(settings.get(name), str)
    }
    ensembles = _read_ensembles(folder)
    tokens = config_from(TokenConfig, settings, path)
    if tokens.takes_tokens and not with_tokens:
        raise InputError(
            f"{folder}: its models take tokens (--fusion {tokens.fusion}), this command vectors; give it a run of "
            "--fusion lmf, or explain this one with python -m mmfusion.explain"
        )
    device = _features_device(begun["data"], device)
    memes = encoders = None
    if begun["data"].get("loader") == "arrays":
        config = config_from(ArraysConfig, settings, path)
        kept = folder / ARRAYS  # arrays that were given from Python
        if kept.exists():
            name = str(begun["data"].get("name"))
            datasets = dataset_from_arrays(read_arrays(kept)[0], config, name, tokens=tokens.takes_tokens)
            if "dataset" in begun["data"]:
                datasets = with_kept(datasets, begun["data"]["dataset"])
        else:
            datasets = load_arrays(config, tokens.takes_tokens)
        data = fold_datasets(datasets)
        now = describe_arrays(datasets)
        trained_on_dev = False
    elif "experiment" in begun["data"]:
        options = config_from(StudyOptions, settings, path)
        datasets = load_datasets(replace(options, plant=None), device)
        data = folded(datasets, options)
        if options.cross_validate is not None or options.plant is not None:
            datasets = datasets_of(data, datasets[0])
        now = {"experiment": begun["data"]["experiment"], **data.description}
        memes = memes_source(options)
        if memes is None:
            encoders = text_encoders(options)
        # where dev itself is tested on, nothing but train was trained on
        overlap = any(bool(torch.isin(fold.dev, fold.test).any()) for fold in data.folds)
        trained_on_dev = not settings.get("hold_out_dev", False) and not overlap
    else:
        memes_config, choices = config_from(MemesConfig, settings, path), config_from(EncoderConfig, settings, path)
        processes = Processes(device=device)
        datasets = [load_memes(memes_config, choices, processes, quiet=True, tokens=tokens.takes_tokens)]
        data = fold_datasets(datasets)
        now = datasets[0].description
        memes = find_source(memes_config, choices, processes, quiet=True)
        trained_on_dev = False
    now |= {key: begun["data"][key] for key in ("further_terms",) if key in begun["data"]}  # of Python alone
    if memes is not None:
        memes = replace(memes, jsonl=find_annotations(memes.jsonl)["train"])
        encoders = memes.encoders
    cache_dir = Path(settings.get("cache_dir", "cache"))
    seeds = settings["seeds"]
    seeds = list(seeds) if isinstance(seeds, list) else list(range(int(seeds)))  # the main script used to list them
    first_seed = settings.get("first_seed", 0)
    seeds = [first_seed + seed for seed in seeds] if isinstance(first_seed, int) else seeds
    if not same_data(begun["data"], now):
        raise InputError(
            f"{folder}: was trained on other data, or with other encoders, than its settings lead to now; bring them "
            "back, or train it anew"
        )
    for label, ensemble in ensembles.items():
        if len(ensemble.members) != len(seeds) * len(data.folds):
            raise InputError(
                f"{folder}: {label!r} has {len(ensemble.members)} members, not {len(seeds)} seeds x "
                f"{len(data.folds)} folds; its files are of several runs, train it anew"
            )
    return TrainedRun(folder, data, datasets, ensembles, seeds, settings, encoders, memes, cache_dir, trained_on_dev)


def _features_device(data: Mapping[str, object], device: str) -> str:
    """`device`, or the kind of device whose arithmetic gave the run its features: the two are cached apart.

    Cached vectors are read without such a device, and missing ones are encoded on it: InputError where it is lacking.
    """
    encoders = data.get("encoders")
    encoders = encoders.values() if isinstance(encoders, dict) else ()
    computes = {encoder.get("compute") for encoder in encoders if isinstance(encoder, dict)}
    return next((kind for kind in (device, "cpu", "cuda") if computes <= {compute_dtype(kind)}), device)


def _read_run(folder: Path) -> dict[str, dict]:
    remedy = (
        "train one with main_hateful_memes.py, python -m mmfusion.train or experiments.baselines, "
        "and give its folder, such as runs/demo"
    )
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: holds no run (no run.json); {remedy}")
    begun = read_run(folder)
    experiment = begun["data"].get("experiment", "baselines")
    if experiment not in MODEL_KEEPERS:
        raise InputError(f"{folder}: a run of experiments.{experiment} keeps no models; {remedy}")
    if not is_complete(folder):
        raise InputError(f"{folder}: this run has not come to its end; go on with it with --resume first")
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: keeps no model.safetensors; {remedy}")
    if "seeds" not in begun["settings"]:
        raise InputError(f"{folder / 'run.json'}: damaged (settings without seeds); {remedy}")
    return begun


def _read_ensembles(folder: Path) -> dict[str, FusionEnsemble | TokenEnsemble]:
    """The run's own ensemble, then its baselines in the order in which they were saved."""
    places = [folder, *(path.parent for path in (folder / "baselines").glob("*/config.json"))]
    places[1:] = sorted(places[1:], key=lambda place: ((place / "config.json").stat().st_mtime_ns, place.name))
    ensembles = {}
    for place in places:
        config = read_config(place)
        label = config.get("method", config.get("row"))  # what a method was called before
        if not isinstance(label, str):
            raise InputError(f"{place / 'config.json'}: names no method; train the run anew")
        ensembles[label] = load_ensemble(place).requires_grad_(False)
    return ensembles
