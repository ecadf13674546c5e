"""Stage score: delta-IFD and the teacher's top-k targets of every rollout, by prefill only."""

from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Score the round's rollouts, one shard of the score table after another.

    The student is loaded, used and released before the teacher, so that the two are never in memory together.

    Raises:
        StageError: a model gave a non-finite log-probability; names the sample.
    """
    from tasks.score.stage import score_round

    score_round(job)
