"""Every experiment on every data set that is there, and what came out of it as RESULTS.md.

    python -m experiments.reproduce --data-root FOLDER --text-encoder MODEL_FOLDER
    python -m experiments.reproduce                        the embedded demo alone

Each experiment is a process of its own, run by the very command that RESULTS.md shows; one that is complete is not run
again with --resume.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.experiment import Options
from experiments.experiment import options_of as experiment_options
from mmfusion.cli import parse, run_command
from mmfusion.errors import InputError
from mmfusion.files import write_atomically, write_text
from mmfusion.runs.folder import MARK_OF_COMPLETION, PACKAGES, RUNS, check_settings, installed_version, settings_of
from mmfusion.training.grid import Recipe

EXPERIMENTS = (
    "baselines",
    "rank_ablation",
    "jwae_ablation",
    "modality_dropout",
    "modality_balance",
    "rank_semantics",
    "robustness",
    "rank_robustness",
    "uncertainty",
)
# these measure a trained run: one of experiments.baselines with dev held out, trained for them
OF_A_RUN = ("robustness", "uncertainty")
MODELS = "models"
# whose pictures or texts can be corrupted and encoded anew
WITH_INPUTS = ("demo", "mustard", "hateful_memes")
# the first file that fits is taken
FILES = {
    "cmu_mosi": ("cmu_mosi*.npz", "mosi*.npz", "*mosi*.pkl", "aligned_50.pkl", "unaligned_50.pkl"),
    "mustard": ("sarcasm_data.json", "*sarcasm_data.json"),
    "pom": ("pom*.npz",),
    "hateful_memes": ("train.jsonl", "*/train.jsonl"),
}


# where a data set departs from the common recipe, chosen without its test split (benchmarks/study_recipe.py)
DEPARTURES = {"pom": ("--hidden-dim", "128", "--weight-decay", "3")}


@dataclass(frozen=True)
class Config:
    """Run all experiments on what is found below --data-root and on the demo, and write RESULTS.md."""

    data_root: Path | None = None
    """folder with the data sets' files; without it the demo alone is run"""
    text_encoder: str | None = None
    """for MUStARD and memes: a Hugging Face name (default bert-base-uncased) or a local model folder"""
    only: tuple[str, ...] = ()
    """experiments or data sets to run; default: all"""
    seeds: int = 10
    """seeds of every experiment"""
    epochs: int = Recipe.epochs
    """passes over the training part, of every experiment"""
    compile: bool = False
    """compile the training steps"""
    out: Path = Path("RESULTS.md")
    """file to write"""
    figures: Path = Path("docs/results")
    """folder for the figures that the file shows"""
    cache_dir: Path = Path("cache")
    """where encoded texts and images (and the demo) are kept between runs"""
    resume: bool = False
    """go on where a killed run stopped"""


@dataclass(frozen=True)
class Job:
    """One experiment on one data set."""

    experiment: str
    dataset: str
    data: Path | None

    @property
    def folder(self) -> Path:
        """Where it leaves its results."""
        return RUNS / f"reproduce-{self.experiment}-{self.dataset}"

    @property
    def models(self) -> "Job":
        """The training whose models it measures."""
        return Job(MODELS, self.dataset, self.data)

    @property
    def module(self) -> str:
        """The module that is run."""
        return "experiments.baselines" if self.experiment == MODELS else f"experiments.{self.experiment}"

    @property
    def options(self) -> type:
        """The dataclass of its flags."""
        module = importlib.import_module(self.module)
        return module.Options if self.experiment in OF_A_RUN else experiment_options(module.EXPERIMENT)


def main(config: Config) -> None:
    """Run, then write. Raises InputError, also where an experiment has stopped with one."""
    jobs = list(find_jobs(config))
    check_outputs(config)
    if not config.resume and (begun := next((job.folder for job in jobs if job.folder.exists()), None)):
        raise InputError(f"{begun}: exists; give --resume to go on with it, or move it away to begin anew")
    for number, job in enumerate(jobs, 1):
        if job.folder.exists() and not (job.folder / "run.json").exists():
            shutil.rmtree(job.folder)  # killed before it had begun
        if (job.folder / MARK_OF_COMPLETION).exists():
            # a finished run of other settings must not stand under this command
            check_finished(job, config)
            continue
        print(f"\n[{number}/{len(jobs)}] {job.experiment} on {job.dataset}", flush=True)
        arguments = flags(job, config) + (["--resume"] if (job.folder / "run.json").exists() else [])
        status = subprocess.run([sys.executable, "-m", job.module, *arguments]).returncode
        if status:
            raise InputError(
                f"{job.module} on {job.dataset} stopped with exit code {status}; "
                "put right what it says above, then go on with --resume"
            )
    jobs = [job for job in jobs if job.experiment != MODELS]
    results = {job: json.loads((job.folder / MARK_OF_COMPLETION).read_text(encoding="utf-8")) for job in jobs}
    for job in jobs:
        source = job.folder / "figure.png"
        target = config.figures / f"{job.experiment}-{job.dataset}.png"
        write_atomically(target, lambda path, source=source: shutil.copyfile(source, path))
    write_text(config.out, document(results, config))
    print(f"\n{config.out}: {len(results)} experiments; figures in {config.figures}/")


def check_outputs(config: Config) -> None:
    """Raise InputError where --out or --figures cannot be written, before anything is run."""
    if config.out.is_dir():
        raise InputError(f"--out {config.out}: is a folder; give a file")
    if config.figures.exists() and not config.figures.is_dir():
        raise InputError(f"--figures {config.figures}: is a file; give a folder")


def find_jobs(config: Config) -> Iterator[Job]:
    """Every experiment on the demo and on every data set found, data set by data set."""
    known = {*EXPERIMENTS, *FILES, "demo"}
    if unknown := set(config.only) - known:
        raise InputError(f"--only {' '.join(sorted(unknown))}: choose from {' '.join(sorted(known))}")
    found: dict[str, Path | None] = {"demo": None}
    if config.data_root is not None:
        if not config.data_root.is_dir():
            raise InputError(f"--data-root {config.data_root}: no such folder")
        for dataset, patterns in FILES.items():
            paths = [path for pattern in patterns for path in sorted(config.data_root.glob(pattern))]
            if paths:
                found[dataset] = paths[0]
        if len(found) == 1:
            names = ", ".join(patterns[0] for patterns in FILES.values())
            raise InputError(f"--data-root {config.data_root}: holds no data set; expected one of {names}")
    datasets = [name for name in found if not set(config.only) & {*FILES, "demo"} or name in config.only]
    missing = set(config.only) & set(FILES) - set(found)
    if missing:
        raise InputError(f"--only {' '.join(sorted(missing))}: not found; name the folder of its file with --data-root")
    experiments = [e for e in EXPERIMENTS if not set(config.only) & set(EXPERIMENTS) or e in config.only]
    for dataset in datasets:
        jobs = [Job(experiment, dataset, found[dataset]) for experiment in experiments]
        measured = [job for job in jobs if job.experiment in OF_A_RUN]
        yield from ([measured[0].models] if measured else []) + jobs


def flags(job: Job, config: Config) -> list[str]:
    """Flags of the experiment's command."""
    if job.experiment in OF_A_RUN:
        inputs = ["input"] if job.dataset in WITH_INPUTS else []
        groups = ["--groups", *inputs, "features", "latents", "missing"]
        return [str(job.models.folder), *groups, "--name", job.folder.name]
    flags = ["--dataset", job.dataset]
    if job.data is not None:
        flags += ["--data", str(job.data)]
    if job.dataset in ("mustard", "hateful_memes") and config.text_encoder is not None:
        flags += ["--text-encoder", config.text_encoder]
    flags += ["--seeds", str(config.seeds), "--epochs", str(config.epochs), *DEPARTURES.get(job.dataset, ())]
    flags += ["--compile"] if config.compile else []
    flags += ["--hold-out-dev"] if job.experiment == MODELS else []
    return [*flags, "--cache-dir", str(config.cache_dir), "--name", job.folder.name]


def check_finished(job: Job, config: Config) -> None:
    """Raise InputError where a finished run was made with other settings than these (compiled or not is all one)."""
    options = parse(job.options, flags(job, config))
    if job.experiment not in OF_A_RUN:
        options = replace(options, compile=_settings(job)["compile"])
    check_settings(job.folder, settings_of(options))


def _settings(job: Job) -> dict:
    """The settings that a run was made with."""
    return json.loads((job.folder / "run.json").read_text(encoding="utf-8"))["settings"]


# ---- RESULTS.md --------------------------------------------------------------------------------------------------


def document(results: dict[Job, dict], config: Config) -> str:
    """The whole file."""
    some = next(iter(results.values()))
    versions = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
    total = sum(result["seconds"] for result in results.values())
    own = "python -m experiments.reproduce"
    if config.data_root is not None:
        own += " --data-root FOLDER"
    if any(job.dataset in ("mustard", "hateful_memes") for job in results):
        own += f" --text-encoder {'MODEL_FOLDER' if Path(config.text_encoder).exists() else config.text_encoder}"
    lines = [
        "# Results",
        "",
        f"Written by `{own}`; not edited by hand. {some['device']}, {some['threads']} threads of {os.cpu_count()} "
        f"cores, {versions}; {total / 60:.0f} minutes in all.",
        "",
        RULES,
        "",
        "## Verdicts",
        "",
        *overview(results),
        "",
        *verdict_table(results),
        "",
    ]
    for experiment in EXPERIMENTS:
        here = {job: result for job, result in results.items() if job.experiment == experiment}
        if here:
            lines += section(experiment, here, config)
    return "\n".join(lines).rstrip() + "\n"


RULES = """\
How a verdict comes about. Differences are paired: same seeds, same test examples. Intervals of scores are 95 %, from a
bootstrap that resamples seeds and test examples (of CMU-MOSI: whole videos) independently; those of one number per seed
(training losses, correlations, stabilities) are Student's t over seeds, on these examples. p-values are corrected after
Holm inside an experiment. *Supported*: corrected p < .05, the sign as claimed, and the interval reaches the smallest
effect of interest. *Not supported*: the interval excludes that effect, or the opposite sign is significant. *Too few
data*: neither, or what the rule needs is not there. *Not identified*: the quantity has no single value. Which contrasts
decide, and whether all or any of them must hold, stands in each experiment's docstring; where all must, the weakest
decides. Scores are accuracy, or -MAE in standard deviations of the target; the smallest effect of interest is .01 of
either, .05 (5 %) for training losses and gradients, .1 for correlations of components, .3 for the rank correlation of
the balance, .01 nats (or squared deviations) for test losses.
The choice of the training data is not resampled. The common recipe was chosen for jWAE-LMF at rank 4, without the test
splits; POM departs from it, as its commands show."""


def overview(results: dict[Job, dict]) -> list[str]:
    """Claims by datasets: the verdicts alone."""
    datasets = list(dict.fromkeys(job.dataset for job in results))
    lines = [f"| claim | {' | '.join(datasets)} |", "|---" * (len(datasets) + 1) + "|"]
    for experiment in dict.fromkeys(job.experiment for job in results):
        here = {job.dataset: result for job, result in results.items() if job.experiment == experiment}
        claim = next(iter(here.values()))["claim"]
        verdicts = (here[name]["verdict"] if name in here else "not run" for name in datasets)
        lines.append(f"| {claim} (`{experiment}`) | {' | '.join(verdicts)} |")
    return lines


def verdict_table(results: dict[Job, dict]) -> list[str]:
    """One line per claim and dataset: a contrast that has its verdict, and the command."""
    lines = [
        "| dataset | a contrast that decides | estimate [95 % interval] | verdict | command | s |",
        "|---" * 6 + "|",
    ]
    for job, result in results.items():
        c = decisive(result)
        lines.append(
            f"| {job.dataset} | {c['name']} | {c['estimate']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}] "
            f"| {result['verdict']} | `{command(job)}` | {result['seconds']:.0f} |"
        )
    return lines


def command(job: Job) -> str:
    """The command that made a run: what its own record says, without folders and defaults."""
    settings = _settings(job)
    if job.experiment in OF_A_RUN:
        return f"python -m {job.module} {Path(settings['run']).as_posix()} --groups {' '.join(settings['groups'])}"
    shown = [f"python -m {job.module} --dataset {job.dataset}"]
    if settings["data"]:
        shown.append(f"--data {Path(settings['data']).name}")
    for name in ("text_encoder", "seeds", "epochs", "hidden_dim", "weight_decay", "compile"):
        value = settings[name]
        if value != getattr(Options, name):
            is_folder = name == "text_encoder" and Path(value).exists()
            text = "MODEL_FOLDER" if is_folder else str(value).removesuffix(".0")
            shown.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    shown += [f"--hold-out-dev --name {job.folder.name}"] if job.experiment == MODELS else []
    return " ".join(shown)


def revision(job: Job) -> str:
    """Commit of the code that made a run, where it was a checkout."""
    commit = json.loads((job.folder / "run.json").read_text(encoding="utf-8"))["git_revision"]
    return f", commit {commit[:7]}{'+' if commit.endswith('+') else ''}" if commit else ""


def decisive(result: dict) -> dict:
    """Of the contrasts that the verdict rests on, the first with that verdict, else the first."""
    deciding = [c for c in result["contrasts"] if c["name"] in result["deciding"]] or result["contrasts"]
    return next((c for c in deciding if c["verdict"] == result["verdict"]), deciding[0])


def section(experiment: str, results: dict[Job, dict], config: Config) -> list[str]:
    """Contrasts, tables and figures of one experiment on all datasets."""
    some = next(iter(results.values()))
    lines = [f"## {experiment}", "", some["question"], "", f"Claim: {some['claim']}", ""]
    for job, result in results.items():
        tested, folds = result["examples"]["test"], result["folds"]
        size = f"{tested} test examples" if folds == 1 else f"{folds} folds of about {tested} test examples"
        lines += [
            f"### {job.dataset}: {result['verdict']}",
            "",
            f"`{command(job)}` ({size}, {result['seeds']} seeds, {result['seconds']:.0f} s"
            f"{' since it was resumed' if result['resumed'] else ''}, {result['peak_memory_gb']:.1f} GB at most"
            f"{revision(job)})",
            "",
            result["answer"],
            "",
            *([f"- the run: `{command(job.models)}`"] if experiment in OF_A_RUN else []),
            *[f"- {note}" for note in result["notes"]],
            "",
            "| contrast (positive: as claimed) | estimate | 95 % interval | p (Holm) | seeds needed | verdict |",
            "|---|---|---|---|---|---|",
            *[contrast_line(c) for c in result["contrasts"]],
            "",
            "```text",
            result["table"].rstrip(),
            "```",
            "",
            f"![{experiment} on {job.dataset}]({config.figures.as_posix()}/{experiment}-{job.dataset}.png)",
            "",
        ]
    return lines


def contrast_line(c: dict) -> str:
    """One row of the contrasts' table."""
    needed = "no number" if c["seeds_needed"] is None else c["seeds_needed"]
    return (
        f"| {c['name']} | {c['estimate']:+.4f} | [{c['low']:+.4f}, {c['high']:+.4f}] | {c['p_holm']:.4f} | {needed} "
        f"| {c['verdict']} (effect of interest {c['effect']:g}) |"
    )


def run(arguments: list[str]) -> int:
    """`python -m experiments.reproduce FLAGS`."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
