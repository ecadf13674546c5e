"""Which packs an optimizer step learned from: the order of a round's epochs, drawn again from the run's seed."""

import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.config import OptimizerConfig, RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.graph import MODELS, sampled_round
from tasks.language_model.ragged import Ragged

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Epochs:
    """The optimizer steps of one round, as its settings and the round before fix them.

    Args:
        settings: Of the optimizer.
        seed: The run's.
        packs: Packs in one epoch.
        start_step: Optimizer steps before the round.
        before: Epochs before the round; no whole number if the guard ended one early.
        epochs: Epochs of the round at most.
        total: Epochs of the whole run.
        total_steps: Optimizer steps of the whole run, where `train.steps_per_round` fixes them.
    """

    settings: OptimizerConfig
    seed: int
    packs: int
    start_step: int
    before: float
    epochs: float
    total: int
    total_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; the last may have fewer packs."""
        return math.ceil(self.packs / self.settings.packs_per_step)

    @property
    def end_step(self) -> int:
        """Optimizer steps after the round, unless the guard ends it early."""
        return self.start_step + math.ceil(round(self.epochs * self.steps_per_epoch, 6))

    def learning_rates(self, steps: Int64) -> NDArray[np.float64]:
        """Return the rate that each step (counted from 1) was taken with: linear warm-up, then one cosine."""
        settings = self.settings
        epoch = self.before + (steps - 1 - self.start_step) / self.steps_per_epoch
        done = epoch / self.total if self.total_steps is None else (steps - 1) / self.total_steps
        progress = np.clip(done, 0.0, 1.0)
        ratio = settings.warmup_ratio
        fall = np.maximum(progress - ratio, 0.0) / (1 - ratio)
        cosine = 0.5 * (1 + np.cos(np.pi * fall))
        floor = settings.min_learning_rate
        falling = floor + (settings.learning_rate - floor) * cosine
        if not ratio:
            return np.asarray(falling)
        return np.where(progress < ratio, settings.learning_rate * progress / ratio, falling)

    def order(self, epoch: int, costs: NDArray[np.float64]) -> Int64:
        """Return the packs of the round's epoch ``epoch`` (from 0) in the order they were trained on.

        Drawn from the seed and the epoch of the run alone. With several packs a step, packs of like cost share one.

        Args:
            epoch: Of the round.
            costs: float64 [packs]; see ``pack_costs``.
        """
        random = np.random.default_rng([self.seed, math.ceil(self.before) + epoch])
        order = random.permutation(self.packs)
        size = self.settings.packs_per_step
        if size == 1:
            return order
        whole = self.packs - self.packs % size
        shaken = costs[order[:whole]] * random.uniform(0.95, 1.05, whole)
        steps = order[:whole][np.argsort(shaken, kind="stable")].reshape(-1, size)
        return np.concatenate([random.permutation(steps).reshape(-1), order[whole:]])

    def steps_of(self, pack: int, costs: NDArray[np.float64], last_step: int) -> list[tuple[int, int]]:
        """Return (epoch of the round from 0, optimizer step from 1) of every time ``pack`` was trained on."""
        found = []
        for epoch in range(math.ceil(self.epochs)):
            place = int(np.flatnonzero(self.order(epoch, costs) == pack)[0])
            step = self.start_step + epoch * self.steps_per_epoch + place // self.settings.packs_per_step + 1
            if step <= last_step:
                found.append((epoch, step))
        return found


def epochs_of(config: RunConfig, round_index: int, packs: int, start_step: int, before: float) -> Epochs:
    """Return the epochs of a round, or of the warm-up, which is a run of its own.

    Args:
        config: The run's.
        round_index: The round; WARMUP for the warm-up.
        packs: Packs it trains on.
        start_step: Optimizer steps of the rounds before.
        before: Epochs of the rounds before.
    """
    if round_index == WARMUP:
        assert config.warmup is not None, "a warm-up that trained has settings"
        return Epochs(config.warmup, config.seed, packs, 0, 0.0, config.warmup.epochs, config.warmup.epochs)
    last = round_index == config.rounds - 1
    # The last round takes the epochs, or steps, that the guard cut off earlier ones.
    epochs = config.total_epochs - before if last else config.train.epochs_per_round
    if config.train.steps_per_round is not None and config.total_steps is not None:
        steps = config.total_steps - start_step if last else config.train.steps_per_round
        epochs = steps / math.ceil(packs / config.train.packs_per_step)
    return Epochs(config.train, config.seed, packs, start_step, before, epochs, config.total_epochs, config.total_steps)


def pack_costs(seq_lengths: Ragged, width: int) -> NDArray[np.float64]:
    """Return what each pack costs: its sequences' L + L^2 / (12 width) (Narayanan et al. 2021, arXiv 2104.04473)."""
    lengths = seq_lengths.values.astype(np.float64)
    return np.add.reduceat(lengths + lengths**2 / (12 * width), seq_lengths.offsets[:-1])


def student_width(store: RunStore) -> int | None:
    """Return the student's hidden size, which its packs' order depends on; None if its config does not say."""
    path = store.fetch(store.path(MODELS, "student", "config.json"))
    values = json.loads(path.read_text(encoding="utf-8"))
    width = values.get("text_config", values).get("hidden_size")
    return width if isinstance(width, int) else None


def pack_key(config: RunConfig, round_index: int) -> StageKey:
    """Return the stage whose packs a round trains on."""
    return StageKey("pack", sampled_round(config, round_index))
