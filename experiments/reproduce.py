"""Run every experiment on every dataset that is found, and write RESULTS.md.

    python -m experiments.reproduce --data-root FOLDER --text-encoder MODEL_FOLDER
    python -m experiments.reproduce                        the embedded demo alone

A data set is cut anew into folds, twice, over all of its examples: three times the test examples of its own split, and
intervals that speak of other training sets. Each experiment is a process of its own, run by the very command that
RESULTS.md shows, several at once; one that is complete is not run again with --resume. What it prints is log.txt in its
folder.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.corpora import CORPORA, LABELLED, OF_A_RUN, Corpus
from experiments.experiment import Options
from experiments.experiment import options_of as experiment_options
from experiments.processes import Command, run_commands
from experiments.results_pages import Finished, write_pages
from mmfusion.cli import parse, run_command
from mmfusion.errors import InputError
from mmfusion.runs.folder import MARK_OF_COMPLETION, RUNS, code_digest
from mmfusion.runs.settings import check_settings, read_run, settings_of

EXPERIMENTS = (*LABELLED, "temporal", "wma", "alignment", "modality_count", "synthetic")
# for those that measure it, it keeps dev apart and has ensembles
MODELS = "baselines"
MEMBERS = 3  # of an ensemble, in each fold
# these draw their own data, once, whatever data sets are found
OF_ITS_OWN = ("synthetic",)
# these take folds of their own, or none: their differences are paired over seeds and test examples too
OWN_SEEDS = {"alignment": 3, "modality_count": 5, "synthetic": 5, "temporal": 3, "wma": 3}
FIXED_SEEDS = 5  # on a data set with a test part of its own


@dataclass(frozen=True)
class Config:
    """Run all experiments on what is found below --data-root and on the demo, and write RESULTS.md."""

    data_root: Path | None = None
    """folder with the data sets' files; without it the demo alone is run"""
    text_encoder: str | None = None
    """for MUStARD, memes, and the transcripts of CMU-MOSI, which is left out without (its own vectors were fitted on
    labels): a Hugging Face name (default bert-base-uncased) or a local model folder"""
    image_encoder: str | None = None
    """for memes: as in main_hateful_memes.py, a file of ResNet-50's weights (default: torchvision's)"""
    only: tuple[str, ...] = ()
    """experiments or data sets to run; default: all"""
    folds: int = 5
    """of the cross-validation, cut over all examples of a data set without a test part that others report on"""
    repeats: int = 2
    """of that"""
    seeds: int = 1
    """in every fold (of the baselines 3 times as many, for ensembles); of a data set that is not cut 5 times as many"""
    epochs: int | None = Options.epochs
    """passes over the training part, of every experiment; default: the recipe's"""
    compile: bool = False
    """compile the training steps"""
    out: Path = Path("RESULTS.md")
    """file to write"""
    pages: Path = Path("docs/results")
    """folder for what the file leads to: a page and a figure per experiment and dataset, and contrasts.csv"""
    mix_code: bool = False
    """with --resume: take finished experiments of other code too; the first line of the file then says so"""
    at_once: int = 2
    """experiments that run side by side, each with its share of the cores: small models gain nothing from more"""
    cache_dir: Path = Path("cache")
    """where encoded texts and images (and the demo) are kept between runs"""
    skip_inputs: bool = False
    """leave corrupted pictures and texts out of robustness and uncertainty, of a data set with its own test part"""
    resume: bool = False
    """go on where a killed run stopped"""


@dataclass(frozen=True)
class Job:
    """One experiment on one data set."""

    experiment: str
    dataset: str
    data: Path | None

    def __str__(self) -> str:
        return f"{self.experiment} on {self.dataset}"

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
        return f"experiments.{self.experiment}"

    @property
    def options(self) -> type:
        """The dataclass of its flags."""
        module = importlib.import_module(self.module)
        return module.Options if self.experiment in OF_A_RUN else experiment_options(module.EXPERIMENT)


def main(config: Config) -> None:
    """Run, then write. Raises InputError, also where an experiment has stopped with one."""
    jobs = list(find_jobs(config))
    if not jobs:
        raise InputError(f"--only {' '.join(config.only)}: asks of no data set what it can answer; see docs/study.md")
    check_outputs(config)
    if not config.resume and (begun := next((job.folder for job in jobs if job.folder.exists()), None)):
        raise InputError(f"{begun}: exists; give --resume to go on with it, or move it away to begin anew")
    complete = [job for job in jobs if (job.folder / MARK_OF_COMPLETION).exists()]
    for job in complete:  # a finished run of other settings must not stand under this command
        check_finished(job, config)
    left = [job for job in jobs if job not in complete]
    # a data set's first fills the cache, and the others may measure what it trained
    first = {job.dataset: job for job in reversed(jobs)}
    # what draws its own data takes longest: begun last, it would keep one core while the others wait
    left.sort(key=lambda job: job.experiment not in OF_ITS_OWN)
    run_commands(
        [Command(str(job), job.folder, job.module, flags(job, config), str(first[job.dataset])) for job in left],
        config.at_once,
    )
    write_pages([finished(job) for job in jobs], config.out, config.pages)


def finished(job: Job) -> Finished:
    """What a finished experiment left."""
    run = read_run(job.folder)
    models = command(job.models) if job.experiment in OF_A_RUN else None
    code = json.loads((job.folder / "run.json").read_text(encoding="utf-8")).get("code", "unknown")
    results = json.loads((job.folder / MARK_OF_COMPLETION).read_text(encoding="utf-8"))
    return Finished(job.experiment, job.dataset, job.folder, results, command(job), models, code, run["device"])


def check_outputs(config: Config) -> None:
    """Raise InputError where --out or --pages cannot be written or --at-once is no number, before anything is run."""
    if not 1 <= config.at_once <= 1000:
        raise InputError(f"--at-once {config.at_once}: give a number from 1 to 1000")
    if config.out.is_dir():
        raise InputError(f"--out {config.out}: is a folder; give a file")
    if config.pages.exists() and not config.pages.is_dir():
        raise InputError(f"--pages {config.pages}: is a file; give a folder")


def find_jobs(config: Config) -> Iterator[Job]:
    """Every experiment on the demo and on every data set found, data set by data set; last, what draws its own."""
    if unknown := set(config.only) - {*EXPERIMENTS, *CORPORA}:
        known = sorted({*EXPERIMENTS, *CORPORA})
        raise InputError(f"--only {' '.join(sorted(unknown))}: choose from {' '.join(known)}")
    found = find_files(config)
    only_data, only = set(config.only) & set(CORPORA), set(config.only) & set(EXPERIMENTS)
    if missing := only_data - set(found):
        raise InputError(f"--only {' '.join(sorted(missing))}: not found; name the folder of its file with --data-root")
    experiments = [name for name in EXPERIMENTS if not only or name in only]
    for name, path in found.items():
        if only_data and name not in only_data:
            continue
        jobs = [Job(experiment, name, path) for experiment in experiments if experiment in CORPORA[name].asked]
        models = [job.models for job in jobs if job.experiment in OF_A_RUN]
        yield from (models[:1] if models and models[0] not in jobs else []) + jobs
    if not only_data:
        yield from (Job(experiment, experiment, None) for experiment in experiments if experiment in OF_ITS_OWN)


def find_files(config: Config) -> dict[str, Path | None]:
    """The demo, and the file of each data set below --data-root. Raises InputError where there is none."""
    found: dict[str, Path | None] = {"demo": None}
    if config.data_root is None:
        return found
    if not config.data_root.is_dir():
        raise InputError(f"--data-root {config.data_root}: no such folder")
    for name, corpus in CORPORA.items():
        paths = [path for pattern in corpus.patterns for path in sorted(config.data_root.glob(pattern))]
        if paths:
            found[name] = paths[0]
    if len(found) == 1:
        names = ", ".join(corpus.patterns[0] for corpus in CORPORA.values() if corpus.patterns)
        raise InputError(f"--data-root {config.data_root}: holds no data set; expected one of {names}")
    if "cmu_mosi" in found and config.text_encoder is None:
        print(
            f"note: {found.pop('cmu_mosi')} is left out without --text-encoder: its own vectors were fitted on labels"
        )
    return found


def flags(job: Job, config: Config) -> list[str]:
    """Flags of the experiment's command."""
    corpus = CORPORA.get(job.dataset, Corpus((), ()))
    if job.experiment in OF_A_RUN:
        # pictures and texts are read again by split, and a data set that is cut anew has none
        inputs = ["input"] if corpus.is_split and not config.skip_inputs else []
        groups = ["--groups", *inputs, "features", "latents", "missing"]
        # of a data set that is cut anew every fold has a member to attack
        seeds = ["--attack-seeds", "1"] if job.experiment == "robustness" and not corpus.is_split else []
        return [str(job.models.folder), *groups, *seeds, "--name", job.folder.name]
    flags = ["--dataset", corpus.dataset or job.dataset, *of_file(job)]
    if job.data is not None:
        flags += ["--data", str(job.data)]
    if corpus.encodes_text and config.text_encoder is not None:
        flags += ["--text-encoder", config.text_encoder]
    if corpus.encodes_images and config.image_encoder is not None:
        flags += ["--image-encoder", config.image_encoder]
    if corpus.hidden_dim is not None and job.experiment not in OWN_SEEDS:
        flags += ["--hidden-dim", str(corpus.hidden_dim)]
    if job.experiment in OWN_SEEDS:
        flags += ["--seeds", str(max(2, OWN_SEEDS[job.experiment] if config.epochs is None else config.seeds))]
    elif corpus.is_split:
        flags += ["--seeds", str(FIXED_SEEDS * config.seeds)]
    else:
        seeds = MEMBERS * config.seeds if job.experiment == MODELS else config.seeds
        flags += ["--cross-validate", str(config.folds), "--repeats", str(config.repeats), "--seeds", str(seeds)]
    flags += [] if config.epochs is None else ["--epochs", str(config.epochs)]
    flags += ["--compile"] if config.compile else []
    flags += ["--hold-out-dev"] if job.experiment == MODELS else []
    return [*flags, "--cache-dir", str(config.cache_dir), "--name", job.folder.name]


def of_file(job: Job) -> list[str]:
    """How the data set's file is read, and what the experiment asks of it alone."""
    corpus = CORPORA.get(job.dataset)
    return [] if corpus is None else [*corpus.flags, *corpus.own_flags.get(job.experiment, ())]


def check_finished(job: Job, config: Config) -> None:
    """Raise InputError where a finished run was made with other settings than these (compiled or not is all one)."""
    options = parse(job.options, flags(job, config))
    if job.experiment not in OF_A_RUN:
        options = replace(options, compile=_settings(job)["compile"])
    check_settings(job.folder, settings_of(options))
    code = json.loads((job.folder / "run.json").read_text(encoding="utf-8")).get("code")
    if code != code_digest() and not config.mix_code:
        raise InputError(
            f"{job.folder}: was made by other code ({code}, now {code_digest()}); move it away to run it anew, or give "
            "--mix-code"
        )


def command(job: Job) -> str:
    """The command that made a run: what its own record says, without folders and defaults."""
    settings = _settings(job)
    if job.experiment in OF_A_RUN:
        return f"python -m {job.module} {job.models.folder.as_posix()} --groups {' '.join(settings['groups'])}"
    shown = [f"python -m {job.module} --dataset {settings['dataset']}"]
    if settings["data"]:
        shown.append(f"--data {Path(settings['data']).name}")
    shown += of_file(job)
    for name in (
        "text_encoder",
        "image_encoder",
        "cross_validate",
        "repeats",
        "seeds",
        "epochs",
        "hidden_dim",
        "weight_decay",
        "compile",
    ):
        value = settings[name]
        if value != getattr(Options, name):
            is_local = name.endswith("_encoder") and Path(value).exists()
            text = "MODEL_FOLDER" if is_local else str(value).removesuffix(".0")
            shown.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    shown += ["--hold-out-dev"] if job.experiment == MODELS else []
    return " ".join(shown)


def _settings(job: Job) -> dict:
    """The settings that a run was made with."""
    return json.loads((job.folder / "run.json").read_text(encoding="utf-8"))["settings"]


def run(arguments: list[str]) -> int:
    """`python -m experiments.reproduce FLAGS`."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
