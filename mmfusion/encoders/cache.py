"""Feature vectors on disk, keyed by what was encoded and by which encoder.

A cache folder holds `encoder.json`, readable by a person, and safetensors shards. A shard is named by the SHA-256 of
its own bytes, so any damage, a cut or one flipped bit, in the header or in the vectors, shows when it is read.
"""

import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from mmfusion.errors import InputError
from mmfusion.files import write_atomically, write_json

SHARD_ITEMS = 512
SHARD_SECONDS = 20.0  # what a killed run can lose


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
        if not (self.folder / "encoder.json").exists():
            write_json(self.folder / "encoder.json", identity)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._read(path)

    def __contains__(self, digest: str) -> bool:
        return digest in self.vectors

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another process of this run has just removed it
            return
        if hashlib.sha256(content).hexdigest()[:32] != path.stem:
            try:
                path.unlink()
            except FileNotFoundError:  # the process that removed it has said so
                return
            print(f"{path}: damaged cache file removed; its items are encoded again", flush=True)
            return
        shard = load(content)
        digests = shard["digests"].numpy()  # uint8 (n, 32)
        for digest, vector in zip(digests, shard["features"], strict=True):
            # a clone: a row that is a view drags its whole shard along wherever it is sent
            self.vectors.setdefault(digest.tobytes().hex(), vector.clone())

    def add(self, digests: list[str], features: Tensor) -> None:
        """Take up encoded items, features (n, d); a shard is written every few hundred items or seconds.

        Raises InputError where a feature is not finite: such an encoder is of no use, and must not fill the cache.
        """
        if not features.isfinite().all():
            raise InputError(
                f"{self.folder / 'encoder.json'}: this encoder gives features that are not finite; use another"
            )
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
