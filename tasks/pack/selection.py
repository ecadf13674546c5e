"""Which sequences are packed: what a round's ledger keeps, or the references of train prompts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import ArtifactError, StageError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import FILTER, GENERATE, PROMPTS, score_schema
from tasks.pack.rows import TARGET_COLUMNS
from tasks.sequences import Int32, Source, sequence_lengths, side_by_side
from tasks.stage import StageJob


@dataclass(frozen=True)
class Selection:
    """The sequences to pack: 5 bytes each, and where their columns are.

    Args:
        keep: bool [rows]; which rows of the sources are packed.
        tokens: int32 [sequences]; tokens of each whole sequence, in the order of the rows.
        response_tokens: Tokens of all responses.
        sources: Tables with these rows, to take columns from.
    """

    keep: NDArray[np.bool_]
    tokens: Int32
    response_tokens: int
    sources: list[Source]


class _Picked:
    """A selection as it grows, a shard at a time."""

    def __init__(self) -> None:
        self._keep: list[NDArray[np.bool_]] = []
        self._tokens: list[Int32] = []
        self._response_tokens = 0

    def add(self, keep: NDArray[np.bool_], tokens: Int32, response_tokens: Int32) -> None:
        """Take the rows where ``keep`` holds."""
        self._keep.append(keep)
        self._tokens.append(tokens[keep])
        self._response_tokens += int(response_tokens[keep].sum())

    def selection(self, sources: list[Source]) -> Selection:
        """Return all that was taken."""
        keep = np.concatenate([np.empty(0, bool), *self._keep])
        tokens = np.concatenate([np.empty(0, np.int32), *self._tokens])
        return Selection(keep, tokens, self._response_tokens, sources)


def select_kept(job: StageJob) -> Selection:
    """Return what the round's ledger keeps, in the ledger's order.

    Raises:
        StageError: the ledger keeps nothing.
        ArtifactError: ledger, rollouts and scores do not hold the same samples, or a kept one is longer than a bin.
    """
    config, index = job.config, job.round
    scores = score_schema(config.score.top_k, config.score.topk_dtype)
    ledgers = Source(StageKey("filter", index), FILTER, ["sample_id", "keep"])
    generate, score = StageKey("generate", index), StageKey("score", index)
    lengths = Source(generate, GENERATE, ["sample_id", "prompt_ids", "response_ids"])
    picked, rows = _Picked(), 0
    for ledger, rollouts, _ in side_by_side(job.store, ledgers, lengths, Source(score, scores, ["sample_id"])):
        keep = ledger.column("keep").to_numpy()
        prompts, responses = sequence_lengths(rollouts)
        tokens = prompts + responses
        too_long = np.flatnonzero(keep & (tokens > config.pack.max_tokens))
        if too_long.size:
            raise ArtifactError(
                f"{job.key.label}: the ledger keeps `{ledger.column('sample_id')[int(too_long[0])].as_py()}` of "
                f"{tokens[too_long[0]]} tokens, more than `pack.max_tokens` {config.pack.max_tokens}; "
                "run stage filter again"
            )
        picked.add(keep, tokens, responses)
        rows += keep.size
    selection = picked.selection(
        [
            Source(generate, GENERATE, ["sample_id", "prompt_ids", "response_ids", "sampled_logprobs"]),
            Source(score, scores, list(TARGET_COLUMNS)),
        ]
    )
    if not selection.tokens.size:
        raise StageError(f"{job.key.label}: the ledger keeps none of {rows} samples; nothing to pack")
    return selection


def select_references(job: StageJob) -> Selection:
    """Return the references of train prompts that fit into a bin, in the reference table's order.

    Held-out prompts never get in: they are what the student is measured on. References that are too long, and those
    without a token to learn from, are counted.

    Raises:
        StageError: nothing is left.
        ArtifactError: a reference answers a prompt that the prompts table lacks, or not in its order.
    """
    store, max_tokens = job.store, job.config.pack.max_tokens
    key = StageKey("reference")
    held_out = pa.chunked_array([chunk for ids in _prompt_ids(store, "held_out") for chunk in ids.chunks], pa.string())
    _require_prompts(store, key)
    picked, of_train, too_long, empty = _Picked(), 0, 0, 0
    lengths = Source(key, GENERATE, ["sample_id", "prompt_id", "prompt_ids", "response_ids"])
    for references in lengths.shards(store):
        prompts, responses = sequence_lengths(references)
        train = ~np.asarray(pc.is_in(references.column("prompt_id"), value_set=held_out))
        fits, answered = prompts + responses <= max_tokens, responses > 0
        of_train += int(train.sum())
        too_long += int((train & ~fits).sum())
        empty += int((train & fits & ~answered).sum())
        picked.add(train & fits & answered, prompts + responses, responses)
    job.counters |= {"too_long": too_long, "empty_response": empty}
    selection = picked.selection([Source(key, GENERATE, ["sample_id", "prompt_ids", "response_ids"])])
    if not selection.tokens.size:
        raise StageError(
            f"{job.key.label}: no reference is left to pack: of {of_train} for train prompts, "
            f"{too_long} are longer than `pack.max_tokens` {max_tokens} and {empty} are empty; "
            "raise `pack.max_tokens` or lower `warmup.max_new_tokens`"
        )
    return selection


def _prompt_ids(store: RunStore, split: str) -> Iterator[pa.ChunkedArray]:
    """Read the ids of a split's prompts, a shard at a time."""
    for shard in store.iterate_table(StageKey("prompts"), PROMPTS, ["prompt_id", "split"]):
        yield shard.filter(pc.equal(shard.column("split"), split)).column("prompt_id")


def _require_prompts(store: RunStore, key: StageKey) -> None:
    """Check that every reference answers a prompt of the table: held-out ones first, then train, both in its order."""
    prompts: Iterable[pa.ChunkedArray] = chain(_prompt_ids(store, "held_out"), _prompt_ids(store, "train"))
    waiting = iter(prompts)
    present: pa.ChunkedArray | None = next(waiting, None)
    for shard in store.iterate_table(key, GENERATE, ["prompt_id"]):
        asked = shard.column("prompt_id")
        while len(asked):
            if present is None:
                raise ArtifactError(
                    f"prompts: lacks `{asked[0].as_py()}`, or has it in another place than {key.label}, which answers "
                    f"held-out prompts and then train prompts in the table's order; run stage `{key.stage}` again"
                )
            unknown = np.flatnonzero(~np.asarray(pc.is_in(asked, value_set=present)))
            asked = asked.slice(int(unknown[0]) if unknown.size else len(asked))
            if len(asked):
                present = next(waiting, None)
