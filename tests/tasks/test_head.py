"""The check of a model's output head: it must tell other logits from other rounding."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from schemas.errors import ModelError
from tasks.language_model import head, packed_attention
from tasks.language_model.head import OutputHead, check_head, hidden_states, rounding
from tasks.language_model.loading import prefer_packed_attention
from tests.tiny_models import make_model

DEEP = 8
"""Layers over which a difference in rounding grows to what a GPU's kernels differ by."""


def deep_model(dtype: torch.dtype) -> PreTrainedModel:
    model = make_model(seed=3, layers=DEEP, hidden=64, tie=False)
    return nn.Module.to(model, dtype=dtype)


def grouped_in_float32(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    states = grouped(query.float(), key.float(), value.float(), *others)
    return states.to(query.dtype)


grouped = packed_attention._grouped


def add_to_logits(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> None:
    """Let ``model`` do to its logits what no field of its config tells."""

    def forward_hook(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(forward_hook)


def test_a_kernel_that_rounds_in_another_way_is_no_other_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flash kernel keeps in float32 what sdpa rounds to bfloat16 between its products."""
    model = deep_model(torch.bfloat16)
    assert prefer_packed_attention(model)
    ids, positions = torch.arange(1, 6)[None], torch.arange(5)[None]
    before = OutputHead.of(model).logits(hidden_states(model, ids, positions)[0]).detach()
    monkeypatch.setattr(packed_attention, "_grouped", grouped_in_float32)
    after = OutputHead.of(model).logits(hidden_states(model, ids, positions)[0]).detach()
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)
    check_head(model)


def test_a_pass_that_is_not_the_same_twice_is_no_other_head() -> None:
    """Experts that add up in no fixed order give other last bits at every pass."""
    model = deep_model(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def shake(module: nn.Module, args: Any, output: Any) -> Any:
        states = output.last_hidden_state
        noise = torch.randn(states.shape, generator=generator) * 2e-3
        output.last_hidden_state = states * (1 + noise.to(states.dtype))
        return output

    model.base_model.register_forward_hook(shake)
    check_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "change",
    [lambda x: x * 0.97, lambda x: 15 * torch.tanh(x / 15), lambda x: x + torch.linspace(-0.2, 0.2, x.shape[-1])],
    ids=["scale", "softcap", "bias"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_logits_that_are_changed_unknown_to_us_are_refused(
    change: Callable[[Tensor], Tensor], dtype: torch.dtype, packed: bool
) -> None:
    model = deep_model(dtype)
    if packed:
        prefer_packed_attention(model)
    check_head(model)
    add_to_logits(model, change)
    with pytest.raises(ModelError, match="LlamaForCausalLM transforms its logits"):
        check_head(model)


def test_states_that_are_changed_between_body_and_head_are_refused() -> None:
    """As MiniCPM divides them."""

    class Divided(LlamaForCausalLM):
        def forward(self, **options: Any) -> Any:
            output = self.model(**options)
            output.logits = self.lm_head(output.last_hidden_state / 4)
            return output

    model: PreTrainedModel = make_model(seed=3)
    model.__class__ = Divided
    with pytest.raises(ModelError, match=r"Divided .* of other hidden states"):
        check_head(model)


@pytest.mark.parametrize("config", [{"final_logit_softcapping": 3.0}, {"logit_scale": 0.25}, {"logits_scaling": 5.0}])
def test_what_the_config_tells_of_the_logits_is_followed(config: dict[str, float]) -> None:
    model = deep_model(torch.float32)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "final_logit_softcapping": lambda x: 3 * torch.tanh(x / 3),
        "logit_scale": lambda x: x * 0.25,
        "logits_scaling": lambda x: x / 5,
    }
    ((name, value),) = config.items()
    setattr(model.config, name, value)
    with pytest.raises(ModelError, match="transforms its logits"):
        check_head(model)
    add_to_logits(model, changes[name])
    check_head(model)


@pytest.mark.parametrize("packed", [False, True])
def test_under_autocast_the_check_allows_for_bfloat16_and_sees_a_leak_all_the_same(packed: bool) -> None:
    model = deep_model(torch.float32)
    if packed:
        assert prefer_packed_attention(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_head(model)
        add_to_logits(model, lambda logits: logits * 0.97)
        with pytest.raises(ModelError, match="transforms its logits"):
            check_head(model)
        model = deep_model(torch.float32)
        with pytest.raises(ModelError, match="see each other"), patch.object(head, "hidden_states", leaking_states):
            check_head(model)


def leaking_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """All of a row as one sequence, whose positions are right."""
    mask = torch.ones(input_ids.shape, dtype=torch.int64)
    options: dict[str, Any] = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False}
    states: Tensor = model.base_model(input_ids=input_ids, **options).last_hidden_state
    return states


def test_rounding_is_that_of_what_computes() -> None:
    model = deep_model(torch.float32)
    exact = rounding(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert rounding(model) == rounding(deep_model(torch.bfloat16)) > exact


def test_weights_that_are_not_finite_are_named() -> None:
    model = deep_model(torch.float32)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        check_head(model)
