"""Training one RL run, from the start model to the exported one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from trl.trainer.grpo_config import GRPOConfig as TRLConfig

from schemas.config import GRPOConfig, RLConfig
from schemas.errors import ConfigError, PromptError
from schemas.manifest import hash_file
from schemas.rl_tables import RL_METRICS, RL_ROLLOUTS
from schemas.tables import METRICS_FILE
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.checkpoint import keep_checkpoint, name_last_checkpoint, newest_checkpoint, read_state
from tasks.graph import PROMPTS
from tasks.language_model.chat import end_ids, require_chat_template
from tasks.language_model.context_limit import context_limit
from tasks.language_model.head import check_head, pad_rows_if_needed
from tasks.language_model.loading import load_model, load_tokenizer, resolve_device
from tasks.language_model.model_folder import write_model_folder
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import weights_version
from tasks.language_model.weights import load_weights
from tasks.rl.card import RLLineage, rl_card
from tasks.rl.reward import VerifiedReward, require_verifiable
from tasks.rl.start import start_fingerprint, start_folder, start_label
from tasks.rl.trainer import VerifiedGRPOTrainer, prompt_order
from tasks.rollout.prompts import encode_messages, of_split
from tasks.stage import StageJob
from tasks.trackers import check_trackers, keep_tensorboard, tracked_name
from tasks.trainer_settings import on_device, trainer_settings


def train_model(job: StageJob[RLConfig]) -> None:
    """See ``tasks.rl.train.run``."""
    store, config = job.store, job.config
    start = start_folder(config)
    tokenizer = load_tokenizer(start, trust_remote_code=config.trust_remote_code)
    require_chat_template(tokenizer, "model")
    checkpoint = newest_checkpoint(job)
    state = TrainerState() if checkpoint is None else read_state(checkpoint)
    if state.global_step < config.grpo.steps:
        state = _trained(job, start, tokenizer, checkpoint)
    metrics = metrics_table(state.log_history)
    store.write_table(store.path(job.key, METRICS_FILE), metrics, RL_METRICS)
    name_last_checkpoint(job)
    _export(job, start, tokenizer, metrics)
    rollouts = pa.concat_tables(
        store.read_part(path, RL_ROLLOUTS, ["prompt_id", "response_tokens"])
        for path in sorted(store.path(job.key, "rollouts").glob("*.parquet"))
    )
    job.counters |= {
        "policy_step": state.global_step,
        "samples": rollouts.num_rows,
        "prompts": len(pc.unique(rollouts.column("prompt_id"))),
        "tokens": pc.sum(rollouts.column("response_tokens")).as_py(),
    }


def _trained(
    job: StageJob[RLConfig], start: Path, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None
) -> TrainerState:
    """Train up to the last step, from a checkpoint if there is one; return the trainer's step and log."""
    store, config, grpo = job.store, job.config, job.config.grpo
    check_trackers(grpo.report_to, "grpo.report_to")
    device = resolve_device(config.device)
    check_engine(grpo, device)
    model = load_model(start, dtype="float32", device=str(device), trust_remote_code=config.trust_remote_code)
    pad_rows_if_needed(model)
    check_head(model)
    model.config.use_cache = False
    ends = end_ids(tokenizer, start)
    # What TRL leaves open `generate` takes from here: the model's own would change what is sampled.
    model.generation_config = GenerationConfig(eos_token_id=ends)
    prompts, tokens = train_prompts(job, tokenizer, model)
    reward = VerifiedReward(prompts, grpo.num_generations, ends, grpo.truncation_penalty)

    @contextmanager
    def checkpoint_folder(step: int) -> Iterator[Path]:
        # First: what a checkpoint goes on from, it does not sample again.
        shard = -(-step // grpo.save_every_steps) - 1
        path = store.path(job.key, "rollouts", f"part-{shard:05d}.parquet")
        store.write_table(path, reward.take_rollouts(), RL_ROLLOUTS)
        with keep_checkpoint(job, step) as folder:
            yield folder

    with store.scratch_folder(job.key) as scratch:
        trainer = VerifiedGRPOTrainer(
            model=model,
            args=trainer_arguments(
                config, scratch, tracked_name(job), device, int(tokens.lengths.max()), unused_ids(model, tokenizer)
            ),
            tokenizer=tokenizer,
            reward=reward,
            tokens=tokens,
            order=prompt_order(
                prompts.num_rows, -(-grpo.steps // grpo.num_iterations) * grpo.prompts_per_step, config.seed
            ),
            on_steps=lambda done, total: job.progress(done, total, "steps"),
            checkpoint_folder=checkpoint_folder,
        )
        keep_tensorboard(trainer, job)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state: TrainerState = trainer.state
    return state


def train_prompts(
    job: StageJob[RLConfig], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[pa.Table, Ragged]:
    """Return the train prompts that can be checked and leave room for a response, as rows and as tokens.

    Others are left out, counted, and told of.

    Raises:
        PromptError: none is left.
    """
    store, longest = job.store, job.config.grpo.max_new_tokens
    table = of_split(store.read_table(PROMPTS, PROMPTS_TABLE), "train")
    prompts = require_verifiable(table, "train")
    tokens = encode_messages(tokenizer, prompts.column("messages"))
    context = context_limit(model.config, str(model.name_or_path))
    fits = tokens.lengths + longest <= context
    if not fits.any():
        raise PromptError(
            f"none of the {prompts.num_rows} train prompts leaves room for `grpo.max_new_tokens` {longest} in the "
            f"model's context of {context} tokens; lower it"
        )
    unchecked, too_long = table.num_rows - prompts.num_rows, int((~fits).sum())
    job.counters |= {"prompts_without_check": unchecked, "prompts_too_long": too_long}
    if unchecked or too_long:
        job.warn(
            f"left out of {table.num_rows} train prompts: {unchecked} that cannot be checked, {too_long} that leave no "
            f"room for `grpo.max_new_tokens` {longest}"
        )
    return prompts.filter(pa.array(fits)), tokens.filter(fits)


def unused_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the model's vocabulary that are no tokens: rows that pad it."""
    return list(range(len(tokenizer), int(model.config.get_text_config().vocab_size)))


def trainer_arguments(
    config: RLConfig, folder: Path, name: str, device: torch.device, longest_prompt: int, unused: list[int]
) -> TRLConfig:
    """Return TRL's settings for a run."""
    grpo = config.grpo
    responses = grpo.prompts_per_step * grpo.num_generations
    per_batch = grpo.sequences_per_batch or responses
    vllm: dict[str, Any] = {
        "use_vllm": True,
        "vllm_gpu_memory_utilization": grpo.vllm_gpu_memory_utilization,
        "vllm_max_model_length": longest_prompt + grpo.max_new_tokens,
    }
    arguments = TRLConfig(
        **trainer_settings(grpo, folder, name, config.seed, device),
        max_steps=grpo.steps,
        per_device_train_batch_size=per_batch,
        gradient_accumulation_steps=responses // per_batch,
        num_generations=grpo.num_generations,
        num_iterations=grpo.num_iterations,
        max_completion_length=grpo.max_new_tokens,
        temperature=grpo.temperature,
        top_p=grpo.top_p,
        generation_kwargs={"suppress_tokens": unused} if unused and grpo.engine == "transformers" else None,
        mask_truncated_completions=grpo.mask_truncated_completions,
        beta=grpo.beta,
        epsilon=grpo.epsilon,
        epsilon_high=grpo.epsilon_high,
        loss_type=grpo.loss_type,
        scale_rewards=grpo.scale_rewards,
        # `constant` itself knows no warm-up.
        lr_scheduler_type="constant_with_warmup" if grpo.lr_scheduler_type == "constant" else grpo.lr_scheduler_type,
        warmup_steps=grpo.warmup_steps,
        shuffle_dataset=False,
        save_strategy="steps",
        save_steps=grpo.save_every_steps,
        trust_remote_code=config.trust_remote_code,
        **(vllm if grpo.engine == "vllm" else {}),
    )
    return on_device(arguments, device)


def metrics_table(log_history: list[dict[str, Any]]) -> pa.Table:
    """Return the logged steps as table RL_METRICS."""
    names = {
        "entropy": "entropy",
        "kl": "kl",
        "clip_ratio": "clip_ratio/region_mean",
        "score": "score",
        "reward": "reward",
        "reward_std": "reward_std",
        "equal_rewards": "equal_rewards",
        "response_tokens": "completions/mean_length",
        "truncation_rate": "truncation_rate",
    }
    steps = [entry for entry in log_history if "loss" in entry]
    own = {name: [entry[name] for entry in steps] for name in ("step", "loss", "learning_rate", "grad_norm")}
    return pa.table(
        own | {name: [entry.get(key) for entry in steps] for name, key in names.items()}, schema=RL_METRICS.columns
    )


def _export(job: StageJob[RLConfig], start: Path, tokenizer: PreTrainedTokenizerBase, metrics: pa.Table) -> None:
    store, config = job.store, job.config
    target = store.path(job.key, "model")
    if target.is_dir():
        return
    model = load_model(start, dtype="float32", device="cpu", trust_remote_code=config.trust_remote_code)
    load_weights(model, store.checkpoint(job.key))
    with store.writing_folder(target) as temporary:
        write_model_folder(temporary, model, tokenizer, start, config.export)
        weights = sorted(temporary.glob("*.safetensors"))
        lineage = RLLineage(
            start=start_label(config),
            start_fingerprint=start_fingerprint(config),
            version=weights_version((path.name, hash_file(path)) for path in weights),
            prompts=store.finished(PROMPTS).outputs_fingerprint,
        )
        last = metrics.slice(metrics.num_rows - 1).to_pylist()[0]
        (temporary / "README.md").write_text(rl_card(config, lineage, last), encoding="utf-8")


def check_engine(grpo: GRPOConfig, device: torch.device) -> None:
    """Check that what samples can do so where the model trains.

    Raises:
        ConfigError: vLLM cannot.
    """
    if grpo.engine == "vllm" and device.type != "cuda":
        raise ConfigError(
            "grpo.engine: vllm samples inside the training process and needs a GPU there; set it to `transformers`"
        )
    # TRL names no GPU to it, and it makes its own the current one of the whole process.
    if grpo.engine == "vllm" and device.index:
        raise ConfigError(
            f"grpo.engine: vllm samples on the first GPU that the training process sees, and `device: {device}` is "
            "another: set `device: null`, and let CUDA_VISIBLE_DEVICES name that one"
        )
