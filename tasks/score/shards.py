"""The round's rollouts, read one shard at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.stage_key import StageKey
from schemas.tables import GENERATE
from tasks.language_model.ragged import Ragged
from tasks.stage import StageJob

_COLUMNS = ["sample_id", "policy_version", "prompt_ids", "response_ids", "sampled_logprobs"]


@dataclass(frozen=True)
class ScoreShard:
    """One part of the round's rollouts.

    Args:
        path: Where its scores go.
        student: Where the student's share of them waits for the teacher's.
        source: File of the rollouts.
        start: First row in the file.
        rows: Rows to score.
    """

    path: Path
    student: Path
    source: Path
    start: int
    rows: int


@dataclass(frozen=True)
class Samples:
    """Samples as columns.

    Args:
        sample_ids: Strings.
        policy_versions: Strings, the weights that sampled.
        prompts: int32 token rows.
        responses: int32 token rows.
        sampled: float32 rows, the sampler's log-probability of each response token, nats.
    """

    sample_ids: pa.Array
    policy_versions: pa.Array
    prompts: Ragged
    responses: Ragged
    sampled: Ragged

    @classmethod
    def from_table(cls, table: pa.Table) -> "Samples":
        """Take the columns of a generate table."""
        ids, versions, *lists = (table.column(name).combine_chunks() for name in _COLUMNS)
        return cls(ids, versions, *(Ragged.from_arrow(column) for column in lists))

    @property
    def tokens(self) -> int:
        """Tokens of prompts and responses."""
        return len(self.prompts.values) + len(self.responses.values)


def plan_shards(job: StageJob) -> list[ScoreShard]:
    """Cut the rollout files into shards of at most ``score.shard_samples`` rows."""
    store, source = job.store, StageKey("generate", job.round)
    size = job.config.score.shard_samples
    shards: list[ScoreShard] = []
    for record in store.finished(source).outputs:
        rows = record.rows or 0
        for start in range(0, rows, size):
            path = store.part(job.key, len(shards))
            student = store.path(job.key, f"student-{len(shards):05d}.parquet")
            shards.append(ScoreShard(path, student, store.folder / record.path, start, min(size, rows - start)))
    return shards


def read_shards(job: StageJob, shards: Sequence[ScoreShard]) -> Iterator[tuple[ScoreShard, Samples]]:
    """Read one shard after another, in the order of ``plan_shards``; no file twice."""
    for source, group in groupby(shards, key=lambda shard: shard.source):
        table = job.store.read_part(source, GENERATE, _COLUMNS)
        for shard in group:
            yield shard, Samples.from_table(table.slice(shard.start, shard.rows))


def read_rows(job: StageJob, shards: Sequence[ScoreShard], rows: NDArray[np.int64]) -> Samples:
    """Read single samples of the round.

    Args:
        job: The stage.
        shards: All of ``plan_shards``.
        rows: Which samples, ascending; at least one.
    """
    starts = np.cumsum([0, *(shard.rows for shard in shards)])
    holders = np.searchsorted(starts, rows, side="right") - 1
    parts = []
    for index in np.unique(holders):
        table = job.store.read_part(shards[index].source, GENERATE, _COLUMNS)
        parts.append(table.take(pa.array(rows[holders == index] - starts[index] + shards[index].start)))
    return Samples.from_table(pa.concat_tables(parts))
