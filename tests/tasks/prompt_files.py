"""Writes the prompt files that tests of the prompts stage read."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.config import PromptsConfig
from tasks.prompts.table import prompts_tables
from tasks.stage import no_progress


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
