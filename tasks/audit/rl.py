"""The stages of an RL run: whose prompts were learned from, and what the means are of."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.config import RLConfig
from schemas.stage_key import StageKey
from schemas.tables import METRICS_FILE, RESPONSES_FILE
from tasks.audit.evaluation import check_means, response_means
from tasks.audit.findings import Audit
from tasks.audit.rollout_index import PromptIndex
from tasks.audit.rollouts import read_prompts
from tasks.audit.tables import shards
from tasks.graph import PROMPTS
from tasks.rl.graph import BASELINE

_ROUNDING = 1e-5
"""Of means: the trainer takes them in float32."""


def check_rl_prompts(audit: Audit[RLConfig], key: StageKey) -> None:
    """Check that prompts are distinct and named by their messages."""
    if audit.needs(key, key):
        audit.prompts = read_prompts(audit, key)


def check_rl(audit: Audit[RLConfig], key: StageKey) -> None:
    """Check that all rollouts answer train prompts, and that each step's metrics are the means of its rollouts."""
    if not audit.needs(key, key, PROMPTS) or audit.prompts is None:
        return
    steps = audit.config.grpo.steps
    counts = np.zeros(steps + 1, np.int64)
    sums = {name: np.zeros(steps + 1) for name in ("score", "reward", "truncation_rate")}
    for path in audit.store.table_files(key):
        if path.parent.name == "rollouts":
            table, name = pq.read_table(audit.store.fetch(path), partitioning=None), audit.store.relative(path)
            of = _steps_of(audit, name, table, audit.prompts)
            if of is None:
                return
            counts += np.bincount(of, minlength=steps + 1)
            cut = pc.equal(table.column("finish_reason"), "length").cast(pa.float64())
            for metric, values in (("score", table["score"]), ("reward", table["reward"]), ("truncation_rate", cut)):
                sums[metric] += np.bincount(of, values.to_numpy(), minlength=steps + 1)
    audit.expect_counter(key, "samples", int(counts.sum()))
    ((name, _, table),) = shards(audit, key, ["step", *sums], METRICS_FILE)
    of = table.column("step").to_numpy()
    if not np.array_equal(of, np.arange(1, steps + 1)):
        audit.broken(name, f"`step`: should be 1 to {steps}, each once")
        return
    for metric, total in sums.items():
        _check_step_means(audit, name, table, metric, total[of] / np.maximum(counts[of], 1), counts[of] > 0)


def _steps_of(audit: Audit[RLConfig], name: str, table: pa.Table, prompts: PromptIndex) -> NDArray[np.int64] | None:
    """Return the step of each rollout of a shard; None where they cannot be counted."""
    ids, steps, last = table.column("prompt_id"), table.column("step").to_numpy(), audit.config.grpo.steps
    train = prompts.in_split(ids, held_out=False)
    audit.expect_rows(name, 0, ids, "prompt_id", train, lambda i: "is no train prompt of this run")
    known = (steps >= 1) & (steps <= last)
    return steps if audit.expect_rows(name, 0, ids, "step", known, lambda i: f"{steps[i]} of {last}") else None


def _check_step_means(
    audit: Audit[RLConfig],
    name: str,
    table: pa.Table,
    metric: str,
    means: NDArray[np.float64],
    sampled: NDArray[np.bool_],
) -> None:
    values = table.column(metric).to_numpy(zero_copy_only=False).astype(float)
    # A step that learns once more from what an earlier one sampled has no means of its own.
    holds = np.where(sampled, np.abs(values - means) <= _ROUNDING * (1 + np.abs(means)), np.isnan(values))
    audit.expect_rows(
        name,
        0,
        table.column("step"),
        metric,
        holds,
        lambda i: f"{values[i]:.6g}, its rollouts make it {means[i] if sampled[i] else None}",
    )


def check_answers(audit: Audit[RLConfig], key: StageKey) -> None:
    """Check that a model's responses answer held-out prompts, and that its metrics are their means."""
    if not audit.needs(key, key, PROMPTS) or audit.prompts is None:
        return
    columns = ["model", "prompt_id", "response_tokens", "finish_reason", "score", "repetition"]
    ((name, _, responses),) = shards(audit, key, columns, RESPONSES_FILE)
    ids = responses.column("prompt_id")
    held_out = audit.prompts.in_split(ids, held_out=True)
    audit.expect_rows(name, 0, ids, "prompt_id", held_out, lambda i: "is no held-out prompt of this run")
    model = "start" if key == BASELINE else "rl"
    own = np.asarray(pc.equal(responses.column("model"), model))
    audit.expect_rows(name, 0, ids, "model", own, lambda i: f"should be `{model}`")
    ((name, _, metrics),) = shards(audit, key, ["metric", "value", "n", "model"], METRICS_FILE)
    expected = {(model, metric): mean for metric, mean in response_means(responses).items()}
    check_means(audit, name, metrics, dict(expected), metrics.column("model").to_pylist())
