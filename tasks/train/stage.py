"""Training one round of a run, or its warm-up."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from trl.trainer.sft_config import SFTConfig

from schemas.config import LoraConfig, OptimizerConfig
from schemas.errors import ConfigError
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import TRAIN_METRICS
from tasks.language_model.head import check_head
from tasks.language_model.loading import load_model, load_tokenizer, resolve_device
from tasks.language_model.sources import start_model
from tasks.stage import StageJob
from tasks.train.packs import PackReader
from tasks.train.schedule import RoundSchedule
from tasks.train.trainer import NearPolicyTrainer

CHECKPOINT = "checkpoint"
"""Folder of a finished train stage's last checkpoint: model, optimizer, schedule, RNG, step."""

_RUNNING = "checkpoints"


def train_round(job: StageJob) -> None:
    """Train, write ``metrics.parquet`` and keep the last checkpoint for the next round and for export."""
    store, config = job.store, job.config
    warmup = job.round == WARMUP
    settings: OptimizerConfig = config.train
    if warmup:
        assert config.warmup is not None
        settings = config.warmup
    reader = PackReader(store.table_files(StageKey("pack", job.round)))
    schedule = round_schedule(job, settings, len(reader))
    start = start_model(store, config, job.round)
    device = resolve_device(start.device)
    model = load_model(
        start.path,
        dtype="float32",
        device=str(device),
        attn_implementation=start.attn_implementation,
        trust_remote_code=start.trust_remote_code,
    )
    check_head(model)
    model.config.use_cache = False
    folder = store.path(job.key, _RUNNING)
    trainer = NearPolicyTrainer(
        model=model,
        args=trainer_arguments(settings, schedule, folder, config.seed, device),
        tokenizer=load_tokenizer(start.path, trust_remote_code=start.trust_remote_code),
        reader=reader,
        schedule=schedule,
        optimizer_config=settings,
        kd_weight=0.0 if warmup else config.train.kd_weight,
        kd_form=config.train.kd_form,
        peft_config=None if warmup or config.train.lora is None else peft_config(config.train.lora),
        on_steps=lambda done, total: job.progress(done, total, "steps"),
    )
    trainer.train(resume_from_checkpoint=resume_point(job, folder))
    metrics = metrics_table(trainer.state.log_history, schedule, job.round)
    store.write_table(store.path(job.key, "metrics.parquet"), metrics, TRAIN_METRICS)
    keep_last_checkpoint(folder, store.path(job.key, CHECKPOINT), schedule.end_step)
    response_tokens = sum(metrics.column("response_tokens").to_pylist())
    job.counters |= {
        "policy_step": schedule.end_step,
        "start_step": schedule.start_step,
        "epochs": schedule.epochs,
        "packs": len(reader),
        "response_tokens": response_tokens,
        "tokens": schedule.epochs * reader.tokens(),
    }


def round_schedule(job: StageJob, settings: OptimizerConfig, packs: int) -> RoundSchedule:
    """Return where this round lies in the run (the warm-up is a run of its own)."""
    config = job.config
    if job.round == WARMUP:
        assert config.warmup is not None
        epochs = config.warmup.epochs
        return RoundSchedule(0, packs, settings.packs_per_step, 0, epochs, epochs)
    before = job.store.finished(StageKey("train", job.round - 1)).counters if job.round > 0 else {"policy_step": 0}
    return RoundSchedule(
        start_step=int(before["policy_step"]),
        packs=packs,
        packs_per_step=settings.packs_per_step,
        epochs_before=job.round * config.train.epochs_per_round,
        epochs=config.train.epochs_per_round,
        total_epochs=config.total_epochs,
    )


def trainer_arguments(
    settings: OptimizerConfig, schedule: RoundSchedule, folder: Path, seed: int, device: torch.device
) -> SFTConfig:
    """Return TRL's settings for a round."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=schedule.end_step,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.packs_per_step,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every_steps,
        save_total_limit=2,
        report_to=settings.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        dataloader_pin_memory=device.type == "cuda",
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


def resume_point(job: StageJob, folder: Path) -> str | None:
    """Return the checkpoint to continue from: this round's newest whole one, else the last of the round before."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    if whole:
        return str(max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-"))))
    if job.round > 0:
        return str(job.store.path(StageKey("train", job.round - 1), CHECKPOINT))
    return None


def metrics_table(log_history: list[dict[str, float]], schedule: RoundSchedule, round_index: int) -> pa.Table:
    """Return the round's logged steps as the train metrics table."""
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
            "policy_kl": [None if warmup else entry["policy_kl"] for entry in steps],
        },
        schema=TRAIN_METRICS.columns,
    )


def keep_last_checkpoint(folder: Path, target: Path, step: int) -> None:
    """Move the checkpoint of ``step`` to ``target`` and drop the others."""
    if target.exists():
        shutil.rmtree(target)
    (folder / f"checkpoint-{step}").rename(target)
    shutil.rmtree(folder)
