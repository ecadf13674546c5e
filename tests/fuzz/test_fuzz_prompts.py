"""Prompt files: JSON Lines and Parquet."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from schemas.config import PromptsConfig
from schemas.tables import PROMPTS
from tests.fuzz.harness import Reader, Record, try_reader
from tests.fuzz.mutations import ODD_TEXT, changed, damaged
from tests.tasks.prompt_files import read_prompts

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "answer": "1"},
    {"prompt": "two", "answer": 2, "more": [1, {"a": None}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}]},
    {"messages": [{"role": "user", "content": "四 𝔘"}], "answer": None},
]

HOSTILE_JSON = (
    "[" * 3_000,
    '{"a":' * 3_000,
    "9" * 5_000,
    "1e999",
    "-1e-999",
    "NaN",
    "-Infinity",
    '"\\ud800"',
    '"\\ud83d\\ude00"',
    '"\\u0000"',
    '{"prompt": "a", "prompt": "b"}',
    '{"messages": [{"role": "user", "role": "system", "content": "x"}]}',
    '"' + "\x00" + '"',
    "{'prompt': 'x'}",
    '{"prompt": "x"} // why',
    "[1,]",
    "tru",
    '"\\x41"',
    "0123",
    '{"": ""}',
)

pytestmark = [pytest.mark.usefixtures("forkserver"), pytest.mark.xdist_group("children")]


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    rows = [json.dumps(row) for row in ROWS[: draw(st.integers(0, 4))]]
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.integers(0, 2))
        text = json.dumps(draw(changed(ROWS)), ensure_ascii=draw(st.booleans()))
        if kind == 1:
            text = draw(st.sampled_from(HOSTILE_JSON))
        elif kind == 2:
            text = text.replace(
                draw(st.sampled_from(['"one"', "2", "null", '"user"', '"s"'])), draw(st.sampled_from(HOSTILE_JSON))
            )
        rows.insert(draw(st.integers(0, len(rows))), text)
    separator = draw(st.sampled_from(["\n"] * 6 + ["\r\n", "\r", "\n\n", "\n \x0b\n", "\u2028", "\x00\n", "", ","]))
    start, end = draw(st.sampled_from(["", "", "", "\ufeff", "\ufeff\ufeff", "\n"])), draw(st.sampled_from(["\n", ""]))
    encoding = draw(st.sampled_from(["utf-8"] * 9 + ["utf-16"]))
    return (start + separator.join(rows) + end).encode(encoding, "surrogatepass")


def _text(type_: pa.DataType) -> pa.Array:
    return pa.array(["one", "two", None, "four"]).cast(type_)


def _invalid_text() -> pa.Array:
    data = pa.array([b"one", b"\xff\xfe", b"\xed\xa0\x80", b""])
    return pa.Array.from_buffers(pa.string(), 4, data.buffers())


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CHAT = [[{"role": "user", "content": "hi"}], None, [], [{"role": "user", "content": None}, None]]
COLUMNS: dict[str, pa.Array] = {
    "string": _text(pa.string()),
    "large_string": _text(pa.large_string()),
    "dictionary": pa.array(["one", "two", None, "one"]).dictionary_encode(),
    "binary": _text(pa.binary()),
    "invalid text": _invalid_text(),
    "null": pa.nulls(4),
    "bool": pa.array([True, False, None, True]),
    "int8": pa.array([1, -1, None, 0], pa.int8()),
    "uint64": pa.array([2**64 - 1, 0, None, 1], pa.uint64()),
    "float16": pa.array([0.5, float("nan"), None, float("inf")]).cast(pa.float16()),
    "float64": pa.array([1e308, float("nan"), None, float("-inf")]),
    "decimal": pa.array([1, 2, None, 3]).cast(pa.decimal128(38, 10)),
    "date": pa.array([2**31 - 1, -(2**31), None, 0], pa.int32()).cast(pa.date32()),
    "timestamp": pa.array([2**62, -(2**62), None, 0]).cast(pa.timestamp("us", "Nowhere/None")),
    "timestamp_ns": pa.array([2**62 + 1, -(2**62), None, 0]).cast(pa.timestamp("ns")),
    "time": pa.array([1, 2, None, 3]).cast(pa.time64("ns")),
    "duration": pa.array([2**62, 2, None, 3]).cast(pa.duration("s")),
    "list of text": pa.array([["a"], [], None, [None]], pa.list_(pa.string())),
    "list of numbers": pa.array([[1], [], None, [None]], pa.list_(pa.int64())),
    "nested": pa.array([[[[[1]]]], [], None, [[]]]),
    "struct": pa.array([{"a": 1}, None, {"a": None}, {"a": 2}]),
    "map": pa.array([[("a", 1)], [], None, [("b", None)]], pa.map_(pa.string(), pa.int64())),
    "chat": pa.array(CHAT, pa.list_(MESSAGE)),
    "large chat": pa.array(CHAT, pa.large_list(MESSAGE)),
    "one message": pa.array([{"role": "user", "content": "x"}] * 4, MESSAGE),
    "chat with more": pa.array(
        [[{"role": "user", "content": "x", "at": 2**40}]] * 4,
        pa.list_(
            pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("s", "Nowhere/None"))])
        ),
    ),
    "fixed list": pa.array([[1, 2]] * 4, pa.list_(pa.int32(), 2)),
    "fixed binary": pa.array([b"ab"] * 4, pa.binary(2)),
}


def _parquet(columns: dict[str, pa.Array] | list[tuple[str, pa.Array]], **options: Any) -> bytes:
    pairs = list(columns.items()) if isinstance(columns, dict) else columns
    sink = BytesIO()
    table = pa.Table.from_arrays([array for _, array in pairs], names=[name for name, _ in pairs])
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@st.composite
def parquet_files(draw: st.DrawFn) -> bytes:
    names = st.sampled_from(["prompt", "messages", "answer", "prompt", "messages", "answer", "id", *ODD_TEXT[:13]])
    names = names.filter(lambda name: name.isprintable() or name != "\ud800")
    columns = draw(st.lists(st.tuples(names, st.sampled_from(list(COLUMNS))), min_size=0, max_size=4))
    good = draw(st.sampled_from([[], [("prompt", pa.array(["a", "b", "c", "d"]))]]))
    rows = draw(st.sampled_from([4, 4, 4, 2, 0]))
    arrays = [
        (name, array.slice(0, rows)) for name, array in [*good, *((name, COLUMNS[kind]) for name, kind in columns)]
    ]
    options = {
        "compression": draw(st.sampled_from(["zstd", "snappy", "none", "gzip", "brotli", "lz4"])),
        "version": draw(st.sampled_from(["2.6", "1.0"])),
        "data_page_version": draw(st.sampled_from(["1.0", "2.0"])),
        "row_group_size": draw(st.integers(1, 4)),
        "use_dictionary": draw(st.booleans()),
        "store_schema": draw(st.booleans()),
    }
    try:
        return _parquet(arrays, **options)
    except (pa.ArrowException, ValueError):
        # Not every type can be written by every version.
        return _parquet(arrays[:1] if good else [])


def parquet_originals() -> list[bytes]:
    chat = pa.array([row.get("messages") for row in ROWS] * 4, pa.list_(MESSAGE))
    prompts = pa.array([f"prompt {i}" for i in range(16)])
    return [
        _parquet({"prompt": prompts, "answer": pa.array(range(16))}),
        _parquet({"prompt": prompts.dictionary_encode(), "messages": chat}, row_group_size=5, compression="none"),
        _parquet(
            {"messages": chat, "prompt": prompts}, use_dictionary=False, data_page_version="2.0", compression="zstd"
        ),
    ]


def _check(kind: str, path: Path) -> None:
    config = PromptsConfig.model_validate({"sources": [{"type": kind, "path": str(path)}], "held_out": 1})
    table, counters = read_prompts(config)
    PROMPTS.validate(table, "result").validate(full=True)
    assert counters["train"] + counters["held_out"] == table.num_rows >= 2


def read_jsonl(data: bytes, folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(data)
    _check("jsonl", folder / "a.jsonl")


def read_parquet(data: bytes, folder: Path) -> None:
    (folder / "a.parquet").write_bytes(data)
    _check("parquet", folder / "a.parquet")


JSONL = ["".join(json.dumps(row, ensure_ascii=flag) + "\n" for row in ROWS).encode() for flag in (True, False)]
JSON_TOKENS = [text.encode(errors="surrogatepass") for text in HOSTILE_JSON if len(text) < 100]
NAMES = ("a.jsonl", "a.parquet", "prompts.held_out")

READERS = (
    Reader("prompts, JSONL values", 700, lines, read_jsonl, NAMES),
    Reader(
        "prompts, JSONL bytes",
        1_000,
        lambda: damaged(JSONL, [*JSON_TOKENS, b"\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\"]),
        read_jsonl,
        NAMES,
    ),
    Reader("prompts, Parquet columns", 500, parquet_files, read_parquet, NAMES),
    Reader(
        "prompts, Parquet bytes",
        1_100,
        lambda: damaged(
            parquet_originals(), [b"\x00", b"\xff" * 4, b"PAR1", b"\xff\xff\xff\xff\x07", b"\x80\x80\x80\x80\x08"]
        ),
        read_parquet,
        NAMES,
    ),
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_prompt_file_is_read_or_refused(reader: Reader, record_property: Record) -> None:
    record_property("fuzzed inputs", try_reader(__name__, reader))
