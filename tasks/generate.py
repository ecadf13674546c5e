"""Stage generate: the round's policy answers every train prompt, in bulk."""

from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import PROMPTS
from tasks.language_model.sources import policy_model, teacher_model
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import LazyEngine, SamplingSettings, open_engine
from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Write table GENERATE in shards of `generate.shard_prompts` prompts; shards that are there already stay.

    Raises:
        PromptError: a prompt leaves no room for a reply and `prompts.too_long` is `error`.
        ModelError: the engine is not installed, or the policy cannot be loaded.
    """
    from tasks.language_model.chat import end_ids
    from tasks.language_model.loading import load_tokenizer
    from tasks.rollout.prompts import fitting_prompts, of_split
    from tasks.rollout.shards import Group, sampled, write_shards

    config = job.config.generate
    policy = policy_model(job.store, job.config, job.round)
    # The teacher prefills these samples next, so they must fit into both models.
    context = min(policy.context, teacher_model(job.store, job.config).context)
    tokenizer = load_tokenizer(policy.path, trust_remote_code=policy.trust_remote_code)
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
    job.counters |= {"engine": config.engine} | engine.counters()
