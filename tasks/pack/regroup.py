"""Rows of a sharded table, regrouped by the shard they go to, with one shard in memory at a time.

Best-fit decreasing sends neighbours to bins far apart, so every shard written needs rows of every shard read. Each
shard read is therefore laid down once, sorted by destination, as an Arrow file with one
record batch per destination; a destination then reads its own batches and nothing else.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import TableSchema

_PLACE = "place"


class Regrouped:
    """A table's rows, split by destination, in ``folder``.

    Args:
        folder: An empty folder to write into; as large as the chosen columns, LZ4-compressed.
        starts: int64 [destinations + 1]; destination d takes the places ``starts[d]`` up to ``starts[d + 1]``.
    """

    def __init__(self, folder: Path, starts: NDArray[np.int64]) -> None:
        self._folder = folder
        self._starts = starts
        self._files: list[tuple[Path, dict[int, int]]] = []
        self._empty: pa.Table | None = None

    def scatter(
        self,
        store: RunStore,
        key: StageKey,
        schema: TableSchema,
        columns: list[str],
        places: NDArray[np.int64],
        shard_done: Callable[[], None],
    ) -> None:
        """Lay down the rows of ``key``'s table.

        Args:
            store: The run's files.
            key: The stage whose table to read.
            schema: Its schema.
            columns: The columns to keep.
            places: int64 [rows]; where each row goes, or -1 to leave it out.
            shard_done: Called after each shard.
        """
        self._empty = pa.schema([schema.columns.field(name) for name in columns]).empty_table()
        row = 0
        for shard in store.iterate_table(key, schema, columns):
            of_shard = places[row : row + shard.num_rows]
            row += shard.num_rows
            self._write(shard, of_shard)
            shard_done()

    def gather(self, destination: int) -> pa.Table:
        """Return the rows of one destination, in the order of their places."""
        if self._empty is None:
            raise ValueError("gather comes after scatter")
        batches = []
        for path, batch_of in self._files:
            if destination in batch_of:
                with pa.memory_map(str(path)) as source:
                    batches.append(pa.ipc.open_file(source).get_batch(batch_of[destination]))
        if not batches:
            return self._empty
        rows = pa.Table.from_batches(batches)
        return rows.take(np.argsort(rows.column(_PLACE).to_numpy())).drop_columns(_PLACE)

    def _write(self, shard: pa.Table, places: NDArray[np.int64]) -> None:
        rows = np.flatnonzero(places >= 0)
        rows = rows[np.argsort(places[rows])]
        if not rows.size:
            return
        sorted_places = places[rows]
        table = shard.take(rows).append_column(_PLACE, pa.array(sorted_places))
        (batch,) = table.combine_chunks().to_batches()
        edges = np.searchsorted(sorted_places, self._starts)
        path = self._folder / f"{len(self._files):06d}.arrow"
        batch_of: dict[int, int] = {}
        with pa.OSFile(str(path), "wb") as sink:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
                for destination in np.flatnonzero(np.diff(edges)).tolist():
                    low, high = int(edges[destination]), int(edges[destination + 1])
                    batch_of[destination] = len(batch_of)
                    writer.write_batch(batch.slice(low, high - low))
        self._files.append((path, batch_of))
