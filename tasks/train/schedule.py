"""One cosine over all rounds, and one order of packs for every epoch of the run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from schemas.config import OptimizerConfig
from tasks.language_model.ragged import Ragged


@dataclass(frozen=True)
class RoundSchedule:
    """Where a round lies in the whole training run.

    The schedule runs over epochs, not steps: how many steps later rounds have is known only when they are packed;
    unless `train.steps_per_round` fixes the steps of all of them.

    Args:
        start_step: Optimizer steps before this round.
        packs: Packs in one epoch of this round.
        packs_per_step: Packs in one optimizer step; the last step of an epoch may have fewer.
        epochs_before: Epochs of earlier rounds; no whole number if the guard ended one early.
        epochs: Epochs of this round.
        total_epochs: Epochs of the whole run.
        total_steps: Optimizer steps of the whole run where they are fixed, which the schedule then runs over.
    """

    start_step: int
    packs: int
    packs_per_step: int
    epochs_before: float
    epochs: float
    total_epochs: int
    total_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of this round."""
        return math.ceil(self.packs / self.packs_per_step)

    @property
    def is_last(self) -> bool:
        """Whether no round comes after."""
        if self.total_steps is not None:
            return self.end_step >= self.total_steps
        return self.epochs_before + self.epochs >= self.total_epochs

    @property
    def end_step(self) -> int:
        """Optimizer steps of the run after this round."""
        # Rounded first: a share of an epoch may be a hair above the step it was computed from.
        return self.start_step + math.ceil(round(self.epochs * self.steps_per_epoch, 6))

    def epoch(self, step: int) -> float:
        """Return the epoch of the run, with its fraction, after ``step`` optimizer steps."""
        return self.epochs_before + (step - self.start_step) / self.steps_per_epoch

    def learning_rate(self, step: int, config: OptimizerConfig) -> float:
        """Return the rate after ``step`` steps: a linear rise over ``warmup_ratio`` of the run, then a cosine."""
        peak, floor, warmup_ratio = config.learning_rate, config.min_learning_rate, config.warmup_ratio
        done = self.epoch(step) / self.total_epochs if self.total_steps is None else step / self.total_steps
        progress = min(max(done, 0.0), 1.0)
        if progress < warmup_ratio:
            return peak * progress / warmup_ratio
        fall = (progress - warmup_ratio) / (1 - warmup_ratio)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * fall))


def pack_costs(seq_lengths: Ragged, width: int) -> NDArray[np.float64]:
    """Return what each pack costs to train on, in tokens' worth of matrix products.

    A transformer layer of width h spends about 24 h^2 FLOPs a token on its matrices and, causally, 2 h L on attention
    for a token of a sequence of L (Narayanan et al. 2021, arXiv 2104.04473, eq. 2 without recomputation). In units of
    the former a sequence costs L + L^2 / (12 h).

    Args:
        seq_lengths: Lengths of the sequences of each pack, tokens.
        width: Hidden size of the student.
    """
    lengths = seq_lengths.values.astype(np.float64)
    return np.add.reduceat(lengths + lengths**2 / (12 * width), seq_lengths.offsets[:-1])


def balanced_order(costs: NDArray[np.float64], packs_per_step: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return every pack once, so that the packs of one optimizer step cost about the same.

    Packs of a step run side by side on the devices that train, and the dearest is waited for. Packs are therefore
    taken in the order of their costs, shaken by up to 5% so that epochs differ in who meets whom; the steps come in
    random order. Where the packs do not divide into steps, random ones make the smaller last step.

    >>> order = balanced_order(np.array([9.0, 1.0, 5.0, 1.0, 9.0, 5.0]), 2, np.random.default_rng(0))
    >>> sorted(sorted(step) for step in order.reshape(3, 2).tolist())
    [[0, 4], [1, 3], [2, 5]]

    Args:
        costs: float64 [packs].
        packs_per_step: Packs in one optimizer step.
        random: Draws everything.
    """
    order = random.permutation(len(costs))
    if packs_per_step == 1:
        return order
    whole = len(order) - len(order) % packs_per_step
    full, last = order[:whole], order[whole:]
    shaken = costs[full] * random.uniform(0.95, 1.05, whole)
    steps = full[np.argsort(shaken, kind="stable")].reshape(-1, packs_per_step)
    return np.concatenate([random.permutation(steps).reshape(-1), last])


def deal(step: NDArray[np.int64], costs: NDArray[np.float64], ranks: int, filler: int) -> NDArray[np.int64]:
    """Return which pack of an optimizer step each rank takes in each micro-step, int64 [micro_steps, ranks].

    Ranks may wait for each other after every micro-step (FSDP2) or after all of them (DDP). So packs of like cost
    share a micro-step, and its dearest goes to the rank that has had least so far. Where packs run out a rank gets
    ``filler``.

    >>> deal(np.array([0, 1, 2]), np.array([1.0, 9.0, 8.0]), ranks=2, filler=3).tolist()
    [[1, 2], [3, 0]]

    Args:
        step: Packs of the step, int64 [packs].
        costs: Of every pack there is, float64.
        ranks: Processes that train.
        filler: Stands for no pack.
    """
    shape = math.ceil(len(step) / ranks), ranks
    order = step[np.argsort(-costs[step], kind="stable")]
    dearest_first, own_costs = np.full(shape, filler), np.zeros(shape)
    dearest_first.flat[: len(step)], own_costs.flat[: len(step)] = order, costs[order]
    dealt = np.empty(shape, np.int64)
    load = np.zeros(ranks)
    for packs, added, taken in zip(dearest_first, own_costs, dealt, strict=True):
        least_first = np.argsort(load, kind="stable")
        taken[least_first] = packs
        load[least_first] += added
    return dealt


class EpochSampler(Sampler[int]):
    """Every pack once an epoch, in an order drawn from (seed, epoch of the run) alone; see ``balanced_order``.

    With several ranks, `accelerate` gives rank r of R the indices r, r + R, ... of this order. It then lists the packs
    of each micro-step, rank after rank (see ``deal``), and the number of packs where a rank has none: the packs of an
    optimizer step stay those of one rank.
    """

    def __init__(
        self,
        costs: NDArray[np.float64],
        packs_per_step: int,
        seed: int,
        epochs_before: float,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.costs, self.packs_per_step, self.seed, self.ranks, self.rank = costs, packs_per_step, seed, ranks, rank
        self.first_epoch = math.ceil(epochs_before)
        self.epoch = 0
        self._own = np.empty(0, np.int64)
        self._place_of = np.zeros(len(costs) + 1, np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch within the round."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, last = divmod(len(self.costs), self.packs_per_step)
        micro_steps = whole * math.ceil(self.packs_per_step / self.ranks) + math.ceil(last / self.ranks)
        return micro_steps * self.ranks

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.first_epoch + self.epoch])
        order = balanced_order(self.costs, self.packs_per_step, random)
        if self.ranks > 1:
            steps = np.split(order, range(self.packs_per_step, len(order), self.packs_per_step))
            order = np.concatenate([deal(step, self.costs, self.ranks, len(order)).reshape(-1) for step in steps])
        self._own = order[self.rank :: self.ranks]
        self._place_of[self._own] = np.arange(self._own.size)
        return iter(order.tolist())

    def after(self, pack: int, count: int) -> list[int]:
        """Return the up to ``count`` packs that this rank takes next after ``pack`` in the epoch at hand."""
        if pack == len(self.costs):
            return []
        place = int(self._place_of[pack]) + 1
        found: list[int] = self._own[place : place + count].tolist()
        return [following for following in found if following < len(self.costs)]


def cosine_scheduler(
    optimizer: torch.optim.Optimizer, schedule: RoundSchedule, config: OptimizerConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return torch's scheduler for ``schedule``; its state is the step count of the run."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule.learning_rate(step, config) / config.learning_rate
    )
