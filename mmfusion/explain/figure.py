"""One explained prediction as a picture: the meme with its map, the waterfall of the parts, rank terms, neighbours."""

import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from mmfusion.encoders.images import decode_rgb
from mmfusion.explain.account import Explanation
from mmfusion.explain.saliency import overlay
from mmfusion.explain.text import headline, plain, reach, sentence
from mmfusion.explain.waterfall import waterfall
from mmfusion.files import write_atomically

RAISES, LOWERS, GREY, DARK = "#d9741a", "#1f6fb4", "#8a8a8a", "#444444"
SHOWN_RANKS = 4  # with their neighbours; those whose term is largest here


def draw_explanation(path: Path, explanation: Explanation, row: int = 0) -> None:
    """Write one PNG. Raises InputError where the folder cannot be written."""
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a meme may say $5 or $10
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of emoji and some scripts; a box stands for them
        figure = _figure(explanation, row)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))


def _figure(explanation: Explanation, row: int) -> Figure:
    figure = Figure(figsize=(16, 10.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[3.5, 1])
    pictures = bool(explanation.examples.pictures)
    left, middle, right = upper.subfigures(1, 3, width_ratios=[1 if pictures else 0.5, 1.05, 1.1])

    if pictures:
        picture, words = left.subplots(2, 1, height_ratios=[1.5, 1])
        _draw_picture(picture, explanation, row)
        _draw_words(words, explanation, row)
    else:
        _draw_words(left.subplots(), explanation, row)
    _draw_waterfall(middle.subplots(), explanation, row)
    _draw_ranks(right.subplots(), explanation, row)
    _draw_neighbours(lower, explanation, row)
    lines = [textwrap.fill(part, 110) for part in sentence(explanation, row).split(". ", 1)]
    figure.suptitle(".\n".join(lines), fontsize=16, fontweight="bold")
    name = plain(_short(explanation.examples.ids[row], 100))
    figure.supxlabel(
        f"{name}, by {explanation.row} of {explanation.run}: {headline(explanation, row)}\n{reach(explanation, row)}",
        fontsize=10,
        linespacing=1.4,
    )
    return figure


def _draw_picture(axis: Axes, explanation: Explanation, row: int) -> None:
    key, maps = explanation.examples.ids[row], explanation.maps[row]
    axis.axis("off")
    picture = decode_rgb(explanation.examples.pictures[key])
    picture.thumbnail((640, 640))
    if maps is None or maps.regions is None:
        axis.imshow(np.asarray(picture))
        axis.set_title("; ".join(maps.notes) if maps and maps.notes else "", fontsize=9)
        return
    axis.imshow(np.asarray(overlay(picture, maps.regions.cells, maps.box)))
    h, w = maps.regions.cells.shape
    axis.set_title(
        f"what feeds {explanation.mapped} ({h} x {w} cells, to first order):\norange raises it, blue lowers it",
        fontsize=10,
    )


def _draw_words(axis: Axes, explanation: Explanation, row: int) -> None:
    maps = explanation.maps[row]
    if maps is None or not any(maps.words.values()):
        axis.axis("off")
        text = "\n".join(
            textwrap.wrap(plain(explanation.examples.text(row)), 60 if explanation.examples.pictures else 32)[:12]
        )
        axis.text(0.5, 0.95, text, ha="center", va="top", fontsize=11)
        return
    words = [pair for several in maps.words.values() for pair in several]
    if len(words) > 12:  # the ones that matter most, in the order of the text
        least = sorted(abs(value) for _, value in words)[-12]
        words = [pair for pair in words if abs(pair[1]) >= least]
    y = np.arange(len(words))[::-1]
    values = np.array([value for _, value in words])
    axis.barh(y, values, color=np.where(values > 0, RAISES, LOWERS))
    axis.set_yticks(y, [plain(_short(word, 18)) for word, _ in words], fontsize=10)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_title(f"words: {explanation.mapped} with each, minus without it", fontsize=10)


def _draw_waterfall(axis: Axes, explanation: Explanation, row: int) -> None:
    """Mean over members of each part, one after another; whiskers: standard deviation over members."""
    bars, count = waterfall(explanation, row), len(explanation.seeds)
    rows = np.arange(len(bars.ends))
    colours = [*np.where(bars.values[:-1] > 0, RAISES, LOWERS), DARK]
    axis.barh(rows, bars.ends - bars.starts, left=bars.starts, color=colours, height=0.55)
    if count > 1:
        axis.errorbar(bars.ends, rows, xerr=bars.spread, fmt="none", ecolor="black", capsize=3, lw=0.9)
    for i in rows[:-2]:  # from the end of each part to the beginning of the next
        axis.plot([bars.ends[i], bars.ends[i]], [i, i + 1], color=GREY, lw=0.8, ls=":")
    low, high = bars.limits
    for i, value in enumerate(bars.values):
        axis.text(high + 0.22 * (high - low), i, f"{value:+.2f}", va="center", ha="right", fontsize=11)
    axis.set_xlim(low - 0.04 * (high - low), high + 0.24 * (high - low))
    axis.set_yticks(rows, [name.replace(" x ", " x\n") for name in bars.names], fontsize=11)
    axis.axvline(bars.origin, color="black", lw=0.8)
    axis.invert_yaxis()
    mean = f"mean and std of {count} seeds" if count > 1 else "1 seed"
    axis.set_title(
        f"what each part adds to the {explanation.output}, {mean}\n(bias: what is predicted for the mean of train)",
        fontsize=10,
    )
    if explanation.chooses:
        below, above = explanation.names(row)
        axis.set_xlabel(f"{explanation.output}: {above} above 0, {below} below")
    else:
        axis.set_xlabel(f"{explanation.output}, from the bias on")


def _draw_ranks(axis: Axes, explanation: Explanation, row: int) -> None:
    ranks, names = explanation.ranks, explanation.account.modalities
    terms = ranks.terms[row]
    y = np.arange(len(terms))
    axis.barh(
        y, ranks.std[row] * 2, left=-ranks.std[row], color=GREY, alpha=0.25, height=0.8, label="+- 1 std on train"
    )
    axis.barh(y, terms, color=np.where(terms > 0, RAISES, LOWERS), height=0.4)
    kind = "component" if ranks.canonical else "rank"
    reach = 1.12 * max(*ranks.std[row], *np.abs(terms))
    axis.set_xlim(-reach, reach)
    labels = []
    for k in y:
        coordinates = "\n".join(
            f"{name} {value:+.2f}" for name, value in zip(names, ranks.coordinates[row, k], strict=True)
        )
        labels.append(f"{kind} {k + 1}: {terms[k]:+.2f}\n{coordinates}")
    axis.set_yticks(y, labels, fontsize=9)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    if ranks.canonical:
        what = f"components of seed {explanation.seed}: weight x product of coordinates\n"
        title = f"canonical; they sum to its {' x '.join(names)}, {terms.sum():+.2f}"
    else:
        what = f"rank terms of seed {explanation.seed}: weight x product of coordinates\n"
        title = f"with its bias {ranks.raw_bias[row]:+.2f} they sum to {terms.sum() + ranks.raw_bias[row]:+.2f}"
    axis.set_title(what + title, fontsize=10)
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.05))


def _draw_neighbours(figure: SubFigure, explanation: Explanation, row: int) -> None:
    """Thumbnails of the training examples nearest by each of the largest rank terms."""
    ranks, train = explanation.ranks, explanation.train
    shown = np.argsort(-np.abs(ranks.terms[row]))[:SHOWN_RANKS]
    each = min(3, ranks.neighbours.shape[2])
    kind = "component" if ranks.canonical else "rank"
    groups = np.atleast_1d(figure.subfigures(1, len(shown), wspace=0.02))
    for k, group in zip(shown, groups, strict=True):
        group.suptitle(f"nearest in train by {kind} {k + 1} ({ranks.terms[row, k]:+.2f})", fontsize=10)
        for j, axis in enumerate(group.subplots(1, each, squeeze=False)[0]):
            place = int(ranks.neighbours[row, k, j])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            key = train.ids[place]
            if key in train.pictures:
                picture = decode_rgb(train.pictures[key])
                picture.thumbnail((220, 220), Image.Resampling.BILINEAR)
                axis.imshow(np.asarray(picture))
            axis.set_anchor("N")
            lines = textwrap.wrap(plain(_short(train.text(place), 60)), 48 // each + 4)[:3]
            words = "\n".join([explanation.label(train.targets[place]), *lines])
            if train.pictures:
                axis.set_xlabel(words, fontsize=7)
            else:
                axis.text(0.5, 0.95, words, ha="center", va="top", fontsize=9)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
