"""Does geometry help alignment? Contrast, transport and covariance, alone and together, by retrieval and robustness.

    python -m experiments.alignment --dataset arrays --data mfeat_digits.npz --target digit --folds 5
    python -m experiments.alignment --dataset pairs --data clip_coco_pairs.npz --modalities image text \\
        --identity --width 512 --rate 1e-4

Rows: the jWAE's encoders without any alignment, with symmetric InfoNCE ("contrast"), with the debiased Sinkhorn
divergence of the modalities' batches ("transport"), with the Stein divergence of their covariances and the Bures
distance of neighbourhoods ("Riemannian"), with two of the three, and with all ("hybrid"); the contrast with the Bures
distance alone ("local"); CORAL and MMD as controls, GRAM and the multilinear critic as rivals. Prior and reconstruction
are on in all of them. The weights of what comes on top of the contrast are chosen on the dev part of the first fold.
Every member keeps its epoch of the best mAP on dev; from the identity its last one, since that start is so good already
that the dev part of a small file would stop every row at its first steps.

On the test parts (experiments.alignment_scores): R@1, the mean over all ordered pairs of modalities; centroid gap, CKA
and FOSCTTM; what decoding one modality's features from another's latent explains of them (R^2), and their Frechet
distance over the width; what a modality's latents alone say of its features ("unique", a difference of R^2); the cosine
of a latent and that of damaged features ("invariance"); and, where there are classes, the V-measure of clusters, the
accuracy of a logistic regression on the latents, clean and where half of one modality's examples are missing or noise,
and what a modality adds to it ("unique accuracy").

Verdict: hybrid gains 5 % of R@1 over the contrast; where half of a modality is missing, and where half of it is noise,
accuracy falls by at most 10 % of the clean one with all losses and by at least 30 % without any. All must hold, but for
a fall that is out of reach: one down to guessing the largest class would not exceed it, as 30 % with two classes. What
stands beside decides nothing: the differences of these falls, the other rows' R@1, invariance with local terms, what
alignment costs of the unique, and gap and clusters against R@1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure

from experiments.alignment_scores import RATE, Scores, fall, in_reach, largest_class, latents_of, scored
from experiments.experiment import SCORE_EFFECT, Experiment, Options, Outcome, Run, contrasts_on_test, main
from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import take
from mmfusion.errors import InputError, check_numbers
from mmfusion.metrics.format import mean_std
from mmfusion.metrics.verdicts import Contrast, Difference, verdict_of
from mmfusion.training.align import AlignmentTraining, Weighting, align, mean_precision

BASE = {"prior": 0.1, "reconstruction": 0.1}
TRIED = (0.1, 1.0, 10.0)
CONTRAST, HYBRID, LOCAL = "contrast", "hybrid", "contrast + local"
RELATIVE = 0.05  # of the contrast's score
MOST, LEAST = 0.1, 0.3  # fall of accuracy, of the clean one: expected with all losses, and without any
SPARED = 0.2  # the difference of these
MARGIN = 0.001  # by how much a fall keeps to these, to count
RATES = (0.2, 0.5, 0.8)
STEPS, EPOCHS = 100, 15  # of training, at least


@dataclass(frozen=True)
class AlignmentOptions(Options):
    """Flags of this experiment."""

    seeds: int = 3
    """seeds 0 .. n - 1, shared by all rows, so that differences between rows are paired"""
    epochs: int | None = None
    """passes over the training part; default: as many as make 100 steps, at least 15"""
    width: int = 32
    """of the shared space"""
    affine: bool = False
    """encoders without a hidden layer, for few examples of good features"""
    identity: bool = False
    """start from the features as they are: affine encoders, of modalities of one width, which is the space's"""
    rate: float = 1e-3
    """learning rate"""
    tune: bool = True
    """choose weights on dev; else 1"""


def check(data: FoldedDataset, options: AlignmentOptions) -> None:
    """Raise InputError for this experiment's flags out of range, and for data that cannot start at the identity."""
    check_numbers(options, {"width": (1, 65536), "rate": (1e-9, 1)})
    if options.identity and set(data.input_dims.values()) != {options.width}:
        widths = ", ".join(f"{name} {width}" for name, width in data.input_dims.items())
        raise InputError(f"--identity: modalities have widths {widths}; all must be --width {options.width}")


def rows(weights: Mapping[str, float], modalities: int) -> list[Weighting]:
    """All rows, at these weights of transport and Riemannian terms."""
    transport = {"transport": weights["transport"]}
    riemannian = {"stein": weights["riemannian"], "bures": weights["riemannian"]}
    contrast = {"info_nce": 1.0}
    parts = {
        "none": {},
        CONTRAST: contrast,
        "transport": transport,
        "Riemannian": riemannian,
        "contrast + transport": contrast | transport,
        "contrast + Riemannian": contrast | riemannian,
        "transport + Riemannian": transport | riemannian,
        HYBRID: contrast | transport | riemannian,
        LOCAL: contrast | {"bures": weights["riemannian"]},
        "contrast + CORAL": contrast | {"coral": weights["riemannian"]},
        "contrast + MMD": contrast | {"mmd": weights["transport"]},
    }
    if modalities > 2:
        parts |= {"GRAM": {"gram": 1.0}, "multilinear": {"multilinear": 1.0}}
    return [Weighting(label, BASE | part) for label, part in parts.items()]


def measure(data: FoldedDataset, run: Run) -> Outcome:
    """Choose weights, train every row at once, score; contrasts are paired over seeds and test examples."""
    options: AlignmentOptions = run.options
    weights, tried = tune(data, run) if options.tune else ({"transport": 1.0, "riemannian": 1.0}, {})
    ensembles = align(
        data,
        rows(weights, len(data.input_dims)),
        training_of(data, options, options.seeds),
        device=run.device,
        checkpoint=run.checkpoints / "alignment.safetensors",
    )
    found = {label: scored(data, ensemble) for label, ensemble in ensembles.items()}
    guessed = largest_class(data)
    contrasts = [c for family in (claim(found, guessed), beside(found)) for c in judged(data, family)]
    deciding = [c for c in contrasts if c.decides]
    answer = "; ".join(f"{c.name} {c.estimate:+.3f} [{c.low:+.3f}, {c.high:+.3f}] ({c.verdict})" for c in deciding)
    numbers = {
        "weights": weights,
        "tried on dev": tried,
        "rows": {label: {name: values.mean(-1) for name, values in of.items()} for label, of in found.items()},
    }
    how = "chosen on dev of the first fold" if tried else "not chosen"
    notes = [f"{how}: weight {weights['transport']:g} of transport, {weights['riemannian']:g} of the Riemannian terms"]
    return Outcome(
        table(found),
        contrasts,
        verdict_of(contrasts),
        answer + ".",
        numbers,
        lambda figure: draw(figure, data, found),
        (19.0, 5.0),
        notes + out_of_reach(contrasts, guessed) + falls(found) + relative_changes(contrasts),
    )


# ---- training ----------------------------------------------------------------------------------------------------


def training_of(data: FoldedDataset, options: AlignmentOptions, seeds: int) -> AlignmentTraining:
    """How all rows are trained: of few examples an epoch is few steps, and takes more epochs."""
    smallest = min(len(fold.train) for fold in data.folds)
    steps = max(1, smallest // AlignmentTraining.batch_size)  # of an epoch
    return AlignmentTraining(
        latent_dim=options.width,
        hidden_dim=0 if options.affine or options.identity else options.hidden_dim,
        identity=options.identity,
        seeds=seeds,
        epochs=options.epochs or max(EPOCHS, math.ceil(STEPS / steps)),
        learning_rate=options.rate,
        keep="last" if options.identity else "best",
    )


def tune(data: FoldedDataset, run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Weights of transport and of the Riemannian terms beside the contrast, by mAP on dev of the first fold."""
    first = replace(data, folds=data.folds[:1])
    terms = {"transport": ("transport",), "riemannian": ("stein", "bures")}
    candidates = [
        Weighting(f"{kind} {weight:g}", BASE | {"info_nce": 1.0} | dict.fromkeys(names, weight))
        for kind, names in terms.items()
        for weight in TRIED
    ]
    training = training_of(data, run.options, min(2, run.options.seeds))
    checkpoint = run.checkpoints / "tune.safetensors"
    trained = align(first, candidates, training, device=run.device, checkpoint=checkpoint)
    dev, names = first.folds[0].dev, list(first.input_dims)
    shared = {names.index(name): items for name, items in take(first.pool, dev.tolist()).shared.items()}
    tried = {
        label: float(np.mean([mean_precision(latents_of(first, one, dev), shared) for one in ensemble.members]))
        for label, ensemble in trained.items()
    }
    best = {kind: max(TRIED, key=lambda weight: tried[f"{kind} {weight:g}"]) for kind in terms}
    return best, tried


# ---- contrasts ---------------------------------------------------------------------------------------------------

Found = Mapping[str, Scores]
Family = dict[str, tuple[Difference, float]]
"""contrasts with the smallest effect of interest of each"""


def judged(data: FoldedDataset, family: Family) -> list[Contrast]:
    """Intervals and verdicts, corrected over this family."""
    differences = {name: difference for name, (difference, _) in family.items()}
    effects = {name: effect for name, (_, effect) in family.items()}
    return contrasts_on_test(data, differences, effects, least_folds=5)


def claim(found: Found, guessed: float) -> Family:
    """What the source expects: R@1, and falls of accuracy as parts of the clean one, linear in every example.

    A fall decides where the accuracy could exceed it by falling to `guessed`, that of guessing the largest class.
    """
    hybrid, contrast, none = found[HYBRID], found[CONTRAST], found["none"]
    gain = hybrid["R@1"] - contrast["R@1"]
    family = {"R@1: hybrid over contrast": (Difference(gain, "hybrid retrieves better"), _relative_effect(contrast))}
    for kind in _kinds(found):
        kept = MOST * hybrid["accuracy"] - fall(hybrid, kind, RATE)
        lost = fall(none, kind, RATE) - LEAST * none["accuracy"]
        at = f"fall at {RATE:.0%} {kind}"
        family |= {
            f"{at}, hybrid: below {MOST:.0%} by": (
                Difference(kept, "accuracy is kept with all losses", in_reach(hybrid, MOST, guessed)),
                MARGIN,
            ),
            f"{at}, none: above {LEAST:.0%} by": (
                Difference(lost, "accuracy is lost without any", in_reach(none, LEAST, guessed)),
                MARGIN,
            ),
        }
    return family


def beside(found: Found) -> Family:
    """What decides nothing: controls, invariance, what is unique, gap and clusters against R@1."""
    hybrid, contrast, none = found[HYBRID], found[CONTRAST], found["none"]
    family: Family = {}

    def add(name: str, values: np.ndarray, statement: str, effect: float) -> None:
        family[name] = (Difference(values, statement, decides=False), effect)

    for kind in _kinds(found):
        for label in ("none", CONTRAST):  # the contrast is a control: is it the geometry?
            less = fall(found[label], kind, RATE) - fall(hybrid, kind, RATE)
            add(f"fall at {RATE:.0%} {kind}: {label} over hybrid", less, "accuracy falls by less", SPARED)
    for label in ("contrast + Riemannian", "contrast + CORAL", "contrast + MMD"):
        gain = found[label]["R@1"] - contrast["R@1"]
        add(f"R@1: {label} over contrast", gain, f"{label} retrieves better", _relative_effect(contrast))
    for kind in ("occlusion", "noise"):
        more = found[LOCAL][f"invariance, {kind}"] - contrast[f"invariance, {kind}"]
        add(f"invariance, {kind}: {LOCAL} over contrast", more, "local terms make latents more invariant", SCORE_EFFECT)
    for name in ("unique", "unique accuracy", "accuracy"):
        if name in none:
            cost = _by_seed(none[name] - hybrid[name]) if name == "unique" else none[name] - hybrid[name]
            add(f"{name}: none over hybrid", cost, "alignment costs what is unique", SCORE_EFFECT)
    for label in (LOCAL, "contrast + transport"):
        change = {
            name: sign * (found[label][name] - contrast[name]) / max(float(contrast[name].mean()), 1e-4)
            for name, sign in (("gap", -1), ("V-measure", 1), ("R@1", 1))
            if name in contrast
        }
        for name, values in change.items():
            statement = "the gap closes" if name == "gap" else f"{name} rises"
            add(f"relative {name}: {label}", values if name == "R@1" else _by_seed(values), statement, RELATIVE)
        for name in list(change)[:-1]:
            more = _by_seed(change[name]) - _by_seed(change["R@1"])
            add(f"relative {name} over R@1: {label}", more, f"{name} changes by more than R@1", RELATIVE)
    return family


def _kinds(found: Found) -> Sequence[str]:
    """Damage that accuracy is measured at."""
    return ("missing", "noise") if "accuracy" in found[HYBRID] else ()


def _by_seed(values: np.ndarray) -> np.ndarray:
    """(S, folds or examples) -> (S,)"""
    return values.mean(1)


def _relative_effect(contrast: Scores) -> float:
    return max(RELATIVE * float(contrast["R@1"].mean()), 1e-4)


# ---- text and figure ---------------------------------------------------------------------------------------------


BLOCK = 7  # columns of the table side by side


def table(found: Found) -> str:
    """One line per row: mean +- std over seeds; retrieval and geometry, then what a user of the latents meets."""
    names, width = list(found[CONTRAST]), max(map(len, found))
    blocks = []
    for some in (names[:BLOCK], names[BLOCK:]):
        lines = [(f"{'':{width}}" + "".join(f"  {name:^22}" for name in some)).rstrip()]
        for label, of in found.items():
            lines.append(f"{label:{width}}" + "".join(f"  {mean_std(of[name].mean(1)):22}" for name in some).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def falls(found: Found) -> list[str]:
    """Notes: fall of accuracy in percent of the clean one, by the share of a modality's examples that are damaged."""
    notes = []
    for kind in _kinds(found):
        parts = []
        for label in ("none", CONTRAST, HYBRID):
            clean = found[label]["accuracy"].mean(1)
            shares = [100 * fall(found[label], kind, rate).mean(1) / clean for rate in RATES]
            parts.append(f"{label} " + ", ".join(mean_std(share, 1) for share in shares))
        at = ", ".join(f"{rate:.0%}" for rate in RATES)
        notes.append(f"accuracy falls, in % of the clean one, at {at} {kind}: " + "; ".join(parts))
    return notes


def out_of_reach(contrasts: Sequence[Contrast], guessed: float) -> list[str]:
    """Note: falls that decide nothing, since guessing the largest class would not exceed them."""
    names = [c.name.removesuffix(" by") for c in contrasts if c.name.endswith("% by") and not c.decides]
    return [f"no part of the verdict, since guessing gets {guessed:.3f} right: {'; '.join(names)}"] if names else []


def relative_changes(contrasts: Sequence[Contrast]) -> list[str]:
    """Notes: gap, clusters and R@1 with local terms and with transport, relative to the contrast."""
    by_name = {c.name: c for c in contrasts}
    notes = []
    for label in (LOCAL, "contrast + transport"):
        parts = []
        for name, verb in (("gap", "closes"), ("V-measure", "rises"), ("R@1", "rises")):
            if c := by_name.get(f"relative {name}: {label}"):
                parts.append(f"{name} {verb} by {100 * c.estimate:.1f} [{100 * c.low:.1f}, {100 * c.high:.1f}]")
        notes.append(f"{label}, in % of the contrast's: " + "; ".join(parts))
    return notes


def draw(figure: Figure, data: FoldedDataset, found: Found) -> None:
    """R@1, gap, cross-decoding, what is unique and invariant and, where there are classes, accuracy, by row."""
    kinds: Sequence[tuple[str, ...]] = [("R@1", "mAP"), ("gap", "CKA"), ("R^2 across", "Frechet across")]
    kinds = [*kinds, ("unique", "invariance, occlusion", "invariance, noise")]
    if "accuracy" in found[CONTRAST]:
        kinds = [*kinds, tuple(name for name in found[CONTRAST] if name.startswith("accuracy"))]
    axes = figure.subplots(1, len(kinds), sharey=True)
    for axis, names in zip(axes, kinds, strict=True):
        for k, (name, color) in enumerate(zip(names, ("#1f6fb4", "#d9741a", "#5a9e4b"), strict=False)):
            means = [of[name].mean(1) for of in found.values()]
            spread = [m.std(ddof=1) if len(m) > 1 else 0.0 for m in means]
            place = np.arange(len(means)) + 0.2 * (k - len(names) / 2)
            axis.errorbar([m.mean() for m in means], place, xerr=spread, fmt="o", color=color, label=name)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes[0].set_yticks(range(len(found)), list(found), fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"{data.name}: what each loss aligns (line: std over seeds)")


EXPERIMENT = Experiment(
    "alignment",
    "InfoNCE with transport and Riemannian terms gains 5 % of R@1 over InfoNCE, and keeps accuracy where half of a "
    "modality is missing or corrupted (expected by the geometric-alignment proposal).",
    "Do transport and covariance help contrastive alignment?",
    measure,
    modalities=2,
    options=AlignmentOptions,
    labels=False,
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
