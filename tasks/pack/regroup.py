"""Rows of a sharded table, regrouped by the shard they go to, with a few megabytes in memory at a time.

Best-fit decreasing sends neighbours to bins far apart, so every shard written needs rows of every shard read. Rows are
therefore laid down in piles, each for a range of destinations, as Arrow streams; a pile of several destinations is
split again, until each has its own. However many shards there are, a row is laid down once for every FAN_OUT-fold of
them (twice for 4,096), and no more than FAN_OUT files are open.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.run_store import RunStore
from tasks.sequences import Source

_PLACE = "place"

FAN_OUT = 64
"""Piles that rows are split into at a time."""

_SPLIT_BYTES = 8 << 20
"""Rows collected before they are split, so that a pile gets some at a time."""


class _Pile(NamedTuple):
    """A file of rows for the destinations from ``low`` up to ``high``."""

    path: Path
    low: int
    high: int


class Regrouped:
    """A table's rows, split by destination, in ``folder``.

    Args:
        folder: An empty folder to write into; as large as the chosen columns, LZ4-compressed.
        starts: int64 [destinations + 1]; destination d takes the places ``starts[d]`` up to ``starts[d + 1]``.
    """

    def __init__(self, folder: Path, starts: NDArray[np.int64]) -> None:
        self._folder = folder
        self._starts = starts
        self._piles: list[_Pile] = []

    def scatter(
        self, store: RunStore, source: Source, places: NDArray[np.integer], shard_done: Callable[[], None]
    ) -> None:
        """Lay down the rows of a table.

        Args:
            store: The run's files.
            source: The table.
            places: int32 or int64 [rows]; where each row goes, or -1 to leave it out.
            shard_done: Called after each shard.
        """

        def placed() -> Iterator[pa.Table]:
            row = 0
            for shard in source.shards(store):
                of_shard = places[row : row + shard.num_rows]
                row += shard.num_rows
                table = shard.append_column(_PLACE, pa.array(of_shard.astype(np.int64)))
                yield table.take(np.flatnonzero(of_shard >= 0))
                shard_done()

        self._piles = self._split(placed(), 0, self._starts.size - 1)

    def gather(self) -> Iterator[pa.Table]:
        """Return the rows of one destination after another, of those that have any, in the order of their places."""
        waiting = self._piles[::-1]
        while waiting:
            pile = waiting.pop()
            if pile.high - pile.low > 1:
                waiting += self._split(_read(pile.path), pile.low, pile.high)[::-1]
            else:
                rows = pa.concat_tables(_read(pile.path))
                yield rows.take(np.argsort(rows.column(_PLACE).to_numpy())).drop_columns(_PLACE)
            pile.path.unlink()

    def _split(self, tables: Iterable[pa.Table], low: int, high: int) -> list[_Pile]:
        """Lay rows for the destinations ``low`` to ``high`` down in piles; return those with rows, in order."""
        firsts = np.append(np.arange(low, high, -(-(high - low) // FAN_OUT)), high)
        piles = [
            _Pile(self._folder / f"{first:08d}-{last:08d}.arrows", int(first), int(last))
            for first, last in pairwise(firsts)
        ]
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with ExitStack() as files:
            for table in _collected(tables):
                places = table.column(_PLACE).to_numpy()
                order = np.argsort(places)
                ordered = table.take(order).combine_chunks()
                edges = np.searchsorted(places[order], self._starts[firsts])
                for number in np.flatnonzero(np.diff(edges)).tolist():
                    if number not in writers:
                        sink = files.enter_context(pa.OSFile(str(piles[number].path), "wb"))
                        writer = pa.ipc.new_stream(sink, table.schema, options=options)
                        writers[number] = files.enter_context(writer)
                    writers[number].write_table(ordered.slice(edges[number], edges[number + 1] - edges[number]))
        return [piles[number] for number in sorted(writers)]


def _read(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _collected(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join tables until they have some size."""
    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        if table.num_rows:
            waiting.append(table)
            size += table.nbytes
        if size >= _SPLIT_BYTES:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)
