"""What every loader returns and every trainer takes: named splits of feature matrices, targets and ids."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Task = Literal["binary", "regression"]


class InputError(Exception):
    """Something the user can put right: the message is one line that names the file, line or flag and the remedy.

    Command lines print it on stderr and exit with code 2, without a traceback.
    """


@dataclass(frozen=True)
class Split:
    """One named part of a corpus. N examples; modality m has width d_m."""

    features: dict[str, Tensor]
    """float32 (N, d_m) per modality, in one fixed order of modalities; raw, not standardised"""
    target: Tensor | None
    """float32 (N,) or (N, O); None where the split is unlabelled"""
    ids: list[str]
    """N names, unique within the split, that lead back to the source (for memes: the `img` key)"""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    """Named splits in the order in which they are reported, `train` first."""

    name: str
    task: Task
    splits: dict[str, Split]
    selection: str
    """the split that models are selected on; its scores are reported as selected upon"""
    notes: list[str] = field(default_factory=list)
    """what the reader of a score must know: rows dropped, splits that overlap, a validation slice cut from train"""
    provenance: dict[str, object] = field(default_factory=dict)
    """JSON-able: encoders with their weights, preprocessing, fingerprint of the rows, skipped rows"""

    @property
    def input_dims(self) -> dict[str, int]:
        """Width d_m of each modality."""
        return {name: x.shape[-1] for name, x in self.splits["train"].features.items()}
