"""Stage reference: the teacher's own responses, to held-out prompts for evaluation and to train prompts for warm-up."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import PromptError
from schemas.stage_key import WARMUP
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import PROMPTS
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import start_model, teacher_model
from tasks.rollout.context import longest_sequence, prompts_that_fit
from tasks.rollout.engine import Finished, LazyEngine, Rollouts, SamplingSettings, TokenIds, open_engine
from tasks.stage import StageJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.rollout.shards import Group, Respond, Shard

ANSWERS_VERSION = "answers"
"""``policy_version`` of responses that no model sampled."""


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
            groups.append(_answers_group(job, train, tokenizer, context, ends))
        else:
            groups.append(answered_by_teacher(train, warmup.temperature, warmup.max_new_tokens))
    try:
        write_shards(job, groups, tokenizer)
    finally:
        engine.close()
    job.counters |= {"engine": config.generate.engine} | engine.counters()


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


def _answers_group(
    job: StageJob, prompts: pa.Table, tokenizer: "PreTrainedTokenizerBase", context: int, ends: tuple[int, ...]
) -> "Group":
    """Answer with the prompts' own answers, each followed by the first end token.

    Raises:
        PromptError: an answer is missing, or does not fit with its prompt; names the source and row.
    """
    from tasks.rollout.prompts import encode_answers, fitting_prompts

    require_answers(prompts)
    prompts, tokens = fitting_prompts(job, prompts, tokenizer, context)
    replies = encode_answers(tokenizer, prompts.column("answer"), ends[0])
    fits = prompts_that_fit(
        tokens.lengths,
        context,
        too_long=job.config.prompts.too_long,
        sources=prompts.column("source"),
        source_rows=prompts.column("source_row"),
        reply_lengths=replies.lengths,
    )
    job.counters["dropped_prompts"] += int((~fits).sum())
    replies = replies.filter(fits)

    def respond(shards: Iterable["Shard"], finished: Finished) -> Iterator[tuple["Shard", Rollouts]]:
        for shard in shards:
            rows: list[TokenIds] = replies.rows(*shard.rows)
            unsampled = [np.full(len(row), np.nan, np.float32) for row in rows]
            finished(len(rows))
            yield shard, Rollouts.from_rows(rows, unsampled, ends)

    return _group(prompts.filter(pa.array(fits)), tokens.filter(fits), respond, ANSWERS_VERSION)


def require_answers(prompts: pa.Table) -> None:
    """Check that every prompt has an answer.

    Raises:
        PromptError: one has none; names its source and row.
    """
    missing = prompts.filter(pc.is_null(prompts.column("answer")))
    if missing.num_rows:
        raise PromptError(
            f"{missing.column('source')[0].as_py()}: row {missing.column('source_row')[0].as_py()}: no answer, which "
            f"`warmup.responses: answers` needs ({missing.num_rows} of {prompts.num_rows} prompts lack one); add them "
            "or set `warmup.responses: teacher`"
        )
