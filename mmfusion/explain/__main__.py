"""Explain predictions of a trained run: one meme, named examples, or a whole split.

python -m mmfusion.explain runs/demo --image FILE --text "..."          one meme: printed, and drawn into one PNG
python -m mmfusion.explain runs/demo --split dev --worst 20             many examples: one HTML page
python -m mmfusion.explain runs/demo --summary                          what each modality does on a split
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from mmfusion.cli import pick_device, run_command
from mmfusion.errors import InputError, printable
from mmfusion.explain.explainer import Choices, Explainer, known_split, named
from mmfusion.explain.figure import draw_explanation
from mmfusion.explain.page import explanation_page
from mmfusion.explain.summary import print_summary
from mmfusion.explain.text import print_explanation
from mmfusion.explain.token_figure import draw_tokens, token_page
from mmfusion.explain.tokens import TokenExplainer, print_tokens
from mmfusion.files import write_text
from mmfusion.metrics.format import counted
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.runs.load import TrainedRun, load_run


@dataclass(frozen=True, kw_only=True)
class Config(Choices):
    """Explain predictions of a trained run exactly: by modality, by set of modalities, by rank; and where they look."""

    run: tyro.conf.Positional[Path]
    """folder of a finished run, such as runs/demo"""
    # ---- what is explained
    image: Path | None = None
    """a picture; with --text: explain this one meme (runs on memes)"""
    text: str | None = None
    """the meme's text"""
    ids: tuple[str, ...] = ()
    """explain these examples of the run's own data, on one HTML page"""
    split: str | None = None
    """explain this split on one HTML page; for --summary default: the split selected upon"""
    worst: int | None = None
    """of --split, only this many examples: those with the largest loss of the ensemble's mean"""
    summary: bool = False
    """print what each modality contributes on a split: EMAP, Shapley values, relevance, shares of variance"""
    out: Path | None = None
    """file to write; default: explanations/NAME.png or .html"""
    device: str = "auto"
    """of the encoders: cpu, cuda, cuda:1, ...; auto takes CUDA where there is one, as the run itself does"""


def main(config: Config) -> None:
    """Load, explain, print, write. Raises InputError for what the user can put right."""
    check(config)
    device = str(pick_device(config.device))
    run = load_run(config.run, device, with_tokens=True)
    if isinstance(run.ensembles[run.main_row], TokenEnsemble):
        explain_tokens(config, run, device)
        return
    explainer = Explainer(run, config, device)
    if config.image is not None:
        explanation = explainer.meme(config.image, config.text)
        out = config.out or default_path(run.folder, config.image.stem, "png")
        draw_explanation(out, explanation)
        print_explanation(explanation)
        print(f"\ndrawn in {out}")
        return

    name = explainer.known_split(config.split or explainer.dataset.selection)
    places = explainer.named(config.ids) if config.ids else explainer.rows(name, config.worst) if config.split else []
    summary = None if config.ids and not config.summary else explainer.summary(name, baselines=config.summary)
    if config.summary:
        print_summary(summary)
    if places:
        what = "ids" if config.ids else name if config.worst is None else f"{name}-worst-{len(places)}"
        for flag in ("output", "fold", "seed"):  # pages of other choices do not overwrite each other
            if getattr(config, flag) != getattr(Config, flag):
                what += f"-{flag}-{getattr(config, flag)}"
        explanation = explainer.explain_places(places)
        out = config.out or default_path(run.folder, what, "html")
        write_text(out, explanation_page(explanation, page_title(config, name, len(places)), summary))
        if len(places) == 1:
            print_explanation(explanation)
        print(f"{counted(len(places), 'example')} explained in {out}")


def explain_tokens(config: Config, run: TrainedRun, device: str) -> None:
    """The same of a run whose models take tokens: one picture for one example, a page for several."""
    for flag, given in (
        ("rank", config.rank),
        ("seed", config.seed),
        ("maps", config.maps),
        ("summary", config.summary),
    ):
        if given:
            raise InputError(f"--{flag}: is of runs of vectors, {config.run} takes tokens; leave it out")
    explainer = TokenExplainer(run, device, config.fold, config.output)
    if config.image is not None:
        several, what = [explainer.meme(config.image, config.text)], config.image.stem
    else:
        splits = explainer.dataset.splits
        if config.ids:
            places, what = named(splits, config.ids, explainer.dataset.name), "ids"
        else:
            name = known_split(splits, config.split, explainer.dataset.name)
            places, what = [(name, row) for row in range(len(splits[name]))], name
            if config.worst is not None:
                if splits[name].target is None:
                    raise InputError(f"--worst: {name} has no labels to be wrong about; leave it out")
                order = np.argsort(-explainer.losses(splits[name]), kind="stable")[: config.worst]
                places, what = [(name, int(row)) for row in order], f"{name}-worst-{len(order)}"
        several = [explainer.example(*place) for place in places]
    if len(several) == 1:
        out = config.out or default_path(run.folder, what, "png")
        if out.suffix.lower() != ".png":
            raise InputError(f"--out {out}: one example of tokens is drawn as a .png file; name it so")
        draw_tokens(out, several[0])
        print_tokens(several[0])
        print(f"\ndrawn in {out}")
        return
    out = config.out or default_path(run.folder, what, "html")
    write_text(out, token_page(f"{config.run}: {len(several)} examples", run.data.notes, several))
    print(f"{counted(len(several), 'example')} explained in {out}")


def page_title(config: Config, split: str, count: int) -> str:
    """Which run, and which of its examples."""
    examples = counted(count, "example")
    if config.ids:
        return f"{config.run}: {examples}, as chosen"
    return f"{config.run}: {examples} of {split}" + (", largest loss first" if config.worst is not None else "")


def check(config: Config) -> None:
    """Raise InputError naming the first flag that makes no sense, before anything is loaded."""
    if (config.image is None) != (config.text is None):
        given, missing = ("image", "text") if config.text is None else ("text", "image")
        raise InputError(f"--{given}: a meme is a picture and a text; give --{missing} too")
    ways = [name for name in ("image", "ids", "split") if getattr(config, name)]
    if config.image is not None and len(ways) > 1:
        raise InputError(f"--image: explains one meme; leave --{ways[1]} out")
    if config.ids and config.split:
        raise InputError("--ids: names examples of any split; leave --split out")
    if config.worst is not None and not config.split and config.worst >= 1:
        raise InputError("--worst: of which split? give --split too")
    if not ways and not config.summary:
        raise InputError("--image: nothing to explain; give --image and --text, or --ids, or --split, or --summary")
    if config.image is not None and config.summary:
        raise InputError("--summary: is of a split; leave --image out, or ask for it in a command of its own")
    if config.rank is not None and config.image is None and not config.maps:
        raise InputError(f"--rank {config.rank}: says what is mapped; give --maps too, or --image and --text")
    if config.text is not None and any("\ud800" <= letter <= "\udfff" for letter in config.text):
        raise InputError(f"--text {printable(config.text)[:60]}: holds bytes that are no UTF-8; type the words again")
    if config.text is not None and not config.text.strip():
        raise InputError("--text: is empty; give the words that stand on the meme")
    if config.worst is not None and config.worst < 1:
        raise InputError(f"--worst {config.worst}: give a number from 1 up")
    for name, least in (("rank", 1), ("output", 0), ("fold", 0), ("neighbours", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: give a number from {least} up")
    if config.out is not None and config.out.is_dir():
        raise InputError(f"--out {config.out}: is a folder; name the file to write")
    suffix = ".html" if config.image is None else ".png"
    is_one = len(config.ids) == 1 and config.out is not None and config.out.suffix.lower() == ".png"  # of tokens
    if config.out is not None and config.out.suffix.lower() != suffix and not is_one:
        raise InputError(f"--out {config.out}: what is written is a {suffix} file; name it so")
    if config.out is not None and config.image is not None and config.out.resolve() == config.image.resolve():
        raise InputError(f"--out {config.out}: is the picture itself; name another file")


def default_path(folder: Path, what: str, kind: str) -> Path:
    """explanations/RUN-WHAT.KIND, of characters that any file system takes."""
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "meme" for name in (folder.resolve().name, what)]
    return Path("explanations") / f"{'-'.join(names)}.{kind}"


def run(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
