"""Parquet files that are not what the tables' schemas say."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ArtifactError
from schemas.table_files import read_parquet, write_parquet
from schemas.tables import EVALUATE_METRICS, GENERATE, PROMPTS, SCHEMA_KEY, VERSION_KEY, score_schema
from tests.run_fixtures import prompts_table, rollout_table, score_table


def rollouts() -> pa.Table:
    return rollout_table([[1, 2]] * 3, [[3, 4, 5]] * 3)


def written(path: Path, table: pa.Table, **metadata: bytes) -> Path:
    named = {SCHEMA_KEY: b"generate", VERSION_KEY: b"1"} | {f"npd.{k}".encode(): v for k, v in metadata.items()}
    pq.write_table(table.replace_schema_metadata(named), path)
    return path


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def invalid_text() -> pa.Array:
    return pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())


def columns_twice() -> pa.Table:
    table = rollouts()
    return table.append_column("seed", table.column("seed"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (replaced(rollouts(), "response", invalid_text()), "not a readable Parquet file: .*UTF8"),
        (columns_twice(), r"has column\(s\) seed more than once"),
        (
            replaced(rollouts(), "response", rollouts()["response"].cast(pa.large_string())),
            "`response` is large_string",
        ),
        (
            replaced(rollouts(), "response_ids", pa.array([[1, None, 2]] * 3, pa.list_(pa.int32()))),
            r"null in column\(s\) response_ids",
        ),
    ],
    ids=["text that is no UTF-8", "a column twice", "another type", "null inside a list"],
)
def test_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    path = written(tmp_path / "a.parquet", table)
    with pytest.raises(ArtifactError, match=f"a.parquet: .*{message}"):
        read_parquet(path, GENERATE, "a.parquet")


def test_metadata_that_is_no_text_is_shown_readably(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", rollouts(), schema_version=b"\xff\x1b[2J" + b"9" * 5_000)
    with pytest.raises(ArtifactError, match=r"holds table `generate` v�\\x1b\[2J9+…`?, expected `generate` v1"):
        read_parquet(path, GENERATE, "a.parquet")


def test_columns_in_another_order_are_put_in_order(tmp_path: Path) -> None:
    table = rollouts()
    path = written(
        tmp_path / "a.parquet", table.select(table.column_names[::-1]).append_column("more", pa.array([1] * 3))
    )
    assert read_parquet(path, GENERATE, "a.parquet").equals(table)


def test_what_may_not_repeat_together_is_checked_where_all_of_it_is_read(tmp_path: Path) -> None:
    row = {"round": 0, "metric": "accuracy", "value": 0.5, "n": 8, "stderr": 0.1, "model": "student"}
    table = pa.Table.from_pylist([row] * 2, EVALUATE_METRICS.columns)
    path = written(tmp_path / "a.parquet", table, schema=b"evaluate_metrics", schema_version=b"2")
    with pytest.raises(ArtifactError, match=r"a.parquet: .*rows repeat in model, metric"):
        read_parquet(path, EVALUATE_METRICS, "a.parquet", ["metric", "model", "value"])
    assert read_parquet(path, EVALUATE_METRICS, "a.parquet", ["metric", "value"]).num_rows == 2


def test_nulls_inside_messages_and_targets_are_not_written(tmp_path: Path) -> None:
    prompts = prompts_table({"a": "train"})
    messages = pa.array([[{"role": "user", "content": None}]], PROMPTS.columns.field("messages").type)
    score = score_schema(2, "float16")
    scored = score_table(rollouts(), [0.1] * 3, top_k=2)
    ids = pa.array([[[1, None]] * 3] * 3, score.columns.field("teacher_topk_ids").type)
    for table, schema, name in [
        (replaced(prompts, "messages", messages), PROMPTS, "messages"),
        (replaced(scored, "teacher_topk_ids", ids), score, "teacher_topk_ids"),
    ]:
        with pytest.raises(ArtifactError, match=rf"null in column\(s\) {name}"):
            write_parquet(tmp_path / "a.parquet", table, schema, "a.parquet", run_id="", row_group_rows=4)
    assert not list(tmp_path.iterdir())
