"""From prompts to the finished files of a rollout table: one shard at a time, each kept when a stage starts again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from schemas.tables import GENERATE
from tasks.language_model.ragged import Ragged
from tasks.rollout.engine import Engine, Finished, Rollouts, SamplingSettings, TokenIds
from tasks.rollout.seeds import sample_seed
from tasks.stage import StageJob


@dataclass(frozen=True)
class Shard:
    """The samples of one file.

    Args:
        rows: First and one past the last prompt, in their group.
        prompt_ids: Prompt of each sample.
        sample_index: Number of each sample among its prompt's (int32).
        tokens: Prompt tokens of each sample.
        seeds: Seed of each sample (int64).
    """

    rows: tuple[int, int]
    prompt_ids: list[str]
    sample_index: NDArray[np.int32]
    tokens: list[TokenIds]
    seeds: NDArray[np.int64]


Respond = Callable[[Shard, Finished], Rollouts]


@dataclass(frozen=True)
class Group:
    """Prompts that are answered alike.

    Args:
        prompt_ids: Their ids.
        tokens: Their tokens.
        respond: Answers one shard of them.
        policy_version: Hash of the weights that answer; "answers" where nothing is sampled.
        policy_step: Optimizer steps these weights have had.
        round: Round the samples are for.
        prefix: Begins every sample's id.
        samples_per_prompt: Responses for each.
    """

    prompt_ids: list[str]
    tokens: Ragged
    respond: Respond
    policy_version: str
    policy_step: int
    round: int
    prefix: str
    samples_per_prompt: int = 1

    def shard(self, start: int, stop: int, run_seed: int) -> Shard:
        """Return the samples of prompts ``start`` to ``stop``; samples of one prompt lie together."""
        n = self.samples_per_prompt
        ids = [prompt_id for prompt_id in self.prompt_ids[start:stop] for _ in range(n)]
        index = np.tile(np.arange(n, dtype=np.int32), stop - start)
        seeds = [sample_seed(run_seed, self.round, prompt_id, int(i)) for prompt_id, i in zip(ids, index, strict=True)]
        tokens = [row for row in self.tokens.rows(start, stop) for _ in range(n)]
        return Shard((start, stop), ids, index, tokens, np.array(seeds, dtype=np.int64))


def sampled(engine: Engine, settings: SamplingSettings) -> Respond:
    """Answer shards with ``engine``."""
    return lambda shard, finished: engine.generate(shard.tokens, shard.seeds, settings, finished)


def rollout_table(group: Group, shard: Shard, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """Return one shard's samples and responses as a table of schema GENERATE."""
    samples = len(shard.prompt_ids)
    prompts = Ragged.from_rows(shard.tokens)
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
            "prompt_ids": _lists(prompts.values, prompts.offsets),
            "response_ids": _lists(rollouts.response_ids, rollouts.offsets),
            "response": tokenizer.batch_decode(responses, skip_special_tokens=True),
            "finish_reason": pa.array(rollouts.finish_reason.tolist(), pa.string()),
            "sampled_logprobs": _lists(rollouts.logprobs, rollouts.offsets),
            "seed": shard.seeds,
        },
        schema=GENERATE.columns,
    )


def write_shards(job: StageJob, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write every shard that is not there yet; count samples, tokens and how responses ended, over all shards."""
    total = sum(len(group.prompt_ids) * group.samples_per_prompt for group in groups)
    done = tokens = stopped = kept = 0
    shard_prompts = job.config.generate.shard_prompts
    spans = [
        (group, start, min(start + shard_prompts, len(group.prompt_ids)))
        for group in groups
        for start in range(0, len(group.prompt_ids), shard_prompts)
    ]

    def finished(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, total, "samples")

    for number, (group, start, stop) in enumerate(spans):
        path = job.store.part(job.key, number)
        expected = done + (stop - start) * group.samples_per_prompt
        if path.exists():
            table = job.store.read_part(path, GENERATE, ["response_ids", "finish_reason"])
            kept += 1
        else:
            shard = group.shard(start, stop, job.config.seed)
            table = rollout_table(group, shard, group.respond(shard, finished), tokenizer)
            job.store.write_table(path, table, GENERATE)
        finished(expected - done)
        tokens += pc.sum(pc.list_value_length(table.column("response_ids"))).as_py()
        stopped += pc.sum(pc.equal(table.column("finish_reason"), "stop")).as_py()
    job.counters |= {
        "prompts": sum(len(group.prompt_ids) for group in groups),
        "samples": total,
        "tokens": tokens,
        "stop": stopped,
        "length": total - stopped,
        "shards": len(spans),
        "shards_kept": kept,
    }


def _lists(values: NDArray[np.int32] | NDArray[np.float32], offsets: NDArray[np.int64]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
