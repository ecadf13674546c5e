"""What every table promises beyond its columns' types: each of BREACHES breaks one promise and is refused for it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.comparison_tables import COMPARISON, COMPARISON_RUNS
from schemas.errors import ArtifactError
from schemas.rl_tables import RL_METRICS, RL_ROLLOUTS
from schemas.table_files import read_parquet, write_parquet
from schemas.tables import (
    EVALUATE_METRICS,
    EVALUATE_RESPONSES,
    FILTER,
    GENERATE,
    PROMPTS,
    SCORE_CHECK,
    SCORE_STUDENT,
    TRAIN_METRICS,
    TableSchema,
    pack_schema,
    score_schema,
)
from tests.fuzz.test_fuzz_tables import valid_table

SCORE, PACK, PACK_SFT = score_schema(3, "float16"), pack_schema(3), pack_schema(None)

AGAIN = object()
"""The value of the row before."""
LONGER = object()
"""The list with its last entry twice."""

BREACHES: list[tuple[TableSchema, dict[str, list[Any]]]] = [
    (PROMPTS, {"split": ["test"], "prompt_id": [AGAIN]}),
    (
        GENERATE,
        {
            "sample_id": [AGAIN],
            "sample_index": [-1],
            "policy_step": [-1],
            "finish_reason": ["tired"],
            "sampled_logprobs": [LONGER],
        },
    ),
    (
        SCORE,
        {
            "sample_id": [AGAIN],
            "response_tokens": [-1],
            "student_nll": [-0.5],
            "teacher_nll": [-0.5],
            "teacher_topk_logprobs": [LONGER],
        },
    ),
    (SCORE_STUDENT, {"nll": [-0.5], "nll_uncond": [-0.5]}),
    (SCORE_CHECK, {"sample_id": [AGAIN], "response_tokens": [-1], "gap": [-0.5]}),
    (FILTER, {"sample_id": [AGAIN], "zone": ["kept"], "policy_lag": [-1]}),
    (
        PACK,
        {
            "pack_id": [AGAIN, -1],
            "labels": [LONGER],
            "sampled_logprobs": [LONGER],
            "teacher_topk_ids": [LONGER],
            "teacher_topk_logprobs": [LONGER],
            "sample_ids": [LONGER],
        },
    ),
    (PACK_SFT, {"pack_id": [AGAIN, -1], "labels": [LONGER], "sample_ids": [LONGER]}),
    (TRAIN_METRICS, {"step": [AGAIN, -1], "response_tokens": [-1]}),
    (EVALUATE_METRICS, {"metric": [AGAIN], "model": ["other"], "n": [-1], "stderr": [-0.5]}),
    (
        EVALUATE_RESPONSES,
        {
            "model": ["other"],
            "sample_index": [-1],
            "response_tokens": [-1],
            "finish_reason": ["tired"],
            "score": [-0.5, 1.5],
            "repetition": [-0.5, 1.5],
        },
    ),
    (RL_METRICS, {"step": [AGAIN, -1], "entropy": [-0.5]}),
    (
        RL_ROLLOUTS,
        {
            "step": [-1],
            "sample_index": [-1],
            "response_tokens": [-1],
            "finish_reason": ["tired"],
            "score": [-0.5, 1.5],
        },
    ),
    (COMPARISON, {"method": [AGAIN], "role": ["other"]}),
]

NULLABLE: list[tuple[TableSchema, set[str]]] = [
    (PROMPTS, {"answer", "verification"}),
    (GENERATE, set()),
    (SCORE, {name for name in SCORE.columns.names if name.endswith(("_nll", "_uncond", "_ifd"))}),
    (SCORE_STUDENT, {"nll", "nll_uncond"}),
    (SCORE_CHECK, set()),
    (FILTER, {"delta_ifd", "zone"}),
    (PACK, set()),
    (PACK_SFT, set()),
    (TRAIN_METRICS, {"ce", "kd", "tokens_per_second", "policy_kl", "policy_lag"}),
    (EVALUATE_METRICS, set()),
    (EVALUATE_RESPONSES, {"score"}),
    (RL_METRICS, {"kl", "score", "reward", "reward_std", "equal_rewards", "response_tokens", "truncation_rate"}),
    (RL_ROLLOUTS, set()),
    (COMPARISON, set(COMPARISON.columns.names) - {"method", "title", "role", "test_prompts"}),
    (COMPARISON_RUNS, {"accuracy", "validation_accuracy", "policy_kl", "rl_accuracy"}),
]


def with_value(table: pa.Table, column: str, value: Any) -> pa.Table:
    """Put ``value`` into the second row of a column."""
    field, values = table.field(column), table.column(column).to_pylist()
    values[1] = values[0] if value is AGAIN else [*values[1], values[1][-1]] if value is LONGER else value
    place = table.schema.get_field_index(column)
    return table.set_column(place, field, pa.array(values, field.type))


@pytest.mark.parametrize(("schema", "breaches"), BREACHES, ids=lambda part: getattr(part, "name", ""))
def test_a_row_that_breaks_one_promise_is_refused_for_it(schema: TableSchema, breaches: dict[str, list[Any]]) -> None:
    table = valid_table(schema)
    assert schema.validate(table, "here") is table
    for column, values in breaches.items():
        for value in values:
            with pytest.raises(ArtifactError, match=rf"here: table `{schema.name}`: .*\b{column}\b"):
                schema.validate(with_value(table, column, value), "here")


@pytest.mark.parametrize(("schema", "nullable"), NULLABLE, ids=lambda part: getattr(part, "name", ""))
def test_only_what_may_be_unknown_may_be_null(schema: TableSchema, nullable: set[str]) -> None:
    table = valid_table(schema)
    for column in schema.columns.names:
        changed = with_value(table, column, None)
        if column in nullable:
            schema.validate(changed, "here")
            continue
        with pytest.raises(ArtifactError, match=rf"\b{column}\b"):
            schema.validate(changed, "here")


def test_rows_that_repeat_in_columns_that_are_read_are_found(tmp_path: Path) -> None:
    """`npd verify` names all columns, and a table that it finds sound is not looked at again."""
    path, where = tmp_path / "a.parquet", "a.parquet"
    for schema in (EVALUATE_METRICS, EVALUATE_RESPONSES):
        table = valid_table(schema)
        write_parquet(path, table, schema, where, run_id="", row_group_rows=4)
        metadata = pq.read_schema(path).metadata
        twice = pa.concat_tables([table, table.slice(0, 1)])
        pq.write_table(twice.replace_schema_metadata(metadata), path)
        for columns in (None, schema.columns.names):
            with pytest.raises(ArtifactError, match=r"a\.parquet: .*rows repeat in model, "):
                read_parquet(path, schema, where, columns)
        assert read_parquet(path, schema, where, ["model"]).num_rows == table.num_rows + 1
