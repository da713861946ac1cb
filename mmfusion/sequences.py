"""Sequences of tokens or steps: N of them, each as long as it is, and batches of them padded side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_EXAMPLES = 256  # read at a time outside of training: bounds the memory of S members' hidden layers
CHUNK_TOKENS = 4096  # of all modalities, the same


class Tokens(NamedTuple):
    """Sequences side by side, padded with zeros to the longest; torch.func maps over it as over a tensor."""

    values: Tensor  # (..., B, T, d)
    mask: Tensor  # (..., B, T) of 1 where there is a token and 0 at padding


class Sequences:
    """N sequences (T_i, d) of float16 or float32; T_i may be 0: nothing is there.

    The parts may be views of a file that is mapped into memory: they are read where they are padded, and not before.
    Equal parts (one picture under two captions) may be one tensor.
    """

    def __init__(self, parts: Sequence[Tensor], width: int | None = None) -> None:
        """`width` is d, default that of the parts. Raises ValueError where neither says it, or a part is not (T, d)."""
        self.parts = list(parts)
        widths = {part.shape[-1] for part in self.parts} | ({width} if width is not None else set())
        if len(widths) != 1 or any(part.ndim != 2 or not part.is_floating_point() for part in self.parts):
            found = sorted({f"{part.dtype} {tuple(part.shape)}" for part in self.parts})[:3]
            raise ValueError(f"sequences are floating-point tensors (T, d) of one width d; found {', '.join(found)}")
        (self.width,) = widths
        self.lengths = torch.tensor([len(part) for part in self.parts], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)

    def __getitem__(self, rows: int | slice | Tensor) -> "Tensor | Sequences":
        """One sequence (T_i, d) of a number; the chosen ones of a slice, of numbers (n,), or of booleans (N,)."""
        if isinstance(rows, int):
            return self.parts[rows]
        if isinstance(rows, slice):
            return Sequences(self.parts[rows], self.width)
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            if rows.shape != self.lengths.shape:
                raise IndexError(f"{len(self)} sequences, chosen by booleans {tuple(rows.shape)}")
            rows = rows.nonzero().squeeze(1)
        return self.parts[rows] if rows.ndim == 0 else Sequences([self.parts[row] for row in rows.tolist()], self.width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, longest T, d), as of the padded whole."""
        return len(self.parts), int(self.lengths.max()) if self.parts else 0, self.width

    def padded(self, rows: Tensor | None = None, device: torch.device | str = "cpu") -> Tokens:
        """The sequences `rows` (..., B), default all, as float32 values (..., B, T, d) and mask (..., B, T).

        T is the longest of them, and 1 at least.
        """
        rows = torch.arange(len(self)) if rows is None else torch.as_tensor(rows)
        lengths = self.lengths[rows]
        longest = max(1, int(lengths.max())) if rows.numel() else 1
        values = torch.zeros(rows.numel(), longest, self.shape[-1])
        for place, row in enumerate(rows.flatten().tolist()):
            part = self.parts[row]
            values[place, : len(part)] = part
        mask = (torch.arange(longest) < lengths.unsqueeze(-1)).float()
        return Tokens(values.reshape(*rows.shape, *values.shape[1:]).to(device), mask.to(device))

    def pooled(self) -> Tensor:
        """(N, d) float32: the mean over each sequence's tokens; 0 of an empty one."""
        means = [part.float().mean(0) if len(part) else part.new_zeros(part.shape[-1]).float() for part in self.parts]
        return torch.stack(means) if means else torch.zeros(0, self.width)


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
        return Sequences([row for part in parts for row in part], parts[0].width)
    return torch.cat(list(parts))
