"""Every command of the project: a dataclass becomes its flags, a user's mistake becomes one line and exit code 2."""

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import tyro

from mmfusion.distributed import current_processes
from mmfusion.errors import InputError, NonFiniteLoss

Config = TypeVar("Config")


def run_command(
    main: Callable[[Config], None],
    config_class: type[Config],
    arguments: list[str],
    begun: Callable[[Config], Config | None] = lambda config: None,
) -> int:
    """Parse and run; returns 0, or 130 when interrupted. Bad input, and a loss that explodes, exit with code 2.

    `begun` gives the settings of the run to resume: they are what a flag that is left out then means.
    """
    try:
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
    except KeyboardInterrupt:
        print("interrupted; what is encoded is kept, and a run that has begun goes on with --resume", file=sys.stderr)
        return 130
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, NumPy's, CUDA's and the CPU allocator's ways to say so; the last is a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "allocate memory" in str(error) or "not enough memory" in str(error)


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
