"""One row per bin out of whole sequences: tokens, labels and aligned targets, by NumPy masks over flat values."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import ArtifactError
from schemas.tables import FILLER_ID, IGNORE_LABEL

TARGET_COLUMNS = ("teacher_topk_ids", "teacher_topk_logprobs")


def pack_rows(sequences: pa.Table, bin_offsets: NDArray[np.int64], first_pack_id: int) -> pa.Table:
    """Lay sequences end to end, bin by bin.

    Entry t of ``labels`` and of the targets belongs to the token at t: what a model is to predict *there*, so the
    trainer shifts its logits, not these. One bin of two sequences, prompts [1, 2] and [5], responses [3, 4] and [6]:

        input_ids                  1     2     3     4     5     6
        labels                  -100  -100     3     4  -100     6
        teacher_topk_ids         [-1]  [-1]  r0[0] r0[1]  [-1]  r1[0]      (r0, r1: the sequences' score rows)
        sampled_logprobs          nan   nan     .     .   nan     .

    Args:
        sequences: In the order of the bins. Columns `sample_id`, `prompt_ids`, `response_ids`; and for a round's
            packs `sampled_logprobs`, `teacher_topk_ids`, `teacher_topk_logprobs`, one entry per response token.
        bin_offsets: int64 [bins + 1], sequences before each bin.
        first_pack_id: Id of the first bin.

    Returns:
        The pack table (schema ``pack_schema``), with targets where ``sequences`` has them.

    Raises:
        ArtifactError: a sample's targets are not as many as its response tokens.
    """
    prompts, responses = (_chunk(sequences, name) for name in ("prompt_ids", "response_ids"))
    prompt_tokens, response_tokens = (pc.list_value_length(lists).to_numpy() for lists in (prompts, responses))
    lengths = (prompt_tokens + response_tokens).astype(np.int64)
    # Prompt and response take turns, so one repeat over both lengths says which of the two each token is.
    turns = np.stack([prompt_tokens, response_tokens], axis=1).reshape(-1)
    is_response = np.repeat(np.tile([False, True], lengths.size), turns)
    token_offsets = np.concatenate([[0], np.cumsum(lengths)])[bin_offsets]
    response_ids = responses.flatten().to_numpy()
    input_ids = np.empty(is_response.size, np.int32)
    input_ids[is_response] = response_ids
    input_ids[~is_response] = prompts.flatten().to_numpy()
    labels = np.full(is_response.size, IGNORE_LABEL, np.int32)
    labels[is_response] = response_ids

    bins = bin_offsets.size - 1
    columns = {
        "pack_id": pa.array(np.arange(first_pack_id, first_pack_id + bins, dtype=np.int64)),
        "input_ids": _lists(token_offsets, input_ids),
        "labels": _lists(token_offsets, labels),
        "seq_lengths": _lists(bin_offsets, lengths.astype(np.int32)),
        "sample_ids": _lists(bin_offsets, _chunk(sequences, "sample_id")),
    }
    if "sampled_logprobs" in sequences.column_names:
        sampled = _chunk(sequences, "sampled_logprobs")
        columns["sampled_logprobs"] = _lists(
            token_offsets, _spread(sampled.flatten().to_numpy(), is_response, np.float32("nan"))
        )
    for name, filler in zip(TARGET_COLUMNS, (FILLER_ID, -np.inf), strict=True):
        if name in sequences.column_names:
            _require_one_per_token(sequences, name, response_tokens)
            entries = _chunk(sequences, name).flatten()
            top_k = entries.type.list_size
            values = _spread(entries.flatten().to_numpy().reshape(-1, top_k), is_response, filler)
            fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), top_k)
            columns[name] = _lists(token_offsets, fixed)
    return pa.table(columns)


def _spread(values: NDArray[Any], is_response: NDArray[np.bool_], filler: Any) -> NDArray[Any]:
    """Return ``values`` [response tokens, ...] at the response positions, ``filler`` at the others."""
    spread = np.full((is_response.size, *values.shape[1:]), filler, values.dtype)
    spread[is_response] = values
    return spread


def _lists(offsets: NDArray[np.int64], values: NDArray[Any] | pa.Array) -> pa.Array:
    flat = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


def _chunk(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _require_one_per_token(sequences: pa.Table, name: str, response_tokens: NDArray[np.int32]) -> None:
    entries = pc.list_value_length(_chunk(sequences, name)).to_numpy()
    wrong = np.flatnonzero(entries != response_tokens)
    if wrong.size:
        row = int(wrong[0])
        sample = sequences.column("sample_id")[row].as_py()
        raise ArtifactError(
            f"sample `{sample}`: column `{name}` has {entries[row]} entries for {response_tokens[row]} response "
            "tokens; run the stages generate and score again"
        )
