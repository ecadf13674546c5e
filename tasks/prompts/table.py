"""All sources become the prompts table."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.config import PromptsConfig
from schemas.errors import PromptError
from schemas.tables import PROMPTS
from schemas.untrusted_text import readable
from tasks.prompts.messages import RowProblem, has_column, prompt_id, row_prompt, wording_id
from tasks.prompts.sources import SourceRows, open_sources
from tasks.prompts.split import Ids, draw_splits, ids_of
from tasks.stage import Progress, StageJob

BATCH_ROWS = 4096
"""Rows held as Python objects at a time; everything before them is Arrow."""

PART_ROWS = 16_384
"""Prompts in a file of the table."""

_READ = pa.schema([PROMPTS.columns.field(name) for name in PROMPTS.columns.names if name != "split"])


def write_prompts(job: StageJob[Any], config: PromptsConfig, seed: int) -> None:
    """Write the prompts table in files of PART_ROWS, and count what ``prompts_tables`` counts.

    Raises:
        PromptError: a source is missing, empty or has rows that cannot be used, or nothing is left to train on.
    """
    with job.store.scratch_folder(job.key) as scratch:
        tables, counters = prompts_tables(config, seed, scratch, job.progress)
        for index, table in enumerate(tables):
            job.store.write_table(job.store.part(job.key, index), table, PROMPTS)
    job.counters.update(counters)


def prompts_tables(
    config: PromptsConfig, seed: int, scratch: Path, progress: Progress
) -> tuple[Iterator[pa.Table], dict[str, Any]]:
    """Read every source, keep each distinct prompt once, and split them.

    A prompt that would be trained on but asks what a held-out one asks, in the same words (``wording_id``), is left
    out: whoever has learned its answer has seen that of the other.

    The rows wait in a file while all ids are read; held are about 48 bytes a row.

    Args:
        config: The sources, and how many prompts to take and to hold out.
        seed: The run's seed; draws `limit` and the split.
        scratch: An empty folder that stays until the tables are read.
        progress: Told the rows read, of all.

    Returns:
        Tables of schema ``PROMPTS`` of PART_ROWS rows, in reading order, and what was counted: `rows`, `duplicates`,
        `left_out_by_limit`, `like_held_out` (left out since a held-out prompt asks the same), `held_out`, `train`,
        `not_verifiable` (prompts with nothing to check a response against), and under `sources` the rows of each.

    Raises:
        PromptError: a source cannot be read, has rows that cannot be used, or nothing is left to train on.
    """
    path = scratch / "rows.arrows"
    read = _read_all(open_sources(config.sources), path, progress)
    distinct, first = np.unique(read.ids, return_index=True)
    first.sort()
    taken, held_out = draw_splits(read.ids[first], seed=seed, held_out=config.held_out, limit=config.limit)
    # Of each row: 0 left out, 1 train, 2 held-out.
    place = np.zeros(read.ids.size, np.int8)
    place[first] = taken.astype(np.int8) + held_out
    alike = (place == 1) & np.isin(read.wordings, read.wordings[place == 2])
    place[alike] = 0
    if not (place == 1).any():
        raise PromptError(
            f"prompts.held_out: all of the {alike.sum()} other prompts ask what a held-out one asks, in the same "
            "words, which leaves nothing to train on; lower it or add prompts"
        )
    counters = {
        "rows": read.ids.size,
        "duplicates": read.ids.size - distinct.size,
        "left_out_by_limit": int(distinct.size - taken.sum()),
        "like_held_out": int(alike.sum()),
        "held_out": int(held_out.sum()),
        "train": int(np.count_nonzero(place == 1)),
        "not_verifiable": int(np.count_nonzero(place) - read.verifiable[place > 0].sum()),
        "sources": read.counts,
    }
    return _parts(path, place), counters


class _Read(NamedTuple):
    """What is held of the rows that were read, in their order.

    Args:
        ids: uint64 [rows], as ``ids_of`` gives them.
        wordings: ``wording_id`` of each row, likewise.
        verifiable: bool [rows]; whether a response can be checked.
        counts: Rows by source.
    """

    ids: Ids
    wordings: Ids
    verifiable: NDArray[np.bool_]
    counts: dict[str, int]


def _read_all(sources: Sequence[SourceRows], path: Path, progress: Progress) -> _Read:
    """Write the prompts of all sources to ``path``, an Arrow stream of schema _READ."""
    total, done = sum(source.total for source in sources), 0
    ids: list[Ids] = []
    wordings: list[Ids] = []
    verifiable: list[NDArray[np.bool_]] = []
    counts: dict[str, int] = {}

    def report(rows: int) -> None:
        progress(done + rows, total, "prompts")

    report(0)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _READ, options=options) as writer:

        def keep(batch: pa.RecordBatch, asked: Ids) -> None:
            ids.append(ids_of(batch.column("prompt_id").to_pylist()))
            wordings.append(asked)
            verifiable.append(batch.column("verification").is_valid().to_numpy(zero_copy_only=False))
            writer.write_batch(batch)

        for source in sources:
            rows = _read_source(source, keep, report)
            counts[source.label] = counts.get(source.label, 0) + rows
            done += source.total
            report(0)
    nothing = np.empty(0, np.uint64)
    return _Read(
        np.concatenate([nothing, *ids]),
        np.concatenate([nothing, *wordings]),
        np.concatenate([np.empty(0, np.bool_), *verifiable]),
        counts,
    )


def _parts(path: Path, place: NDArray[np.int8]) -> Iterator[pa.Table]:
    """Read the rows that are taken from ``path`` again, in tables of PART_ROWS."""
    names = pa.array(["", "train", "held_out"])
    waiting, row = PROMPTS.columns.empty_table(), 0
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            of_batch = place[row : row + batch.num_rows]
            row += batch.num_rows
            table = pa.Table.from_batches([batch]).append_column(
                PROMPTS.columns.field("split"), names.take(pa.array(of_batch))
            )
            waiting = pa.concat_tables([waiting, table.filter(pa.array(of_batch > 0))])
            while waiting.num_rows >= PART_ROWS:
                yield waiting.slice(0, PART_ROWS)
                waiting = waiting.slice(PART_ROWS)
    if waiting.num_rows:
        yield waiting


def _read_source(
    source: SourceRows, keep: Callable[[pa.RecordBatch, Ids], None], progress: Callable[[int], None]
) -> int:
    """Hand a source's prompts and their wordings to ``keep``, some at a time, and return how many rows it has."""
    asked: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in _READ.names}
    first: tuple[int, RowProblem] | None = None
    read = unusable = 0
    unseen = source.columns.needed

    def flush() -> None:
        if columns["prompt_id"]:
            keep(pa.RecordBatch.from_pydict(columns, _READ), ids_of(asked))
            for values in (asked, *columns.values()):
                values.clear()

    for number, row in source.rows:
        read += 1
        try:
            if isinstance(row, RowProblem):
                raise row
            messages, answer = row_prompt(row, source.columns)
        except RowProblem as problem:
            first = first or (number, problem)
            unusable += 1
            continue
        if unseen:
            unseen = {name for name in unseen if not has_column(row, name)}
        check = source.verification(row, answer)
        found = (prompt_id(messages), messages, answer, check, source.label, number)
        for values, value in zip(columns.values(), found, strict=True):
            values.append(value)
        asked.append(wording_id(messages))
        if read % BATCH_ROWS == 0:
            flush()
            progress(read)
    flush()
    if first is not None:
        raise PromptError(_unusable_rows(source, first, unusable - 1))
    if read == 0:
        raise PromptError(f"{source.where}: has no rows; it needs at least one prompt")
    if unseen:
        column = min(unseen)
        what = "`answer`, or set it to null" if column == source.columns.answer else "`prompt`"
        raise PromptError(
            f"{source.where}: column `{column}` is in none of its {read} rows; correct this source's {what}"
        )
    return read


def _unusable_rows(source: SourceRows, first: tuple[int, RowProblem], others: int) -> str:
    number, problem = first
    place = f"{source.where}: row {number}" + (f", column `{readable(problem.column)}`" if problem.column else "")
    more = f" ({others} more {'row' if others == 1 else 'rows'} of it cannot be used either)" if others else ""
    return f"{place}: {problem.what}{more}"
