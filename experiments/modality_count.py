"""How does alignment fall with the number of modalities, and does a hub mitigate it?

    python -m experiments.modality_count --dataset arrays --data mfeat_digits.npz --target digit --hold-out 0.5

Every subset of two modalities or more is aligned by symmetric InfoNCE, once between all its pairs and once between each
of its modalities and the first by name, the hub; seeds, batches and number of steps are the same.

R@1 is the mean over the ordered pairs of a subset, then over all subsets of one size: every pair counts alike at every
size, so that what changes is its company. Capacity is not shared between subsets, since each modality has its own
encoder: what can fall is what an encoder gives up for the sake of others.

Verdict: R@1 at all modalities is lower than at two, and the hub's is higher than that of all pairs there; both must
hold. Whether it falls on a line or on an exponential is told where the data can.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import curve_fit
from scipy.stats import t as student

from experiments.alignment_scores import retrieved_rows
from experiments.experiment import Experiment, Options, Outcome, Run, contrasts_on_test, main
from mmfusion.data.folds import FoldedDataset
from mmfusion.errors import InputError, check_numbers
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.verdicts import Difference, verdict_of
from mmfusion.models.alignment import AlignmentEnsemble
from mmfusion.training.align import AlignmentTraining, Weighting, align

FORMS = ("pairs", "hub")
MOST = 6  # 57 subsets; seven have 120
EFFECT = 0.05  # of the R@1 of two modalities


@dataclass(frozen=True)
class CountOptions(Options):
    """Flags of this experiment."""

    width: int = 32
    """of the shared space"""


Subset = tuple[str, ...]


def check(data: FoldedDataset, options: CountOptions) -> None:
    """Raise InputError for a flag out of range, or more modalities than subsets can be trained of."""
    check_numbers(options, {"width": (1, 65536)})
    if len(data.input_dims) > MOST:
        raise InputError(f"{data.name}: has {len(data.input_dims)} modalities; choose 3 to {MOST} by --modalities")


def trained_on(data: FoldedDataset, run: Run, form: str, subset: Subset) -> AlignmentEnsemble:
    """The modalities of a subset aligned in one of the forms."""
    options: CountOptions = run.options
    training = AlignmentTraining(
        options.width,
        hidden_dim=options.hidden_dim,
        seeds=options.seeds,
        epochs=options.epochs or 20,
        keep="last",
        options={"info_nce": {"hub": subset[0]}} if form == "hub" else {},
    )
    # the last epoch is kept: a few examples of dev do, which every epoch is scored on
    few = replace(data, folds=[fold._replace(dev=fold.dev[:20]) for fold in data.folds])
    contrast = Weighting(form, {"info_nce": 1.0})
    number = "-".join(str(sorted(data.input_dims).index(name)) for name in subset)
    checkpoint = run.checkpoints / f"{form}-{number}.safetensors"
    return align(few, [contrast], training, modalities=subset, device=run.device, checkpoint=checkpoint)[form]


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train every subset in both forms, and compare sizes and forms on the test examples."""
    names = sorted(data.input_dims)
    sizes = range(2, len(names) + 1)
    subsets = [subset for size in sizes for subset in itertools.combinations(names, size)]
    recalls = {}
    for form, subset in itertools.product(FORMS, subsets):
        if form == "pairs" or len(subset) > 2:  # of two modalities the forms are one
            print(f"{form}: {', '.join(subset)}", flush=True)
            recalls[form, subset] = recall(data, trained_on(data, run, form, subset), subset)
    found = {
        form: {
            size: np.mean([of for key, of in recalls.items() if key in wanted(form, size, names)], 0) for size in sizes
        }
        for form in FORMS
    }
    last = len(names)
    named = {
        f"R@1 of pairs: 2 over {last} modalities": Difference(
            found["pairs"][2] - found["pairs"][last], "alignment falls with the number of modalities"
        ),
        f"R@1 at {last} modalities: hub over pairs": Difference(
            found["hub"][last] - found["pairs"][last], "a hub mitigates it"
        ),
    }
    effect = max(1e-4, EFFECT * float(found["pairs"][2].mean()))
    contrasts = contrasts_on_test(data, named, effect)
    curve = {form: {size: of.mean(1) for size, of in by_size.items()} for form, by_size in found.items()}
    shape = shape_of_fall(curve["pairs"])
    answer = "; ".join(f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}] ({c.verdict})" for c in contrasts)
    return Outcome(
        table(curve, 1 / np.mean([len(fold.test) for fold in data.folds])),
        contrasts,
        verdict_of(contrasts),
        answer + ".",
        {"R@1": {form: {str(size): of.tolist() for size, of in sizes.items()} for form, sizes in curve.items()}},
        lambda figure: draw(figure, data, curve),
        (7.0, 4.6),
        [shape],
    )


def wanted(form: str, size: int, names: list[str]) -> set[tuple[str, Subset]]:
    """The rows of a form and size."""
    form = "pairs" if size == 2 else form
    return {(form, subset) for subset in itertools.combinations(names, size)}


@torch.inference_mode()
def recall(data: FoldedDataset, ensemble: AlignmentEnsemble, subset: Subset) -> np.ndarray:
    """(S, n) R@1 of the test examples, mean over the ordered pairs of a subset."""
    folds = []
    for f, fold in enumerate(data.folds):
        features = {name: data.pool.features[name][fold.test] for name in subset}
        members = ensemble.part(f, len(data.folds)).members
        folds.append(np.stack([retrieved_rows(member.encode(features), {})[0] for member in members]))
    return np.concatenate(folds, 1)


def shape_of_fall(curve: Mapping[int, np.ndarray]) -> str:
    """Whether a line or an exponential fits R@1 (S,) by size better, by the seeds' difference in squared error."""
    sizes = np.array(sorted(curve), float)
    if len(sizes) < 4:
        return "three sizes or fewer: a line and an exponential cannot be told apart"
    seeds = np.stack([curve[int(size)] for size in sizes], 1)  # (S, sizes)
    differences = []
    for values in seeds:
        line = values - np.polyval(np.polyfit(sizes, values, 1), sizes)
        start = (values[0], 0.1)
        (height, rate), _ = curve_fit(lambda m, a, b: a * np.exp(-b * (m - 2)), sizes, values, start, maxfev=10_000)
        exponential = values - height * np.exp(-rate * (sizes - 2))
        differences.append((np.square(line).sum() - np.square(exponential).sum()) / np.square(values).sum())
    mean, error = np.mean(differences), np.std(differences, ddof=1) / np.sqrt(len(differences))
    half = student.ppf(0.975, len(differences) - 1) * error
    better = "an exponential" if mean > 0 else "a line"
    told = f"{better} fits better" if abs(mean) > half else "a line and an exponential cannot be told apart"
    return f"shape of the fall: {told} (squared error of the line less the exponential's {mean:+.1e} +- {half:.1e})"


def table(curve: Mapping[str, Mapping[int, np.ndarray]], chance: float) -> str:
    """One line per form: R@1 by number of modalities, mean +- std over seeds."""
    sizes = list(curve["pairs"])
    lines = [f"R@1, mean over subsets (chance {chance:.4f})"]
    lines.append(f"{'modalities':12}" + "".join(f"  {size:^16}" for size in sizes))
    lines.extend(f"{form:12}" + "".join(f"  {mean_std(of[size]):16}" for size in sizes) for form, of in curve.items())
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, curve: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    """R@1 by number of modalities, a line per form, error bars over seeds."""
    axis = figure.subplots()
    for form, color in zip(FORMS, ("#1f6fb4", "#d9741a"), strict=True):
        sizes, values = list(curve[form]), np.stack(list(curve[form].values()), 1)
        axis.errorbar(sizes, values.mean(0), values.std(0, ddof=1), fmt="o-", color=color, capsize=3, label=form)
    axis.set_xticks(sizes)
    axis.set_xlabel("modalities aligned")
    axis.set_ylabel("R@1, mean over pairs and subsets")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    figure.suptitle(f"{data.name}: alignment by the number of modalities (bars: std over seeds)")


EXPERIMENT = Experiment(
    "modality_count",
    "Alignment falls as modalities are added, and a hub mitigates it (expected by the geometric-alignment proposal).",
    "How does alignment fall with the number of modalities, and does a hub mitigate it?",
    measure,
    modalities=3,
    options=CountOptions,
    labels=False,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
