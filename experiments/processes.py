"""Commands as processes side by side, each with its share of the cores; what they print goes into their folders."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmfusion.errors import InputError
from mmfusion.runs.folder import MARK_OF_COMPLETION

LOG = "log.txt"
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Command:
    """One command that leaves a run."""

    name: str
    """what it is called in messages"""
    folder: Path
    """of the run"""
    module: str
    flags: list[str]
    after: str
    """name of the command that must have ended before, where that is one of those to be run; its own: none"""


@dataclass
class _Running:
    command: Command
    process: subprocess.Popen
    log: IO[bytes]
    begun: float


def run_commands(commands: Sequence[Command], at_once: int) -> None:
    """Run all, in their order as far as `after` allows; one whose folder is there goes on with --resume.

    Prints a line for each that has ended, with an estimate of the time left. Raises InputError with the last line of
    the first that fails; it, and an interruption, end all others.
    """
    waiting, running = list(commands), []
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}
    begun, ended = time.perf_counter(), 0
    try:
        while waiting or running:
            open_names = {one.name for one in waiting} | {one.command.name for one in running}
            ready = [one for one in waiting if one.after == one.name or one.after not in open_names]
            for command in ready[: at_once - len(running)]:
                waiting.remove(command)
                running.append(_start(command, environment))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _finish(one)
                ended += 1
                minutes = (time.perf_counter() - begun) / 60
                done = ended + len(running) / 2  # the others half, on average
                left = minutes / done * (len(commands) - done)
                seconds = time.perf_counter() - one.begun
                print(
                    f"[{ended}/{len(commands)}] {one.command.name}: {seconds:.0f} s; {minutes:.0f} minutes so far, "
                    f"about {left:.0f} left",
                    flush=True,
                )
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            try:
                one.process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            _keep_log(one)


def _start(command: Command, environment: dict[str, str]) -> _Running:
    if command.folder.exists() and not (command.folder / "run.json").exists():
        shutil.rmtree(command.folder)  # killed before it had begun
    flags = command.flags + (["--resume"] if command.folder.exists() else [])
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-m", command.module, *flags], stdout=log, stderr=subprocess.STDOUT, env=environment
    )
    return _Running(command, process, log, time.perf_counter())


def _finish(one: _Running) -> None:
    """Keep what it printed. Raises InputError where it failed or left no results."""
    text = _keep_log(one)
    code = one.process.returncode
    if code or not (one.command.folder / MARK_OF_COMPLETION).exists():
        lines = [line for line in text.splitlines() if line.strip()]
        said = lines[-1].removeprefix("error: ") if lines else "it printed nothing"
        raise InputError(
            f"{one.command.name} stopped with exit code {code}: {said}; put that right, then go on with --resume"
        )


def _keep_log(one: _Running) -> str:
    """What it printed, which is added to log.txt where it has left a folder."""
    one.log.seek(0)
    text = one.log.read().decode("utf-8", "replace")
    one.log.close()
    if one.command.folder.is_dir():
        with (one.command.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(text)
    return text
