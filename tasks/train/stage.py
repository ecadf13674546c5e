"""Training one round of a run, or its warm-up."""

import pyarrow as pa

from schemas.errors import StageError
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import METRICS_FILE, TRAIN_METRICS
from tasks.checkpoint import name_last_checkpoint
from tasks.graph import sampled_round, sampling_policy
from tasks.stage import StageJob
from tasks.train.guard import first_breach, is_over_budget, last_breach
from tasks.train.launch import train_on_ranks
from tasks.train.optimize import optimize
from tasks.train.plan import plan_round
from tasks.train.schedule import RoundSchedule


def train_round(job: StageJob) -> None:
    """Train, write ``metrics.parquet`` and keep the last checkpoint for the next round and for export."""
    if job.round != WARMUP and job.config.train.on_policy is not None:
        from tasks.train.on_policy import train_on_policy

        train_on_policy(job)
        return
    store, config = job.store, job.config
    plan = plan_round(job)
    schedule, guard, reader, state = plan.schedule, plan.guard, plan.reader, plan.state
    if not plan.is_over:
        if config.train.launch.world_size > 1:
            train_on_ranks(job)
            state = plan_round(job).state
        else:
            state = optimize(job, plan)
    if guard is not None and guard.action == "stop" and is_over_budget(state.log_history, schedule.start_step, guard):
        raise StageError(
            f"{job.key.label}: {last_breach(state.log_history, schedule, guard)}, and `train.guard.action` is "
            "`stop`. Raise the budget to go on from here; or lower `train.learning_rate` or `train.epochs_per_round`, "
            "filter more (`filter.max_delta_ifd`), or set `train.guard.action: refresh`"
        )
    breach = None if guard is None else first_breach(state.log_history, schedule, guard)
    if breach is not None:
        job.warn(breach)
    metrics = metrics_table(state.log_history, schedule, job.round, sampler_step(job))
    store.write_table(store.path(job.key, METRICS_FILE), metrics, TRAIN_METRICS)
    name_last_checkpoint(job)
    epochs = schedule.epoch(state.global_step) - schedule.epochs_before
    job.counters |= {
        "policy_step": state.global_step,
        "start_step": schedule.start_step,
        "epochs": round(epochs, 6),
        "epochs_done": schedule.epoch(state.global_step),
        "packs": len(reader),
        "response_tokens": sum(metrics.column("response_tokens").to_pylist()),
        "tokens": round(epochs * int(reader.seq_lengths.values.sum())),
    }


def sampler_step(job: StageJob) -> int | None:
    """Return the optimizer steps of the student that sampled what the round trains on; None where it did not."""
    if job.round == WARMUP or not job.config.is_near_policy:
        return None
    sampler = sampling_policy(job.config, sampled_round(job.config, job.round)).round
    if sampler is None or sampler == WARMUP:
        return 0
    return int(job.store.finished(StageKey("train", sampler)).counters["policy_step"])


def metrics_table(
    log_history: list[dict[str, float]], schedule: RoundSchedule, round_index: int, sampled_at: int | None
) -> pa.Table:
    """Return the round's logged steps as the train metrics table; ``sampled_at``: the sampler's optimizer steps."""
    steps = [entry for entry in log_history if "ce" in entry and entry["step"] > schedule.start_step]
    return pa.table(
        {
            "step": [int(entry["step"]) for entry in steps],
            "epoch": [entry["run_epoch"] for entry in steps],
            "round": [round_index] * len(steps),
            "loss": [entry["loss"] for entry in steps],
            "ce": [entry["ce"] for entry in steps],
            "kd": [entry.get("kd") for entry in steps],
            "learning_rate": [entry["learning_rate"] for entry in steps],
            "grad_norm": [entry["grad_norm"] for entry in steps],
            "response_tokens": [int(entry["response_tokens"]) for entry in steps],
            "tokens_per_second": [None] * len(steps),
            "policy_kl": [entry.get("policy_kl") for entry in steps],
            # The step learned with the weights of the step before.
            "policy_lag": [None if sampled_at is None else int(entry["step"]) - 1 - sampled_at for entry in steps],
        },
        schema=TRAIN_METRICS.columns,
    )
