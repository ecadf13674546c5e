"""What a round (or the warm-up) trains on, where it lies in the run, and what it goes on from."""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState

from schemas.config import GuardConfig, OptimizerConfig
from schemas.stage_key import WARMUP, StageKey
from tasks.checkpoint import newest_checkpoint, read_state
from tasks.graph import sampled_round
from tasks.stage import StageJob
from tasks.train.guard import ends_round, is_over_budget
from tasks.train.packs import PackReader
from tasks.train.schedule import RoundSchedule


@dataclass(frozen=True)
class RoundPlan:
    """One round of training, as the files of the run have it now.

    Args:
        settings: Section `train` or `warmup`.
        reader: The packs.
        schedule: Where the round lies in the run.
        guard: What to do when the student leaves its sampler too far behind; None where it has none.
        checkpoint: What to continue from; None: the start model.
        state: The checkpoint's step and log.
    """

    settings: OptimizerConfig
    reader: PackReader
    schedule: RoundSchedule
    guard: GuardConfig | None
    checkpoint: Path | None
    state: TrainerState

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return is_over(self.state, self.schedule, self.guard)


def plan_round(job: StageJob) -> RoundPlan:
    """Read where the round stands.

    Raises:
        ArtifactError: its packs or its checkpoint are damaged.
    """
    store, config = job.store, job.config
    warmup = job.round == WARMUP
    settings: OptimizerConfig = config.train
    if warmup:
        assert config.warmup is not None
        settings = config.warmup
    reader = PackReader(
        [store.fetch(path) for path in store.table_files(StageKey("pack", sampled_round(config, job.round)))]
    )
    checkpoint = resume_point(job)
    return RoundPlan(
        settings=settings,
        reader=reader,
        schedule=round_schedule(job, settings, len(reader)),
        # What the student did not sample has no policy to stay near.
        guard=config.train.guard if not warmup and config.is_near_policy else None,
        checkpoint=checkpoint,
        state=TrainerState() if checkpoint is None else read_state(checkpoint),
    )


def is_over(state: TrainerState, schedule: RoundSchedule, guard: GuardConfig | None) -> bool:
    """Say whether a checkpoint's round has nothing left to train: all its steps done, or ended by the guard."""
    if state.global_step >= schedule.end_step:
        return True
    if guard is None or not ends_round(schedule, guard):
        return False
    return is_over_budget(state.log_history, schedule.start_step, guard)


def round_schedule(job: StageJob, settings: OptimizerConfig, packs: int) -> RoundSchedule:
    """Return where this round lies in the run (the warm-up is a run of its own).

    The last round takes the epochs, or steps, that the guard cut off earlier ones.
    """
    config = job.config
    if job.round == WARMUP:
        assert config.warmup is not None
        whole = config.warmup.epochs
        return RoundSchedule(0, packs, settings.packs_per_step, 0, whole, whole)
    start_step, before = 0, 0.0
    if job.round > 0:
        counters = job.store.finished(StageKey("train", job.round - 1)).counters
        start_step, before = int(counters["policy_step"]), float(counters["epochs_done"])
    last = job.round == config.rounds - 1
    epochs: float = config.total_epochs - before if last else config.train.epochs_per_round
    if config.train.steps_per_round is not None and config.total_steps is not None:
        steps = config.total_steps - start_step if last else config.train.steps_per_round
        epochs = steps / math.ceil(packs / settings.packs_per_step)
    return RoundSchedule(
        start_step=start_step,
        packs=packs,
        packs_per_step=settings.packs_per_step,
        epochs_before=before,
        epochs=epochs,
        total_epochs=config.total_epochs,
        total_steps=config.total_steps,
    )


def resume_point(job: StageJob) -> Path | None:
    """Return the checkpoint to continue from: this round's newest, else the last of the round before."""
    newest = newest_checkpoint(job)
    if newest is None and job.round > 0:
        return job.store.fetch(job.store.checkpoint(StageKey("train", job.round - 1)))
    return newest
