"""Opens prompt sources and reads their rows, one at a time, from batches."""

import csv
import difflib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import DatasetSource, JsonlSource, ParquetSource, PromptSource, ReasoningGymSource
from schemas.errors import PromptError
from schemas.table_files import UNREADABLE
from schemas.untrusted_text import readable
from tasks.prompts import procedural
from tasks.prompts.json_lines import count_lines, json_lines
from tasks.prompts.messages import RowColumns, RowProblem, Rows, outer_column, quoted
from tasks.verification.answers import verification_of_row, verification_of_task

_BATCH_ROWS = 4096

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_DATASET_FILES = (*_SEPARATORS, ".json")
"""Ends of the names of files that are a dataset by themselves."""


@dataclass(frozen=True)
class SourceRows:
    """An opened source.

    Args:
        label: Value of the table's `source` column.
        where: What errors call it: the whole path or id.
        columns: Where its rows keep what.
        verification: From a row and its answer, what a response is checked with; None: nothing.
        total: Rows there will be at most, for progress.
        rows: The rows, read once.
    """

    label: str
    where: str
    columns: RowColumns
    verification: Callable[[dict[str, Any], str | None], str | None]
    total: int
    rows: Rows


def open_sources(sources: Sequence[PromptSource]) -> list[SourceRows]:
    """Open every source, so that a missing one is known before any is read.

    Raises:
        PromptError: a source is missing or unreadable, or lacks a column; names it.
    """
    labels = file_labels(sources)
    opened: list[SourceRows] = []
    for source in sources:
        match source:
            case JsonlSource():
                opened.append(_open_jsonl(source, labels[Path(source.path)]))
            case ParquetSource():
                opened.append(_open_parquet(source, labels[Path(source.path)]))
            case DatasetSource():
                opened.append(_open_dataset(source))
            case ReasoningGymSource():
                opened.extend(_open_reasoning_gym(source))
    return opened


# -- JSON Lines ----------------------------------------------------------------------------------------------------


def _open_jsonl(source: JsonlSource, label: str) -> SourceRows:
    path = existing_file(source.path)
    lines = count_lines(path)
    if lines == 0:
        raise PromptError(f"{path}: is empty; it needs at least one prompt")
    rows = islice(json_lines(path), source.limit)
    return SourceRows(
        label, str(path), _row_columns(source), _row_verification(source), min(lines, source.limit or lines), rows
    )


# -- Parquet and datasets ------------------------------------------------------------------------------------------


def _open_parquet(source: ParquetSource, label: str) -> SourceRows:
    path = existing_file(source.path)
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow.names
    except UNREADABLE as error:
        raise PromptError(f"{path}: is not a readable Parquet file: {readable(str(error))}") from None
    columns = _row_columns(source)
    names = _needed_columns(str(path), found, columns)
    rows = islice(_arrow_rows(_parquet_batches(path, file, names)), source.limit)
    total = min(file.metadata.num_rows, source.limit or file.metadata.num_rows)
    return SourceRows(label, str(path), columns, _row_verification(source), total, rows)


def _parquet_batches(path: Path, file: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=names)
    except UNREADABLE as error:
        raise PromptError(f"{path}: is damaged: {readable(str(error))}; write it again") from None


def _open_dataset(source: DatasetSource) -> SourceRows:
    dataset = _load_dataset(source)
    columns = _row_columns(source)
    names = _needed_columns(source.dataset, dataset.column_names, columns)
    arrow = dataset.select_columns(names).with_format("arrow")
    batches = (batch for table in arrow.iter(batch_size=_BATCH_ROWS) for batch in table.to_batches())
    total = min(len(dataset), source.limit or len(dataset))
    local = local_dataset(source)
    label = source.dataset if local is None else local.name
    rows = islice(_arrow_rows(batches), source.limit)
    return SourceRows(label, source.dataset, columns, _row_verification(source), total, rows)


def _load_dataset(source: DatasetSource) -> Any:
    """Return the `datasets.Dataset` of a file, a folder made by `save_to_disk`, a folder of files, or a Hub id."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    # The stage has a bar of its own in a terminal, and none belongs into a file.
    disable_progress_bars()
    local = local_dataset(source)
    saved = local is not None and any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if local is not None and local.is_file():
            module, options = _reader(local)
            return load_dataset(module, data_files=str(local), split=source.dataset_split, **options)
        if not saved:
            return load_dataset(source.dataset, source.config, split=source.dataset_split, revision=source.revision)
        loaded = load_from_disk(source.dataset)
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        where = "" if local is not None else "not a local folder or file, and "
        raise PromptError(f"{source.dataset}: {where}cannot be loaded as a dataset: {error}") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if source.dataset_split not in loaded:
        raise PromptError(
            f"{source.dataset}: no split `{source.dataset_split}`; set `dataset_split` to one of {', '.join(loaded)}"
        )
    return loaded[source.dataset_split]


def _reader(path: Path) -> tuple[str, dict[str, Any]]:
    """Return what `datasets` calls a kind of file, and how it is to read this one: all columns of a table as text."""
    from datasets import Features, Value

    separator = _SEPARATORS.get(path.suffix.lower())
    if separator is None:
        return "json", {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    return "csv", {"sep": separator, "features": Features({name: Value("string") for name in names})}


def local_dataset(source: DatasetSource) -> Path | None:
    """Return the local folder or file of a dataset, or None for a Hub id.

    Raises:
        PromptError: it is not there, or a file of another kind.
    """
    path = Path(source.dataset)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() not in _DATASET_FILES:
            raise PromptError(
                f"{path}: as a file, a dataset ends in {', '.join(_DATASET_FILES)}; there are also `type: jsonl` and "
                "`type: parquet`"
            )
        return path
    if path.is_absolute() or source.dataset.startswith(".") or source.dataset.count("/") > 1:
        raise PromptError(f"{source.dataset}: no such dataset folder or file")
    return None


def _arrow_rows(batches: Iterable[pa.RecordBatch]) -> Rows:
    number = 0
    for batch in batches:
        try:
            rows: list[dict[str, Any] | RowProblem] = batch.to_pylist()
        except UNREADABLE:
            rows = [_arrow_row(batch, index) for index in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield number, row


def _arrow_row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | RowProblem:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[index].as_py()
        except UnicodeDecodeError as error:
            return RowProblem(name, f"byte {error.start + 1} is not valid UTF-8; write the column as UTF-8 text")
        except UNREADABLE as error:
            return RowProblem(name, f"cannot be read as {batch.column(name).type}: {readable(str(error))}")
    return row


def _needed_columns(where: str, names: list[str], columns: RowColumns) -> list[str]:
    """Return the columns to read, once it is sure that there is something to ask.

    Raises:
        PromptError: no column holds prompts, or the one configured for answers is missing.
    """
    have = f"it has {quoted(names)}"
    asking = (columns.messages, *columns.prompt)
    if not {outer_column(name, names) for name in asking} & set(names):
        hint = next(filter(None, (_nearest(name, names) for name in asking)), ".")
        raise PromptError(
            f"{where}: no column {' or '.join(f'`{name}`' for name in asking)}{hint} Set `messages` or `prompt` of "
            f"this source to the column that holds prompts; {have}"
        )
    if columns.answer not in (None, "answer") and outer_column(columns.answer, names) not in names:
        hint = _nearest(columns.answer, names) or "."
        raise PromptError(f"{where}: no column `{columns.answer}`{hint} Correct `answer` of this source; {have}")
    present = columns.present_in(names)
    if twice := [name for name in present if names.count(name) > 1]:
        raise PromptError(f"{where}: has column {quoted(twice)} more than once; keep one of them")
    return present


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {quoted(close)}?" if close else ""


# -- reasoning-gym -------------------------------------------------------------------------------------------------


def _open_reasoning_gym(source: ReasoningGymSource) -> list[SourceRows]:
    """Open each task of ``source`` as a source of its own."""
    reasoning_gym_version()
    unused = sorted(set(source.options) - set(source.tasks))
    if unused:
        raise PromptError(f"reasoning_gym: `options` names `{unused[0]}`, which is not among its `tasks`")
    for task, options in source.options.items():
        reserved = sorted({"size", "seed"} & set(options))
        if reserved:
            raise PromptError(f"reasoning_gym:{task}: set `{reserved[0]}` beside `tasks`, not in `options`")
    columns = RowColumns(prompt=("question",), answer="answer", system=source.system)
    tasks = list(dict.fromkeys(source.tasks))
    entries = _reasoning_gym_entries(source, tasks)
    return [
        SourceRows(
            f"reasoning_gym:{task}",
            f"reasoning_gym:{task}",
            columns,
            _task_verification(task, source.options.get(task, {})),
            source.size,
            # All tasks share one process: each takes its rows from the same stream, in order.
            ((entry["row"], entry) for entry in islice(entries, source.size)),
        )
        for task in tasks
    ]


def _task_verification(task: str, options: dict[str, Any]) -> Callable[[dict[str, Any], str | None], str | None]:
    def verification(row: dict[str, Any], answer: str | None) -> str | None:
        return None if row["entry"] is None else verification_of_task(task, options, row["entry"])

    return verification


def _reasoning_gym_entries(source: ReasoningGymSource, tasks: list[str]) -> Iterator[dict[str, Any]]:
    request = json.dumps({"tasks": tasks, "size": source.size, "seed": source.seed, "options": source.options})
    # -P keeps the folder of procedural.py, with its module names, off the program's import path.
    command = [sys.executable, "-P", procedural.__file__]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryFile("w+") as messages, tempfile.TemporaryFile("w+") as asked:
        asked.write(request)
        asked.seek(0)
        with subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    entry = json.loads(line)
                    if "error" in entry:
                        raise PromptError(f"reasoning_gym: {entry['error']}")
                    yield entry
                process.wait()
            finally:
                process.kill()
        if process.returncode != 0:
            messages.seek(0)
            last = (messages.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise PromptError(f"reasoning_gym: a task of {', '.join(tasks)} failed: {last}; correct its `options`")


def reasoning_gym_version() -> str:
    """Return the version of `reasoning-gym`.

    Raises:
        PromptError: it is not installed.
    """
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        raise PromptError(
            "reasoning_gym: the package `reasoning-gym` is not installed; install the extra: "
            "pip install -e '.[reasoning-gym]'"
        ) from None


# -- shared --------------------------------------------------------------------------------------------------------


def _row_columns(source: JsonlSource | ParquetSource | DatasetSource) -> RowColumns:
    prompt = (source.prompt,) if isinstance(source.prompt, str) else tuple(source.prompt)
    return RowColumns(source.messages, prompt, source.answer, source.system, source.last_reply, source.tools)


def _row_verification(source: JsonlSource | ParquetSource | DatasetSource) -> Callable[[Any, str | None], str | None]:
    return lambda row, answer: verification_of_row(answer, source.verifier)


def existing_file(text: str) -> Path:
    """Return the path of a source's file.

    Raises:
        PromptError: there is no such file, or it may not be read.
    """
    path = Path(text)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise PromptError(f"{readable(text)}: cannot be looked up: {error.strerror}") from None
    if is_folder:
        raise PromptError(f"{path}: is a folder, not a file; read folders with `type: dataset`")
    if not is_file:
        raise PromptError(f"{path}: no such prompt file")
    if not os.access(path, os.R_OK):
        raise PromptError(f"{path}: may not be read; change its permissions")
    return path


def file_labels(sources: Sequence[PromptSource]) -> dict[Path, str]:
    """Return what the table's `source` column calls each source that is a file, by its path."""
    return _labels([Path(source.path) for source in sources if isinstance(source, (JsonlSource, ParquetSource))])


def _labels(paths: list[Path]) -> dict[Path, str]:
    """Name each file by the shortest end of its path that no other file shares.

    >>> sorted(_labels([Path("/a/x.jsonl"), Path("/b/x.jsonl"), Path("/b/y.jsonl")]).values())
    ['a/x.jsonl', 'b/x.jsonl', 'y.jsonl']
    """
    distinct = list(dict.fromkeys(paths))

    def tail(path: Path, length: int) -> str:
        return "/".join(path.parts[-length:])

    def label(path: Path) -> str:
        lengths = range(1, len(path.parts) + 1)
        unique = (n for n in lengths if sum(tail(other, n) == tail(path, n) for other in distinct) == 1)
        return tail(path, next(unique, len(path.parts)))

    return {path: label(path) for path in distinct}
