"""Which rate of modality dropout harms most? p = 0 to .9 for each modality alone, at test, in training, and in both.

    python -m experiments.modality_dropout --dataset cmu_mosi --data cmu_mosi_utterances.npz

A modality that is missing per example with probability p gives an additive score the expectation (1 - p) s1 + p s0,
s1 and s0 the score with and without it: a straight line, so "at test" the harm cannot peak below p = 1. Only a
training at each p can bend the curve. Drawn masks stand beside the exact line, since few of them look bent by chance;
and AUROC, which is not additive, is not linear.

Harm at a rate is the score at p = 0 minus the score there. Verdict: in some protocol, of audio or, in a dataset without
it, of any modality, both (a) mean harm at 30-50 % exceeds mean harm at 70-90 %, and (b) mean harm at 30-50 % is
positive; each by the common rule with an effect of `SCORE_EFFECT`, Holm's correction being over both kinds. (a) alone
holds too where the dropout helps, and helps more at high rates. "At test" the line rules out that both hold.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from scipy.stats import rankdata
from torch import Tensor

from experiments.experiment import SCORE_EFFECT, Experiment, Outcome, Run, contrasts_on_test, main
from mmfusion.data.folds import FoldedDataset, targets
from mmfusion.files import write_safetensors
from mmfusion.metrics.scores import example_scores
from mmfusion.metrics.verdicts import Contrast, Difference, Verdict, combine
from mmfusion.training.grid import JWAE, Grid, Setting, per_example, select

RANK = 4
RATES = tuple(k / 10 for k in range(10))
MIDDLE, HIGH = (3, 4, 5), (7, 8, 9)  # places of the rates that the claim sets against each other
DRAWS = 12  # of masks, for each rate
TOLERANCE = 1e-4  # of the identity "zero latent = dropped terms", in units of the prediction; float32
PROTOCOLS = ("at test", "in training", "both")
MEAN_LATENT = "at test, mean latent"
ROWS = ("at test", MEAN_LATENT, "in training", "both")
COLORS = dict(zip(ROWS, ("C0", "C4", "C1", "C2"), strict=True))


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train at every rate of every modality; contrasts are paired over seeds and test examples."""
    names = list(data.input_dims)
    settings = [Setting("complete", RANK, JWAE, dropout={})]
    settings += [Setting(label(name, p), RANK, JWAE, dropout={name: p}) for name in names for p in RATES[1:]]
    grid = run.grid(data, settings, "dropout")
    uniforms = drawn_uniforms(run.folder / "masks.safetensors", len(data.test_rows), len(names))
    curves, checks = {}, {}
    for m, name in enumerate(names):
        missing = missing_predictions(grid, name)
        curves[name] = rate_curves(grid, name, missing)
        checks[name] = check_identities(grid, missing, uniforms[:, :, m].numpy())
    contrasts = contrasts_on_test(data, differences(curves))
    deciding = by_protocol([contrast for contrast in contrasts if contrast.decides])
    notes = [] if "audio" in names else [f"no audio in this dataset: the verdict is over {' and '.join(names)}"]
    numbers = {
        name: {
            "rates": list(RATES),
            "mean": {row: curve.mean((1, 2)).tolist() for row, curve in curves[name].items()},
            "std over seeds": {row: curve.mean(2).std(1, ddof=1).tolist() for row, curve in curves[name].items()},
            **checks[name],
        }
        for name in names
    }
    size = (max(8.0, 4.4 * len(names)), 4.6)
    return Outcome(
        table(data, numbers),
        contrasts,
        verdict_of(deciding),
        answer(deciding, curves),
        numbers,
        lambda figure: draw(figure, data, curves, checks),
        size,
        notes,
    )


def label(name: str, rate: float) -> str:
    """Of the setting in which that modality alone is dropped in training."""
    return f"{name} dropped at {rate:.1f}"


# ---- what a missing modality does --------------------------------------------------------------------------------


@torch.inference_mode()
def missing_predictions(grid: Grid, name: str) -> dict[str, np.ndarray]:
    """Test predictions (S, n[, O]) of the complete members without a modality, in three ways of being without it.

    "zero latent": what dropout in training does. "mean latent": the mean over the training part of the member's fold.
    "dropped terms": the sum of the subset terms that the modality takes no part in, which is the zero latent's
    prediction by another way (`LowRankMultimodalFusion.subset_terms`).
    """
    data, features = grid.data, grid.data.pool.features
    place = list(data.input_dims).index(name)
    models = grid.members([0])
    outputs: dict[str, list[Tensor]] = {"zero latent": [], "mean latent": [], "dropped terms": []}
    for k, model in enumerate(models):
        train = data.folds[k % len(data.folds)].train
        z = model.latents(features)  # (N, L) each
        terms = model.fusion.subset_terms(z)
        kept = sum(term for subset, term in terms.items() if place not in subset)  # (N, O)
        for replacement, value in (
            ("zero latent", 0 * z[place]),
            ("mean latent", z[place][train].mean(0).expand_as(z[place])),
        ):
            outputs[replacement].append(model.rescale(model.fusion([*z[:place], value, *z[place + 1 :]])))
        outputs["dropped terms"].append(model.rescale(kept))
    shape = grid.outputs.shape[1:]  # (S, F, N[, O])
    return {
        replacement: select(data, torch.stack(values).numpy().reshape(shape), "test")
        for replacement, values in outputs.items()
    }


def rate_curves(grid: Grid, name: str, missing: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{row: (rates, S, n)}: expected score of every test example at every rate of that modality's dropout."""
    data = grid.data
    places = [0, *(grid.index(label(name, p)) for p in RATES[1:])]
    trained = grid.scores()[places]  # (rates, S, n), tested complete
    hidden = grid.without([name], places)  # (rates, S, n), tested without
    mean_latent = per_example(data, missing["mean latent"], "test", example_scores)  # (S, n)
    p = np.array(RATES)[:, None, None]
    return {
        "at test": (1 - p) * trained[0] + p * hidden[0],
        MEAN_LATENT: (1 - p) * trained[0] + p * mean_latent,
        "in training": trained,
        "both": (1 - p) * trained + p * hidden,
    }


# ---- masks, and what must hold exactly ---------------------------------------------------------------------------


def drawn_uniforms(path: Path, examples: int, modalities: int) -> Tensor:
    """Uniforms (DRAWS, examples, modalities), drawn once and kept at `path`: a modality is missing where they are < p.

    All rates and seeds share them. A resumed run reads what it has drawn.
    """
    if not path.exists():
        drawn = np.random.default_rng(0).random((DRAWS, examples, modalities), dtype=np.float32)
        write_safetensors(path, {"uniforms": torch.from_numpy(drawn)})
    return load_file(path)["uniforms"]


def check_identities(grid: Grid, missing: dict[str, np.ndarray], uniforms: np.ndarray) -> dict[str, object]:
    """Drawn masks (DRAWS, n) against the exact line, zero latent against dropped terms, AUROC against its chord.

    Raises AssertionError where zero latent and dropped terms differ by more than rounding: the layer is then wrong.
    """
    data, complete = grid.data, grid.predictions()[0]
    apart = float(np.abs(missing["zero latent"] - missing["dropped terms"]).max())
    if not apart < TOLERANCE * max(1.0, float(np.abs(complete).max())):
        raise AssertionError(f"zero latent and dropped terms differ by {apart:.2e}; they are the same function")
    s1 = per_example(data, complete, "test", example_scores)  # (S, n)
    s0 = per_example(data, missing["zero latent"], "test", example_scores)
    drawn, errors = drawn_scores(s1, s0, uniforms)
    checks: dict[str, object] = {
        "zero latent - dropped terms, largest": apart,
        "masks": drawn.tolist(),
        "masks - line, largest, in standard errors": float(np.abs(errors).max()),
    }
    if data.task == "binary":
        checks["auroc"] = auroc_curve(data, complete, missing["zero latent"], uniforms)
    return checks


def drawn_scores(s1: np.ndarray, s0: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean score at each rate by drawn masks, and how far it is from the exact line.

    Args:
        s1, s0: (S, n) scores with and without the modality.
        uniforms: (draws, n), the same for all seeds.

    Returns:
        means (rates,), and (rates,) deviations from (1 - p) s1 + p s0 in units of their Monte-Carlo standard error,
        sqrt(p (1 - p) sum_n d_n^2 / draws) / n with d = s1 - s0 averaged over the seeds; 0 where d is 0 throughout.
    """
    change = (s0 - s1).mean(0)  # (n,)
    draws, n = uniforms.shape
    means, errors = [], []
    for p in RATES:
        hidden = (uniforms < p).mean(0)  # (n,) share of the draws
        means.append(s1.mean() + (hidden * change).mean())
        error = (p * (1 - p) * np.square(change).sum() / draws) ** 0.5 / n
        errors.append(((hidden - p) * change).mean() / error if error > 0 else 0.0)
    return np.array(means), np.array(errors)


def auroc_curve(
    data: FoldedDataset, complete: np.ndarray, missing: np.ndarray, uniforms: np.ndarray
) -> dict[str, object]:
    """AUROC at each rate by the drawn masks, and its largest deviation from the chord between p = 0 and p = 1."""
    at_0, at_1 = auroc(data, complete).mean(), auroc(data, missing).mean()
    means, deviations, errors = [], [], []
    for p in RATES:
        hidden = uniforms[:, None] < p  # (draws, 1, n)
        by_draw = auroc(data, np.where(hidden, missing, complete)).mean(1)  # (draws, S, n) -> (draws,)
        means.append(float(by_draw.mean()))
        deviations.append(float(by_draw.mean() - (1 - p) * at_0 - p * at_1))
        errors.append(float(by_draw.std(ddof=1) / len(by_draw) ** 0.5))
    k = int(np.argmax(np.abs(deviations)))
    worst = {"rate": RATES[k], "deviation": deviations[k], "standard error": errors[k]}
    return {"mean": means, "at 1": float(at_1), "largest deviation from the chord": worst}


def auroc(data: FoldedDataset, predictions: np.ndarray) -> np.ndarray:
    """(..., n) logits of the test examples -> (...): AUROC, mean over the folds; NaN-free needs both classes in each.

    (sum of the positives' ranks - P (P + 1) / 2) / (P N), ties by mid-ranks: the Mann-Whitney statistic.
    """
    values, start = [], 0
    positive = targets(data) == 1
    for fold in data.folds:
        part = slice(start, start := start + len(fold.test))
        ranks = rankdata(predictions[..., part], axis=-1)
        count, size = positive[part].sum(), positive[part].size
        values.append((ranks[..., positive[part]].sum(-1) - count * (count + 1) / 2) / (count * (size - count)))
    return np.mean(values, axis=0)


# ---- contrasts, text, figure -------------------------------------------------------------------------------------


def harm(curve: np.ndarray, places: tuple[int, ...]) -> np.ndarray:
    """(rates, S, n) -> (S, n): score at p = 0 minus the mean score at these rates."""
    return curve[0] - curve[list(places)].mean(0)


def differences(curves: dict[str, dict[str, np.ndarray]]) -> dict[str, Difference]:
    """Two contrasts (S, n) per modality and protocol: harm at 30-50 % minus harm at 70-90 %, and harm at 30-50 %."""
    named = {}
    claimed = ["audio"] if "audio" in curves else list(curves)  # without audio, all that the dataset has
    for name, rows in curves.items():
        for protocol in PROTOCOLS:
            middle, high = (harm(rows[protocol], places) for places in (MIDDLE, HIGH))
            title, claim = f"{name}, {protocol}: harm at 30-50 %", f"dropout of {name}, {protocol}, harms"
            named[f"{title} over 70-90 %"] = Difference(
                middle - high, f"{claim} more at 30-50 % than at 70-90 %", name in claimed
            )
            named[title] = Difference(middle, f"{claim} at 30-50 %", name in claimed)
    return named


def by_protocol(contrasts: list[Contrast]) -> dict[tuple[str, str], list[Contrast]]:
    """{(modality, protocol): [difference, harm]}, from the contrasts of `differences`."""
    found: dict[tuple[str, str], list[Contrast]] = {}
    for c in contrasts:
        name, protocol = c.name.split(":")[0].split(", ")
        found.setdefault((name, protocol), []).append(c)
    return found


def verdict_of(deciding: dict[tuple[str, str], list[Contrast]]) -> Verdict:
    """The rule of the module's docstring: difference and harm, in any of these protocols."""
    return combine([combine([c.verdict for c in pair], "all") for pair in deciding.values()], "any")


def answer(deciding: dict[tuple[str, str], list[Contrast]], curves: dict[str, dict[str, np.ndarray]]) -> str:
    """The estimates of the contrasts that decide, and where the mean harm is largest."""
    sentences = []
    for (name, protocol), pair in deciding.items():
        difference, middle = (f"{c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in pair)
        means = [harm(curves[name][protocol], (k,)).mean() for k in range(1, len(RATES))]
        worst = int(np.argmax(means))
        sentences.append(
            f"{name} {protocol} {middle}, minus that at 70-90 % {difference} "
            f"(largest harm {means[worst]:+.3f}, at {RATES[worst + 1]:.0%})"
        )
    return f"Harm of dropout at 30-50 %: {'; '.join(sentences)}."


def table(data: FoldedDataset, numbers: dict[str, dict]) -> str:
    """Fixed-width: one line per modality and protocol, one column per rate, then what was checked."""
    score = data.score_name
    rows = {}
    for name, found in numbers.items():
        for row in ROWS:
            rows[f"{name}, {row}"] = found["mean"][row]
            if row == "at test":
                rows[f"{name}, at test, {DRAWS} masks"] = found["masks"]
        if "auroc" in found:
            rows[f"{name}, at test, AUROC"] = found["auroc"]["mean"]
    width = max(map(len, rows))
    lines = [f"score: {score}, mean over seeds; p: rate of the dropout; at test: zero latent, exact, unless it says so"]
    lines.append(f"{'p':{width}}" + "".join(f"  {p:6.1f}" for p in RATES))
    lines += [f"{row:{width}}" + "".join(f"  {value:6.3f}" for value in values) for row, values in rows.items()]
    lines.append("")
    for name, found in numbers.items():
        line = (
            f"checked, {name}: zero latent = dropped terms to {found['zero latent - dropped terms, largest']:.0e}; "
            f"masks within {found['masks - line, largest, in standard errors']:.1f} standard errors of the line"
        )
        if "auroc" in found:
            worst = found["auroc"]["largest deviation from the chord"]
            line += f"; AUROC {worst['deviation']:+.4f} +- {worst['standard error']:.4f} off its chord"
        lines.append(line)
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, curves: dict, checks: dict) -> None:
    """One panel per modality: the score over the rate; band: standard deviation over seeds; dots: drawn masks."""
    axes = figure.subplots(1, len(curves), squeeze=False)[0]  # scales of their own: else only the largest harm shows
    for axis, (name, rows) in zip(axes, curves.items(), strict=True):
        for low, high in ((RATES[MIDDLE[0]], RATES[MIDDLE[-1]]), (RATES[HIGH[0]], RATES[HIGH[-1]])):
            axis.axvspan(low, high, color="0.93", zorder=0)
        for row, curve in rows.items():
            values = curve.mean(2)  # (rates, S)
            mean, std = values.mean(1), values.std(1, ddof=1)
            text = "at test, zero latent" if row == "at test" else row
            style = "--" if row == MEAN_LATENT else "-" if row == "at test" else "o-"
            axis.plot(RATES, mean, style, color=COLORS[row], label=text, markersize=3.5)
            axis.fill_between(RATES, mean - std, mean + std, color=COLORS[row], alpha=0.13, linewidth=0)
        axis.plot(RATES, checks[name]["masks"], "o", color=COLORS["at test"], markersize=4, label=f"{DRAWS} masks")
        least = rows["at test"][0].mean() - SCORE_EFFECT
        axis.axhline(least, color="black", linestyle=":", linewidth=0.8, label=f"harm of {SCORE_EFFECT:g}")
        axis.set(title=f"{name} (scale of its own)", xlabel="rate of dropout p")
    axes[0].set_ylabel(f"test {data.score_name}")
    handles, texts = axes[0].get_legend_handles_labels()
    columns = len(texts) if len(curves) > 2 else 3  # two panels are too narrow for all in one row
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{data.name}: dropout of one modality (mean and std over seeds; grey: rates compared)")


EXPERIMENT = Experiment(
    "modality_dropout",
    "Audio dropout harms most at 30-50 %, not monotonically.",
    "Does dropping a modality harm more at 30-50 % than at 70-90 %, at test, in training, or in both?",
    measure,
    modalities=2,
)

if __name__ == "__main__":
    main(EXPERIMENT)
