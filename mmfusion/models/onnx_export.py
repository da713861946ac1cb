"""ONNX export of a trained ensemble, checked against the ensemble itself.

export_onnx(run.ensemble, Path("model.onnx"))
onnxruntime.InferenceSession("model.onnx").run(["mean"], {"audio": x, "text": z})
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from mmfusion.errors import InputError
from mmfusion.files import write_atomically
from mmfusion.losses.expected import moderated_logits
from mmfusion.metrics.tasks import probabilities
from mmfusion.models.fusion import FusionEnsemble

TOLERANCE = 1e-5
OPSET = 18
CHECKED_ROWS = (1, 2, 33)  # of the dynamic batch
NAMES = ("mean", "members")


class _Exported(nn.Module):
    """Positional features (N, d_m) -> mean over members (N, ...) and members (S, N, ...)."""

    def __init__(self, ensemble: FusionEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.names = tuple(ensemble.shape["input_dims"])

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(self.names, features, strict=True))
        task = self.ensemble.task
        outputs = [member(named, reconstruct=False, joint=task == "multiclass") for member in self.ensemble.members]
        logits = torch.stack([moderated_logits(x.prediction, x.covariance, task) for x in outputs])
        members = probabilities(logits, task)
        return members.mean(0), members


def export_onnx(ensemble: FusionEnsemble, path: Path | str) -> float:
    """Write an ensemble as ONNX, run it with onnxruntime, and compare.

    Inputs are named after the modalities: raw float32 features (N, d_m), any N of at least 1. Outputs: "mean", the mean
    over members of probabilities or of a regression's values, (N,) of two classes or one value, else (N, O); and
    "members", the same of every member, (S, N) or (S, N, O).

    Returns:
        the largest difference from the ensemble itself on drawn features, relative to values above 1.

    Raises:
        InputError: a package is missing (extra [onnx]), or the file cannot be written.
        ArithmeticError: the difference exceeds 1e-5; no file is left then.
    """
    path = Path(path)
    runtime, _, _ = (_package(name) for name in ("onnxruntime", "onnx", "onnxscript"))
    names = list(ensemble.shape["input_dims"])
    model = _Exported(_on_cpu(ensemble)).eval()
    example = _features(ensemble, 2)
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        model,
        tuple(example),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=names,
        output_names=list(NAMES),
        dynamic_shapes=(tuple({0: batch} for _ in names),),
    )
    difference = 0.0

    def write_checked(temporary: Path) -> None:
        nonlocal difference
        program.save(os.fspath(temporary))
        difference = _difference(runtime, temporary, model, ensemble)
        if not difference <= TOLERANCE:  # NaN too
            raise ArithmeticError(f"{path}: what was exported differs from the ensemble by {difference:.1e}")

    write_atomically(path, write_checked)
    return difference


@torch.inference_mode()
def _difference(runtime: ModuleType, path: Path, model: _Exported, ensemble: FusionEnsemble) -> float:
    session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in CHECKED_ROWS:
        features = _features(ensemble, rows)
        given = {name: x.numpy() for name, x in zip(model.names, features, strict=True)}
        for said, wanted in zip(session.run(list(NAMES), given), model(*features), strict=True):
            wanted = wanted.numpy()
            if said.shape != wanted.shape:
                raise ArithmeticError(f"{path}: output {said.shape} is not {wanted.shape}, that of the ensemble")
            worst = max(worst, float((np.abs(said - wanted) / np.maximum(1, np.abs(wanted))).max()))
    return worst


def _features(ensemble: FusionEnsemble, rows: int) -> Sequence[Tensor]:
    """Drawn features of the mean and deviation that the first member was trained on."""
    generator = torch.Generator().manual_seed(rows)
    drawn = []
    for name, width in ensemble.shape["input_dims"].items():
        scale = ensemble.members[0].standardise[name]
        drawn.append(scale.mean.cpu() + scale.std.cpu() * torch.randn(rows, width, generator=generator))
    return drawn


def _on_cpu(ensemble: FusionEnsemble) -> FusionEnsemble:
    copy = FusionEnsemble(**ensemble.shape)
    copy.load_state_dict(ensemble.state_dict())
    return copy.eval()


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"ONNX export: the package {name} is missing; pip install 'low-rank-multimodal-fusion[onnx]'"
        ) from error
