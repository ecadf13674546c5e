"""The prompts of a split as tokens, columnar."""

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from schemas.errors import PromptError
from tasks.language_model.chat import encode_prompts
from tasks.language_model.ragged import Ragged
from tasks.rollout.context import prompts_that_fit
from tasks.rollout.engine import TokenIds
from tasks.stage import StageJob

_CHUNK = 4096


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: pa.ChunkedArray) -> Ragged:
    """Return conversations (list<struct<role, content>>) as tokens, each ending where the reply begins."""
    rows: list[TokenIds] = []
    for start in range(0, len(messages), _CHUNK):
        rows += encode_prompts(tokenizer, messages.slice(start, _CHUNK).to_pylist())
    return Ragged.from_rows(rows)


def fitting_prompts(
    job: StageJob, prompts: pa.Table, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[pa.Table, Ragged]:
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
