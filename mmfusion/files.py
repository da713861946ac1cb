"""Atomic writing, and checks of a file's kind and size before it is read.

A path that a user hands in may be a FIFO, on which `open` waits for ever, or a link to a device without an end.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmfusion.errors import InputError

ANNOTATION_BYTES = 1 << 30  # Hateful Memes has 2 MB of annotations, MUStARD 1 MB
DATA_BYTES = 32 << 30  # the largest released file of features, MUStARD's frames, has 12 GB
WEIGHT_BYTES = 64 << 30  # one file of weights: Hugging Face cuts models into files of 5 GB, older ones into 10 GB


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    Raises InputError naming the file where the folder is read-only, missing or full; no partial file stays behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives a file
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that their owner alone may read
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be written ({reason}); choose a folder that can be written and has room"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically; NaN and infinity raise ValueError, since they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors (copied to contiguous CPU memory) atomically in the safetensors format."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))


def reason_unreadable_path(path: Path, most_bytes: int) -> str | None:
    """Why a path is not to be opened for reading, in a few words; None for a regular file of bearable size.

    Links are followed, nothing is opened: on a FIFO that alone would wait for ever.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return f"is a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else "no such file"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:  # a zero byte, or half a surrogate pair
        return "no name that a file can have"
    if stat.S_ISDIR(status.st_mode):
        return "Is a directory"
    if not stat.S_ISREG(status.st_mode):
        return "is a FIFO, a device or a socket, not a regular file"
    if status.st_size > most_bytes:
        return f"has {in_units(status.st_size)}, more than the {in_units(most_bytes)} that are read"
    return None if os.access(path, os.R_OK) else "Permission denied"


def check_regular_file(path: Path, most_bytes: int, remedy: str = "check the path", flag: str = "") -> None:
    """Raise InputError unless `path` is a regular file, or a link to one, of at most `most_bytes`; opens nothing.

    Args:
        path: the file, in whatever way the user named it.
        most_bytes: the most that a file of this kind can reasonably have.
        remedy: what to do about it, the end of the message.
        flag: the flag that named the file, if one did; the message begins with it.
    """
    reason = reason_unreadable_path(path, most_bytes)
    if reason is not None:
        raise InputError(f"{flag} {path}: cannot be read ({reason}); {remedy}".lstrip())


def read_regular_file(path: Path, most_bytes: int, remedy: str = "check the path", flag: str = "") -> bytes:
    """The content of a file that `check_regular_file` lets pass. Raises InputError where it cannot be read."""
    check_regular_file(path, most_bytes, remedy, flag)
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)  # it may have grown, and files of /proc have no size
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror or error}); {remedy}".lstrip()) from error
    if len(content) > most_bytes:
        raise InputError(f"{flag} {path}: has more than {in_units(most_bytes)}; {remedy}".lstrip())
    return content


def in_units(count: int) -> str:
    """Bytes as a person says them: 340 bytes, 1.2 MB, 13 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f} {unit}"
    return f"{count} bytes"
