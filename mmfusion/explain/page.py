"""Many explained predictions on one HTML page that needs no server and no other file."""

import base64
import html
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mmfusion.encoders.images import decode_rgb, reason_unreadable
from mmfusion.explain.account import Explanation
from mmfusion.explain.saliency import overlay
from mmfusion.explain.summary import Summary, summary_rows
from mmfusion.explain.text import headline, reach

PICTURE, NEIGHBOUR = 280, 72  # pixels on the longer side
WIDTH, LABEL, ROW = 520, 150, 22  # of a waterfall: whole, its labels, one bar

STYLE = """
:root { color-scheme: light dark; --raises: #c9640f; --lowers: #2a78bd; --faint: #8886; --card: #8881; }
@media (prefers-color-scheme: dark) { :root { --raises: #f08a3c; --lowers: #5aa6e8; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
article { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; padding: .9rem 1rem;
  margin: 1rem 0; display: flex; flex-wrap: wrap; gap: 1rem; }
article > .seen { flex: 0 0 280px; } article > .account { flex: 1 1 520px; min-width: 0; }
article img { max-width: 100%; height: auto; border-radius: 4px; display: block; margin-bottom: .4rem; }
blockquote { margin: .3rem 0; padding-left: .7rem; border-left: 3px solid var(--faint); overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
.raises { fill: var(--raises); } .lowers { fill: var(--lowers); } .sum { fill: #888; }
.thread { stroke: #888; stroke-dasharray: 2 2; } .zero, .whisker { stroke: currentColor; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { text-align: left; padding: .1rem .8rem .1rem 0; vertical-align: top; } td.n, th.n { text-align: right; }
.scroll { overflow-x: auto; } details { margin-top: .5rem; } summary { cursor: pointer; }
.near { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .3rem; } .near figure { margin: 0; width: 130px; }
.near figcaption { font-size: .75rem; overflow-wrap: anywhere; } .thumb { width: 72px; height: 72px; display: block;
  background: no-repeat left / contain; }
.w { padding: 0 .15em; border-radius: 3px; } footer, .note { font-size: .85rem; opacity: .8; }
"""


def explanation_page(explanation: Explanation, title: str, summary: Summary | None = None) -> str:
    """The page as text.

    Pictures are scaled down and embedded; of the neighbours in train, those by the rank of the largest term have
    theirs. A picture that cannot be read is replaced by the reason. All text is escaped.
    """
    count = len(explanation.examples)
    largest = np.abs(explanation.ranks.terms).argmax(1)  # (N,)
    nearest = {int(i) for row, k in enumerate(largest) for i in explanation.ranks.neighbours[row, k]}
    thumbs = _pictures(
        {i: explanation.train.pictures.get(explanation.train.ids[i]) for i in sorted(nearest)}, NEIGHBOUR
    )
    pictures = _pictures(
        {row: explanation.examples.pictures.get(key) for row, key in enumerate(explanation.examples.ids)}, PICTURE
    )
    classes = "".join(f".t{i}{{background-image:url({_uri(x)})}}" for i, x in thumbs.items() if not isinstance(x, str))
    cards = "\n".join(_card(explanation, row, pictures.get(row), int(largest[row])) for row in range(count))
    intro = (
        f"{explanation.row}, seeds {', '.join(map(str, explanation.seeds))}; {count} example{'s' * (count != 1)}. Each "
        f"{explanation.output} is taken apart exactly, about the mean of train: the parts sum to it (largest "
        f"difference over all seeds and examples {explanation.account.residual:.0e}). Orange raises it, blue lowers "
        "it; whiskers are standard deviations over seeds."
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title><style>{STYLE}{classes}</style></head><body>
<h1>{_escape(title)}</h1>
<p>{_escape(intro)}</p>
{_summary(summary)}
{cards}
<footer>{_escape(_reading(explanation))}</footer>
</body></html>
"""


def _reading(explanation: Explanation) -> str:
    if explanation.ranks.canonical:
        return (
            f"Components are the canonical components of seed {explanation.seed}: coordinates of variance 1 on train, "
            "whose product times the component's weight is its term; the terms sum to the part of both modalities of "
            "that seed. A layer's own rank terms are not identified with two modalities, and are not shown here."
        )
    return f"Rank terms are those of seed {explanation.seed}; with the layer's bias they sum to that seed's prediction."


def _card(explanation: Explanation, row: int, picture: "Image.Image | str | None", largest: int) -> str:
    examples = explanation.examples
    key, text, maps = examples.ids[row], examples.text(row), explanation.maps[row]
    seen = ""
    if isinstance(picture, str):
        seen += f'<p class="note">{_escape(key)}: {_escape(picture)}</p>'
    elif picture is not None:
        alt = f"{key}: a meme that says: {text}" if text else key
        seen += f'<img src="{_uri(picture)}" alt="{_escape(alt)}" title="{_escape(key)}">'
        if maps is not None and maps.regions is not None:
            drawn = overlay(picture, maps.regions.cells, maps.box)
            what = _escape(f"the regions that feed {explanation.mapped}, to first order")
            seen += f'<img src="{_uri(drawn)}" alt="{what}"><small>{what}</small>'
    if maps is not None:
        seen += "".join(f'<p class="note">{_escape(note)}</p>' for note in maps.notes)
    texts = {name: several[row] for name, several in examples.texts.items()}
    words = _words(maps.words if maps is not None else {}, texts)
    seen += f"<blockquote>{words}</blockquote>" if text else ""
    return f"""<article><div class="seen">{seen}</div><div class="account">
<h2>{_escape(key)}</h2><p>{_escape(headline(explanation, row))}<br>{_escape(reach(explanation, row))}</p>
{_waterfall(explanation, row)}
{_ranks(explanation, row, largest)}</div></article>"""


def _waterfall(explanation: Explanation, row: int) -> str:
    """Inline SVG: one bar per part, each beginning where the one before ends, and their sum."""
    names = [*explanation.account.parts, explanation.output]
    values = [part[:, row] for part in explanation.account.parts.values()]
    means = np.array([value.mean() for value in values])
    ends = np.append(np.cumsum(means), means.sum())
    # a value is shown from what the model says at the mean latents: beside it the parts would be slivers
    origin = means[0] if explanation.task == "regression" else 0.0
    starts = np.append(ends[:-1] - means, origin)
    starts[0] = origin if explanation.task == "regression" else starts[0]
    whole = explanation.account.prediction[:, row]
    spread = [value.std(ddof=1) if len(value) > 1 else 0.0 for value in (*values, whole)]
    low = min(origin, *(starts), *(ends - spread))
    high = max(origin, *(starts), *(ends + spread), low + 1e-9)
    scale = (WIDTH - LABEL - 70) / (high - low)

    def x(value: float) -> float:
        return LABEL + 5 + (value - low) * scale

    height = ROW * len(names) + 6
    alt = "; ".join(f"{name} {value:+.2f}" for name, value in zip(names, [*means, means.sum()], strict=True))
    lines = [
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="{_escape(alt)}">'
        f"<title>{_escape(alt)}</title>"
        f'<line class="zero" x1="{x(origin):.1f}" x2="{x(origin):.1f}" y1="0" y2="{height}" stroke-width=".7"/>'
    ]
    for i, name in enumerate(names):
        y, value = ROW * i + 4, [*means, means.sum()][i]
        kind = "sum" if i == len(names) - 1 else "raises" if value > 0 else "lowers"
        left, right = sorted((x(starts[i]), x(ends[i])))
        middle = y + ROW / 2 - 2
        label = f'<text x="{LABEL}" y="{y + 13}" text-anchor="end">{_escape(name)}</text>'
        bar = f'<rect class="{kind}" x="{left:.1f}" y="{y}" width="{max(right - left, 0.7):.1f}" height="{ROW - 6}"/>'
        whisker = ""
        if spread[i] > 0:
            first, last = x(ends[i] - spread[i]), x(ends[i] + spread[i])
            whisker = f'<line class="whisker" x1="{first:.1f}" x2="{last:.1f}" y1="{middle}" y2="{middle}"/>'
        if i < len(names) - 2:
            whisker += (
                f'<line class="thread" x1="{x(ends[i]):.1f}" x2="{x(ends[i]):.1f}" y1="{y}" y2="{y + 2 * ROW - 6}"/>'
            )
        number = f'<text x="{WIDTH}" y="{y + 13}" text-anchor="end">{value:+.2f}</text>'
        lines.append(label + bar + whisker + number)
    return "".join(lines) + "</svg>"


def _ranks(explanation: Explanation, row: int, largest: int) -> str:
    """Terms and coordinates as a table, and the training examples nearest by the largest one."""
    ranks, train, modalities = explanation.ranks, explanation.train, explanation.account.modalities
    kind = "component" if ranks.canonical else "rank"
    heads = "".join(f'<th class="n">{_escape(name)}</th>' for name in modalities)
    rows = ""
    for k, term in enumerate(ranks.terms[row]):
        cells = "".join(f'<td class="n">{value:+.2f}</td>' for value in ranks.coordinates[row, k])
        near = ", ".join(train.ids[i] for i in ranks.neighbours[row, k])
        rows += (
            f'<tr><td>{k + 1}</td>{cells}<td class="n">{term:+.2f}</td><td class="n">{ranks.std[k]:.2f}</td>'
            f"<td>{_escape(near)}</td></tr>"
        )
    figures = ""
    for i in ranks.neighbours[row, largest]:
        target = train.targets[i]
        label = "" if target is None else f"label {target:g}" if explanation.task == "binary" else f"{target:.2f}"
        alt = _escape(f"{train.ids[i]}: {train.text(i)}")
        thumb = f'<span class="thumb t{i}" role="img" aria-label="{alt}"></span>' if train.pictures else ""
        caption = f"{_escape(label)} {_escape(_short(train.text(i), 90) or train.ids[i])}"
        figures += f'<figure title="{alt}">{thumb}<figcaption>{caption}</figcaption></figure>'
    return f"""<details><summary>{kind}s of seed {explanation.seed}; nearest in train by {kind} {largest + 1}
({ranks.terms[row, largest]:+.2f})</summary><div class="near">{figures}</div><div class="scroll"><table>
<tr><th>{kind}</th>{heads}<th class="n">term</th><th class="n">std on train</th><th>nearest in train</th></tr>{rows}
</table></div></details>"""


def _words(words: dict[str, list[tuple[str, float]]], texts: dict[str, str]) -> str:
    """The texts with each word tinted by what it feeds, and the number in its title."""
    largest = max([abs(value) for several in words.values() for _, value in several] + [1e-30])
    lines = []
    for name, text in texts.items():
        line, place = "", 0
        for word, value in words.get(name, []):
            start = text.find(word, place)  # words come in the order of the text; special tokens are not in it
            line += _escape(text[place:start]) if start >= 0 else _escape(text[place:]) + " "
            place = start + len(word) if start >= 0 else len(text)
            share = round(55 * abs(value) / largest)
            tint = f"color-mix(in srgb, var({'--raises' if value > 0 else '--lowers'}) {share}%, transparent)"
            line += f'<span class="w" style="background:{tint}" title="{value:+.3f}">{_escape(word)}</span>'
        label = f"<small>{_escape(name)}:</small> " if len(texts) > 1 else ""
        lines.append(label + line + _escape(text[place:]))
    return "<br>".join(lines)


def _summary(summary: Summary | None) -> str:
    if summary is None:
        return ""
    tables = ""
    for caption, head, rows in summary_rows(summary):
        heads = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
        tables += f'<p>{_escape(caption)}</p><div class="scroll"><table><tr>{heads}</tr>{body}</table></div>'
    return f"<section>{tables}</section>"


# ---- pictures ------------------------------------------------------------------------------------------------------


def _pictures(paths: dict[int, Path | None], side: int) -> "dict[int, Image.Image | str]":
    """Pictures scaled down to `side`, or the reason why one cannot be read; None is left out."""

    def scaled(path: Path) -> "Image.Image | str":
        try:
            picture = decode_rgb(path)
        except Exception as error:  # a hostile file may raise nearly anything inside Pillow
            return reason_unreadable(error)
        picture.thumbnail((side, side), Image.Resampling.BILINEAR)
        return picture

    wanted = {key: path for key, path in paths.items() if path is not None}
    with ThreadPoolExecutor(2) as pool:  # Pillow decodes outside the GIL
        return dict(zip(wanted, pool.map(scaled, wanted.values()), strict=True))


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=78)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
