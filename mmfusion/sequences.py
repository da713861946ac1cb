"""Sequences of tokens or steps: N of them, each as long as it is, and batches of them padded side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK_EXAMPLES = 256  # read at a time outside of training: bounds the memory of S members' hidden layers
CHUNK_TOKENS = 4096  # of all modalities, the same
HELD_BYTES = 2**29  # of one modality's stored sequences, that training holds in memory in place of reading them anew


class Tokens(NamedTuple):
    """Sequences side by side, padded with zeros to the longest; torch.func maps over it as over a tensor."""

    values: Tensor  # (..., B, T, d)
    mask: Tensor  # (..., B, T) of 1 where there is a token and 0 at padding


class StoredSequence(Protocol):
    """A sequence (T, d) that lies elsewhere, for instance in a file, until it is looked at."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """(T, d), of its own memory."""


class Sequences:
    """N sequences (T_i, d) of float16 or float32; T_i may be 0: nothing is there.

    What is stored in a file is read where it is padded or looked at, and not kept: however many sequences there are,
    those in memory are the ones in use. Equal parts (one picture under two captions) may be one.
    """

    def __init__(self, parts: Sequence[Tensor | StoredSequence], width: int | None = None) -> None:
        """`width` d is needed where N is 0. Raises ValueError where a part is not (T, d) of floating-point numbers."""
        self.parts = list(parts)
        widths = {part.shape[-1] for part in self.parts} | ({width} if width is not None else set())
        if len(widths) != 1 or any(len(part.shape) != 2 or not part.dtype.is_floating_point for part in self.parts):
            found = sorted({f"{part.dtype} {tuple(part.shape)}" for part in self.parts})[:3]
            raise ValueError(f"sequences are floating-point tensors (T, d) of one width d; found {', '.join(found)}")
        self.width = widths.pop()
        self.lengths = torch.tensor([part.shape[0] for part in self.parts], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return map(_read, self.parts)

    def __getitem__(self, rows: int | slice | Tensor) -> "Tensor | Sequences":
        """One sequence (T_i, d) of a number; the chosen ones of a slice, of numbers (n,), or of booleans (N,)."""
        if isinstance(rows, int):
            return _read(self.parts[rows])
        if isinstance(rows, slice):
            return Sequences(self.parts[rows], self.width)
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            if rows.shape != self.lengths.shape:
                raise IndexError(f"{len(self)} sequences, chosen by booleans {tuple(rows.shape)}")
            rows = rows.nonzero().squeeze(1)
        return self[int(rows)] if rows.ndim == 0 else Sequences([self.parts[row] for row in rows.tolist()], self.width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, longest T, d), as of the padded whole."""
        return len(self.parts), max(self.lengths.tolist(), default=0), self.width

    def held(self) -> "Sequences":
        """The same, read into memory once and for all where it takes at most `HELD_BYTES`; else these themselves."""
        stored = {id(part): part for part in self.parts if not isinstance(part, Tensor)}  # equal parts may be one
        if sum(part.shape[0] * part.shape[1] * part.dtype.itemsize for part in stored.values()) > HELD_BYTES:
            return self
        read = {key: part.read() for key, part in stored.items()}
        return Sequences([read.get(id(part), part) for part in self.parts], self.width)

    def padded(self, rows: Tensor | None = None, device: torch.device | str = "cpu") -> Tokens:
        """The sequences `rows` (..., B), default all, as float32 values (..., B, T, d) and mask (..., B, T).

        T is the longest of them, and 1 at least.
        """
        rows = torch.arange(len(self)) if rows is None else torch.as_tensor(rows)
        lengths = self.lengths[rows]
        longest = max(1, int(lengths.max())) if rows.numel() else 1
        values = torch.zeros(rows.numel(), longest, self.width)
        for place, row in enumerate(rows.flatten().tolist()):
            part = _read(self.parts[row])
            values[place, : len(part)] = part
        mask = (torch.arange(longest) < lengths.unsqueeze(-1)).float()
        return Tokens(values.reshape(*rows.shape, *values.shape[1:]).to(device), mask.to(device))

    def pooled(self) -> Tensor:
        """(N, d) float32: the mean over each sequence's tokens; 0 of an empty one."""
        means = [part.float().mean(0) if len(part) else torch.zeros(self.width) for part in self]
        return torch.stack(means) if means else torch.zeros(0, self.width)


def _read(part: Tensor | StoredSequence) -> Tensor:
    return part if isinstance(part, Tensor) else part.read()


def from_padded(values: Tensor, mask: Tensor) -> Sequences:
    """(N, T, d) and mask (N, T) -> their tokens where the mask is not 0."""
    return Sequences([row[kept] for row, kept in zip(values, mask.bool(), strict=True)], values.shape[-1])


def token_counts(features: "Mapping[str, Tensor | Sequences]") -> Tensor | None:
    """(N,) tokens of each example in all modalities; None where there are none but vectors."""
    counts = [x.lengths for x in features.values() if isinstance(x, Sequences)]
    return torch.stack(counts).sum(0) if counts else None


def chunks(
    features: "Mapping[str, Tensor | Sequences]", rows: Tensor, device: torch.device | str = "cpu"
) -> "Iterator[dict[str, Tensor | Tokens]]":
    """The examples `rows` (n,) in that order, as many at a time as fit into memory, sequences padded.

    Rows in the order of `token_counts` are padded least.
    """
    counts = token_counts(features)
    start = 0
    while start < len(rows):
        stop = min(len(rows), start + CHUNK_EXAMPLES)
        if counts is not None:
            longest = counts[rows[start:stop]].cummax(0).values * torch.arange(1, stop - start + 1)
            stop = start + max(1, int((longest <= CHUNK_TOKENS).sum()))
        part, start = rows[start:stop], stop
        yield {
            name: x.padded(part, device) if isinstance(x, Sequences) else x[part].to(device)
            for name, x in features.items()
        }


def concatenate(parts: Sequence[Tensor | Sequences]) -> Tensor | Sequences:
    """Examples of several splits after each other, of vectors (n, d) or of sequences."""
    if isinstance(parts[0], Sequences):
        return Sequences([row for part in parts for row in part.parts], parts[0].width)
    return torch.cat(list(parts))
