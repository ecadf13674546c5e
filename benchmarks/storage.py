"""Target storage: bytes per response token of the teacher's top-k targets on disk, and what reading them costs.

With `--run RUN` the targets are those of a finished run; without, they are drawn at random, which compresses worse
than a teacher's: the bar is about real ones. Every encoding is written with the run's own row groups, repeated until
there is enough to time; row groups are encoded one by one, so that repeating them changes no size.
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.measure import Measurement, Work, alternate, at_most, ratios, seconds
from benchmarks.report import BenchmarkParser, main
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.tables import TableSchema, score_schema

TOP_K = 10
BAR = at_most(48)
TARGETS = ("teacher_topk_ids", "teacher_topk_logprobs")
IDS, LOGPROBS = (f"{name}.list.element.list.element" for name in TARGETS)
DRAWN_VOCAB = 49_152
DRAWN_ROWS = 128


@dataclass(frozen=True)
class Encoding:
    """A way to write the table: options of `pyarrow.parquet.write_table`."""

    name: str
    options: dict[str, Any]


PLAIN = Encoding("plain, uncompressed", {"compression": "none", "use_dictionary": False})
STORED = "as stages write them"


def _encoded(level: int, ids: str, logprobs: str) -> dict[str, Any]:
    encodings = {path: name for path, name in ((IDS, ids), (LOGPROBS, logprobs)) if name != "DICTIONARY"}
    dictionary = [path for path in (IDS, LOGPROBS) if path not in encodings]
    return {
        "compression": "zstd",
        "compression_level": level,
        "use_dictionary": dictionary or False,
        "column_encoding": encodings or None,
    }


SPLIT = "BYTE_STREAM_SPLIT"
ENCODINGS = (
    Encoding("dictionary, zstd 1", _encoded(1, "DICTIONARY", "DICTIONARY")),
    Encoding("dictionary, zstd 9", _encoded(9, "DICTIONARY", "DICTIONARY")),
    Encoding("dictionary, zstd 19", _encoded(19, "DICTIONARY", "DICTIONARY")),
    Encoding("plain, zstd 1", _encoded(1, "PLAIN", "PLAIN")),
    Encoding("byte-stream split, zstd 1", _encoded(1, SPLIT, SPLIT)),
    Encoding("byte-stream split, zstd 9", _encoded(9, SPLIT, SPLIT)),
    Encoding("ids delta, values byte-stream split, zstd 1", _encoded(1, "DELTA_BINARY_PACKED", SPLIT)),
    Encoding("ids dictionary, values byte-stream split, zstd 1", _encoded(1, "DICTIONARY", SPLIT)),
    Encoding("ids byte-stream split, values dictionary, zstd 1", _encoded(1, SPLIT, "DICTIONARY")),
    PLAIN,
)
"""`values` are the log-probabilities."""


class Stored(NamedTuple):
    """What a run holds: the files of its score tables, their row groups, and their schema."""

    files: list[Path]
    groups: list[pa.Table]
    schema: TableSchema


def run_targets(store: RunStore) -> Stored:
    """Read a run's score tables.

    Raises:
        ArtifactError: no round of the run has been scored, or its targets are not the top 10.
    """
    keys = sorted(key for key in store.stages() if key.stage == "score" and store.manifest(key) is not None)
    if not keys:
        raise ArtifactError(f"{store.folder}: no round has been scored")
    settings = store.finished(keys[0]).config["score"]
    if settings["top_k"] != TOP_K:
        raise ArtifactError(f"{store.folder}: score.top_k is {settings['top_k']}; the bar is for {TOP_K}")
    schema = score_schema(TOP_K, settings["topk_dtype"])
    files = [path for key in keys for path in store.table_files(key)]
    groups = []
    for path in files:
        table, metadata, start = store.read_part(path, schema), pq.read_metadata(path), 0
        for index in range(metadata.num_row_groups):
            rows = metadata.row_group(index).num_rows
            groups.append(table.slice(start, rows))
            start += rows
    return Stored(files, groups, schema)


def drawn_targets(rows: int) -> pa.Table:
    """Return one row group of drawn targets: uniform ids, log-probabilities of a softmax over Gaussian logits."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 64, rows)
    tokens = int(lengths.sum())
    logits = rng.normal(0, 2.5, (tokens, 1_000)).astype(np.float32)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    top = -np.sort(-logprobs)[:, :TOP_K]
    values: dict[str, NDArray[Any]] = {
        "teacher_topk_ids": rng.integers(0, DRAWN_VOCAB, (tokens, TOP_K), dtype=np.int32),
        "teacher_topk_logprobs": top.astype(np.float16),
    }
    schema = score_schema(TOP_K, "float16").columns
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns: dict[str, pa.Array] = {}
    for column in schema:
        if column.name in values:
            flat = pa.array(values[column.name].reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, type=column.type.value_type)
            columns[column.name] = pa.ListArray.from_arrays(offsets, lists)
        elif column.name == "sample_id":
            columns[column.name] = pa.array([f"r000-{index:032x}-000" for index in rng.integers(0, 2**62, rows)])
        elif column.name == "response_tokens":
            columns[column.name] = pa.array(lengths, pa.int32())
        else:
            columns[column.name] = pa.array(rng.random(rows, np.float32))
    return pa.table(columns, schema=schema)


def response_tokens(tables: list[pa.Table]) -> int:
    """Return the tokens that have targets."""
    return int(sum(pc.sum(table.column("response_tokens")).as_py() for table in tables))


def repeated(groups: list[pa.Table], copies: int) -> list[pa.Table]:
    """Return the row groups so many times; sample ids stay distinct."""
    return [
        group.set_column(0, "sample_id", pc.binary_join_element_wise(f"{copy}", group.column("sample_id"), "-"))
        for copy in range(copies)
        for group in groups
    ]


def target_bytes(path: Path) -> int:
    """Return the bytes of the two target columns in a Parquet file, as stored."""
    metadata, total = pq.read_metadata(path), 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema.split(".")[0] in TARGETS:
                total += column.total_compressed_size
    return total


def write(path: Path, groups: list[pa.Table], encoding: Encoding) -> None:
    """Write the row groups one by one."""
    with pq.ParquetWriter(path, groups[0].schema, **encoding.options) as writer:
        for group in groups:
            writer.write_table(group)


def read(path: Path) -> pa.Table:
    """Read all columns into Arrow: decompressed and decoded."""
    return pq.read_table(path, partitioning=None)


def read_numpy(path: Path) -> int:
    """Read all columns, the targets on into NumPy arrays [tokens, k]; return the number of tokens."""
    table = read(path)
    flat = [chunk.values.flatten() for name in TARGETS for chunk in table.column(name).chunks]
    arrays: list[NDArray[Any]] = [values.to_numpy(zero_copy_only=False) for values in flat]
    return sum(array.reshape(-1, TOP_K).shape[0] for array in arrays) // len(TARGETS)


def encoding_rows(
    groups: list[pa.Table], schema: TableSchema, source: str, turns: tuple[int, int]
) -> list[Measurement]:
    """Write and read the row groups in every encoding, in turn; ``turns``: how often, and how often before that."""
    repeats, warmup = turns
    tokens = response_tokens(groups)
    with tempfile.TemporaryDirectory() as folder:
        store, whole = RunStore(folder), pa.concat_tables(groups)
        names = [STORED, *(encoding.name for encoding in ENCODINGS)]
        paths = {name: Path(folder, f"{index}.parquet") for index, name in enumerate(names)}
        writers: dict[str, Work[object]] = {
            STORED: partial(store.write_table, paths[STORED], whole, schema, row_group_rows=groups[0].num_rows),
            **{each.name: partial(write, paths[each.name], groups, each) for each in ENCODINGS},
        }
        written = alternate(writers, repeats, warmup=warmup)
        taken = alternate({name: partial(read, path) for name, path in paths.items()}, repeats, warmup=warmup)
        numpy = alternate({name: partial(read_numpy, path) for name, path in paths.items()}, repeats, warmup=warmup)
        sizes = {name: target_bytes(path) / tokens for name, path in paths.items()}
    rows = []
    for name, size in sizes.items():
        rows.append(Measurement(f"{source}, {name}: size", [size], "bytes/token"))
        for what, samples in (("write", written), ("read", taken), ("read into NumPy", numpy)):
            values = [1e9 * time / tokens for time in seconds(samples[name])]
            rows.append(Measurement(f"{source}, {name}: {what}", values, "ns/token"))
        if name != PLAIN.name:
            over = ratios(seconds(taken[name]), seconds(taken[PLAIN.name]))
            rows.append(Measurement(f"{source}, {name}: read, over {PLAIN.name}", over, "x"))
    return rows


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Measure what a run stores, then every encoding of the same targets."""
    rows: list[Measurement] = []
    if arguments.run is None:
        groups, schema, source = [drawn_targets(DRAWN_ROWS)], score_schema(TOP_K, "float16"), "drawn"
        notes = ["These targets are drawn at random and compress worse than real ones; give a run with `--run`."]
    else:
        files, groups, schema = run_targets(RunStore(arguments.run))
        source, tokens = "real", response_tokens(groups)
        targets, whole = sum(map(target_bytes, files)), sum(path.stat().st_size for path in files)
        rows.append(Measurement("real, targets in the run's files", [targets / tokens], "bytes/token", BAR))
        rows.append(Measurement("real, whole score tables of the run", [whole / tokens], "bytes/token"))
        notes = [f"Real: {tokens:,} response tokens in {len(files)} files of run `{arguments.run.name}`."]
    groups = repeated(groups, -(-arguments.tokens // response_tokens(groups)))
    rows += encoding_rows(groups, schema, source, (arguments.repeats, arguments.warmup))
    notes += [
        f"Raw, k = {TOP_K} takes {TOP_K * (4 + 2)} bytes a token: int32 ids and float16 log-probabilities.",
        "Sizes are of the two target columns; times are of all columns, the file in the operating system's cache. "
        f"Writing {STORED} includes checking the table and fsync.",
    ]
    return rows, notes


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("storage", "Bytes per response token of the teacher's targets, and what reading costs.")
    result.add_size("--tokens", 400_000, 5_000, "response tokens to time at least")
    result.add_argument("--run", type=Path, metavar="RUN", help="a run with scored rounds and score.top_k 10")
    return result


if __name__ == "__main__":
    main(parser(), measure)
