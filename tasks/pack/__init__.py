"""Stage pack: whole sequences into bins, with the teacher's targets beside the tokens they belong to."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import ArtifactError, StageError
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import FILTER, GENERATE, PROMPTS, TableSchema, pack_schema, score_schema
from tasks.pack.binning import Bins, best_fit_decreasing
from tasks.pack.regroup import Regrouped
from tasks.pack.rows import TARGET_COLUMNS, pack_rows
from tasks.sequences import locate, read_lengths, read_sample_ids
from tasks.stage import StageJob

ROW_GROUP_BINS = 4
"""Bins in a Parquet row group: what a trainer reads at least."""

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A table to take columns from.

    Args:
        key: The stage that wrote it.
        schema: Its schema.
        columns: Columns to take.
        rows: int64 [sequences]; the row of each sequence to pack.
        table_rows: Rows of the whole table.
    """

    key: StageKey
    schema: TableSchema
    columns: list[str]
    rows: Int64
    table_rows: int


@dataclass(frozen=True)
class Selection:
    """The sequences to pack: their lengths (int64 [sequences], tokens), and where their columns are."""

    prompt_tokens: Int64
    response_tokens: Int64
    sources: list[Source]

    @property
    def tokens(self) -> Int64:
        """Tokens of each whole sequence; int64 [sequences]."""
        return self.prompt_tokens + self.response_tokens


def run(job: StageJob) -> None:
    """Write the packs of a round (kept samples with targets), or of the warm-up (references of train prompts).

    Memory holds one shard of an input and one of the output at a time; a temporary copy of the rows to pack lies in
    the stage's folder meanwhile. Finished shards of an earlier attempt are kept.

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
    tokens, count = int(selection.tokens.sum()), bins.offsets.size - 1
    job.counters |= {
        "sequences": int(selection.tokens.size),
        "bins": count,
        "shards": len(range(0, count, config.pack.shard_bins)),
        "tokens": tokens,
        "response_tokens": int(selection.response_tokens.sum()),
        "fill": round(tokens / (count * config.pack.max_tokens), 6),
    }


def select_kept(job: StageJob) -> Selection:
    """Return what the round's ledger keeps, in the ledger's order.

    Raises:
        StageError: the ledger keeps nothing.
        ArtifactError: a kept sample is missing from the generate or score table, or is longer than a bin.
    """
    store, config = job.store, job.config
    generate, score = StageKey("generate", job.round), StageKey("score", job.round)
    ledger = store.read_table(StageKey("filter", job.round), FILTER, ["sample_id", "keep"])
    kept = ledger.filter(ledger.column("keep")).column("sample_id")
    if not len(kept):
        raise StageError(f"{job.key.label}: the ledger keeps none of {ledger.num_rows} samples; nothing to pack")
    lengths = read_lengths(store, generate)
    rows = locate(kept, lengths.sample_id, generate.label)
    scores = score_schema(config.score.top_k, config.score.topk_dtype)
    score_ids = read_sample_ids(store, score, scores)
    columns = ["sample_id", "prompt_ids", "response_ids", "sampled_logprobs"]
    selection = Selection(
        lengths.prompt_tokens[rows],
        lengths.response_tokens[rows],
        [
            Source(generate, GENERATE, columns, rows, len(lengths.sample_id)),
            Source(score, scores, list(TARGET_COLUMNS), locate(kept, score_ids, score.label), len(score_ids)),
        ],
    )
    too_long = np.flatnonzero(selection.tokens > config.pack.max_tokens)
    if too_long.size:
        raise ArtifactError(
            f"{job.key.label}: the ledger keeps `{kept[int(too_long[0])].as_py()}` of "
            f"{selection.tokens[too_long[0]]} tokens, more than `pack.max_tokens` {config.pack.max_tokens}; "
            "run stage filter again"
        )
    return selection


def select_references(job: StageJob) -> Selection:
    """Return the references of train prompts that fit into a bin, in the reference table's order.

    Held-out prompts never get in: they are what the student is measured on. References that are too long, and those
    without a token to learn from, are counted.

    Raises:
        StageError: nothing is left.
        ArtifactError: a reference answers a prompt that the prompts table lacks.
    """
    store, max_tokens = job.store, job.config.pack.max_tokens
    key, prompts_key = StageKey("reference"), StageKey("prompts")
    lengths = read_lengths(store, key)
    prompts = store.read_table(prompts_key, PROMPTS, ["prompt_id", "split"])
    prompt_rows = locate(lengths.prompt_id, prompts.column("prompt_id"), prompts_key.label)
    train = np.asarray(pc.equal(prompts.column("split"), "train"))[prompt_rows]
    too_long = train & (lengths.prompt_tokens + lengths.response_tokens > max_tokens)
    empty = train & ~too_long & (lengths.response_tokens == 0)
    rows = np.flatnonzero(train & ~too_long & ~empty)
    job.counters |= {"too_long": int(too_long.sum()), "empty_response": int(empty.sum())}
    if not rows.size:
        raise StageError(
            f"{job.key.label}: no reference is left to pack: of {int(train.sum())} for train prompts, "
            f"{int(too_long.sum())} are longer than `pack.max_tokens` {max_tokens} and {int(empty.sum())} are empty; "
            "raise `pack.max_tokens` or lower `warmup.max_new_tokens`"
        )
    source = Source(key, GENERATE, ["sample_id", "prompt_ids", "response_ids"], rows, train.size)
    return Selection(lengths.prompt_tokens[rows], lengths.response_tokens[rows], [source])


def _write_shards(job: StageJob, selection: Selection, bins: Bins, schema: TableSchema) -> None:
    """Gather each output shard's sequences and write it."""
    store, shard_bins = job.store, job.config.pack.shard_bins
    count = bins.offsets.size - 1
    first_bins = np.append(np.arange(0, count, shard_bins), count)
    starts = bins.offsets[first_bins]
    todo = [shard for shard in range(first_bins.size - 1) if not store.part(job.key, shard).is_file()]
    if not todo:
        return
    unfinished = np.repeat(np.isin(np.arange(first_bins.size - 1), todo), np.diff(starts))
    total = sum(len(store.table_files(source.key)) for source in selection.sources) + len(todo)
    done = 0

    def file_done() -> None:
        nonlocal done
        done += 1
        job.progress(done, total, "files")

    with store.scratch_folder(job.key) as temporary:
        regrouped = []
        for index, source in enumerate(selection.sources):
            places = np.full(source.table_rows, -1, np.int64)
            places[source.rows[bins.order]] = np.where(unfinished, np.arange(bins.order.size), -1)
            folder = temporary / f"{index}"
            folder.mkdir()
            regrouped.append(Regrouped(folder, starts))
            regrouped[-1].scatter(store, source.key, source.schema, source.columns, places, file_done)
        for shard in todo:
            low, high = int(first_bins[shard]), int(first_bins[shard + 1])
            sequences = _side_by_side([rows.gather(shard) for rows in regrouped])
            table = pack_rows(sequences, bins.offsets[low : high + 1] - bins.offsets[low], low)
            store.write_table(store.part(job.key, shard), table, schema, row_group_rows=ROW_GROUP_BINS)
            file_done()


def _side_by_side(tables: list[pa.Table]) -> pa.Table:
    first, *others = tables
    for other in others:
        for name in other.column_names:
            first = first.append_column(name, other.column(name))
    return first
