"""All sources become the prompts table."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import PromptsConfig
from schemas.errors import PromptError
from schemas.tables import PROMPTS
from schemas.untrusted_text import readable
from tasks.prompts.messages import RowProblem, prompt_id, row_answer, row_messages
from tasks.prompts.sources import SourceRows, open_sources
from tasks.prompts.split import draw_splits
from tasks.stage import Progress

BATCH_ROWS = 4096
"""Rows held as Python objects at a time; everything before them is Arrow."""

_READ = pa.schema([PROMPTS.columns.field(name) for name in PROMPTS.columns.names if name != "split"])


def prompts_table(config: PromptsConfig, seed: int, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
    """Read every source, keep each distinct prompt once, and split them.

    Args:
        config: The sources, and how many prompts to take and to hold out.
        seed: The run's seed; draws `limit` and the split.
        progress: Told the rows read, of all.

    Returns:
        The table of schema ``PROMPTS``, in reading order, and what was counted: `rows`, `duplicates`,
        `left_out_by_limit`, `held_out`, `train`, `not_verifiable` (prompts with nothing to check a response against),
        and under `sources` the rows of each.

    Raises:
        PromptError: a source cannot be read, has rows that cannot be used, or nothing is left to train on.
    """
    sources = open_sources(config.sources)
    total = sum(source.total for source in sources)
    progress(0, total, "prompts")
    batches: list[pa.RecordBatch] = []
    seen: set[str] = set()
    counts: dict[str, int] = {}
    done = 0

    def report(rows: int) -> None:
        progress(done + rows, total, "prompts")

    for source in sources:
        read = _read_source(source, seen, batches, report)
        counts[source.label] = counts.get(source.label, 0) + read
        done += source.total
        report(0)
    table = pa.Table.from_batches(batches, _READ)
    rows = sum(counts.values())
    taken, held_out = draw_splits(
        table.column("prompt_id").to_pylist(), seed=seed, held_out=config.held_out, limit=config.limit
    )
    split = pa.DictionaryArray.from_arrays(pa.array(held_out).cast(pa.int8()), pa.array(["train", "held_out"]))
    counters = {
        "rows": rows,
        "duplicates": rows - table.num_rows,
        "left_out_by_limit": int(table.num_rows - taken.sum()),
        "held_out": int(held_out.sum()),
        "train": int(taken.sum() - held_out.sum()),
        "not_verifiable": int(pc.sum(pc.is_null(table.column("verification").filter(pa.array(taken)))).as_py() or 0),
        "sources": counts,
    }
    table = table.append_column(PROMPTS.columns.field("split"), split.cast(pa.string())).filter(pa.array(taken))
    return table, counters


def _read_source(
    source: SourceRows, seen: set[str], batches: list[pa.RecordBatch], progress: Callable[[int], None]
) -> int:
    """Append a source's new prompts to ``batches`` and return how many rows it has."""
    columns: dict[str, list[Any]] = {name: [] for name in _READ.names}
    first: tuple[int, RowProblem] | None = None
    read = unusable = 0
    answered = False

    def flush() -> None:
        if columns["prompt_id"]:
            batches.append(pa.RecordBatch.from_pydict(columns, _READ))
            for values in columns.values():
                values.clear()

    for number, row in source.rows:
        read += 1
        try:
            if isinstance(row, RowProblem):
                raise row
            messages, answer = row_messages(row, source.columns), row_answer(row, source.columns)
        except RowProblem as problem:
            first = first or (number, problem)
            unusable += 1
            continue
        answered = answered or source.columns.answer in row
        name = prompt_id(messages)
        if name not in seen:
            seen.add(name)
            check = source.verification(row, answer)
            found = (name, messages, answer, check, source.label, number)
            for values, value in zip(columns.values(), found, strict=True):
                values.append(value)
        if read % BATCH_ROWS == 0:
            flush()
            progress(read)
    flush()
    if first is not None:
        raise PromptError(_unusable_rows(source, first, unusable - 1))
    if read == 0:
        raise PromptError(f"{source.where}: has no rows; it needs at least one prompt")
    if not answered and source.columns.answer not in (None, "answer"):
        raise PromptError(
            f"{source.where}: column `{source.columns.answer}` is in none of its {read} rows; correct `answer` of this "
            "source in the config, or set it to null"
        )
    return read


def _unusable_rows(source: SourceRows, first: tuple[int, RowProblem], others: int) -> str:
    number, problem = first
    place = f"{source.where}: row {number}" + (f", column `{readable(problem.column)}`" if problem.column else "")
    more = f" ({others} more {'row' if others == 1 else 'rows'} of it cannot be used either)" if others else ""
    return f"{place}: {problem.what}{more}"
