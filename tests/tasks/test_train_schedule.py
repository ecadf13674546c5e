import math
from pathlib import Path

import numpy as np
import pytest

from tasks.language_model.ragged import Ragged
from tasks.train.schedule import EpochSampler, pack_costs
from tests.tasks.training_runs import (
    metrics,
    random_packs,
    train_rounds,
    training_run,
)


def test_learning_rate_is_one_cosine_over_all_rounds(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=2, epochs=1, packs=random_packs())
    train_rounds(store, config)
    rates = [r for index in range(2) for r in metrics(store, index).column("learning_rate").to_pylist()]
    # The rate of step s was set after s - 1 steps, of 4 in all.
    expected = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("packs", "packs_per_step"), [(1, 1), (17, 1), (64, 8), (67, 8), (5, 8), (8, 8)])
def test_every_pack_once_an_epoch_and_steps_of_like_cost(packs: int, packs_per_step: int) -> None:
    random = np.random.default_rng(packs)
    costs = random.lognormal(3, 1, packs)
    sampler = EpochSampler(costs, packs_per_step, 3, 0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(packs))
        assert orders[-1] == list(sampler)
    if packs > packs_per_step:
        assert orders[0] != orders[1]
    if packs_per_step > 1 and packs >= 64:
        whole = costs[orders[0][: packs - packs % packs_per_step]].reshape(-1, packs_per_step)
        spread = (whole.max(1) / whole.mean(1)).mean()
        shuffled = random.permutation(costs)[: whole.size].reshape(-1, packs_per_step)
        # What the step waits for beyond its mean, against packs in any order.
        assert spread - 1 < ((shuffled.max(1) / shuffled.mean(1)).mean() - 1) / 2
    # A run's epoch has one order, whichever round it falls into.
    later = EpochSampler(costs, packs_per_step, 3, 2)
    assert list(later) == orders[2]


def test_a_packs_cost_is_its_tokens_and_the_squares_of_its_sequences() -> None:
    lengths = Ragged.from_rows([np.array([100]), np.array([50, 50]), np.array([7, 1, 3])])
    expected = [100 + 100**2 / 240, 100 + 2 * 50**2 / 240, 11 + (49 + 1 + 9) / 240]
    assert pack_costs(lengths, width=20).tolist() == pytest.approx(expected)
