"""Training runs whose packs are given: random sequences with random targets."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file

from schemas.config import RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import FILLER_ID, IGNORE_LABEL, PROMPTS, TRAIN_METRICS, pack_schema
from tasks.graph import MODELS
from tasks.stage import execute
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table

TOP_K, VOCABULARY = 4, 259


def random_packs(packs: int = 3, sequences: int = 4, seed: int = 0) -> pa.Table:
    """Packs of short random sequences with random targets; lengths are odd and one response has one token."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for pack in range(packs):
        row: dict[str, Any] = {
            "pack_id": pack,
            "input_ids": [],
            "labels": [],
            "seq_lengths": [],
            "sample_ids": [],
            "sampled_logprobs": [],
            "teacher_topk_ids": [],
            "teacher_topk_logprobs": [],
        }
        for sequence in range(sequences):
            prompt = int(rng.integers(2, 9))
            response = 1 if sequence == 0 else int(rng.integers(3, 14))
            ids = rng.integers(3, VOCABULARY, prompt + response).tolist()
            teacher = np.log(rng.dirichlet(np.full(VOCABULARY, 0.05), response) + 1e-9)
            top = np.argsort(-teacher, axis=1)[:, :TOP_K]
            row["input_ids"] += ids
            row["labels"] += [IGNORE_LABEL] * prompt + ids[prompt:]
            row["seq_lengths"].append(prompt + response)
            row["sample_ids"].append(f"s{pack}-{sequence}")
            row["sampled_logprobs"] += [math.nan] * prompt + (-rng.exponential(3.0, response)).tolist()
            row["teacher_topk_ids"] += [[FILLER_ID] * TOP_K] * prompt + top.tolist()
            row["teacher_topk_logprobs"] += [[-math.inf] * TOP_K] * prompt + np.take_along_axis(
                teacher, top, 1
            ).tolist()
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=pack_schema(TOP_K, "float32").columns)


def training_run(
    root: Path,
    teacher: Path,
    student: Path,
    *,
    rounds: int,
    epochs: int,
    packs: pa.Table,
    attention: str | None = None,
    **train: Any,
) -> tuple[RunStore, RunConfig]:
    """A run whose models stage really ran and whose packs are given, the same for every round."""
    config = make_config(
        root,
        teacher={"model": str(teacher)},
        student={"model": str(student), "attn_implementation": attention},
        rounds=rounds,
        score={"top_k": TOP_K, "topk_dtype": "float32"},
        warmup={"precision": "fp32"},
        train={
            "epochs_per_round": epochs,
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "packs_per_step": 2,
            "precision": "fp32",
            "gradient_checkpointing": False,
            **train,
        },
    ).model_copy(update={"warmup": None})
    store = make_store(root, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train", "b": "held_out"})])
    execute(store, config, MODELS)
    for index in range(rounds):
        finish_stage(store, StageKey("pack", index), pack_schema(TOP_K, "float32"), [packs])
    return store, config


def train_rounds(store: RunStore, config: RunConfig) -> None:
    """Train and export every round: a later one's sampler is an earlier one's export."""
    for index in range(config.rounds):
        execute(store, config, StageKey("train", index))
        execute(store, config, StageKey("export", index))


def trained_weights(store: RunStore, round_index: int) -> dict[str, torch.Tensor]:
    return load_file(store.path(StageKey("train", round_index), "checkpoint", "model.safetensors"))


def metrics(store: RunStore, round_index: int) -> pa.Table:
    return store.read_table(StageKey("train", round_index), TRAIN_METRICS)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
