"""contrasts.csv, and what is made of it alone: RESULTS.md and its figure; beside them a page for each experiment.

`experiments.reproduce` writes all of them. Whoever has contrasts.csv can write RESULTS.md again, byte for byte
(experiments.results_summary), and a test does.
"""

import csv
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.forest import draw_forest
from experiments.power import CURVE, SUPPORTED, design_of
from experiments.power import draw as draw_power
from experiments.results_summary import (
    CONTRAST_COLUMNS,
    FIGURE,
    PLANTINGS,
    POWER,
    RUN_COLUMNS,
    planted_table,
    power_table,
    read_contrasts,
    summary,
    verdict_table,
    with_answers,
    with_tables,
)
from mmfusion.errors import InputError
from mmfusion.files import write_atomically, write_text
from mmfusion.metrics.power import false_support, power_curve, size_needed
from mmfusion.runs.folder import PACKAGES, installed_version
from mmfusion.runs.outputs import plain_cell


@dataclass(frozen=True)
class Finished:
    """One experiment on one dataset, as it stands in its folder."""

    experiment: str
    dataset: str
    folder: Path
    results: dict
    """results.json"""
    command: str
    models: str | None
    """the command that trained the run that it measures; None where it trains its own"""
    code: str
    """digest of the code that ran"""
    device: str

    @property
    def page(self) -> str:
        """Name of its page and figure, without suffix."""
        return f"{self.experiment}-{self.dataset}"


def write_pages(finished: Sequence[Finished], out: Path, folder: Path) -> None:
    """Write RESULTS.md (`out`), and into `folder` contrasts.csv, the forest plot, the pages and their figures.

    A README.md beside RESULTS.md is given the answers of its table of questions, a study.md beside `folder` its tables.
    """
    for one in finished:
        source = one.folder / "figure.png"
        write_atomically(folder / f"{one.page}.png", lambda path, source=source: shutil.copyfile(source, path))
        write_text(folder / f"{one.page}.md", page(one))
    write_text(folder / "contrasts.csv", contrasts_csv(finished))
    rows = read_contrasts(folder / "contrasts.csv")
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw_forest(figure, rows)
    write_atomically(folder / FIGURE, lambda path: figure.savefig(path, dpi=90, format="png"))
    text = summary(rows, os.path.relpath(folder, out.parent))
    write_text(out, text)
    curves = {(one.experiment, one.dataset): curve for one in finished if (curve := _power_curve(one)) is not None}
    if curves:
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw_power(figure, curves)
        write_atomically(folder / "power.png", lambda path: figure.savefig(path, dpi=80, format="png"))
    places = {"verdicts": (FIGURE, verdict_table(rows)), "power": ("power.png", power_table(rows))}
    tables = {
        name: [f"![{name}, figure]({folder.name}/{file})", "", *lines] if (folder / file).exists() else lines
        for name, (file, lines) in places.items()
    }
    tables["plantings"] = planted_table(folder / PLANTINGS)
    for path, changed in (
        (out.parent / "README.md", lambda text: with_answers(text, rows)),
        (folder.parent / "study.md", lambda text: with_tables(text, tables)),
    ):
        if path.exists():
            write_text(path, changed(path.read_text(encoding="utf-8")))
    print(f"\n{out}: {len(finished)} experiments, {text.count(chr(10))} lines; tables and figures in {folder}/")


# ---- contrasts.csv -----------------------------------------------------------------------------------------------


def contrasts_csv(finished: Sequence[Finished]) -> str:
    """All contrasts of all experiments, one row each, with what is known of their runs."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow((*RUN_COLUMNS, *CONTRAST_COLUMNS))
    for one in finished:
        about = _about(one)
        for c in one.results["contrasts"]:
            own = {"contrast": c["name"], "means": c["claim"], "power_alone": c["power"], "decides": int(c["decides"])}
            own |= {"contrast_verdict": c["verdict"], "sign_only": int(c["sign_only"])}
            values = [about[name] for name in RUN_COLUMNS] + [own.get(name, c.get(name)) for name in CONTRAST_COLUMNS]
            table.writerow([plain_cell(value) if isinstance(value, str) else value for value in values])
    return text.getvalue()


def _about(one: Finished) -> dict[str, object]:
    """What stands in every row of a run."""
    results = one.results
    versions = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES[:3])
    examples = sum(results["examples"].values())
    power: dict[str, object] = dict.fromkeys(("power", "false_support", "size_needed"), "")
    try:
        design = design_of(results["contrasts"], one.page)
    except InputError:  # values not over folds: their own power stands in power_alone
        pass
    else:
        power["power"] = round(float(power_curve(*design.rule, [1.0], floors=design.floors)[0, 2]), 3)
        power["false_support"] = round(false_support(*design.rule, floors=design.floors), 4)
        power["size_needed"] = size_needed(*design.rule, examples, POWER, floors=design.floors) or ""
    return power | {
        "experiment": one.experiment,
        "dataset": one.dataset,
        "verdict": results["verdict"],
        "claim": results["claim"],
        "examples": examples,
        "command": one.command,
        "code": one.code,
        "machine": f"{one.device}, {results['threads']} threads, {versions}",
        "seconds": round(results["seconds"]),
        "memory_gb": results["peak_memory_gb"],
    }


def _power_curve(one: Finished) -> np.ndarray | None:
    """Probability of "supported" over CURVE; None where contrasts hold no values over folds."""
    try:
        design = design_of(one.results["contrasts"], one.page)
    except InputError:
        return None
    return power_curve(*design.rule, CURVE, floors=design.floors)[:, SUPPORTED]


# ---- pages -------------------------------------------------------------------------------------------------------


def page(one: Finished) -> str:
    """Everything that one experiment found on one dataset."""
    results = one.results
    resumed = " since it was resumed" if results["resumed"] else ""
    tested, folds, repeats = results["examples"]["test"], results["folds"], results["repeats"]
    size = f"{tested} test examples"
    if folds > 1:
        size = f"{repeats} x {folds // repeats} folds of about {tested} test examples"
    lines = [
        f"# {one.experiment} on {one.dataset}: {results['verdict']}",
        "",
        results["question"],
        "",
        f"Claim: {results['claim']}",
        "",
        f"`{one.command}`",
        "",
        f"Code {one.code}, {size}, {results['seeds']} seeds, {one.device}, {results['seconds']:.0f} s{resumed}, "
        f"{results['peak_memory_gb']:.1f} GB at most.",
        "",
        results["answer"],
        "",
        *([f"- the run: `{one.models}`"] if one.models else []),
        *(f"- {note}" for note in results["notes"]),
        "",
        "| contrast | estimate | 95 % interval | p | there is | it matters | power | decides | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_contrast_row, results["contrasts"]),
        "",
        "```text",
        results["table"].rstrip(),
        "```",
        "",
        f"![figure]({one.page}.png)",
    ]
    return "\n".join(lines) + "\n"


def _contrast_row(c: dict) -> str:
    return (
        f"| {c['name']} | {c['estimate']:+.4f} | [{c['low']:+.4f}, {c['high']:+.4f}] | {c['p_corrected']:.4f} "
        f"| {c['exists']} | {c['matters']} | {c['power']:.2f} | {'yes' if c['decides'] else ''} | {c['verdict']} |"
    )
