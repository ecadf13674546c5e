"""The prompts' own answers in place of sampled responses."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from schemas.errors import PromptError
from tasks.rollout.engine import Finished, Responses, TokenIds
from tasks.rollout.prompts import Asked, ask, encode_answers, read_split
from tasks.rollout.shards import Respond, RolloutShard
from tasks.stage import StageJob


def answered(
    job: StageJob,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    ends: tuple[int, ...],
    key: str,
    limit: int | None = None,
) -> tuple[Asked, Respond]:
    """Return the train prompts that fit with their answers, and what responds with the answers.

    Each answer is followed by the first of ``ends``; its log-probabilities are NaN, since nothing sampled it.

    Args:
        job: The stage, for the prompts table, `prompts.too_long` and its counters.
        tokenizer: The student's.
        context: Longest sequence, in tokens.
        ends: Tokens that end a response.
        key: The config key that wants answers, for errors.
        limit: Take the first prompts only.

    Raises:
        PromptError: an answer is missing, or does not fit with its prompt; names the source and row.
    """
    require_answers(read_split(job.store, "train", limit), key)
    asked = ask(job, "train", tokenizer, context, limit=limit, answer_end=ends[0])

    def respond(shards: Iterable[RolloutShard], finished: Finished) -> Iterator[tuple[RolloutShard, Responses]]:
        for shard in shards:
            replies = encode_answers(tokenizer, shard.prompts.column("answer"), ends[0])
            rows: list[TokenIds] = replies.rows()
            unsampled = [np.full(len(row), np.nan, np.float32) for row in rows]
            finished(len(rows))
            yield shard, Responses.from_rows(rows, unsampled, ends)

    return asked, respond


def require_answers(prompts: Iterable[pa.Table], key: str) -> None:
    """Check that every prompt has an answer.

    Raises:
        PromptError: one has none; names its source and row, and the setting ``key`` that needs it.
    """
    first: tuple[str, int] | None = None
    lacking = total = 0
    for table in prompts:
        total += table.num_rows
        missing = table.filter(pc.is_null(table.column("answer")))
        lacking += missing.num_rows
        if missing.num_rows and first is None:
            first = missing.column("source")[0].as_py(), missing.column("source_row")[0].as_py()
    if first is not None:
        raise PromptError(
            f"{first[0]}: row {first[1]}: no answer, which "
            f"`{key}: answers` needs ({lacking} of {total} prompts lack one); add them or set `{key}: teacher`"
        )
