"""Rows of different lengths as one flat array and offsets, the way Arrow keeps lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """Row ``i`` is ``values[offsets[i]:offsets[i + 1]]``; ``offsets`` is int64 and starts at 0."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def from_arrow(cls, column: pa.ListArray | pa.ChunkedArray) -> Ragged:
        """Take a list column of numbers; copies nothing but what chunking forces."""
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(column.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0])

    @classmethod
    def from_rows(cls, rows: Sequence[NDArray[Any]]) -> Ragged:
        """Join a sequence of one-dimensional arrays."""
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        return cls(np.concatenate(rows) if len(rows) else np.empty(0, np.int32), offsets_of(lengths))

    @classmethod
    def repeat(cls, row: NDArray[Any], times: int) -> Ragged:
        """Return ``times`` copies of ``row``."""
        return cls(np.tile(row, times), np.arange(times + 1, dtype=np.int64) * len(row))

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """Join the rows of ``parts``, one part after another."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), offsets_of(lengths))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of each row."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self) -> list[NDArray[Any]]:
        """Return views of all rows."""
        return [self[index] for index in range(len(self))]

    def to_arrow(self) -> pa.ListArray:
        """Return the rows as a list column."""
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(self.values))

    def filter(self, mask: NDArray[np.bool_]) -> Ragged:
        """Keep the rows where ``mask`` [rows] is true."""
        return Ragged(self.values[np.repeat(mask, self.lengths)], offsets_of(self.lengths[mask]))

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the offsets of rows with these lengths.

    >>> offsets_of(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
