import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.config import OptimizerConfig
from schemas.tables import IGNORE_LABEL
from tasks.language_model.ragged import Ragged
from tasks.train.packs import without_labels
from tasks.train.schedule import EpochSampler, RoundSchedule, deal, pack_costs
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


def test_the_rate_rises_over_the_share_of_the_run_that_is_its_warm_up_and_then_falls() -> None:
    # Ten epochs of 20 steps in two rounds; the first 50 steps are a quarter of the run.
    rounds = [RoundSchedule(start, 20, 1, before, 5, 10) for start, before in ((0, 0.0), (100, 5.0))]
    optimizer = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_ratio=0.25)
    rates = [rounds[step >= 100].learning_rate(step, optimizer) for step in range(201)]
    rising = [1e-3 * step / 50 for step in range(50)]
    falling = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * step / 150)) for step in range(151)]
    assert rates == pytest.approx([*rising, *falling], rel=1e-9)
    fixed = RoundSchedule(0, 7, 1, 0.0, 3, 10, total_steps=200)
    assert [fixed.learning_rate(step, optimizer) for step in range(201)] == pytest.approx(rates, rel=1e-9)


def test_a_round_ends_with_the_step_that_its_share_of_an_epoch_was_computed_from() -> None:
    ends = {
        (steps, per_epoch): RoundSchedule(7, per_epoch, 1, 0.0, steps / per_epoch, 10).end_step
        for per_epoch in range(1, 120)
        for steps in range(1, 240)
    }
    assert ends == {(steps, per_epoch): 7 + steps for steps, per_epoch in ends}
    # A share of a step is taken whole.
    assert RoundSchedule(0, 10, 1, 0.0, 2.53, 10).end_step == 26


def test_a_round_after_one_that_ended_early_has_orders_of_its_own() -> None:
    """The epoch that the guard broke off was begun: its order is not drawn again."""
    costs = np.ones(30)
    whole, early = EpochSampler(costs, 1, 3, 2.0), EpochSampler(costs, 1, 3, 1.4)
    assert list(early) == list(whole)
    broken_off = EpochSampler(costs, 1, 3, 0.0)
    broken_off.set_epoch(1)
    assert list(early) != list(broken_off)


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


@pytest.mark.parametrize(("packs", "packs_per_step", "ranks"), [(64, 8, 4), (67, 8, 3), (5, 3, 2), (3, 2, 8)])
def test_ranks_share_the_packs_of_a_step(packs: int, packs_per_step: int, ranks: int) -> None:
    costs = np.random.default_rng(packs).lognormal(3, 1, packs)
    alone = list(EpochSampler(costs, packs_per_step, 3, 0))
    sampler = EpochSampler(costs, packs_per_step, 3, 0, ranks)
    dealt = np.array(list(sampler)).reshape(-1, ranks)
    assert len(sampler) == dealt.size
    for start in range(0, packs, packs_per_step):
        expected = alone[start : start + packs_per_step]
        micro_steps = math.ceil(len(expected) / ranks)
        step, dealt = dealt[:micro_steps], dealt[micro_steps:]
        # The packs of one process, each once; the number behind the last where there is none.
        assert sorted(step[step < packs]) == sorted(expected)
        assert (step[step >= packs] == packs).all()
    assert not dealt.size


@pytest.mark.parametrize(("packs", "packs_per_step", "ranks"), [(7, 1, 1), (67, 8, 3), (3, 2, 8)])
def test_a_rank_knows_which_packs_it_takes_next(packs: int, packs_per_step: int, ranks: int) -> None:
    costs = np.random.default_rng(packs).lognormal(3, 1, packs)
    for rank in range(ranks):
        sampler = EpochSampler(costs, packs_per_step, 3, 0, ranks, rank)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            own = list(sampler)[rank::ranks]
            for place, pack in enumerate(own):
                wanted = [] if pack == packs else [next_ for next_ in own[place + 1 : place + 4] if next_ < packs]
                assert sampler.after(pack, 3) == wanted


def test_ranks_wait_little_for_each_other() -> None:
    random = np.random.default_rng(0)
    waits, waits_in_order = [], []
    for _ in range(200):
        costs = random.lognormal(3, 0.5, 16)
        best = max(costs.sum() / 4, costs.max())
        waits.append(costs[deal(np.arange(16), costs, 4, 16)].sum(0).max() / best)
        waits_in_order.append(costs.reshape(4, 4).sum(0).max() / best)
    # Beyond what no dealing could avoid.
    assert np.mean(waits) < 1.1
    assert np.mean(waits_in_order) > 1.25


def test_dealing_a_step_does_not_go_through_all_packs() -> None:
    costs = np.ones(1_000_000)
    tracemalloc.start()
    try:
        deal(np.arange(999_936, 1_000_000), costs, 8, costs.size)
        assert tracemalloc.get_traced_memory()[1] < costs.nbytes / 100
    finally:
        tracemalloc.stop()


def test_a_rank_without_a_pack_has_nothing_to_learn() -> None:
    batch = {
        "input_ids": torch.arange(9)[None],
        "position_ids": torch.arange(9)[None],
        "labels": torch.arange(9)[None],
        "topk_ids": torch.zeros(5, 3, dtype=torch.int64),
        "sampled_logprobs": torch.zeros(5),
    }
    found = without_labels(batch)
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "input_ids": (1, 2),
        "position_ids": (1, 2),
        "labels": (1, 2),
        "topk_ids": (0, 3),
        "sampled_logprobs": (0,),
    }
    assert found["labels"].eq(IGNORE_LABEL).all()
