"""Run every experiment on every dataset that is found, and write RESULTS.md.

    python -m experiments.reproduce --data-root FOLDER --text-encoder MODEL_FOLDER
    python -m experiments.reproduce                        the embedded demo alone

Each experiment is a process of its own, run by the very command that RESULTS.md shows; one that is complete is not run
again with --resume.
"""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.experiment import Options
from experiments.experiment import options_of as experiment_options
from experiments.results_pages import Finished, write_pages
from mmfusion.cli import parse, run_command
from mmfusion.errors import InputError
from mmfusion.runs.folder import MARK_OF_COMPLETION, RUNS, code_digest
from mmfusion.runs.settings import check_settings, read_run, settings_of

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
    "temporal",
    "wma",
    "alignment",
    "modality_count",
    "synthetic",
)
# of these data sets alone: the others have no labels to keep, or too few modalities
GEOMETRY = {
    "alignment": ("demo", "mustard", "pom", "digits", "clip", "cells"),
    "modality_count": ("digits",),
}
# files without a loader of their own, how they are read, and what is asked of them alone
ARRAYS = {"digits": ("--target", "digit", "--hold-out", "0.5")}
PAIRS = {
    "clip": ("--modalities", "image", "text", "--identity", "--width", "512", "--rate", "1e-4"),
    "cells": ("--modalities", "chromatin", "expression", "--folds", "2"),
}
OF_FILES = {
    ("alignment", "digits"): ("--modalities", "fou", "kar"),
    ("modality_count", "digits"): (),
    ("alignment", "clip"): (),
    ("alignment", "cells"): (),
}
# no more seeds than these: every row is trained anew, and its differences are paired over the test examples too
SEEDS = {"alignment": 3}
# these draw their own data, once, whatever data sets are found
OF_ITS_OWN = ("synthetic",)
# these need sequences of tokens or steps, which these data sets have
OF_TOKENS = ("temporal", "wma")
WITH_TOKENS = ("demo", "mustard", "pom", "mmmo", "hateful_memes")
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
    "mmmo": ("mmmo*.npz",),
    "digits": ("mfeat_digits*.npz",),
    "clip": ("clip_coco_pairs*.npz",),
    "cells": ("snareseq*.npz",),
    "hateful_memes": ("train.jsonl", "*/train.jsonl"),
}


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
    """seeds of every experiment; of alignment at most 3"""
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
    cache_dir: Path = Path("cache")
    """where encoded texts and images (and the demo) are kept between runs"""
    skip_inputs: bool = False
    """leave corrupted pictures and texts out of robustness and uncertainty: each has to be encoded once"""
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
    write_pages([finished(job) for job in jobs if job.experiment != MODELS], config.out, config.pages)


def finished(job: Job) -> Finished:
    """What a finished experiment left."""
    run = read_run(job.folder)
    models = command(job.models) if job.experiment in OF_A_RUN else None
    code = json.loads((job.folder / "run.json").read_text(encoding="utf-8")).get("code", "unknown")
    results = json.loads((job.folder / MARK_OF_COMPLETION).read_text(encoding="utf-8"))
    return Finished(job.experiment, job.dataset, job.folder, results, command(job), models, code, run["device"])


def check_outputs(config: Config) -> None:
    """Raise InputError where --out or --pages cannot be written, before anything is run."""
    if config.out.is_dir():
        raise InputError(f"--out {config.out}: is a folder; give a file")
    if config.pages.exists() and not config.pages.is_dir():
        raise InputError(f"--pages {config.pages}: is a file; give a folder")


def find_jobs(config: Config) -> Iterator[Job]:
    """Every experiment on the demo and on every data set found, data set by data set; last, what draws its own."""
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
        here = [e for e in experiments if e not in OF_ITS_OWN]
        jobs = [Job(experiment, dataset, found[dataset]) for experiment in here if fits(experiment, dataset)]
        measured = [job for job in jobs if job.experiment in OF_A_RUN]
        yield from ([measured[0].models] if measured else []) + jobs
    if not set(config.only) & {*FILES, "demo"}:
        yield from (Job(experiment, experiment, None) for experiment in experiments if experiment in OF_ITS_OWN)


def fits(experiment: str, dataset: str) -> bool:
    """Whether a data set has what an experiment needs."""
    if dataset in (*ARRAYS, *PAIRS):
        return (experiment, dataset) in OF_FILES
    if experiment in GEOMETRY:
        return dataset in GEOMETRY[experiment]
    return experiment not in OF_TOKENS or dataset in WITH_TOKENS


def of_file(job: Job) -> list[str]:
    """How a file without a loader of its own is read, and what is asked of it."""
    known = {**ARRAYS, **PAIRS}.get(job.dataset, ())
    return [*known, *OF_FILES.get((job.experiment, job.dataset), ())]


def flags(job: Job, config: Config) -> list[str]:
    """Flags of the experiment's command."""
    if job.experiment in OF_A_RUN:
        inputs = ["input"] if job.dataset in WITH_INPUTS and not config.skip_inputs else []
        groups = ["--groups", *inputs, "features", "latents", "missing"]
        return [str(job.models.folder), *groups, "--name", job.folder.name]
    flags = ["--dataset", "arrays" if job.dataset in ARRAYS else "pairs" if job.dataset in PAIRS else job.dataset]
    if job.data is not None:
        flags += ["--data", str(job.data)]
    flags += of_file(job)
    if job.dataset in ("mustard", "hateful_memes") and config.text_encoder is not None:
        flags += ["--text-encoder", config.text_encoder]
    flags += ["--seeds", str(min(config.seeds, SEEDS.get(job.experiment, config.seeds)))]
    flags += [] if config.epochs is None else ["--epochs", str(config.epochs)]
    flags += ["--compile"] if config.compile else []
    flags += ["--hold-out-dev"] if job.experiment == MODELS else []
    return [*flags, "--cache-dir", str(config.cache_dir), "--name", job.folder.name]


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
        return f"python -m {job.module} {Path(settings['run']).as_posix()} --groups {' '.join(settings['groups'])}"
    shown = [f"python -m {job.module} --dataset {settings['dataset']}"]
    if settings["data"]:
        shown.append(f"--data {Path(settings['data']).name}")
    shown += of_file(job)
    for name in ("text_encoder", "seeds", "epochs", "hidden_dim", "weight_decay", "compile"):
        value = settings[name]
        if value != getattr(Options, name):
            is_folder = name == "text_encoder" and Path(value).exists()
            text = "MODEL_FOLDER" if is_folder else str(value).removesuffix(".0")
            shown.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    shown += [f"--hold-out-dev --name {job.folder.name}"] if job.experiment == MODELS else []
    return " ".join(shown)


def _settings(job: Job) -> dict:
    """The settings that a run was made with."""
    return json.loads((job.folder / "run.json").read_text(encoding="utf-8"))["settings"]


def run(arguments: list[str]) -> int:
    """`python -m experiments.reproduce FLAGS`."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
