"""Find partners across modalities in the latents of a trained run: pictures for a text, texts for a picture.

python -m mmfusion.retrieve runs/demo --text "..."      the nearest pictures: printed, and drawn on one contact sheet
python -m mmfusion.retrieve runs/demo --image FILE      the nearest texts
python -m mmfusion.retrieve runs/demo --scores          how well partners are found: R@K, median rank, mAP, and chance

Nothing is trained: similarities are cosines of the latents in the coordinates that they were trained in, mean over the
run's members.
"""

import re
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mmfusion.cli import pick_device, run_command
from mmfusion.dataset import Split
from mmfusion.encoders.images import decode_rgb, reason_unreadable
from mmfusion.errors import InputError, check_numbers, printable
from mmfusion.files import write_atomically
from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.retrieval import CUTOFFS, RetrievalScores
from mmfusion.metrics.shared_retrieval import shared_retrieval
from mmfusion.models.fusion import FusionModel
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.runs.encode import RunEncoders
from mmfusion.runs.load import TrainedRun, load_run
from mmfusion.runs.shared_space import shared_latents

COLUMNS = 5
WIDEST = 100  # letters of a text that is printed


@dataclass(frozen=True, kw_only=True)
class Config:
    """Find the pictures nearest to a text, or the texts nearest to a picture, in the latents of a run on memes."""

    run: tyro.conf.Positional[Path]
    """folder of a finished run, such as runs/demo"""
    text: str | None = None
    """words to find pictures for"""
    image: Path | None = None
    """a picture to find texts for"""
    scores: bool = False
    """print how well partners are found, in both directions, on every split"""
    split: str | None = None
    """look in this split alone; default: in all of the run's data"""
    count: int = 10
    """how many are shown"""
    out: Path | None = None
    """of --text: PNG to write; default: retrieved/RUN-TEXT.png"""
    device: str = "auto"
    """of the encoders: cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""


@dataclass(frozen=True)
class Gallery:
    """Examples that are searched: N of them."""

    ids: list[str]
    texts: list[str]
    features: dict[str, Tensor]


def main(config: Config) -> None:
    """Load, look, print, draw. Raises InputError for what the user can put right."""
    check(config)
    device = str(pick_device(config.device))
    run = load_run(config.run, device)
    ensemble = run.ensembles[run.main_row]
    if isinstance(ensemble, TokenEnsemble) or len(ensemble.shape["input_dims"]) < 2:
        raise InputError(f"{config.run}: has no latents of several modalities, one for each example; give another run")
    splits = chosen_splits(run, config.split)
    if config.scores:
        print_scores(run, splits)
    if config.text is None and config.image is None:
        return
    encoders = RunEncoders(run, device)
    if encoders.lacking is not None:
        raise InputError(f"{encoders.lacking}: it takes no raw memes; --scores alone is of features")
    gallery = gallery_of(run, splits)
    if config.text is not None:
        query = encoders.encode(texts=[config.text])
        similar = similarities(run.members(run.main_row), query, {"image": gallery.features["image"]})
        order = np.argsort(-similar, kind="stable")[: config.count]
        print_found(f"pictures nearest to {config.text!r}", gallery, order, similar)
        out = config.out or default_path(run.folder, config.text)
        draw_sheet(out, config.text, gallery, run.image_paths([gallery.ids[i] for i in order]), order, similar)
        print(f"\ndrawn in {out}")
    else:
        query = encoders.encode(images=[config.image], flag="--image ")
        similar = similarities(run.members(run.main_row), query, {"text": gallery.features["text"]})
        order = np.argsort(-similar, kind="stable")[: config.count]
        print_found(f"texts nearest to {printable(str(config.image))}", gallery, order, similar)


def check(config: Config) -> None:
    """Raise InputError naming the first flag that makes no sense, before anything is loaded."""
    if config.text is not None and config.image is not None:
        raise InputError("--image: pictures are found for a text, or texts for a picture; leave one of the two out")
    if config.text is None and config.image is None and not config.scores:
        raise InputError("--text: nothing to look for; give --text, or --image, or --scores")
    if config.text is not None and not config.text.strip():
        raise InputError("--text: is empty; give the words to find pictures for")
    if config.out is not None:
        if config.text is None:
            raise InputError("--out: pictures are drawn for --text alone; leave it out")
        if config.out.is_dir() or config.out.suffix.lower() != ".png":
            raise InputError(f"--out {config.out}: what is written is a .png file; name it so")
    check_numbers(config, {"count": (1, 100)})


def chosen_splits(run: TrainedRun, name: str | None) -> dict[str, Split]:
    """The splits that are searched. Raises InputError for one that is not there."""
    splits = run.datasets[0].splits
    if name is None:
        return dict(splits)
    if name not in splits:
        raise InputError(f"--split {name}: {run.folder} has {', '.join(splits)}")
    return {name: splits[name]}


def gallery_of(run: TrainedRun, splits: dict[str, Split]) -> Gallery:
    """All examples of the splits, each id once."""
    rows = {key: (name, row) for name, split in splits.items() for row, key in enumerate(split.ids)}
    texts = {name: run.texts(run.datasets[0], name).get("text", [""] * len(split)) for name, split in splits.items()}
    features = {
        name: torch.stack([splits[part].features[name][row] for part, row in rows.values()])
        for name in run.data.input_dims
    }
    return Gallery(list(rows), [texts[part][row] for part, row in rows.values()], features)


@torch.inference_mode()
def similarities(members: list[FusionModel], query: dict[str, Tensor], gallery: dict[str, Tensor]) -> np.ndarray:
    """(N,) cosines of one query's latent with those of a gallery of another modality, mean over members."""
    (asked, x), (searched, y) = *query.items(), *gallery.items()
    found = [
        F.normalize(z[searched], dim=-1) @ F.normalize(z[asked][0], dim=-1)
        for z in (member.shared_latents({asked: x, searched: y}) for member in members)
    ]
    return torch.stack(found).mean(0).numpy()


def print_found(title: str, gallery: Gallery, order: np.ndarray, similar: np.ndarray) -> None:
    """One line each, the nearest first."""
    print(f"\n{printable(title)}, of {counted(len(gallery.ids), 'example')}\ncosine  id, text")
    for i in order:
        text = textwrap.shorten(" ".join(gallery.texts[i].split()), WIDEST, placeholder=" ...")
        print(f"{similar[i]:6.3f}  {printable(gallery.ids[i])}  {printable(text)}")


def print_scores(run: TrainedRun, splits: dict[str, Split]) -> None:
    """R@K, median rank and mAP of every ordered pair of modalities, mean +- std over members; chance beside."""
    members = run.members(run.main_row)
    print(f"\npartners found among the latents of {run.main_row} (mean +- std over {counted(len(members), 'seed')})")
    titles = (*(f"R@{k}" for k in CUTOFFS), "median rank", "mAP")
    print(f"{'':30}" + "".join(f"  {title:^16}" for title in titles))
    for part, split in splits.items():
        found = [shared_retrieval(shared_latents(member, split), split.shared) for member in members]
        chance = shared_retrieval({name: np.ones((len(split), 1)) for name in run.data.input_dims}, split.shared)
        for pair, of_pair in found[0].items():
            columns = zip(*(_numbers(one[pair]) for one in found), strict=True)
            label = f"{pair[0]} to {pair[1]}, {part}, n = {of_pair.queries}"
            print(f"{label:30}" + "".join(f"  {mean_std(values):16}" for values in columns))
            if split.shared:  # an image has five captions to find, a caption one image
                print_chance(chance[pair])
        if not split.shared:
            print_chance(next(iter(chance.values())))


def print_chance(scores: RetrievalScores) -> None:
    """What equal vectors score."""
    print(f"{'  chance':30}" + "".join(f"  {value:<16.3f}" for value in _numbers(scores)))


def _numbers(scores: RetrievalScores) -> list[float]:
    return [*scores.recall.values(), scores.median_rank, scores.mean_average_precision]


def draw_sheet(
    path: Path, text: str, gallery: Gallery, files: dict[str, Path], order: np.ndarray, similar: np.ndarray
) -> None:
    """The pictures side by side, the nearest first, each under its cosine. Raises InputError where it cannot be."""
    rows = -(-len(order) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 2.9 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, order, strict=False):
        key = gallery.ids[i]
        try:
            picture = decode_rgb(files[key])
            picture.thumbnail((320, 320))
            axis.imshow(np.asarray(picture))
        except Exception as error:  # a hostile file may raise nearly anything inside Pillow
            axis.text(0.5, 0.5, reason_unreadable(error), ha="center", wrap=True, fontsize=8)
        axis.set_title(f"{similar[i]:.3f}  {printable(key[:24])}", fontsize=9, parse_math=False)
    title = printable(" ".join(text.split())[:160])
    figure.suptitle(textwrap.fill(title, 90), fontsize=12, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of emoji and some scripts; a box stands for them
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))


def default_path(folder: Path, what: str) -> Path:
    """retrieved/RUN-WHAT.png, of characters that any file system takes."""
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or "text" for name in (folder.resolve().name, what)]
    return Path("retrieved") / f"{'-'.join(names)}.png"


def run(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
