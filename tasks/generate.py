"""Stage generate: every train prompt answered in bulk, by the round's policy unless the config names another."""

from typing import TYPE_CHECKING

from tasks.language_model.sources import (
    ANSWERS_VERSION,
    ModelRef,
    answering_model,
    asking_student,
    earlier_policy,
    resolved_models,
)
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import Engine, LazyEngine, SamplingSettings, engine_name, open_engine
from tasks.stage import StageJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(job: StageJob) -> None:
    """Write table GENERATE in shards of `generate.shard_prompts` prompts; shards that are there already stay.

    Prompts take the student's chat template, whoever answers.

    Raises:
        PromptError: a prompt leaves no room for a reply and `prompts.too_long` is `error`, or `generate.policy` is
            `answers` and a prompt has none.
        ModelError: the engine is not installed, or the policy cannot be loaded.
        ConfigError: the cluster that `ray` names cannot be used.
    """
    from tasks.language_model.loading import load_tokenizer

    store, config = job.store, job.config
    student = asking_student(store, config, job.round)
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    # The teacher prefills these samples next, so they must fit into both models. Its weights are not needed here.
    context = min(student.context, resolved_models(store).teacher_context)
    if config.generate.policy == "answers":
        _write_answers(job, student, tokenizer, context)
    else:
        _write_samples(job, answering_model(store, config, job.round), tokenizer, context)


def _write_samples(job: StageJob, policy: ModelRef, tokenizer: "PreTrainedTokenizerBase", context: int) -> None:
    from tasks.language_model.chat import end_ids
    from tasks.rollout.prompts import ask
    from tasks.rollout.shards import Group, sampled, write_shards, written_here

    config = job.config.generate if job.config.generate.policy == "student" else job.config.teacher_sampling
    asked = ask(job, "train", tokenizer, context)
    settings = SamplingSettings(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        context=context,
        end_ids=tuple(end_ids(tokenizer, policy.path)),
        vocab_size=min(len(tokenizer), policy.shared_vocab),
    )
    longest = longest_sequence(asked.longest, context, config.max_new_tokens)
    by_own_servers = config.engine == "server" and config.policy == "student"

    def opened() -> Engine:
        earlier = earlier_policy(job.store, job.config, job.round) if by_own_servers else None
        return open_engine(policy, config, longest, earlier)

    engine = LazyEngine(opened)
    group = Group(
        prompts=asked,
        respond=sampled(engine, settings),
        policy_version=policy.version,
        policy_step=policy.step,
        round=job.round,
        samples_per_prompt=config.samples_per_prompt,
    )
    # Servers have their own machines: there is nothing to spread here.
    if job.config.ray is not None and config.engine != "server":
        from tasks.rollout.on_ray import write_on_ray

        write_on_ray(job, job.config.ray, group, settings, longest)
        return
    try:
        write_shards(job, [group], written_here(job, tokenizer))
    finally:
        engine.close()
    job.counters |= {"engine": engine_name(policy, config)} | engine.counters()


def _write_answers(job: StageJob, student: ModelRef, tokenizer: "PreTrainedTokenizerBase", context: int) -> None:
    from tasks.language_model.chat import end_ids
    from tasks.rollout.answers import answered
    from tasks.rollout.shards import Group, write_shards, written_here

    ends = tuple(end_ids(tokenizer, student.path))
    asked, respond = answered(job, tokenizer, context, ends, "generate.policy")
    group = Group(prompts=asked, respond=respond, policy_version=ANSWERS_VERSION, policy_step=0, round=job.round)
    write_shards(job, [group], written_here(job, tokenizer))
