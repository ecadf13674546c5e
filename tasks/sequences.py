"""A round's tables side by side, one shard at a time: they hold the same samples in the same order."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import TableSchema

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Source:
    """Columns of a finished stage's table.

    Args:
        key: The stage that wrote it.
        schema: Its schema.
        columns: Columns to read; `sample_id` among them where tables are read side by side.
    """

    key: StageKey
    schema: TableSchema
    columns: list[str]

    def shards(self, store: RunStore) -> Iterator[pa.Table]:
        """Read one shard after another."""
        return store.iterate_table(self.key, self.schema, self.columns)

    def rows(self, store: RunStore) -> int:
        """Return how many rows the table has, from the stage's manifest."""
        return sum(record.rows or 0 for record in store.finished(self.key).outputs)


def side_by_side(store: RunStore, first: Source, *others: Source) -> Iterator[tuple[pa.Table, ...]]:
    """Read tables of one round together: a shard of ``first``, and the rows of each other table that belong to it.

    Shards of different tables may have different sizes; memory holds a shard of each, whatever the round's size.

    Raises:
        ArtifactError: a file does not meet its schema, or the tables do not hold the same samples in the same order;
            names the first that differs.
    """
    readers = [_Rows(store, source) for source in others]
    row = 0
    for shard in first.shards(store):
        beside = [reader.take(shard.num_rows) for reader in readers]
        for source, table in zip(others, beside, strict=True):
            _require_same(first, shard.column("sample_id"), source, table.column("sample_id"), row)
        yield (shard, *beside)
        row += shard.num_rows
    for source, reader in zip(others, readers, strict=True):
        _require_same(first, pa.chunked_array([], pa.string()), source, reader.take(1).column("sample_id"), row)


def sequence_lengths(rollouts: pa.Table) -> tuple[Int32, Int32]:
    """Return the tokens of each prompt and of each response of a rollout table (schema GENERATE); int32 [rows]."""
    prompts, responses = (
        pc.list_value_length(rollouts.column(name)).to_numpy() for name in ("prompt_ids", "response_ids")
    )
    return prompts, responses


class _Rows:
    """The rows of a table, as many at a time as are asked for."""

    def __init__(self, store: RunStore, source: Source) -> None:
        self._shards = source.shards(store)
        self._left = pa.schema([source.schema.columns.field(name) for name in source.columns]).empty_table()

    def take(self, count: int) -> pa.Table:
        """Return the next ``count`` rows, or fewer where the table ends."""
        pieces, missing = [self._left.slice(0, count)], count - self._left.num_rows
        self._left = self._left.slice(count)
        while missing > 0 and (shard := next(self._shards, None)) is not None:
            pieces.append(shard.slice(0, missing))
            self._left = shard.slice(missing)
            missing -= shard.num_rows
        return pa.concat_tables(pieces)


def _require_same(first: Source, expected: pa.ChunkedArray, source: Source, found: pa.ChunkedArray, row: int) -> None:
    if expected.equals(found):
        return
    both = min(len(expected), len(found))
    different = np.flatnonzero(np.asarray(pc.not_equal(expected.slice(0, both), found.slice(0, both))))
    at = int(different[0]) if different.size else both

    def sample(ids: pa.ChunkedArray) -> str:
        return f"`{ids[at].as_py()}`" if at < len(ids) else "no sample"

    raise ArtifactError(
        f"{source.key.label}: row {row + at} holds {sample(found)}, where {first.key.label} holds {sample(expected)}; "
        f"a round's tables hold the same samples in the same order: run stage `{first.key.stage}` again"
    )
