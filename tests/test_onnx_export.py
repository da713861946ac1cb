"""An exported ensemble says what the ensemble says, for any number of rows."""

import importlib.util
import sys

import pytest
import torch

from mmfusion.errors import InputError
from mmfusion.models import onnx_export
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.models.onnx_export import export_onnx

DIMS = {"audio": 5, "text": 4, "video": 3}
LACKING = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(LACKING), reason=f"packages {', '.join(LACKING)} of the extra [onnx] are missing")


def ensemble(task: str = "binary", outputs: int = 1, **shape: object) -> FusionEnsemble:
    torch.manual_seed(0)
    made = FusionEnsemble(DIMS, 2, 6, 8, 3, outputs, task=task, **shape).eval()
    for member in made.members:
        member.fit_standardisation({name: 100 + 3 * torch.randn(50, width) for name, width in DIMS.items()})
        member.rescale.fit(5 * torch.randn(50, outputs)) if task == "regression" else None
    return made


@needs_onnx
@pytest.mark.parametrize(
    "task, outputs, shape",
    [
        ("binary", 1, {}),
        ("multiclass", 3, {}),
        ("multilabel", 2, {"spectral_norm": 1.0}),
        ("regression", 1, {}),
        ("regression", 2, {"fusion": "tensor"}),
        ("binary", 1, {"fusion": "concatenation"}),
    ],
)
def test_exported_ensemble_says_the_same_for_any_number_of_rows(task, outputs, shape, tmp_path):
    import onnxruntime

    model, path = ensemble(task, outputs, **shape), tmp_path / "model.onnx"
    assert export_onnx(model, path) <= 1e-5
    session = onnxruntime.InferenceSession(str(path))
    assert {i.name: i.shape[1] for i in session.get_inputs()} == DIMS
    for rows in (1, 7, 100):
        x = {name: 100 + torch.randn(rows, width) for name, width in DIMS.items()}
        mean, members = session.run(["mean", "members"], {name: value.numpy() for name, value in x.items()})
        wanted = model.predict(x)
        torch.testing.assert_close(torch.from_numpy(members), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(mean), wanted.mean(0), rtol=1e-5, atol=1e-5)


@needs_onnx
def test_an_export_that_differs_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(ArithmeticError, match="differs"):
        export_onnx(ensemble(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"onnxruntime is missing; pip install .*\[onnx\]") as caught:
        export_onnx(ensemble(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
