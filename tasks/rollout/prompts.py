"""The prompts of a split as tokens, columnar."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from schemas.errors import PromptError
from tasks.language_model.chat import encode_prompts
from tasks.language_model.control_tokens import encode_texts
from tasks.language_model.ragged import Ragged
from tasks.rollout.context import prompts_that_fit
from tasks.rollout.engine import TokenIds
from tasks.stage import StageJob

_CHUNK = 4096
"""Texts that are Python objects at a time."""


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: pa.ChunkedArray) -> Ragged:
    """Return conversations (list<struct<role, content>>) as tokens, each ending where the reply begins."""
    return _encoded(messages, lambda conversations: encode_prompts(tokenizer, conversations))


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: pa.ChunkedArray, end_id: int) -> Ragged:
    """Return answers (string) as tokens, each closed by ``end_id``, which nothing in their text stands for."""

    def encode(texts: list[str]) -> list[TokenIds]:
        return [np.append(ids, np.int32(end_id)) for ids in encode_texts(tokenizer, texts)]

    return _encoded(answers, encode)


def _encoded(column: pa.ChunkedArray, encode: Callable[[list[Any]], list[TokenIds]]) -> Ragged:
    starts = range(0, len(column), _CHUNK)
    chunks = [Ragged.from_rows(encode(column.slice(start, _CHUNK).to_pylist())) for start in starts]
    return Ragged.concat([Ragged.from_rows([]), *chunks])


def fitting_prompts(
    job: StageJob, prompts: pa.Table, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[pa.Table, Ragged]:
    """Return the prompts that leave room for a reply, as rows and as tokens; count the others as `dropped_prompts`.

    The rows have no messages any more: once they are tokens, the text is only memory.

    Args:
        job: The stage, for `prompts.too_long` and its counters.
        prompts: Rows of table prompts, all of one split.
        tokenizer: Whose chat template to use.
        context: Longest sequence, in tokens, that both models take.

    Raises:
        PromptError: a prompt does not fit and may not be dropped, or none is left.
    """
    tokens = encode_messages(tokenizer, prompts.column("messages"))
    mask = prompts_that_fit(
        tokens.lengths,
        context,
        too_long=job.config.prompts.too_long,
        sources=prompts.column("source"),
        source_rows=prompts.column("source_row"),
    )
    job.counters["dropped_prompts"] = job.counters.get("dropped_prompts", 0) + int((~mask).sum())
    if not mask.any():
        raise PromptError(
            f"none of the {len(mask)} prompts leaves room for a reply in the models' context of {context} tokens; "
            "shorten them or choose models with a longer context"
        )
    kept = prompts.drop_columns("messages")
    return (kept, tokens) if mask.all() else (kept.filter(pa.array(mask)), tokens.filter(mask))


def of_split(prompts: pa.Table, split: str) -> pa.Table:
    """Return the prompts of one split, in order."""
    return prompts.filter(pc.equal(prompts.column("split"), split))
