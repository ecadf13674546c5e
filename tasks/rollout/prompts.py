"""The prompts of a split as tokens, columnar."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from schemas.errors import PromptError
from tasks.language_model.chat import encode_prompts
from tasks.rollout.context import prompts_that_fit
from tasks.rollout.engine import TokenIds
from tasks.stage import StageJob

_CHUNK = 4096


@dataclass(frozen=True)
class TokenRows:
    """Lists of token ids, one after another.

    Args:
        flat: All ids (int32).
        offsets: Row i is ``flat[offsets[i]:offsets[i + 1]]`` (int64).
    """

    flat: TokenIds
    offsets: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[TokenIds]) -> "TokenRows":
        """Join rows."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row."""
        return np.diff(self.offsets)

    def rows(self, start: int, stop: int) -> list[TokenIds]:
        """Return views of rows ``start`` to ``stop``."""
        return [self.flat[self.offsets[i] : self.offsets[i + 1]] for i in range(start, stop)]

    def filter(self, mask: NDArray[np.bool_]) -> "TokenRows":
        """Keep the rows where ``mask`` [rows] is true."""
        offsets = np.zeros(int(mask.sum()) + 1, np.int64)
        np.cumsum(self.lengths[mask], out=offsets[1:])
        return TokenRows(self.flat[np.repeat(mask, self.lengths)], offsets)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: pa.ChunkedArray) -> TokenRows:
    """Return conversations (list<struct<role, content>>) as tokens, each ending where the reply begins."""
    rows: list[TokenIds] = []
    for start in range(0, len(messages), _CHUNK):
        rows += encode_prompts(tokenizer, messages.slice(start, _CHUNK).to_pylist())
    return TokenRows.from_rows(rows)


def fitting_prompts(
    job: StageJob, prompts: pa.Table, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[pa.Table, TokenRows]:
    """Return the prompts that leave room for a reply, and their tokens; count the others as `dropped_prompts`.

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
    return prompts.filter(pa.array(mask)), tokens.filter(mask)


def of_split(prompts: pa.Table, split: str) -> pa.Table:
    """Return the prompts of one split, in order."""
    return prompts.filter(pc.equal(prompts.column("split"), split))
