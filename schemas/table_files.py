"""Parquet files of the tables: written with their schema's name and version, read only if they are what they say."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ArtifactError
from schemas.tables import RUN_KEY, SCHEMA_KEY, VERSION_KEY, TableSchema
from schemas.untrusted_text import readable

UNREADABLE = (OSError, ValueError, ArithmeticError, LookupError, pa.ArrowException)
"""What pyarrow raises where the bytes of a file are not what they should be."""


def write_parquet(
    path: Path, table: pa.Table, schema: TableSchema, where: str, *, run_id: str, row_group_rows: int
) -> None:
    """Validate ``table`` and write it.

    Args:
        path: File to write.
        table: Rows of ``schema``; other columns are left out.
        schema: What they must meet.
        where: The file's name, for errors.
        run_id: Goes into the file's metadata, beside the schema's name and version.
        row_group_rows: Rows that a reader reads at least.

    Raises:
        ArtifactError: the table does not meet ``schema``.
    """
    checked = schema.validate(table, where).select(schema.columns.names).cast(schema.columns)
    metadata = {
        SCHEMA_KEY: schema.name.encode(),
        VERSION_KEY: str(schema.version).encode(),
        RUN_KEY: run_id.encode(),
    }
    pq.write_table(checked.replace_schema_metadata(metadata), path, compression="zstd", row_group_size=row_group_rows)


def read_parquet(path: Path, schema: TableSchema, where: str, columns: list[str] | None = None) -> pa.Table:
    """Read a file that ``write_parquet`` wrote, or some of its columns, validated.

    Raises:
        ArtifactError: the file is missing, no Parquet, of another schema or version, or breaks the contract.
    """
    with reading(where):
        found = pq.read_schema(path)
    metadata = found.metadata or {}
    kind, number = (readable(metadata.get(key, b"?").decode(errors="replace"), 40) for key in (SCHEMA_KEY, VERSION_KEY))
    if (kind, number) != (schema.name, str(schema.version)):
        raise ArtifactError(
            f"{where}: holds table `{kind}` v{number}, expected `{schema.name}` v{schema.version}; "
            "re-run its stage with this version"
        )
    partial = schema
    if columns is not None:
        partial = replace(
            schema,
            columns=pa.schema([schema.columns.field(column) for column in columns]),
            parallel=tuple(group for group in schema.parallel if set(group) <= set(columns)),
            unique_together=schema.unique_together if set(schema.unique_together) <= set(columns) else (),
        )
    partial.validate_columns(found, where)
    with reading(where):
        table = pq.read_table(path, columns=partial.columns.names, partitioning=None).select(partial.columns.names)
        # Parquet's reader takes text that is no UTF-8 and says nothing.
        table.validate(full=True)
    return partial.validate(table, where).replace_schema_metadata(None).cast(partial.columns)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise what pyarrow finds wrong with the file called ``where`` as ArtifactError."""
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{where}: missing") from None
    except UNREADABLE as error:
        raise ArtifactError(
            f"{where}: not a readable Parquet file: {readable(str(error))}; run its stage again"
        ) from None
