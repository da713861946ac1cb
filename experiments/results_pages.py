"""RESULTS.md, a page per experiment and dataset, and contrasts.csv: what `experiments.reproduce` writes."""

import csv
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfusion.files import write_atomically, write_text
from mmfusion.runs.folder import PACKAGES, installed_version
from mmfusion.runs.outputs import plain_cell

COLUMNS = ("name", "claim", "estimate", "low", "high", "p", "p_holm", "effect", "seeds", "examples", "seeds_needed")
SHOWN_FIRST = ("mustard", "cmu_mosi", "pom", "mmmo", "hateful_memes", "digits", "clip", "cells", "demo", "synthetic")
"""the dataset whose figure stands for a question in RESULTS.md: the first that was run"""
RULES = """\
Differences are paired: same seeds, same test examples. Intervals are 95 %: of scores from a bootstrap that resamples
seeds and test examples (whole groups, such as videos, where there are any) independently; of one number per seed
Student's t. p-values are corrected after Holm in each experiment. *Supported*: corrected p < .05, the sign as claimed,
and the interval reaches the smallest effect of interest. *Not supported*: the interval excludes that effect, or the
opposite sign is significant. *Too few data*: neither, or what the rule needs is not there. *Not identified*: the
quantity has no single value. Scores are accuracy, or -MAE in standard deviations of the target; the smallest effect of
interest is .01 of either, .05 for training losses and gradients, .1 for correlations of components, .3 for the rank
correlation of the balance, .01 for test losses. Which contrasts decide stands in `contrasts.csv`; where all must hold,
the weakest decides. The choice of the training data is not resampled."""


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
    """Write RESULTS.md (`out`), and into `folder` the pages, the figures and contrasts.csv."""
    for one in finished:
        source = one.folder / "figure.png"
        write_atomically(folder / f"{one.page}.png", lambda path, source=source: shutil.copyfile(source, path))
        write_text(folder / f"{one.page}.md", page(one))
    write_text(folder / "contrasts.csv", contrasts_csv(finished))
    text = summary(finished, os.path.relpath(folder, out.parent))
    write_text(out, text)
    print(f"\n{out}: {len(finished)} experiments, {text.count(chr(10))} lines; tables and figures in {folder}/")


# ---- RESULTS.md --------------------------------------------------------------------------------------------------


def summary(finished: Sequence[Finished], pages: str) -> str:
    """The whole of RESULTS.md; `pages` is the folder of the pages, relative to it."""
    codes = list(dict.fromkeys(one.code for one in finished))
    mixed = "" if len(codes) == 1 else " (MIXED: these experiments are not of one state of the code)"
    seconds = sum(one.results["seconds"] for one in finished)
    versions = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES[:3])
    some = finished[0].results
    lines = [
        f"# Results of code {', '.join(codes)}{mixed}",
        "",
        f"Written by `python -m experiments.reproduce`; not edited by hand. {finished[0].device}, {some['threads']} "
        f"threads, {versions}; {seconds / 60:.0f} minutes in all. The digest is of the code without docs and results "
        f"(`mmfusion.runs.folder.code_digest`). Every contrast: [`contrasts.csv`]({pages}/contrasts.csv).",
        "",
        RULES,
        "",
        "## Verdicts",
        "",
        *verdict_matrix(finished),
    ]
    for experiment in dict.fromkeys(one.experiment for one in finished):
        lines += question([one for one in finished if one.experiment == experiment], pages)
    return "\n".join(lines).rstrip() + "\n"


def verdict_matrix(finished: Sequence[Finished]) -> list[str]:
    """Claims by datasets: the verdicts alone."""
    datasets = list(dict.fromkeys(one.dataset for one in finished))
    lines = [f"| question | {' | '.join(datasets)} |", "|---" * (len(datasets) + 1) + "|"]
    for experiment in dict.fromkeys(one.experiment for one in finished):
        here = {one.dataset: one.results["verdict"] for one in finished if one.experiment == experiment}
        lines.append(f"| {experiment} | {' | '.join(here.get(name, 'not run') for name in datasets)} |")
    return lines


def question(finished: Sequence[Finished], pages: str) -> list[str]:
    """Claim, one command, where one figure is, and a sentence of numbers per dataset."""
    first = min(finished, key=lambda one: SHOWN_FIRST.index(one.dataset))
    return [
        "",
        f"## {first.experiment}",
        "",
        f"*{first.results['claim']}* `{first.command}`, [figure]({pages}/{first.page}.png)",
        "",
        *(f"- [{one.dataset}]({pages}/{one.page}.md), {one.results['verdict']}: {_one_line(one)}" for one in finished),
    ]


def _one_line(one: Finished) -> str:
    return " ".join(one.results["answer"].split())


# ---- pages -------------------------------------------------------------------------------------------------------


def page(one: Finished) -> str:
    """Everything that one experiment found on one dataset."""
    results = one.results
    tested, folds = results["examples"]["test"], results["folds"]
    size = f"{tested} test examples" if folds == 1 else f"{folds} folds of about {tested} test examples"
    resumed = " since it was resumed" if results["resumed"] else ""
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
        "| contrast (positive: as claimed) | estimate | 95 % interval | p (Holm) | decides | verdict |",
        "|---|---|---|---|---|---|",
        *map(_contrast_row, results["contrasts"]),
        "",
        "```text",
        results["table"].rstrip(),
        "```",
        "",
        f"![figure]({one.page}.png)",
    ]
    return "\n".join(lines) + "\n"


def _contrast_row(contrast: dict) -> str:
    return (
        f"| {contrast['name']} | {contrast['estimate']:+.4f} | [{contrast['low']:+.4f}, {contrast['high']:+.4f}] "
        f"| {contrast['p_holm']:.4f} | {'yes' if contrast['decides'] else ''} | {contrast['verdict']} |"
    )


def contrasts_csv(finished: Sequence[Finished]) -> str:
    """All contrasts of all experiments, one row each."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["experiment", "dataset", "code", "decides", "verdict", *COLUMNS])
    for one in finished:
        for contrast in one.results["contrasts"]:
            values = [contrast[name] for name in COLUMNS]
            cells = [plain_cell(value) if isinstance(value, str) else value for value in values]
            table.writerow(
                [one.experiment, one.dataset, one.code, int(contrast["decides"]), contrast["verdict"], *cells]
            )
    return text.getvalue()
