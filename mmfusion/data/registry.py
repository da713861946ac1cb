"""Registry of the datasets: their loaders, the flags they take, and a check that all values are finite.

A new one is a loader that returns `Dataset`s, and its line in CORPORA; a flag of its own, if it needs one, is a field
of `DataOptions` (docs/extend.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from mmfusion.data.array_targets import TaskChoice
from mmfusion.data.arrays import ArraysConfig, load_arrays
from mmfusion.data.captions import BOUNDS as CAPTION_BOUNDS
from mmfusion.data.captions import CAPTIONS, load_captions
from mmfusion.data.cmu_mosi import load_cmu_mosi
from mmfusion.data.cmu_mosi_texts import cut_by_video, encode_transcripts
from mmfusion.data.folds import FoldedDataset, cross_validated, fold_datasets
from mmfusion.data.memes import MemesConfig, MemesSource, find_source, load_memes
from mmfusion.data.mmmo import load_mmmo
from mmfusion.data.mustard import load_mustard
from mmfusion.data.pairs import BOUNDS, load_pairs
from mmfusion.data.planted import PlantedConfig, PlantedKind, plant
from mmfusion.data.pom import load_pom
from mmfusion.data.synthetic import SyntheticConfig, synthetic
from mmfusion.data.synthetic_truth import truth
from mmfusion.dataset import Dataset
from mmfusion.distributed import Processes
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.errors import InputError, check_numbers
from mmfusion.sequences import Sequences


@dataclass(frozen=True)
class Corpus:
    """One dataset by name: everything that commands know of it."""

    load: Callable[["DataOptions", str], list[Dataset]]
    """(flags, device) -> one dataset per fold"""
    flags: tuple[str, ...] = ()
    """fields of `DataOptions`, beside `data`, that it has a use for; any other that is given is refused"""
    texts: Mapping[str, str] = field(default_factory=dict)
    """modalities that the text encoder made -> column of the metadata that holds their texts"""


def _memes_config(options: "DataOptions") -> tuple[MemesConfig, EncoderConfig]:
    data = MemesConfig(options.data, options.img_dir, cache_dir=options.cache_dir, features=options.features)
    return data, EncoderConfig(image_encoder=options.image_encoder, text_encoder=options.text_encoder)


def _memes(options: "DataOptions", device: str) -> list[Dataset]:
    return [load_memes(*_memes_config(options), Processes(device=device), tokens=options.tokens)]


def _cmu_mosi(options: "DataOptions", device: str) -> list[Dataset]:
    if isinstance(options.folds, Path):
        raise InputError(f"--folds {options.folds}: with --dataset cmu_mosi, give a number of folds")
    dataset = load_cmu_mosi(options.data, options.task, tokens=options.tokens)
    if options.text_encoder is not None:
        encoders = EncoderConfig(text_encoder=options.text_encoder)
        dataset = encode_transcripts(dataset, encoders, options.cache_dir, device, tokens=options.tokens)
    lengths = [x.lengths for x in dataset.splits["train"].features.values() if isinstance(x, Sequences)]
    if options.tokens and all(int(one.max()) <= 1 for one in lengths):
        raise InputError(
            f"--tokens: {options.data} holds one vector of each utterance and modality; give --text-encoder, which "
            "makes tokens of its transcripts, or a file of sequences"
        )
    return [dataset] if options.folds is None else cut_by_video(dataset, options.folds, options.split_seed)


def _mustard(options: "DataOptions", device: str) -> list[Dataset]:
    if isinstance(options.folds, int):
        raise InputError(f"--folds {options.folds}: mustard has folds of its own; give their file, or no flag")
    datasets = load_mustard(
        options.data,
        EncoderConfig(text_encoder=options.text_encoder),
        options.cache_dir,
        folds=options.folds,
        audio=options.audio,
        visual=options.visual,
        protocol=options.protocol,
        device=device,
        tokens=options.tokens,
    )
    return [replace(dataset, name="mustard") for dataset in datasets]


def _pom(options: "DataOptions", device: str) -> list[Dataset]:
    return [load_pom(options.data, "steps" if options.tokens else "mean_std")]


def _mmmo(options: "DataOptions", device: str) -> list[Dataset]:
    return [load_mmmo(options.data, "steps" if options.tokens else "mean_std")]


def _arrays(options: "DataOptions", device: str) -> list[Dataset]:
    if isinstance(options.folds, Path):
        raise InputError(f"--folds {options.folds}: with --dataset arrays, give a number of folds")
    shared = {one.name: getattr(options, one.name) for one in fields(ArraysConfig)}
    return load_arrays(ArraysConfig(**shared), options.tokens)


def _pairs(options: "DataOptions", device: str) -> list[Dataset]:
    if isinstance(options.folds, Path):
        raise InputError(f"--folds {options.folds}: with --dataset pairs, give a number of random cuts")
    check_numbers(options, BOUNDS)
    share = 0.5 if options.hold_out is None else options.hold_out
    splits = 1 if options.folds is None else options.folds
    return load_pairs(options.data, options.modalities, splits, share, options.split_seed)


def _captions(options: "DataOptions", device: str) -> list[Dataset]:
    check_numbers(options, CAPTION_BOUNDS)
    encoders = EncoderConfig(image_encoder=options.image_encoder, text_encoder=options.text_encoder)
    return [
        load_captions(
            options.data,
            options.img_dir,
            encoders,
            options.cache_dir,
            captions_per_image=options.captions_per_image,
            seed=options.split_seed,
            device=device,
        )
    ]


def synthetic_config(options: "DataOptions") -> SyntheticConfig:
    """The dials that the flags set; raises InputError naming the flag."""
    flags = dict.fromkeys(SYNTHETIC_FLAGS, (0.0, 1.0)) | {"synthetic_noise": (0.0, 1e3)}
    check_numbers(options, flags | {"synthetic_examples": (20, 10_000_000), "split_seed": (0, 2**31 - 1)})
    return SyntheticConfig(
        shared=options.synthetic_shared,
        unique=options.synthetic_unique,
        synergy=options.synthetic_synergy,
        alignment=options.synthetic_alignment,
        gaussian=options.synthetic_noise,
        train=options.synthetic_examples,
        dev=options.synthetic_examples // 4,
        test=options.synthetic_examples,
        seed=options.split_seed,
    )


def _synthetic(options: "DataOptions", device: str) -> list[Dataset]:
    config = synthetic_config(options)
    dataset, known = synthetic(config), truth(config)
    note = (
        f"no accuracy can be above {known.bayes.value:.4f} but by chance, without products {known.additive.value:.4f}"
    )
    return [replace(dataset, notes=[note])]


SYNTHETIC_FLAGS = (
    "synthetic_shared",
    "synthetic_unique",
    "synthetic_synergy",
    "synthetic_alignment",
    "synthetic_noise",
    "synthetic_examples",
)
CORPORA: dict[str, Corpus] = {
    "demo": Corpus(_memes, ("tokens",), {"text": "transcript"}),
    "cmu_mosi": Corpus(_cmu_mosi, ("task", "folds", "split_seed", "text_encoder", "tokens"), {"text": "transcript"}),
    "mustard": Corpus(
        _mustard,
        ("folds", "protocol", "audio", "visual", "text_encoder", "tokens"),
        {"utterance": "transcript", "context": "context"},
    ),
    "pom": Corpus(_pom, ("tokens",)),
    "mmmo": Corpus(_mmmo, ("tokens",)),
    "hateful_memes": Corpus(
        _memes, ("img_dir", "image_encoder", "text_encoder", "features", "tokens"), {"text": "transcript"}
    ),
    "arrays": Corpus(_arrays, ("folds", "task", "target", "modalities", "ignore", "hold_out", "split_seed", "tokens")),
    "pairs": Corpus(_pairs, ("folds", "modalities", "hold_out", "split_seed")),
    "captions": Corpus(
        _captions,
        ("img_dir", "image_encoder", "text_encoder", "captions_per_image", "split_seed"),
        {"text": "transcript"},
    ),
    "synthetic": Corpus(_synthetic, (*SYNTHETIC_FLAGS, "split_seed")),
}
DRAWN = ("demo", "synthetic")  # they read no file
DatasetName = Literal[*CORPORA]


@dataclass(frozen=True)
class DataOptions:
    """Flags that every experiment has in common and that say what it works on."""

    dataset: DatasetName = "demo"
    """demo draws its own memes, synthetic vectors whose best accuracy is known; cmu_mosi also reads CMU-MOSEI and
    UR-FUNNY in the same layouts"""
    data: Path | None = None
    """the data set's file: .npz or .pkl (cmu_mosi), sarcasm_data.json (mustard), .npz (pom, mmmo), train.jsonl (memes);
    captions: folder or file of Flickr8k or COCO; own arrays: .npz, a folder of .npy files, or .safetensors"""
    tokens: bool = False
    """sequences of tokens or steps in place of one vector of each modality: words, cells or patches of pictures, steps
    of audio and video"""
    folds: int | Path | None = None
    """arrays without splits, cmu_mosi (whole videos): number of folds; mustard: split_indices.p or a JSON list of
    folds, else found beside the annotations"""
    protocol: Literal["speaker_dependent", "speaker_independent"] = "speaker_dependent"
    """mustard: the five released folds, or the split by show in which no speaker is shared"""
    audio: Path | None = None
    """mustard: audio_features.p as released"""
    visual: Path | None = None
    """mustard: resnet_pool5.hdf5 as released"""
    task: TaskChoice = "auto"
    """arrays: what the target is; cmu_mosi: regression of sentiment in [-3, 3], or binary, its polarity; auto takes
    what the labels are, and says so"""
    target: str = ArraysConfig.target
    """arrays: key of the target, without the split"""
    modalities: tuple[str, ...] = ()
    """arrays: keys of the modalities, without the split; default: all keys that are not otherwise known"""
    ignore: tuple[str, ...] = ()
    """arrays: keys to leave out, without the split"""
    hold_out: float | None = None
    """arrays without splits: share of the examples that is held out for test"""
    split_seed: int = ArraysConfig.split_seed
    """arrays, cmu_mosi, captions: seed of the draws that cut test, folds and dev; synthetic: of the whole draw"""
    synthetic_shared: float = SyntheticConfig.shared
    """synthetic: share of the label's variance that both modalities carry; the shares sum to at most 1"""
    synthetic_unique: float = SyntheticConfig.unique
    """synthetic: share that one of the modalities carries, half of it each"""
    synthetic_synergy: float = SyntheticConfig.synergy
    """synthetic: share of a product of two factors, one in each modality"""
    synthetic_alignment: float = SyntheticConfig.alignment
    """synthetic: correlation of the modalities' copies of what they share"""
    synthetic_noise: float = SyntheticConfig.gaussian
    """synthetic: standard deviation of Gaussian noise on the features, whose own is 1"""
    synthetic_examples: int = SyntheticConfig.train
    """synthetic: examples trained on, and as many tested on"""
    img_dir: Path | None = None
    """memes, captions: folder of the images"""
    captions_per_image: int = CAPTIONS
    """captions: of each image that is trained on, at most this many; of one that is tested on, five at most"""
    image_encoder: str | None = EncoderConfig.image_encoder
    """memes, captions: resnet50 (default), a Hugging Face name, timm:NAME, a local folder or a weights file"""
    text_encoder: str | None = EncoderConfig.text_encoder
    """memes, captions, mustard: a Hugging Face name (default bert-base-uncased) or a local model folder; cmu_mosi:
    encodes the transcripts anew, without the vectors of the .npz that were fitted on labels"""
    features: tuple[str, ...] = ()
    """memes: MODALITY=FILE of vectors that were encoded elsewhere, by img key; image or text then needs no encoder"""
    cache_dir: Path = Path("cache")
    """where encoded texts and images (and the demo) are kept between runs"""
    plant: PlantedKind | None = None
    """experiments: labels of known truth in place of the data's own, features as they are: a positive control"""
    plant_rank: int = PlantedConfig.rank
    """rank of a planted interaction"""
    plant_strength: float = PlantedConfig.strength
    """0 to 1: share of an interaction in the logit's variance, of one modality in it, or of chance in calibration"""
    plant_seed: int = PlantedConfig.seed
    """of the planted function and its labels"""
    plant_noise: float = PlantedConfig.noise
    """noise of planted labels beside a signal of deviation 1"""
    plant_modality: str | None = PlantedConfig.modality
    """planted imbalance or dropout: the modality that matters; default: audio, or the first"""


PLANT_FLAGS = ("plant_rank", "plant_strength", "plant_seed", "plant_noise", "plant_modality")


@dataclass(frozen=True)
class StudyOptions(DataOptions):
    """Flags of what a study works on: a data set, by its own split or cut anew."""

    cross_validate: int | None = None
    """cut all examples anew into so many folds, in place of the data set's own split"""
    repeats: int = 1
    """of that, each with other folds and another start of every seed"""


def load_folded(options: DataOptions, device: str = "cpu") -> FoldedDataset:
    """The data set that the flags name, as `folded`. Raises InputError naming the flag or the file."""
    return folded(load_datasets(replace(options, plant=None), device), options)


def folded(datasets: Sequence[Dataset], options: DataOptions) -> FoldedDataset:
    """One study of the folds of a dataset, with the labels and the cuts that the flags ask for. Raises InputError."""
    config, data = planted_config(options), fold_datasets(datasets)
    if config is not None:
        data = plant(data, config)[0]
    if isinstance(options, StudyOptions) and options.cross_validate is not None:
        data = cross_validated(data, options.cross_validate, options.repeats)
    return data


def planted_config(options: DataOptions) -> PlantedConfig | None:
    """What the flags plant; None for nothing. Raises InputError naming a flag out of range."""
    if options.plant is None:
        return None
    values = {name.removeprefix("plant_"): getattr(options, name) for name in PLANT_FLAGS}
    config = PlantedConfig(options.plant, **values)
    config.check()
    return config


def load_datasets(options: DataOptions, device: str = "cpu") -> list[Dataset]:
    """The data set that the flags name, one dataset per fold. Raises InputError naming the flag or the file."""
    if options.dataset not in DRAWN and options.data is None:
        raise InputError(f"--data: --dataset {options.dataset} needs the path of its file")
    if options.plant is not None:
        raise InputError(f"--plant {options.plant}: labels are planted for experiments alone; leave the flag out")
    if options.tokens:
        _check_use("tokens", options.dataset)
    if options.dataset in DRAWN and options.data is not None:
        raise InputError(
            f"--data {options.data}: say which data set it is with --dataset; {options.dataset} draws its own"
        )
    datasets = CORPORA[options.dataset].load(options, device)
    for dataset in datasets:
        _check_finite(dataset, options)
    return datasets


def _check_finite(dataset: Dataset, options: DataOptions) -> None:
    """Raise InputError naming file, split, modality and example of the first value that is no finite number."""
    for name, split in dataset.splits.items():
        for what, x in {**split.features, "target": split.target}.items():
            row = None if x is None else next((i for i, own in enumerate(x) if not own.isfinite().all()), None)
            if row is not None:
                raise InputError(
                    f"{options.data}: {what} of {split.ids[row]!r} in {name} holds a value that is no finite number; "
                    "leave that example out, or fill the value in"
                )


def memes_source(options: DataOptions) -> MemesSource | None:
    """Where the memes lie, and what encodes them; None for data sets without pictures."""
    if options.dataset in ("demo", "hateful_memes"):
        return find_source(*_memes_config(options), Processes(), quiet=True)
    return None


def text_encoders(options: DataOptions) -> EncoderConfig | None:
    """What encodes the texts of a data set without pictures; None where its vectors were made elsewhere."""
    if not CORPORA[options.dataset].texts or (options.dataset == "cmu_mosi" and options.text_encoder is None):
        return None
    return EncoderConfig(text_encoder=options.text_encoder).filled()


def check_flags(options: DataOptions) -> None:
    """Raise InputError naming the first flag that was given and has no use with this dataset."""
    known = {flag for corpus in CORPORA.values() for flag in corpus.flags}
    for one in fields(DataOptions):
        if one.name in known and getattr(options, one.name) != one.default:
            _check_use(one.name, options.dataset)
        if one.name in PLANT_FLAGS and options.plant is None and getattr(options, one.name) != one.default:
            raise InputError(f"--{one.name.replace('_', '-')}: has no use without --plant; give both, or neither")
    planted_config(options)


def _check_use(name: str, dataset: str) -> None:
    """Raise InputError where a data set has no use for the flag `name`."""
    if name not in CORPORA[dataset].flags:
        users = " or ".join(other for other, corpus in CORPORA.items() if name in corpus.flags)
        raise InputError(f"--{name.replace('_', '-')}: has no use with --dataset {dataset}, only with {users}")
