"""Stage train: one training run over all rounds, one round of it at a time."""

from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Train the student on the round's packs (or the warm-up's), continuing where the round before stopped.

    Raises:
        DivergedError: the loss or the gradient is not finite; names the step and the packs.
    """
    from tasks.train.stage import train_round

    train_round(job)
