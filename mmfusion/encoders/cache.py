"""Features on disk, keyed by what was encoded and by which encoder: a vector of each item, or all of its tokens.

A cache folder holds `encoder.json`, readable by a person, and safetensors shards. A shard is named by the SHA-256 of
its own bytes, so any damage, a cut or one flipped bit, in the header or in the vectors, shows when it is read. Tokens
are kept in half precision and stay in their shards: a sequence is read whenever it is looked at. Mapped into memory,
all of them would be resident after an epoch, every shard would keep a file open, and a shard that another process cuts
short would end this one by a signal.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mmfusion.errors import InputError, printable
from mmfusion.files import check_regular_file, reason_unreadable_path, write_atomically, write_json

SHARD_ITEMS = 512
SHARD_SECONDS = 20.0  # what a killed run can lose
SHARD_BYTES = 256_000_000  # 512 vectors of 4096 float32 numbers have 8 MB, 7 x 7 cells of as many pictures 103
PENDING_BYTES = 64_000_000  # of tokens: a shard is written before more of them are held
IDENTITY_BYTES = 1_000_000  # encoder.json has some hundred


def fingerprint(identity: dict[str, object]) -> str:
    """16 hexadecimal digits of everything that changes a feature's value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def text_digest(text: str) -> str:
    """What a text is cached under: 64 hexadecimal digits of its content."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class StoredTokens:
    """One sequence (T, d) of half precision in a shard (`mmfusion.sequences.StoredSequence`)."""

    path: Path
    start: int
    """its first byte in the file"""
    shape: tuple[int, int]
    dtype: ClassVar[torch.dtype] = torch.float16

    def read(self) -> Tensor:
        """(T, d). Raises InputError where the shard is gone, or shorter than it was."""
        values = np.empty(self.shape, np.float16)
        try:
            with open(self.path, "rb", buffering=0) as file:  # a third of the time of np.fromfile
                file.seek(self.start)
                count = file.readinto(values)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{self.path}: cannot be read any more ({reason}); begin again") from error
        if count < values.nbytes:
            raise InputError(f"{self.path}: has been cut short since it was checked; begin again")
        return torch.from_numpy(values)


class FeatureCache:
    """Features of one encoder: digest (64 hexadecimal digits) -> float32 (d,), or tokens (T_i, d), on disk or float16.

    Raises InputError where the folder cannot be written, at once and not after the first hour.
    """

    def __init__(self, root: Path, kind: str, identity: dict[str, object]) -> None:
        self.holds_tokens = "tokens" in identity
        self.folder = root / f"{kind}-{'tokens-' * self.holds_tokens}{fingerprint(identity)}"
        self.vectors: dict[str, Tensor | StoredTokens] = {}
        self._pending: dict[str, Tensor] = {}
        self._flushed_at = time.monotonic()
        identity_file = self.folder / "encoder.json"
        try:
            if not os.path.lexists(identity_file):
                write_json(identity_file, identity)
        except OSError as error:
            raise self._unreadable(error) from error
        self._width: int | None = None
        self._seen: set[Path] = set()
        self.refresh()

    def _unreadable(self, error: OSError) -> InputError:
        remedy = "make it readable, or choose another --cache-dir"
        return InputError(f"{self.folder}: cannot be read ({error.strerror or error}); {remedy}")

    def refresh(self) -> None:
        """Read the shards that have come since the cache was last read."""
        identity_file = self.folder / "encoder.json"
        try:
            check_regular_file(identity_file, IDENTITY_BYTES, "remove this cache folder, or choose another --cache-dir")
            paths = sorted(path for path in self.folder.iterdir() if path.suffix == ".safetensors")
        except OSError as error:
            raise self._unreadable(error) from error
        unseen = [path for path in paths if path not in self._seen]
        shards = {path: shard for path in unseen if (shard := _read(path, self.holds_tokens)) is not None}
        self._seen |= set(shards)
        widths: Counter[int] = Counter()
        for _, features in shards.values():
            widths[features[0].shape[-1]] += len(features)
        self._width = self._width or (widths.most_common(1)[0][0] if widths else None)
        for path, (digests, features) in shards.items():
            if features[0].shape[-1] != self._width:
                _remove(path, f"vectors of {features[0].shape[-1]} numbers, most have {self._width}")
                continue
            for digest, feature in zip(digests, features, strict=True):
                # a clone: a row that is a view drags its whole shard along wherever it is sent
                self.vectors.setdefault(digest, feature if self.holds_tokens else feature.clone())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from encoding into this cache; where one does already, wait for it."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{self.folder}: another process encodes into it; waiting for what it leaves", flush=True)
            lock.acquire()
        except OSError:  # a read-only cache, into which nothing is encoded at once by two
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def __contains__(self, digest: str) -> bool:
        return digest in self.vectors

    def add(self, digests: list[str], features: Tensor | list[Tensor]) -> None:
        """Take up encoded items, features (n, d) or n times (T_i, d); a shard is written every few hundred or seconds.

        Raises InputError where a feature is not finite: such an encoder is of no use, and must not fill the cache;
        where a token is beyond half precision; and where the cache holds vectors of another width, which are not of
        this encoder.
        """
        dtype = torch.float16 if self.holds_tokens else torch.float32
        features = [feature.to("cpu", dtype, copy=True) for feature in features]
        if not all(feature.isfinite().all() for feature in features):
            beyond = " in half precision, which ends at 65504" if self.holds_tokens else ""
            where = self.folder / "encoder.json"
            raise InputError(f"{where}: this encoder gives features that are not finite{beyond}; use another")
        self._width = self._width or features[0].shape[-1]
        if features[0].shape[-1] != self._width:
            widths = f"vectors of {self._width} numbers and this encoder gives {features[0].shape[-1]}"
            raise InputError(f"{self.folder}: holds {widths}; remove this cache folder")
        for digest, feature in zip(digests, features, strict=True):
            if digest not in self.vectors:
                self.vectors[digest] = self._pending[digest] = feature
        held = sum(feature.nbytes for feature in self._pending.values()) if self.holds_tokens else 0
        waited = time.monotonic() - self._flushed_at
        if len(self._pending) >= SHARD_ITEMS or held > PENDING_BYTES or waited > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet on disk as one shard, atomically; tokens are read from it then."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        raw, features = bytearray(bytes.fromhex("".join(self._pending))), list(self._pending.values())
        shard = {"digests": torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, 32)}
        if self.holds_tokens:
            shard |= {"lengths": torch.tensor([len(x) for x in features]), "features": torch.cat(features)}
        else:
            shard["features"] = torch.stack(features)  # (n, d)
        content = save(shard)
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        if self.holds_tokens:
            self.vectors |= dict(zip(self._pending, _stored(path, content, shard["lengths"]), strict=True))
            self._seen.add(path)
        self._pending = {}


def _read(path: Path, tokens: bool) -> tuple[list[str], Sequence[Tensor | StoredTokens]] | None:
    """Digests (n) and features of one shard; None, and one line on stdout, where it is of no use.

    Raises InputError on a folder: the shard that belongs there could not be written again.
    """
    reason = reason_unreadable_path(path, SHARD_BYTES)
    if reason is not None and path.is_dir():
        raise InputError(f"{path}: is a folder in the place of a cache file; remove it")
    if reason is not None and not os.path.lexists(path):  # another process of this run has just removed it
        return None
    if reason is None:
        try:
            content = path.read_bytes()
            return _parse_tokens(content, path) if tokens else _parse_shard(content, path.stem)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror or str(error)
        except ValueError as error:
            _remove(path, str(error))
            return None
    print(printable(f"{path}: cache file ignored ({reason}); its items are encoded again"), flush=True)
    return None


def _parse_shard(content: bytes, stem: str) -> tuple[list[str], Tensor]:
    """Digests (n) and float32 features (n, d) of a shard. Raises ValueError saying what is wrong with it."""
    digests, features = _checked(content, stem, {"digests", "features"}, torch.float32)[:2]
    if len(digests) != len(features):
        raise ValueError(f"{len(digests)} digests for {len(features)} vectors")
    return digests, features


def _parse_tokens(content: bytes, path: Path) -> tuple[list[str], list[StoredTokens]]:
    """Digests (n) and n sequences (T_i, d) of a shard. Raises ValueError saying what is wrong with it."""
    digests, features, shard = _checked(content, path.stem, {"digests", "lengths", "features"}, torch.float16)
    lengths = shard["lengths"]
    if lengths.dtype != torch.int64 or lengths.shape != (len(digests),) or bool((lengths < 1).any()):
        raise ValueError("lengths are not n positive numbers")
    # one by one before the sum, which may wrap around
    if bool((lengths > len(features)).any()) or int(lengths.sum()) != len(features):
        raise ValueError(f"lengths that do not sum to its {len(features)} tokens")
    if len(set(digests)) < len(digests):
        raise ValueError("digests that occur twice")
    return digests, _stored(path, content, lengths)


def _checked(content: bytes, stem: str, names: set[str], dtype: torch.dtype) -> tuple[list[str], Tensor, dict]:
    """Digests, features and all tensors of a shard. Raises ValueError saying what is wrong with it."""
    if hashlib.sha256(content).hexdigest()[:32] != stem:
        raise ValueError("its name is not the hash of its content")
    try:
        shard = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError("not safetensors") from error
    if set(shard) != names:
        raise ValueError(f"other tensors than {' and '.join(sorted(names))}")
    digests, features = shard["digests"], shard["features"]
    if digests.dtype != torch.uint8 or digests.ndim != 2 or digests.shape[1] != 32:
        raise ValueError("digests are not (n, 32) bytes")
    if features.dtype != dtype or features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features are not (n, d) {str(dtype).removeprefix('torch.')} numbers")
    if not features.isfinite().all():
        raise ValueError("features that are not finite")
    return [row.tobytes().hex() for row in digests.numpy()], features, shard


def _stored(path: Path, content: bytes, lengths: Tensor) -> list[StoredTokens]:
    """Where the sequences (T_i, d) of a shard whose bytes are `content` lie in its file."""
    header = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + header])["features"]
    first, width = 8 + header + entry["data_offsets"][0], entry["shape"][1]
    ends = lengths.cumsum(0).tolist()
    return [
        StoredTokens(path, first + 2 * width * (end - length), (length, width))
        for end, length in zip(ends, lengths.tolist(), strict=True)
    ]


def _remove(path: Path, reason: str) -> None:
    """Remove a damaged shard, or leave it where it cannot be removed, and say so."""
    done = "removed"
    try:
        path.unlink()
    except FileNotFoundError:  # the process that removed it has said so
        return
    except OSError:  # a cache that may only be read: its other shards are of use all the same
        done = "ignored"
    print(printable(f"{path}: damaged cache file {done} ({reason}); its items are encoded again"), flush=True)
