"""Scoring a round by the actors of a Ray cluster: all by the student, then all by the teacher."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from schemas.config import RayConfig
from tasks.language_model.prefill import TokensDone
from tasks.language_model.sources import policy_model, teacher_model
from tasks.language_model.tensor_parallel import load_whole
from tasks.ray_actors import joined, require_arrived
from tasks.score.results import CHECK_NAME, write_check, write_scores, write_student
from tasks.score.scoring import local_prefill
from tasks.score.shards import ScoreShard, plan_shards, read_shards
from tasks.score.stage import bare_context, samples_to_check
from tasks.stage import StageJob


@dataclass(frozen=True)
class SamplerCheck:
    """Stands for the check of the sampler among the student's shards."""


class ShardScorer:
    """One of the two models in an actor: scores one shard after another and writes each.

    Args:
        job: The stage.
        by: Which model.
    """

    def __init__(self, job: StageJob, *, by: Literal["student", "teacher"]) -> None:
        student = policy_model(job.store, job.config, job.round)
        self._job, self._by = job, by
        self._ref = student if by == "student" else teacher_model(job.store, job.config)
        self._bare = bare_context(job, student)
        self._shards = plan_shards(job)
        self._model = load_whole(self._ref)

    def __call__(self, wanted: int | SamplerCheck) -> int:
        """Score and write a shard, by its place among ``plan_shards``, or check; return the tokens passed."""
        passed: list[int] = []
        if isinstance(wanted, SamplerCheck):
            write_check(self._job, self._ref, self._model, samples_to_check(self._job, self._shards), passed.append)
            return sum(passed)
        for shard, read in read_shards(self._job, [self._shards[wanted]]):
            if self._by == "student":
                write_student(self._job, self._ref, self._model, shard, read, self._bare, passed.append)
            else:
                self._job.store.receive(shard.student, anew=True)
                teacher = local_prefill(self._model, self._job.config.score)
                write_scores(self._job, self._ref, teacher, shard, read, self._bare, passed.append)
        return sum(passed)


def score_on_ray(
    job: StageJob,
    ray: RayConfig,
    without_student: list[ScoreShard],
    unscored: list[ScoreShard],
    on_tokens: TokensDone,
    *,
    check: bool,
) -> None:
    """Write what is missing by the actors of ``ray``, each the file that one process would write.

    Args:
        job: The stage.
        ray: The cluster.
        without_student: Shards that the student has not scored yet.
        unscored: Shards without a score table that the teacher is to score here.
        on_tokens: Told the tokens of each shard.
        check: Whether the sampler's log-probabilities are to be checked, beside the first shards.

    Raises:
        NPDError: as ``tasks.ray_actors.Cluster.map``.
    """
    places = {shard.path: place for place, shard in enumerate(plan_shards(job))}
    by_student: list[int | SamplerCheck] = [places[shard.path] for shard in without_student]
    if check:
        by_student.insert(0, SamplerCheck())
    with joined(ray) as cluster:
        for tokens in cluster.map(job, partial(ShardScorer, by="student"), by_student):
            on_tokens(tokens)
        if check:
            require_arrived(job.store, job.store.path(job.key, CHECK_NAME))
        for shard in without_student:
            require_arrived(job.store, shard.student)
        for tokens in cluster.map(job, partial(ShardScorer, by="teacher"), [places[s.path] for s in unscored]):
            on_tokens(tokens)
    for shard in unscored:
        require_arrived(job.store, shard.path)
    job.counters["actors"] = ray.actors
