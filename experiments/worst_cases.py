"""Worst-case scores of every row of a run: exact on latents, certified and attacked on features; and their table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from experiments import adversarial
from experiments.adversarial import NAMES, SIZES, Check, Truth
from experiments.trained_run import TrainedRun
from lmf_module import LowRankMultimodalFusion

NORMS = (2, math.inf)
CHECK_SIZE = 0.1  # rho at which an attack is checked


@dataclass
class WorstCases:
    """Scores under the worst change of one modality, mean over test examples; sizes are adversarial.SIZES."""

    latent: dict[tuple[str, str, str], np.ndarray]
    """{(row, modality, norm): (sizes, S)} exact, LMF rows"""
    joint: dict[tuple[str, str], np.ndarray]
    """{(row, pair): (sizes, S)} certified, two latents in l2, LMF rows with one logit"""
    certified: dict[tuple[str, str, str], np.ndarray]
    """{(row, modality, norm): (sizes, attacked seeds)} features, LMF rows"""
    attacked: dict[tuple[str, str, str], np.ndarray]
    """the same by PGD, any head"""
    checks: list[Check]


def measure_worst_cases(run: TrainedRun, attack_seeds: int) -> WorstCases:
    """Certificates on all LMF rows of two or more modalities, attacks on these and on concatenation.

    The tensor product is not attacked: three modalities of width 33 are 36,000 products for each example and step.
    """
    study = run.study
    rows = [row for row, e in run.ensembles.items() if len(e.members[0].modalities) > 1]
    lmf = [row for row in rows if isinstance(run.members(row)[0].fusion, LowRankMultimodalFusion)]
    attacked_rows = lmf + [row for row in rows if row.startswith("concatenation")]
    folds = [
        (
            {name: x[fold.test] for name, x in study.pool.features.items()},
            {name: x[fold.train] for name, x in study.pool.features.items()},
            Truth(study.pool.target[fold.test].reshape(len(fold.test), -1), study.task == "binary", study.target_scale),
        )
        for fold in study.folds
    ]
    latent, joint, certified, attacked = {}, {}, {}, {}
    seeds = range(min(attack_seeds, run.seeds))
    for row in tqdm(attacked_rows, desc="worst cases", unit="row"):
        names = run.members(row)[0].modalities

        def over_folds(measure, row: str = row, count: int = run.seeds):
            """measure(model, features, train, truth) -> {key: (sizes, n)}, pooled over folds: {key: (sizes, seeds)}."""
            made: dict[str, list[np.ndarray]] = {}
            for s in range(count):
                parts: dict[str, list[torch.Tensor]] = {}
                for f, (features, train, truth) in enumerate(folds):
                    for key, values in measure(run.members(row, f)[s], features, train, truth).items():
                        parts.setdefault(key, []).append(values)
                for key, values in parts.items():
                    made.setdefault(key, []).append(torch.cat(values, 1).mean(1).numpy())
            return {key: np.stack(values, -1) for key, values in made.items()}

        for norm in adversarial.NAMES if row in lmf else ():
            exact = over_folds(
                lambda m, x, train, t, norm=norm: adversarial.latent_scores(
                    m, x, t, adversarial.latent_stds(m, train), norm
                )
            )
            latent |= {(row, name, NAMES[norm]): values for name, values in exact.items()}
        if row in lmf and study.task == "binary":
            pairs = over_folds(
                lambda m, x, train, t: adversarial.joint_scores(m, x, t, adversarial.latent_stds(m, train))
            )
            joint |= {(row, pair): values for pair, values in pairs.items()}
        for norm in NORMS if seeds else ():
            if row in lmf:
                bounds = over_folds(
                    lambda m, x, train, t, norm=norm, names=names: {
                        name: adversarial.feature_certificates(m, x, t, name, norm) for name in names
                    },
                    count=len(seeds),
                )
                certified |= {(row, name, NAMES[norm]): values for name, values in bounds.items()}
            attacks = over_folds(
                lambda m, x, train, t, norm=norm, names=names: {
                    name: adversarial.attacked_scores(m, x, t, name, norm) for name in names
                },
                count=len(seeds),
            )
            attacked |= {(row, name, NAMES[norm]): values for name, values in attacks.items()}
    checks = _checks(run, folds[0], attacked) if len(seeds) > 1 else []
    return WorstCases(latent, joint, certified, attacked, checks)


def _checks(run: TrainedRun, fold: tuple, attacked: Mapping[tuple[str, str, str], np.ndarray]) -> list[Check]:
    """Carlini's checks on the first two members, in the modality that attacks hurt most; PGD on latents of all."""
    features, _, truth = fold
    model, other = run.members(run.main_row)[:2]
    checks = []
    for norm in NORMS:
        label = NAMES[norm]
        worst = min(model.modalities, key=lambda name: attacked[run.main_row, name, label].mean())
        checks += [
            Check(f"{label}, {worst}: {check.text}", check.holds)
            for check in adversarial.attack_checks(model, other, features, truth, worst, norm, CHECK_SIZE)
        ]
        for name in model.modalities:
            gap = adversarial.latent_attack_gap(model, features, name, norm)
            checks.append(
                Check(f"{label}, latent of {name}: PGD against the closed form differ by {gap:.1e}", gap < 1e-4)
            )
    return checks


def worst_table(run: TrainedRun, worst: WorstCases, width: int) -> list[str]:
    """Scores at every size: exact on latents; on features certified, attacked and the gap between."""
    head = "".join(f"  rho {size:<5g}" for size in SIZES)
    lines = [f"worst change of one latent, exact{'':{max(0, width - 3)}}{head}"]
    labels = sorted({(name, norm) for _, name, norm in worst.latent})
    rows = list(dict.fromkeys(row for row, _, _ in worst.attacked or worst.latent))
    for name, norm in labels:
        for row in rows:
            if (row, name, norm) in worst.latent:
                lines.append(_sized(f"{name} {norm}", row, worst.latent[row, name, norm], width))
    for (row, pair), values in worst.joint.items():
        lines.append(_sized(f"{pair} l2", row, values, width))
    if worst.attacked:
        lines += ["", f"worst change of one modality's features: certified, then attacked (PGD){head}"]
        for name, norm in sorted({(name, norm) for _, name, norm in worst.attacked}):
            for row in rows:
                if (row, name, norm) in worst.certified:
                    lines.append(_sized(f"{name} {norm} certified", row, worst.certified[row, name, norm], width))
                lines.append(_sized(f"{name} {norm} attacked", row, worst.attacked[row, name, norm], width))
        gaps = [worst.attacked[key] - values for key, values in worst.certified.items()]
        lines.append(f"gap between attack and certificate: mean {np.mean(gaps):.3f}, largest {np.max(gaps):.3f}")
    return lines


def _sized(what: str, row: str, values: np.ndarray, width: int) -> str:
    return f"  {what:28}  {row:{width}}" + "".join(f"  {value:9.3f}" for value in values.mean(-1))
