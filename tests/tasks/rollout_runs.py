"""Runs whose prompts and models are there already, so that stages generate and reference can be tested alone."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.config import RunConfig, parse_config
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import MODELS, PROMPTS
from tasks.language_model.sources import ResolvedModels

TRAIN, HELD_OUT = 7, 3


def make_run(
    root: Path | str, teacher_dir: Path, student_dir: Path, *, context: int = 512, answers: bool = True, **sections: Any
) -> tuple[RunStore, RunConfig]:
    """Write a run with TRAIN and HELD_OUT prompts of growing length and finished stages `prompts` and `models`."""
    values: dict[str, Any] = {
        "name": "run",
        "root": str(root),
        "seed": 3,
        "teacher": {"model": str(teacher_dir)},
        "student": {"model": str(student_dir)},
        "prompts": {"sources": [{"type": "jsonl", "path": "prompts.jsonl"}], "held_out": HELD_OUT},
        "generate": {"max_new_tokens": 12, "batch_size": 4, "shard_prompts": 3},
    }
    for name, section in sections.items():
        merge = isinstance(section, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | section if merge else section
    config = parse_config(values)
    store = RunStore.create(config)
    _finish_prompts(store, answers)
    _finish_models(store, student_dir, context)
    return store, config


def _finish_prompts(store: RunStore, answers: bool) -> None:
    count = TRAIN + HELD_OUT
    store.begin(PROMPTS, "prompts")
    table = pa.table(
        {
            "prompt_id": [f"p{index:02d}" for index in range(count)],
            "messages": [[{"role": "user", "content": "Say " + "ha" * index}] for index in range(count)],
            "answer": [f"answer {index}" if answers or index != 2 else None for index in range(count)],
            "verification": pa.nulls(count, pa.string()),
            "source": ["prompts.jsonl"] * count,
            "source_row": list(range(1, count + 1)),
            "split": ["train"] * TRAIN + ["held_out"] * HELD_OUT,
        },
        schema=PROMPTS_TABLE.columns,
    )
    store.write_table(store.part(PROMPTS, 0), table, PROMPTS_TABLE)
    _finish(store, PROMPTS)


def _finish_models(store: RunStore, student_dir: Path, context: int) -> None:
    store.begin(MODELS, "models")
    with store.writing_folder(store.path(MODELS, "student")) as folder:
        shutil.copytree(student_dir, folder, dirs_exist_ok=True)
    ResolvedModels(
        teacher_path=None,
        teacher_commit=None,
        teacher_version="teacher-weights",
        teacher_context=context,
        student_context=context + 10,
        shared_vocab=259,
    ).write(store, store.path(MODELS, "models.json"))
    _finish(store, MODELS)


def _finish(store: RunStore, key: StageKey) -> None:
    manifest = Manifest(
        stage=key.stage,
        round=key.round,
        fingerprint=key.stage,
        stage_version=1,
        config={},
        inputs=[],
        outputs=store.outputs(key),
        started="",
        finished="",
        host="",
        packages={},
        counters={},
    )
    store.finish(key, manifest)
