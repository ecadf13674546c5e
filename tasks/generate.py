"""Stage generate: every train prompt answered in bulk, by the round's policy unless the config names another."""

from typing import TYPE_CHECKING

from schemas.stage_key import WARMUP
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import PROMPTS
from tasks.language_model.sources import ANSWERS_VERSION, ModelRef, policy_model, start_model, teacher_model
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import LazyEngine, SamplingSettings, engine_name, open_engine
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
    """
    from tasks.language_model.loading import load_tokenizer

    store, config = job.store, job.config
    own = config.generate.policy == "student"
    student = policy_model(store, config, job.round) if own else start_model(store, config, WARMUP)
    teacher = teacher_model(store, config)
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    # The teacher prefills these samples next, so they must fit into both models.
    context = min(student.context, teacher.context)
    if config.generate.policy == "answers":
        _write_answers(job, teacher, tokenizer, context)
    else:
        _write_samples(job, student if own else teacher, tokenizer, context)


def _write_samples(job: StageJob, policy: ModelRef, tokenizer: "PreTrainedTokenizerBase", context: int) -> None:
    from tasks.language_model.chat import end_ids
    from tasks.rollout.prompts import fitting_prompts, of_split
    from tasks.rollout.shards import Group, sampled, write_shards

    config = job.config.generate
    prompts, tokens = fitting_prompts(
        job, of_split(job.store.read_table(PROMPTS, PROMPTS_TABLE), "train"), tokenizer, context
    )
    settings = SamplingSettings(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        context=context,
        end_ids=tuple(end_ids(tokenizer, policy.path)),
        vocab_size=min(len(tokenizer), policy.shared_vocab),
    )
    longest = longest_sequence(tokens.lengths, context, config.max_new_tokens)
    engine = LazyEngine(lambda: open_engine(policy, config, longest))
    group = Group(
        prompt_ids=prompts.column("prompt_id"),
        tokens=tokens,
        respond=sampled(engine, settings),
        policy_version=policy.version,
        policy_step=policy.step,
        round=job.round,
        prefix=f"r{job.round:03d}",
        samples_per_prompt=config.samples_per_prompt,
    )
    try:
        write_shards(job, [group], tokenizer)
    finally:
        engine.close()
    job.counters |= {"engine": engine_name(policy, config)} | engine.counters()


def _write_answers(job: StageJob, teacher: ModelRef, tokenizer: "PreTrainedTokenizerBase", context: int) -> None:
    from tasks.language_model.chat import end_ids
    from tasks.rollout.answers import answered
    from tasks.rollout.prompts import of_split
    from tasks.rollout.shards import Group, write_shards

    train = of_split(job.store.read_table(PROMPTS, PROMPTS_TABLE), "train")
    ends = tuple(end_ids(tokenizer, teacher.path))
    prompts, tokens, respond = answered(job, train, tokenizer, context, ends, "generate.policy")
    group = Group(
        prompt_ids=prompts.column("prompt_id"),
        tokens=tokens,
        respond=respond,
        policy_version=ANSWERS_VERSION,
        policy_step=0,
        round=job.round,
        prefix=f"r{job.round:03d}",
    )
    write_shards(job, [group], tokenizer)
