"""RL runs on tiny models: a distillation run that has prompts and an export, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.config import RLConfig, parse_as
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.prompts.messages import prompt_id
from tasks.rl.graph import RL_LOOP
from tasks.stage import Progress, current_manifest, execute, no_progress
from tests.run_fixtures import finish_stage, make_config, make_store

TRAIN, HELD_OUT = 10, 4


def checked_prompts(
    count: int = TRAIN + HELD_OUT, *, answer: str = "a", unchecked: int = 0, named: bool = False
) -> pa.Table:
    """Return prompts with one answer; the last are held out, the first ``unchecked`` train prompts have no check.

    Their ids are easy to read, or with ``named`` those of their messages.
    """
    check = json.dumps({"type": "exact"})
    messages = [[{"role": "user", "content": f"Say {i}."}] for i in range(count)]
    return pa.table(
        {
            "prompt_id": [prompt_id(each) if named else f"p{i:03d}" for i, each in enumerate(messages)],
            "messages": messages,
            "answer": [answer] * count,
            "verification": [None if i < unchecked else check for i in range(count)],
            "source": ["test"] * count,
            "source_row": list(range(count)),
            "split": ["train"] * (count - HELD_OUT) + ["held_out"] * HELD_OUT,
        },
        schema=PROMPTS.columns,
    )


def source_store(root: Path, student: Path, prompts: pa.Table) -> RunStore:
    """Return a distillation run that has exported ``student`` in round 0."""
    store = make_store(root, make_config(root, name="source", rounds=1))
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts])
    export = StageKey("export", 0)
    manifest = finish_stage(store, export, PROMPTS, [])
    shutil.copytree(student, store.path(export, "model"))
    store.finish(export, manifest.model_copy(update={"outputs": store.outputs(export)}))
    return store


def rl_values(root: Path, run: Path, **grpo: Any) -> dict[str, Any]:
    return {
        "name": "rl",
        "root": str(root),
        "run": str(run),
        "device": "cpu",
        "grpo": {
            "steps": 4,
            "prompts_per_step": 3,
            "num_generations": 4,
            "max_new_tokens": 6,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "gradient_checkpointing": False,
            "save_every_steps": 2,
            **grpo,
        },
        "export": {"dtype": "float32"},
    }


def rl_config(root: Path, run: Path, **grpo: Any) -> RLConfig:
    return parse_as(RLConfig, rl_values(root, run, **grpo))


def rl_tables(store: RunStore) -> dict[str, bytes]:
    return {store.relative(path): path.read_bytes() for path in sorted(store.folder.rglob("*.parquet"))}


def run_rl(store: RunStore, config: RLConfig, progress: Progress = no_progress) -> None:
    """Run every stage of an RL run that does not stand yet, in this process, without Prefect."""
    store.record_config(config)
    for key in RL_LOOP:
        if current_manifest(store, config, key) is None:
            execute(store, config, key, progress)
