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
from mmfusion.explain.text import doubt, headline, is_wrong, plain, reach, sentence
from mmfusion.explain.waterfall import waterfall
from mmfusion.metrics.format import counted

PICTURE, NEIGHBOUR = 280, 72  # pixels on the longer side

STYLE = """
:root { color-scheme: light dark; --raises: #c9640f; --lowers: #2a78bd; --wrong: #b3261e; --faint: #8886;
  --card: #8881; }
@media (prefers-color-scheme: dark) { :root { --raises: #f08a3c; --lowers: #5aa6e8; --wrong: #ff8a80; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem auto; max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
#examples { list-style: none; counter-reset: place; margin: 0; padding: 0; }
#examples > li { counter-increment: place; background: var(--card); border: 1px solid var(--faint);
  border-left: 5px solid var(--faint); border-radius: 8px; padding: .8rem; margin: 1rem 0; }
#examples > .wrong { border-left-color: var(--wrong); } h2::before { content: counter(place) ". "; opacity: .6; }
.mark { color: var(--wrong); border: 1px solid; border-radius: 4px; padding: 0 .35em; font-size: .85rem; }
.parts { display: flex; flex-wrap: wrap; gap: 1rem; } .seen { flex: 0 1 280px; min-width: 0; }
.numbers { flex: 1 1 300px; min-width: 0; } .numbers p { margin: 0 0 .5rem; overflow-wrap: anywhere; }
li img { max-width: 100%; height: auto; border-radius: 4px; display: block; margin-bottom: .4rem; }
blockquote { margin: .3rem 0; padding-left: .7rem; border-left: 3px solid var(--faint); overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { text-align: left; padding: .1rem .7rem .1rem 0; vertical-align: top; font-weight: normal; }
td.n, th.n { text-align: right; white-space: nowrap; } thead th { opacity: .75; vertical-align: bottom; }
.waterfall { width: 100%; table-layout: fixed; } .waterfall td, .waterfall th { padding: .12rem 0; }
.waterfall th { width: 8.5rem; padding-right: .6rem; text-align: right; overflow-wrap: anywhere; }
.waterfall .n { width: 3.4rem; } .waterfall tr:last-child > * { font-weight: bold; }
.track { position: relative; height: 1.25rem; border-radius: 3px; background: #8881; }
.track i { position: absolute; top: .1rem; bottom: .1rem; min-width: 1px; }
.track .raises { background: var(--raises); } .track .lowers { background: var(--lowers); }
.track .sum { background: #777; }
.track .zero { top: 0; bottom: 0; width: 1px; background: currentColor; opacity: .6; }
.track .whisker { top: 50%; bottom: auto; height: 1px; background: currentColor; }
.from { font-size: .8rem; opacity: .8; overflow-wrap: anywhere; padding-bottom: .3rem; }
@media (min-width: 700px) { .waterfall th { width: 13rem; } }
.scroll { overflow-x: auto; } details { margin-top: .5rem; } summary { cursor: pointer; }
.near { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .3rem; } .near figure { margin: 0; width: 130px; }
.near figcaption { font-size: .75rem; overflow-wrap: anywhere; } .thumb { width: 72px; height: 72px; display: block;
  background: no-repeat left / contain; }
.w { padding: 0 .15em; border-radius: 3px; } footer, .note { font-size: .85rem; opacity: .8; }
form { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; margin: .8rem 0; } select { font: inherit; max-width: 100%; }
"""

# Without JavaScript the list stands in the order in which it was written, and the form stays hidden.
SCRIPT = """
const form = document.getElementById("choose"), list = document.getElementById("examples"), items = [...list.children];
function arrange() {
  const key = form.order.value, show = form.show ? form.show.value : "all";
  const by = (a, b) => key === "given" ? 0
    : key === "id" ? a.dataset.id.localeCompare(b.dataset.id, undefined, { numeric: true })
    : Number(b.dataset[key]) - Number(a.dataset[key]);
  const first = (a, b) => show === "first" ? b.dataset.wrong - a.dataset.wrong : 0;
  list.append(...[...items].sort((a, b) => first(a, b) || by(a, b)));
  for (const item of items) item.hidden = show === "only" && item.dataset.wrong !== "1";
}
form.hidden = false;
form.addEventListener("change", arrange);
arrange();
"""


def explanation_page(explanation: Explanation, title: str, summary: Summary | None = None) -> str:
    """The page as text: notes, the examples as an ordered list, then the tables of the whole split.

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
    notes = explanation.notes if summary is None else summary.notes
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title><style>{STYLE}{classes}</style></head><body>
<h1>{_escape(title)}</h1>
<p>{_escape(_introduction(explanation))}</p>
{"".join(f'<p class="note">Note: {_escape(note)}</p>' for note in notes)}
{_controls(explanation)}
<ol id="examples">
{cards}
</ol>
{_summary(summary)}
<footer>{_escape(_reading(explanation))}</footer>
<script>{SCRIPT}</script>
</body></html>
"""


def _introduction(explanation: Explanation) -> str:
    """How many are right, whose predictions they are, and how to read a bar."""
    count, labelled = len(explanation.examples), [target is not None for target in explanation.examples.targets]
    counts = counted(count, "example")
    if explanation.chooses and any(labelled):
        wrong = sum(is_wrong(explanation, row) for row in range(count))
        counts += f", {wrong} wrong and {sum(labelled) - wrong} right"
    seeds = counted(len(explanation.seeds), "seed")
    ways = f"; thin lines are standard deviations over {seeds}" if len(explanation.seeds) > 1 else ""
    positive = f": above 0 it says {explanation.class_names[1]}" if explanation.chooses else ""
    if explanation.pairs is not None:
        positive = ", the logit of the likeliest class less that of the runner-up"
    return (
        f"{counts}, predicted by {explanation.row}, {seeds}. Each bar chart takes one {explanation.output} apart"
        f"{positive}. Its parts are exact and sum to it (largest difference {explanation.account.residual:.0e}); the "
        "bias is what the model predicts for the mean of train. Orange raises, blue lowers" + ways + "."
    )


def _controls(explanation: Explanation) -> str:
    """The form that sorts and filters; hidden until the script shows it."""
    labelled = any(target is not None for target in explanation.examples.targets)
    binary = explanation.chooses
    value = f"probability of {explanation.class_names[1]}" if binary else explanation.output
    value = "probability of the likeliest" if explanation.pairs is not None else value
    orders = {"given": "as given"} | ({"loss": "loss, largest first"} if labelled else {})
    orders |= {"value": f"{value}, largest first", "id": "id"}
    options = "".join(f'<option value="{key}">{_escape(text)}</option>' for key, text in orders.items())
    show = ""
    if labelled and binary:
        shows = {"all": "all", "first": "all, wrong first", "only": "wrong only"}
        choices = "".join(f'<option value="{key}">{text}</option>' for key, text in shows.items())
        show = f'<label>Show <select name="show">{choices}</select></label>'
    return f'<form id="choose" hidden><label>Order <select name="order">{options}</select></label>{show}</form>'


def _reading(explanation: Explanation) -> str:
    if explanation.ranks.canonical:
        return (
            f"Components are the canonical components of seed {explanation.seed}: coordinates of variance 1 on train, "
            "whose product times the component's weight is its term; the terms sum to the part of both modalities of "
            "that seed. A layer's own rank terms are not identified with two modalities, and are not shown here."
        )
    return f"Rank terms are those of seed {explanation.seed}; with the layer's bias they sum to that seed's prediction."


def _card(explanation: Explanation, row: int, picture: "Image.Image | str | None", largest: int) -> str:
    """One example: the sentence, what it looks like, the numbers."""
    key, wrong, loss = explanation.examples.ids[row], is_wrong(explanation, row), explanation.loss(row)
    binary = explanation.chooses
    value = (explanation.probability(row) if binary else explanation.account.prediction[:, row]).mean()
    data = f'data-id="{_escape(key)}" data-value="{value:.9g}" data-wrong="{int(wrong)}"'
    data += "" if loss is None else f' data-loss="{loss:.9g}"'
    seen = _seen(explanation, row, picture)
    mark = '<span class="mark">wrong</span> ' if wrong else ""
    seen = f'<div class="seen">{seen}</div>' if seen else ""
    unsure = doubt(explanation, row)
    unsure = f'\n<p class="note">{_escape(unsure)}</p>' if unsure else ""
    return f"""<li {data}{' class="wrong"' if wrong else ""}>
<h2>{mark}{_escape(sentence(explanation, row))}</h2><div class="parts">{seen}
<div class="numbers"><p><strong>{_escape(key)}</strong>: {_escape(headline(explanation, row))}</p>
{_waterfall(explanation, row)}
<p class="note">{_escape(reach(explanation, row))}</p>{unsure}
{_ranks(explanation, row, largest)}</div></div></li>"""


def _seen(explanation: Explanation, row: int, picture: "Image.Image | str | None") -> str:
    """Picture, map and text of one example; empty where there is none of them."""
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
            what = _escape(f"regions that feed {explanation.mapped}, to first order; words: with minus without each")
            seen += f'<img src="{_uri(drawn)}" alt="{what}"><small>{what}</small>'
    if maps is not None:
        seen += "".join(f'<p class="note">{_escape(note)}</p>' for note in maps.notes)
    texts = {name: several[row] for name, several in examples.texts.items()}
    words = _words(maps.words if maps is not None else {}, texts)
    return seen + (f"<blockquote>{words}</blockquote>" if text else "")


def _waterfall(explanation: Explanation, row: int) -> str:
    """One table row per part and their sum: name, bar, number. Bars are as wide as the page lets them be."""
    bars = waterfall(explanation, row)
    low, high = bars.limits

    def span(start: float, end: float) -> str:
        left, right = (100 * (value - low) / (high - low) for value in sorted((start, end)))
        return f"left:{left:.2f}%;width:{right - left:.2f}%"

    lines = ""
    for k, (name, value) in enumerate(zip(bars.names, bars.values, strict=True)):
        kind = "sum" if k == len(bars.names) - 1 else "raises" if value > 0 else "lowers"
        track = f'<i class="{kind}" style="{span(bars.starts[k], bars.ends[k])}"></i>'
        track += f'<i class="zero" style="{span(bars.origin, bars.origin)}"></i>'
        if bars.spread[k] > 0:
            whisker = span(bars.ends[k] - bars.spread[k], bars.ends[k] + bars.spread[k])
            track += f'<i class="whisker" style="{whisker}"></i>'
        lines += (
            f'<tr><th scope="row">{_escape(name)}</th><td><div class="track" aria-hidden="true">{track}</div></td>'
            f'<td class="n">{value:+.2f}</td></tr>'
        )
    return f'<table class="waterfall">{lines}</table>'


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
            f'<tr><td>{k + 1}</td>{cells}<td class="n">{term:+.2f}</td><td class="n">{ranks.std[row, k]:.2f}</td></tr>'
            f'<tr><td class="from" colspan="{len(modalities) + 3}">nearest in train: {_escape(near)}</td></tr>'
        )
    figures = ""
    for i in ranks.neighbours[row, largest]:
        alt = _escape(f"{train.ids[i]}: {train.text(i)}")
        thumb = f'<span class="thumb t{i}" role="img" aria-label="{alt}"></span>' if train.pictures else ""
        caption = f"{explanation.label(train.targets[i])}: {_short(train.text(i), 90) or train.ids[i]}"
        figures += f'<figure title="{alt}">{thumb}<figcaption>{_escape(caption)}</figcaption></figure>'
    return f"""<details><summary>{kind}s of seed {explanation.seed}; nearest in train by {kind} {largest + 1}
({ranks.terms[row, largest]:+.2f})</summary><div class="near">{figures}</div><div class="scroll"><table>
<thead><tr><th>{kind}</th>{heads}<th class="n">term</th><th class="n">std on train</th></tr></thead>
<tbody>{rows}</tbody></table></div></details>"""


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
    """Tables of the whole split, of which the examples are some."""
    if summary is None:
        return ""
    tables = ""
    for caption, head, rows in summary_rows(summary):
        heads = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
        tables += f'<p>{_escape(caption)}</p><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        tables += f"<tbody>{body}</tbody></table></div>"
    return f"<section><h3>All {summary.examples} examples of {_escape(summary.split)}</h3>{tables}</section>"


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
    return html.escape(plain(text), quote=True)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
