"""Which method recovers what? Data whose best accuracy is known, with the label on one kind of factor after another.

    python -m experiments.synthetic --seeds 5

shared: both modalities carry what decides the label. unique: each carries a half of it. synergy: the label hangs on a
product of two factors, one in each modality, and neither says anything alone. mix: all three, by the flags' shares; in
the other three columns the whole of these shares is of one kind. Then the published generators of
`mmfusion.data.synthetic_published`: "PID synergy" needs both modalities and yet no product; the exclusive or does.

The additive row is the sum of the logits of two models, of one modality each. What a method recovers is
(accuracy - chance) / (best accuracy - chance). Every method is trained by the common recipe, which drops modalities and
features in training, and, but for the lowest rank, without dropout as well: a product of two factors is gone with
either, so that the recipe hides what the layer can do.

Verdict, without dropout in either row: on "synergy" jWAE-LMF scores higher than the additive row, by the common rule.
On "shared" (control) it must not: where it does, the additive row is badly trained there too, and the gap is not one of
synergy: cannot tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import SCORE_EFFECT, Experiment, Options, Outcome, Run, main
from mmfusion.data.folds import FoldedDataset, fold_datasets, only
from mmfusion.data.registry import DatasetName, synthetic_config
from mmfusion.data.synthetic import synthetic
from mmfusion.data.synthetic_published import redundant_unique_synergic, xor_accuracy, xor_of_three
from mmfusion.data.synthetic_truth import PARTS, truth
from mmfusion.errors import InputError
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.scores import example_scores
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, corrected_contrasts
from mmfusion.training.grid import JWAE, PLAIN, Setting, per_example

RANK = 4
MAIN, LOWEST = f"jWAE-LMF, rank {RANK}", "LMF, rank 1"
CONCATENATION, ADDITIVE = "concatenation + MLP", "additive (logits summed)"
ALONE = ("first alone", "second alone")
NO_DROPOUT = ", no dropout"
MAIN_FREE, CONCATENATION_FREE, ADDITIVE_FREE = (row + NO_DROPOUT for row in (MAIN, CONCATENATION, ADDITIVE))
ROWS = (MAIN, MAIN_FREE, LOWEST, CONCATENATION, CONCATENATION_FREE, ADDITIVE, ADDITIVE_FREE, *ALONE)
PLANTED = ("shared", "unique", "synergy", "mix")
XOR_RATE = 0.5
EXAMPLES_OF_ALL = 10 / 7  # the published generators train on seven tenths


@dataclass(frozen=True)
class SyntheticOptions(Options):
    """Flags of this experiment."""

    dataset: DatasetName = "synthetic"
    """it draws its own data, by the flags --synthetic-..."""


@dataclass(frozen=True)
class Column:
    """One dataset and what can be reached on it."""

    name: str
    data: FoldedDataset
    bayes: float
    """the best accuracy"""
    additive: float | None
    """the best accuracy without products; None where it is not known"""
    chance: float


def columns(options: SyntheticOptions) -> list[Column]:
    """Every dataset. Raises InputError naming a flag out of range, or shares that leave a column nothing."""
    mix = synthetic_config(options)
    mix.check()
    signal = mix.shared + mix.unique + mix.synergy
    if signal < 0.01:
        raise InputError("--synthetic-shared, -unique and -synergy are 0: the label would be noise; raise one")
    found = []
    for name in PLANTED:
        shares = {} if name == "mix" else {part: signal * (part == name) for part in PARTS}
        config = replace(mix, **shares)
        known = truth(config)
        additive = known.additive.value
        found.append(Column(name, fold_datasets([synthetic(config)]), known.bayes.value, additive, 0.5))
    count, seed = round(EXAMPLES_OF_ALL * options.synthetic_examples), options.split_seed
    for kind in ("redundancy", "uniqueness", "synergy"):
        data = fold_datasets([redundant_unique_synergic(kind, count, seed)])
        found.append(Column(f"PID {kind}", data, 1.0, 1.0, 0.5))
    xor = fold_datasets([xor_of_three(XOR_RATE, n=count, seed=seed)])
    return [*found, Column("XOR", xor, xor_accuracy(XOR_RATE), None, xor_accuracy(0.0))]


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train every method on every column; contrasts are paired over seeds and test examples."""
    if run.options.dataset != "synthetic":
        raise InputError(f"--dataset {run.options.dataset}: its truth is not known; leave the flag out")
    there = columns(run.options)
    found = {column.name: scores_on(column, run) for column in there}
    named = {
        name: Difference(found[column][row] - found[column][other], statement, decides)
        for name, column, row, other, statement, decides in (
            ("synergy: over additive", "synergy", MAIN_FREE, ADDITIVE_FREE, "LMF recovers what a sum does not", True),
            ("shared: over additive (control)", "shared", MAIN_FREE, ADDITIVE_FREE, "the sum is badly trained", False),
            ("mix: over additive", "mix", MAIN_FREE, ADDITIVE_FREE, "LMF predicts better", False),
            ("synergy: over concatenation", "synergy", MAIN_FREE, CONCATENATION_FREE, "LMF recovers more", False),
            ("synergy: no dropout", "synergy", MAIN_FREE, MAIN, "LMF recovers more without dropout", False),
            ("mix: no dropout", "mix", MAIN_FREE, MAIN, "LMF predicts better without dropout", False),
            ("synergy, common recipe: over additive", "synergy", MAIN, ADDITIVE, "LMF recovers more", False),
        )
    }
    contrasts = corrected_contrasts(named, SCORE_EFFECT)
    verdict, notes = judged(contrasts)
    numbers = {
        column.name: {
            "best": column.bayes,
            "best additive": column.additive,
            "chance": column.chance,
            **{row: values.mean(1).tolist() for row, values in found[column.name].items()},
        }
        for column in there
    }
    return Outcome(
        table(there, found),
        contrasts,
        verdict,
        answer(there, found),
        numbers,
        lambda figure: draw(figure, there, found),
        (12.0, 4.6),
        notes,
    )


def judged(contrasts: Sequence[Contrast]) -> tuple[Verdict, list[str]]:
    """The verdict of the synergy contrast, unless the control shows that the additive row is simply worse."""
    synergy, control = contrasts[:2]
    if control.verdict == "supported":
        return "cannot tell", [
            f"the control failed: where a sum is enough the additive row is worse by {control.estimate:.3f}, so that "
            "its gap on synergy may be one of training"
        ]
    return synergy.verdict, []


def scores_on(column: Column, run: Run) -> dict[str, np.ndarray]:
    """{row: (S, n)} 1 where a test example is right, else 0."""
    data = column.data

    def both(row: str, rank: int = 1) -> list[Setting]:
        return [
            Setting(row, rank, JWAE),
            Setting(row + NO_DROPOUT, rank, JWAE, dropout={}, feature_dropout=0.0),
        ]

    grids = [
        run.grid(data, [*both(MAIN, RANK), Setting(LOWEST, 1, PLAIN)], f"{column.name} LMF"),
        run.grid(data, both(CONCATENATION), f"{column.name} concatenation", fusion="concatenation"),
    ]
    for row, modality in zip(ALONE, data.input_dims, strict=True):
        grids.append(run.grid(only(data, [modality]), both(row), f"{column.name} {row}"))
    predictions = {
        setting.label: values
        for grid in grids
        for setting, values in zip(grid.settings, grid.predictions(), strict=True)
    }
    predictions[ADDITIVE] = sum(predictions[row] for row in ALONE)
    predictions[ADDITIVE_FREE] = sum(predictions[row + NO_DROPOUT] for row in ALONE)
    return {row: per_example(data, predictions[row], "test", example_scores) for row in ROWS}


def recovered(column: Column, accuracies: np.ndarray) -> np.ndarray:
    """(S,) shares of what is above chance; 0 and 1 are chance and the best accuracy, and samples go beyond both."""
    return (accuracies - column.chance) / (column.bayes - column.chance)


def table(there: Sequence[Column], found: dict[str, dict[str, np.ndarray]]) -> str:
    """Accuracy, and below it the share recovered: a line per method, a column per dataset."""
    rows = list(found["mix"])
    label = max(map(len, [*rows, "best without products"]))
    head = " " * label + "".join(f"  {column.name:15}" for column in there)
    known = {
        "best possible": [f"{column.bayes:.3f}" for column in there],
        "best without products": ["-" if column.additive is None else f"{column.additive:.3f}" for column in there],
        "chance": [f"{column.chance:.3f}" for column in there],
    }
    accuracies = {row: [mean_std(found[column.name][row].mean(1)) for column in there] for row in rows}
    shares = {
        row: [mean_std(recovered(column, found[column.name][row].mean(1)), 2) for column in there] for row in rows
    }
    lines = ["accuracy, mean +- std over seeds", head, *_lines(accuracies | known, label)]
    lines += ["", "share recovered: (accuracy - chance) / (best possible - chance)", head, *_lines(shares, label)]
    return "\n".join(line.rstrip() for line in lines)


def _lines(cells: dict[str, list[str]], label: int) -> list[str]:
    return [f"{row:{label}}" + "".join(f"  {cell:15}" for cell in own) for row, own in cells.items()]


def answer(there: Sequence[Column], found: dict[str, dict[str, np.ndarray]]) -> str:
    """What is recovered of synergy and of what is shared."""
    by_name = {column.name: column for column in there}
    parts = []
    for name in ("synergy", "shared"):
        shares = {row: recovered(by_name[name], found[name][row].mean(1)) for row in (MAIN_FREE, ADDITIVE_FREE, MAIN)}
        parts.append(f"{name}: " + ", ".join(f"{row} {mean_std(values, 2)}" for row, values in shares.items()))
    return f"Share recovered of {'; of '.join(parts)}."


def draw(figure: Figure, there: Sequence[Column], found: dict[str, dict[str, np.ndarray]]) -> None:
    """Accuracy by dataset and method, a dot per seed, between chance and the best possible."""
    axis = figure.subplots()
    rows = list(found["mix"])
    for place, column in enumerate(there):
        ends = [place - 0.4, place + 0.4]
        axis.plot(ends, [column.bayes] * 2, color="black", label="best possible" if place == 0 else None)
        if column.additive is not None:
            axis.plot(ends, [column.additive] * 2, ":", color="black", label="without products" if not place else None)
        axis.plot(ends, [column.chance] * 2, "--", color="#8a8a8a", label="chance" if place == 0 else None)
        for k, row in enumerate(rows):
            seeds = found[column.name][row].mean(1)
            x = np.full(len(seeds), place - 0.3 + 0.6 * k / (len(rows) - 1))
            axis.plot(x, seeds, "o", color=f"C{k}", alpha=0.6, markersize=5, label=row if place == 0 else None)
    axis.set_xticks(range(len(there)), [column.name for column in there], rotation=15)
    axis.set(ylabel="accuracy on the test examples", title="which method recovers what (dots: seeds)")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def refuse_cuts(_: object, options: SyntheticOptions) -> None:
    """Raise InputError where the data that it draws are to be cut anew."""
    if options.cross_validate is not None:
        raise InputError(f"--cross-validate {options.cross_validate}: synthetic draws its own data; leave the flag out")


EXPERIMENT = Experiment(
    "synthetic",
    "LMF recovers synergy that additive fusion cannot (announced, no claim).",
    "Which method recovers what, of shared, unique and synergistic factors whose best accuracy is known?",
    measure,
    modalities=2,
    options=SyntheticOptions,
    check=refuse_cuts,
)

if __name__ == "__main__":
    main(EXPERIMENT)
