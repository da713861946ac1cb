"""docs/extend.md keeps its word: every block on it is executed, and none is longer than it says."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmfusion.train import fit

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)


def some_arrays() -> dict[str, np.ndarray]:
    """Two modalities, two classes, splits."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in {"train": 60, "dev": 20, "test": 20}.items():
        target = np.arange(count) % 2
        for name, width in {"image": 5, "text": 3}.items():
            arrays[f"{name}_{split}"] = rng.normal(size=(count, width)) + target[:, None]
        arrays[f"target_{split}"] = target
    return arrays


def apply(diff: str, root: Path) -> None:
    """Replace the old lines of every hunk, which the file has once, by the new ones."""
    for part in diff.split("+++ ")[1:]:
        name, _, body = part.partition("\n")
        path = root / name.strip()
        text = path.read_text(encoding="utf-8")
        for hunk in body.split("@@\n"):
            lines = hunk.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
            assert old and text.count(old) == 1, f"{name}: {old}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with everything that the page adds to it."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("lmf_module.py", "jwae_module.py", "hateful_memes_loader.py"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("mmfusion", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for block in PYTHON:
        if found := re.match(r"# (mmfusion/\S+)\n", block):
            (copy / found[1]).write_text(block, encoding="utf-8")
    for diff in DIFFS:
        apply(diff, copy)
    return copy


def run_module(root: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def from_python(word: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(folder)
    scope: dict[str, object] = {"arrays": some_arrays()}
    exec(next(block for block in PYTHON if word in block), scope)
    return scope


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_extension_takes_under_twenty_lines():
    for block in PYTHON:
        assert sum(bool(line.strip()) for line in block.splitlines()) < 20
    for diff in DIFFS:
        assert sum(line.startswith("+") and not line.startswith("+++") for line in diff.splitlines()) < 20


def test_a_loss_term_from_python_is_trained_on_and_logged(tmp_path, monkeypatch):
    run = from_python("further_terms", tmp_path, monkeypatch)["run"]
    lines = logged(run.folder)
    own = [line["loss"]["decorrelation"] for line in lines if line["method"] == "jWAE-LMF, rank 4"]
    assert len(own[0]) == 5 and all(np.isfinite(value).all() for value in own)
    plain = logged(fit(some_arrays()).folder)
    assert "decorrelation" not in plain[0]["loss"] and plain[-1]["loss"]["mmd"] != lines[-1]["loss"]["mmd"]


@pytest.mark.parametrize("name", ["mmd", "bce"])
def test_a_loss_term_must_not_take_the_name_of_another(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=name):
        fit(some_arrays(), further_terms={name: (1.0, lambda output, batch: output.prediction.mean())})
    assert not (tmp_path / "runs").exists()


def test_methods_from_python_are_the_lines_of_the_table(tmp_path, monkeypatch):
    run = from_python("stacks", tmp_path, monkeypatch)["run"]
    assert list(run.scores) == ["jWAE-LMF, rank 4", "jWAE-LMF, rank 2", "tensor product"]
    assert run.trained.main_row == "jWAE-LMF, rank 4" and len(run.trained.ensembles) == 3


def test_a_loss_term_and_a_baseline_that_stay(extended, tmp_path):
    np.savez(tmp_path / "mine.npz", **some_arrays())
    flags = ("--data", "mine.npz", "--epochs", "2", "--seeds", "2", "--decorrelation-weight", "0.2")
    out = run_module(extended, tmp_path, "mmfusion.train", *flags)
    assert re.search(r"^late fusion  +\d", out, re.MULTILINE)
    run = tmp_path / "runs" / "mine"
    assert json.loads((run / "run.json").read_text())["settings"]["decorrelation_weight"] == 0.2
    assert all("decorrelation" in line["loss"] for line in logged(run))
    assert (run / "baselines" / "late-fusion" / "model.safetensors").exists()


def test_a_corpus_that_stays_is_known_to_experiments_and_explanations(extended, tmp_path):
    rng = np.random.default_rng(0)
    with (tmp_path / "motion.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["split", "id", "moved", "heart_1", "heart_2", "arm_1", "arm_2", "arm_3"])
        for row in range(90):
            split = "train" if row < 50 else "dev" if row < 70 else "test"
            table.writerow([split, f"r{row}", row % 2, *(rng.normal(size=5) + row % 2)])
    (command,) = re.findall(r"^    python -m (experiments\.\S+ .*motion.*)$", PAGE, re.MULTILINE)
    out = run_module(extended, tmp_path, *command.split(), "--epochs", "2", "--seeds", "2", "--name", "motion")
    assert "baselines on motion: 20 test examples" in out
    explained = run_module(extended, tmp_path, "mmfusion.explain", "runs/motion", "--ids", "r80")
    assert "heart alone" in explained and "moved" in explained
