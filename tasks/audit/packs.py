"""Packs back to their samples: which sequences, and every token, label and target of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.stage_key import WARMUP, StageKey
from schemas.tables import FILLER_ID, IGNORE_LABEL
from tasks.audit.digests import LOGPROBS, TARGET_IDS, TARGET_LOGPROBS, TOKENS, fixed_lists, row_digests
from tasks.audit.findings import Audit
from tasks.audit.rollout_index import RolloutIndex, locate_rows
from tasks.audit.sample_rows import packed_difference
from tasks.audit.tables import shards
from tasks.graph import REFERENCE
from tasks.language_model.ragged import Ragged

_BINS = 4
"""Bins whose tokens are compared at a time."""

Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


def check_packs(audit: Audit, key: StageKey) -> None:
    """Check that what is to be trained on is packed once, whole, and nothing else; and each token of it."""
    warmup = key.round == WARMUP
    source = REFERENCE if warmup else StageKey("generate", key.round)
    ledger = StageKey("filter", key.round)
    needed = (source,) if warmup else (source, StageKey("score", key.round), ledger)
    if not audit.needs(key, key, *needed) or source not in audit.rollouts:
        return
    index = audit.rollouts[source]
    if warmup:
        fits = index.prompt_tokens + index.response_tokens <= audit.config.pack.max_tokens
        wanted = ~index.held_out & (index.response_tokens > 0) & fits
    elif ledger in audit.kept:
        wanted = audit.kept[ledger]
    else:
        audit.report.unchecked.append(f"{key.label}: its rows, since {ledger.label} does not match its samples")
        return
    rows = _locate(audit, key, index, wanted)
    start = bins = tokens = labelled = 0
    for name, first, table in shards(audit, key, _columns(warmup)):
        _check_ids(audit, name, table, first)
        for low in range(0, table.num_rows, _BINS):
            part = table.slice(low, _BINS)
            count = int(pc.sum(pc.list_value_length(part.column("sample_ids"))).as_py() or 0)
            packed = _Packed.of(name, low, part, rows[start : start + count])
            if _check_lengths(audit, packed, part, index):
                _check_tokens(audit, source, packed, part, index)
            start += count
            tokens += packed.tokens.values.size
            labelled += int(np.count_nonzero(packed.labels != IGNORE_LABEL))
        bins += table.num_rows
    audit.report.coverage.tokens += tokens
    for counter, found in (("bins", bins), ("sequences", start), ("tokens", tokens), ("response_tokens", labelled)):
        audit.expect_counter(key, counter, found)


def _columns(warmup: bool) -> list[str]:
    targets = [] if warmup else ["sampled_logprobs", "teacher_topk_ids", "teacher_topk_logprobs"]
    return ["pack_id", "input_ids", "labels", "seq_lengths", "sample_ids", *targets]


def _locate(audit: Audit, key: StageKey, index: RolloutIndex, wanted: Bools) -> Int64:
    """Return the rollout row of every packed sequence (-1: none), in the order of packs; each must be there once."""
    names = [table.column("sample_ids") for _, _, table in shards(audit, key, ["sample_ids"])]
    ids = pa.chunked_array([chunk.flatten() for column in names for chunk in column.chunks], pa.string())
    rows = locate_rows(ids, index.sample_ids)
    unknown = np.flatnonzero(rows < 0)
    if unknown.size:
        audit.broken(
            key.folder, f"packs sample {ids[int(unknown[0])].as_py()}, which was never sampled", unknown.size - 1
        )
    times = np.bincount(rows[rows >= 0], minlength=len(index))
    audit.report.coverage.joins += len(ids)
    for wrong, what in (
        ((times > 0) & ~wanted, "is packed, but the round does not keep it"),
        ((times == 0) & wanted, "is kept, but in no pack"),
        ((times > 1) & wanted, "is packed more than once"),
    ):
        places = np.flatnonzero(wrong)
        if places.size:
            sample = index.sample_ids[int(places[0])].as_py()
            audit.broken(key.folder, f"sample {sample} {what}", places.size - 1)
    return rows


def _check_ids(audit: Audit, name: str, table: pa.Table, first: int) -> None:
    packs = table.column("pack_id")
    expected = np.arange(first, first + table.num_rows)
    audit.expect_rows(name, 0, packs, "pack_id", packs.to_numpy() == expected, lambda i: f"should be {expected[i]}")


@dataclass(frozen=True)
class _Packed:
    """A few bins, sequence by sequence.

    Args:
        name: Their file.
        first_bin: Row of the first in it.
        bin_of: int64 [sequences]; the bin of each, from 0.
        rows: int64 [sequences]; row of each in its rollout table, -1 for none.
        lengths: int64 [sequences], tokens.
        tokens: The tokens of each bin.
        labels: int32 [tokens].
    """

    name: str
    first_bin: int
    bin_of: Int64
    rows: Int64
    lengths: Int64
    tokens: Ragged
    labels: NDArray[np.int32]

    @classmethod
    def of(cls, name: str, first_bin: int, part: pa.Table, rows: Int64) -> "_Packed":
        lengths = Ragged.from_arrow(part.column("seq_lengths"))
        return cls(
            name,
            first_bin,
            np.repeat(np.arange(len(lengths)), lengths.lengths),
            rows,
            lengths.values.astype(np.int64),
            Ragged.from_arrow(part.column("input_ids")),
            Ragged.from_arrow(part.column("labels")).values,
        )


def _check_lengths(audit: Audit, packed: _Packed, part: pa.Table, index: RolloutIndex) -> bool:
    """Check the lengths of the sequences of a few bins; say whether all are known, whole and fit."""
    packs = part.column("pack_id")
    filled = np.bincount(packed.bin_of, packed.lengths, len(packs)).astype(np.int64)
    capacity = audit.config.pack.max_tokens
    fits = audit.expect_rows(
        packed.name,
        packed.first_bin,
        packs,
        "seq_lengths",
        (filled == packed.tokens.lengths) & (filled <= capacity),
        lambda i: f"add up to {filled[i]}, for {packed.tokens.lengths[i]} tokens in a bin of at most {capacity}",
    )
    if not fits or (packed.rows < 0).any():
        return False
    tokens = index.prompt_tokens[packed.rows] + index.response_tokens[packed.rows]
    whole = (packed.lengths == tokens) & (packed.lengths > 0)
    if not whole.all():
        at = int(np.argmin(whole))
        audit.broken(
            packed.name,
            f"row {packed.first_bin + packed.bin_of[at]}, sample {index.sample_ids[int(packed.rows[at])].as_py()}, "
            f"`seq_lengths`: {packed.lengths[at]}, prompt and response have {tokens[at]} tokens",
            int(np.count_nonzero(~whole)) - 1,
        )
    return bool(whole.all())


def _check_tokens(audit: Audit, source: StageKey, packed: _Packed, part: pa.Table, index: RolloutIndex) -> None:
    """Check every token, label and target of the sequences of a few bins, whose lengths hold."""
    prompts, responses = index.prompt_tokens[packed.rows], index.response_tokens[packed.rows]
    offsets = np.concatenate([[0], np.cumsum(packed.lengths)])
    is_response = np.arange(offsets[-1]) - np.repeat(offsets[:-1], packed.lengths) >= np.repeat(prompts, packed.lengths)
    digest = row_digests(packed.tokens.values, offsets, TOKENS)
    empty = np.where(is_response, packed.tokens.values, IGNORE_LABEL) == packed.labels
    if "teacher_topk_ids" in part.column_names:
        spread = np.concatenate([[0], np.cumsum(responses)])
        columns: list[tuple[NDArray[Any], np.uint64, Any]] = [
            (Ragged.from_arrow(part.column("sampled_logprobs")).values, LOGPROBS, None),
            (fixed_lists(part.column("teacher_topk_ids")), TARGET_IDS, FILLER_ID),
            (fixed_lists(part.column("teacher_topk_logprobs")), TARGET_LOGPROBS, -np.inf),
        ]
        for values, kind, filler in columns:
            digest += row_digests(values[is_response], spread, kind)
            outside = np.isnan(values) if filler is None else (values == filler).all(axis=1)
            empty &= is_response | outside
    right = np.logical_and.reduceat(empty, offsets[:-1]) & (digest == index.digest[packed.rows])
    audit.report.coverage.joins += right.size
    if not right.all():
        at = int(np.argmin(right))
        sample = index.sample_ids[int(packed.rows[at])].as_py()
        within = slice(int(offsets[at]), int(offsets[at + 1]))
        what = packed_difference(audit, source, int(packed.rows[at]), part, within)
        audit.broken(
            packed.name,
            f"row {packed.first_bin + packed.bin_of[at]}, sample {sample}, {what}",
            int(np.count_nonzero(~right)) - 1,
        )
