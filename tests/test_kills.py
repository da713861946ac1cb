"""SIGKILL at random moments of an extraction, a training and an experiment: what is resumed ends in the same bits.

The commands run in children of a server that has imported everything and computed nothing, so that a kill costs the
seconds of the work and not those of the imports.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_memes import write_bert, write_memes
from test_experiments import write_mosi
from test_main import flags

from mmfusion.files import write_json

pytestmark = pytest.mark.kills
ROOT = Path(__file__).parent.parent
# checkpoints at every epoch and shards of 16 vectors, so that there is something to go on from after seconds
SERVER = """
import functools, json, os, sys, traceback
import mmfusion, sklearn.metrics, torchvision
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel, BertTokenizer
import main_hateful_memes
from experiments import experiment, rank_ablation
from mmfusion.encoders import cache
from mmfusion.training import fit, grid
cache.SHARD_ITEMS = 16
fit.Schedule = grid.Schedule = functools.partial(fit.Schedule, checkpoint_seconds=0.0)
commands = {
    "main": main_hateful_memes.run,
    "rank_ablation": lambda arguments: experiment.run(rank_ablation.EXPERIMENT, arguments),
}
print("ready", flush=True)
while line := sys.stdin.readline():
    name, arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            code = commands[name](arguments)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()  # until then a child that has ended keeps its number, and no other can be killed for it
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Commands:
    """Runs the project's commands one after the other, to their end or to a kill."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], **pipes)
        assert self.server.stdout.readline() == "ready\n"

    def _send(self, text: str) -> int:
        self.server.stdin.write(text + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def __call__(self, name: str, arguments: list[str], folder: Path, kill_after: float | None = None) -> None:
        """Run in `folder`; after `kill_after` seconds SIGKILL, else it must end with code 0."""
        child = self._send(json.dumps([name, arguments, str(folder)]))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        status = self._send("")
        assert status == 0 or (kill_after is not None and os.WTERMSIG(status) == signal.SIGKILL), (
            folder / "log.txt"
        ).read_text()[-2000:]


@pytest.fixture(scope="module")
def command() -> Iterator[Commands]:
    """The server, for all kills."""
    commands = Commands()
    yield commands
    commands.server.stdin.close()
    commands.server.wait()


class Case:
    """One command with its flags, and an undisturbed run of it: where it lies, and when what was done."""

    def __init__(self, command: Commands, name: str, arguments: list[str], folder: Path) -> None:
        self.name, self.arguments, self.folder = name, arguments, folder
        folder.mkdir()
        start = time.time()
        command(name, arguments, folder)
        self.run = folder / "runs/trial"
        self.seconds = time.time() - start
        self.begun_after = (self.run / "run.json").stat().st_mtime - start
        """seconds until run.json was there: for memes, those of the extraction"""


@pytest.fixture(scope="module")
def memes(command, tmp_path_factory) -> Case:
    """Training on memes, encoded first: the cache lies where the command is started."""
    data = tmp_path_factory.mktemp("memes")
    write_bert(data / "bert")
    write_memes(data, {"train": 64, "dev": 24, "test": 8})
    return Case(command, "main", flags(data, cache_dir="cache", epochs=5), data / "whole")


@pytest.fixture(scope="module")
def experiment(command, tmp_path_factory) -> Case:
    """An experiment on a small file of vectors."""
    data = tmp_path_factory.mktemp("vectors")
    mosi = write_mosi(data / "mosi.npz")
    arguments = f"--dataset cmu_mosi --data {mosi} --seeds 2 --epochs 5 --hidden-dim 8 --device cpu --name trial"
    return Case(command, "rank_ablation", arguments.split(), data / "whole")


def results(run: Path) -> dict:
    """results.json without what a clock and a kill may change."""
    content = json.loads((run / "results.json").read_text())
    return {key: value for key, value in content.items() if key not in ("seconds", "resumed", "peak_memory_gb")}


def end_and_compare(command: Commands, case: Case, folder: Path) -> None:
    """Resume by name alone, or start again what had not begun; every file is then that of the undisturbed run."""
    begun = (folder / "runs/trial/run.json").exists()
    command(case.name, ["--resume", "--name", "trial"] if begun else case.arguments, folder)
    run = folder / "runs/trial"
    assert results(run) == results(case.run)
    files = {path.relative_to(run) for path in run.rglob("*")}
    assert files == {path.relative_to(case.run) for path in case.run.rglob("*")}
    assert not [path for path in files if path.name.startswith(".")]
    assert [path.name for path in run.parent.iterdir()] == ["trial"]
    # these hold no clock and no place
    for path in (*run.rglob("*.safetensors"), *run.glob("*.csv"), *run.glob("*.jsonl"), *run.glob("*.txt")):
        assert path.read_bytes() == (case.run / path.relative_to(run)).read_bytes(), path.name


def moment(number: int, kills: int) -> float:
    """When to kill, as a share of a phase: uniform in the `number`-th of `kills` equal parts, by a fixed seed."""
    return (number + np.random.default_rng(number).random()) / kills


@pytest.mark.parametrize("number", range(4))
def test_extraction_killed_at_random_ends_in_the_same_bits(command, memes, tmp_path, number):
    command(memes.name, memes.arguments, tmp_path, kill_after=moment(number, 4) * memes.begun_after)
    end_and_compare(command, memes, tmp_path)


@pytest.mark.parametrize("number", range(3))
def test_training_killed_at_random_ends_in_the_same_bits(command, memes, tmp_path, number):
    shutil.copytree(memes.folder / "cache", tmp_path / "cache")
    training = memes.seconds - memes.begun_after
    command(memes.name, memes.arguments, tmp_path, kill_after=moment(number, 3) * training)
    end_and_compare(command, memes, tmp_path)


@pytest.mark.parametrize("number", range(3))
def test_experiment_killed_at_random_ends_in_the_same_bits(command, experiment, tmp_path, number):
    command(experiment.name, experiment.arguments, tmp_path, kill_after=moment(number, 3) * experiment.seconds)
    end_and_compare(command, experiment, tmp_path)


def leave_unfinished(folder: Path) -> None:
    """What kills in the worst moments leave of a run: files that were being written, and a folder that was."""
    for name in (".lock", ".results.json.1.tmp", "baselines/image-only/.model.safetensors.1.tmp", "checkpoints/a"):
        path = folder / "runs/trial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    write_json(folder / "runs/.trial.1.begun/run.json", {})


def test_kill_amid_the_last_writes_leaves_no_unfinished_file_behind(command, memes, tmp_path):
    shutil.copytree(memes.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs/trial/results.json").unlink()
    leave_unfinished(tmp_path)
    end_and_compare(command, memes, tmp_path)


def test_kill_between_the_results_and_the_end_of_the_checkpoints_is_swept_up(command, memes, tmp_path):
    shutil.copytree(memes.folder, tmp_path, dirs_exist_ok=True)
    leave_unfinished(tmp_path)
    end_and_compare(command, memes, tmp_path)
