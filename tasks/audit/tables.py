"""Every table of a stage against its schema: all shards, all columns, and the run it is of."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import RunConfig
from schemas.errors import ArtifactError
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import (
    EVALUATE_METRICS,
    FILTER,
    GENERATE,
    PROMPTS,
    RUN_KEY,
    TRAIN_METRICS,
    TableSchema,
    pack_schema,
    score_schema,
)
from tasks.audit.findings import Audit


def stage_schema(config: RunConfig, key: StageKey) -> TableSchema | None:
    """Return the schema of a stage's table; None for stages that write models."""
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
        case "evaluate":
            return EVALUATE_METRICS
    return None


def check_tables(audit: Audit, key: StageKey) -> None:
    """Read every shard of a sound stage; a stage whose tables break their schema is sound no more."""
    schema = stage_schema(audit.config, key)
    if schema is None or key not in audit.sound:
        return
    rows = {record.path: record.rows for record in audit.manifests[key].outputs}
    paths = audit.store.table_files(key)
    if not paths or (key.stage in ("train", "evaluate") and len(paths) > 1):
        audit.broken(key.folder, f"has {len(paths)} files of table `{schema.name}`")
        audit.sound.discard(key)
    for number, path in enumerate(paths):
        name = audit.store.relative(path)
        audit.watch(f"{key.label}: table", number, len(paths), "files")
        damage = _damage(audit, path, name, schema, rows[name])
        if damage is not None:
            audit.sound.discard(key)
            audit.broken(name, damage)


def _damage(audit: Audit, path: Path, name: str, schema: TableSchema, recorded_rows: int | None) -> str | None:
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


def shards(audit: Audit, key: StageKey, columns: list[str]) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield each shard of a sound stage's table: its file, the rows before it, and these columns of it.

    They are not validated again: ``check_tables`` has done so.
    """
    before = 0
    paths = audit.store.table_files(key)
    for number, path in enumerate(paths):
        audit.watch(f"{key.label}: rows", number, len(paths), "files")
        table = pq.read_table(audit.store.fetch(path), columns=columns, partitioning=None)
        yield audit.store.relative(path), before, table
        before += table.num_rows
