"""The house keeps its floors: an import goes down, never up, never into a script, never from inside a function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"lmf_module", "jwae_module", "mmfusion.errors", "mmfusion.sequences"},
    {"mmfusion.dataset"},
    {"mmfusion.losses", "mmfusion.metrics", "mmfusion.files", "mmfusion.distributed"},
    {"mmfusion.models", "mmfusion.encoders", "mmfusion.cli"},
    {"mmfusion.robustness", "hateful_memes_loader"},
    {"mmfusion.data"},
    {"mmfusion.training"},
    {"mmfusion.runs"},
    {"mmfusion.explain"},
    {
        "mmfusion.estimators",
        "mmfusion.train",
        "mmfusion.diagnose",
        "mmfusion.retrieve",
        "mmfusion.search",
        "mmfusion.geometry",
    },
    {"main_hateful_memes", "experiments"},
    {"benchmarks"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
OWN = {
    "lmf_module",
    "jwae_module",
    "hateful_memes_loader",
    "main_hateful_memes",
    "mmfusion",
    "experiments",
    "benchmarks",
}
FILES = [path for place in (".", "mmfusion", "experiments", "benchmarks") for path in sorted((ROOT / place).glob(
    "*.py" if place == "." else "**/*.py"))]  # fmt: skip


def room(module: str) -> str:
    """The room that a module lies in: its first two names inside the package, else the first."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "mmfusion" else parts[0]


def own_imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, inside a function) of every import of the project's own code."""
    top = {id(node) for node in getattr(tree, "body", [])}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name, id(node) not in top) for name in names if name.split(".")[0] in OWN]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_and_stand_at_the_top_of_the_file(path):
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module, inside in own_imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert not inside, f"{path}: imports {module} inside a function"
        there = room(module)
        if there == "mmfusion":  # the package itself, imported for its effect on waiting threads
            continue
        assert here == "mmfusion" or here == there or LEVEL[there] < LEVEL[here], f"{here} imports {there}"


def test_an_import_that_climbs_or_hides_is_seen():
    tree = ast.parse("from mmfusion.runs import load\ndef f():\n    import mmfusion.training.fit\n")
    assert own_imports(tree) == [("mmfusion.runs.load", False), ("mmfusion.training.fit", True)]
    assert LEVEL[room("mmfusion.runs.load")] > LEVEL[room("mmfusion.training.fit")]
