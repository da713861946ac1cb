"""Feature vectors on disk, keyed by what was encoded and by which encoder.

A cache folder holds `encoder.json`, readable by a person, and safetensors shards. A shard is named by the SHA-256 of
its own bytes, so any damage, a cut or one flipped bit, in the header or in the vectors, shows when it is read.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mmfusion.errors import InputError, printable
from mmfusion.files import check_regular_file, reason_unreadable_path, write_atomically, write_json

SHARD_ITEMS = 512
SHARD_SECONDS = 20.0  # what a killed run can lose
SHARD_BYTES = 256_000_000  # 512 vectors of 4096 float32 numbers have 8 MB
IDENTITY_BYTES = 1_000_000  # encoder.json has some hundred


def fingerprint(identity: dict[str, object]) -> str:
    """16 hexadecimal digits of everything that changes a feature's value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def text_digest(text: str) -> str:
    """What a text is cached under: 64 hexadecimal digits of its content."""
    return hashlib.sha256(text.encode()).hexdigest()


class FeatureCache:
    """Vectors of one encoder: digest (64 hexadecimal digits) -> float32 (d,).

    Raises InputError where the folder cannot be written, at once and not after the first hour.
    """

    def __init__(self, root: Path, kind: str, identity: dict[str, object]) -> None:
        self.folder = root / f"{kind}-{fingerprint(identity)}"
        self.vectors: dict[str, Tensor] = {}
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
        shards = {path: shard for path in paths if path not in self._seen and (shard := _read(path)) is not None}
        self._seen |= set(shards)
        widths: Counter[int] = Counter()
        for _, features in shards.values():
            widths[features.shape[1]] += len(features)
        self._width = self._width or (widths.most_common(1)[0][0] if widths else None)
        for path, (digests, features) in shards.items():
            if features.shape[1] != self._width:
                _remove(path, f"vectors of {features.shape[1]} numbers, most have {self._width}")
                continue
            for digest, vector in zip(digests, features, strict=True):
                # a clone: a row that is a view drags its whole shard along wherever it is sent
                self.vectors.setdefault(digest, vector.clone())

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

    def add(self, digests: list[str], features: Tensor) -> None:
        """Take up encoded items, features (n, d); a shard is written every few hundred items or seconds.

        Raises InputError where a feature is not finite: such an encoder is of no use, and must not fill the cache; and
        where the cache holds vectors of another width, which are not of this encoder.
        """
        if not features.isfinite().all():
            raise InputError(
                f"{self.folder / 'encoder.json'}: this encoder gives features that are not finite; use another"
            )
        self._width = self._width or features.shape[1]
        if features.shape[1] != self._width:
            widths = f"vectors of {self._width} numbers and this encoder gives {features.shape[1]}"
            raise InputError(f"{self.folder}: holds {widths}; remove this cache folder")
        for digest, vector in zip(digests, features.float().cpu(), strict=True):
            if digest not in self.vectors:
                self.vectors[digest] = self._pending[digest] = vector.clone()
        if len(self._pending) >= SHARD_ITEMS or time.monotonic() - self._flushed_at > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet on disk as one shard, atomically."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        raw = bytearray(bytes.fromhex("".join(self._pending)))
        shard = {
            "digests": torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, 32),
            "features": torch.stack(list(self._pending.values())),  # (n, d)
        }
        content = save(shard)
        name = hashlib.sha256(content).hexdigest()[:32]
        write_atomically(self.folder / f"{name}.safetensors", lambda temporary: temporary.write_bytes(content))
        self._pending = {}


def _read(path: Path) -> tuple[list[str], Tensor] | None:
    """Digests (n) and features (n, d) of one shard; None, and one line on stdout, where it is of no use.

    Raises InputError on a folder: the shard that belongs there could not be written again.
    """
    reason = reason_unreadable_path(path, SHARD_BYTES)
    if reason is not None and path.is_dir():
        raise InputError(f"{path}: is a folder in the place of a cache file; remove it")
    if reason is not None and not os.path.lexists(path):  # another process of this run has just removed it
        return None
    if reason is None:
        try:
            return _parse_shard(path.read_bytes(), path.stem)
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
    if hashlib.sha256(content).hexdigest()[:32] != stem:
        raise ValueError("its name is not the hash of its content")
    try:
        shard = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError("not safetensors") from error
    if set(shard) != {"digests", "features"}:
        raise ValueError("other tensors than digests and features")
    digests, features = shard["digests"], shard["features"]
    if digests.dtype != torch.uint8 or digests.ndim != 2 or digests.shape[1] != 32:
        raise ValueError("digests are not (n, 32) bytes")
    if features.dtype != torch.float32 or features.ndim != 2 or 0 in features.shape:
        raise ValueError("features are not (n, d) float32 numbers")
    if len(digests) != len(features):
        raise ValueError(f"{len(digests)} digests for {len(features)} vectors")
    if not features.isfinite().all():
        raise ValueError("features that are not finite")
    return [row.tobytes().hex() for row in digests.numpy()], features


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
