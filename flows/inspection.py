"""What lies in a run's folder, for people who look."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text

from flows.display import make_table, print_pairs, short_text
from flows.summary import display_place
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.table_files import reading
from schemas.untrusted_text import one_line
from tasks.report.text import bytes_text, duration_text
from tasks.stage import stages_of


def print_tree(console: Console, store: RunStore) -> None:
    """Print every stage that has finished or begun, with its rows, bytes and seconds."""
    numeric = ("files", "rows", "bytes", "time")
    table = make_table(display_place(store), ["stage", *numeric], numeric)
    for key in stages_of(store.settings):
        manifest = store.manifest(key)
        if manifest is not None:
            table.add_row(
                key.folder,
                f"{len(manifest.outputs):,}",
                f"{sum(record.rows or 0 for record in manifest.outputs):,}",
                bytes_text(sum(record.bytes for record in manifest.outputs)),
                duration_text(manifest.counters.get("seconds", 0.0)),
            )
        elif store.has_begun(key):
            table.add_row(key.folder, "", "", "", "unfinished")
    console.print(table)


def print_stage(console: Console, store: RunStore, key: StageKey, rows: int) -> None:
    """Print a finished stage's manifest, and of each kind of table its schema and first ``rows`` rows.

    Raises:
        ArtifactError: the stage has not finished, or a file of it is no readable table.
    """
    manifest = store.finished(key)
    pairs = [
        ("stage", key.label),
        ("folder", f"{store.url}/{key.folder}"),
        ("fingerprint", manifest.fingerprint),
        ("started", manifest.started),
        ("finished", f"{manifest.finished} on {manifest.host}"),
        *((f"counter {name}", short_text(value)) for name, value in manifest.counters.items()),
        *((f"package {name}", version) for name, version in manifest.packages.items()),
        *((f"input {record.path}", _size(record.rows, record.bytes)) for record in manifest.inputs),
        *((f"output {record.path}", _size(record.rows, record.bytes)) for record in manifest.outputs),
    ]
    print_pairs(console, pairs)
    tables: dict[tuple[Path, str], Path] = {}
    for path in store.table_files(key):
        # The first shard of a table speaks for all; in an object store each would have to be downloaded.
        tables.setdefault((path.parent, path.name.partition("-")[0]), path)
    for path in tables.values():
        head = read_head(store.fetch(path), rows)
        schema = head.schema.remove_metadata()
        console.print()
        console.print(Text(one_line(store.relative(path)), style="bold"), soft_wrap=True)
        print_pairs(console, [(f"  {field.name}", str(field.type)) for field in schema])
        for index, row in enumerate(head.to_pylist()):
            console.print(Text(f"row {index}", style="dim"))
            print_pairs(console, [(f"  {name}", short_text(value)) for name, value in row.items()])


def read_head(path: Path, rows: int) -> pa.Table:
    """Return the first ``rows`` rows of a Parquet file, as it is: of any schema, read only as far as needed.

    Raises:
        ArtifactError: the file is missing or no Parquet.
    """
    with reading(str(path)), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        batch = next(file.iter_batches(batch_size=max(rows, 1)), None) if rows else None
        head = schema.empty_table() if batch is None else pa.Table.from_batches([batch])
        head.validate(full=True)
        return head


def _size(rows: int | None, size: int) -> str:
    return bytes_text(size) if rows is None else f"{rows:,} rows, {bytes_text(size)}"
