"""Frozen image and text encoders: pixels or texts in, one float32 vector each out.

Which vector: ResNet-50, its global average pool (2048). A Hugging Face image model: its projected image embedding where
it has one (CLIP, SigLIP), else its pooled output (ResNet, ConvNeXt, DINOv2), else the mean over its tokens (ViT, whose
pooler most checkpoints lack). A timm model: its pooled features before the classifier. A Hugging Face text model: its
projected text embedding where it has one (CLIP), else the mean over its tokens, or the first, [CLS].
"""

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmfusion.encoders.images import Preprocessing
from mmfusion.encoders.settings import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOST_PIXELS,
    model_config,
    own_preprocessing,
    refuse,
)
from mmfusion.encoders.timm_models import MODEL_TYPE, draw_weights
from mmfusion.encoders.weights import RANDOM_SEED, EncoderSource, find_encoder, resnet50_file
from mmfusion.errors import InputError

IMAGE_SIZES = (32, MOST_PIXELS)  # pixels; ResNet-50 halves its input five times
# the poolers of these are no part of any feature, and many checkpoints lack their weights
POOLER_OPTIONAL = {"bert", "roberta", "xlm-roberta", "camembert", "mpnet", "vit", "deit", "vilt"}
VILT = "vilt"  # model_type; its layers see a picture and its text together
NO_VECTOR = "ViLT gives embeddings of tokens and no vector; it is for --fusion wma"


Compute = Literal["float32", "bfloat16 autocast"]


@dataclass(frozen=True)
class EncoderConfig:
    """What turns pictures and texts into features; its weights are never trained."""

    image_encoder: str | None = None
    """resnet50 (default), a Hugging Face model by name or folder, timm:NAME, or a ResNet-50 weights file; random:X
    draws X's weights from seed 0 (default in the demo)"""
    image_weights: Literal["IMAGENET1K_V1", "IMAGENET1K_V2"] = "IMAGENET1K_V1"
    """which of torchvision's ResNet-50 weights; V1 is that of the papers"""
    image_resize: Literal["squash", "crop"] = "squash"
    """squash the whole image to a square, or resize and cut the centre out (which cuts captions off)"""
    image_size: int | None = None
    """pixels on a side that the image encoder sees, default 224 (demo: 112); a model may fix its own"""
    text_encoder: str | None = None
    """a Hugging Face model by name (default bert-base-uncased) or folder; random:X draws its weights from seed 0"""
    text_pooling: Literal["mean", "cls"] = "mean"
    """mean of the token vectors, or the vector of the CLS token"""

    def filled(self, demo: Path | None = None) -> "EncoderConfig":
        """The same choices with every default written out; `demo` is the folder of the drawn memes, if they are used.

        Raises InputError naming the flag of the first choice that does not exist.
        """
        config = replace(
            self,
            image_encoder=self.image_encoder or ("random:resnet50" if demo else "resnet50"),
            image_size=(112 if demo else 224) if self.image_size is None else self.image_size,
            text_encoder=self.text_encoder or (f"random:{demo / 'bert'}" if demo else "bert-base-uncased"),
        )
        config.check()
        return config

    def check(self) -> None:
        """Raise InputError naming the flag of the first choice that does not exist."""
        for name in ("image_weights", "image_resize", "text_pooling"):
            allowed = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: choose one of {', '.join(allowed)}"
                )
        low, high = IMAGE_SIZES
        if self.image_size is not None and not low <= self.image_size <= high:
            raise InputError(f"--image-size {self.image_size}: choose a size between {low} and {high} pixels")


def compute_dtype(device: str) -> Compute:
    """Arithmetic of the encoders: part of a feature's identity, since it changes its value."""
    return "bfloat16 autocast" if device.startswith("cuda") else "float32"


def check_encoding_device(device: str) -> None:
    """Raise InputError where features of CUDA are to be encoded and there is none: what is cached can be read there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "the cache lacks features that only CUDA encodes (bfloat16 autocast), and there is no CUDA device here; "
            "copy the cache folder (--cache-dir) from the machine that encoded them, or train the run anew here"
        )


def find_image_encoder(config: EncoderConfig) -> EncoderSource:
    """Where the image encoder's weights are. Raises InputError with the remedy."""
    return find_encoder(config.filled().image_encoder, "--image-encoder", config.image_weights)


def find_text_encoder(config: EncoderConfig) -> EncoderSource:
    """Where the text encoder's weights are. Raises InputError with the remedy."""
    return find_encoder(config.filled().text_encoder, "--text-encoder")


def image_identity(config: EncoderConfig, source: EncoderSource, device: str) -> dict[str, object]:
    """Everything that changes an image vector's value."""
    how = {"resize": config.image_resize, "size": config.filled().image_size, "filter": "Pillow, antialiased"}
    version = 2 if config.image_resize == "crop" else 1  # 2: the box alone is resized; at most 2 of 255 apart
    return {"encoder": source.identity, "preprocessing": how, "compute": compute_dtype(device), "version": version}


def token_identity(identity: dict[str, object]) -> dict[str, object]:
    """The identity of an encoder's tokens, by that of its vectors: no pooling is done."""
    return {name: value for name, value in identity.items() if name != "pooling"} | {"tokens": "float16"}


def text_identity(config: EncoderConfig, source: EncoderSource, device: str) -> dict[str, object]:
    """Everything that changes a text vector's value."""
    return {"encoder": source.identity, "pooling": config.text_pooling, "compute": compute_dtype(device), "version": 1}


def image_preprocessing(config: EncoderConfig, source: EncoderSource) -> Preprocessing:
    """How pictures are brought into the encoder's shape: its own size, mean, standard deviation and filter."""
    config = config.filled()
    if source.is_torchvision:
        # torchvision's, for an input of 224; by the weights and not by the flag, which other weights leave unused
        shorter = 232 if source.identity.get("weights") == "IMAGENET1K_V2" else 256
        resize = round(config.image_size * shorter / 224)
        return Preprocessing(config.image_resize, config.image_size, resize, IMAGENET_MEAN, IMAGENET_STD)
    return own_preprocessing(source, config.image_resize, config.image_size)


class ImageEncoder:
    """Frozen image tower: uint8 pixels (b, S, S, 3) -> float32 (b, d); `compute` is by default that of the device."""

    def __init__(
        self, config: EncoderConfig, source: EncoderSource, device: str, compute: Compute | None = None
    ) -> None:
        check_encoding_device(device)
        self.device, self.compute = device, compute or compute_dtype(device)
        how = image_preprocessing(config, source)
        self.mean = torch.tensor(how.mean, device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(how.std, device=device).view(3, 1, 1) * 255
        model = _resnet50(source) if source.is_torchvision else _hugging_face_model(source)
        self.model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        with refuse(source, "does not encode images"):  # one blank picture tells
            self(np.zeros((1, how.size, how.size, 3), np.uint8))

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Encode one batch."""
        # (b, S, S, 3) seen as (b, 3, S, S) is channels_last already
        x = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return self.features(x.float()).cpu()

    def features(self, pixels: Tensor) -> Tensor:
        """Float pixels (b, 3, S, S) from 0 to 255, on the encoder's device -> (b, d) there; differentiable."""
        x = (pixels - self.mean) / self.std
        with autocast(self.device, self.compute):
            features = _image_features(self.model, x)
        return features.float()


class TextEncoder:
    """Frozen text tower with its tokenizer: texts -> float32 (b, d); `compute` is by default that of the device."""

    def __init__(
        self, config: EncoderConfig, source: EncoderSource, device: str, compute: Compute | None = None
    ) -> None:
        check_encoding_device(device)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked decoders do not go together
        from transformers import AutoTokenizer

        self.device, self.pooling = device, config.text_pooling
        self.compute = compute or compute_dtype(device)
        with refuse(source, "its tokenizer cannot be loaded"):
            self.tokenizer = AutoTokenizer.from_pretrained(source.path)
        self.model = _hugging_face_model(source).eval().requires_grad_(False).to(device)
        settings = getattr(self.model.config, "text_config", self.model.config)
        positions = getattr(settings, "max_position_embeddings", 512)
        if "roberta" in settings.model_type:  # its positions begin after the padding index
            positions -= settings.pad_token_id + 1
        self.max_length = min(self.tokenizer.model_max_length, positions)
        self.pads_fully = "siglip" in settings.model_type  # it was trained on texts padded to the full length
        with refuse(source, "does not encode texts"):  # one empty text tells
            self(self.tokenize([""]))

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, cut at the encoder's maximum."""
        if not texts:
            return []
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    @torch.inference_mode()
    def __call__(self, tokens: list[list[int]]) -> Tensor:
        """Encode one batch of token id lists."""
        return self.features(tokens).cpu()

    def padded(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token id lists -> ids and mask (b, t) on the encoder's device."""
        length = self.max_length if self.pads_fully else max(map(len, tokens))
        ids = torch.full((len(tokens), length), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, row_ids in enumerate(tokens):
            ids[row, : len(row_ids)] = torch.tensor(row_ids, dtype=torch.long)
            mask[row, : len(row_ids)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        if self.pads_fully:  # and it attends to its padding: no mask
            mask = torch.ones_like(mask)
        return ids, mask

    def features(self, tokens: list[list[int]]) -> Tensor:
        """Token id lists -> (b, d) on the encoder's device; differentiable in the model's token embeddings."""
        ids, mask = self.padded(tokens)
        with autocast(self.device, self.compute):
            features = _text_features(self.model, ids, mask, self.pooling)
        return features.float()


def autocast(device: str, compute: Compute) -> torch.autocast:
    """The arithmetic of the encoders on that device."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=compute == "bfloat16 autocast")


def _image_features(model: nn.Module, x: Tensor) -> Tensor:
    """One vector (b, d) per image, by the rule at the top of this file."""
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=x)
        return output if isinstance(output, Tensor) else output.pooler_output
    if not hasattr(model, "config"):
        return model(x)
    if model.config.model_type == VILT:
        raise ValueError(NO_VECTOR)
    output = model(pixel_values=x)
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        return output.last_hidden_state.mean(1)
    if pooled.numel() > pooled.shape[0] * pooled.shape[1]:
        raise ValueError(f"its pooled output is {tuple(pooled.shape)}, not one vector an image")
    return pooled.flatten(1)


def _text_features(model: nn.Module, ids: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector (b, d) per text, by the rule at the top of this file; ids and mask (b, t)."""
    if hasattr(model, "get_text_features"):
        output = model.get_text_features(input_ids=ids, attention_mask=mask)
        return output if isinstance(output, Tensor) else output.pooler_output
    if model.config.model_type == VILT:
        raise ValueError(NO_VECTOR)
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (b, t, d)
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)  # (b, t, 1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _resnet50(source: EncoderSource) -> nn.Module:
    """torchvision's ResNet-50 up to its pool: (b, 3, S, S) -> (b, 2048)."""
    path = resnet50_file(source)
    from torchvision.models import resnet50

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = resnet50(weights=None)
    if path is not None:
        state = _read_weights(path, source)
        try:
            model.load_state_dict(
                {key: value for key, value in state.items() if not key.startswith("fc.")}, strict=False
            )
            missing = [key for key in model.state_dict() if key not in state and not key.startswith("fc.")]
        except RuntimeError:
            missing = ["weights of the right shape"]
        # checkpoints from before torch 0.4.1 do not count batches; nothing in eval mode does
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing:
            raise InputError(f"{source.flag} {source.name}: not a ResNet-50 of torchvision, it lacks {missing[0]}")
    model.fc = nn.Identity()
    return _fold_batch_norms(model.eval())


def _fold_batch_norms(module: nn.Module) -> nn.Module:
    """Each batch norm into the convolution before it, in place: the same function to 1e-6, a sixth of the time less."""
    names = [name for name, _ in module.named_children()]
    for name, following in itertools.pairwise(names):
        convolution, norm = getattr(module, name), getattr(module, following)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(convolution, norm))
            setattr(module, following, nn.Identity())
    for child in module.children():
        _fold_batch_norms(child)
    return module


def _read_weights(path: Path, source: EncoderSource) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in any of a dozen exceptions inside the two readers
        raise InputError(f"{source.flag} {path}: is not a readable file of weights; fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{source.flag} {path}: holds no plain state dict of tensors")
    return state


def _hugging_face_model(source: EncoderSource) -> nn.Module:
    """A Hugging Face model in float32, with all its weights from disk or all seeded."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # weights that are missing or left over are judged below
    logging.disable_progress_bar()
    config = model_config(source)
    options = {"add_pooling_layer": False} if config.model_type in POOLER_OPTIONAL else {}
    with refuse(source, "cannot be loaded"):
        if source.is_random:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(RANDOM_SEED)
                model = AutoModel.from_config(config, dtype=torch.float32, **options)
            if config.model_type == MODEL_TYPE:
                draw_weights(model, RANDOM_SEED)
            return model
        options |= {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
        model, report = AutoModel.from_pretrained(source.path, config=config, **options)
    missing = sorted(map(str, report["missing_keys"])) + sorted(map(str, report.get("mismatched_keys", [])))
    if missing:  # transformers would fill them with random numbers
        raise InputError(f"{source.flag} {source.name}: its files lack {len(missing)} weights, {missing[0]} among them")
    return model
