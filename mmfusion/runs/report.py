"""Report of a run: rank factors and printed tables (its figure: mmfusion.runs.figure)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.dataset import Dataset, Split, Task
from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.scores import Score
from mmfusion.metrics.tasks import TABLE_SCORES
from mmfusion.models.decomposition import recentred_parts, variance_share
from mmfusion.models.fusion import FusionModel
from mmfusion.runs.missing import MissingReport


@dataclass(frozen=True)
class RankReport:
    """How the logits of S members come about on N examples; ranks in descending order of `share` in each member."""

    weight: np.ndarray
    """(S, R) rank weights w_r; their scale alone is not identified"""
    strength: np.ndarray
    """(S, R) |w_r| prod_m ||[A_m[r], c_m[r]]||, which no rescaling of the factors changes"""
    share: np.ndarray
    """(S, R) cov(term_r, logit) / var(logit): the ranks of a member sum to 1; negative where a term works against"""
    spectrum: np.ndarray
    """(S, R) canonical interaction spectrum, descending: std of each canonical component in logits; (0,) unless there
    are two modalities and one output"""
    part_share: dict[str, np.ndarray]
    """(S,) per subset of modalities: cov(part, logit) / var(logit); sums to 1 over the subsets"""
    bias: np.ndarray
    """(S,) or (S, O) the constant part: what the model says at the mean latents"""


@torch.inference_mode()
def rank_report(members: Sequence[FusionModel], features: Mapping[str, Tensor], task: Task = "binary") -> RankReport:
    """Account for the outputs of LMF members, of two modalities or more, on features (N, d_m).

    Shares of several outputs are of their summed variance. Class logits are taken relative to their mean over classes:
    a constant added to all of them changes no probability.
    """
    columns: dict[str, list] = {"weight": [], "strength": [], "share": [], "spectrum": [], "bias": []}
    parts: dict[str, list[float]] = {}
    for member in members:
        latents = [z.double() for z in member.latents(features)]  # (N, L) each
        layer = deepcopy(member.fusion).double()
        output = _identified(layer(latents), task)  # (N,) or (N, O)
        terms = layer.rank_terms(latents)  # (N, R, O)
        share = np.array([variance_share(_identified(terms[:, r], task), output) for r in range(layer.rank)])
        order = np.argsort(-share)
        columns["weight"].append((layer.rank_weights * layer.rank_mask).numpy()[order])
        strength = layer.rank_strength()  # (R, O)
        strength = strength.squeeze(-1) if strength.shape[-1] == 1 else torch.linalg.vector_norm(strength, dim=-1)
        columns["strength"].append(strength.numpy()[order])
        columns["share"].append(share[order])
        if len(latents) == 2 and output.ndim == 1:
            spectrum = layer.canonical_factors([z.T.cov() for z in latents]).spectrum
            columns["spectrum"].append(spectrum.squeeze(0).numpy())
        for subset, part in recentred_parts(layer, latents).items():
            part = _identified(part, task)
            if subset:
                name = " x ".join(member.modalities[m] for m in subset)
                parts.setdefault(name, []).append(variance_share(part, output))
            else:
                columns["bias"].append(part[0].tolist() if part.ndim > 1 else part.mean().item())
    return RankReport(
        **{k: np.array(v) for k, v in columns.items()}, part_share={k: np.array(v) for k, v in parts.items()}
    )


def _identified(output: Tensor, task: Task) -> Tensor:
    """(N, O) -> (N,) of one output; class logits less their mean over classes."""
    if task == "multiclass":
        return output - output.mean(-1, keepdim=True)
    return output.squeeze(-1) if output.shape[-1] == 1 else output


# ---- printed tables ----------------------------------------------------------------------------------------------

OUT_OF_FOLD = "out_of_fold"
"""what the part is called that holds every fold's test examples, each predicted by models that have not seen it"""
CELL = len("0.998 +- 0.001 [0.993, 1.000]")
FEW = 5  # examples of a class that a selection split needs
MOST_PARTS = 12  # that are printed; of six modalities there are 63


def print_dataset(datasets: Sequence[Dataset], folder: Path, device: torch.device, selects: bool = True) -> None:
    """What is trained on, and whatever the reader of the scores must know; `selects`: epochs are selected."""
    dataset = datasets[0]
    noun = "memes" if "hateful" in dataset.class_names else "examples"
    if len(datasets) > 1:
        print(f"{len(datasets)} folds; sizes of the first:")
    for name, split in dataset.splits.items():
        print(f"{name:12} {len(split):6} {noun}  {_target_in_words(dataset, split)}".rstrip())
    widths = ", ".join(f"{name} {width}" for name, width in dataset.input_dims.items())
    print(f"features: {widths}; training on {device}; run in {folder}/")
    for note in [*dataset.notes, *(few_to_select_on(datasets) if selects else [])]:
        print(f"note: {note}")


def few_to_select_on(datasets: Sequence[Dataset]) -> list[str]:
    """A note where the selection split, of any fold, has hardly an example of some class; none of labels and values."""
    fewest: tuple[int, str, str] | None = None
    for dataset in datasets:
        if dataset.task in ("binary", "multiclass"):
            target = dataset.splits[dataset.selection].target.long()
            counts = torch.bincount(target, minlength=len(dataset.class_names))
            found = int(counts.min()), dataset.selection, dataset.class_names[int(counts.argmin())]
            fewest = found if fewest is None else min(fewest, found)
    if fewest is None or fewest[0] >= FEW:
        return []
    count, split, name = fewest
    name = name.removeprefix("class ")  # what classes without names are called
    return [f"{split} has {count} of class {name}: the selection is noise; give a larger {split} split"]


def _target_in_words(dataset: Dataset, split: Split) -> str:
    if split.target is None:
        return "unlabelled"
    if dataset.task == "binary":
        one = " (one class: not scored)" if len(split.target.unique()) < 2 else ""
        return f"{split.target.mean():.0%} positive{one}"
    if dataset.task == "multiclass":
        counts = torch.bincount(split.target.long(), minlength=len(dataset.class_names))
        return f"{len(dataset.class_names)} classes of {counts.min()} to {counts.max()}"
    if dataset.task == "multilabel":
        return f"{split.target.shape[1]} labels, {split.target.mean():.0%} of them present"
    columns = split.target.reshape(len(split), -1)
    return f"{counted(columns.shape[1], 'target')} from {columns.min():.3g} to {columns.max():.3g}"


def print_scores(
    dataset: Dataset,
    parts: Mapping[str, Split],
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]],
    ensemble_scores: Mapping[str, Mapping[str, Mapping[str, Score]]],
    thresholds: Mapping[str, object],
) -> None:
    """Scores {method: {part: {score: Score}}} as a fixed-width table; that of the main method's ensemble below its own.

    `thresholds`: of `mmfusion.runs.run.chosen_threshold`, or empty.
    """
    if not any(scores.values()):
        print("\nno part can be scored")
        return
    some = next(iter(next(iter(next(iter(scores.values())).values())).values()))
    of = f"mean +- std over {counted(len(some.members), 'seed')}" if len(some.members) > 1 else "1 seed"
    print(f"\n{of} [95 % bootstrap interval over examples{', of the mean' if len(some.members) > 1 else ''}]")
    rows: dict[str, Mapping] = {}
    for label, by_part in scores.items():
        rows[label] = by_part
        if label in ensemble_scores and label == next(iter(scores)):
            rows[f"  mean of its {len(some.members)} members"] = ensemble_scores[label]
    width = max(map(len, rows))
    for name in next(iter(scores.values())):
        shared = len(set(parts[name].ids) & set(dataset.splits[dataset.selection].ids)) if name != OUT_OF_FOLD else 0
        mark = f"  ({shared} of them also in {dataset.selection}, which is selected upon)" if shared else ""
        mark = "  (selected upon: optimistic)" if name == dataset.selection else mark
        print(f"\n{name}, n = {len(parts[name])}{mark}")
        shown = [score for score in TABLE_SCORES[dataset.task] if score in next(iter(scores.values()))[name]]
        print((f"{'':{width}}" + "".join(f"  {score:^{CELL}}" for score in shown)).rstrip())
        for label, by_part in rows.items():
            columns = (by_part[name][score] for score in shown)
            cells = "".join(f"  {mean_std(x.members, interval=(x.low, x.high)):{CELL}}" for x in columns)
            print(f"{label:{width}}{cells}".rstrip())
        if name in thresholds.get("scores", {}):
            found = ", ".join(f"{k} {mean_std(v.members)}" for k, v in thresholds["scores"][name].items())
            chosen = mean_std(thresholds["thresholds"], 2)
            print(f"{next(iter(rows))}, threshold chosen on {dataset.selection} ({chosen}, not .5): {found}")


def print_missing(missing: MissingReport, task: Task) -> None:
    """Scores without each modality beside those of the whole examples, and how much wider the answer is then."""
    seeds = len(next(iter(missing.whole.values())))
    spread = f" (mean +- std over {counted(seeds, 'seed')})" if seeds > 1 else ""
    print(f"\nwhat a missing modality costs on {missing.part}, n = {missing.examples}{spread}")
    print(f"(its latent is integrated out, as it is distributed over {counted(missing.reference, 'training example')})")
    rows = {"nothing missing": missing.whole, **{f"without {name}": one for name, one in missing.without.items()}}
    width, said = max(map(len, rows)), "value" if task == "regression" else "logit"
    names = "".join(f"  {name:^16}" for name in missing.whole)
    print(f"{'':{width}}{names}  std that it adds to the {said}")
    widening = [None, *missing.std.values()]
    for (label, scores), std in zip(rows.items(), widening, strict=True):
        cells = "".join(f"  {mean_std(score):16}" for score in scores.values())
        print(f"{label:{width}}{cells}  {'' if std is None else mean_std(std)}".rstrip())


def print_ranks(ranks: RankReport, split: str, task: Task) -> None:
    """The rank factors and the split of the logit's variance, as mean +- std over the members."""
    said = {"binary": "logit", "regression": "prediction"}.get(task, "logits")
    print(f"\nrank factors on {split} (mean +- std over seeds; in each seed, ranks sorted by their share)")
    canonical = len(ranks.spectrum) > 0
    print("rank        weight |w|          strength   share of variance" + "   canonical spectrum" * canonical)
    columns = (np.abs(ranks.weight), ranks.strength, ranks.share, *([ranks.spectrum] if canonical else []))
    for r in range(ranks.weight.shape[1]):
        print(f"{r + 1:4}  " + "  ".join(f"{mean_std(column[:, r]):>16}" for column in columns))
    print(f"\nwhere the variance of the {said} comes from (exact: the parts of each prediction sum to its {said})")
    largest = sorted(ranks.part_share, key=lambda name: -abs(ranks.part_share[name].mean()))
    shown = set(largest[:MOST_PARTS])
    width = max(24, *(len(name) + 10 for name in shown))
    for name, share in ranks.part_share.items():
        kind = "alone" if " x " not in name else "together"
        if name in shown:
            print(f"{name + ' ' + kind:{width}} {mean_std(share)}")
    if rest := largest[MOST_PARTS:]:
        print(f"{f'{len(rest)} others':{width}} {mean_std(sum(ranks.part_share[name] for name in rest))}")
    if ranks.bias.ndim == 1:
        print(f"{f'bias ({said}, no variance)':{width}} {mean_std(ranks.bias)}")
