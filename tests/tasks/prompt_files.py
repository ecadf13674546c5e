"""Writes the prompt files that tests of the prompts stage read, and runs the stage."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.config import PromptsConfig, RunConfig, parse_config
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.prompts.table import prompts_tables
from tasks.stage import execute, no_progress

KEY = StageKey("prompts")


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Write one JSON value a line and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_prompts(config: PromptsConfig) -> tuple[pa.Table, dict[str, Any]]:
    """Return the whole prompts table of some sources, and what was counted."""
    with tempfile.TemporaryDirectory() as scratch:
        tables, counters = prompts_tables(config, 0, Path(scratch), no_progress)
        return pa.concat_tables(tables), counters


def make_config(
    root: Path, sources: list[dict[str, Any]], *, seed: int = 0, name: str = "run", **prompts: Any
) -> RunConfig:
    """Return the config of a run whose models nobody loads."""
    return parse_config(
        {
            "name": name,
            "root": str(root / "runs"),
            "seed": seed,
            "teacher": {"model": "teacher"},
            "student": {"model": "student"},
            "prompts": {"sources": sources, "held_out": 1, **prompts},
        }
    )


def run_prompts(config: RunConfig) -> tuple[list[dict[str, Any]], Manifest]:
    """Run the stage; return its rows and its manifest."""
    store = RunStore.create(config)
    manifest = execute(store, config, KEY)
    return store.read_table(KEY, PROMPTS).to_pylist(), manifest


def prompt_of(row: dict[str, Any]) -> str:
    """Return what the user says last."""
    return str(row["messages"][-1]["content"])


def held_out(rows: list[dict[str, Any]]) -> set[str]:
    """Return the ids of the held-out prompts."""
    return {row["prompt_id"] for row in rows if row["split"] == "held_out"}
