"""Restricted reading of released .npz and pickle files: arrays and plain containers alone.

A pickle is a program: `pickle.load` runs whatever it names. Here a pickle may name nothing but the makers below, all of
them plain Python of this module: not even numpy's own functions are reached, whose `__setstate__` trusts its input.
"""

import hashlib
import io
import itertools
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmfusion.errors import InputError
from mmfusion.files import DATA_BYTES, check_regular_file, in_units

MAX_DEPTH = 50  # containers within containers; the released files need five
PLAIN_DTYPE = re.compile(
    r"[<>|=]?([biufcSUO?])(\d{0,9})"
)  # no structured, dated or void types: theirs is a richer state
PLAIN_REMEDY = "save it with .astype(str) (texts) or as numbers"
UNICODE_END = 0x110000
HEADER_BYTES = 16_384  # of an array in an .npz; numpy itself reads headers of up to 10,000 characters
# deflate makes zeros a thousand times smaller: a small file may say that it holds more memory than there is
UNPACKED_BYTES, UNPACKED_RATIO = 400_000_000, 100


def load_pickle(path: Path) -> object:
    """What a pickle holds, made of plain containers, numbers, strings and numpy arrays (some of them read-only).

    Python 2's pickles are read as latin-1. Raises InputError where the file cannot be read, is no whole pickle, or
    names anything else than arrays, scalars and plain containers; nothing of it has run then.
    """
    check_regular_file(path, DATA_BYTES)
    try:
        with open(path, "rb") as file:
            _check_memo(file)
            file.seek(0)
            return _plain(_Unpickler(file, encoding="latin1").load(), {}, 0)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except _Refused as error:
        raise InputError(f"{path}: {error}; only arrays and plain containers are read, fetch the file anew") from error
    except Exception as error:  # damaged bytes end in any of a dozen, MemoryError and RecursionError among them
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: is not a whole pickle of arrays ({reason}); fetch the file again") from error


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, by key.

    Raises InputError where it cannot be read, holds pickled objects, or an array says that it has more numbers than it
    brings; no memory has been taken for them then.
    """
    check_regular_file(path, DATA_BYTES)
    try:
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise InputError(f"{path}: is one array, not an .npz of several; fetch the file again")
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, path.stat().st_size)
                return {info.filename.removesuffix(".npy"): _read_member(archive, info) for info in archive.infolist()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except InputError:
        raise
    except Exception as error:  # damaged bytes end in any of a dozen inside zipfile, zlib and numpy
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        remedy = PLAIN_REMEDY if isinstance(error, HoldsObjects) else "fetch the file again"
        raise InputError(f"{path}: is not a readable .npz of plain arrays ({reason}); {remedy}") from error


def _check_members(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Raise ValueError where what the members unpack to, or what their headers claim, is more than they can hold."""
    members = archive.infolist()
    unpacked = sum(info.file_size for info in members)
    if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * file_bytes):
        raise ValueError(f"a file of {in_units(file_bytes)} says that it unpacks to {in_units(unpacked)}")
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # numpy writes no others
            raise ValueError(f"{info.filename!r} is compressed in another way than numpy's")
        with archive.open(info) as file:
            check_array_header(file, info.file_size, info.filename)


class HoldsObjects(ValueError):
    """An array of Python objects, which only unpickling, that is running what it says, would read."""


def check_array_header(file: BinaryIO, held: int, name: str) -> None:
    """Raise ValueError where an array in the .npy format claims more than the `held` bytes that it comes in.

    Checked by the header alone: no memory is taken for the numbers. Python objects are refused too.
    """
    head = io.BytesIO(file.read(HEADER_BYTES))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):  # 3.0 is for structured arrays
        raise ValueError(f"{name!r} is an array of version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(head)
    if dtype.hasobject:
        raise HoldsObjects(f"{name!r} holds Python objects, not numbers")
    if any(size < 0 for size in shape):
        raise ValueError(f"{name!r} has shape {shape}")
    claimed = math.prod(shape) * max(dtype.itemsize, 1)  # as Python's integers, which do not overflow
    if claimed > held - head.tell():
        rest = in_units(max(held - head.tell(), 0))
        raise ValueError(f"{name!r} says that it has shape {shape} of {dtype}, and holds {rest}")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def file_identity(path: Path) -> dict[str, object]:
    """Name (without folder) and SHA-256 of a file. Raises InputError where it cannot be read."""
    check_regular_file(path, DATA_BYTES)
    try:
        with open(path, "rb") as file:
            return {"file": Path(path).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def as_numbers(value: object, where: str) -> np.ndarray:
    """A numeric array of what a file holds there. Raises InputError beginning with `where` if it is none."""
    try:
        array = np.asarray(value)
        array = array.astype(np.float64) if array.dtype == object else array
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: is not one array of numbers; fetch the file again") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{where}: is of type {array.dtype}; expected numbers")
    return array


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that is not admitted."""


class _Frozen:
    """No slots and no state: the BUILD opcode can change nothing about an instance."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        raise _Refused("sets the state of what has none")


class _Maker(_Frozen):
    """What a global name of the pickle becomes: no class, so NEWOBJ refuses it, and nothing that BUILD can alter."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., object]) -> None:
        object.__setattr__(self, "_make", make)

    def __setattr__(self, name: str, _: object) -> None:
        raise _Refused(f"sets {name!r} of a global name")

    def __call__(self, *args: object) -> object:
        return self._make(*args)


class _DType:
    """Stands for numpy.dtype: takes a byte order for a state, and no fields, subarrays, flags or metadata."""

    __slots__ = ("dtype",)

    def __init__(self, code: object, *_: object) -> None:
        found = PLAIN_DTYPE.fullmatch(code) if isinstance(code, str) else None
        if found is None:
            raise _Refused(f"holds an array of type {str(code)[:40]!r}")
        # an object's size is the pickling machine's pointer: 4 on some
        self.dtype = np.dtype("O" if found[1] == "O" else code)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise _Refused("holds a structured array")
        size = state[5] if len(state) > 5 else -1
        if self.dtype.kind in "SU" and isinstance(size, int) and size >= 0:  # 'S' and 'U' may leave it to the state
            unit = 4 if self.dtype.kind == "U" else 1
            self.dtype = np.dtype(f"{self.dtype.kind}{size // unit}")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for an array until its state arrives."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise _Refused("holds an array of unknown layout")
        shape, dtype, fortran, data = state[-4:]  # the first of five is the version
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: object, dtype: object, shape: object, order: object = "C") -> np.ndarray:
    """The array whose raw bytes (or whose list of objects) these are; bytes are not copied."""
    if not isinstance(dtype, _DType) or order not in ("C", "F"):
        raise _Refused("holds an array of unknown layout")
    shape = shape if isinstance(shape, tuple) else (shape,)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise _Refused("holds an array of unknown shape")
    plain = dtype.dtype
    if plain.kind == "O":
        if not isinstance(data, list):  # raw bytes here would be pointers into memory
            raise _Refused("holds an array of objects without its objects")
        array = np.empty(len(data), object)
        for place, item in enumerate(data):  # one by one, else numpy takes nested lists apart
            array[place] = item
        return array.reshape(shape, order=order)
    data = _encode(data)
    if plain.itemsize == 0 and math.prod(shape) > 1:  # many empty texts, which numpy stores as one character each
        raise _Refused(f"holds an array of shape {shape} without content")
    if plain.itemsize == 0 or 0 in shape:
        return np.zeros(shape, plain)
    array = np.frombuffer(data, plain).reshape(shape, order=order)
    if plain.kind == "U" and np.frombuffer(data, np.dtype("u4").newbyteorder(plain.byteorder)).max() >= UNICODE_END:
        raise _Refused("holds text that is not Unicode")
    return array


def _encode(data: object, encoding: object = "latin1") -> bytes | bytearray:
    """Raw bytes, which protocols up to 2 write as latin-1 text."""
    if isinstance(data, (bytes, bytearray)):
        return data
    if not isinstance(data, str) or encoding not in ("latin1", "latin-1"):  # any other codec is a way to import modules
        raise _Refused(f"encodes {type(data).__name__} as {str(encoding)[:40]!r}")
    return data.encode("latin1")


def _scalar(dtype: object, data: object = b"") -> object:
    return _array(data, dtype, ())[()]


def _bytes(data: object = b"", *encoding: object) -> bytes:
    return bytes(_encode(data, *encoding))


def _set(items: object = ()) -> set:
    if not isinstance(items, (list, tuple)):
        raise _Refused("makes a set of no list")
    return set(items)


def _pairs(items: object = ()) -> dict:
    """OrderedDict, as a dict: it keeps the order, and has no attributes that BUILD could set."""
    if not isinstance(items, (list, tuple)):
        raise _Refused("makes a dictionary of no list")
    return dict(items)


_RECONSTRUCT, _SCALAR, _FROM_BUFFER = (
    _Maker(lambda *_: _Array()),
    _Maker(_scalar),
    _Maker(lambda *a: _Array(_array(*a))),
)
_ADMITTED = {
    ("numpy", "ndarray"): _Maker(lambda *_: _Array()),
    ("numpy", "dtype"): _Maker(_DType),
    ("_codecs", "encode"): _Maker(_encode),
    ("collections", "OrderedDict"): _Maker(_pairs),
}
for _module in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    _ADMITTED[_module + ".multiarray", "_reconstruct"] = _RECONSTRUCT
    _ADMITTED[_module + ".multiarray", "scalar"] = _SCALAR
    _ADMITTED[_module + ".numeric", "_frombuffer"] = _FROM_BUFFER
for _module in ("builtins", "__builtin__"):  # Python 3 and Python 2
    for _name, _make in {"bytes": _bytes, "bytearray": _bytes, "set": _set, "frozenset": _set}.items():
        _ADMITTED[_module, _name] = _Maker(_make)


def _check_memo(file: BinaryIO) -> None:
    """Refuse a pickle that names a place in its memo far beyond what it has put there.

    Python makes room for all places up to the one that is named: ten bytes could ask for 34 GB. Pickles number their
    objects from 0, so a place is never above the count of opcodes. Whatever else is wrong, the unpickler says.
    """
    for count in itertools.count():
        opcode = pickletools.code2op.get(file.read(1).decode("latin1"))
        if opcode is None or opcode.name == "STOP":
            return
        if opcode.arg is None:
            continue
        if opcode.arg.n == pickletools.UP_TO_NEWLINE:
            argument = file.readline()
            place = int(argument) if opcode.name == "PUT" else 0
            if opcode.name in ("GLOBAL", "INST"):  # module and name, a line each
                file.readline()
        elif opcode.arg.n > 0:
            argument = file.read(opcode.arg.n)
            place = int.from_bytes(argument, "little") if opcode.name in ("BINPUT", "LONG_BINPUT") else 0
        else:  # a length, and so many bytes
            width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(opcode.arg.n, 4)
            file.seek(int.from_bytes(file.read(width), "little"), io.SEEK_CUR)
            place = 0
        if place > count:
            raise _Refused(f"names place {place} of its memo after {count} steps")


class _Unpickler(pickle.Unpickler):
    """Every opcode that names something (GLOBAL, STACK_GLOBAL, INST, EXT) comes through `find_class`."""

    def find_class(self, module: str, name: str) -> object:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"names {(module + '.' + name)[:80]!r}") from None

    def persistent_load(self, pid: object) -> object:
        raise _Refused("refers to objects outside of itself")


def _plain(value: object, done: dict[int, tuple[object, object]], depth: int) -> object:
    """The same with every stand-in replaced by what it stands for; `done` is keyed by id, and keeps those objects."""
    if depth > MAX_DEPTH:
        raise _Refused(f"nests containers more than {MAX_DEPTH} deep")
    if id(value) in done:  # shared parts once only: a few bytes can spell a tree of any size
        return done[id(value)][1]
    if isinstance(value, _DType):
        return value.dtype
    if isinstance(value, _Array):
        if value.value is None:
            raise _Refused("holds an array without content")
        result = value.value
        if result.dtype == object:
            result = np.empty(result.size, object)
            for place, item in enumerate(value.value.ravel()):
                result[place] = _plain(item, done, depth + 1)
            result = result.reshape(value.value.shape)
    elif isinstance(value, dict):
        result = {_plain(key, done, depth + 1): _plain(item, done, depth + 1) for key, item in value.items()}
    elif isinstance(value, (list, tuple, set, frozenset)):
        result = type(value)(_plain(item, done, depth + 1) for item in value)
    elif isinstance(value, _Frozen):
        raise _Refused("holds a function")
    else:
        return value
    done[id(value)] = (value, result)
    return result
