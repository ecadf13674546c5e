"""How long the sequences of a rollout table are, read without holding its tokens."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, TableSchema

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class SequenceLengths:
    """Lengths of a rollout table's sequences, row by row.

    Args:
        sample_id: strings [samples].
        prompt_id: strings [samples].
        prompt_tokens: int64 [samples].
        response_tokens: int64 [samples].
    """

    sample_id: pa.ChunkedArray
    prompt_id: pa.ChunkedArray
    prompt_tokens: Int64
    response_tokens: Int64


def read_lengths(store: RunStore, key: StageKey) -> SequenceLengths:
    """Return the lengths in ``key``'s rollout table (schema GENERATE), holding one shard's tokens at a time.

    Raises:
        ArtifactError: the stage has not finished, or a file does not meet the schema.
    """
    shards = [
        pa.table(
            {
                "sample_id": shard.column("sample_id"),
                "prompt_id": shard.column("prompt_id"),
                "prompt_tokens": pc.list_value_length(shard.column("prompt_ids")).cast(pa.int64()),
                "response_tokens": pc.list_value_length(shard.column("response_ids")).cast(pa.int64()),
            }
        )
        for shard in store.iterate_table(key, GENERATE, ["sample_id", "prompt_id", "prompt_ids", "response_ids"])
    ]
    types = [("sample_id", pa.string()), ("prompt_id", pa.string())]
    types += [("prompt_tokens", pa.int64()), ("response_tokens", pa.int64())]
    lengths = pa.concat_tables(shards) if shards else pa.schema(types).empty_table()
    return SequenceLengths(
        lengths.column("sample_id"),
        lengths.column("prompt_id"),
        lengths.column("prompt_tokens").to_numpy(),
        lengths.column("response_tokens").to_numpy(),
    )


def read_sample_ids(store: RunStore, key: StageKey, schema: TableSchema) -> pa.ChunkedArray:
    """Return the ``sample_id`` column of a finished stage's table."""
    return store.read_table(key, schema, ["sample_id"]).column("sample_id")


def locate(wanted: pa.ChunkedArray, present: pa.ChunkedArray, where: str) -> Int64:
    """Return the row of each ``wanted`` id among the ids ``present``; int64 [wanted].

    Args:
        wanted: Ids, each of which must be there.
        present: Ids by row.
        where: The table holding ``present``, for the error.

    Raises:
        ArtifactError: names the first id that ``where`` lacks and how many there are.
    """
    rows = pc.index_in(wanted, value_set=present)
    if rows.null_count:
        absent = wanted.filter(pc.is_null(rows))
        raise ArtifactError(
            f"{where}: lacks `{absent[0].as_py()}`{f' and {len(absent) - 1} more' if len(absent) > 1 else ''} that a "
            "later table names; run its stage again"
        )
    result: Int64 = rows.to_numpy().astype(np.int64)
    return result
