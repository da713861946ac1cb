"""The README keeps its word: its snippet runs, its commands and files and flags exist."""

import dataclasses
import importlib.util
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import baselines, experiment, reproduce, results_summary, robustness, uncertainty
from main_hateful_memes import Config
from mmfusion import train
from mmfusion.explain import __main__ as explain

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def test_the_layer_in_six_lines_gives_the_shapes_it_says():
    snippet = next(s for s in SNIPPETS if "LowRankMultimodalFusion" in s)
    lines = [line for line in snippet.splitlines() if line]
    assert len(lines) == 6
    scope: dict[str, object] = {}
    shapes = 0
    for line in lines:
        code, _, said = line.partition("  # ")
        if said:
            assert str(eval(code, scope)) == said.strip()
            shapes += 1
        else:
            exec(code, scope)
    assert shapes == 2
    assert torch.is_tensor(scope["image"])


@pytest.fixture
def own_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """mine.npz of the widths that the snippet says, three classes, in an empty working folder."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in {"train": 60, "dev": 20, "test": 20}.items():
        target = np.arange(count) % 3
        for name, width in {"image": 512, "text": 384}.items():
            arrays[f"{name}_{split}"] = rng.normal(size=(count, width)) + 0.3 * (
                target[:, None] == np.arange(width) % 3
            )
        arrays[f"target_{split}"] = target
    np.savez(tmp_path / "mine.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_your_own_data_takes_five_lines_and_one_command(own_arrays):
    snippet = next(s for s in SNIPPETS if "mine.npz" in s)
    lines = [line for line in snippet.splitlines() if line]
    assert len(lines) == 5
    scope: dict[str, object] = {}
    exec("\n".join(lines[:-1]), scope)
    scores, probabilities, parts, radii = eval(lines[-1], scope)
    assert (own_arrays / "runs/arrays/report.png").exists()
    assert scores["jWAE-LMF, rank 4"]["test"]["accuracy"]["mean"] > 0.5
    assert probabilities.shape == (3, 3) and np.allclose(probabilities.sum(1), 1)
    assert list(parts) == ["bias", "image alone", "text alone", "image x text"]
    assert {name: radius.shape for name, radius in radii.items()} == {"image": (5, 3), "text": (5, 3)}
    (command,) = (c.strip() for c in COMMANDS if "mine.npz" in c)
    prefix = "python -m mmfusion.train "
    assert command.startswith(prefix) and train.run(command.removeprefix(prefix).split()) == 0
    same = train.Run(own_arrays / "runs/mine").scores
    assert same == scores  # the same data and defaults: the same scores


def test_setup_commands_are_the_promised_ones_and_ci_calls_the_test_command():
    assert COMMANDS[0].strip() == "pip install -r requirements.txt && python main_hateful_memes.py"
    assert COMMANDS[1].strip() == "pip install -r requirements-dev.txt && python -m pytest"
    assert COMMANDS[1].strip() in (ROOT / ".ci/run").read_text().splitlines()


def test_four_modules_stand_at_the_top_level_and_are_what_is_packaged():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == {"hateful_memes_loader", "jwae_module", "lmf_module", "main_hateful_memes"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["py-modules"]) == modules
    assert settings["packages"]["find"]["include"] == ["mmfusion*"]


def test_every_flag_and_benchmark_that_is_named_exists():
    configs = (explain.Config, experiment.Options, baselines.TrainOptions, reproduce.Config)
    configs += (robustness.Options, uncertainty.Options)
    sections = [getattr(c(), field.name) for c in (Config, train.Config) for field in dataclasses.fields(c)]
    names = [field.name for config in (*configs, *sections) for field in dataclasses.fields(config)]
    known = {f"--{name.replace('_', '-')}" for name in names}
    others = {"--help", "--nproc_per_node", "--no-deps"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)):
        named_by_benchmark = any(flag in path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
        assert flag in known | others or named_by_benchmark, flag
    for module in re.findall(r"python -m ((?:benchmarks|experiments)\.\w+)", README):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_linked_files_exist(link):
    assert (ROOT / link).exists()


def test_every_experiment_is_in_the_table_of_questions():
    named = re.findall(r"^\| .* \| `experiments\.(\w+)`(?: RUN)? \| .* \|$", README, re.MULTILINE)
    assert sorted(named) == sorted(reproduce.EXPERIMENTS)


def test_answers_are_those_of_the_kept_results():
    kept = ROOT / "docs/results/contrasts.csv"
    if not kept.exists():
        pytest.skip("experiments.reproduce has not been run: docs/results/contrasts.csv is not there")
    assert results_summary.with_answers(README, results_summary.read_contrasts(kept)) == README


def test_readme_is_short():
    assert len(README.split()) <= 1300


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@@|TODO|TBD|XXX", README)
