"""One explained prediction of a model of tokens as a picture: where it looks, which pairs met, what each token adds."""

import base64
import html
import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mmfusion.encoders.images import decode_rgb, reason_unreadable
from mmfusion.explain.figure import LOWERS, RAISES
from mmfusion.explain.saliency import overlay
from mmfusion.explain.text import plain
from mmfusion.explain.tokens import TokenExplanation, sentence
from mmfusion.files import write_atomically

DIVERGING = LinearSegmentedColormap.from_list("lowers to raises", [LOWERS, "white", RAISES])
MOST_TOKENS = 60  # of a modality, that a heat map shows: those that add most


def draw_tokens(path: Path, one: TokenExplanation) -> None:
    """Write one PNG. Raises InputError where the folder cannot be written."""
    write_atomically(path, lambda temporary: temporary.write_bytes(token_png(one)))


def token_png(one: TokenExplanation) -> bytes:
    """The figure as the bytes of a PNG."""
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a text may say $5 or $10
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure, buffer = _figure(one), io.BytesIO()
        figure.savefig(buffer, dpi=90, format="png")
    return buffer.getvalue()


def _figure(one: TokenExplanation) -> Figure:
    figure = Figure(figsize=(16, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    has_picture = one.picture is not None
    axes = list(figure.subplots(1, 2 + has_picture, width_ratios=[1] * has_picture + [1.6, 1]))
    if has_picture:
        _draw_picture(axes.pop(0), one)
    matrix, bars = axes
    values = one.pairs if one.pairs is not None else one.plan
    if values is None:
        matrix.set_axis_off()
    else:
        _draw_matrix(matrix, one, values)
    _draw_worth(bars, one)
    title = f"{sentence(one)}\n{plain(one.text)[:160]}"
    figure.suptitle("\n".join(textwrap.fill(line, 120) for line in title.split("\n")), fontsize=14, fontweight="bold")
    notes = [f"{plain(one.key)[:100]}, by {one.row} of {one.run}, mean over {len(one.value)} seeds"]
    if one.parts:
        notes.append("; ".join(f"{name} {part.mean():+.2f}" for name, part in one.parts.items()))
    if one.bounds is not None:
        notes.append(f"under any plan of the same masses: {one.bounds[0]:.2f} to {one.bounds[1]:.2f}")
    figure.supxlabel("\n".join(notes), fontsize=10)
    return figure


def _draw_picture(axis: Axes, one: TokenExplanation) -> None:
    """The meme with what its cells add, where these form a square."""
    axis.axis("off")
    try:
        picture = decode_rgb(one.picture)
    except Exception as error:  # a hostile file may raise nearly anything inside Pillow
        axis.set_title(reason_unreadable(error), fontsize=9)
        return
    picture.thumbnail((640, 640))
    worth = one.worth.get("image")
    side = round(len(worth) ** 0.5) if worth is not None else 0
    if worth is None or side * side != len(worth) or side < 2:
        axis.imshow(np.asarray(picture))
        return
    axis.imshow(np.asarray(overlay(picture, worth.reshape(side, side), (0.0, 0.0, 1.0, 1.0))))
    kind = "adds, with all it met" if one.exact else "is worth (the loss without it)"
    colours = f"orange raises the {one.said}, blue lowers it"
    axis.set_title(f"what each of {side} x {side} cells {kind}:\n{colours}", fontsize=10)


def _draw_matrix(axis: Axes, one: TokenExplanation, values: np.ndarray) -> None:
    """Pairs of tokens: what each adds, or (a transformer) how the alignment matches them."""
    (first, rows), (second, columns) = one.names.items()
    keep = [np.sort(np.argsort(-np.abs(values).sum(k))[:MOST_TOKENS]) for k in (1, 0)]
    shown = values[np.ix_(*keep)]
    most = max(float(np.abs(shown).max()), 1e-12)
    if one.pairs is not None:
        drawn = axis.imshow(shown, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
        title = f"what each pair adds to the {one.said}: all pairs sum to {one.value.mean():+.2f}"
    else:
        drawn = axis.imshow(shown, cmap="Greys", vmin=0, vmax=most, aspect="auto")
        title = "tokens that the alignment matches (mass; no part of the prediction)"
    axis.figure.colorbar(drawn, ax=axis, fraction=0.04)
    small = {"fontsize": 8 if max(shown.shape) < 40 else 6}
    axis.set_xticks(range(shown.shape[1]), [plain(columns[k])[:14] for k in keep[1]], rotation=90, **small)
    axis.set_yticks(range(shown.shape[0]), [plain(rows[k])[:14] for k in keep[0]], **small)
    axis.set(xlabel=second, ylabel=first)
    axis.set_title(title, fontsize=10)


def _draw_worth(axis: Axes, one: TokenExplanation, most: int = 24) -> None:
    """The tokens of all modalities that add most, as bars."""
    every = [
        (f"{name}: {plain(word)[:20]}", value)
        for name, words in one.names.items()
        for word, value in zip(words, one.worth[name], strict=True)
    ]
    every = sorted(every, key=lambda pair: -abs(pair[1]))[:most][::-1]
    values = [value for _, value in every]
    axis.barh(range(len(every)), values, color=[RAISES if value > 0 else LOWERS for value in values])
    axis.set_yticks(range(len(every)), [name for name, _ in every], fontsize=8)
    axis.axvline(0, color="black", linewidth=0.6)
    what = "what each token adds, with all it met" if one.exact else f"what the {one.said} loses without each token"
    axis.set_title(f"{what}\n(the largest {len(every)})", fontsize=10)
    axis.set_xlabel(one.said)


def token_page(title: str, notes: Sequence[str], several: Sequence[TokenExplanation]) -> str:
    """Several examples as one HTML page, each with its figure embedded."""
    cards = []
    for one in several:
        data = base64.b64encode(token_png(one)).decode()
        head = html.escape(plain(f"{one.key}: {sentence(one)}"))
        cards.append(f'<li><h2>{head}</h2><img alt="{head}" src="data:image/png;base64,{data}"></li>')
    listed = "".join(f"<p>Note: {html.escape(plain(note))}</p>" for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>body{{font:16px/1.5 sans-serif;margin:2em auto;max-width:1500px;padding:0 1em}}img{{width:100%}}
h2{{font-size:1.05em}}</style></head><body>
<h1>{html.escape(title)}</h1>{listed}
<ol>
{chr(10).join(cards)}
</ol></body></html>
"""
