"""Train jWAE + LMF on Hateful Memes, beside its baselines, and report every score with its spread.

python main_hateful_memes.py                      the embedded demo: drawn memes, no download
python main_hateful_memes.py --jsonl hm/train.jsonl --img-dir hm/img      the real data set
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmfusion.cli import pick_device, run_command
from mmfusion.data.memes import MemesConfig, load_memes
from mmfusion.distributed import end_process, join_processes, leave_processes
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.errors import InputError
from mmfusion.metrics.scores import binary_scores
from mmfusion.models.fusion import FusionEnsemble, ModelConfig
from mmfusion.runs import report
from mmfusion.runs.folder import RunFolder, config_from, find_begun, read_run
from mmfusion.runs.outputs import MetricsLog, save_ensembles, write_predictions
from mmfusion.training.fit import Method, fit
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig
from mmfusion.training.trainer import Trained

# ---------------------------------------------------------------------------------------------------------------------
# Your data: the train.jsonl of the Hateful Memes release (dev and test are found beside it) and its folder of images.
# Left empty, the script trains on a demo that it draws itself. --jsonl and --img-dir override this.
REAL_PATH = {"jsonl": "", "img_dir": ""}
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """What the run is called, and whether it goes on from a kill."""

    name: str | None = None
    """the run is kept in runs/NAME; default: demo or hateful_memes, with a number if that is taken"""
    resume: bool = False
    """go on with the run of that name where it was killed"""


@dataclass(frozen=True)
class Config:
    """Train jWAE + LMF on Hateful Memes. Without --jsonl, --download or an edited REAL_PATH: on an embedded demo."""

    data: MemesConfig = field(default_factory=MemesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    run: RunConfig = field(default_factory=RunConfig)
    encoders: EncoderConfig = field(default_factory=EncoderConfig)

    def check(self) -> None:
        """Raise InputError naming the first flag whose value makes no sense."""
        for section in (self.training, self.model, self.objective, self.encoders):
            section.check()


def locate(data: MemesConfig) -> MemesConfig:
    """The data section with REAL_PATH filled in where no flag is given."""
    if data.download:
        if data.jsonl or data.img_dir:
            raise InputError("--download: brings its own files; leave --jsonl and --img-dir out")
        return data
    if data.jsonl:
        return data
    if not isinstance(REAL_PATH, dict) or not set(REAL_PATH) <= {"jsonl", "img_dir"}:
        raise InputError(f'REAL_PATH in {__file__}: is {REAL_PATH!r:.60}; it must be {{"jsonl": ..., "img_dir": ...}}')
    here = Path(__file__).resolve().parent  # a relative path means the same wherever the script is started
    named = {key: here / Path(path).expanduser() for key, path in REAL_PATH.items() if path}
    jsonl, img_dir = named.get("jsonl"), data.img_dir or named.get("img_dir")
    if img_dir and not jsonl:
        where = "--img-dir" if data.img_dir else "REAL_PATH['img_dir']"
        raise InputError(f"{where} {img_dir}: images without captions; give --jsonl (or REAL_PATH['jsonl']) too")
    return replace(data, jsonl=jsonl, img_dir=img_dir)


def methods(config: Config) -> list[list[Method]]:
    """What is trained; the methods of one inner list have one shape, and are trained in one stack."""
    both, rank = ("image", "text"), config.model.rank
    lmf = [Method(f"jWAE-LMF, rank {rank}", both, active_rank=rank)]
    if rank > 1:
        lmf.append(Method("jWAE-LMF, rank 1", both, active_rank=1))
    if config.objective.mmd_weight > 0:
        lmf.append(Method("jWAE-LMF, no prior", both, active_rank=rank, prior=False))
    return [
        lmf,
        [Method("concatenation + MLP", both, "concatenation")],
        [Method("image only", both[:1])],
        [Method("text only", both[1:])],
    ]


# ---- the run -----------------------------------------------------------------------------------------------------


# over 60 lines on purpose: the whole run reads from top to bottom, one phase under each banner
def main(config: Config) -> None:
    """Everything from files to report. Raises InputError for what the user can put right."""
    config.check()
    config = replace(config, data=locate(config.data))
    device = pick_device(config.training.device)
    run = RunFolder.claim(config, default_name(config))  # before hours of extraction, not after

    # ---- features, from the cache where they are there; under torchrun all processes extract, and one goes on
    processes = join_processes(str(device))
    dataset = load_memes(config.data, config.encoders, processes)
    leave_processes()
    if not processes.is_main:
        return

    # ---- the run's folder
    if not run.begin(dataset.description, device):
        return
    folder = run.path
    report.print_dataset(dataset, folder, device)

    # ---- training: fusion and its baselines
    ensembles: dict[str, FusionEnsemble] = {}
    histories: dict[str, Trained] = {}
    with MetricsLog(folder / "metrics.jsonl") as log:
        for stack in methods(config):
            labels = [method.label for method in stack]
            with log.stack(labels, config.training.seeds, config.training.epochs) as on_epoch:
                fitted, trained = fit(
                    dataset,
                    stack,
                    config.model,
                    config.objective,
                    config.training,
                    device=device,
                    checkpoint=folder
                    / "checkpoints"
                    / f"{stack[0].fusion}-{'-'.join(stack[0].modalities)}.safetensors",
                    on_epoch=on_epoch,
                )
            ensembles |= dict(zip(labels, fitted, strict=True))
            histories[labels[0]] = trained

    # ---- scores on every labelled split
    probabilities = {
        label: {name: ensemble.predict_proba(split.features) for name, split in dataset.splits.items()}
        for label, ensemble in ensembles.items()
    }  # {row: {split: (S, N)}}
    labelled = [
        n for n, s in dataset.splits.items() if n != "train" and s.target is not None and len(s.target.unique()) > 1
    ]
    scores = {
        label: {name: binary_scores(p[name].numpy(), dataset.splits[name].target.numpy()) for name in labelled}
        for label, p in probabilities.items()
    }
    report.print_scores(scores, dataset)

    # ---- what the fusion has learned
    main_row = next(iter(ensembles))
    ranks = report.rank_report(ensembles[main_row], dataset.splits[dataset.selection].features)
    report.print_ranks(ranks, dataset.selection)

    # ---- everything to disk; results.json comes last and marks the run as complete
    save_ensembles(folder, ensembles)
    write_predictions(folder, dataset, probabilities[main_row])
    report.draw(
        folder / "report.png", dataset, ensembles[main_row], histories[main_row], probabilities[main_row], ranks
    )
    run.close({"selection": dataset.selection, "scores": scores, "ranks": ranks})
    print(
        f"\nkept in {folder}/: report.png, results.json, metrics.jsonl, predictions_*.csv, "
        "model.safetensors with config.json (FusionEnsemble.from_pretrained)"
    )


def default_name(config: Config) -> str:
    """The run's name where none is given."""
    return "demo" if config.data.is_demo else "hateful_memes"


def begun(config: Config) -> Config | None:
    """With --resume the settings of the run to go on with, so that no flag need be given again."""
    if not config.run.resume:
        return None
    folder = find_begun(config.run.name, default_name(replace(config, data=locate(config.data))))
    return config_from(Config, read_run(folder)["settings"], folder / "run.json")


def run(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    return run_command(main, Config, arguments, begun)


if __name__ == "__main__":
    end_process(run(sys.argv[1:]))
