"""Process group of torchrun: work sharing, barriers, and failure propagation."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from mmfusion.errors import InputError, printable

Item = TypeVar("Item")


class ProcessDied(InputError):
    """Another process of the group has ended; whoever notices says so."""


@dataclass(frozen=True)
class Processes:
    """One process's view of all K that work together; K = 1 without torchrun."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes the run folder."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """CPU cores that this process may use when each process of the node takes an equal part."""
        present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, present // int(os.environ.get("LOCAL_WORLD_SIZE", "1") if self.world_size > 1 else 1))

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every K-th item, so that long and short ones are spread evenly."""
        return list(items[self.rank :: self.world_size])

    def gather(self, value: Item) -> list[Item]:
        """One value of every process, in order of rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Item | None] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # the connection to a process that has died is closed
            raise ProcessDied("another process of this run has died; begin again, or go on with --resume") from error
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that every process enters: an InputError in one of them is raised in all of them."""
        mine: InputError | None = None
        try:
            yield
        except InputError as error:
            mine = error
        messages = [message for message in self.gather(str(mine) if mine else None) if message]
        if messages:
            raise InputError(messages[0]) from mine

    def stop(self, error: InputError) -> NoReturn:
        """End all processes with code 2 and one line on stderr, printed by the main process."""
        if (
            isinstance(error, ProcessDied) or int(os.environ.get("RANK", "0")) == 0
        ):  # not `is_main`: before they have joined, all think they are
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # torchrun ends all processes as soon as one has failed: let the main one print first
        end_process(2)


def end_process(code: int) -> NoReturn:
    """Exit with `code`; the last line of a program that may have been started by torchrun.

    gloo's threads now and then abort a process whose interpreter is taken down around them (SIGABRT in place of the
    code, seen twice in some hundred runs), so under torchrun the interpreter is not taken down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def join_processes(device: str = "cpu") -> Processes:
    """Join the group that torchrun describes in the environment: gloo on CPU, nccl with a GPU per process on CUDA."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=device)
    if device == "cuda":
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        # a process may wait hours for the slowest share; one that dies is seen by torchrun, which ends the others
        dist.init_process_group(backend, timeout=timedelta(days=2))
        if "cuda" not in device:
            torch.set_num_threads(Processes(dist.get_rank(), dist.get_world_size()).cores)  # torchrun says 1
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def current_processes(device: str = "cpu") -> Processes:
    """The group that `join_processes` joined, or this process alone."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size(), device)
    return Processes(device=device)


def leave_processes() -> None:
    """Leave the process group after the last shared work, and lift torchrun's limit of one thread per process."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # none may close its connections while another still listens
        dist.destroy_process_group()
        torch.set_num_threads(Processes().cores)
