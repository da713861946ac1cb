"""timm's image models by name: their repositories on the Hugging Face hub, their inputs, their own random weights.

They run through transformers' TimmWrapperModel; the vector is timm's pooled features before the classifier.
"""

import difflib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from PIL import Image

from mmfusion.encoders.images import Preprocessing
from mmfusion.errors import InputError

if TYPE_CHECKING:
    from torch import nn

PREFIX = "timm:"
MODEL_TYPE = "timm_wrapper"  # of transformers


def require_timm(where: str) -> ModuleType:
    """The library. Raises InputError naming the extra where it is not installed; `where` is flag and value."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{where}: needs timm; pip install timm, or this package with its extra [timm]") from error
    return timm


def registered_settings(name: str, where: str) -> dict[str, object]:
    """What timm knows of a model NAME or NAME.TAG: input_size, mean, std, interpolation, hf_hub_id, ...

    Raises InputError, with names that are close, where timm has no such model or no such weights of it.
    """
    timm = require_timm(where)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names them"
        raise InputError(f"{where}: timm {timm.__version__} has no model {architecture}; {hint}")
    try:
        settings = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        hint = f"choose one of {', '.join(known)}" if known else "it has no trained weights at all"
        raise InputError(f"{where}: {architecture} has no weights {tag} in timm; {hint}") from error
    return {} if settings is None else settings.to_dict()


def hub_repository(name: str, where: str) -> str:
    """OWNER/NAME on the Hugging Face hub of the trained weights of a model. Raises InputError where there are none."""
    repository = registered_settings(name, where).get("hf_hub_id")
    if not repository:
        raise InputError(
            f"{where}: timm names no weights of it on the Hugging Face hub; random:{PREFIX}{name} draws some"
        )
    return str(repository)


def timm_preprocessing(settings: Mapping[str, object], mode: str) -> Preprocessing:
    """How a picture is brought into a timm model's shape, by its pretrained_cfg and else by timm's defaults.

    Args:
        settings: the pretrained_cfg.
        mode: "squash" or "crop"; a crop's share is the model's own crop_pct.

    Raises:
        ValueError: a size that is no square of three channels, a filter that Pillow lacks, or a crop of another kind.
    """
    from timm.data import resolve_data_config

    own = resolve_data_config(pretrained_cfg=dict(settings) or {"input_size": None})
    channels, height, width = map(int, own["input_size"])
    if channels != 3 or height != width:
        raise ValueError(f"input_size {channels} x {height} x {width}; only squares of three channels are read")
    share = float(own["crop_pct"])
    if mode == "crop" and own["crop_mode"] == "squash" and share == 1:
        mode = "squash"
    if mode == "crop" and (own["crop_mode"] != "center" or not 0 < share <= 1):
        raise ValueError(f"its crop is {own['crop_mode']!r} of {share}; use --image-resize squash")
    filters = {resample.name.lower(): int(resample) for resample in Image.Resampling}
    if own["interpolation"] not in filters:
        raise ValueError(f"interpolation {own['interpolation']!r}; Pillow has {', '.join(filters)}")
    mean, std = (tuple(map(float, own[key])) for key in ("mean", "std"))
    resize = math.floor(height / share) if mode == "crop" else height
    return Preprocessing(mode, height, resize, mean, std, filters[own["interpolation"]])


def draw_weights(wrapper: "nn.Module", seed: int) -> None:
    """Replace the network inside a TimmWrapperModel by one with weights of timm's own, seeded initialisation.

    transformers draws every weight at a scale of .02, whose signal a deep network loses: 1e-22 of EfficientNet's.
    """
    import timm

    config = wrapper.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = config.model_args or {}
        wrapper.timm_model = timm.create_model(config.architecture, pretrained=False, num_classes=0, **options)
