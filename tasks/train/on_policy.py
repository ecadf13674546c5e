"""On-policy distillation in place of a round of near-policy training: TRL's trainer samples as it goes."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from schemas.config import GenerateConfig, OnPolicyConfig, TrainConfig
from schemas.errors import DivergedError, ModelError, StageError
from schemas.tables import METRICS_FILE, TRAIN_METRICS
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.checkpoint import CheckpointContents, write_checkpoint
from tasks.graph import PROMPTS
from tasks.language_model.chat import encode_prompts
from tasks.language_model.loading import load_ref, load_tokenizer, resolve_device
from tasks.language_model.sources import ModelRef, start_model, teacher_model
from tasks.rollout.context import prompts_that_fit, source_in
from tasks.rollout.prompts import encode_messages, of_split
from tasks.stage import StageJob
from tasks.trackers import check_trackers, keep_tensorboard, tracked_name
from tasks.train.liger import fuse_layers
from tasks.train.schedule import RoundSchedule, cosine_scheduler
from tasks.trainer_settings import StepProgress, on_device, trainer_settings


def train_on_policy(job: StageJob) -> None:
    """Train, write ``metrics.parquet`` and the checkpoint that export reads; begins anew where it was interrupted.

    Both models lie on the trainer's device. Counts `generated_tokens` and the `sampling_seconds` of the whole.

    Raises:
        ModelError: the student's vocabulary has rows that the teacher's has not, and TRL's loss compares them all.
        StageError: there are fewer prompts than one step needs.
        DivergedError: the loss is not finite.
    """
    store, config, settings = job.store, job.config, job.config.train
    on_policy = settings.on_policy
    assert on_policy is not None, "the config says so"
    check_trackers(settings.report_to, "train.report_to")
    job.start_over()
    start, teacher_ref = start_model(store, config, job.round), teacher_model(store, config)
    device = resolve_device(start.device)
    tokenizer = load_tokenizer(start.path, trust_remote_code=start.trust_remote_code)
    tokenizer.padding_side = "left"
    context = min(start.context, teacher_ref.context)
    messages = _messages(job, tokenizer, context)
    if len(messages) < on_policy.prompts_per_step:
        raise StageError(
            f"{job.key.label}: {len(messages)} train prompts do not fill one step; lower "
            f"`train.on_policy.prompts_per_step` {on_policy.prompts_per_step}"
        )
    student, teacher = _load_both(start, teacher_ref, device)
    if settings.liger_kernels:
        fuse_layers(student, device)
    schedule = _schedule(settings, len(messages), on_policy)
    with store.scratch_folder(job.key) as scratch:
        trainer = OnPolicyTrainer(
            model=student,
            teacher_model=teacher,
            args=on_policy_arguments(settings, config.generate, scratch, tracked_name(job), config.seed, device),
            tokenizer=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": messages}),
            schedule=schedule,
            settings=settings,
            context=context,
            # Rows above are padding of the vocabulary.
            unused_ids=list(
                range(min(len(tokenizer), start.shared_vocab), student.config.get_text_config().vocab_size)
            ),
            callbacks=[StepProgress(lambda done, total: job.progress(done, total, "steps"))],
        )
        keep_tensorboard(trainer, job)
        trainer.train()
    # Without times, which nothing but manifests holds: the same run gives the same bytes.
    steps = [
        {name: value for name, value in entry.items() if name != "step_time"}
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    _write_last_checkpoint(job, trainer, student, dataclasses.replace(trainer.state, log_history=steps))
    metrics = _metrics_table(steps, trainer.response_tokens, schedule, job.round)
    store.write_table(store.path(job.key, METRICS_FILE), metrics, TRAIN_METRICS)
    job.counters |= {
        "policy_step": trainer.state.global_step,
        "start_step": 0,
        "epochs": schedule.epoch(trainer.state.global_step),
        "epochs_done": schedule.epoch(trainer.state.global_step),
        "prompts_per_step": on_policy.prompts_per_step,
        "response_tokens": sum(trainer.response_tokens),
        "generated_tokens": sum(trainer.response_tokens),
        "sampling_seconds": round(trainer.sampling_seconds, 3),
        "tokens": trainer.state.num_input_tokens_seen,
    }


class OnPolicyTrainer(DistillationTrainer):
    """TRL's DistillationTrainer on this project's prompts, schedule and counts.

    Args:
        schedule: Where a step lies in the run.
        settings: Learning rates.
        context: Longest sequence, in tokens, that both models take.
        unused_ids: Tokens that must not be sampled.
        tokenizer: The student's.
        arguments: The others of DistillationTrainer.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        schedule: RoundSchedule,
        settings: TrainConfig,
        context: int,
        unused_ids: list[int],
        **arguments: Any,
    ) -> None:
        self.schedule, self.settings, self.context, self.tokenizer = schedule, settings, context, tokenizer
        self.response_tokens: list[int] = []
        self.sampling_seconds = 0.0
        super().__init__(processing_class=tokenizer, **arguments)
        self.longest_response: int = arguments["args"].max_completion_length
        if unused_ids:
            self.generation_config.suppress_tokens = unused_ids

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return the prompts as every other stage tokenises them."""
        return [ids.tolist() for ids in encode_prompts(self.tokenizer, prompts)], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """Sample, and count: the batch of one optimizer step is sampled at once.

        TRL gives every response of a batch one limit, so what lies beyond the context is cut off.
        """
        started = time.perf_counter()
        sample: Callable[..., list[list[int]]] = super()._generate_single_turn
        left = [self.context - len(prompt) for prompt in prompt_ids]
        self.generation_config.max_new_tokens = min(self.longest_response, max(left))
        sampled = sample(prompt_ids, *args, **kwargs)
        responses = [response[:room] for response, room in zip(sampled, left, strict=True)]
        self.sampling_seconds += time.perf_counter() - started
        self.response_tokens.append(sum(map(len, responses)))
        return responses

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the same cosine that near-policy training takes."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = cosine_scheduler(optimizer, self.schedule, self.settings)
            self._created_lr_scheduler = True
        scheduler: torch.optim.lr_scheduler.LRScheduler = self.lr_scheduler
        return scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss.

        Raises:
            DivergedError: it is not finite.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        value: Tensor = loss[0] if return_outputs else loss
        if not math.isfinite(value.item()):
            raise DivergedError(
                f"train: the loss of optimizer step {self.state.global_step + 1} is not finite; lower "
                "`train.learning_rate` or set `train.precision: fp32`"
            )
        return loss


def on_policy_arguments(
    settings: TrainConfig, sampling: GenerateConfig, folder: Path, name: str, seed: int, device: torch.device
) -> DistillationConfig:
    """Return TRL's settings: the same optimizer as near-policy training, sampling as stage generate samples.

    Args:
        settings: Section `train`, with `on_policy`.
        sampling: Section `generate`.
        folder: For what TRL writes; nothing is kept of it.
        name: What trackers call it.
        seed: The run's.
        device: Where everything computes.
    """
    on_policy = settings.on_policy
    assert on_policy is not None, "the config says so"
    assert settings.steps_per_round is not None, "the config says so"
    batch = on_policy.batch_prompts or on_policy.prompts_per_step
    arguments = DistillationConfig(
        **trainer_settings(settings, folder, name, seed, device),
        max_steps=settings.steps_per_round,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=on_policy.prompts_per_step // batch,
        save_strategy="no",
        max_completion_length=sampling.max_new_tokens,
        beta=on_policy.beta,
        # Of the divergence too, so the sampler's goes in beside it.
        temperature=1.0,
        generation_kwargs={"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.temperature > 0
        else {"do_sample": False},
    )
    return on_device(arguments, device)


def _load_both(start: ModelRef, teacher: ModelRef, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Load the student, in float32, and the teacher, with as many rows of vocabulary as the student has.

    Raises:
        ModelError: the teacher's vocabulary has fewer rows than the student's, and TRL's loss compares them all.
    """
    models = (
        load_ref(dataclasses.replace(start, dtype="float32", device=str(device))),
        load_ref(dataclasses.replace(teacher, device=str(device))),
    )
    own, others = (model.config.get_text_config().vocab_size for model in models)
    if own > others:
        raise ModelError(
            f"train.on_policy: the student has {own} rows of vocabulary and the teacher only {others}; TRL's trainer "
            "compares the models row by row"
        )
    if own < others:
        # What it has more pads its vocabulary: both have one tokenizer, and the student a row for each of its tokens.
        models[1].resize_token_embeddings(own)
    return models


def _write_last_checkpoint(
    job: StageJob, trainer: OnPolicyTrainer, student: PreTrainedModel, state: TrainerState
) -> None:
    """Write the checkpoint that export reads, in place of one that an interrupted attempt may have left."""
    last = job.store.checkpoint(job.key)
    job.store.remove(last)
    with job.store.writing_folder(last) as folder:
        contents = CheckpointContents.gather(student, trainer.optimizer, trainer.args.device)
        write_checkpoint(folder, student, contents, trainer.lr_scheduler, state)


def _messages(job: StageJob, tokenizer: PreTrainedTokenizerBase, context: int) -> list[list[dict[str, str]]]:
    """Return the train prompts that leave room for a reply."""
    train = of_split(job.store.read_table(PROMPTS, PROMPTS_TABLE), "train")
    fits = prompts_that_fit(
        encode_messages(tokenizer, train.column("messages")).lengths.astype(np.int32),
        context,
        too_long=job.config.prompts.too_long,
        source_of=source_in(train),
    )
    job.counters["dropped_prompts"] = int((~fits).sum())
    messages: list[list[dict[str, str]]] = train.filter(pa.array(fits)).column("messages").to_pylist()
    return messages


def _schedule(settings: TrainConfig, prompts: int, on_policy: OnPolicyConfig) -> RoundSchedule:
    """Return the schedule, with a prompt in place of a pack."""
    assert settings.steps_per_round is not None
    prompts -= prompts % on_policy.prompts_per_step
    epochs = settings.steps_per_round * on_policy.prompts_per_step / prompts
    steps = settings.steps_per_round
    return RoundSchedule(0, prompts, on_policy.prompts_per_step, 0.0, epochs, math.ceil(epochs), steps)


def _metrics_table(
    steps: list[dict[str, float]], response_tokens: list[int], schedule: RoundSchedule, round_index: int
) -> pa.Table:
    """Return the logged steps as the train metrics table: TRL's loss is a distillation loss alone, without a CE."""
    return pa.table(
        {
            "step": [int(entry["step"]) for entry in steps],
            "epoch": [schedule.epoch(int(entry["step"])) for entry in steps],
            "round": [round_index] * len(steps),
            "loss": [float(entry["loss"]) for entry in steps],
            "ce": [None] * len(steps),
            "kd": [float(entry["loss"]) for entry in steps],
            "learning_rate": [entry["learning_rate"] for entry in steps],
            "grad_norm": [float(entry["grad_norm"]) for entry in steps],
            "response_tokens": response_tokens,
            "tokens_per_second": [None] * len(steps),
            "policy_kl": [None] * len(steps),
            "policy_lag": [None] * len(steps),
        },
        schema=TRAIN_METRICS.columns,
    )
