"""Which sequences share a bin: best-fit decreasing over all sequences at once."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Index = NDArray[np.int32 | np.int64]

_BLOCK = 1 << 16
"""Keys sorted at a time."""


class Bins(NamedTuple):
    """Sequences in the order of their bins.

    Args:
        order: int32 (int64 from 2^31 sequences on) [sequences]; indices of the sequences, bin after bin, longest first
            within a bin.
        offsets: int64 [bins + 1]; bin b holds ``order[offsets[b]:offsets[b + 1]]``.
    """

    order: Index
    offsets: Int64


def index_type(count: int) -> type[np.int32] | type[np.int64]:
    """Return the smaller integer type that numbers ``count`` rows."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> Bins:
    """Pack whole sequences into bins of ``capacity`` tokens.

    Best-fit decreasing (Johnson 1973; at most 11/9 OPT + 4 bins): sequences are taken longest first (equal ones in
    their given order), each into the bin with the least room that still holds it (of several, the one opened first), or
    into a new one.

    >>> best_fit_decreasing(np.array([3, 7, 5, 2]), capacity=10)
    Bins(order=array([1, 0, 2, 3], dtype=int32), offsets=array([0, 2, 4]))

    All sequences of one length are placed together: the fullest bin that holds one takes as many as fit, then all
    bins with that much room do, so the work grows with the number of distinct lengths, not of sequences. Memory: 16
    bytes per sequence beside ``lengths``.

    Args:
        lengths: int32 or int64 [sequences], tokens.
        capacity: Tokens in a bin at most.

    Raises:
        ValueError: a sequence is empty or longer than ``capacity``; nothing is ever cut.
    """
    if lengths.size and (lengths.min() < 1 or lengths.max() > capacity):
        wrong = int(np.flatnonzero((lengths < 1) | (lengths > capacity))[0])
        raise ValueError(f"sequence {wrong} has {lengths[wrong]} tokens; a bin takes 1 to {capacity}")
    counts = np.bincount(lengths, minlength=1)
    order = _order_of(lengths, counts, descending=True)
    bin_of = np.empty(lengths.size, order.dtype)
    room = _Room()
    present = np.flatnonzero(counts)[::-1]
    start = 0
    for length in present.tolist():
        end = start + int(counts[length])
        while start < end:
            space = room.least(length)
            if space is None:
                room.open(-(-(end - start) // (capacity // length)), capacity)
                space = capacity
            each = space // length
            chosen = room.take(space, -(-(end - start) // each))
            placed = min(end - start, chosen.size * each)
            bin_of[start : start + placed] = np.repeat(chosen, each)[:placed]
            start += placed
            in_last = placed - (chosen.size - 1) * each
            room.put(space - each * length, chosen[:-1])
            room.put(space - in_last * length, chosen[-1:])
    filled = np.bincount(bin_of, minlength=room.bins)
    return Bins(order[_order_of(bin_of, filled)], np.concatenate([[0], np.cumsum(filled)]).astype(np.int64))


def _order_of(keys: NDArray[np.integer], counts: Int64, *, descending: bool = False) -> Index:
    """Return the stable order of ``keys``, sorted block by block into what each key takes of the result.

    ``np.argsort`` of all keys at once takes three times the memory.

    Args:
        keys: Integers from 0.
        counts: How often each occurs; int64 [largest key + 1].
        descending: The largest first; equal keys stay in their order.
    """
    free = np.cumsum(counts[::-1])[::-1] - counts if descending else np.cumsum(counts) - counts
    order = np.empty(keys.size, index_type(keys.size))
    for low in range(0, keys.size, _BLOCK):
        block = keys[low : low + _BLOCK]
        rows = np.argsort(block, kind="stable")
        ordered = block[rows]
        firsts = np.flatnonzero(np.diff(ordered, prepend=-1))
        times = np.diff(firsts, append=ordered.size)
        order[np.repeat(free[ordered[firsts]] - firsts, times) + np.arange(ordered.size)] = rows + low
        free[ordered[firsts]] += times
    return order


class _Room:
    """Bins by the tokens they still have room for; within one amount in the order they were opened."""

    def __init__(self) -> None:
        self.bins = 0
        self._spaces: list[int] = []
        self._members: dict[int, Int64] = {}

    def least(self, length: int) -> int | None:
        """Return the smallest room of any bin that holds ``length``, or None."""
        at = bisect_left(self._spaces, length)
        return self._spaces[at] if at < len(self._spaces) else None

    def open(self, count: int, capacity: int) -> None:
        """Open ``count`` empty bins."""
        self.put(capacity, np.arange(self.bins, self.bins + count))
        self.bins += count

    def take(self, space: int, count: int) -> Int64:
        """Remove and return the first ``count`` bins (or all, if fewer) with room for ``space``."""
        members = self._members[space]
        if count < members.size:
            self._members[space] = members[count:]
        else:
            del self._members[space]
            del self._spaces[bisect_left(self._spaces, space)]
        return members[:count]

    def put(self, space: int, members: Int64) -> None:
        """Note that ``members`` now have room for ``space``; full bins are forgotten."""
        if not space or not members.size:
            return
        present = self._members.get(space)
        if present is None:
            insort(self._spaces, space)
            self._members[space] = members
        else:
            self._members[space] = np.sort(np.concatenate([present, members]))
