"""A diagnosis on one page: as text for the terminal, and as HTML that needs no server and no other file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from mmfusion.diagnose.measure import Diagnosis
from mmfusion.explain.page import STYLE
from mmfusion.explain.text import plain
from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.verdicts import Contrast

PAGE_STYLE = """
section { max-width: 780px; } section h2 { margin-top: 1.4rem; } section h2::before { content: none; }
td .track { min-width: 140px; } th, td.n { white-space: nowrap; }
"""
SHOWN_PARTS = 10


@dataclass(frozen=True)
class Section:
    """A question, its answer, and the table that it rests on."""

    title: str
    answer: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()
    """one share of 1 per row, drawn on the page alone"""


def sections(found: Diagnosis) -> list[Section]:
    """The four questions with their answers."""
    return [_interaction(found), _rank(found), _data(found), _modalities(found)]


def headline(found: Diagnosis) -> str:
    """What was looked at, and how well a model does there."""
    groups = "" if found.groups is None else f" in {counted(found.groups, 'group')}"
    modalities = "1 modality" if len(found.modalities) == 1 else f"{len(found.modalities)} modalities"
    nothing = ""
    if not found.learns:
        best = max(found.over_chance, key=lambda contrast: contrast.estimate)
        nothing = f" Nothing beats a constant beyond doubt ({best.name} {_interval(best)}): what follows says little."
    return (
        f"{counted(found.examples, 'example')}{groups}, {modalities}, "
        f"{found.task}. Score: {found.score}, on inner folds; all modalities at rank {found.reference_rank} reach "
        f"{found.full:.3f}, saying the same of every example {found.chance:.3f}.{nothing}"
    )


def budget_line(found: Diagnosis) -> str:
    """Which budget this took."""
    budget = found.budget
    return (
        f"Budget: {counted(found.trainings, 'training')} ({counted(budget.inner_folds, 'inner fold')} x "
        f"{counted(budget.seeds, 'seed')} x settings) of {counted(budget.inner_steps, 'step')}, "
        f"{found.seconds:.0f} s; smallest effect of interest {budget.effect:g}."
    )


def diagnosis_text(found: Diagnosis) -> str:
    """The page as text: an answer per question, then fixed-width tables."""
    blocks = [f"Diagnosis of {found.name}", headline(found)]
    for section in sections(found):
        blocks.append("\n".join([f"## {section.title}", section.answer, *_table(section.head, section.rows)]))
    blocks.append("\n".join([*(f"Note: {note}" for note in found.notes), budget_line(found)]))
    return plain_lines("\n\n".join(blocks))


def diagnosis_page(found: Diagnosis) -> str:
    """The page as HTML; all text is escaped."""
    body = ""
    for section in sections(found):
        bars = section.bars or [None] * len(section.rows)
        rows = "".join(_row(cells, bar) for cells, bar in zip(section.rows, bars, strict=True))
        heads = "".join(
            f"<th{'' if k == 0 else ' class=n'}>{_escape(cell)}</th>" for k, cell in enumerate(section.head)
        )
        heads += "<th></th>" if section.bars else ""
        table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        body += f"<section><h2>{_escape(section.title)}</h2><p>{_escape(section.answer)}</p>"
        body += f"{table if section.rows else ''}</section>\n"
    notes = "".join(f'<p class="note">Note: {_escape(note)}</p>' for note in found.notes)
    title = f"Diagnosis of {found.name}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head><body>
<h1>{_escape(title)}</h1>
<p>{_escape(headline(found))}</p>
{body}{notes}
<footer>{_escape(budget_line(found))}</footer>
</body></html>
"""


# ---- sections ------------------------------------------------------------------------------------------------------


def _interaction(found: Diagnosis) -> Section:
    title, gap, effect = "Do the modalities interact?", found.interaction, found.budget.effect
    if gap is None:
        return Section(title, "One modality has nothing to interact with.", (), ())
    uses = f"without the interactions the same model loses {_interval(gap)}"
    needs = f"an additive readout of the same latents falls short by {_interval(found.over_readout)}"
    if found.interacts == "supported":
        answer = f"Yes: {uses}, and {needs}."
    elif gap.verdict == "supported" and found.over_readout.verdict == "not supported":
        answer = f"They need not: {uses}, but {needs}, so an additive model (late fusion) does as well."
    elif found.interacts == "not supported":
        answer = f"No interaction worth {effect:g} is seen: {uses}, {needs}; late fusion may do as well."
    else:
        answer = f"It cannot be told from these data: {uses}, {needs}."
    rows = [(c.name, _interval(c), f"{c.p_corrected:.4f}") for c in (gap, found.over_readout)]
    return Section(title, answer, ("", f"{found.score}, 95 % interval", "p"), rows)


def _rank(found: Diagnosis) -> Section:
    title = "Which rank do inner folds support?"
    if not found.rank_contrasts:
        return Section(title, "Only one rank was tried: there is nothing to choose.", (), ())
    beaten = [c for c in found.rank_contrasts if c.verdict == "supported"]
    because = f"{'; '.join(f'{c.name} {_interval(c)}' for c in beaten[-2:])}" if beaten else "no rank beats rank 1"
    if not beaten and min(found.rank_scores) != 1:
        because = "no larger rank beats the smallest"
    answer = f"Rank {found.rank}: no larger one scores higher beyond doubt ({because})."
    rows = [(f"rank {rank}", mean_std(values)) for rank, values in found.rank_scores.items()]
    return Section(title, answer, ("", f"{found.score}, mean +- std over seeds"), rows)


def _data(found: Diagnosis) -> Section:
    effect, unit = found.budget.effect, "examples" if found.groups is None else "groups"
    seen = f"A difference of {found.detectable:.3f} between two models like these would be seen in four cases of five"
    if found.enough_data:
        answer = f"Yes, for effects of {effect:g}: {seen.lower()[0]}{seen[1:]}."
    else:
        remedy = f"about {found.examples_needed} {unit} would show it, with many seeds"
        if found.seeds_needed is not None:
            remedy = f"{counted(found.seeds_needed, 'seed')} instead of {found.budget.seeds} would show it on these"
        answer = f"Not for effects of {effect:g}: {seen[0].lower()}{seen[1:]}; {remedy}."
    return Section("Are there data enough to tell?", answer, (), ())


def _modalities(found: Diagnosis) -> Section:
    needed = [m.name for m in found.modalities if m.lost_without and m.lost_without.verdict == "supported"]
    useless = [m.name for m in found.modalities if m.lost_without and m.lost_without.verdict == "not supported"]
    answer = f"Not replaced by the others: {', '.join(needed)}." if needed else "None is beyond doubt irreplaceable."
    if useless:
        answer += f" Without loss of {found.budget.effect:g}, one at a time, can be left out: {', '.join(useless)}."
    if len(found.modalities) == 1:
        answer = "There is one modality alone."
    best = max(found.modalities, key=lambda m: m.alone)
    answer += f" Best alone: {best.name}, {best.alone:.3f} (a constant: {found.chance:.3f})."
    rows = [
        (
            m.name,
            f"{m.alone:.3f} [{m.alone_interval[0]:.3f}, {m.alone_interval[1]:.3f}]",
            "-" if m.lost_without is None else _interval(m.lost_without),
            f"{m.share:.2f}",
        )
        for m in found.modalities
    ]
    bars = [m.share for m in found.modalities]
    largest = sorted(found.parts.items(), key=lambda item: -abs(item[1]))[:SHOWN_PARTS]
    for subset, share in largest:
        if len(subset) > 1:
            rows.append((f"of which {' x '.join(subset)}", "", "", f"{share:.2f}"))
            bars.append(share)
    head = ("", "alone", "lost without it", "share of variance")
    return Section("Which modality carries what?", answer, head, rows, [] if bars[0] != bars[0] else bars)


# ---- text ----------------------------------------------------------------------------------------------------------


def _interval(contrast: Contrast) -> str:
    return f"{contrast.estimate:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [f"{cell:{'<' if k == 0 else '>'}{widths[k]}}" for k, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(cells: Sequence[str], share: float | None) -> str:
    text = "".join(
        f'<th scope="row">{_escape(cell)}</th>' if k == 0 else f'<td class="n">{_escape(cell)}</td>'
        for k, cell in enumerate(cells)
    )
    if share is not None:
        kind, width = ("raises" if share > 0 else "lowers"), min(100.0, 100 * abs(share))
        bar = f'<i class="{kind}" style="left:0;width:{width:.1f}%"></i>'
        text += f'<td><div class="track" aria-hidden="true">{bar}</div></td>'
    return f"<tr>{text}</tr>"


def plain_lines(text: str) -> str:
    """Every line as a terminal shows and does not obey it."""
    return "\n".join(plain(line) if line.strip() else "" for line in text.split("\n"))


def _escape(text: str) -> str:
    return html.escape(plain(text), quote=True)
