"""Training one round of a run, or its warm-up."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import TrainerState
from trl.trainer.sft_config import SFTConfig

from schemas.config import GuardConfig, LoraConfig, OptimizerConfig
from schemas.errors import ConfigError, StageError
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import TRAIN_METRICS
from tasks.checkpoint import keep_checkpoint, name_last_checkpoint, newest_checkpoint, read_state
from tasks.graph import sampled_round, sampling_policy
from tasks.language_model.head import check_head
from tasks.language_model.loading import load_model, load_tokenizer, resolve_device
from tasks.language_model.sources import policy_model, start_model
from tasks.stage import StageJob
from tasks.train.guard import ends_round, first_breach, is_over_budget, last_breach
from tasks.train.loss import Objective, require_kernel
from tasks.train.packs import PackReader
from tasks.train.policy_probe import PolicyProbe, open_probe, probe_size, read_probe_row
from tasks.train.schedule import RoundSchedule
from tasks.train.trainer import NearPolicyTrainer
from tasks.trainer_settings import trainer_settings


def train_round(job: StageJob) -> None:
    """Train, write ``metrics.parquet`` and keep the last checkpoint for the next round and for export."""
    if job.round != WARMUP and job.config.train.on_policy is not None:
        from tasks.train.on_policy import train_on_policy

        train_on_policy(job)
        return
    store, config = job.store, job.config
    warmup = job.round == WARMUP
    settings: OptimizerConfig = config.train
    if warmup:
        assert config.warmup is not None
        settings = config.warmup
    reader = PackReader(
        [store.fetch(path) for path in store.table_files(StageKey("pack", sampled_round(config, job.round)))]
    )
    schedule = round_schedule(job, settings, len(reader))
    # What the student did not sample has no policy to stay near.
    guard = config.train.guard if not warmup and config.is_near_policy else None
    resume = resume_point(job)
    state = TrainerState() if resume is None else read_state(resume)
    if not is_over(state, schedule, guard):
        start = start_model(store, config, job.round)
        device = resolve_device(start.device)
        require_kernel(settings.loss_kernel, device)
        # Before the student is loaded: the two are never in memory together.
        probe = None if guard is None else round_probe(job, reader, device)
        model = load_model(
            start.path,
            dtype="float32",
            device=str(device),
            attn_implementation=start.attn_implementation,
            trust_remote_code=start.trust_remote_code,
            packed=True,
        )
        check_head(model)
        model.config.use_cache = False
        with store.scratch_folder(job.key) as scratch:
            trainer = NearPolicyTrainer(
                model=model,
                args=trainer_arguments(settings, schedule, scratch, config.seed, device),
                tokenizer=load_tokenizer(start.path, trust_remote_code=start.trust_remote_code),
                reader=reader,
                schedule=schedule,
                optimizer_config=settings,
                objective=Objective(
                    kd_weight=0.0 if warmup else config.train.kd_weight,
                    kd_form=config.train.kd_form,
                    chunk=settings.loss_chunk,
                    kernel=settings.loss_kernel,
                ),
                guard=guard,
                probe=probe,
                peft_config=None if warmup or config.train.lora is None else peft_config(config.train.lora),
                on_steps=lambda done, total: job.progress(done, total, "steps"),
                checkpoint_folder=lambda step: keep_checkpoint(job, step),
            )
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        state = trainer.state
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
    store.write_table(store.path(job.key, "metrics.parquet"), metrics, TRAIN_METRICS)
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


def round_probe(job: StageJob, reader: PackReader, device: torch.device) -> PolicyProbe:
    """Return where the distance to the policy that sampled the packs is measured, with what that policy says."""
    config = job.config
    size = probe_size(reader, config.train.packs_per_step, config.train.guard)
    row = read_probe_row(reader, size, [config.seed, job.round])
    return open_probe(policy_model(job.store, config, sampled_round(config, job.round)), device, row, config.train)


def sampler_step(job: StageJob) -> int | None:
    """Return the optimizer steps of the student that sampled what the round trains on; None where it did not."""
    if job.round == WARMUP or not job.config.is_near_policy:
        return None
    sampler = sampling_policy(job.config, sampled_round(job.config, job.round)).round
    if sampler is None or sampler == WARMUP:
        return 0
    return int(job.store.finished(StageKey("train", sampler)).counters["policy_step"])


def is_over(state: TrainerState, schedule: RoundSchedule, guard: GuardConfig | None) -> bool:
    """Say whether a checkpoint's round has nothing left to train: all its steps done, or ended by the guard."""
    if state.global_step >= schedule.end_step:
        return True
    if guard is None or not ends_round(schedule, guard):
        return False
    return is_over_budget(state.log_history, schedule.start_step, guard)


def round_schedule(job: StageJob, settings: OptimizerConfig, packs: int) -> RoundSchedule:
    """Return where this round lies in the run (the warm-up is a run of its own).

    The last round takes the epochs, or steps, that the guard cut off earlier ones.
    """
    config = job.config
    if job.round == WARMUP:
        assert config.warmup is not None
        whole = config.warmup.epochs
        return RoundSchedule(0, packs, settings.packs_per_step, 0, whole, whole)
    start_step, before = 0, 0.0
    if job.round > 0:
        counters = job.store.finished(StageKey("train", job.round - 1)).counters
        start_step, before = int(counters["policy_step"]), float(counters["epochs_done"])
    last = job.round == config.rounds - 1
    epochs: float = config.total_epochs - before if last else config.train.epochs_per_round
    if config.train.steps_per_round is not None and config.total_steps is not None:
        steps = config.total_steps - start_step if last else config.train.steps_per_round
        epochs = steps / math.ceil(packs / settings.packs_per_step)
    return RoundSchedule(
        start_step=start_step,
        packs=packs,
        packs_per_step=settings.packs_per_step,
        epochs_before=before,
        epochs=epochs,
        total_epochs=config.total_epochs,
        total_steps=config.total_steps,
    )


def trainer_arguments(
    settings: OptimizerConfig, schedule: RoundSchedule, folder: Path, seed: int, device: torch.device
) -> SFTConfig:
    """Return TRL's settings for a round."""
    return SFTConfig(
        **trainer_settings(settings, folder, seed, device),
        max_steps=schedule.end_step,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.packs_per_step,
        save_strategy="steps",
        save_steps=settings.save_every_steps,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
    )


def peft_config(lora: LoraConfig) -> Any:
    """Return the adapter settings as `peft` takes them.

    Raises:
        ConfigError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig as PeftLoraConfig
    except ImportError:
        raise ConfigError("train.lora: needs the extra `lora`: pip install 'near-policy-distillation[lora]'") from None
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def resume_point(job: StageJob) -> Path | None:
    """Return the checkpoint to continue from: this round's newest, else the last of the round before."""
    newest = newest_checkpoint(job)
    if newest is None and job.round > 0:
        return job.store.fetch(job.store.checkpoint(StageKey("train", job.round - 1)))
    return newest


def metrics_table(
    log_history: list[dict[str, float]], schedule: RoundSchedule, round_index: int, sampled_at: int | None
) -> pa.Table:
    """Return the round's logged steps as the train metrics table; ``sampled_at``: the sampler's optimizer steps."""
    warmup = round_index == WARMUP
    steps = [entry for entry in log_history if "ce" in entry and entry["step"] > schedule.start_step]
    return pa.table(
        {
            "step": [int(entry["step"]) for entry in steps],
            "epoch": [entry["run_epoch"] for entry in steps],
            "round": [round_index] * len(steps),
            "loss": [entry["loss"] for entry in steps],
            "ce": [entry["ce"] for entry in steps],
            "kd": [None if warmup else entry["kd"] for entry in steps],
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
