"""The prompts of a split as tokens, columnar."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from schemas.errors import PromptError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.language_model.chat import encode_prompts
from tasks.language_model.control_tokens import encode_replies
from tasks.language_model.ragged import Ragged
from tasks.rollout.context import prompts_that_fit, source_in
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
        return [np.append(ids, np.int32(end_id)) for ids in encode_replies(tokenizer, texts)]

    return _encoded(answers, encode)


def _encoded(column: pa.ChunkedArray, encode: Callable[[list[Any]], list[TokenIds]]) -> Ragged:
    starts = range(0, len(column), _CHUNK)
    chunks = [Ragged.from_rows(encode(column.slice(start, _CHUNK).to_pylist())) for start in starts]
    return Ragged.concat([Ragged.from_rows([]), *chunks])


@dataclass(frozen=True)
class Asked:
    """The prompts of a split that leave room for a reply, as tokens that are made a file of the table at a time.

    Args:
        count: How many there are.
        longest: Tokens of the longest.
        read: Reads them in order: the columns of table PROMPTS but the messages, and `tokens` (list<int32>).
    """

    count: int
    longest: int
    read: Callable[[], Iterator[pa.Table]]

    @classmethod
    def of(cls, prompts: pa.Table, tokens: Ragged) -> "Asked":
        """Take prompts that are few enough to be held."""
        table = _with_tokens(prompts, tokens)
        return cls(table.num_rows, int(tokens.lengths.max(initial=0)), lambda: iter([table]))

    def spans(self, wanted: Iterable[tuple[int, int]]) -> Iterator[pa.Table]:
        """Return the prompts of each span (the first, and one past the last), which come in order."""
        tables = self.read()
        held, first = next(tables, None), 0
        for start, stop in wanted:
            while held is not None and first + held.num_rows < stop:
                more = next(tables)
                kept = held.slice(max(start - first, 0))
                first += held.num_rows - kept.num_rows
                held = pa.concat_tables([kept, more])
            assert held is not None
            yield held.slice(start - first, stop - start)


def ask(
    job: StageJob,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    limit: int | None = None,
    answer_end: int | None = None,
) -> Asked:
    """Return the prompts of a split that leave room for a reply; count the others as `dropped_prompts`.

    The prompts are read twice, now for their lengths and later for their tokens: held are 4 bytes a prompt.

    Args:
        job: The stage, for the prompts table, `prompts.too_long` and its counters.
        split: `train` or `held_out`.
        tokenizer: Whose chat template to use.
        context: Longest sequence, in tokens, that both models take.
        limit: Take the first of them only.
        answer_end: Closes a prompt's own answer, which must have room; None: one token must.

    Raises:
        PromptError: a prompt does not fit and may not be dropped, or none is left.
    """

    def lengths_of(tokens: Callable[[pa.Table], Ragged]) -> NDArray[np.int32]:
        parts = (tokens(table).lengths.astype(np.int32) for table in read_split(job.store, split, limit))
        return np.concatenate([np.empty(0, np.int32), *parts])

    lengths = lengths_of(lambda table: encode_messages(tokenizer, table.column("messages")))
    replies = None
    if answer_end is not None:
        replies = lengths_of(lambda table: encode_answers(tokenizer, table.column("answer"), answer_end))
    mask = prompts_that_fit(
        lengths,
        context,
        too_long=job.config.prompts.too_long,
        source_of=lambda row: _source_of(read_split(job.store, split, limit), row),
        reply_lengths=replies,
    )
    count = int(mask.sum())
    job.counters["dropped_prompts"] = job.counters.get("dropped_prompts", 0) + mask.size - count
    if not count:
        raise PromptError(
            f"none of the {mask.size} prompts leaves room for a reply in the models' context of {context} tokens; "
            "shorten them or choose models with a longer context"
        )

    def read() -> Iterator[pa.Table]:
        row = 0
        for table in read_split(job.store, split, limit):
            fits = pa.array(mask[row : row + table.num_rows])
            row += table.num_rows
            kept = table.filter(fits)
            yield _with_tokens(kept, encode_messages(tokenizer, kept.column("messages")))

    return Asked(count, int(lengths[mask].max()), read)


def _with_tokens(prompts: pa.Table, tokens: Ragged) -> pa.Table:
    """Return the prompts with their tokens in place of their messages: text of what is tokens is only memory."""
    others = [name for name in prompts.column_names if name != "messages"]
    return prompts.select(others).append_column("tokens", tokens.to_arrow())


def _source_of(tables: Iterator[pa.Table], row: int) -> tuple[str, int]:
    """Return the source of a prompt and its row there."""
    for table in tables:
        if row < table.num_rows:
            return source_in(table)(row)
        row -= table.num_rows
    raise IndexError(row)


def read_split(store: RunStore, split: str, limit: int | None = None) -> Iterator[pa.Table]:
    """Read the prompts of one split in order, a file at a time; the first ``limit`` of them."""
    for shard in store.iterate_table(StageKey("prompts"), PROMPTS):
        prompts = of_split(shard, split).slice(0, limit)
        if prompts.num_rows:
            yield prompts
        if limit is not None:
            limit -= prompts.num_rows
            if not limit:
                return


def of_split(prompts: pa.Table, split: str) -> pa.Table:
    """Return the prompts of one split, in order."""
    return prompts.filter(pc.equal(prompts.column("split"), split))
