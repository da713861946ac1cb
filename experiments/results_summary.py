"""RESULTS.md from contrasts.csv alone: what is said in short, verdicts with their power, what decided, and the mean."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmfusion.errors import InputError
from mmfusion.metrics.pooled import pooled
from mmfusion.metrics.verdicts import Verdict

Row = Mapping[str, str]
RUN_COLUMNS = (
    "experiment",
    "dataset",
    "verdict",
    "claim",
    "power",
    "false_support",
    "examples",
    "size_needed",
    "command",
    "code",
    "machine",
    "seconds",
    "memory_gb",
)
CONTRAST_COLUMNS = (
    "contrast",
    "means",
    "decides",
    "route",
    "estimate",
    "standard_error",
    "low",
    "high",
    "low_90",
    "high_90",
    "p",
    "p_corrected",
    "effect",
    "sign_only",
    "exists",
    "matters",
    "power_alone",
    "contrast_verdict",
)
FIGURE = "forest.png"
PLANTINGS = "plantings.csv"
POWER = 0.8
VERDICTS: tuple[Verdict, ...] = ("supported", "not supported", "cannot tell", "not identified")
RULES = """\
**How to read it.** Every claim is tested on every data set by contrasts: paired differences, positive as claimed, of
models that share examples, folds and starting values. *Supported*: the 95 % interval lies above 0, and the effect is
not shown to be too small to matter. *Not supported*: the effect is shown to be smaller than would matter (the 90 %
interval ends below the smallest effect of interest), or to have the opposite sign. *Cannot tell*: neither; the table
says how probable "supported" was if the claim were true by just the effect of interest (its power), and how many
examples would make that .8. *Not identified*: the quantity has no single value, or what the claim is about was not
there. Where a claim needs several contrasts all must hold, uncorrected (intersection-union); where either of two
outcomes will do, they are corrected after Holm. Intervals are Nadeau and Bengio's for repeated cross-validation, over
other training sets of that size; of a fixed test set a bootstrap over seeds and examples, whole groups together.
Primary outcomes: AUROC and log loss, of a regression MAE (in standard deviations of the target) and correlation;
smallest effects of interest .01, of a correlation .02."""


def read_contrasts(path: Path) -> list[dict[str, str]]:
    """The rows of contrasts.csv. Raises InputError for another file."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != (*RUN_COLUMNS, *CONTRAST_COLUMNS):
            raise InputError(f"{path}: holds other columns than this code writes; run experiments.reproduce anew")
        return list(reader)


def summary(rows: Sequence[Row], pages: str) -> str:
    """The whole of RESULTS.md; `pages` is the folder of the pages, relative to it."""
    codes = list(dict.fromkeys(row["code"] for row in rows))
    mixed = "" if len(codes) == 1 else " (MIXED: these experiments are not of one state of the code)"
    runs = _runs(rows)
    minutes = sum(float(own[0]["seconds"]) for own in runs.values()) / 60
    memory = max(float(own[0]["memory_gb"]) for own in runs.values())
    lines = [
        f"# Results of code {', '.join(codes)}{mixed}",
        "",
        f"Written by `python -m experiments.reproduce` from [`contrasts.csv`]({pages}/contrasts.csv); not edited by "
        f"hand. {rows[0]['machine']}; {minutes:.0f} minutes of work, shared out to processes of at most "
        f"{memory:.1f} GB. The digest is of the code without docs and results (`mmfusion.runs.folder.code_digest`).",
        "",
        "## In short",
        "",
        *(f"- {sentence}" for sentence in sentences(rows)),
        "",
        f"![every claim on every data set]({pages}/{FIGURE})",
        "",
        RULES,
        "",
        "## Verdicts",
        "",
        *verdict_table(rows),
        "",
        "## The contrast that decided",
        "",
        "Of each run the weakest contrast of the best route; last, examples for a power of .8, and how many there are.",
        "",
        *deciding_table(rows, pages),
    ]
    if together := pooled_table(rows):
        lines += ["", "## Over the data sets", "", *together]
    return "\n".join(lines).rstrip() + "\n"


def sentences(rows: Sequence[Row]) -> list[str]:
    """One for each claim, for a reader who wants no number but how often."""
    found = []
    for experiment, own in _by_experiment(rows).items():
        verdicts = [runs[0]["verdict"] for runs in _runs(own).values()]
        counts = {verdict: verdicts.count(verdict) for verdict in ("supported", "not supported", "cannot tell")}
        counts["no verdict"] = len(verdicts) - sum(counts.values())
        said = ", ".join(f"{verdict} on {count}" for verdict, count in counts.items() if count)
        noun = "data set" if len(verdicts) == 1 else "data sets"
        found.append(
            f"*{own[0]['claim'].rstrip('.')}* ({experiment}): {said}, of {len(verdicts)} {noun}. `{own[0]['command']}`"
        )
    return found


def with_answers(readme: str, rows: Sequence[Row]) -> str:
    """The same README, in whose table of questions every experiment has its counts of verdicts (`VERDICTS`)."""
    found = _by_experiment(rows)

    def answered(line: re.Match) -> str:
        verdicts = [runs[0]["verdict"] for runs in _runs(found.get(line["experiment"], [])).values()]
        counts = "/".join(str(verdicts.count(one)) for one in VERDICTS)
        return f"{line['begin']}{counts if verdicts else 'not run'} |"

    row = r"^(?P<begin>\| .* \| `experiments\.(?P<experiment>\w+)`[^|]* \| )[^|]* \|$"
    return re.sub(row, answered, readme, flags=re.MULTILINE)


def with_tables(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The same text with these lines between `<!-- begin NAME -->` and `<!-- end NAME -->`, where it has those."""
    for name, lines in tables.items():
        block = rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)"
        text = re.sub(block, lambda _, lines=lines: "\n".join(["", *lines, "", ""]), text, flags=re.DOTALL)
    return text


def planted_table(path: Path) -> list[str]:
    """One line for each kept check by planted effects (`experiments.power --keep`); none without that file."""
    if not path.exists():
        return ["none kept"]
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {"experiment", "flags", "replicates", "supported", "low", "high", "simulated", "none"}
    if not rows or names - rows[0].keys():
        raise InputError(f"{path}: holds no table of plantings; move it away")
    lines = ["| experiment | planted | supported | simulated | simulated, no effect |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{row['supported']} of {row['replicates']} [{float(row['low']):.2f}, {float(row['high']):.2f}]"
        cells = [
            row["experiment"],
            f"`{row['flags']}`",
            share,
            *(f"{float(row[x]):.2f}" for x in ("simulated", "none")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict_table(rows: Sequence[Row]) -> list[str]:
    """Claims by datasets: the verdict, and in brackets its power at the effect of interest."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    runs = _runs(rows)
    lines = [f"| question | {' | '.join(datasets)} |", "|---" * (len(datasets) + 1) + "|"]
    for experiment in _by_experiment(rows):
        cells = []
        for dataset in datasets:
            own = runs.get((experiment, dataset))
            cells.append(f"{own[0]['verdict']} ({power_of(own)})" if own else "not run")
        lines.append(f"| {experiment} | {' | '.join(cells)} |")
    wrong = [float(own[0]["false_support"]) for own in runs.values() if own[0]["false_support"]]
    if wrong:
        largest = f"at most {max(wrong):.3f}"
        said = 'Simulated from the spread over folds; "supported" by chance: '
        lines += ["", f"In brackets: power. {said}{largest}. With <: without folds, of the weakest contrast alone."]
    return lines


def power_table(rows: Sequence[Row]) -> list[str]:
    """One line per experiment: where its verdict had most power, and how many contrasts that decide had .8."""
    lines = ["| experiment | power of the verdict, at most | contrasts with .8 or more |", "|---|---|---|"]
    runs = _runs(rows)
    for experiment, own in _by_experiment(rows).items():
        powers = {dataset: power_of(of) for (name, dataset), of in runs.items() if name == experiment}
        best = max(powers, key=lambda dataset: float(powers[dataset].removeprefix("< ")))
        alone = [float(row["power_alone"]) for row in own if row["decides"] == "1"]
        enough = sum(power >= POWER for power in alone)
        lines.append(f"| {experiment} | {powers[best]} ({best}) | {enough} of {len(alone)} |")
    return lines


def power_of(run: Sequence[Row]) -> str:
    """Of finding the effect of interest: simulated where there are folds, else what the weakest contrast allows."""
    if run[0]["power"]:
        return f"{float(run[0]['power']):.2f}"
    deciding = [row for row in run if row["decides"] == "1"] or list(run)
    routes: dict[str, list[float]] = {}
    for row in deciding:
        routes.setdefault(row["route"], []).append(float(row["power_alone"]))
    return f"< {max(min(of_route) for of_route in routes.values()):.2f}"


def deciding_table(rows: Sequence[Row], pages: str) -> list[str]:
    """One line per run: the contrast on which its verdict hangs, and how many examples would tell."""
    lines = ["| question | data set | contrast | estimate [95 % interval] | would tell |", "|---|---|---|---|---|"]
    for (experiment, dataset), own in _runs(rows).items():
        row = deciding_row(own)
        needed = own[0]["size_needed"] if own[0]["verdict"] == "cannot tell" else ""
        size = f"{_round(int(needed))} for {int(own[0]['examples']):,}" if needed else ""
        link = f"[{dataset}]({pages}/{experiment}-{dataset}.md)"
        lines.append(f"| {experiment} | {link} | {row['contrast']} | {_interval(row)} | {size} |")
    return lines


def deciding_row(rows: Sequence[Row]) -> Row:
    """Of one run: the contrast on which its verdict hangs, the weakest of the best route, by t."""
    deciding = [row for row in rows if row["decides"] == "1"] or list(rows)
    routes = dict.fromkeys(row["route"] for row in deciding)
    weakest = [min((row for row in deciding if row["route"] == route), key=_strength) for route in routes]
    return max(weakest, key=_strength)


def pooled_table(rows: Sequence[Row]) -> list[str]:
    """One estimate over data sets for each contrast that decides on three of them or more, in effects of interest."""
    lines = []
    for experiment, of_experiment in _by_experiment(rows).items():
        names = [row["contrast"] for row in of_experiment if row["decides"] == "1"]
        for name in [one for one in dict.fromkeys(names) if names.count(one) > 2][:1]:
            own = [row for row in of_experiment if row["contrast"] == name and float(row["standard_error"]) > 0]
            if len(own) < 3:
                continue
            scale = np.array([float(row["effect"]) for row in own])
            estimates, errors = (np.array([float(row[key]) for row in own]) for key in ("estimate", "standard_error"))
            one = pooled(estimates / scale, errors / scale)
            lines.append(
                f"| {experiment} | {name} | {len(own)} | {one.estimate:+.2f} [{one.low:+.2f}, {one.high:+.2f}] "
                f"| [{one.prediction_low:+.2f}, {one.prediction_high:+.2f}] |"
            )
    head = "| question | contrast | data sets | mean, in effects of interest [95 % interval] | another data set |"
    note = "Random effects over data sets (restricted likelihood, Hartung and Knapp): one estimate in place of many."
    return [note, "", head, "|---|---|---|---|---|", *lines] if lines else []


def _strength(row: Row) -> float:
    error = float(row["standard_error"])
    return float(row["estimate"]) / error if error > 0 else np.sign(float(row["estimate"])) * np.inf


def _interval(row: Row) -> str:
    return f"{float(row['estimate']):+.3f} [{float(row['low']):+.3f}, {float(row['high']):+.3f}]"


def _round(number: int) -> str:
    """Two digits: nobody plans by the third."""
    return f"{float(f'{number:.1e}'):,.0f}"


def _by_experiment(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["experiment"], []).append(row)
    return found


def _runs(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["experiment"], row["dataset"]), []).append(row)
    return found
