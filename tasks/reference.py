"""Stage reference: the teacher's own responses, to held-out prompts for evaluation and to train prompts for warm-up."""

from typing import TYPE_CHECKING

import pyarrow as pa

from schemas.stage_key import WARMUP
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import PROMPTS
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ANSWERS_VERSION, start_model, teacher_model
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import LazyEngine, SamplingSettings, engine_name, open_engine
from tasks.stage import StageJob

if TYPE_CHECKING:
    from tasks.rollout.shards import Group, Respond


def run(job: StageJob) -> None:
    """Write table GENERATE, one response per prompt: held-out prompts first, then those of the warm-up.

    Prompts take the student's chat template, because the student is trained and evaluated on them.

    Raises:
        PromptError: a prompt leaves no room for a reply and `prompts.too_long` is `error`, or the warm-up wants
            answers and a prompt has none; names its source and row.
        ModelError: the engine is not installed, or the teacher cannot be loaded.
    """
    from tasks.language_model.chat import end_ids
    from tasks.language_model.loading import load_tokenizer
    from tasks.rollout.answers import answered
    from tasks.rollout.prompts import fitting_prompts, of_split
    from tasks.rollout.shards import sampled, write_shards

    config, warmup = job.config, job.config.warmup
    teacher, student = teacher_model(job.store, config), start_model(job.store, config, WARMUP)
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    ends = tuple(end_ids(tokenizer, teacher.path))
    context = min(teacher.context, student.context)
    table = job.store.read_table(PROMPTS, PROMPTS_TABLE)
    longest: list[int] = []
    # Opened after every group is known, so that `longest` covers them all.
    engine = LazyEngine(lambda: open_engine(teacher, config.generate, max(longest)))

    def answered_by_teacher(prompts: pa.Table, temperature: float, max_new_tokens: int | None) -> "Group":
        prompts, tokens = fitting_prompts(job, prompts, tokenizer, context)
        limit = max_new_tokens or config.generate.max_new_tokens
        longest.append(longest_sequence(tokens.lengths, context, limit))
        vocab_size = min(len(tokenizer), teacher.shared_vocab)
        settings = SamplingSettings(temperature, 1.0, limit, context, ends, vocab_size)
        return _group(prompts, tokens, sampled(engine, settings), teacher.version)

    groups = [answered_by_teacher(of_split(table, "held_out"), 1.0, config.evaluate.max_new_tokens)]
    if warmup is not None:
        train = of_split(table, "train").slice(0, warmup.prompts)
        if warmup.responses == "answers":
            prompts, tokens, respond = answered(job, train, tokenizer, context, ends, "warmup.responses")
            groups.append(_group(prompts, tokens, respond, ANSWERS_VERSION))
        else:
            groups.append(answered_by_teacher(train, warmup.temperature, warmup.max_new_tokens))
    try:
        write_shards(job, groups, tokenizer)
    finally:
        engine.close()
    job.counters |= {"engine": engine_name(teacher, config.generate)} | engine.counters()


def _group(prompts: pa.Table, tokens: Ragged, respond: "Respond", version: str) -> "Group":
    from tasks.rollout.shards import Group

    return Group(
        prompt_ids=prompts.column("prompt_id"),
        tokens=tokens,
        respond=respond,
        policy_version=version,
        policy_step=0,
        round=WARMUP,
        prefix="ref",
    )
