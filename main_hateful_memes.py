"""Train jWAE + LMF on Hateful Memes, beside its baselines, and report every score with its spread.

python main_hateful_memes.py                      the embedded demo: drawn memes, no download
python main_hateful_memes.py --jsonl hm/train.jsonl --img-dir hm/img      the real data set
"""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import report
from command_line import pick_device, run_command
from corpus import Corpus, InputError
from demo_memes import draw_demo
from frozen_encoders import EncoderConfig
from fusion_model import FusionEnsemble, FusionModel, loss_terms
from hateful_memes_loader import download_hateful_memes, load_hateful_memes
from metrics import binary_scores
from run_folder import (
    MetricsLog,
    check_resumable,
    choose_folder,
    close_run,
    is_complete,
    open_run,
    save_ensembles,
    write_predictions,
)
from torchrun_processes import Processes, end_process, join_processes, leave_processes
from training import Batch, Member, Schedule, Trained, train

# ---------------------------------------------------------------------------------------------------------------------
# Your data: the train.jsonl of the Hateful Memes release (dev and test are found beside it) and its folder of images.
# Left empty, the script trains on a demo that it draws itself. --jsonl and --img-dir override this.
REAL_PATH = {"jsonl": "", "img_dir": ""}
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Train jWAE + LMF on Hateful Memes. Without --jsonl, --download or an edited REAL_PATH: on an embedded demo."""

    # ---- data
    jsonl: Path | None = None
    """train.jsonl of the release (overrides REAL_PATH); dev and test splits are found beside it"""
    img_dir: Path | None = None
    """folder of the images; default: where the jsonl's `img` paths lead"""
    download: bool = False
    """fetch the Kaggle copy of the data set (phase 1) with kagglehub, and train on it"""
    bad_images: Literal["error", "skip"] = "error"
    """what to do about images that cannot be read: stop and list them, or drop them and record which"""
    cache_dir: Path = Path("cache")
    """where features (and the demo) are kept between runs"""
    workers: int | None = None
    """processes that decode images; default: by the number of cores"""

    # ---- frozen encoders (None: pretrained ResNet-50 and BERT; in the demo the same architectures with random weights)
    image_encoder: str | None = None
    """resnet50, a Hugging Face name, a local model folder or a ResNet-50 weights file; random:NAME draws the weights"""
    image_weights: Literal["IMAGENET1K_V1", "IMAGENET1K_V2"] = "IMAGENET1K_V1"
    """which of torchvision's ResNet-50 weights"""
    image_resize: Literal["squash", "crop"] = "squash"
    """squash the whole image to a square, or resize and cut the centre out (which cuts captions off)"""
    image_size: int | None = None
    """pixels on a side that the image encoder sees; default 224 (demo: 112)"""
    text_encoder: str | None = None
    """a Hugging Face name (default bert-base-uncased) or a local model folder; random:NAME draws the weights"""
    text_pooling: Literal["mean", "cls"] = "mean"
    """mean of the token vectors, or the vector of the CLS token"""

    # ---- model
    latent_dim: int = 32
    """width L of the latents"""
    hidden_dim: int = 128
    """width of the encoders' and decoders' hidden layer"""
    rank: int = 4
    """number of rank-1 terms R; for one logit this is the CP rank of the interaction"""
    spectral_norm: float | None = None
    """fix the spectral norm of every weight matrix of encoders and head to this; default: weights are free"""

    # ---- objective: BCE + mmd * MMD^2 + reconstruction * squared error + alignment * pair alignment
    mmd_weight: float = 1.0
    """weight of the MMD to the Gaussian prior; 0 turns the prior off"""
    reconstruction_weight: float = 0.1
    """weight of the reconstruction error"""
    alignment_weight: float = 0.1
    """weight of the alignment of a meme's image and text latents"""
    alignment: Literal["margin", "info_nce"] = "margin"
    """which alignment: the margin ranking loss of the jWAE paper, or symmetric InfoNCE"""

    # ---- training
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """one member per seed; all are trained at once"""
    epochs: int = 30
    """at most; see --patience"""
    patience: int = 6
    """epochs without a better dev AUROC after which a member stops"""
    batch_size: int = 64
    """examples per step"""
    learning_rate: float = 1e-3
    """of Adam"""
    weight_decay: float = 0.01
    """decoupled, on weight matrices"""
    modality_dropout: float = 0.0
    """rate at which each modality is hidden in training, of models that have both"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""
    compile: bool = False
    """compile the training step (pays on long runs)"""

    # ---- the run
    name: str | None = None
    """the run is kept in runs/NAME; default: demo or hateful_memes, with a number if that is taken"""
    resume: bool = False
    """go on with the run of that name where it was killed"""


# ---- objective ---------------------------------------------------------------------------------------------------


def objective(model, batch: Batch, alignment: str = "margin") -> dict[str, Tensor]:
    """Loss terms of one model on one batch: bce, mmd, reconstruction, alignment. Their weighted sum is minimised.

    batch.features holds (B, d_m) per modality, batch.target (B,) of 0 and 1.
    """
    return loss_terms(model(batch.features, present=batch.present), batch.target, "binary", alignment)


def predict(model, features: dict[str, Tensor]) -> Tensor:
    """Logits (N,) of one model."""
    return model(features, reconstruct=False).prediction.squeeze(-1)


# ---- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where memes come from, and what encodes them."""

    jsonl: Path
    img_dir: Path | None
    """None: the images lie beside the jsonl"""
    encoders: EncoderConfig
    is_demo: bool = False


def find_source(config: Config, processes: Processes, quiet: bool = False) -> Source:
    """What the flags and REAL_PATH ask for: found, downloaded, or (the demo) drawn; every process takes part.

    `quiet` leaves the demo's banner out. Raises InputError.
    """
    jsonl, img_dir = locate(config)
    demo = jsonl is None and not config.download
    with processes.together():  # one process fetches or draws, the others wait for it
        if demo and processes.is_main:
            if not quiet:
                report.print_demo_banner()
            draw_demo(config.cache_dir / "demo_memes")
        if config.download and processes.is_main:
            jsonl, img_dir = download_hateful_memes()
    jsonl, img_dir = processes.gather((jsonl, img_dir))[0]
    if demo:
        jsonl = config.cache_dir / "demo_memes" / "train.jsonl"
    encoders = EncoderConfig(
        image_encoder=config.image_encoder or ("random:resnet50" if demo else "resnet50"),
        image_weights=config.image_weights,
        image_resize=config.image_resize,
        image_size=config.image_size or (112 if demo else 224),
        text_encoder=config.text_encoder or (f"random:{jsonl.parent / 'bert'}" if demo else "bert-base-uncased"),
        text_pooling=config.text_pooling,
    )
    return Source(jsonl, img_dir, encoders, demo)


def load(config: Config, processes: Processes, quiet: bool = False) -> Corpus:
    """The corpus that the flags and REAL_PATH ask for, as frozen features; every process of torchrun takes part.

    `quiet` leaves the demo's banner out. Raises InputError.
    """
    source = find_source(config, processes, quiet)
    options = {"bad_images": config.bad_images, "device": processes.device, "workers": config.workers}
    corpus = load_hateful_memes(source.jsonl, source.img_dir, source.encoders, config.cache_dir, **options)
    return replace(corpus, name="demo") if source.is_demo else corpus


def locate(config: Config) -> tuple[Path | None, Path | None]:
    """(jsonl, image folder) that the flags or else REAL_PATH name; (None, None) asks for the demo or the download."""
    if config.download:
        if config.jsonl or config.img_dir:
            raise InputError("--download: brings its own files; leave --jsonl and --img-dir out")
        return None, None
    if config.jsonl:
        return config.jsonl, config.img_dir
    jsonl, img_dir = (Path(REAL_PATH[k]).expanduser() if REAL_PATH.get(k) else None for k in ("jsonl", "img_dir"))
    img_dir = config.img_dir or img_dir
    if img_dir and not jsonl:
        where = "--img-dir" if config.img_dir else "REAL_PATH['img_dir']"
        raise InputError(f"{where} {img_dir}: images without captions; give --jsonl (or REAL_PATH['jsonl']) too")
    return jsonl, img_dir


# ---- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the score table: a model trained with every seed."""

    label: str
    modalities: tuple[str, ...]
    fusion: Literal["lmf", "concatenation"] = "lmf"
    active_rank: int | None = None
    prior: bool = True
    """trained with the MMD to the prior, at the weight that the flags give"""


def rows_of(config: Config) -> list[list[Row]]:
    """What is trained; the rows of one inner list have one shape, and are trained in one stack."""
    both = ("image", "text")
    lmf = [Row(f"jWAE-LMF, rank {config.rank}", both, active_rank=config.rank)]
    if config.rank > 1:
        lmf.append(Row("jWAE-LMF, rank 1", both, active_rank=1))
    if config.mmd_weight > 0:
        lmf.append(Row("jWAE-LMF, no prior", both, active_rank=config.rank, prior=False))
    return [
        lmf,
        [Row("concatenation + MLP", both, "concatenation")],
        [Row("image only", both[:1])],
        [Row("text only", both[1:])],
    ]


def train_rows(
    config: Config, rows: list[Row], corpus: Corpus, folder: Path, log: MetricsLog, device: torch.device
) -> tuple[list[FusionEnsemble], Trained]:
    """Train every seed of every row of one shape at once; one ensemble per row."""
    modalities, fusion = rows[0].modalities, rows[0].fusion
    input_dims = {name: corpus.input_dims[name] for name in modalities}
    shape = {
        "input_dims": input_dims,
        "latent_dim": config.latent_dim,
        "hidden_dim": config.hidden_dim,
        "rank": config.rank if len(modalities) > 1 else 1,  # one modality: an affine head, rank has no meaning
        "fusion": fusion,
        "spectral_norm": config.spectral_norm,
    }
    training, selection = (
        replace(split, features={name: split.features[name] for name in modalities})
        for split in (corpus.splits["train"], corpus.splits[corpus.selection])
    )
    fitted = FusionModel(**shape)
    fitted.fit_standardisation(training.features)
    standardisation = fitted.standardise.state_dict()

    def build(member: Member) -> FusionModel:
        model = FusionModel(**shape, active_rank=member.settings["active_rank"])
        model.standardise.load_state_dict(standardisation)
        return model

    loss_weights = {"bce": 1.0, "reconstruction": config.reconstruction_weight}
    if len(modalities) > 1:
        loss_weights["alignment"] = config.alignment_weight
    members = [
        Member(
            seed,
            {**loss_weights, "mmd": config.mmd_weight if row.prior else 0.0},
            config.weight_decay,
            {"active_rank": row.active_rank},
            {name: config.modality_dropout for name in modalities if len(modalities) > 1},
        )
        for row in rows
        for seed in config.seeds
    ]
    schedule = Schedule(
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        patience=config.patience,
        compile=config.compile,
    )
    with log.stack([row.label for row in rows], config.seeds, config.epochs) as on_epoch:
        trained = train(
            build,
            members,
            lambda model, batch: objective(model, batch, config.alignment),
            predict,
            training,
            selection,
            lambda logits, target: roc_auc_score(target, logits),
            schedule,
            device=device,
            checkpoint=folder / "checkpoints" / f"{fusion}-{'-'.join(modalities)}.safetensors",
            on_epoch=on_epoch,
        )
    ensembles = []
    for i in range(0, len(members), len(config.seeds)):
        ensemble = FusionEnsemble(**shape, members=len(config.seeds)).eval()
        for empty, model in zip(ensemble.members, trained.models[i:], strict=False):
            empty.load_state_dict(model.state_dict())
        ensembles.append(ensemble)
    return ensembles, trained


# ---- the run -----------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Everything from files to report. Raises InputError for what the user can put right."""
    check(config)
    device = pick_device(config.device)
    is_demo = locate(config)[0] is None and not config.download
    folder = choose_folder(config.name, "demo" if is_demo else "hateful_memes", config.resume)
    if config.resume:
        check_resumable(folder, config)  # before hours of extraction, not after

    # ---- features, from the cache where they are there; under torchrun all processes extract, and one goes on
    processes = join_processes(str(device))
    corpus = load(config, processes)
    leave_processes()
    if not processes.is_main:
        return

    # ---- the run's folder
    open_run(folder, config, corpus.description, device)
    if is_complete(folder):
        print(f"{folder}: this run is complete; its scores are in {folder / 'results.json'}")
        return
    report.print_corpus(corpus, folder, device)

    # ---- training: fusion and its baselines
    ensembles: dict[str, FusionEnsemble] = {}
    histories: dict[str, Trained] = {}
    with MetricsLog(folder / "metrics.jsonl") as log:
        for rows in rows_of(config):
            trained_ensembles, trained = train_rows(config, rows, corpus, folder, log, device)
            for row, ensemble in zip(rows, trained_ensembles, strict=True):
                ensembles[row.label] = ensemble
            histories[rows[0].label] = trained

    # ---- scores on every labelled split
    probabilities = {
        label: {name: ensemble.predict_proba(split.features) for name, split in corpus.splits.items()}
        for label, ensemble in ensembles.items()
    }  # {row: {split: (S, N)}}
    labelled = [
        n for n, s in corpus.splits.items() if n != "train" and s.target is not None and len(s.target.unique()) > 1
    ]
    scores = {
        label: {name: binary_scores(p[name].numpy(), corpus.splits[name].target.numpy()) for name in labelled}
        for label, p in probabilities.items()
    }
    report.print_scores(scores, corpus)

    # ---- what the fusion has learned
    main_row = next(iter(ensembles))
    ranks = report.rank_report(ensembles[main_row], corpus.splits[corpus.selection].features)
    report.print_ranks(ranks, corpus.selection)

    # ---- everything to disk; results.json comes last and marks the run as complete
    save_ensembles(folder, ensembles)
    write_predictions(folder, corpus, probabilities[main_row], config.seeds)
    report.draw(folder / "report.png", corpus, ensembles[main_row], histories[main_row], probabilities[main_row], ranks)
    close_run(folder, {"selection": corpus.selection, "scores": scores, "ranks": ranks})
    print(
        f"\nkept in {folder}/: report.png, results.json, metrics.jsonl, predictions_*.csv, "
        "model.safetensors with config.json (FusionEnsemble.from_pretrained)"
    )


def check(config: Config) -> None:
    """Raise InputError naming the first flag whose value makes no sense."""
    at_least = {"latent_dim": 1, "hidden_dim": 1, "rank": 1, "epochs": 1, "patience": 1, "batch_size": 2, "workers": 0}
    at_least |= {name: 0 for name in ("mmd_weight", "reconstruction_weight", "alignment_weight", "weight_decay")}
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and not least <= value < float("inf"):  # also catches nan
            raise InputError(f"--{name.replace('_', '-')} {value}: give a number from {least} up")
    if not 0 < config.learning_rate < float("inf"):
        raise InputError(f"--learning-rate {config.learning_rate}: give a number above 0, for instance 1e-3")
    if (
        not config.seeds
        or len(set(config.seeds)) < len(config.seeds)
        or not 0 <= min(config.seeds) <= max(config.seeds) < 2**63
    ):
        raise InputError(f"--seeds {' '.join(map(str, config.seeds))}: give different whole numbers from 0 to 2^63 - 1")
    if not 0 <= config.modality_dropout < 1:
        raise InputError(f"--modality-dropout {config.modality_dropout}: give a rate from 0 up to, not including, 1")
    if config.spectral_norm is not None and not 0 < config.spectral_norm < float("inf"):
        raise InputError(f"--spectral-norm {config.spectral_norm}: give a number above 0, for instance 1")
    compiler = os.environ.get("CXX", "g++")
    if config.compile and shutil.which(compiler) is None:
        raise InputError(
            f"--compile: needs a C++ compiler, and {compiler} is not found; install it, or leave the flag out"
        )
    if config.image_size is not None and config.image_size < 32:
        raise InputError(f"--image-size {config.image_size}: ResNet-50 needs at least 32 pixels on a side")


def run(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    end_process(run(sys.argv[1:]))
