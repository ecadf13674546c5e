"""Comparing columns of lists without a loop over tokens: digests per row, and the first place that differs."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

TOKENS, LOGPROBS, TARGET_IDS, TARGET_LOGPROBS, TEXT = (np.uint64(n) << np.uint64(56) for n in (1, 2, 3, 4, 5))
"""What a value is, mixed into its digest."""


def _mix(values: UInt64) -> UInt64:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves about half of the output's."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def row_digests(values: NDArray[Any], offsets: Int64, kind: np.uint64, first_place: Int64 | None = None) -> UInt64:
    """Return a digest of each row's values and their places; two rows that differ share one with chance 2**-64.

    Digests add up: that of a row is the sum, modulo 2**64, of those of its pieces, each with its ``first_place``.

    Args:
        values: Numbers [total] or [total, width]; compared bit by bit, so that NaN equals NaN.
        offsets: int64 [rows + 1], into the first axis.
        kind: TOKENS or another constant of this module.
        first_place: int64 [rows]; place of each row's first value. None: 0.
    """
    lengths = np.diff(offsets)
    places = np.arange(len(values)) - np.repeat(
        offsets[:-1] if first_place is None else offsets[:-1] - first_place, lengths
    )
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}").astype(np.uint64)
    at = places.astype(np.uint64) + kind
    if values.ndim == 2:
        at = at[:, None] * np.uint64(values.shape[1]) + np.arange(values.shape[1], dtype=np.uint64)
    mixed = _mix(bits ^ _mix(at + np.uint64(0x9E3779B97F4A7C15)))
    if values.ndim == 2:
        mixed = mixed.sum(axis=1, dtype=np.uint64)
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    digests: UInt64 = total[offsets[1:]] - total[offsets[:-1]]
    return digests


def text_digests(column: pa.ChunkedArray) -> UInt64:
    """Return a digest of each string of a column without nulls; two that differ share one with chance 2**-64."""
    return np.concatenate([np.empty(0, np.uint64), *map(_text_digests, column.chunks)])


def _text_digests(texts: pa.StringArray) -> UInt64:
    _, offsets, text = texts.buffers()
    if not len(texts):
        return np.empty(0, np.uint64)
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    letters = np.frombuffer(text or b"", np.uint8)[bounds[0] : bounds[-1]]
    return row_digests(letters, bounds - bounds[0], TEXT)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def fixed_lists(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """Return a column list<fixed_size_list<number>[k]> as its flat values [total, k]."""
    entries = one_array(column).flatten()
    flat: NDArray[Any] = entries.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, entries.type.list_size)


def first_difference(left: pa.ChunkedArray | pa.Array, right: pa.ChunkedArray | pa.Array) -> int | None:
    """Return the first row in which two columns of one type differ, bit by bit, or None; a row missing differs.

    >>> first_difference(pa.array([[1], [2, float("nan")]]), pa.array([[1], [2, float("nan")]])) is None
    True
    """
    left, right = one_array(left), one_array(right)
    rows = min(len(left), len(right))
    found = _differing(left.slice(0, rows), right.slice(0, rows))
    if found is None and len(left) != len(right):
        return rows
    return found


def _differing(left: pa.Array, right: pa.Array) -> int | None:
    kind, candidates = left.type, []
    nulls = _first(np.asarray(left.is_null()) != np.asarray(right.is_null()))
    if nulls is not None:
        candidates.append(nulls)
        left, right = left.slice(0, nulls), right.slice(0, nulls)
    if pa.types.is_struct(kind):
        inner = [_differing(pc.struct_field(left, n), pc.struct_field(right, n)) for n in range(kind.num_fields)]
        candidates += [row for row in inner if row is not None]
    elif pa.types.is_fixed_size_list(kind):
        flat = _differing(left.flatten(), right.flatten())
        candidates += [] if flat is None else [flat // kind.list_size]
    elif pa.types.is_list(kind):
        lengths = [pc.list_value_length(side).fill_null(0).to_numpy() for side in (left, right)]
        shorter = _first(lengths[0] != lengths[1])
        if shorter is not None:
            candidates.append(shorter)
            left, right, lengths = left.slice(0, shorter), right.slice(0, shorter), [lengths[0][:shorter]]
        flat = _differing(left.flatten(), right.flatten())
        if flat is not None:
            candidates.append(int(np.searchsorted(np.cumsum(lengths[0]), flat, side="right")))
    elif pa.types.is_floating(kind):
        sides = [side.fill_null(0).to_numpy(zero_copy_only=False) for side in (left, right)]
        bits = [side.view(f"u{side.itemsize}") for side in sides]
        differs = _first(bits[0] != bits[1])
        candidates += [] if differs is None else [differs]
    else:
        differs = _first(np.asarray(pc.not_equal(left, right).fill_null(False)))
        candidates += [] if differs is None else [differs]
    return min(candidates, default=None)


def _first(mask: NDArray[np.bool_]) -> int | None:
    return int(np.argmax(mask)) if mask.any() else None
