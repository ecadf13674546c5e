"""The optimizer steps that a round still needs, in this process alone or in one of several."""

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerState
from trl.trainer.sft_config import SFTConfig

from schemas.config import OptimizerConfig
from schemas.errors import ModelError
from schemas.stage_key import WARMUP
from tasks.checkpoint import keep_checkpoint
from tasks.graph import sampled_round
from tasks.language_model.adapters import freeze_beside_text, peft_config
from tasks.language_model.head import check_head, pad_rows_if_needed, pads_rows
from tasks.language_model.loading import load_ref, load_tokenizer, resolve_device
from tasks.language_model.sources import policy_model, start_model
from tasks.stage import StageJob
from tasks.trackers import check_trackers, keep_tensorboard, tracked_name
from tasks.train.liger import fuse_layers
from tasks.train.loss import Objective, choose_kernel
from tasks.train.packs import PackReader
from tasks.train.plan import RoundPlan
from tasks.train.policy_probe import PolicyProbe, open_probe, probe_size, read_probe_row
from tasks.train.schedule import RoundSchedule
from tasks.train.trainer import NearPolicyTrainer
from tasks.trainer_settings import on_device, trainer_settings


def optimize(job: StageJob, plan: RoundPlan) -> TrainerState:
    """Train what is left of a round and keep its checkpoints; return the step and log at its end.

    In a process that `accelerate launch` started, one of several: each takes its share of every step's packs, and the
    first of them writes.

    Raises:
        DivergedError: the loss or the gradient is not finite; in all processes alike.
        ModelError: the student cannot be loaded, or packed rows are not for it.
    """
    store, config, settings = job.store, job.config, plan.settings
    warmup, launch = job.round == WARMUP, config.train.launch
    check_trackers(settings.report_to, f"{'warmup' if warmup else 'train'}.report_to")
    start = start_model(store, config, job.round)
    device = own_device(start.device, launch.world_size)
    kernel = choose_kernel(settings.loss_kernel, device)
    # Before the student is loaded: the two are never in memory together.
    probe = None if plan.guard is None else round_probe(job, plan.reader, device)
    model = load_ref(replace(start, dtype="float32", device=str(device)), packed=True)
    # As it trains: flash attention takes no float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        pad_rows_if_needed(model)
        check_head(model)
    shard = launch.world_size > 1 and launch.strategy == "fsdp2"
    if shard and pads_rows(model):
        raise ModelError(
            f"train.launch.strategy: `fsdp2` cannot train {type(model).__name__}, whose packs are passed as batches, "
            "as many as each pack needs, while all processes must make equally many passes; set `ddp`"
        )
    freeze_beside_text(model)
    model.config.use_cache = False
    if settings.liger_kernels:
        fuse_layers(model, device)
    with store.scratch_folder(job.key) as scratch:
        trainer = NearPolicyTrainer(
            model=model,
            args=trainer_arguments(
                settings, plan.schedule, scratch, tracked_name(job), config.seed, device, launch.world_size
            ),
            tokenizer=load_tokenizer(start.path, trust_remote_code=start.trust_remote_code),
            reader=plan.reader,
            schedule=plan.schedule,
            optimizer_config=settings,
            objective=Objective(
                kd_weight=0.0 if warmup else config.train.kd_weight,
                kd_form=config.train.kd_form,
                chunk=settings.loss_chunk,
                kernel=kernel,
            ),
            guard=plan.guard,
            probe=probe,
            peft_config=None if warmup or config.train.lora is None else peft_config(config.train.lora, model),
            on_steps=lambda done, total: job.progress(done, total, "steps"),
            checkpoint_folder=lambda step: keep_checkpoint(job, step),
            shard=shard,
        )
        keep_tensorboard(trainer, job)
        trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
    return trainer.state


def round_probe(job: StageJob, reader: PackReader, device: torch.device) -> PolicyProbe:
    """Return where the distance to the policy that sampled the packs is measured, with what that policy says."""
    config = job.config
    size = probe_size(reader, config.train.packs_per_step, config.train.guard)
    row = read_probe_row(reader, size, [config.seed, job.round])
    return open_probe(policy_model(job.store, config, sampled_round(config, job.round)), device, row, config.train)


def own_device(name: str | None, processes: int) -> torch.device:
    """Return the device this process trains on: the one that ``name`` says; of several processes, each one's own GPU.

    Args:
        name: As in the config.
        processes: How many processes train.

    Raises:
        ModelError: the device does not exist here.
    """
    device = resolve_device(name)
    if processes == 1 or device.type != "cuda":
        return device
    return resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")


def trainer_arguments(
    settings: OptimizerConfig,
    schedule: RoundSchedule,
    folder: Path,
    name: str,
    seed: int,
    device: torch.device,
    processes: int,
) -> SFTConfig:
    """Return TRL's settings for a round, for each of the processes that train it."""
    arguments = SFTConfig(
        **trainer_settings(settings, folder, name, seed, device),
        max_steps=schedule.end_step,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=math.ceil(settings.packs_per_step / processes),
        save_strategy="steps",
        save_steps=settings.save_every_steps,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
    )
    return on_device(arguments, device)
