"""What an encoder's folder says of itself: the model's config, and how pictures are brought into its shape."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from PIL import Image

from mmfusion.encoders.images import Preprocessing
from mmfusion.encoders.timm_models import MODEL_TYPE, registered_settings, require_timm, timm_preprocessing
from mmfusion.encoders.weights import CONFIG_BYTES, EncoderSource, model_type
from mmfusion.errors import InputError
from mmfusion.files import read_regular_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # imported late elsewhere: a warm cache needs no transformers

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_PIXELS = 4096  # on a side


@contextlib.contextmanager
def refuse(source: EncoderSource, what: str) -> Iterator[None]:
    """Whatever a library says of a folder that is not what it should be, as one line that names the flag."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the model libraries have dozens of their own
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{source.flag} {source.name}: {what} ({reason})") from error


def model_config(source: EncoderSource) -> "PreTrainedConfig":
    """The config of a Hugging Face or timm model. Raises InputError where it cannot be used, or timm is lacking."""
    where = f"{source.flag} {source.name}"
    is_timm = source.timm_name is not None
    with contextlib.suppress(InputError):  # transformers knows some old models without a model_type
        is_timm = is_timm or model_type(source.path, source.name, source.flag) == MODEL_TYPE
    if is_timm:
        require_timm(where)
    from transformers import AutoConfig, TimmWrapperConfig

    with refuse(source, "its config.json cannot be used"):
        config = AutoConfig.from_pretrained(source.path) if source.path else TimmWrapperConfig()
        if is_timm:
            config.architecture = source.timm_name or config.architecture
            if (config.model_args or {}).get("features_only"):
                raise ValueError("features_only gives maps and no vector")
            config.do_pooling = True
        return config


def own_preprocessing(source: EncoderSource, mode: Literal["squash", "crop"], default_size: int) -> Preprocessing:
    """Size, mean, standard deviation and filter of a Hugging Face or timm model.

    `default_size` (pixels) is that of a Hugging Face model that names none. Raises InputError where the folder's
    settings are not what they should be.
    """
    config = model_config(source)
    if config.model_type == MODEL_TYPE:
        where = f"{source.flag} {source.name}"
        settings = getattr(config, "pretrained_cfg", None) or registered_settings(config.architecture, where)
        with refuse(source, "its pretrained_cfg cannot be used"):
            how = timm_preprocessing(settings, mode)
            _check(how.size, how.mean, how.std)
            return how
    # not config.json itself, which may leave the size to the class's default
    size = getattr(getattr(config, "vision_config", config), "image_size", None) or default_size
    with refuse(source, "its config.json cannot be used"):
        size = int(size if isinstance(size, int) else size[0])
        _check(size, IMAGENET_MEAN, IMAGENET_STD)
    mean, std, resample = _from_preprocessor_config(source)
    return Preprocessing(mode, size, round(size * 256 / 224), mean, std, resample)


def _from_preprocessor_config(source: EncoderSource) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean, standard deviation and Pillow's filter from preprocessor_config.json, or ImageNet's where there is none."""
    path = source.path / "preprocessor_config.json"
    if not path.is_file():
        return IMAGENET_MEAN, IMAGENET_STD, Preprocessing.resample
    content = read_regular_file(path, CONFIG_BYTES, "fetch it again", source.flag)
    with refuse(source, "its preprocessor_config.json cannot be used"):
        own = json.loads(content)
        mean = tuple(map(float, own.get("image_mean", IMAGENET_MEAN)))
        std = tuple(map(float, own.get("image_std", IMAGENET_STD)))
        _check(1, mean, std)
        return mean, std, int(Image.Resampling(own.get("resample", Preprocessing.resample)))


def _check(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if not 1 <= size <= MOST_PIXELS:
        raise ValueError(f"image_size {size}")
    if len(mean) != 3 or len(std) != 3 or not all(0 < s < math.inf for s in std) or not all(map(math.isfinite, mean)):
        raise ValueError("mean and standard deviation are three numbers each, those of the latter above 0")
