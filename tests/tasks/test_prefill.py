from typing import Any

import numpy as np
import pytest
import torch

from tasks.language_model.prefill import most_likely, plan_batches, prefill, prefill_batches
from tasks.language_model.ragged import Ragged
from tests.tiny_models import make_model


def random_rows(seed: int, lengths: list[int]) -> Ragged:
    generator = np.random.default_rng(seed)
    return Ragged.from_rows([generator.integers(3, 259, length).astype(np.int32) for length in lengths])


@pytest.mark.parametrize("vocabulary", [10, 63, 64, 65, 640, 641, 1000, 4099])
@pytest.mark.parametrize("top_k", [1, 3, 10])
@pytest.mark.parametrize("kind", ["distinct", "ties", "blocks of ties", "infinite"])
def test_most_likely_is_a_stable_sort(vocabulary: int, top_k: int, kind: str) -> None:
    """Among equals the lower id comes first, also where more blocks hold the same maximum than can be searched."""
    generator = torch.Generator().manual_seed(vocabulary + top_k)
    logits = torch.randn(9, vocabulary, generator=generator) * 4
    if kind == "ties":
        logits = logits.round()
        logits[::2] *= -1  # -0.0 beside 0.0
    elif kind == "blocks of ties":
        logits = torch.full_like(logits, -2.0)
        logits[:, ::7] = 1.5
        logits[3:, 5] = logits[3:, -1] = 9.0
    elif kind == "infinite":
        logits[:, 2:] = -torch.inf
    values, ids = most_likely(logits, top_k)
    ordered = logits.double().sort(descending=True, stable=True)
    assert torch.equal(ids.long(), ordered.indices[:, :top_k])
    assert torch.equal(values.double(), ordered.values[:, :top_k])


def test_most_likely_of_a_slice_of_a_wider_tensor() -> None:
    wide = torch.randn(5, 300)
    wide[:, 259:] = 100.0
    values, ids = most_likely(wide[:3, :259], 4)
    expected = wide[:3, :259].topk(4)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids.long(), expected.indices)
    assert most_likely(wide[:0], 4)[1].shape == (0, 4)


def test_every_sequence_is_in_one_batch_and_the_short_ones_fill_the_gaps() -> None:
    generator = np.random.default_rng(1)
    lengths = np.concatenate([generator.integers(300, 700, 150), generator.integers(1, 60, 400)])
    batches = plan_batches(lengths, 1000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    fills = np.array([lengths[batch].sum() for batch in batches])
    assert fills.max() <= 1000
    assert fills[:-1].min() > 800
    assert len(batches) <= 1.1 * lengths.sum() / 1000
    assert all(lengths[batch[0]] == lengths[batch].max() for batch in batches)


def test_a_sequence_longer_than_the_budget_is_a_batch_alone() -> None:
    assert [batch.tolist() for batch in plan_batches(np.array([2, 30, 8, 0]), 10)] == [[1], [2, 0, 3]]
    assert plan_batches(np.array([], np.int64), 10) == []


def test_packed_positions_point_at_the_token_before_each_response_token() -> None:
    context, response = random_rows(0, [3, 0, 5, 2]), random_rows(1, [4, 3, 0, 1])
    seen = []
    for batch in prefill_batches(context, response, 12):
        ids, positions = batch.input_ids[0], batch.position_ids[0]
        expected = [np.concatenate([context[row], response[row]]) for row in batch.rows]
        assert ids.tolist() == np.concatenate(expected).tolist()
        assert positions.tolist() == np.concatenate([np.arange(len(row)) for row in expected]).tolist()
        assert ids[batch.states_at + 1].tolist() == response.values[batch.targets].tolist()
        assert (positions[batch.states_at + 1] > 0).all()
        seen += batch.targets.tolist()
    # The first token of the response without a context is predicted by nothing.
    assert sorted(seen) == [index for index in range(8) if index != 4]


@pytest.mark.parametrize("logits_chunk", [1, 5, 1000])
@pytest.mark.parametrize("batch_tokens", [16, 60, 4096])
def test_top_k_of_some_rows_are_those_of_all_rows(logits_chunk: int, batch_tokens: int) -> None:
    model = make_model(seed=4, vocab_size=264)
    context, response = random_rows(2, [4, 9, 0, 3, 1, 20]), random_rows(3, [6, 1, 5, 0, 12, 8])
    rows = np.array([True, False, True, True, False, True])
    options: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "logits_chunk": logits_chunk,
        "top_k": 90,
        "shared_vocab": 259,
    }
    passed: list[int] = []
    every = prefill(model, context, response, **options, on_tokens=passed.append)
    some = prefill(model, context, response, **options, topk_rows=rows)
    wanted = np.repeat(rows, response.lengths)
    np.testing.assert_array_equal(some.topk_ids, every.topk_ids[wanted])
    np.testing.assert_allclose(some.topk_logprobs, every.topk_logprobs[wanted], atol=1e-5)
    np.testing.assert_allclose(some.logprobs, every.logprobs, atol=1e-5)
    assert sum(passed) == len(context.values) + len(response.values)
    assert np.flatnonzero(np.isnan(some.logprobs)).tolist() == [int(response.offsets[2])]
    # A target's log-probability is that of the token itself where the token is among the targets.
    rows_at, places = np.nonzero(every.topk_ids == response.values[:, None])
    assert len(rows_at)
    scored = np.isfinite(every.logprobs[rows_at])
    np.testing.assert_allclose(every.topk_logprobs[rows_at, places][scored], every.logprobs[rows_at][scored], atol=1e-6)


def test_nothing_to_predict_gives_empty_results() -> None:
    found = prefill(
        make_model(seed=4), random_rows(0, [3, 2]), random_rows(0, [0, 0]), batch_tokens=16, logits_chunk=4, top_k=2
    )
    assert found.logprobs.shape == (0,)
    assert found.topk_ids.shape == found.topk_logprobs.shape == (0, 2)
