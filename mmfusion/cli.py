"""Command line: flags from a dataclass, bad input as one line with exit code 2, signals, devices."""

import contextlib
import io
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import tyro

from mmfusion.distributed import current_processes
from mmfusion.errors import InputError, NonFiniteLoss

Config = TypeVar("Config")


SECOND_SIGNAL_SECONDS = 3.0  # torchrun passes one on, and people press twice: what comes sooner counts once


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, with the exit code that shells give to it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def run_command(
    main: Callable[[Config], None],
    config_class: type[Config],
    arguments: list[str],
    begun: Callable[[Config], Config | None] = lambda config: None,
) -> int:
    """Parse and run; returns the exit code: 0, or 130 after Ctrl-C, 143 after SIGTERM.

    Bad input, and a loss that explodes, exit with code 2. `begun` gives the settings of the run to resume, which stand
    in for flags that are left out.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not fit into a terminal's encoding
    others = _work_under_way()  # a notebook or a test may call a command, and what it had begun is not ours to end
    try:
        with _signals_interrupt():
            config = parse(config_class, arguments)
            defaults = begun(config)
            main(config if defaults is None else parse(config_class, arguments, defaults))
    except (InputError, NonFiniteLoss) as error:
        current_processes().stop(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        current_processes().stop(InputError("out of memory; lower --hidden-dim, --latent-dim, --rank or --seeds"))
    except BrokenPipeError:  # `... | head`: whoever read has gone, and there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 141
    except KeyboardInterrupt as interruption:
        return _leave(getattr(interruption, "code", 130), others)
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, NumPy's, CUDA's and the CPU allocator's ways to say so; the last is a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "allocate memory" in str(error) or "not enough memory" in str(error)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM raises Interrupted, and one that comes seconds later ends the process."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set a handler
        yield
        return
    seen: list[float] = []

    def interrupt(number: int, _: object) -> None:
        seen.append(time.monotonic())
        if len(seen) == 1:
            raise Interrupted(number)
        if seen[-1] - seen[0] > SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)

    # nohup, and a shell's `&`, have them ignored: that stays so
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work_under_way() -> set[multiprocessing.process.BaseProcess | threading.Thread]:
    """The children and the threads for which the interpreter would wait at its end."""
    threads = {
        thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()
    }
    return threads.union(multiprocessing.active_children())


def _leave(code: int, others: set[multiprocessing.process.BaseProcess | threading.Thread]) -> int:
    """Say that the command was interrupted, and return its exit code; or exit with it where its work is under way.

    `others` is what was under way before the command began: it stays.
    """
    with contextlib.suppress(OSError):  # whoever reads may have gone
        if int(os.environ.get("RANK", "0")) == 0:
            message = "interrupted; what is encoded is kept, and a run that has begun goes on with --resume"
            print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    ours = _work_under_way() - others
    if not ours:
        return code
    try:
        for child in ours:
            if isinstance(child, multiprocessing.process.BaseProcess):  # they decode pictures
                child.kill()
    finally:  # whatever comes: torch raises out of its signal handler once it sees that a decoder has gone
        os._exit(code)  # the interpreter would wait at its end for a batch that nobody takes: seconds


def pick_device(name: str) -> torch.device:
    """The device that --device asks for."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("not a device that this project is written for")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here; give cpu, cuda or auto") from error
    return torch.device(name)


def parse(config_class: type[Config], arguments: list[str], default: Config | None = None) -> Config:
    """A config dataclass from the command line; a mistake raises InputError with tyro's message on one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            # sections group the flags in --help; they are no part of their names
            flags = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
            options = {} if default is None else {"default": default}
            return tyro.cli(config_class, args=arguments, config=flags, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro draws a box: its title, the message, a rule, then hints
    lines = [line.strip("│╭╰╮╯ ") for line in stderr.getvalue().splitlines()]
    message = " ".join(itertools.takewhile(lambda line: line.strip("─"), lines[1:])).rstrip(".")
    hint = re.search(r"[Pp]erhaps you meant:.*?(--[\w-]+)", " ".join(lines))
    raise InputError(f"{message}{f'; perhaps you meant {hint[1]}' if hint else ''}; --help lists what there is")
