"""Members shared out over the processes of torchrun: the results of one process, and an end when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
import numpy as np
import torch
from torch import nn
from mmfusion.cli import run_command
from mmfusion.dataset import Split
from mmfusion.distributed import end_process, join_processes, leave_processes
from mmfusion.training.feed import Member
from mmfusion.training.trainer import Problem, Schedule, TrainingData, train
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Config:
    out: str
    epochs: int = 12
    rate: float = 1e-2

def main(config):
    processes = join_processes()
    torch.set_num_threads(1)
    drawn = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32))
    split = Split({"a": drawn[:, :5]}, drawn[:, 5], [str(n) for n in range(64)])
    problem = Problem(
        lambda _: nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 1)),
        lambda model, batch: {"loss": (model(batch.features["a"]).squeeze(-1) - batch.target).square().mean()},
        lambda model, features: model(features["a"]).squeeze(-1),
        lambda prediction, target: -float(np.abs(prediction - target).mean()),
    )
    members = [Member(seed, {"loss": 1.0}) for seed in range(5)]
    schedule = Schedule(epochs=config.epochs, batch_size=16, learning_rate=config.rate, patience=3,
                        checkpoint_seconds=0.0)
    def on_epoch(record):
        if record["epoch"] == 0 and processes.is_main:
            print("begun", flush=True)
    trained = train(problem, members, TrainingData(split, split), schedule,
                    checkpoint=Path(config.out).with_suffix(".safetensors"), on_epoch=on_epoch)
    torch.save({"states": [model.state_dict() for model in trained.models], "history": trained.history,
                "best": trained.best_epoch}, f"{config.out}-{processes.rank}.pt")
    leave_processes()

end_process(run_command(main, Config, sys.argv[1:]))
"""


def start(folder: Path, processes: int, *flags: object) -> subprocess.Popen:
    """SCRIPT on so many processes."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script)]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command.append(str(script))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, flags)], cwd=folder, env=environment, **pipes)


def run(folder: Path, processes: int, *flags: object) -> list[dict]:
    """What every process was returned."""
    process = start(folder, processes, "--out", f"of{processes}", *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [torch.load(folder / f"of{processes}-{rank}.pt", weights_only=False) for rank in range(processes)]


def test_two_and_three_processes_train_what_one_does(tmp_path):
    """Up to rounding: a reduction over the stack adds in another order where a member stands elsewhere in it."""
    (alone,) = run(tmp_path, 1)
    for processes in (2, 3):
        for found in run(tmp_path, processes):
            assert found["best"] == alone["best"] and len(found["history"]) == len(alone["history"])
            for mine, reference in zip(found["states"], alone["states"], strict=True):
                for name, value in reference.items():
                    torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-6)
            for mine, reference in zip(found["history"], alone["history"], strict=True):
                torch.testing.assert_close(mine["score"], reference["score"], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(mine["loss"]["loss"], reference["loss"]["loss"], rtol=1e-6, atol=1e-6)


def test_process_that_dies_ends_the_run_within_seconds_and_it_goes_on(tmp_path):
    flags = ("--epochs", 300, "--rate", 1e-4)
    process = start(tmp_path, 2, "--out", "of2", *flags)
    assert process.stdout.readline() == "begun\n"
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    killed = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 10 and process.returncode != 0
    # the process itself, or torchrun, is the first to notice
    assert "another process of this run has died" in errors or "Signal 9 (SIGKILL)" in errors
    whole = tmp_path / "whole"
    whole.mkdir()
    for found, expected in zip(run(tmp_path, 2, *flags), run(whole, 2, *flags), strict=True):
        assert found["best"] == expected["best"]
        for mine, reference in zip(found["states"], expected["states"], strict=True):
            assert all(torch.equal(mine[name], reference[name]) for name in reference)


@pytest.mark.parametrize("processes", [1, 2])
def test_exploding_loss_is_one_line_in_however_many_processes(tmp_path, processes):
    process = start(tmp_path, processes, "--out", "x", "--rate", "1e30")
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(lines) == 1 and "lower --learning-rate" in lines[0]


FIT = """
from dataclasses import dataclass
import os
import sys
import numpy as np
from mmfusion.cli import run_command
from mmfusion.data.arrays import ArraysConfig
from mmfusion.distributed import end_process, join_processes, leave_processes
from mmfusion.estimators import FusionClassifier
from mmfusion.runs.folder import RunConfig
from mmfusion.train import Config, fit
from mmfusion.training.recipe import TrainingConfig

@dataclass(frozen=True)
class Flags:
    name: str

def main(flags):
    join_processes()
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((60, 4)).astype(np.float32), rng.standard_normal((60, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    training = TrainingConfig(seeds=3, epochs=3, batch_size=16, device="cpu")
    run = fit({"a": x, "b": z, "target": y},
              Config(ArraysConfig(hold_out=0.25), training, run=RunConfig(flags.name)))
    model = FusionClassifier(n_members=3, epochs=3, random_state=0, device="cpu").fit({"a": x, "b": z}, y)
    new = {"a": x[:9], "b": z[:9]}
    np.savez(f"{flags.name}-{os.environ.get('RANK', '0')}.npz",
             run=run.predict(new), estimator=model.predict_proba(new))
    leave_processes()

end_process(run_command(main, Flags, sys.argv[1:]))
"""


def test_fit_and_estimator_share_their_members_too(tmp_path):
    (tmp_path / "fit.py").write_text(FIT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        done = subprocess.run(
            [*command, "fit.py", "--name", name], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    alone, *shared = (np.load(tmp_path / f"{name}.npz") for name in ("one-0", "two-0", "two-1"))
    for found in shared:
        for key in ("run", "estimator"):
            np.testing.assert_allclose(found[key], alone[key], rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]


def test_an_experiment_on_two_processes_finds_what_it_finds_on_one(tmp_path):
    """rank_ablation: two trainings one after the other, of 57 members and of 24, shared out unevenly and evenly."""
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((60, 4)), rng.standard_normal((60, 3))
    np.savez(tmp_path / "mine.npz", a=x, b=z, target=x[:, 0] * z[:, 0] + x[:, 1])
    flags = "--dataset arrays --data mine.npz --hold-out 0.3 --seeds 3 --epochs 2 --hidden-dim 8 --device cpu".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    found = {}
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        done = subprocess.run(
            [*command, "-m", "experiments.rank_ablation", *flags, "--name", name],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("verdict: ") == 1, "the main process alone prints"
        found[name] = json.loads((tmp_path / "runs" / name / "results.json").read_text())
    one, two = found["one"], found["two"]
    assert len(one["numbers"]) == 12 and two["verdict"] == one["verdict"]
    for label, columns in one["numbers"].items():
        for column, values in columns.items():
            assert len(values) == 3
            if (label, column) != ("jWAE, rank 1", "rank used") and (label, column) != ("plain, rank 1", "rank used"):
                assert len(set(values)) > 1, "of equal values a mixed-up order would not show"
            assert two["numbers"][label][column] == pytest.approx(values, rel=1e-6, abs=1e-6)
    for mine, reference in zip(two["contrasts"], one["contrasts"], strict=True):
        assert mine["estimate"] == pytest.approx(reference["estimate"], abs=1e-6)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]
