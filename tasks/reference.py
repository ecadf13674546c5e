"""Stage reference: the teacher's own responses, to held-out prompts for evaluation and to train prompts for warm-up."""

from typing import TYPE_CHECKING

from schemas.stage_key import WARMUP
from tasks.language_model.sources import ANSWERS_VERSION, start_model, teacher_model
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import LazyEngine, SamplingSettings, engine_name, open_engine
from tasks.stage import StageJob

if TYPE_CHECKING:
    from tasks.rollout.prompts import Asked
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
    from tasks.rollout.prompts import ask
    from tasks.rollout.shards import sampled, write_shards, written_here

    config, warmup = job.config, job.config.warmup
    teacher, student = teacher_model(job.store, config), start_model(job.store, config, WARMUP)
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    ends = tuple(end_ids(tokenizer, teacher.path))
    context = min(teacher.context, student.context)
    longest: list[int] = []
    # Opened after every group is known, so that `longest` covers them all.
    engine = LazyEngine(lambda: open_engine(teacher, config.teacher_sampling, max(longest)))

    def answered_by_teacher(
        split: str, temperature: float, max_new_tokens: int | None, first: int | None = None
    ) -> "Group":
        asked = ask(job, split, tokenizer, context, limit=first)
        limit = max_new_tokens or config.generate.max_new_tokens
        longest.append(longest_sequence(asked.longest, context, limit))
        vocab_size = min(len(tokenizer), teacher.shared_vocab)
        settings = SamplingSettings(temperature, 1.0, limit, context, ends, vocab_size)
        return _group(asked, sampled(engine, settings), teacher.version)

    groups = [answered_by_teacher("held_out", 1.0, config.evaluate.max_new_tokens)]
    if warmup is not None:
        if warmup.responses == "answers":
            asked, respond = answered(job, tokenizer, context, ends, "warmup.responses", warmup.prompts)
            groups.append(_group(asked, respond, ANSWERS_VERSION))
        else:
            groups.append(answered_by_teacher("train", warmup.temperature, warmup.max_new_tokens, warmup.prompts))
    try:
        write_shards(job, groups, written_here(job, tokenizer))
    finally:
        engine.close()
    job.counters |= {"engine": engine_name(teacher, config.teacher_sampling)} | engine.counters()


def _group(asked: "Asked", respond: "Respond", version: str) -> "Group":
    from tasks.rollout.shards import Group

    return Group(prompts=asked, respond=respond, policy_version=version, policy_step=0, round=WARMUP)
