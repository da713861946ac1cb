"""Conditions (kind, severity, draw) and every method's predictions of the test examples under them."""

import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from experiments.baselines import fit_kernel_machine
from experiments.robustness.corrupted_inputs import corruptions_of, encode_corrupted
from mmfusion.dataset import Task
from mmfusion.errors import InputError
from mmfusion.losses.expected import moderated_logits
from mmfusion.models.fusion import FusionModel
from mmfusion.models.mkl_svm import MultipleKernelSVM
from mmfusion.robustness.corruptions import WITHOUT_CHANCE, add_noise, drop_coordinates, missing_masks
from mmfusion.runs.load import TrainedRun

LEVELS = (0.25, 0.5, 0.75)
MISSING_LEVELS = (0.25, 0.5, 0.75, 1.0)
Group = Literal["input", "features", "latents", "missing"]
GROUPS = get_args(Group)
LATE_FUSION = "late fusion"
KERNEL_MACHINE = "MKL-SVM, learned weights"

ONE_OF_SEVERAL = "one of them"  # what "either" of three or more modalities is called


class Condition(NamedTuple):
    """One way to spoil the test examples, of one strength, drawn once."""

    group: Group
    name: str
    """what is done: "image blur", "feature noise", "latent dropout", "missing" and so on"""
    where: str
    """a modality; "all" of them; or, of what is missing, "either": each is missing in an equal part of the examples"""
    level: float
    """severity, in (0, 1]"""
    draw: int
    shown: str = ""
    """what `where` is called in tables and figures; default: the same"""

    @property
    def curve(self) -> str:
        """What its levels have in common."""
        return self.name if self.group == "input" else f"{self.name}, {self.shown or self.where}"

    def rng(self) -> np.random.Generator:
        """Random numbers of this curve and draw: the same for every model, and for every severity.

        So the examples that lack a modality at a low rate lack it at every higher one too.
        """
        return np.random.default_rng([zlib.crc32(repr(self[:3]).encode()), self.draw])


def check_flags(groups: Sequence[str], draws: int) -> None:
    """Raise InputError for groups that are named twice, or none, or no draws; needs no run."""
    if not groups or len(set(groups)) < len(groups):
        raise InputError(f"--groups {' '.join(groups)}: name at least one of {', '.join(GROUPS)}, each once")
    if draws < 1:
        raise InputError(f"--draws {draws}: give at least 1")


def conditions(run: TrainedRun, groups: Sequence[str] = GROUPS[1:], draws: int = 3) -> list[Condition]:
    """All conditions of these groups; what involves no chance is there once.

    Raises InputError naming the flag, as `check_flags` and where the run has no such thing.
    """
    check_flags(groups, draws)
    if "input" in groups and run.settings.get("cross_validate") is not None:
        raise InputError(
            f"--groups input: {run.folder} was cross-validated; inputs are corrupted of a data set's own split"
        )
    grid = _conditions(run, groups, draws)
    for group in groups:
        if not any(c.group == group for c in grid):
            why = "its features came as they are from a file" if group == "input" else "it has one modality alone"
            raise InputError(f"--groups {group}: {run.folder} has no such thing ({why}); leave it out")
    return grid


def _conditions(run: TrainedRun, groups: Sequence[str], draws: int) -> list[Condition]:
    names = list(run.data.input_dims)
    several = [*names, "all"] if len(names) > 1 else names
    grid = []
    if "input" in groups:
        for modality, corruptions in corruptions_of(run).items():
            grid += [
                Condition("input", f"{modality} {name}", modality, level, draw)
                for name in corruptions
                for level in LEVELS
                for draw in range(1 if name in WITHOUT_CHANCE else draws)
            ]
    for group, kind in (("features", "feature"), ("latents", "latent")):
        if group in groups:
            grid += [
                Condition(group, f"{kind} {name}", where, level, draw)
                for name in ("noise", "dropout")
                for where in several
                for level in LEVELS
                for draw in range(draws)
            ]
    if "missing" in groups and len(names) > 1:
        for where in [*names, "either"]:
            shown = ONE_OF_SEVERAL if where == "either" and len(names) > 2 else where
            for level in MISSING_LEVELS:
                # all examples lack it: nothing is left to draw
                count = 1 if level == 1 and where != "either" else draws
                grid += [Condition("missing", "missing", where, level, draw, shown) for draw in range(count)]
    return grid


class Predictor:
    """Predictions of all rows of a run under any condition; the same random numbers for all rows and seeds.

    Late fusion is the mean of the one-modality rows' predictions (Kiela et al. 2020), of those whose modality is there.
    A missing latent is 0 to every neural row; to the kernel machine, that of experiments.baselines trained anew (it is
    deterministic), a missing modality is the training mean.
    """

    def __init__(self, run: TrainedRun, device: str = "cpu", kernel_machine: bool = False) -> None:
        self.run, self.data, self.device = run, run.data, device
        self.modalities = list(run.data.input_dims)
        self.singles = [row for row in run.ensembles if len(run.ensembles[row].members[0].modalities) == 1]
        self.rows = list(run.ensembles)
        seen = {run.ensembles[row].members[0].modalities[0] for row in self.singles}
        if len(self.modalities) > 1 and seen == set(self.modalities):
            self.rows.append(LATE_FUSION)
        self._latents: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        self._inputs: dict[tuple, Tensor] = {}
        self._scales: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._machines: list[MultipleKernelSVM] = []
        if kernel_machine:
            self.rows.append(KERNEL_MACHINE)
            self._machines = [self._fit_machine(fold) for fold in range(len(self.data.folds))]

    # ---- what models say ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def clean(self, row: str, part: str = "test") -> np.ndarray:
        """(S, n) logits or (S, n[, O]) values on a part of every fold, fold after fold."""
        if row == LATE_FUSION:
            return np.mean([self.clean(single, part) for single in self.singles], axis=0)
        folds = []
        for f, fold in enumerate(self.data.folds):
            features = self._features(getattr(fold, part))
            if row == KERNEL_MACHINE:
                folds.append(self._decide(f, features))
            else:
                folds.append([_said(m, m.encode(features), self.data.task) for m in self.run.members(row, f)])
        return self._joined(folds)

    @torch.inference_mode()
    def corrupted(self, row: str, condition: Condition) -> np.ndarray | None:
        """The same on the test part under a condition; None for latents of a row that has none."""
        if row == LATE_FUSION:
            return self._late_fusion(condition)
        if row == KERNEL_MACHINE and condition.group == "latents":
            return None
        changed = self._changed(condition) if condition.group in ("input", "features") else {}
        present = self._present(condition) if condition.group == "missing" else {}
        folds, start = [], 0
        for f, fold in enumerate(self.data.folds):
            part = slice(start, start + len(fold.test))
            start = part.stop
            new = {name: x[part] for name, x in changed.items()}
            here = {name: x[part] for name, x in present.items()}
            if row == KERNEL_MACHINE:
                folds.append(self._decide(f, self._features(fold.test) | new, here))
                continue
            predictions = []
            for s, model in enumerate(self.run.members(row, f)):
                latents = dict(self._clean_latents(row, f, s, model))
                for name in new.keys() & latents.keys():
                    latents[name] = model.jwae.encoders[name](model.standardise[name](new[name]))
                if condition.group == "latents":
                    latents = self._corrupt_latents(condition, latents, f, model, part)
                mask = {name: torch.from_numpy(here[name]).float() for name in here.keys() & latents.keys()}
                predictions.append(_said(model, latents, self.data.task, mask))
            folds.append(predictions)
        return self._joined(folds)

    def _late_fusion(self, condition: Condition) -> np.ndarray:
        predictions = np.stack([self.corrupted(single, condition) for single in self.singles])  # (M, S, n[, O])
        if condition.group != "missing":
            return predictions.mean(0)
        present = self._present(condition)
        there = np.stack([present[self.run.ensembles[row].members[0].modalities[0]] for row in self.singles])  # (M, n)
        weight = (there / there.sum(0)).reshape(len(there), 1, -1, *[1] * (predictions.ndim - 3))
        return (predictions * weight).sum(0)

    # ---- what is corrupted ----------------------------------------------------------------------------------------

    def prepare(self, conditions: Sequence[Condition]) -> None:
        """Encode all corrupted inputs that these conditions need, in one go. Raises InputError."""
        keys = [self._key(c) for c in conditions if c.group == "input"]
        self._inputs |= encode_corrupted(self.run, [key for key in keys if key not in self._inputs], self.device)

    def masks(self, condition: Condition) -> dict[str, np.ndarray]:
        """{modality: (n,) of 1 and 0}: which test examples have which modality under a missing condition."""
        return self._present(condition)

    def affected(self, condition: Condition) -> np.ndarray:
        """(n,) bool: the test examples that a condition changes; all, unless a modality is missing in some."""
        if condition.group != "missing":
            return np.ones(len(self.data.test_rows), bool)
        return np.any([mask == 0 for mask in self._present(condition).values()], axis=0)

    def _key(self, condition: Condition) -> tuple[str, str, float, int]:
        name = condition.name.removeprefix(f"{condition.where} ")
        return condition.where, name, condition.level, condition.draw

    def _features(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: x[rows] for name, x in self.data.pool.features.items()}

    def _changed(self, condition: Condition) -> dict[str, Tensor]:
        """{modality: raw features (n, d) of all folds' test parts}, of the modalities that are corrupted."""
        if condition.group == "input":
            if self._key(condition) not in self._inputs:
                self.prepare([condition])
            return {condition.where: self._inputs[self._key(condition)]}
        rng, grid = condition.rng(), {}
        for name in self._where(condition):
            folds = []
            for fold in self.data.folds:
                x, train = (self.data.pool.features[name][rows] for rows in (fold.test, fold.train))
                if condition.name == "feature noise":
                    folds.append(add_noise(x, condition.level, train.std(0), rng))
                else:
                    folds.append(drop_coordinates(x, condition.level, train.mean(0), rng))
            grid[name] = torch.cat(folds)
        return grid

    def _where(self, condition: Condition) -> list[str]:
        return self.modalities if condition.where == "all" else [condition.where]

    def _present(self, condition: Condition) -> dict[str, np.ndarray]:
        size = len(self.data.test_rows)
        return missing_masks(self.modalities, condition.where, condition.level, size, condition.rng())

    def _corrupt_latents(
        self, condition: Condition, latents: dict[str, Tensor], fold: int, model: FusionModel, part: slice
    ) -> dict[str, Tensor]:
        """Noise in units of the latent's own standard deviation in training, or coordinates set to its mean there."""
        rng, size = condition.rng(), len(self.data.test_rows)
        changed = dict(latents)
        for name in self._where(condition):
            # drawn for all test examples and modalities, so that folds and rows share them
            width = model.jwae.latent_dim
            if condition.name == "latent noise":
                noise = rng.standard_normal((size, width), dtype=np.float32)[part]
            else:
                noise = rng.random((size, width), dtype=np.float32)[part]
            if name not in latents:
                continue
            mean, std = self._latent_scale(model, name, fold)
            z, noise = latents[name], torch.from_numpy(noise)
            if condition.name == "latent noise":
                changed[name] = z + condition.level * std * noise
            else:
                changed[name] = torch.where(noise < condition.level, mean, z)
        return changed

    def _latent_scale(self, model: FusionModel, name: str, fold: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (L,) of one model's latent on its training part."""
        key = (id(model), name)
        if key not in self._scales:
            x = self.data.pool.features[name][self.data.folds[fold].train]
            std, mean = torch.std_mean(model.jwae.encoders[name](model.standardise[name](x)), 0)
            self._scales[key] = mean, std
        return self._scales[key]

    def _clean_latents(self, row: str, fold: int, seed: int, model: FusionModel) -> dict[str, Tensor]:
        key = (row, fold, seed)
        if key not in self._latents:
            self._latents[key] = model.encode(self._features(self.data.folds[fold].test))
        return self._latents[key]

    # ---- the kernel machine ---------------------------------------------------------------------------------------

    def _fit_machine(self, fold: int) -> MultipleKernelSVM:
        rows = self.data.folds[fold].train
        if self.run.trained_on_dev:
            rows = torch.cat([rows, self.data.folds[fold].dev]).unique()
        return fit_kernel_machine(self.data, rows)

    def _decide(
        self, fold: int, features: dict[str, Tensor], present: dict[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """(1, n[, O]); a missing modality is the training mean."""
        filled = {}
        for name, x in features.items():
            mask = (present or {}).get(name)
            if mask is not None:
                mean = self.run.members(self.run.main_row, fold)[0].standardise[name].mean
                x = torch.where(torch.from_numpy(mask).unsqueeze(-1) > 0, x, mean)
            filled[name] = x.numpy()
        return self._machines[fold].decision(filled)[None].astype(np.float32)

    def _joined(self, folds: list) -> np.ndarray:
        """Folds of S predictions (n_f, O) -> (S, n), or (S, n, O) where a model says several things of one example."""
        blocks = []
        for predictions in folds:
            x = predictions if isinstance(predictions, np.ndarray) else torch.stack(predictions).numpy()
            blocks.append(x[..., 0] if x.ndim == 3 and not self.data.has_columns else x)
        return np.concatenate(blocks, axis=1)


def _said(
    model: FusionModel, latents: dict[str, Tensor], task: Task, present: dict[str, Tensor] | None = None
) -> Tensor:
    """Logits of the expected probability, or values (n, O), of latents of which some may be missing."""
    prediction, covariance = model.head(latents, present)
    return moderated_logits(prediction, covariance, task)
