"""Features that were encoded elsewhere, by id."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfusion.errors import InputError


@dataclass(frozen=True)
class PrecomputedFeatures:
    """One modality's vectors, in place of an encoder."""

    vectors: Tensor
    """float32 (N, d), finite"""
    rows: dict[str, int]
    """id -> row of `vectors`"""
    identity: dict[str, object]
    """name and SHA-256 of the file, JSON-able"""
    source: str
    """the file, for messages"""

    def of(self, ids: Sequence[str]) -> Tensor:
        """Vectors (n, d) of these ids. Raises InputError that counts the ids which the file lacks, and names one."""
        missing = [one for one in ids if one not in self.rows]
        if missing:
            raise InputError(
                f"{self.source}: lacks {len(missing)} of {len(ids)} ids, {missing[0]!r:.80} first (its own are like "
                f"{next(iter(self.rows))!r:.80}); encode them too"
            )
        return self.vectors[torch.tensor([self.rows[one] for one in ids], dtype=torch.long)]
