"""Worst-case scores of every method of a run: exact on latents, certified and attacked on features."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from experiments.attacked import attacked_rows
from lmf_module import LowRankMultimodalFusion
from mmfusion.models.fusion import FusionModel
from mmfusion.models.heads import TensorHead
from mmfusion.robustness import worst_case
from mmfusion.robustness.worst_case import NAMES, SIZES, Check, Criterion
from mmfusion.runs.load import TrainedRun

NORMS = (2, math.inf)
CHECK_SIZE = 0.1  # rho at which an attack is checked
ATTACKED = 400  # test examples of all folds together, drawn where there are more; the same for all rows


TENSOR_PRODUCTS = 5000  # of latents: a tensor product head of more is not attacked, each step would take a second


@dataclass
class WorstCases:
    """Scores under the worst change of one modality, mean over ATTACKED test examples; sizes are worst_case.SIZES."""

    seeds: int
    """that were attacked: the first ones"""
    clean: dict[str, np.ndarray]
    """{row: (S,)}"""
    latent: dict[tuple[str, str, str], np.ndarray]
    """{(row, modality, norm): (sizes, S)} exact, LMF rows"""
    joint: dict[tuple[str, str], np.ndarray]
    """{(row, pair): (sizes, S)} certified, two latents in l2, LMF rows; none of a regression"""
    certified: dict[tuple[str, str, str], np.ndarray]
    """{(row, modality, norm): (sizes, attacked seeds)} features, LMF rows"""
    attacked: dict[tuple[str, str, str], np.ndarray]
    """the same by PGD, any head"""
    checks: list[Check]


class _FoldData(NamedTuple):
    """What a fold's models are measured on."""

    test: dict[str, torch.Tensor]
    train: dict[str, torch.Tensor]
    criterion: Criterion


Measure = Callable[[FusionModel, _FoldData], Mapping[str, torch.Tensor]]


def measure_worst_cases(run: TrainedRun, attack_seeds: int) -> WorstCases:
    """Certificates on all LMF rows, attacks on every row but tensor products that are too large."""
    data = run.data
    folds = [
        _FoldData(
            {name: x[rows] for name, x in data.pool.features.items()},
            {name: x[fold.train] for name, x in data.pool.features.items()},
            Criterion(data.pool.target[rows].reshape(len(rows), -1), data.task, data.target_scale),
        )
        for fold, rows in zip(data.folds, attacked_rows(data, ATTACKED), strict=True)
    ]
    seeds = min(attack_seeds, len(run.seeds))
    worst = WorstCases(seeds, {}, {}, {}, {}, {}, [])
    rows = [row for row in run.ensembles if _attackable(run.members(row)[0])]
    for row in tqdm(rows, desc="worst cases", unit="row"):
        _measure_row(run, row, folds, worst)
    if seeds:
        worst.checks = _checks(run, folds[0], worst)
    return worst


def _attackable(model: FusionModel) -> bool:
    large = (model.jwae.latent_dim + 1) ** len(model.modalities) > TENSOR_PRODUCTS
    return not (isinstance(model.fusion, TensorHead) and large)


def _measure_row(run: TrainedRun, row: str, folds: Sequence[_FoldData], worst: WorstCases) -> None:
    """Enter everything about one row."""
    names = run.members(row)[0].modalities
    is_lmf = isinstance(run.members(row)[0].fusion, LowRankMultimodalFusion)

    def each(measure: Measure, seeds: int = len(run.seeds)) -> dict[str, np.ndarray]:
        return _over_folds(run, row, folds, measure, seeds)

    worst.clean[row] = each(lambda m, f: {"clean": worst_case.clean_scores(m, f.test, f.criterion)[None]})["clean"][0]
    for norm, label in NAMES.items() if is_lmf else ():
        changes = each(
            lambda m, f, norm=norm: worst_case.latent_scores(
                m, f.test, f.criterion, worst_case.latent_stds(m, f.train), norm
            )
        )
        worst.latent.update({(row, name, label): values for name, values in changes.items()})
    if is_lmf and run.task != "regression":
        changes = each(lambda m, f: worst_case.joint_scores(m, f.test, f.criterion, worst_case.latent_stds(m, f.train)))
        worst.joint.update({(row, pair): values for pair, values in changes.items()})
    for norm in NORMS if worst.seeds else ():
        kinds = [(worst.attacked, worst_case.attacked_scores)]
        kinds += [(worst.certified, worst_case.feature_certificates)] if is_lmf else []
        for of, measure in kinds:
            changes = each(
                lambda m, f, norm=norm, measure=measure: {
                    name: measure(m, f.test, f.criterion, name, norm) for name in names
                },
                worst.seeds,
            )
            of.update({(row, name, NAMES[norm]): values for name, values in changes.items()})


def _over_folds(
    run: TrainedRun, row: str, folds: Sequence[_FoldData], measure: Measure, seeds: int
) -> dict[str, np.ndarray]:
    """{key: (sizes, seeds)}: mean over all folds' test examples of what `measure` gives, {key: (sizes, n)}."""
    changes: dict[str, list[np.ndarray]] = {}
    for s in range(seeds):
        parts: dict[str, list[torch.Tensor]] = {}
        for f, fold in enumerate(folds):
            for key, values in measure(run.members(row, f)[s], fold).items():
                parts.setdefault(key, []).append(values)
        for key, values in parts.items():
            changes.setdefault(key, []).append(torch.cat(values, 1).mean(1).numpy())
    return {key: np.stack(values, -1) for key, values in changes.items()}


def _checks(run: TrainedRun, fold: _FoldData, worst: WorstCases) -> list[Check]:
    """Carlini's checks on the main row and on concatenation (first member, first fold, the modality hurt most).

    And PGD on latents against the closed form, and that no attack on any row has got below its certificate.
    """
    checks = []
    rows = [run.main_row, *(row for row in worst.clean if row.startswith("concatenation"))]
    for row, norm in itertools.product(rows, NORMS):
        label = NAMES[norm]
        model, *others = run.members(row)[:2]
        hurt = min(model.modalities, key=lambda name: worst.attacked[row, name, label].mean())
        for check in worst_case.attack_checks(
            model, others[0] if others else None, fold.test, fold.criterion, hurt, norm, CHECK_SIZE
        ):
            checks.append(Check(f"{row}, {label}, {hurt}: {check.text}", check.holds))
    model = run.members(run.main_row)[0]
    for norm, name in itertools.product(NORMS, model.modalities):
        gap = worst_case.latent_attack_gap(model, fold.test, fold.criterion, name, norm)
        text = f"{run.main_row}, {NAMES[norm]}, latent of {name}: PGD and the closed form differ by {gap:.1e} of it"
        checks.append(Check(text, gap < 1e-4))
    least = min(float((worst.attacked[key] - values).min()) for key, values in worst.certified.items())
    checks.append(Check(f"least gap between an attacked and a certified score: {least:.4f}", least >= -1e-6))
    return checks


def worst_table(worst: WorstCases, width: int) -> list[str]:
    """Scores at every size: exact on latents; on features certified, attacked and the gap between."""
    head = f"{'clean':>11}" + "".join(f"  rho {size:<5g}" for size in SIZES)
    lines = [f"{'worst change of one latent, exact (of two: a bound), all seeds':{width + 32}}{head}"]
    for row, name, norm in sorted(worst.latent, key=lambda key: key[1:]):
        lines.append(_sized(f"{name} {norm}", row, worst.clean[row], worst.latent[row, name, norm], width))
    for (row, pair), values in worst.joint.items():
        lines.append(_sized(f"{pair} l2", row, worst.clean[row], values, width))
    if worst.attacked:
        title = f"worst change of one modality's features, first {worst.seeds} seed(s)"
        lines += ["", f"{title:{width + 32}}{head}"]
        for row, name, norm in sorted(worst.attacked, key=lambda key: key[1:]):
            for kind, of in (("certified", worst.certified), ("attacked", worst.attacked)):
                if (row, name, norm) in of:
                    clean = worst.clean[row][: worst.seeds]
                    lines.append(_sized(f"{name} {norm} {kind}", row, clean, of[row, name, norm], width))
        gaps = [worst.attacked[key] - values for key, values in worst.certified.items()]
        lines.append(f"gap between attack and certificate: mean {np.mean(gaps):.3f}, largest {np.max(gaps):.3f}")
    return lines


def _sized(what: str, row: str, clean: np.ndarray, values: np.ndarray, width: int) -> str:
    cells = "".join(f"  {value:9.3f}" for value in (clean.mean(), *values.mean(-1)))
    return f"  {what:28}  {row:{width}}{cells}"
