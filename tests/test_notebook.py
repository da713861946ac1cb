"""The notebooks run as committed and show what their text says."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "lmf_tour.ipynb"
YOUR_DATA = ROOT / "notebooks" / "your_data.ipynb"


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


@pytest.fixture
def notebook(environment: None) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine spinning threads cost more than they bring


def figures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_notebook_shows_what_its_text_says(notebook):
    execute(notebook, NOTEBOOK.parent)
    assert figures(notebook) == 3
    summary = json.loads(notebook.cells[-1].outputs[0].text)
    by_rank = dict(zip(summary["ranks"], summary["r_squared"], strict=True))
    # each of the four planted terms needs a rank; the fifth and sixth bring nothing
    assert by_rank[1] < by_rank[2] - 0.05 < by_rank[3] - 0.1 < by_rank[4] - 0.1
    assert by_rank[4] > summary["ceiling"] - 0.03
    assert max(by_rank[5], by_rank[6]) < summary["ceiling"]
    assert summary["spectrum"][:3] == pytest.approx(summary["planted"], abs=0.12)
    assert max(summary["spectrum"][3:]) < 0.2
    assert min(summary["alignment"]) > 0.95
    # the same function: other raw factors
    assert summary["strength_change"] > 0.3


def test_notebook_finds_the_modules_from_the_repository_root(notebook):
    imports = next(k for k, cell in enumerate(notebook.cells) if "from lmf_module import" in cell.source)
    notebook.cells = [
        *notebook.cells[: imports + 1],
        nbformat.v4.new_code_cell("print(LowRankMultimodalFusion((2, 3)))"),
    ]
    execute(notebook, ROOT)
    assert "input_dims=(2, 3)" in notebook.cells[-1].outputs[0].text


def test_a_first_hour_with_own_data_goes_as_the_notebook_says(environment):
    notebook = nbformat.read(YOUR_DATA, as_version=4)
    execute(notebook, YOUR_DATA.parent)  # its cells assert what its text says
    assert figures(notebook) == 1
    summary = json.loads(notebook.cells[-2].outputs[0].text)
    assert len(summary["accuracy"]) == 8 and summary["accuracy"]["jWAE-LMF"] > 0.93
    assert summary["margin"] > 0 and set(summary["radii"]) == {"upper", "lower", "rows", "columns", "fourier", "edges"}
    assert not (YOUR_DATA.parent / "runs").exists()


@pytest.mark.parametrize(("path", "count"), [(NOTEBOOK, 3), (YOUR_DATA, 1)], ids=lambda one: getattr(one, "stem", ""))
def test_committed_notebook_is_small_and_names_no_machine(path, count):
    text = path.read_text()
    assert len(text) < 300_000
    assert figures(nbformat.read(path, as_version=4)) == count
    assert not any(place in text for place in ("/home/", "/tmp/", "/root/", "/work/"))
