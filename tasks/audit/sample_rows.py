"""Single rows of tables, for the few places where one sample is looked at."""

from typing import Any

import numpy as np
import pyarrow as pa

from schemas.stage_key import StageKey
from schemas.tables import FILLER_ID, IGNORE_LABEL
from tasks.audit.digests import first_difference, fixed_lists
from tasks.audit.findings import Audit
from tasks.audit.tables import shards
from tasks.language_model.ragged import Ragged


def row_at(audit: Audit, key: StageKey, columns: list[str], row: int) -> pa.Table:
    """Return one row of a stage's table."""
    for _, first, table in shards(audit, key, columns):
        if row < first + table.num_rows:
            return table.slice(row - first, 1)
    raise IndexError(f"{key.label} has no row {row}")


def packed_difference(audit: Audit, source: StageKey, row: int, part: pa.Table, within: slice) -> str:
    """Return in words which column and token of a packed sequence differs from its sample.

    Args:
        audit: The verification.
        source: The rollout table of the sample.
        row: Its row there, and in the round's score table.
        part: Bins, one of which holds the sequence.
        within: Its tokens, counted over all bins of ``part``.
    """
    sample = row_at(audit, source, ["prompt_ids", "response_ids", "sampled_logprobs"], row)
    prompt, response, sampled = (Ragged.from_arrow(sample.column(name)).values for name in sample.column_names)
    tokens = np.concatenate([prompt, response])
    expected: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": tokens,
        "labels": np.concatenate([np.full(len(prompt), IGNORE_LABEL, np.int32), response]),
    }
    if "teacher_topk_ids" in part.column_names:
        score = StageKey("score", source.round)
        targets = row_at(audit, score, ["teacher_topk_ids", "teacher_topk_logprobs"], row)
        fillers = np.float32("nan"), FILLER_ID, -np.inf
        values = [sampled, *(fixed_lists(targets.column(name)) for name in targets.column_names)]
        for name, of_response, filler in zip(("sampled_logprobs", *targets.column_names), values, fillers, strict=True):
            before = np.full((len(prompt), *of_response.shape[1:]), filler, of_response.dtype)
            expected[name] = np.concatenate([before, of_response])
    for name, wanted in expected.items():
        fixed = wanted.ndim == 2
        found = (fixed_lists(part.column(name)) if fixed else Ragged.from_arrow(part.column(name)).values)[within]
        at = first_difference(pa.array(found.reshape(-1)), pa.array(wanted.reshape(-1)))
        if at is not None:
            place = at // wanted.shape[1] if fixed else at
            where = "prompt" if place < len(prompt) else "response"
            number = place if place < len(prompt) else place - len(prompt)
            stage = "score" if fixed else source.stage
            return (
                f"`{name}`: token {place} of the sequence ({where} token {number}) has "
                f"{found.reshape(-1)[at]}, stage {stage} makes it {wanted.reshape(-1)[at]}"
            )
    return "its tokens, labels or targets are not those of its sample"
