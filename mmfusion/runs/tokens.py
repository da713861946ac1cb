"""What a run says of a model of tokens: what each modality is worth, where its tokens lie, how they are matched."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmfusion.dataset import Dataset, Split, Task
from mmfusion.losses.optimal_transport import cosine_cost
from mmfusion.losses.transport_plans import effective_tokens, ipot, marginals
from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.tasks import probabilities, task_scores
from mmfusion.models.decomposition import variance_share
from mmfusion.models.temporal_lmf import TemporalFusion
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.models.tokens import TokenOutput, draw_tokens, masked_mean
from mmfusion.runs.missing import SCORES
from mmfusion.sequences import Sequences, chunks, token_counts


@dataclass(frozen=True)
class TokenReport:
    """Of S members on one part of the data."""

    part: str
    examples: int
    whole: dict[str, list[float]]
    """{score: (S,)}"""
    without: dict[str, dict[str, list[float]]]
    """{modality: the same scores where its tokens are hidden}"""
    variance: dict[str, list[float]]
    """{modality: (S,)} variance of the last layer's tokens, mean over channels, in units of their mean square: 0 where
    all tokens are equal, 1 where they have no mean"""
    distance: dict[str, list[float]]
    """{pair: (S,)} mean transport cost between the modalities' tokens in the last layer: cosine distance, 0 to 2"""
    effective: dict[str, list[float]]
    """{pair: (S,)} tokens that a token is spread over by those plans: 1 where they match one to one"""
    part_share: dict[str, list[float]]
    """{subset of modalities: (S,)} share of the output's variance, of LMF over pairs of tokens; else empty"""


@torch.inference_mode()
def token_report(dataset: Dataset, ensemble: TokenEnsemble, part: str) -> TokenReport:
    """What `ensemble`, members of one fold, makes of the tokens of the labelled split `part`."""
    split, modalities = dataset.splits[part], list(ensemble.shape["input_dims"])
    found = [measure_tokens(member, split, dataset.task) for member in ensemble.members]
    target = split.target.numpy()

    def scores(hidden: str | None) -> dict[str, list[float]]:
        p = probabilities(torch.stack([one.outputs[hidden] for one in found]), dataset.task).numpy()
        by_name = task_scores(p, target, dataset.task, SCORES[dataset.task], resamples=0)
        return {name: by_name[name].members for name in SCORES[dataset.task]}

    def column(name: str) -> dict[str, list[float]]:
        return {key: [getattr(one, name)[key] for one in found] for key in getattr(found[0], name)}

    return TokenReport(
        part,
        len(split),
        scores(None),
        {name: scores(name) for name in modalities},
        *(column(name) for name in ("variance", "distance", "effective", "part_share")),
    )


@dataclass(frozen=True)
class Measured:
    """Of one member."""

    outputs: dict[str | None, Tensor]
    """(N, O) with nothing hidden, and with each modality hidden"""
    variance: dict[str, float]
    distance: dict[str, float]
    effective: dict[str, float]
    part_share: dict[str, float]


@torch.inference_mode()
def measure_tokens(member: torch.nn.Module, split: Split, task: Task) -> Measured:
    """What one member makes of the tokens of a split."""
    modalities = list(member.modalities)
    order = token_counts(split.features).argsort(stable=True)
    outputs: dict[str | None, list[Tensor]] = {name: [] for name in (None, *modalities)}
    moments = {name: [0.0, 0.0, 0.0] for name in modalities}  # tokens, sum, sum of squares
    pairs = list(itertools.combinations(modalities, 2))
    costs, spreads = {pair: [] for pair in pairs}, {pair: [] for pair in pairs}
    for features in chunks(split.features, order):
        output: TokenOutput = member(features)
        outputs[None].append(output.prediction)
        for name in modalities:
            gone = {name: torch.zeros(len(output.prediction))}
            outputs[name].append(member(features, present=gone).prediction)
            x, mask = output.layers[-1][name]
            own = x[mask.bool()].double()
            moments[name] = [
                a + b for a, b in zip(moments[name], (len(own), own.sum(0), own.square().sum(0)), strict=True)
            ]
        for pair in pairs:
            (x, x_mask), (y, y_mask) = (output.layers[-1][name] for name in pair)
            cost = cosine_cost(x, y)
            plan = ipot(cost, marginals(x_mask), marginals(y_mask))
            both = x_mask.any(-1) & y_mask.any(-1)
            costs[pair].append((plan * cost).sum((-2, -1))[both])
            spreads[pair].append(effective_tokens(plan)[both])
    back = order.argsort()
    named = {" - ".join(pair): pair for pair in pairs}
    return Measured(
        {name: torch.cat(rows)[back] for name, rows in outputs.items()},
        {name: _relative_variance(*moments[name]) for name in modalities},
        {name: torch.cat(costs[pair]).mean().item() for name, pair in named.items()},
        {name: torch.cat(spreads[pair]).mean().item() for name, pair in named.items()},
        part_shares(member, split.features, task) if isinstance(member, TemporalFusion) else {},
    )


@torch.inference_mode()
def part_shares(member: TemporalFusion, features: Mapping[str, Sequences], task: Task) -> dict[str, float]:
    """cov(part, output) / var(output) of what each subset of modalities says, about the examples' mean latents.

    They sum to 1. Class logits are taken relative to their mean over classes.
    """
    rows = torch.arange(len(features[member.modalities[0]]))
    sums = [0.0] * len(member.modalities)
    for part in chunks(features, rows):
        sums = [s + masked_mean(z, mask).sum(0) for s, z, mask in zip(sums, *member.latents(part), strict=True)]
    means = [s / len(rows) for s in sums]
    found = [member.fusion.parts(*member.latents(part), means) for part in chunks(features, rows)]
    parts = {subset: torch.cat([one[subset] for one in found]) for subset in found[0]}
    if task == "multiclass":
        parts = {subset: part - part.mean(-1, keepdim=True) for subset, part in parts.items()}
    whole = sum(parts.values()).squeeze(-1)
    return {
        " x ".join(member.modalities[m] for m in subset): variance_share(part.squeeze(-1), whole)
        for subset, part in parts.items()
        if subset
    }


@torch.inference_mode()
def token_cloud(member: torch.nn.Module, split: Split) -> dict[str, np.ndarray]:
    """(N, W) per modality: one token of the last layer of each example, drawn with the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(split), len(split.features), generator=generator)
    drawn: dict[str, list[Tensor]] = {}
    start = 0
    for features in chunks(split.features, torch.arange(len(split))):
        tokens = member(features).layers[-1]
        stop = start + len(next(iter(tokens.values())).mask)
        values, masks = ({name: x[k] for name, x in tokens.items()} for k in range(2))
        for name, x in draw_tokens(values, masks, uniforms[start:stop]).items():
            drawn.setdefault(name, []).append(x)
        start = stop
    return {name: torch.cat(parts).numpy() for name, parts in drawn.items()}


def _relative_variance(count: int, total: Tensor, squares: Tensor) -> float:
    mean_square = squares / max(count, 1)
    return float(((mean_square - (total / max(count, 1)).square()).mean() / mean_square.mean().clamp_min(1e-12)).item())


def print_tokens(report: TokenReport, task: Task) -> None:
    """The report as tables, mean +- std over the members."""
    seeds = len(next(iter(report.whole.values())))
    spread = f" (mean +- std over {counted(seeds, 'seed')})" if seeds > 1 else ""
    print(f"\nwhat a modality's tokens are worth on {report.part}, n = {report.examples}{spread}")
    rows = {"all tokens": report.whole, **{f"without {name}'s": one for name, one in report.without.items()}}
    width = max(24, *map(len, rows))
    print(f"{'':{width}}" + "".join(f"  {name:^16}" for name in report.whole))
    for label, scores in rows.items():
        print(f"{label:{width}}" + "".join(f"  {mean_std(score):16}" for score in scores.values()).rstrip())
    print("\ntokens of the last layer")
    for name, values in report.variance.items():
        print(f"{f'variance of {name}':{width}}  {mean_std(values)}  of their mean square (0: all are equal)")
    for name, values in report.distance.items():
        print(f"{f'transport, {name}':{width}}  {mean_std(values)}  cosine distance")
        print(f"{'  a token meets':{width}}  {mean_std(report.effective[name])}  tokens")
    if report.part_share:
        said = {"binary": "logit", "regression": "prediction"}.get(task, "logits")
        print(f"\nwhere the variance of the {said} comes from (exact: the parts of each prediction sum to its {said})")
        for name, values in report.part_share.items():
            print(f"{name + (' together' if ' x ' in name else ' alone'):{width}}  {mean_std(values)}")
    total = np.mean([np.mean(values) for values in report.variance.values()])
    if total < 0.05:
        print("note: the tokens have collapsed: nearly all of them are one vector; lower --transport-weight")
