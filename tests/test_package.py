"""The installed package: the four modules and mmfusion, nothing else, working from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from small_memes import write_bert, write_memes

ROOT = Path(__file__).parent.parent
MODULES = {"hateful_memes_loader", "jwae_module", "lmf_module", "main_hateful_memes"}


def python(*arguments: object, cwd: Path, path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An empty folder into which the package was installed."""
    target, source = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("source")
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)  # a build leaves folders behind, and picks up old ones
    shutil.copytree(ROOT / "mmfusion", source / "mmfusion", ignore=shutil.ignore_patterns("__pycache__"))
    flags = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "-q", "--target", target)
    done = python("-m", "pip", "install", *flags, source, cwd=source, path=Path())
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def run_folder(installed, tmp_path_factory) -> Path:
    """A run made by the installed main script on small memes."""
    place = tmp_path_factory.mktemp("elsewhere")
    write_bert(place / "bert")
    write_memes(place / "memes", {"train": 24, "dev": 8})
    flags = "--jsonl memes/train.jsonl --image-encoder random:resnet50 --image-size 32 --text-encoder random:bert"
    sizes = "--latent-dim 4 --hidden-dim 8 --rank 2 --epochs 1 --batch-size 8 --seeds 2 --device cpu --name small"
    done = python("-m", "main_hateful_memes", *flags.split(), *sizes.split(), cwd=place, path=installed)
    assert done.returncode == 0, done.stderr
    return place / "runs/small"


def test_four_modules_and_one_package_are_installed_and_nothing_else(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"__pycache__"} == {f"{name}.py" for name in MODULES} | {"mmfusion"}
    assert (installed / "mmfusion/py.typed").exists()
    shipped = {path.relative_to(installed) for path in (installed / "mmfusion").rglob("*.py")}
    assert shipped == {path.relative_to(ROOT) for path in (ROOT / "mmfusion").rglob("*.py")}


def test_installed_explain_and_from_pretrained_work_from_another_folder(installed, run_folder, tmp_path):
    done = python("-m", "mmfusion.explain", run_folder, "--split", "dev", "--summary", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "explanations/small-dev.html").exists()
    assert not (tmp_path / "cache").exists(), "encoded anew"
    code = (
        "import sys; from mmfusion.models.fusion import FusionEnsemble;"
        "print(len(FusionEnsemble.from_pretrained(sys.argv[1]).members))"
    )
    done = python("-c", code, run_folder, cwd=tmp_path, path=installed)
    assert done.stdout.strip() == "2", done.stderr


def test_layer_and_autoencoder_import_torch_alone(installed, tmp_path):
    code = (
        "import sys; before = set(sys.modules); import torch; known = set(sys.modules);"
        "import lmf_module, jwae_module;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - known} - {'lmf_module', 'jwae_module'}"
        " - set(sys.stdlib_module_names)))"
    )
    assert python("-c", code, cwd=tmp_path, path=installed).stdout.strip() == "[]"


def test_version_stands_once_and_requirements_cover_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and project["dependencies"] == ["torch>=2.11"]
    required = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()} - {""}
    optional = project["optional-dependencies"]
    extras = {
        name for extra, names in optional.items() for name in names if extra not in ("timm", "onnx", "search")
    }  # for those who ask
    own = {name for name in extras if name.startswith(project["name"])}
    assert required == {*project["dependencies"], *(extras - own)}


def test_users_own_metrics_module_changes_nothing(installed, tmp_path):
    (tmp_path / "metrics.py").write_text("raise RuntimeError('not yours')")
    (tmp_path / "training.py").write_text("raise RuntimeError('not yours')")
    done = python("-c", "import main_hateful_memes, mmfusion.explain.__main__", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
