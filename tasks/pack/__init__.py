"""Stage pack: whole sequences into bins, with the teacher's targets beside the tokens they belong to."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.stage_key import WARMUP
from schemas.tables import TableSchema, pack_schema
from tasks.pack.binning import Bins, Index, best_fit_decreasing, index_type
from tasks.pack.regroup import Regrouped
from tasks.pack.rows import pack_rows
from tasks.pack.selection import Selection, select_kept, select_references
from tasks.stage import StageJob

ROW_GROUP_BINS = 4
"""Bins in a Parquet row group: what a trainer reads at least."""


def run(job: StageJob) -> None:
    """Write the packs of a round (kept samples with targets), or of the warm-up (references of train prompts).

    Memory holds one shard of an input and one of the output at a time, and about 60 bytes a sequence: which bin it goes
    to is known only when all lengths are. A temporary copy of the rows to pack lies in the stage's folder meanwhile.
    Finished shards of an earlier attempt are kept.

    Raises:
        StageError: nothing is left to pack.
        ArtifactError: the tables of the round do not belong together.
    """
    config = job.config
    if job.round == WARMUP:
        selection, schema = select_references(job), pack_schema(None)
    else:
        selection, schema = select_kept(job), pack_schema(config.score.top_k, config.score.topk_dtype)
    bins = best_fit_decreasing(selection.tokens, config.pack.max_tokens)
    _write_shards(job, selection, bins, schema)
    tokens, count = int(selection.tokens.sum(dtype=np.int64)), bins.offsets.size - 1
    job.counters |= {
        "sequences": int(selection.tokens.size),
        "bins": count,
        "shards": len(range(0, count, config.pack.shard_bins)),
        "tokens": tokens,
        "response_tokens": selection.response_tokens,
        "fill": round(tokens / (count * config.pack.max_tokens), 6),
    }


def _write_shards(job: StageJob, selection: Selection, bins: Bins, schema: TableSchema) -> None:
    """Gather each output shard's sequences and write it."""
    store, shard_bins = job.store, job.config.pack.shard_bins
    count = bins.offsets.size - 1
    first_bins = np.append(np.arange(0, count, shard_bins), count)
    starts = bins.offsets[first_bins]
    todo = [shard for shard in range(first_bins.size - 1) if not store.part(job.key, shard).is_file()]
    if not todo:
        return
    places = np.full(selection.keep.size, -1, index_type(selection.keep.size))
    places[selection.keep] = _places(bins, starts, todo)
    total = sum(len(store.table_files(source.key)) for source in selection.sources) + len(todo)
    done = 0

    def file_done() -> None:
        nonlocal done
        done += 1
        job.progress(done, total, "files")

    with store.scratch_folder(job.key) as temporary:
        regrouped = []
        for index, source in enumerate(selection.sources):
            folder = temporary / f"{index}"
            folder.mkdir()
            regrouped.append(Regrouped(folder, starts))
            regrouped[-1].scatter(store, source, places, file_done)
        del places
        for shard, *parts in zip(todo, *(rows.gather() for rows in regrouped), strict=True):
            low, high = int(first_bins[shard]), int(first_bins[shard + 1])
            table = pack_rows(_side_by_side(parts), bins.offsets[low : high + 1] - bins.offsets[low], low)
            store.write_table(store.part(job.key, shard), table, schema, row_group_rows=ROW_GROUP_BINS)
            file_done()


def _places(bins: Bins, starts: NDArray[np.int64], todo: list[int]) -> Index:
    """Return the place of each sequence among all bins, -1 where its shard is written already."""
    place = np.arange(bins.order.size, dtype=bins.order.dtype)
    finished = ~np.isin(np.arange(starts.size - 1), todo)
    place[np.repeat(finished, np.diff(starts))] = -1
    places = np.empty_like(place)
    places[bins.order] = place
    return places


def _side_by_side(tables: list[pa.Table]) -> pa.Table:
    first, *others = tables
    for other in others:
        for name in other.column_names:
            first = first.append_column(name, other.column(name))
    return first
