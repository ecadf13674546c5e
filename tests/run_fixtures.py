"""A run on disk without models: configs, stores, and finished stages with tables of random rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.config import RunConfig, parse_config
from schemas.manifest import Manifest
from schemas.provenance import now_iso
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, METRICS_FILE, PROMPTS, TableSchema, score_schema, targets_type


def make_config(root: Path, **sections: Any) -> RunConfig:
    """Return a config of a run in ``root``; ``sections`` replace or add sections. Its models do not exist."""
    values: dict[str, Any] = {
        "name": "test",
        "root": str(root),
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "prompts": {"sources": [{"type": "jsonl", "path": "prompts.jsonl"}]},
    }
    return parse_config(values | sections)


def make_store(tmp_path: Path, config: RunConfig) -> RunStore:
    """Create the run of ``config`` below ``tmp_path``."""
    return RunStore.create(config.model_copy(update={"root": str(tmp_path)}))


def finish_stage(
    store: RunStore, key: StageKey, schema: TableSchema, shards: Sequence[pa.Table], **counters: Any
) -> Manifest:
    """Write ``shards`` as the stage's table and complete it with ``counters``; what was there before goes."""
    store.supersede(key)
    store.begin(key, "test")
    for index, shard in enumerate(shards):
        metrics = key.stage in ("evaluate", "baseline")
        store.write_table(store.path(key, METRICS_FILE) if metrics else store.part(key, index), shard, schema)
    manifest = Manifest(
        stage=key.stage,
        round=key.round,
        fingerprint="test",
        stage_version=1,
        config={},
        inputs=[],
        outputs=store.outputs(key),
        started=now_iso(),
        finished=now_iso(),
        host="test",
        packages={},
        counters=counters,
    )
    store.finish(key, manifest)
    return manifest


def split_rows(table: pa.Table, rows: int) -> list[pa.Table]:
    """Cut a table into shards of ``rows`` rows."""
    return [table.slice(start, rows) for start in range(0, table.num_rows, rows)]


def int32_lists(rows: Sequence[Sequence[int]]) -> pa.Array:
    return pa.array([list(row) for row in rows], pa.list_(pa.int32()))


def rollout_table(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    *,
    round_index: int = 0,
    names: Sequence[str] | None = None,
    prompt_names: Sequence[str] | None = None,
    seed: int = 0,
) -> pa.Table:
    """Return a table of schema GENERATE; sampled log-probabilities are random, so that a wrong place shows."""
    count = len(prompt_ids)
    rng = np.random.default_rng(seed)
    logprobs = [(-rng.exponential(1.0, len(ids))).astype(np.float32) for ids in response_ids]
    return pa.table(
        {
            "sample_id": list(names) if names is not None else [f"r{round_index}-{i:05d}" for i in range(count)],
            "prompt_id": list(prompt_names) if prompt_names is not None else [f"p{i:05d}" for i in range(count)],
            "sample_index": pa.array([0] * count, pa.int32()),
            "round": pa.array([round_index] * count, pa.int32()),
            "policy_version": ["policy"] * count,
            "policy_step": pa.array([0] * count, pa.int64()),
            "prompt_ids": int32_lists(prompt_ids),
            "response_ids": int32_lists(response_ids),
            "response": [f"response {i}" for i in range(count)],
            "finish_reason": ["stop"] * count,
            "sampled_logprobs": pa.array(logprobs, pa.list_(pa.float32())),
            "seed": pa.array(range(count), pa.int64()),
        },
        schema=GENERATE.columns,
    )


def score_table(
    rollouts: pa.Table,
    delta_ifd: Sequence[float | None],
    *,
    top_k: int,
    dtype: str = "float16",
    seed: int = 1,
) -> pa.Table:
    """Return a score table for ``rollouts`` with these delta-IFD values and random targets, each row distinct."""
    rng = np.random.default_rng(seed)
    counts = [len(row) for row in rollouts.column("response_ids").to_pylist()]
    ids_type, logprobs_type = targets_type(top_k, dtype)
    ids = [rng.integers(0, 2**31 - 1, (count, top_k), dtype=np.int32).tolist() for count in counts]
    logprobs = [(-np.sort(rng.exponential(3.0, (count, top_k)))).astype(dtype).tolist() for count in counts]
    schema = score_schema(top_k, dtype)
    nll = [None if value is None else 1.0 for value in delta_ifd]
    return pa.table(
        {
            "sample_id": rollouts.column("sample_id"),
            "response_tokens": pa.array(counts, pa.int32()),
            **{
                name: pa.array(nll, pa.float32())
                for name in schema.columns.names
                if name.endswith(("_nll", "_uncond", "_ifd")) and name != "delta_ifd"
            },
            "delta_ifd": pa.array(delta_ifd, pa.float32()),
            "teacher_topk_ids": pa.array(ids, ids_type),
            "teacher_topk_logprobs": pa.array(logprobs, logprobs_type),
        }
    ).select(schema.columns.names)


def prompts_table(splits: dict[str, str]) -> pa.Table:
    """Return a prompts table with these prompt ids and their splits."""
    return pa.table(
        {
            "prompt_id": list(splits),
            "messages": [[{"role": "user", "content": name}] for name in splits],
            "answer": [None] * len(splits),
            "verification": [None] * len(splits),
            "source": ["test"] * len(splits),
            "source_row": list(range(len(splits))),
            "split": list(splits.values()),
        },
        schema=PROMPTS.columns,
    )


def random_sequences(
    rng: np.random.Generator, count: int, *, longest_prompt: int = 9, longest_response: int = 30
) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and responses of random lengths from 1; every fifth response has one token."""
    prompts = [rng.integers(0, 50_000, rng.integers(1, longest_prompt + 1)).tolist() for _ in range(count)]
    responses = [
        rng.integers(0, 50_000, 1 if i % 5 == 0 else rng.integers(1, longest_response + 1)).tolist()
        for i in range(count)
    ]
    return prompts, responses
