"""From prompts to the finished files of a rollout table: one shard at a time, each kept when a stage starts again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from schemas.errors import StageError
from schemas.stage_key import WARMUP
from schemas.tables import GENERATE
from tasks.language_model.ragged import Ragged
from tasks.rollout.engine import Engine, Finished, Requests, Responses, SamplingSettings
from tasks.rollout.prompts import Asked
from tasks.rollout.seeds import sample_seed
from tasks.stage import StageJob


@dataclass(frozen=True)
class RolloutShard:
    """The samples of one file.

    Args:
        number: Of the file.
        prompts: Its prompts, as ``Asked.read`` gives them.
        prompt_ids: Prompt of each sample.
        sample_index: Number of each sample among its prompt's (int32).
        requests: Prompt tokens and seed of each sample.
    """

    number: int
    prompts: pa.Table
    prompt_ids: list[str]
    sample_index: NDArray[np.int32]
    requests: Requests


class Span(NamedTuple):
    """The prompts of one file: its number, and the first and one past the last in their group."""

    number: int
    start: int
    stop: int


class ShardCounts(NamedTuple):
    """What a finished file holds: samples, response tokens, and responses that ended with an end token."""

    samples: int
    tokens: int
    stopped: int

    @classmethod
    def of(cls, table: pa.Table) -> "ShardCounts":
        """Count the rows of a table of schema GENERATE."""
        tokens = pc.sum(pc.list_value_length(table.column("response_ids"))).as_py()
        return cls(table.num_rows, tokens, pc.sum(pc.equal(table.column("finish_reason"), "stop")).as_py())


Respond = Callable[[Iterable[RolloutShard], Finished], Iterator[tuple[RolloutShard, Responses]]]
"""Answers shards, each as soon as it is done, in any order; tells of every response."""


@dataclass(frozen=True)
class Group:
    """Prompts that are answered alike.

    Args:
        prompts: The prompts.
        respond: Answers shards of them.
        policy_version: Hash of the weights that answer; "answers" where nothing is sampled.
        policy_step: Optimizer steps these weights have had.
        round: Round the samples are for; WARMUP for references.
        samples_per_prompt: Responses for each.
    """

    prompts: Asked
    respond: Respond
    policy_version: str
    policy_step: int
    round: int
    samples_per_prompt: int = 1

    @property
    def prefix(self) -> str:
        """Begins every sample's id: unique in the run, whichever process makes it."""
        return "ref" if self.round == WARMUP else f"r{self.round:03d}"

    def shards(self, spans: Sequence[Span], run_seed: int) -> Iterator[RolloutShard]:
        """Return the samples of each span, which come in order; samples of one prompt lie together."""
        tables = self.prompts.spans((span.start, span.stop) for span in spans)
        for span, prompts in zip(spans, tables, strict=True):
            yield self._shard(span.number, prompts, run_seed)

    def _shard(self, number: int, prompts: pa.Table, run_seed: int) -> RolloutShard:
        n = self.samples_per_prompt
        ids = [prompt_id for prompt_id in prompts.column("prompt_id").to_pylist() for _ in range(n)]
        index = np.tile(np.arange(n, dtype=np.int32), prompts.num_rows)
        seeds = [sample_seed(run_seed, self.round, prompt_id, int(i)) for prompt_id, i in zip(ids, index, strict=True)]
        rows = [row for row in Ragged.from_arrow(prompts.column("tokens")).rows() for _ in range(n)]
        return RolloutShard(number, prompts, ids, index, Requests(rows, np.array(seeds, dtype=np.int64)))


def sampled(engine: Engine, settings: SamplingSettings) -> Respond:
    """Answer shards with ``engine``.

    What responds raises StageError where the model gave a token no finite log-probability; names its prompt.
    """

    def respond(shards: Iterable[RolloutShard], finished: Finished) -> Iterator[tuple[RolloutShard, Responses]]:
        asked: dict[int, RolloutShard] = {}

        def requests() -> Iterator[Requests]:
            for place, shard in enumerate(shards):
                asked[place] = shard
                yield shard.requests

        for place, rollouts in engine.generate(requests(), settings, finished):
            shard = asked.pop(place)
            _require_finite(shard, rollouts)
            yield shard, rollouts

    return respond


def _require_finite(shard: RolloutShard, rollouts: Responses) -> None:
    """Check that every token was drawn from a distribution: logits that are not finite make none."""
    bad = np.flatnonzero(~np.isfinite(rollouts.logprobs))
    if bad.size:
        samples = np.unique(np.searchsorted(rollouts.offsets, bad, side="right") - 1)
        raise StageError(
            f"the model that answers gave a non-finite log-probability in {samples.size} of {len(shard.prompt_ids)} "
            f"responses, the first to prompt {shard.prompt_ids[int(samples[0])]}. Its weights are damaged, or overflow "
            "in their dtype: in a distillation run try `teacher.dtype: float32` or `student.dtype: float32`, whichever "
            "model samples here"
        )


def rollout_table(
    group: Group, shard: RolloutShard, rollouts: Responses, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """Return one shard's samples and responses as a table of schema GENERATE."""
    samples = len(shard.prompt_ids)
    responses: Any = rollouts.rows()
    return pa.table(
        {
            "sample_id": [
                f"{group.prefix}-{prompt_id}-{index:03d}"
                for prompt_id, index in zip(shard.prompt_ids, shard.sample_index, strict=True)
            ],
            "prompt_id": shard.prompt_ids,
            "sample_index": shard.sample_index,
            "round": np.full(samples, group.round, np.int32),
            "policy_version": [group.policy_version] * samples,
            "policy_step": np.full(samples, group.policy_step, np.int64),
            "prompt_ids": Ragged.from_rows(shard.requests.prompts).to_arrow(),
            "response_ids": Ragged(rollouts.response_ids, rollouts.offsets).to_arrow(),
            "response": tokenizer.batch_decode(responses, skip_special_tokens=True),
            "finish_reason": pa.array(rollouts.finish_reason.tolist(), pa.string()),
            "sampled_logprobs": Ragged(rollouts.logprobs, rollouts.offsets).to_arrow(),
            "seed": shard.requests.seeds,
        },
        schema=GENERATE.columns,
    )


Write = Callable[[Group, Iterator[RolloutShard], Finished], Iterator[ShardCounts]]
"""Writes shards of a group and counts each that is written, in any order; tells of every response."""


def write_shards(job: StageJob, groups: Sequence[Group], write: Write) -> None:
    """Write every shard that is not there yet; count samples, tokens and how responses ended, over all shards."""
    total = sum(group.prompts.count * group.samples_per_prompt for group in groups)
    done = tokens = stopped = kept = shards = 0
    shard_prompts = job.config.generate.shard_prompts

    def finished(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, total, "samples")

    def count(counts: ShardCounts) -> None:
        nonlocal tokens, stopped
        tokens += counts.tokens
        stopped += counts.stopped

    for group in groups:
        missing: list[Span] = []
        for start in range(0, group.prompts.count, shard_prompts):
            path, stop = job.store.part(job.key, shards), min(start + shard_prompts, group.prompts.count)
            if path.exists():
                there = ShardCounts.of(job.store.read_part(path, GENERATE, ["response_ids", "finish_reason"]))
                count(there)
                finished(there.samples)
                kept += 1
            else:
                missing.append(Span(shards, start, stop))
            shards += 1
        for counts in write(group, group.shards(missing, job.config.seed), finished):
            count(counts)
    job.counters |= {
        "prompts": sum(group.prompts.count for group in groups),
        "samples": total,
        "tokens": tokens,
        "stop": stopped,
        "length": total - stopped,
        "shards": shards,
        "shards_kept": kept,
    }


def written_here(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> Write:
    """Answer and write shards in this process."""

    def write(group: Group, wanted: Iterator[RolloutShard], finished: Finished) -> Iterator[ShardCounts]:
        for shard, rollouts in group.respond(wanted, finished):
            table = rollout_table(group, shard, rollouts, tokenizer)
            job.store.write_table(job.store.part(job.key, shard.number), table, GENERATE)
            yield ShardCounts.of(table)

    return write
