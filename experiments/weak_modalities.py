"""Do weak modalities harm fusion? Every modality left out, every modality alone, and one of pure noise added.

    python -m experiments.weak_modalities --dataset cmu_mosi --data FILE --cross-validate 5 --repeats 2 --seeds 1

A modality that is left out is no part of the model: all of the recipe, its alignment and its modality dropout too, is
as if the data had come without it. Weak is, fold by fold, the modality that scores least alone on that fold's dev part,
mean over seeds; test examples have no say in it.

Claim, on AUROC or on log loss (regression: MAE or correlation; a route each): leaving out the weakest modality raises
the test score. "Not supported" where it lowers it, or raises it by less than an effect of interest.

Controls, which decide nothing: leaving out the strongest must lower the score, where the modalities say anything at
all; a modality of noise N(0, 1), as wide as the widest, says what a modality costs that is known to be useless; and
leaving out each one. A modality of real features that says nothing is had by `--plant dropout --plant-strength 0`: of
two otherwise, it is the weakest of every fold, and to leave it out must not lower the score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.experiment import Experiment, Outcome, Run, contrasts_on_test, main
from experiments.modality_subsets import Scores, chosen, label, on_dev
from mmfusion.data.folds import FoldedDataset, only
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS
from mmfusion.metrics.verdicts import Contrast, Difference, verdict_of
from mmfusion.training.grid import JWAE, Setting, by_fold, by_repeat

RANK = 4


@dataclass(frozen=True)
class WeakResult:
    """Scores of every subset that was trained."""

    names: tuple[str, ...]
    """the M modalities"""
    noise: str
    """the one that was added"""
    dev: Scores
    test: Scores

    @property
    def full(self) -> str:
        """Label of all modalities."""
        return label(self.names)

    @property
    def with_noise(self) -> str:
        """Label of all modalities and the noise."""
        return f"{self.full}+{self.noise}"

    @property
    def all_but(self) -> list[str]:
        """Labels of the subsets that lack one modality, in the order of `names`."""
        return [label([other for other in self.names if other != name]) for name in self.names]


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train every subset as a study of its own; contrasts are paired over seeds and test examples."""
    names = tuple(data.input_dims)
    wide = with_noise_modality(data)
    noise = next(name for name in wide.input_dims if name not in names)
    lacking = [tuple(other for other in names if other != name) for name in names]
    subsets = {label(one): one for one in [*((name,) for name in names), *lacking, names]}
    studies = {text: only(data, subset) for text, subset in subsets.items()} | {f"{label(names)}+{noise}": wide}
    dev, test = ({outcome: {} for outcome in PRIMARY[data.task]} for _ in range(2))
    for text, study in studies.items():
        grid = run.grid(study, [Setting(text, RANK, JWAE)], f"weak {text}")
        for outcome in PRIMARY[data.task]:
            dev[outcome][text] = by_fold(study, grid.outcome(outcome, "dev")[0], "dev")
            test[outcome][text] = by_fold(study, grid.outcome(outcome)[0])
    result = WeakResult(names, noise, dev, test)
    named, effects = differences(result)
    contrasts = contrasts_on_test(data, named, effects)
    return Outcome(
        table(data, result),
        contrasts,
        verdict_of(contrasts),
        answer(result, contrasts),
        numbers_of(data, result),
        lambda figure: draw(figure, data, result),
        (13.0, 4.6),
    )


def with_noise_modality(data: FoldedDataset) -> FoldedDataset:
    """The same study with one more modality, N(0, 1) in every feature, as wide as the widest; "noise", or "noise_"."""
    name = "noise"
    while name in data.input_dims:
        name += "_"
    drawn = np.random.default_rng(0).standard_normal((len(data.pool), max(data.input_dims.values())), np.float32)
    features = data.pool.features | {name: torch.from_numpy(drawn)}
    return replace(data, pool=replace(data.pool, features=dict(sorted(features.items()))))


# ---- contrasts ---------------------------------------------------------------------------------------------------


def differences(result: WeakResult) -> tuple[dict[str, Difference], dict[str, float]]:
    """Contrasts (S, F) with the effect of interest of each."""
    named: dict[str, Difference] = {}
    effects: dict[str, float] = {}

    def add(name: str, values: np.ndarray, claim: str, outcome: str, decides: bool = False) -> None:
        name = f"{WORDS[outcome]}: {name}"
        named[name] = Difference(values, claim, decides, WORDS[outcome] if decides else "")
        effects[name] = EFFECTS[outcome]

    for outcome, test in result.test.items():
        full = test[result.full]
        weakest, strongest = (on_dev(result.dev[outcome], result.names, best) for best in (False, True))
        gain = chosen(test, result.all_but, weakest) - full
        add("without the weakest over all", gain, "leaving out the weakest modality raises the score", outcome, True)
        loss = full - chosen(test, result.all_but, strongest)
        add("all over without the strongest", loss, "leaving out the strongest lowers the score", outcome)
        cost = full - test[result.with_noise]
        add("all over all and noise", cost, "a modality of noise lowers the score", outcome)
        for name, text in zip(result.names, result.all_but, strict=True):
            add(f"without {name} over all", test[text] - full, f"leaving out {name} raises the score", outcome)
    return named, effects


def weakest_counts(result: WeakResult) -> dict[str, dict[str, int]]:
    """{outcome: {modality: folds in which it is the weakest on dev}}."""
    found = {}
    for outcome, dev in result.dev.items():
        places = on_dev(dev, result.names, best=False)
        found[WORDS[outcome]] = {name: int((places == k).sum()) for k, name in enumerate(result.names)}
    return found


def answer(result: WeakResult, contrasts: Sequence[Contrast]) -> str:
    """The estimates that decide, beside what noise costs, and which modality was the weakest."""
    estimates = [
        f"{c.name} {c.estimate:+.4f} [{c.low:+.4f}, {c.high:+.4f}]"
        for c in contrasts
        if c.decides or c.name.endswith("all and noise")
    ]
    counts = weakest_counts(result)
    word = next(iter(counts))
    folds = ", ".join(f"{name} in {count}" for name, count in counts[word].items())
    return f"{'; '.join(estimates)}. The weakest on dev by {word}, of {sum(counts[word].values())} folds: {folds}."


# ---- text and figure ---------------------------------------------------------------------------------------------


def numbers_of(data: FoldedDataset, result: WeakResult) -> dict[str, object]:
    """Scores (S * repeats,) of every subset, larger is better, and how often each modality is the weakest."""
    scores = {
        part: {
            WORDS[outcome]: {text: by_repeat(data, x).tolist() for text, x in by_subset.items()}
            for outcome, by_subset in of.items()
        }
        for part, of in (("dev", result.dev), ("test", result.test))
    }
    return scores | {"folds in which it is the weakest": weakest_counts(result)}


def table(data: FoldedDataset, result: WeakResult) -> str:
    """Fixed-width: one line per subset, mean +- std over seeds."""
    parts = {"dev": result.dev, "test": result.test}
    columns = {f"{part} {WORDS[outcome]}": of[outcome] for outcome in result.test for part, of in parts.items()}
    texts = list(next(iter(columns.values())))
    width = max(map(len, texts))
    lines = ["mean +- std over seeds, larger is better (losses and errors negative)"]
    lines.append(f"{'':{width}}" + "".join(f"  {name:>17}" for name in columns))
    for text in texts:
        cells = [mean_std(by_repeat(data, by_subset[text])) for by_subset in columns.values()]
        lines.append(f"{text:{width}}" + "".join(f"  {cell:>17}" for cell in cells))
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, result: WeakResult) -> None:
    """By outcome: what each subset scores less than all modalities, a dot per seed and fold, a bar for the mean."""
    for axis, (outcome, test) in zip(figure.subplots(1, len(result.test)), result.test.items(), strict=True):
        texts = [text for text in test if text != result.full]
        apart: Mapping[str, np.ndarray] = {text: (test[text] - test[result.full]).ravel() for text in texts}
        axis.barh(range(len(texts)), [x.mean() for x in apart.values()], color="0.8")
        for k, x in enumerate(apart.values()):
            axis.plot(x, np.full(len(x), k), ".", color="C0", alpha=0.6)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(EFFECTS[outcome], color="black", linestyle=":", linewidth=0.8)
        axis.set_yticks(range(len(texts)), texts, fontsize=8)
        axis.invert_yaxis()
        axis.set(title="over all modalities (dotted: of interest)", xlabel=f"test {WORDS[outcome]}, larger is better")
    figure.suptitle(f"{data.name}: modalities left out, alone, and noise added ({result.full} is 0)")


EXPERIMENT = Experiment(
    "weak_modalities",
    "Weak modalities harm fusion: leaving out the weakest raises the score.",
    "Does leaving out the modality that is weakest alone raise the score?",
    measure,
    modalities=2,
)

if __name__ == "__main__":
    main(EXPERIMENT)
