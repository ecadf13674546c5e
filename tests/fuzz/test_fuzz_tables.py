"""Tables of a run: every schema, from damaged bytes and from other columns, types and values."""

from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from flows.inspection import read_head
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import (
    EVALUATE_METRICS,
    EVALUATE_RESPONSES,
    FILTER,
    GENERATE,
    PROMPTS,
    SCHEMA_KEY,
    SCORE_CHECK,
    SCORE_STUDENT,
    TRAIN_METRICS,
    VERSION_KEY,
    TableSchema,
    pack_schema,
    score_schema,
)
from tasks.train.packs import PackReader
from tests.fuzz.harness import Reader, Record, try_reader
from tests.fuzz.mutations import damaged
from tests.run_fixtures import make_config, make_store

pytestmark = [pytest.mark.usefixtures("forkserver"), pytest.mark.xdist_group("children")]

ROWS = 6
SCHEMAS = {
    schema.name: schema
    for schema in (
        PROMPTS,
        GENERATE,
        score_schema(3, "float16"),
        SCORE_STUDENT,
        SCORE_CHECK,
        FILTER,
        pack_schema(3, "float32"),
        pack_schema(None),
        TRAIN_METRICS,
        EVALUATE_METRICS,
        EVALUATE_RESPONSES,
    )
}
CHOICES = {"split": "train", "finish_reason": "stop", "zone": "learnable", "model": "student", "role": "npd"}
SHARES = ("score", "repetition")
TOKENS = (b"\x00", b"\xff" * 4, b"PAR1", b"\xff\xff\xff\xff\x07", b"\x80\x80\x80\x80\x08", b"\x15\xfe\xff\xff\xff\x0f")


def _values(name: str, kind: pa.DataType, rows: int) -> list[Any]:
    """Return ``rows`` valid values of an Arrow type, distinct where the type allows."""
    if pa.types.is_fixed_size_list(kind):
        return [_values(name, kind.value_type, kind.list_size) for _ in range(rows)]
    if pa.types.is_list(kind):
        return [_values(name, kind.value_type, 2 + row % 2) for row in range(rows)]
    if pa.types.is_struct(kind):
        return [{"role": "user", "content": f"text {row}"} for row in range(rows)]
    if pa.types.is_string(kind):
        return [CHOICES.get(name, f"{name} {row}") for row in range(rows)]
    if pa.types.is_boolean(kind):
        return [row % 2 == 0 for row in range(rows)]
    if name in SHARES:
        return [row / rows for row in range(rows)]
    return [np.float16(row) for row in range(rows)] if kind == pa.float16() else list(range(rows))


def valid_table(schema: TableSchema, rows: int = ROWS) -> pa.Table:
    arrays = [pa.array(_values(field.name, field.type, rows), field.type) for field in schema.columns]
    return pa.Table.from_arrays(arrays, schema=schema.columns)


def _metadata(schema: TableSchema) -> dict[bytes, bytes]:
    return {SCHEMA_KEY: schema.name.encode(), VERSION_KEY: str(schema.version).encode()}


def _written(table: pa.Table, metadata: dict[bytes, bytes], **options: Any) -> bytes:
    sink = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, **options)
    return sink.getvalue()


def originals(name: str) -> list[bytes]:
    schema = SCHEMAS[name]
    table, metadata = valid_table(schema), _metadata(schema)
    return [
        _written(table, metadata, compression="zstd", row_group_size=4),
        _written(table, metadata, compression="none", use_dictionary=False),
    ]


def damaged_files(name: str) -> st.SearchStrategy[bytes]:
    return damaged(originals(name), TOKENS)


def _other_arrays(array: pa.Array) -> list[pa.Array]:
    """Return columns that could stand where ``array`` does: other types, values, nulls, lengths of lists."""
    size = len(array)
    numbers = pa.array(range(size))
    others = [
        pa.nulls(size),
        pa.nulls(size, array.type),
        numbers,
        numbers.cast(pa.string()),
        numbers.cast(pa.float16()),
        numbers.cast(pa.uint8()),
        numbers.cast(pa.timestamp("ns")),
        numbers.cast(pa.decimal128(30, 2)),
        pa.array([-1] * size),
        pa.array([b"\xff\xfe"] * size, pa.binary()),
        pa.Array.from_buffers(pa.string(), size, pa.array([b"\xff\xfe"] * size, pa.binary()).buffers()),
        pa.array([[None]] * size, pa.list_(pa.int32())),
        pa.array([[1] * row for row in range(size)], pa.list_(pa.int32())),
        pa.array([{"role": "user", "content": None}] * size),
        pa.array([[{"role": None, "content": None}]] * size),
        pa.array([[("a", 1)]] * size, pa.map_(pa.string(), pa.int64())),
        array.dictionary_encode() if not pa.types.is_nested(array.type) else array,
        array.take(pa.array([0] * size, pa.int64())),
        array.take(pa.array([None, *range(1, size)][:size], pa.int64())),
    ]
    if pa.types.is_string(array.type):
        others += [array.cast(pa.large_string()), array.cast(pa.binary()), pa.array(["", *["\x1b[2J"] * size][:size])]
    elif pa.types.is_floating(array.type):
        odd = np.array([np.nan, np.inf, -np.inf, -1.0, 0.0, 1.0] * size, dtype=np.float64)[:size]
        others += [pa.array(odd).cast(array.type), pa.array(odd)]
    elif pa.types.is_integer(array.type):
        others += [pa.array([-1] * size, array.type), array.cast(pa.float64()), array.cast(pa.uint64())]
    elif pa.types.is_list(array.type):
        inner = array.type.value_type
        others += [
            array.cast(pa.large_list(inner)),
            pa.array([[]] * size, array.type),
            pa.array([[None, None]] * size, array.type),
            array.take(pa.array(list(reversed(range(size))), pa.int64())),
        ]
    return others


@cache
def _others(name: str, rows: int) -> tuple[pa.Table, list[list[pa.Array]]]:
    table = valid_table(SCHEMAS[name], rows)
    return table, [_other_arrays(column.combine_chunks()) for column in table.columns]


@st.composite
def changed_tables(draw: st.DrawFn, name: str) -> tuple[list[str], list[pa.Array], pa.Table]:
    table, others = _others(name, draw(st.sampled_from([ROWS, ROWS, 1, 0])))
    names, arrays = list(table.column_names), [column.combine_chunks() for column in table.columns]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(names) - 1)) if names else 0
        kind = draw(st.integers(0, 9))
        if not names:
            break
        if kind == 0:
            del names[at], arrays[at]
        elif kind == 1:
            names.append(
                draw(st.sampled_from([names[at], "extra", "", "\x1b[2J", names[at] + "\x00", names[at].upper()]))
            )
            arrays.append(arrays[at])
        elif kind == 2:
            names.insert(0, names.pop(at))
            arrays.insert(0, arrays.pop(at))
        else:
            field = table.column_names.index(names[at]) if names[at] in table.column_names else 0
            arrays[at] = draw(st.sampled_from(others[field]))
    return names, arrays, table


@st.composite
def changed_files(draw: st.DrawFn, name: str) -> bytes:
    names, arrays, table = draw(changed_tables(name))
    metadata = _metadata(SCHEMAS[name])
    if draw(st.integers(0, 4)) == 0:
        odd = [b"", b"\xff", b"0", b"999", b"9" * 5_000, b"\x1b[2J", b"\x00", b"prompts"]
        key = draw(st.sampled_from([SCHEMA_KEY, VERSION_KEY, b"npd.run_id", b"ARROW:schema", b"pandas", b"\xff"]))
        metadata[key] = draw(st.sampled_from(odd))
    options = {
        "compression": draw(st.sampled_from(["zstd", "snappy", "none", "gzip"])),
        "row_group_size": draw(st.integers(1, 8)),
        "data_page_version": draw(st.sampled_from(["1.0", "2.0"])),
        "use_dictionary": draw(st.booleans()),
        "store_schema": draw(st.booleans()),
    }
    try:
        return _written(pa.Table.from_arrays(arrays, names=names), metadata, **options)
    except (pa.ArrowException, ValueError):
        # Not every type can be written.
        return _written(table, metadata, **options)


def _store(folder: Path) -> tuple[RunStore, Path]:
    store = RunStore(folder / "test")
    if not store.folder.is_dir():
        store = make_store(folder, make_config(folder))
    path = store.part(StageKey("generate", 0), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    return store, path


def _read(name: str) -> Callable[[bytes, Path], None]:
    schema = SCHEMAS[name]

    def read(data: bytes, folder: Path) -> None:
        """What is read is of the schema, can be written again, and has nothing in it that is not what it says."""
        store, path = _store(folder)
        path.write_bytes(data)
        some = schema.columns.names[::2]
        try:
            part = store.read_part(path, schema, some)
        except ArtifactError:
            part = None
        table = store.read_part(path, schema)
        assert table.schema.equals(schema.columns)
        table.validate(full=True)
        assert part is not None
        assert part.equals(table.select(some))
        again = path.with_name("again.parquet")
        store.write_table(again, table, schema)
        assert store.read_part(again, schema).equals(table) or "nan" in str(table.to_pydict())

    return read


def _read_packs(data: bytes, folder: Path) -> None:
    """What the trainer takes, pack by pack."""
    path = folder / "part-00000.parquet"
    path.write_bytes(data)
    reader = PackReader([path])
    assert len(reader.seq_lengths) == len(reader)
    for pack in range(len(reader)):
        assert "input_ids" in reader[pack]


def _show_rows(data: bytes, folder: Path) -> None:
    """What `npd inspect` shows."""
    path = folder / "part-00000.parquet"
    path.write_bytes(data)
    assert read_head(path, 3).num_rows <= 3


READERS = (
    Reader("packs for the trainer", 180, partial(damaged_files, "pack"), _read_packs, ("part-00000",)),
    Reader("rows to show", 180, partial(damaged_files, "generate"), _show_rows, ("part-00000",)),
    *(Reader(f"{name}, bytes", 180, partial(damaged_files, name), _read(name), ("part-00000",)) for name in SCHEMAS),
    *(Reader(f"{name}, columns", 120, partial(changed_files, name), _read(name), ("part-00000",)) for name in SCHEMAS),
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_table_is_read_or_refused(reader: Reader, record_property: Record) -> None:
    record_property("fuzzed inputs", try_reader(__name__, reader))
