"""An RL run on disk that no model made, for its report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.manifest import record_bytes
from schemas.rl_tables import RL_METRICS, RL_ROLLOUTS
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_METRICS, EVALUATE_RESPONSES, METRICS_FILE, PROMPTS, RESPONSES_FILE
from tasks.graph import PROMPTS as PROMPTS_STAGE
from tasks.rl.graph import BASELINE, EVALUATE, RL, RL_LOOP
from tests.report_runs import counters, metric, prompts
from tests.run_fixtures import finish_stage
from tests.tasks.rl_runs import rl_config

SHARD_STEPS, GROUP = 100, 4
BEFORE, AFTER = (1.0, 1.0, 0.0, 0.7, 0.0, 0.0), (1.0, 0.9, 1.0, 1.0, 1.0, 0.7)
"""Scores of the held-out prompts, in the order of their ids, which begin at ``p90``; a part of one is not right."""


def synthetic_rl_run(
    root: Path,
    *,
    steps: int = 300,
    prompt: str = "What is 12 + 30?",
    response: str = "42",
    done: Sequence[StageKey] = RL_LOOP,
    sampled_every: int = 1,
) -> RunStore:
    """Write an RL run.

    Args:
        root: Where.
        steps: Of training.
        prompt: What every prompt says.
        response: What every response says.
        done: The stages that have finished.
        sampled_every: Steps that learn from one batch of responses.
    """
    config = rl_config(
        root, root, steps=steps, save_every_steps=SHARD_STEPS, num_iterations=sampled_every, prompts_per_step=2
    )
    store = RunStore.create(config)
    if PROMPTS_STAGE in done:
        finish_stage(store, PROMPTS_STAGE, PROMPTS, [prompts(100, prompt)], seconds=0.2)
    for key, model, scores in ((BASELINE, "start", BEFORE), (EVALUATE, "rl", AFTER)):
        if key in done:
            _evaluate(store, key, model, scores, response)
    if RL in done:
        _train(store, steps, response, sampled_every)
    return store


def _evaluate(store: RunStore, key: StageKey, model: str, scores: Sequence[float], response: str) -> None:
    names = [f"p{90 + place}" for place in range(len(scores))]
    responses = {
        "model": [model] * len(names),
        "round": [-1] * len(names),
        "prompt_id": names,
        "sample_index": [0] * len(names),
        "response": [f"{response} by {model}"] * len(names),
        "response_tokens": [5] * len(names),
        "finish_reason": ["stop"] * len(names),
        "score": scores,
        "repetition": [0.0] * len(names),
    }
    store.begin(key, "test")
    table = pa.table(responses, schema=EVALUATE_RESPONSES.columns)
    store.write_table(store.path(key, RESPONSES_FILE), table, EVALUATE_RESPONSES)
    rows = [
        metric(-1, "accuracy", float(np.mean([score >= 1 for score in scores])), 0.1, model),
        metric(-1, "response_tokens", 5.0, 0.5, model),
    ]
    means = pa.Table.from_pylist(rows, EVALUATE_METRICS.columns)
    store.write_table(store.path(key, METRICS_FILE), means, EVALUATE_METRICS)
    _complete(store, key, 30, 2.0)


def _train(store: RunStore, steps: int, response: str, sampled_every: int) -> None:
    rng, step = np.random.default_rng(5), np.arange(1, steps + 1)
    sampled = (step - 1) % sampled_every == 0
    reward = 0.2 + 0.6 * step / steps + rng.normal(0, 0.05, steps).clip(-0.1, 0.1)

    def of_samples(values: Any) -> pa.Array:
        return pa.array(np.broadcast_to(values, steps), pa.float64(), mask=~sampled)

    columns = {
        "step": step,
        "loss": rng.normal(0, 0.01, steps),
        "learning_rate": 1e-3 * (1 - step / steps),
        "grad_norm": np.ones(steps),
        "entropy": 2.0 - step / steps,
        "kl": pa.nulls(steps, pa.float64()),
        "clip_ratio": np.zeros(steps),
        "score": of_samples(reward),
        "reward": of_samples(reward),
        "reward_std": of_samples(0.3),
        "equal_rewards": of_samples(0.25),
        "response_tokens": of_samples(20 + step / 10),
        "truncation_rate": of_samples(0.1),
    }
    store.begin(RL, "test")
    metrics = pa.table(columns, schema=RL_METRICS.columns)
    store.write_table(store.path(RL, METRICS_FILE), metrics, RL_METRICS)
    for shard, start in enumerate(range(0, steps, SHARD_STEPS)):
        of_shard = step[start : start + SHARD_STEPS][sampled[start : start + SHARD_STEPS]]
        rows = [
            {
                "step": int(of_step),
                "prompt_id": f"p{2 * (int(of_step) % 20) + group}",
                "sample_index": index,
                "response": f"{response} in step {of_step}, {index}",
                "response_tokens": 3,
                "finish_reason": "length" if index else "stop",
                # Of every second prompt all rewards are alike.
                "score": float(index == 2 or group == 1),
                "reward": float(index == 2 or group == 1),
            }
            for of_step in of_shard
            for group in range(2)
            for index in range(GROUP)
        ]
        path = store.path(RL, "rollouts", f"part-{shard:05d}.parquet")
        store.write_table(path, pa.Table.from_pylist(rows, RL_ROLLOUTS.columns), RL_ROLLOUTS)
    _complete(store, RL, 24 * steps, 60.0)


def _complete(store: RunStore, key: StageKey, tokens: int, seconds: float) -> None:
    """Complete a stage with the files that lie in its folder, as if it had read the prompts."""
    prompts_manifest = store.finished(PROMPTS_STAGE)
    update = {
        "stage": key.stage,
        "inputs": prompts_manifest.outputs,
        "outputs": store.outputs(key),
        "counters": counters(tokens, seconds),
    }
    store.write_bytes(store.path(key, "manifest.json"), record_bytes(prompts_manifest.model_copy(update=update)))
