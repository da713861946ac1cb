"""The README keeps its word: its snippet runs, its commands and files and flags exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import explain
from experiments import experiment, reproduce, robustness, train, uncertainty
from main_hateful_memes import Config

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


def test_setup_commands_are_the_promised_ones_and_ci_calls_the_test_command():
    assert COMMANDS[0].strip() == "pip install -r requirements.txt && python main_hateful_memes.py"
    assert COMMANDS[1].strip() == "pip install -r requirements-dev.txt && python -m pytest"
    assert COMMANDS[1].strip() in (ROOT / ".ci/run").read_text().splitlines()


def test_every_module_is_in_the_file_table_and_in_the_package():
    modules = {path.name for path in ROOT.glob("*.py")}
    table = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert modules == table
    packaged = set(re.findall(r'^    "(\w+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert {f"{name}.py" for name in packaged} == modules


def test_every_flag_and_benchmark_that_is_named_exists():
    configs = (Config, explain.Config, experiment.Options, train.TrainOptions, reproduce.Config)
    configs += (robustness.Options, uncertainty.Options)
    known = {f"--{field.name.replace('_', '-')}" for config in configs for field in dataclasses.fields(config)}
    others = {"--help", "--nproc_per_node", "--no-deps"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)):
        named_by_benchmark = any(flag in path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
        assert flag in known | others or named_by_benchmark, flag
    for module in re.findall(r"python -m ((?:benchmarks|experiments)\.\w+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_linked_files_exist(link):
    assert (ROOT / link).exists()


def test_every_experiment_is_in_the_table_of_questions():
    named = set(re.findall(r"^\| .*`python -m experiments\.(\w+)`", README, re.MULTILINE))
    assert {*reproduce.EXPERIMENTS, "reproduce"} <= named


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@@|TODO|TBD|XXX", README)
