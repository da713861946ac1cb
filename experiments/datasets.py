"""Which data sets the experiments know, where their files lie, and how each becomes a study."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cmu_mosi_loader import load_cmu_mosi
from corpus import Corpus, InputError
from experiments.study import Study, study_of
from frozen_encoders import EncoderConfig
from hateful_memes_loader import load_hateful_memes
from main_hateful_memes import Config as MemesConfig
from main_hateful_memes import Source, find_source
from main_hateful_memes import load as load_memes
from meme_annotations import find_annotations
from mustard_loader import load_mustard
from pom_loader import load_pom
from torchrun_processes import Processes

Dataset = Literal["demo", "cmu_mosi", "mustard", "pom", "hateful_memes"]


@dataclass(frozen=True)
class DataOptions:
    """Flags that every experiment has in common and that say what it works on."""

    dataset: Dataset = "demo"
    """demo draws its own memes; cmu_mosi also reads CMU-MOSEI and UR-FUNNY in the same layouts"""
    data: Path | None = None
    """the data set's file: .npz or .pkl (cmu_mosi), sarcasm_data.json (mustard), .npz (pom), train.jsonl (memes)"""
    folds: Path | None = None
    """mustard: split_indices.p or a JSON list of folds; default: found beside the annotations"""
    protocol: Literal["speaker_dependent", "speaker_independent"] = "speaker_dependent"
    """mustard: the five released folds, or the split by show in which no speaker is shared"""
    audio: Path | None = None
    """mustard: audio_features.p as released"""
    visual: Path | None = None
    """mustard: resnet_pool5.hdf5 as released"""
    task: Literal["auto", "regression", "binary"] = "auto"
    """cmu_mosi: sentiment in [-3, 3], or its polarity; auto takes what the labels are"""
    img_dir: Path | None = None
    """memes: folder of the images"""
    image_encoder: str = "resnet50"
    """memes: a Hugging Face name, a local folder or a weights file"""
    text_encoder: str = "bert-base-uncased"
    """memes and mustard: a Hugging Face name or a local model folder"""
    cache_dir: Path = Path("cache")
    """where encoded texts and images (and the demo) are kept between runs"""


def load_study(options: DataOptions, device: str = "cpu") -> Study:
    """The data set that the flags name. Raises InputError naming the flag or the file."""
    return study_of(load_corpora(options, device))


def load_corpora(options: DataOptions, device: str = "cpu") -> list[Corpus]:
    """The data set that the flags name, one corpus per fold. Raises InputError naming the flag or the file."""
    if options.dataset != "demo" and options.data is None:
        raise InputError(f"--data: --dataset {options.dataset} needs the path of its file")
    if options.dataset == "demo" and options.data is not None:
        raise InputError(f"--data {options.data}: say which data set it is with --dataset; the demo draws its own")
    return _LOADERS[options.dataset](options, device)


def memes_source(options: DataOptions) -> Source | None:
    """Where the memes lie, and what encodes them; None for data sets without pictures."""
    if options.dataset == "demo":
        return find_source(MemesConfig(cache_dir=options.cache_dir), Processes(), quiet=True)
    if options.dataset == "hateful_memes":
        encoders = EncoderConfig(image_encoder=options.image_encoder, text_encoder=options.text_encoder)
        return Source(find_annotations(options.data)["train"], options.img_dir, encoders)
    return None


def _demo(options: DataOptions, device: str) -> list[Corpus]:
    return [load_memes(MemesConfig(cache_dir=options.cache_dir), Processes(device=device))]


def _memes(options: DataOptions, device: str) -> list[Corpus]:
    source = memes_source(options)
    return [load_hateful_memes(source.jsonl, source.img_dir, source.encoders, options.cache_dir, device=device)]


def _cmu_mosi(options: DataOptions, device: str) -> list[Corpus]:
    return [load_cmu_mosi(options.data, options.task)]


def _mustard(options: DataOptions, device: str) -> list[Corpus]:
    corpora = load_mustard(
        options.data,
        EncoderConfig(text_encoder=options.text_encoder),
        options.cache_dir,
        folds=options.folds,
        audio=options.audio,
        visual=options.visual,
        protocol=options.protocol,
        device=device,
    )
    return [replace(corpus, name="mustard") for corpus in corpora]


def _pom(options: DataOptions, device: str) -> list[Corpus]:
    return [load_pom(options.data, "mean_std")]


_LOADERS: dict[str, Callable[[DataOptions, str], list[Corpus]]] = {
    "demo": _demo,
    "cmu_mosi": _cmu_mosi,
    "mustard": _mustard,
    "pom": _pom,
    "hateful_memes": _memes,
}
