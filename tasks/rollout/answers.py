"""The prompts' own answers in place of sampled responses."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from schemas.errors import PromptError
from tasks.language_model.ragged import Ragged
from tasks.rollout.context import prompts_that_fit
from tasks.rollout.engine import Finished, Rollouts, TokenIds
from tasks.rollout.prompts import encode_answers, fitting_prompts
from tasks.rollout.shards import Respond, Shard
from tasks.stage import StageJob


def answered(
    job: StageJob,
    prompts: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    ends: tuple[int, ...],
    key: str,
) -> tuple[pa.Table, Ragged, Respond]:
    """Return the prompts that fit with their answers, as rows and as tokens, and what responds with the answers.

    Each answer is followed by the first of ``ends``; its log-probabilities are NaN, since nothing sampled it.

    Args:
        job: The stage, for `prompts.too_long` and its counters.
        prompts: Rows of table prompts.
        tokenizer: The student's.
        context: Longest sequence, in tokens.
        ends: Tokens that end a response.
        key: The config key and value that want answers, for errors: `warmup.responses: answers`.

    Raises:
        PromptError: an answer is missing, or does not fit with its prompt; names the source and row.
    """
    require_answers(prompts, key)
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

    def respond(shards: Iterable[Shard], finished: Finished) -> Iterator[tuple[Shard, Rollouts]]:
        for shard in shards:
            rows: list[TokenIds] = replies.rows(*shard.rows)
            unsampled = [np.full(len(row), np.nan, np.float32) for row in rows]
            finished(len(rows))
            yield shard, Rollouts.from_rows(rows, unsampled, ends)

    return prompts.filter(pa.array(fits)), tokens.filter(fits), respond


def require_answers(prompts: pa.Table, key: str) -> None:
    """Check that every prompt has an answer.

    Raises:
        PromptError: one has none; names its source and row, and the setting ``key`` that needs it.
    """
    missing = prompts.filter(pc.is_null(prompts.column("answer")))
    if missing.num_rows:
        raise PromptError(
            f"{missing.column('source')[0].as_py()}: row {missing.column('source_row')[0].as_py()}: no answer, which "
            f"`{key}: answers` needs ({missing.num_rows} of {prompts.num_rows} prompts lack one); add them or set "
            f"`{key}: teacher`"
        )
