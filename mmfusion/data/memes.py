"""Source of the memes (files on disk, the Kaggle copy, or the drawn demo) and its encoders."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hateful_memes_loader import download_hateful_memes, load_hateful_memes
from mmfusion.data.demo_memes import draw_demo
from mmfusion.data.feature_files import read_feature_flags
from mmfusion.dataset import Dataset
from mmfusion.distributed import Processes
from mmfusion.encoders.frozen import EncoderConfig

DEMO_BANNER = """\
==============================================================================================
 DEMO. No data set was named (REAL_PATH is empty, no --jsonl, no --download), so this run draws
 memes of its own and encodes them with ResNet-50 and BERT of seeded RANDOM weights. Its scores
 show that the system works; they say nothing about Hateful Memes.
=============================================================================================="""


@dataclass(frozen=True)
class MemesConfig:
    """Which memes, and where what is made of them is kept."""

    jsonl: Path | None = None
    """train.jsonl of the release (overrides REAL_PATH); dev and test splits are found beside it"""
    img_dir: Path | None = None
    """folder of the images; default: where the jsonl's `img` paths lead"""
    download: bool = False
    """fetch the Kaggle copy of the data set (phase 1) with kagglehub, and train on it"""
    bad_images: Literal["error", "skip"] = "error"
    """what to do about images that cannot be read: stop and list them, or drop them and record which"""
    cache_dir: Path = Path("cache")
    """where features (and the demo) are kept between runs"""
    workers: int | None = None
    """processes that decode images; default: by the number of cores"""
    features: tuple[str, ...] = ()
    """MODALITY=FILE of vectors encoded elsewhere (.npz, .safetensors or a folder of .npy, with img and features);
    image and text are replaced and need no encoder then, other modalities come beside them"""

    @property
    def is_demo(self) -> bool:
        """True where nothing is named: the demo is drawn."""
        return self.jsonl is None and not self.download

    @property
    def run_name(self) -> str:
        """What a run on these memes is called where no name is given."""
        return "demo" if self.is_demo else "hateful_memes"


@dataclass(frozen=True)
class MemesSource:
    """Annotations and images on disk, and the encoders that turn them into features."""

    jsonl: Path
    img_dir: Path | None
    """None: the images lie beside the jsonl"""
    encoders: EncoderConfig
    is_demo: bool = False
    given: tuple[str, ...] = ()
    """modalities whose features came from a file, not from the encoders"""


def find_source(config: MemesConfig, encoders: EncoderConfig, processes: Processes, quiet: bool = False) -> MemesSource:
    """Locate, download or (the demo) draw the memes; every process of torchrun takes part.

    `quiet` leaves the demo's banner out. Raises InputError.
    """
    jsonl, img_dir = config.jsonl, config.img_dir
    with processes.together():  # one process fetches or draws, the others wait for it
        if config.is_demo and processes.is_main:
            if not quiet:
                print(DEMO_BANNER, flush=True)
            draw_demo(config.cache_dir / "demo_memes")
        if config.download and processes.is_main:
            jsonl, img_dir = download_hateful_memes()
    jsonl, img_dir = processes.gather((jsonl, img_dir))[0]
    if config.is_demo:
        jsonl = config.cache_dir / "demo_memes" / "train.jsonl"
    filled = encoders.filled(jsonl.parent if config.is_demo else None)
    given = tuple(flag.partition("=")[0] for flag in config.features)
    return MemesSource(jsonl, img_dir, filled, config.is_demo, given)


def load_memes(
    config: MemesConfig, encoders: EncoderConfig, processes: Processes, quiet: bool = False, tokens: bool = False
) -> Dataset:
    """The memes as frozen features, with `tokens` as sequences; every process of torchrun takes part.

    `quiet` leaves the demo's banner out. Raises InputError.
    """
    with processes.together():
        features = read_feature_flags(config.features)
    source = find_source(config, encoders, processes, quiet)
    options = {
        "bad_images": config.bad_images,
        "device": processes.device,
        "workers": config.workers,
        "features": features,
        "tokens": tokens,
    }
    dataset = load_hateful_memes(source.jsonl, source.img_dir, source.encoders, config.cache_dir, **options)
    return replace(dataset, name="demo") if source.is_demo else dataset
