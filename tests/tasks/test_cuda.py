"""What runs on a GPU by another kernel than on a CPU, against the CPU in float64 (skipped where there is no GPU)."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.language_model.head import OutputHead, hidden_states
from tasks.language_model.loading import prefer_packed_attention
from tasks.language_model.prefill import prefill
from tasks.language_model.ragged import Ragged
from tasks.rollout.slots import SlotDecoder
from tasks.train.loss import KdForm, Kernel, Objective, Targets, loss_sums
from tests.tasks.test_packed_attention import alone, row_of
from tests.tasks.test_rollout_slots import make_model, requests, rows_of, settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# A bfloat16 number is off by up to 2^-8 of itself: 16 such roundings through two layers and back, 4 in the loss.
MODEL_TOLERANCE, LOSS_TOLERANCE = 16 * 2**-8, 4 * 2**-8
LENGTHS = [5, 17, 3, 64, 11, 1, 29]
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}


def move(model: PreTrainedModel) -> PreTrainedModel:
    return nn.Module.cuda(model)


def states_and_gradients(model: PreTrainedModel, dtype: torch.dtype, *, packed: bool) -> dict[str, Tensor]:
    """Take hidden states of a packed row, or of its sequences one by one, and every parameter's gradient."""
    device = model.device
    with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
        if packed:
            states = hidden_states(model, *(rows.to(device) for rows in row_of(LENGTHS)))[0]
        else:
            states = alone(model, LENGTHS)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(4)).to(device)
    (states.to(weights.dtype) * weights).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"states": states.detach()} | {name: grad for name, grad in found.items() if "embed" not in name}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].cpu().double() - value.double()).norm() / value.double().norm()
        assert difference <= tolerance, f"{name}: {difference:.2g}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, MODEL_TOLERANCE), (torch.float32, 1e-5)])
@pytest.mark.parametrize("window", [None, 7])
def test_a_packed_row_equals_its_sequences_alone_in_float64(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    kind, options = ("llama", WIDE) if window is None else ("mistral", WIDE | {"sliding_window": window})
    model = make_model(kind, **options)
    exact = states_and_gradients(copy.deepcopy(model).double(), torch.float64, packed=False)
    model = move(model)
    assert prefer_packed_attention(model)
    assert_close(states_and_gradients(model, dtype, packed=True), exact, tolerance)


def test_nothing_of_tokens_squared_is_made() -> None:
    model = make_model("llama", **WIDE, max_position_embeddings=65_536)
    model = move(model).bfloat16()
    assert prefer_packed_attention(model)
    ids = torch.randint(0, 259, (1, 65_536), device="cuda")
    positions = torch.arange(65_536, device="cuda")[None]
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        hidden_states(model, ids, positions)
    assert torch.cuda.max_memory_allocated() < 65_536**2  # a mask of one byte a pair


def test_prefill_equals_a_cpu_in_float64() -> None:
    model = make_model("llama", **WIDE)
    generator = np.random.default_rng(0)
    context, response = (
        Ragged.from_rows([generator.integers(3, 259, length).astype(np.int32) for length in LENGTHS]) for _ in "cr"
    )
    options: dict[str, Any] = {"batch_tokens": 96, "logits_chunk": 13, "top_k": 5}
    exact = prefill(copy.deepcopy(model).double(), context, response, **options)
    assert prefer_packed_attention(move(model))
    found = prefill(model, context, response, **options)
    np.testing.assert_allclose(found.logprobs, exact.logprobs, atol=1e-4)
    np.testing.assert_allclose(found.topk_logprobs, exact.topk_logprobs, atol=1e-4)
    assert np.mean(found.topk_ids == exact.topk_ids) > 0.99


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_slots_draw_what_they_draw_on_a_cpu(temperature: float) -> None:
    model = make_model("llama")
    wanted = settings(temperature=temperature)
    expected = SlotDecoder(model, 4).decode(requests(), wanted, lambda finished: None)
    found = SlotDecoder(move(model), 4).decode(requests(), wanted, lambda finished: None)
    assert rows_of(found) == rows_of(expected)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("form", ["truncated", "tail", "renormalized"])
def test_the_bf16_loss_equals_a_cpu_in_float64(kernel: Kernel, form: KdForm) -> None:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(203, 64, generator=generator).bfloat16()
    weight = torch.randn(1_543, 64, generator=generator).bfloat16() / 8
    logprobs, ids = torch.randn(203, 1_543, generator=generator).log_softmax(-1).topk(10, dim=-1)
    labels = torch.randint(0, 1_543, (203,), generator=generator)

    def loss(device: str, dtype: torch.dtype, kernel: Kernel) -> dict[str, Tensor]:
        projection = nn.Linear(64, 1_543, bias=False, dtype=dtype, device=device)
        with torch.no_grad():
            projection.weight.copy_(weight)
        hidden = states.clone().to(device, dtype).requires_grad_()
        places = torch.arange(203, device=device)
        targets = Targets(places, labels.to(device), ids.to(device), logprobs.to(device))
        total = loss_sums(hidden, OutputHead(projection), targets, Objective(0.9, form, 50, kernel)).loss
        total.backward()
        assert hidden.grad is not None
        assert projection.weight.grad is not None
        return {"loss": total.detach(), "states": hidden.grad, "weight": projection.weight.grad}

    assert_close(loss("cuda", torch.bfloat16, kernel), loss("cpu", torch.float64, "torch"), LOSS_TOLERANCE)
