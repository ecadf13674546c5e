"""Stage score: delta-IFD and the teacher's top-k targets of every rollout, by prefill only."""

from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Score the round's rollouts, one shard of the score table after another.

    The student is loaded, used and released before the teacher, so that the two are never in memory together. What it
    says of the round waits on disk, so that memory does not grow with the samples and a crash costs one shard.

    Raises:
        ArtifactError: a sampled log-probability is missing; names file and sample.
        ModelError: a model cannot be loaded, or has fewer tokens than targets were asked for.
        StageError: a model gave a non-finite log-probability, or the sampler's are not the student's; names the sample.
    """
    from tasks.score.stage import score_round

    score_round(job)
