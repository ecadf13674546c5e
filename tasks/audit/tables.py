"""Every table of a stage against its schema: all shards, all columns, and the run it is of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import RunConfig, RunSettings
from schemas.errors import ArtifactError
from schemas.rl_tables import RL_METRICS, RL_ROLLOUTS
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import (
    EVALUATE_METRICS,
    EVALUATE_RESPONSES,
    FILTER,
    GENERATE,
    METRICS_FILE,
    PROMPTS,
    RESPONSES_FILE,
    RUN_KEY,
    TRAIN_METRICS,
    TableSchema,
    pack_schema,
    score_schema,
)
from tasks.audit.findings import Audit


def stage_schema(config: RunSettings, key: StageKey, name: str | None = None) -> TableSchema | None:
    """Return the schema of a stage's table; None for stages that write models.

    Where a stage has several tables, each in files of its own, the file's ``name`` says which.
    """
    if isinstance(config, RunConfig):
        return _loop_schema(config, key, name)
    match key.stage:
        case "prompts":
            return PROMPTS
        case "rl":
            return RL_METRICS if name == METRICS_FILE else RL_ROLLOUTS
        case "evaluate" | "baseline":
            return EVALUATE_RESPONSES if name == RESPONSES_FILE else EVALUATE_METRICS
    return None


def _loop_schema(config: RunConfig, key: StageKey, name: str | None) -> TableSchema | None:
    targets = (config.score.top_k, config.score.topk_dtype)
    match key.stage:
        case "prompts":
            return PROMPTS
        case "reference" | "generate":
            return GENERATE
        case "score":
            return score_schema(*targets)
        case "filter":
            return FILTER
        case "pack":
            return pack_schema(None) if key.round == WARMUP else pack_schema(*targets)
        case "train":
            return TRAIN_METRICS
        case "evaluate" | "baseline":
            return EVALUATE_RESPONSES if name == RESPONSES_FILE else EVALUATE_METRICS
    return None


def check_tables(audit: Audit[Any], key: StageKey) -> None:
    """Read every shard of a sound stage; a stage whose tables break their schema is sound no more."""
    schema = stage_schema(audit.config, key)
    if schema is None or key not in audit.sound:
        return
    rows = {record.path: record.rows for record in audit.manifests[key].outputs}
    paths = audit.store.table_files(key)
    expected = _expected_files(audit.config, key)
    if not paths or (expected is not None and [path.name for path in paths] != expected):
        names = ", ".join(path.name for path in paths) or "none"
        wanted = "" if expected is None else f", should be {', '.join(expected)}"
        audit.broken(key.folder, f"has {len(paths)} files of table `{schema.name}`: {names}{wanted}")
        audit.sound.discard(key)
        return
    for number, path in enumerate(paths):
        name = audit.store.relative(path)
        audit.watch(f"{key.label}: table", number, len(paths), "files")
        damage = _damage(audit, path, name, stage_schema(audit.config, key, path.name) or schema, rows[name])
        if damage is not None:
            audit.sound.discard(key)
            audit.broken(name, damage)


def _expected_files(config: RunSettings, key: StageKey) -> list[str] | None:
    """Return the names of a stage's tables where they are fixed; None where it may have any number of parts."""
    match key.stage:
        case "train":
            return [METRICS_FILE]
        case "evaluate" | "baseline":
            answers = not isinstance(config, RunConfig) or config.evaluate.generate
            return [METRICS_FILE, RESPONSES_FILE] if answers else [METRICS_FILE]
    return None


def _damage(audit: Audit[Any], path: Path, name: str, schema: TableSchema, recorded_rows: int | None) -> str | None:
    try:
        table = audit.store.read_part(path, schema, schema.columns.names)
    except ArtifactError as error:
        return str(error).removeprefix(f"{name}: ")
    found = pq.read_schema(path)
    run_id = (found.metadata or {}).get(RUN_KEY, b"").decode(errors="replace")
    audit.report.coverage.rows += table.num_rows
    if found.names != schema.columns.names:
        return f"its columns are {', '.join(found.names)}, should be {', '.join(schema.columns.names)}"
    if run_id != audit.run_id:
        return f"is of run `{run_id}`, this run is `{audit.run_id}`"
    if table.num_rows != recorded_rows:
        return f"has {table.num_rows} rows, the manifest recorded {recorded_rows}"
    return None


def shards(
    audit: Audit[Any], key: StageKey, columns: list[str], only: str | None = None
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield each shard of a sound stage's table: its file, the rows before it, and these columns of it.

    Where the stage has several tables, ``only`` names the file of one. They are not validated again: ``check_tables``
    has done so.
    """
    before = 0
    paths = [path for path in audit.store.table_files(key) if only in (None, path.name)]
    for number, path in enumerate(paths):
        audit.watch(f"{key.label}: rows", number, len(paths), "files")
        table = pq.read_table(audit.store.fetch(path), columns=columns, partitioning=None)
        yield audit.store.relative(path), before, table
        before += table.num_rows
