"""Random token rows, packs and teacher targets: speed does not depend on what they say."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.language_model.ragged import Ragged, offsets_of

FIRST_ID = 3
"""Ids below are special tokens."""


class TopK(NamedTuple):
    """A random teacher's targets: ids int32 [rows, k], all different in a row, and logprobs float32 [rows, k]."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


def draw_top_k(rows: int, vocab: int, top_k: int, *, seed: int = 0) -> TopK:
    """Draw targets that hold nine tenths of the probability, the most likely first."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, vocab, (rows, 1))
    ids = (first + np.arange(top_k) * (vocab // top_k)) % vocab
    shares = -np.sort(-rng.exponential(size=(rows, top_k)), axis=1)
    logprobs = np.log(0.9 * shares / shares.sum(1, keepdims=True))
    return TopK(ids.astype(np.int32), logprobs.astype(np.float32))


def draw_rows(lengths: NDArray[np.int64], vocab: int, *, seed: int = 0) -> Ragged:
    """Draw int32 token rows of these lengths."""
    offsets = offsets_of(lengths)
    drawn = np.random.default_rng(seed).integers(FIRST_ID, vocab, offsets[-1], dtype=np.int32)
    return Ragged(drawn, offsets)


def draw_sequences(lengths: NDArray[np.int64], vocab: int) -> tuple[Ragged, Ragged]:
    """Draw contexts (a quarter of each sequence, rounded up) and responses."""
    contexts = -(-lengths // 4)
    return draw_rows(contexts, vocab, seed=1), draw_rows(lengths - contexts, vocab, seed=2)


def pack_table(packs: int, lengths: NDArray[np.int64], vocab: int, top_k: int, *, seed: int = 0) -> pa.Table:
    """Return a pack table whose packs all hold sequences of ``lengths``, a quarter of each (rounded up) prompt."""
    from schemas.tables import FILLER_ID, IGNORE_LABEL, pack_schema

    columns = pack_schema(top_k).columns
    tokens = int(lengths.sum())
    starts = np.repeat(offsets_of(lengths)[:-1], lengths)
    response = np.tile(np.arange(tokens) - starts >= np.repeat(-(-lengths // 4), lengths), packs)
    ids = np.random.default_rng(seed).integers(FIRST_ID, vocab, packs * tokens, dtype=np.int32)
    targets = draw_top_k(packs * tokens, vocab, top_k, seed=seed)
    targets.ids[~response], targets.logprobs[~response] = FILLER_ID, -np.inf
    sampled = np.where(response, targets.logprobs[:, 0], np.nan).astype(np.float32)
    by_token = pa.array(np.arange(packs + 1) * tokens, pa.int32())
    by_sequence = pa.array(np.arange(packs + 1) * len(lengths), pa.int32())

    def fixed(name: str, values: NDArray[np.number]) -> pa.ListArray:
        kind = columns.field(name).type.value_type
        flat = pa.array(values.ravel().astype(kind.value_type.to_pandas_dtype()), kind.value_type)
        return pa.ListArray.from_arrays(by_token, pa.FixedSizeListArray.from_arrays(flat, type=kind))

    arrays = {
        "pack_id": pa.array(np.arange(packs)),
        "input_ids": pa.ListArray.from_arrays(by_token, pa.array(ids)),
        "labels": pa.ListArray.from_arrays(by_token, pa.array(np.where(response, ids, IGNORE_LABEL).astype(np.int32))),
        "seq_lengths": pa.ListArray.from_arrays(by_sequence, pa.array(np.tile(lengths, packs).astype(np.int32))),
        "sample_ids": pa.ListArray.from_arrays(
            by_sequence, pa.array([f"s{number}" for number in range(packs * len(lengths))])
        ),
        "sampled_logprobs": pa.ListArray.from_arrays(by_token, pa.array(sampled)),
        "teacher_topk_ids": fixed("teacher_topk_ids", targets.ids),
        "teacher_topk_logprobs": fixed("teacher_topk_logprobs", targets.logprobs),
    }
    return pa.table(arrays).select(columns.names).cast(columns)
