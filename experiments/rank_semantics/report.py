"""Result, answer, table, numbers and figure."""

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.rank_semantics.components import per_seed
from experiments.rank_semantics.lexicon import Probe
from experiments.rank_semantics.planted_factors import Recovery
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.format import mean_std
from mmfusion.models.identifiability import EXACT
from mmfusion.training.grid import by_repeat

SAME = 0.9  # matched correlation from which terms pass for the same


@dataclass
class SemanticsResult:
    """All that the table and the figure show."""

    share: np.ndarray  # (K, S, F) of the prediction's variance
    std: np.ndarray  # (K, S, F) of the components, in standard deviations of the prediction's target
    lost: np.ndarray  # (K, S, n) of the score, where a component is replaced by its training mean
    stable: dict[str, tuple[np.ndarray, np.ndarray]]  # {what: (F, S, S) own, null}
    probes: dict[str, Probe]
    two: bool  # two modalities
    change: float  # of the function by other terms, in its standard deviations, largest over seeds
    after: np.ndarray  # (S,) matched correlation of the layers' terms and those
    kruskal: float  # share of layers in which the condition holds
    smallest: float  # singular value of the factors
    planted: dict[int, Recovery]
    components: str  # what they are


def raw_verdict(result: SemanticsResult) -> str:
    """What is identified of the layers' own rank terms."""
    if result.two:
        unidentified = result.change < EXACT and result.after.mean() < SAME
        return (
            f"raw rank terms {'are not identified' if unidentified else 'were not shown to be arbitrary'}: random "
            f"mixings change the function by {result.change:.0e} of its std, and leave a matched correlation of "
            f"{result.after.mean():.2f}"
        )
    return (
        f"Kruskal's condition, under which the terms are unique, holds in {result.kruskal:.0%} of the layers; shaken "
        f"and refitted to the same function (within {result.change:.0e} of its std) their matched correlation is "
        f"{result.after.mean():.2f}"
    )


def answer(result: SemanticsResult) -> str:
    """One sentence of numbers."""
    own, null = (per_seed(x).mean() for x in result.stable["components"])
    given = per_seed(result.stable["given the prediction"][0]).mean()
    text = (
        f"{result.components.capitalize()} of two starts, matched, correlate {own:.2f} (permuted {null:.2f}; "
        f"{given:.2f} given the prediction)"
    )
    if result.probes:
        name, one = max(result.probes.items(), key=lambda item: (item[1].partial_association - item[1].null).mean())
        text += (
            f"; the probe told best is {name}, {one.partial_association.mean():.2f} (permuted {one.null.mean():.2f})"
        )
    return f"{text}; {raw_verdict(result)}."


def table(result: SemanticsResult, data: FoldedDataset) -> str:
    """Fixed width, mean +- std over seeds: components, stability, probes, planted factors."""
    unit_of = "logits" if data.task == "binary" else "target std"
    lines = [
        f"{result.components}, strongest first; mean +- std over seeds and repeats",
        f"{'':4}{f'std ({unit_of})':>20}{'share of variance':>20}{'score lost without':>20}",
    ]
    for k, lost in enumerate(result.lost):
        cells = [
            mean_std(by_repeat(data, x), digits) for x, digits in ((result.std[k], 3), (result.share[k], 3), (lost, 4))
        ]
        lines.append(f"{k + 1:<4}" + "".join(f"{cell:>20}" for cell in cells))
    lines += ["", f"{'matched |correlation| of two starts':36}{'own':>18}{'permuted':>18}"]
    for kind, pairs in result.stable.items():
        lines.append(f"{kind:36}" + "".join(f"{mean_std(per_seed(x)):>18}" for x in pairs))
    how = "mixing" if result.two else "refit"
    lines.append(f"{f'raw terms before and after a {how}':36}{mean_std(result.after):>18}")
    if result.probes:
        head = (
            f"{'probe':12}{'told best':>18}{'permuted':>18}{'p (permuted)':>14}{'one over starts':>18}{'permuted':>18}"
        )
        lines += ["", f"{head}   best component 1 .. {len(result.share)}"]
    for name, one in result.probes.items():
        shares = " ".join(f"{share:.2f}" for share in best_shares(one, len(result.share)))
        told = [mean_std(by_repeat(data, x)) for x in (one.partial_association, one.null)]
        alike = [mean_std(per_seed(x)) for x in (one.same, one.same_null)]
        lines.append(f"{name:12}{told[0]:>18}{told[1]:>18}{one.p:14.3f}{alike[0]:>18}{alike[1]:>18}   {shares}")
    for (a, b), share in distinct(result).items():
        lines.append(f"{a} and {b}: told best by different components in {share:.0%} of trainings")
    if result.planted:
        lines += ["", f"{'planted factors, similarity':28}{'R^2':>18}{'raw':>18}{'canonical':>18}{'random (95 %)':>18}"]
    for m, one in result.planted.items():
        canonical = "-" if one.canonical is None else mean_std(one.canonical)
        cells = (mean_std(one.r2), mean_std(one.raw), canonical, f"{one.null:.3f} ({one.null95:.3f})")
        lines.append(f"{f'{m} modalities':28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def best_shares(one: Probe, count: int) -> np.ndarray:
    """(K,) share of trainings (seeds x folds x outputs) in which each component tells the probe best."""
    return np.bincount(one.best.ravel(), minlength=count) / one.best.size


def distinct(result: SemanticsResult) -> dict[tuple[str, str], float]:
    """{(probe, probe): share of trainings in which different components tell them best}."""
    pairs = itertools.combinations(result.probes.items(), 2)
    return {(a, b): float((x.best != y.best).mean()) for (a, x), (b, y) in pairs}


def numbers(result: SemanticsResult) -> dict[str, object]:
    """Everything in the table, JSON-able; lists over seeds, and folds."""
    entries = {
        "std": result.std.tolist(),
        "share": result.share.tolist(),
        "score lost": result.lost.mean(-1).tolist(),
        "stability": {kind: [per_seed(x).tolist() for x in pairs] for kind, pairs in result.stable.items()},
        "probes": {
            name: {
                "told": one.partial_association.tolist(),
                "permuted": one.null.tolist(),
                "p": one.p,
                "one over starts": [per_seed(x).tolist() for x in (one.same, one.same_null)],
                "best": one.best.tolist(),
            }
            for name, one in result.probes.items()
        },
        "different best components": {f"{a}, {b}": share for (a, b), share in distinct(result).items()},
        "other terms": {"largest change": result.change, "matched correlation": result.after.tolist()},
        "kruskal": {"share of layers": result.kruskal, "smallest singular value": result.smallest},
    }
    for m, one in result.planted.items():
        entries[f"planted, {m} modalities"] = {
            key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in one._asdict().items()
        }
    return entries


# ---- figure ------------------------------------------------------------------------------------------------------


def draw(figure: Figure, data: FoldedDataset, result: SemanticsResult) -> None:
    """Stability, ablation, probes, planted factors; a dot per seed, a bar for the mean, a line for chance."""
    stable = {kind: (per_seed(own), per_seed(null).mean()) for kind, (own, null) in result.stable.items()}
    stable["before/after mixing" if result.two else "before/after refit"] = (result.after, None)
    axes = iter(figure.subplots(1, 2 + bool(result.probes) + bool(result.planted), squeeze=False)[0])
    bars(
        next(axes),
        {kind.replace(" ", "\n").replace("/", "/\n"): values for kind, values in stable.items()},
        f"{result.components} of two starts",
        "matched |correlation|",
        (0, 1.05),
    )
    lost = {f"{k + 1}": (by_repeat(data, x), None) for k, x in enumerate(result.lost)}
    axis = next(axes)
    bars(axis, lost, "one component dropped", f"{data.score_name} lost on test", None)
    axis.set_xlabel("component, strongest first")
    axis.axhline(0, color="black", linewidth=0.8)
    if result.probes:
        partial_association = {
            name: (by_repeat(data, one.partial_association), one.null.mean()) for name, one in result.probes.items()
        }
        bars(
            next(axes), partial_association, "told by the best component", "association given the prediction", (0, None)
        )
    if result.planted:
        cells = {}
        for m, one in result.planted.items():
            cells[f"{m} modal.\nraw"] = (one.raw, one.null)
            if one.canonical is not None:
                cells[f"{m} modal.\ncanonical"] = (one.canonical, one.null)
        bars(next(axes), cells, "planted factors recovered", "similarity to the planted", (0, 1.05))
    figure.suptitle(f"{data.name}: rank factors (bar: mean; dots: seeds; dashed: chance)")


def bars(
    axis: Axes,
    cells: dict[str, tuple[np.ndarray, float | None]],
    title: str,
    label: str,
    limits: tuple[float, float | None] | None,
) -> None:
    """A bar for each label: mean of the seeds' values, the values themselves, and chance where there is one."""
    for x, (values, chance) in enumerate(cells.values()):
        axis.bar(x, values.mean(), color="C0", alpha=0.35, width=0.7)
        axis.plot(x + np.linspace(-0.15, 0.15, len(values)), values, "o", color="C0", markersize=3)
        if chance is not None:
            axis.plot([x - 0.4, x + 0.4], [chance] * 2, "--", color="C3", linewidth=1.5)
    axis.set_xticks(range(len(cells)), list(cells))
    axis.set(title=title, ylabel=label, ylim=limits)
