"""Sampling a round by the actors of a Ray cluster."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

from schemas.config import RayConfig
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.sources import answering_model, asking_student
from tasks.ray_actors import joined, require_arrived
from tasks.rollout.engine import Finished, LazyEngine, SamplingSettings, engine_name, open_engine
from tasks.rollout.prompts import Asked
from tasks.rollout.shards import Group, RolloutShard, ShardCounts, sampled, write_shards, written_here
from tasks.stage import StageJob


class Sampled(NamedTuple):
    """What an actor tells of a shard: its number, what it holds, and the counters of the actor's engine."""

    number: int
    counts: ShardCounts
    engine: dict[str, float | str]


class ShardSampler:
    """An engine in an actor: samples one shard after another and writes each.

    Shards come with their prompts' tokens; responses stay here, but for their file.

    Args:
        job: The stage.
        settings: How responses are drawn.
        longest: No prompt with its response will be longer, in tokens.
    """

    def __init__(self, job: StageJob, *, settings: SamplingSettings, longest: int) -> None:
        config = job.config
        student = asking_student(job.store, config, job.round)
        policy = answering_model(job.store, config, job.round)
        self._engine = LazyEngine(lambda: open_engine(policy, config.generate, longest))
        self._write = written_here(job, load_tokenizer(student.path, trust_remote_code=student.trust_remote_code))
        self._group = Group(
            # Shards bring theirs.
            prompts=Asked(0, 0, lambda: iter(())),
            respond=sampled(self._engine, settings),
            policy_version=policy.version,
            policy_step=policy.step,
            round=job.round,
        )

    def __call__(self, shard: RolloutShard) -> Sampled:
        """Sample and write one shard."""
        (counts,) = self._write(self._group, iter([shard]), lambda more: None)
        return Sampled(shard.number, counts, self._engine.counters())


def write_on_ray(job: StageJob, ray: RayConfig, group: Group, settings: SamplingSettings, longest: int) -> None:
    """Write the round's missing shards by the actors of ``ray``, each the file that one process would write.

    Args:
        job: The stage.
        ray: The cluster.
        group: The round's prompts.
        settings: How responses are drawn.
        longest: No prompt with its response will be longer, in tokens.

    Raises:
        NPDError: as ``tasks.ray_actors.Cluster.map``.
    """
    make = partial(ShardSampler, settings=settings, longest=longest)
    engine: dict[str, float | str] = {}

    def write(group: Group, wanted: Iterator[RolloutShard], finished: Finished) -> Iterator[ShardCounts]:
        first = next(wanted, None)
        if first is None:
            return
        with joined(ray) as cluster:
            for done in cluster.map(job, make, chain([first], wanted)):
                require_arrived(job.store, job.store.part(job.key, done.number))
                finished(done.counts.samples)
                engine.update(done.engine)
                yield done.counts

    write_shards(job, [group], write)
    # Of the actor that ended last; its rate is not the stage's.
    engine.pop("tokens_per_second", None)
    policy = answering_model(job.store, job.config, job.round)
    job.counters |= {"engine": engine_name(policy, job.config.generate), "actors": ray.actors} | engine
