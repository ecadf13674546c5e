"""One cosine over all rounds, and one order of packs for every epoch of the run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class RoundSchedule:
    """Where a round lies in the whole training run.

    The schedule runs over epochs, not steps: how many steps later rounds have is known only when they are packed.

    Args:
        start_step: Optimizer steps before this round.
        packs: Packs in one epoch of this round.
        packs_per_step: Packs in one optimizer step; the last step of an epoch may have fewer.
        epochs_before: Epochs of earlier rounds.
        epochs: Epochs of this round.
        total_epochs: Epochs of the whole run.
    """

    start_step: int
    packs: int
    packs_per_step: int
    epochs_before: int
    epochs: int
    total_epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of this round."""
        return math.ceil(self.packs / self.packs_per_step)

    @property
    def end_step(self) -> int:
        """Optimizer steps of the run after this round."""
        return self.start_step + self.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> float:
        """Return the epoch of the run, with its fraction, after ``step`` optimizer steps."""
        return self.epochs_before + (step - self.start_step) / self.steps_per_epoch

    def learning_rate(self, step: int, peak: float, floor: float, warmup_ratio: float) -> float:
        """Return the rate after ``step`` steps: a linear rise over ``warmup_ratio`` of the run, then a cosine."""
        progress = min(max(self.epoch(step) / self.total_epochs, 0.0), 1.0)
        if progress < warmup_ratio:
            return peak * progress / warmup_ratio
        fall = (progress - warmup_ratio) / (1 - warmup_ratio)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * fall))


class EpochSampler(Sampler[int]):
    """Every pack once an epoch, in an order drawn from (seed, epoch of the run) alone."""

    def __init__(self, packs: int, seed: int, epochs_before: int) -> None:
        self.packs, self.seed, self.epochs_before = packs, seed, epochs_before
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch within the round."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.packs

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epochs_before + self.epoch]).permutation(self.packs)
        return iter(order.tolist())


def cosine_scheduler(
    optimizer: torch.optim.Optimizer, schedule: RoundSchedule, peak: float, floor: float, warmup_ratio: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return torch's scheduler for ``schedule``; its state is the step count of the run."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule.learning_rate(step, peak, floor, warmup_ratio) / peak
    )
