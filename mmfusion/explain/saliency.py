"""Saliency of picture regions (gradient x input) and of words (what the score loses without each).

For a picture the account is of first order (Shrikumar et al., 2016; Ancona et al., 2018). The input is the last feature
map, whose average is the image vector x: cell (i, j) of the h x w grid gets

    sum_c dscore/dx_c (a_cij - reference_c) / (h w),    summing to    dscore/dx . (x - reference)

over the cells, exactly. The score is not linear in its input: these are not shares of it.

For a text each word is left out in turn (Li et al., 2016). Gradient x embedding, the cheaper way, points the wrong way
through a trained encoder: its first layer norm takes the embeddings' scale away, so that the derivative along them says
little (`benchmarks.real_encoders` compares the two).
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmfusion.encoders.frozen import ImageEncoder, TextEncoder
from mmfusion.encoders.images import Preprocessing, crop_box

if TYPE_CHECKING:
    from transformers import BatchEncoding  # imported late elsewhere

TEXTS_AT_ONCE = 32
RAISES, LOWERS = (217, 116, 26), (31, 111, 180)  # orange, blue: told apart by colour-blind readers too
Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of width and height
Score = Callable[[Tensor], Tensor]  # vectors (b, d) -> (b,), differentiable


class RegionMap(NamedTuple):
    """What each cell of the last feature map feeds into a score."""

    cells: np.ndarray
    """(h, w), in units of the score"""
    gradient: np.ndarray
    """(d,) of the score in the image vector"""
    feature: np.ndarray
    """(d,) the image vector"""


def region_map(
    encoder: ImageEncoder, pixels: np.ndarray, score: Score, reference: Tensor | None = None
) -> RegionMap | None:
    """Gradient x input on the grid of cells whose average is the image vector.

    Args:
        encoder: whose vector is the average of a feature map (ResNet, EfficientNet, Swin).
        pixels: uint8 (S, S, 3), as the encoder sees the picture.
        score: of image vectors (1, d).
        reference: (d,) what the input is counted from, such as the mean vector of train; default 0.

    Returns:
        None where the encoder's vector is not the average of such a map (a projection follows, or there is none).
    """
    pools = [module for module in encoder.model.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    seen: list[Tensor] = []

    def keep_last(_: nn.Module, __: tuple, output: object) -> None:
        """timm has pools of its own; its models and those of Hugging Face name the map that they pool."""
        if hasattr(output, "last_hidden_state"):
            seen.append(output.last_hidden_state)

    with contextlib.ExitStack() as hooks:
        for pool in pools:
            hooks.enter_context(pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
        hooks.enter_context(encoder.model.register_forward_hook(keep_last))
        x = torch.from_numpy(pixels.copy()).to(encoder.device).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            vector = encoder.features(x)
    cells = _averaged_map(seen, vector[0])
    if cells is None:
        return None
    vector = vector.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(vector).sum(), vector)
    counted = cells if reference is None else cells - reference.to(cells)[:, None, None]
    weighted = torch.einsum("c,chw->hw", gradient[0], counted) / (cells.shape[1] * cells.shape[2])
    return RegionMap(weighted.cpu().numpy(), gradient[0].cpu().numpy(), vector.detach()[0].cpu().numpy())


def _averaged_map(maps: list[Tensor], vector: Tensor) -> Tensor | None:
    """Of the candidates, (1, c, h, w) or (1, h, w, c), the last whose average is `vector` (c,), as (c, h, w)."""
    for candidate in reversed(maps):
        if candidate.ndim != 4:
            continue
        for cells in (candidate[0].float(), candidate[0].float().permute(2, 0, 1)):
            if cells.shape[0] != len(vector):
                continue
            # relative to the vector: deep networks with random weights give numbers far below 1
            if (cells.mean((1, 2)) - vector).norm() <= 1e-2 * vector.norm():
                return cells
    return None


@torch.no_grad()
def word_map(encoder: TextEncoder, text: str, score: Score) -> list[tuple[str, float]]:
    """(word, score of the text minus its score without that word), in the order of the text, in units of the score.

    What lies beyond the encoder's longest text is left out.
    """
    tokens = encoder.tokenizer(text, truncation=True, max_length=encoder.max_length)
    ids, words = tokens["input_ids"], _words(tokens, text)
    spans = [span for span in dict.fromkeys(words) if span is not None]  # dicts keep the order in which words come
    # a tokenizer without tokens of its own leaves nothing of a text of one word: one token of padding stands for it
    nothing = [encoder.tokenizer.pad_token_id or 0]
    without = [[i for i, word in zip(ids, words, strict=True) if word != span] or nothing for span in spans]
    values: list[float] = []
    for start in range(0, len(without), TEXTS_AT_ONCE):
        vectors = encoder.features(without[start : start + TEXTS_AT_ONCE])
        values += [score(vector[None]).item() for vector in vectors]
    whole = score(encoder.features([ids or nothing])).item()
    return [(text[start:end], whole - value) for (start, end), value in zip(spans, values, strict=True)]


def _words(tokens: "BatchEncoding", text: str) -> list[tuple[int, int] | None]:
    """For each token the (start, end) of its word in the text, None for special tokens."""
    spans = []
    for word in tokens.word_ids():
        if word is None:
            spans.append(None)
            continue
        span = tokens.word_to_chars(word)
        start, end = span.start, span.end
        while start < end and text[start].isspace():  # byte-level tokenizers count the space before a word to it
            start += 1
        spans.append((start, end))
    return spans


def seen_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """The part of a picture of (width, height) pixels that the encoder sees."""
    left, top, right, bottom = crop_box(size, preprocessing)
    return left / size[0], top / size[1], right / size[0], bottom / size[1]


def overlay(picture: Image.Image, cells: np.ndarray, box: Box) -> Image.Image:
    """The picture in grey with a map (h, w) over its `box`: orange where a cell raises the score, blue where it lowers.

    Each colour's strength is relative to the map's largest absolute value.
    """
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    strength = (cells / max(np.abs(cells).max(), 1e-30)).astype(np.float32)  # in [-1, 1]
    left, right = (round(box[i] * picture.width) for i in (0, 2))
    top, bottom = (round(box[i] * picture.height) for i in (1, 3))
    field = Image.fromarray(strength).resize((max(right - left, 1), max(bottom - top, 1)), Image.Resampling.BICUBIC)
    whole = Image.new("F", picture.size)
    whole.paste(field, (left, top))
    value = np.clip(np.asarray(whole), -1, 1)[..., None]  # (height, width, 1)
    colour = np.where(value > 0, np.float32(RAISES), np.float32(LOWERS))
    alpha = 0.75 * np.abs(value)
    return Image.fromarray(((1 - alpha) * grey + alpha * colour).round().astype(np.uint8))
