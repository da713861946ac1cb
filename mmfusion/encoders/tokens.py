"""Frozen encoders that keep every token: the cells or patches of a picture, the words of a text.

Which: ResNet-50, the 7 x 7 cells before its pool, row by row (2048). A Hugging Face image model: its last layer's
patches or cells, without its class and register tokens. A timm model: the same. A text model: its last layer's tokens
without the special ones ([CLS], [SEP], padding); a text without any other keeps the first. ViLT, whose layers see a
picture and its text together: the embeddings that they begin with, places added and kinds not, of patches or of words.
"""

import numpy as np
import torch
from torch import Tensor, nn

from mmfusion.encoders.frozen import VILT, ImageEncoder, TextEncoder, autocast
from mmfusion.encoders.weights import EncoderSource


class ImageTokenEncoder(ImageEncoder):
    """Frozen image tower: uint8 pixels (b, S, S, 3) -> b times (T, d), float16."""

    def __init__(self, config: object, source: EncoderSource, device: str, compute: str | None = None) -> None:
        super().__init__(config, source, device, compute)
        if source.is_torchvision:
            self.model.avgpool = nn.Identity()  # and what follows flattens the cells, channel by channel

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> list[Tensor]:
        """Encode one batch."""
        x = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        with autocast(self.device, self.compute):
            tokens = _image_tokens(self.model, (x - self.mean) / self.std)  # (b, T, d)
        return list(tokens.half().cpu())


class TextTokenEncoder(TextEncoder):
    """Frozen text tower with its tokenizer: b texts -> b times (T_i, d), float16."""

    @torch.inference_mode()
    def __call__(self, tokens: list[list[int]]) -> list[Tensor]:
        """Encode one batch of token id lists."""
        ids, mask = self.padded(tokens)
        model = getattr(self.model, "text_model", self.model)  # CLIP's
        with autocast(self.device, self.compute):
            if model.config.model_type == VILT:
                hidden = model.embeddings.text_embeddings(input_ids=ids)  # (b, t, d)
            else:
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (b, t, d)
        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))
        hidden, found = hidden.half().cpu(), []
        for row, row_ids in zip(hidden, tokens, strict=True):
            own = row[: len(row_ids)]
            words = ~torch.isin(torch.tensor(row_ids), special)
            found.append(own[words] if words.any() else own[:1])
        return found


def _image_tokens(model: nn.Module, x: Tensor) -> Tensor:
    """(b, T, d), by the rule at the top of this file. Raises ValueError where there are no tokens to be had."""
    if not hasattr(model, "config"):  # torchvision's ResNet-50 without its pool: (b, 2048 * cells)
        return model(x).unflatten(1, (2048, -1)).transpose(1, 2)
    if model.config.model_type == VILT:
        own = model.embeddings
        return own.patch_embeddings(x).flatten(2).transpose(1, 2) + own.position_embeddings[:, 1:]  # [CLS] comes first
    tower = getattr(model, "vision_model", model)  # CLIP's
    output = tower(pixel_values=x).last_hidden_state
    if output.ndim == 4:  # (b, d, h, w)
        return output.flatten(2).transpose(1, 2)
    if output.ndim != 3:
        raise ValueError(f"its last layer gives {tuple(output.shape)}, no tokens")
    settings = getattr(model.config, "vision_config", model.config)
    patch = getattr(settings, "patch_size", None)
    network = getattr(tower, "timm_model", None)
    if network is not None:
        return output[:, getattr(network, "num_prefix_tokens", 0) :]
    if not isinstance(patch, int):
        return output
    count = (x.shape[-2] // patch) * (x.shape[-1] // patch)
    return output[:, -count:]  # class and register tokens come first
