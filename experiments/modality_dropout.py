"""Which rate of dropout harms most? A modality hidden, or its features dropped, at test, in training, and in both.

    python -m experiments.modality_dropout --dataset cmu_mosi --data FILE --cross-validate 5 --repeats 2 --seeds 1

Six protocols, p = 0 to .9. "Modality": an example's latent is hidden with probability p. At test that gives an additive
score (log loss, MAE) the expectation (1 - p) s1 + p s0, s1 and s0 the score with and without: a straight line, whose
harm cannot peak below p = 1. That line is an identity, checked against drawn masks, and decides nothing; AUROC and the
correlation are not additive, and stand as the mean over drawn masks. "Features": each standardised feature of the
modality is 0 with probability p, the others are multiplied by 1 / (1 - p), as dropout layers do; through the encoders
that may bend either way. "In training" is tested complete, "both" at the rate trained at. The rates of feature
protocols replace the recipe's own rate for this modality; other modalities keep it.

Harm at a rate is the score at p = 0 less the score there. Claim, about audio or, in data without it, about all
modalities, each dropped by itself, on average: in one protocol, on one primary outcome (a route; Holm over routes), (a)
harm at 30-50 % exceeds harm at 70-90 %, and (b) harm at 30-50 % is above 0. (a) alone holds too where dropout helps,
and helps more at high rates. A harm that grows with the rate ends in "not supported", and so does one too small to
matter.

Control: labels planted with `--plant dropout --plant-strength 1` hang on the modality alone: (b) must then be found
with the modality hidden at test, and (a) refuted; with strength 0 there is no harm to be found.
"""

from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.experiment import Experiment, Outcome, Run, contrasts_on_test, main
from mmfusion.data.folds import FoldedDataset
from mmfusion.metrics.outcomes import EFFECTS, PRIMARY, WORDS, example_outcome
from mmfusion.metrics.outcomes import Outcome as Score
from mmfusion.metrics.verdicts import Contrast, Difference, verdict_of
from mmfusion.training.grid import JWAE, Grid, Setting, by_repeat, outputs_of, per_example, select
from mmfusion.training.objective import predict

RANK = 4
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
MIDDLE, HIGH = (2, 3), (4, 5)  # places of the rates that the claim sets against each other
DRAWS = {"modality": 12, "features": 3}  # of masks, shared by all rates and members
TOLERANCE = 1e-4  # of the identity "zero latent = dropped terms", in units of the prediction; float32
ADDITIVE = ("log_loss", "mae")
WHERE = ("at test", "in training", "both")
PROTOCOLS = tuple(f"{what} {where}" for what in DRAWS for where in WHERE)
LINE = "modality at test"
Curves = dict[str, dict[str, np.ndarray]]
"""{outcome: {protocol: (rates, S, n)}} of one modality's dropout"""


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Train at every rate of the modalities that the claim is about; contrasts are paired over seeds and examples."""
    names = list(data.input_dims)
    claimed = ["audio"] if "audio" in names else names  # without audio, all that the dataset has
    grid = run.grid(data, settings_of(names, claimed, run.options.recipe(data.task).feature_dropout), "dropout")
    uniforms = np.random.default_rng(0).random((DRAWS["modality"], len(data.test_rows), len(names)), np.float32)
    curves, checks = {}, {}
    for m, name in enumerate(names):
        curves[name] = curves_of(grid, name, uniforms[..., m], trained=name in claimed)
        checks[name] = check_identities(grid, name, uniforms[..., m])
    named, effects = differences(curves, claimed)
    contrasts = contrasts_on_test(data, named, effects)
    numbers = {name: numbers_of(data, curves[name]) | checks[name] for name in names}
    return Outcome(
        table(numbers),
        contrasts,
        verdict_of(contrasts),
        answer([c for c in contrasts if c.decides]),
        numbers,
        lambda figure: draw(figure, data, curves),
        (max(9.0, 4.4 * len(names)), 7.6),
        [] if "audio" in names else [f"no audio in this dataset: the claim is put to {' and '.join(names)}"],
    )


def settings_of(names: list[str], claimed: list[str], feature_rate: float) -> list[Setting]:
    """The complete members first; of a modality that the claim is not about, what it takes to test without it."""
    settings = [Setting("complete", RANK, JWAE, dropout={})]
    for name in names:
        for p in RATES if name in claimed else RATES[:1]:
            features = dict.fromkeys(names, feature_rate) | {name: p}
            settings.append(Setting(label(name, "features", p), RANK, JWAE, dropout={}, feature_dropout=features))
            if p:
                settings.append(Setting(label(name, "modality", p), RANK, JWAE, dropout={name: p}))
    return settings


def label(name: str, what: str, rate: float) -> str:
    """Of the setting in which that modality, or its features, are dropped in training; 0: nothing is hidden."""
    return "complete" if what == "modality" and not rate else f"{name}, {what} dropped at {rate:.1f}"


# ---- what dropout does -------------------------------------------------------------------------------------------


def curves_of(grid: Grid, name: str, uniforms: np.ndarray, trained: bool) -> Curves:
    """Expected share of every test example in each primary outcome, at every rate and in every protocol.

    Args:
        uniforms: (draws, n): the modality of a test example is hidden where they are < p.
        trained: whether members were trained at the rates; without them "at test" is all there is.
    """
    data, found = grid.data, {}
    rates = RATES if trained else RATES[:1]
    complete, hidden, whole = {}, {}, {}
    for p in rates:
        place = grid.index(label(name, "modality", p))
        complete[p] = grid.predictions()[place]  # (S, n[, O])
        outputs = outputs_of(data, grid.members([place]), [name]).reshape(1, *grid.outputs.shape[1:])
        hidden[p] = select(data, outputs, "test")[0]
        whole[p] = grid.predictions()[grid.index(label(name, "features", p))]
    thin = {(q, p): [] for q in rates for p in RATES if p and q in (0.0, p)}
    for seed in range(DRAWS["features"]):
        for (q, p), draws in thin.items():
            draws.append(thinned(grid, grid.index(label(name, "features", q)), name, p, seed))
    for outcome in PRIMARY[data.task]:
        of = lambda x, outcome=outcome: shares(data, x, outcome)  # noqa: E731

        def masked(q: float, p: float, outcome: Score = outcome) -> np.ndarray:
            return expected(data, complete[q], hidden[q], uniforms, p, outcome)

        def thinly(q: float, p: float, of=of) -> np.ndarray:
            return of(np.stack(thin[q, p])).mean(0) if p else of(whole[q])

        rows = {LINE: [masked(0.0, p) for p in RATES], "features at test": [thinly(0.0, p) for p in RATES]}
        if trained:
            rows |= {"modality in training": [of(complete[p]) for p in RATES]}
            rows |= {"modality both": [masked(p, p) for p in RATES]}
            rows |= {"features in training": [of(whole[p]) for p in RATES]}
            rows |= {"features both": [thinly(p, p) for p in RATES]}
        found[outcome] = {protocol: np.stack(rows[protocol]) for protocol in PROTOCOLS if protocol in rows}
    return found


def shares(data: FoldedDataset, predictions: np.ndarray, outcome: Score) -> np.ndarray:
    """(..., n[, O]) test predictions -> (..., n): each example's share of that outcome."""
    return per_example(data, predictions, "test", lambda *members: example_outcome(*members, outcome))


def expected(
    data: FoldedDataset, complete: np.ndarray, hidden: np.ndarray, uniforms: np.ndarray, p: float, outcome: Score
) -> np.ndarray:
    """(S, n): outcome where a modality is hidden at rate p: exact where it is additive, else the mean over masks.

    Args:
        complete, hidden: (S, n[, O]) test predictions with and without the modality.
        uniforms: (draws, n).
    """
    if outcome in ADDITIVE:
        return (1 - p) * shares(data, complete, outcome) + p * shares(data, hidden, outcome)
    mask = uniforms[:, None] < p  # (draws, 1, n)
    return shares(data, np.where(mask[..., None] if data.has_columns else mask, hidden, complete), outcome).mean(0)


@torch.inference_mode()
def thinned(grid: Grid, place: int, name: str, p: float, seed: int) -> np.ndarray:
    """(S, n[, O]): test predictions of a setting with each feature of a modality dropped at rate p, the rest scaled."""
    data, features = grid.data, grid.data.pool.features
    rng = np.random.default_rng([seed, list(features).index(name)])
    uniforms = rng.random((len(data.pool), features[name].shape[-1]), np.float32)  # the same for all rates and members
    by_seed = []
    for s in range(len(grid.seeds)):
        folds = []
        for f, fold in enumerate(data.folds):
            kept = {other: torch.ones(1) for other in features}
            kept[name] = torch.from_numpy(uniforms[fold.test.numpy()] >= p).float() / (1 - p)
            seen = {other: x[fold.test] for other, x in features.items()}
            folds.append(predict(grid.model(place, s, f), seen, data.task, kept=kept).numpy())
        by_seed.append(np.concatenate(folds))
    return np.stack(by_seed)


# ---- what must hold exactly --------------------------------------------------------------------------------------


@torch.inference_mode()
def check_identities(grid: Grid, name: str, uniforms: np.ndarray) -> dict[str, float]:
    """Zero latent against dropped terms, and drawn masks against the exact line of the additive outcome.

    Raises AssertionError where zero latent and dropped terms differ by more than rounding: the layer is then wrong.
    """
    data = grid.data
    apart = largest = 0.0
    for zero, kept in without_both_ways(grid, name):
        apart = max(apart, float((zero - kept).abs().max()))
        largest = max(largest, float(zero.abs().max()))
    if not apart < TOLERANCE * max(1.0, largest):
        raise AssertionError(f"zero latent and dropped terms differ by {apart:.2e}; they are the same function")
    outcome = next(one for one in PRIMARY[data.task] if one in ADDITIVE)
    outputs = outputs_of(data, grid.members([0]), [name]).reshape(1, *grid.outputs.shape[1:])
    s1 = shares(data, grid.predictions()[0], outcome)  # (S, n)
    s0 = shares(data, select(data, outputs, "test")[0], outcome)
    return {
        "zero latent - dropped terms, largest": apart,
        "masks - line, largest, in standard errors": float(np.abs(mask_errors(s1, s0, uniforms)).max()),
    }


@torch.no_grad()
def without_both_ways(grid: Grid, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each complete member, mean predictions (N, O) by a zero latent, and by the subset terms without it."""
    place = list(grid.data.input_dims).index(name)
    for model in grid.members([0]):
        z = model.latents(grid.data.pool.features)  # (N, L) each
        terms = model.fusion.subset_terms(z)
        kept = sum(term for subset, term in terms.items() if place not in subset)  # (N, O)
        z[place] = torch.zeros_like(z[place])
        yield model.rescale(model.fusion(z)), model.rescale(kept)


def mask_errors(s1: np.ndarray, s0: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """(rates,): mean score by drawn masks less (1 - p) s1 + p s0, in units of its Monte-Carlo standard error.

    That error is sqrt(p (1 - p) sum_n d_n^2 / draws) / n with d = s0 - s1 averaged over the seeds; 0 where d is 0.

    Args:
        s1, s0: (S, n) scores with and without the modality.
        uniforms: (draws, n), the same for all seeds.
    """
    change = (s0 - s1).mean(0)  # (n,)
    draws, n = uniforms.shape
    errors = []
    for p in RATES:
        error = (p * (1 - p) * np.square(change).sum() / draws) ** 0.5 / n
        errors.append((((uniforms < p).mean(0) - p) * change).mean() / error if error > 0 else 0.0)
    return np.array(errors)


# ---- contrasts, text, figure -------------------------------------------------------------------------------------


def harm(curve: np.ndarray, places: tuple[int, ...]) -> np.ndarray:
    """(rates, S, n) -> (S, n): score at p = 0 minus the mean score at these rates."""
    return curve[0] - curve[list(places)].mean(0)


def differences(curves: dict[str, Curves], claimed: list[str]) -> tuple[dict[str, Difference], dict[str, float]]:
    """Of each protocol and outcome: harm at 30-50 % less harm at 70-90 %, and harm at 30-50 %.

    Where the claim is put to several modalities it is their mean; those that it is not about decide nothing.
    """
    named, effects = {}, {}
    others = [name for name in curves if name not in claimed]
    for name, own in {" and ".join(claimed): claimed, **{one: [one] for one in others}}.items():
        for outcome in curves[own[0]]:
            for protocol in curves[own[0]][outcome]:
                curve = np.mean([curves[one][outcome][protocol] for one in own], axis=0)
                middle, high = (harm(curve, places) for places in (MIDDLE, HIGH))
                route = f"{name}, {protocol}, {WORDS[outcome]}"
                # of a straight line (a) and (b) exclude each other: no route of a claim that may come out either way
                decides = own is claimed and not (protocol == LINE and outcome in ADDITIVE)
                kept = (decides, route if decides else "")
                title = f"{route}: harm at 30-50 %"
                more = f"dropout harms more at 30-50 % than at 70-90 % ({route})"
                named[f"{title} over 70-90 %"] = Difference(middle - high, more, *kept)
                named[title] = Difference(middle, f"dropout harms at 30-50 % ({route})", *kept)
                effects |= {f"{title} over 70-90 %": EFFECTS[outcome], title: EFFECTS[outcome]}
    return named, effects


def answer(deciding: list[Contrast]) -> str:
    """In how many routes harm peaks at 30-50 %, and the one that comes nearest to the claim."""
    pairs = list(zip(deciding[::2], deciding[1::2], strict=True))  # as `differences` gives them
    peaks = sum(more.estimate > 0 and middle.estimate > 0 for more, middle in pairs)
    more, middle = max(
        pairs, key=lambda pair: min(pair[0].estimate / pair[0].effect, pair[1].estimate / pair[1].effect)
    )
    return (
        f"By its estimates dropout harms at 30-50 %, and more than at 70-90 %, in {peaks} of {len(pairs)} routes; the "
        f"nearest, {more.route}: harm {middle.estimate:+.4f} [{middle.low:+.4f}, {middle.high:+.4f}], over that at "
        f"70-90 % {more.estimate:+.4f} [{more.low:+.4f}, {more.high:+.4f}]."
    )


def numbers_of(data: FoldedDataset, curves: Curves) -> dict[str, object]:
    """Scores of one modality's curves by rate, as they are: losses and errors positive."""
    found: dict[str, object] = {"rates": list(RATES)}
    for outcome, rows in curves.items():
        sign = -1 if outcome in ADDITIVE else 1
        values = {protocol: sign * by_repeat(data, curve) for protocol, curve in rows.items()}  # (rates, S * repeats)
        found[WORDS[outcome]] = {protocol: x.tolist() for protocol, x in values.items()}
    return found


def table(numbers: dict[str, dict]) -> str:
    """Fixed-width: one line per modality, outcome and protocol, one column per rate, then what was checked."""
    rows = {
        f"{name}, {word}, {protocol}": np.mean(values, 1)
        for name, found in numbers.items()
        for word in WORDS.values()
        if word in found
        for protocol, values in found[word].items()
    }
    width = max(map(len, rows))
    lines = ["mean over seeds; p: rate of the dropout"]
    lines.append(f"{'p':{width}}" + "".join(f"  {p:6.1f}" for p in RATES))
    lines += [f"{row:{width}}" + "".join(f"  {value:6.3f}" for value in values) for row, values in rows.items()]
    lines.append("")
    lines += [
        f"checked, {name}: zero latent = dropped terms to {found['zero latent - dropped terms, largest']:.0e}; "
        f"masks within {found['masks - line, largest, in standard errors']:.1f} standard errors of the line"
        for name, found in numbers.items()
    ]
    return "\n".join(lines)


def draw(figure: Figure, data: FoldedDataset, curves: dict[str, Curves]) -> None:
    """One column per modality, one row per outcome: the score over the rate; band: standard deviation over seeds."""
    axes = figure.subplots(2, len(curves), squeeze=False)  # scales of their own: else only the largest harm shows
    for column, (name, by_outcome) in zip(axes.T, curves.items(), strict=True):
        for axis, (outcome, rows) in zip(column, by_outcome.items(), strict=True):
            for places in (MIDDLE, HIGH):
                axis.axvspan(RATES[places[0]], RATES[places[-1]], color="0.93", zorder=0)
            for protocol, curve in rows.items():
                values = by_repeat(data, -curve if outcome in ADDITIVE else curve)  # (rates, S * repeats)
                mean, std = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0.0
                what, color = protocol.split()[0], f"C{WHERE.index(protocol.split(maxsplit=1)[1])}"
                axis.plot(RATES, mean, "o-" if what == "modality" else "s--", color=color, label=protocol, markersize=4)
                axis.fill_between(RATES, mean - std, mean + std, color=color, alpha=0.1, linewidth=0)
            axis.set(title=f"{name} (scale of its own)", xlabel="rate of dropout p", ylabel=f"test {WORDS[outcome]}")
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{data.name}: dropout of one modality (mean and std over seeds; grey: rates compared)")


EXPERIMENT = Experiment(
    "modality_dropout",
    "Audio dropout harms most at 30-50 %, not monotonically.",
    "Does dropping a modality, or its features, harm more at 30-50 % than at 70-90 %, at test, in training, or both?",
    measure,
    modalities=2,
)

if __name__ == "__main__":
    main(EXPERIMENT)
