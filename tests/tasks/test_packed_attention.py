import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from schemas.errors import ModelError
from tasks.language_model.head import check_head, check_isolation, hidden_states, pad_rows_if_needed, pads_rows
from tasks.language_model.loading import load_model, prefer_packed_attention
from tasks.language_model.packed_attention import (
    PACKED_SEQUENCES,
    PackedRow,
    _varlen,
    length_groups,
    packed_attention,
    packed_mask,
    packed_row,
)
from tests.tiny_models import make_model, save_model

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WINDOW = 7
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES),
    "llama_mha": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
}
GEMMA2 = Gemma2Config(
    **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
)
ROWS = {
    "one": [13],
    "odd": [5, 17, 3, 11, 29],
    "single_tokens": [1, 4, 1, 1, 9, 1],
    "equal": [6] * 9,
    "one_long": [2, 61, 3, 2, 4, 3, 5],
}


def make(config: Any, attention: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    ready: PreTrainedModel = model.eval()
    return ready


def make_packed(config: Any) -> PreTrainedModel:
    model = make(config)
    assert prefer_packed_attention(model)
    return model


def row_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, SIZES["vocab_size"], (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def alone(model: PreTrainedModel, lengths: list[int]) -> Tensor:
    ids, positions = (rows.to(model.device) for rows in row_of(lengths))
    pairs = zip(ids.split(lengths, dim=1), positions.split(lengths, dim=1), strict=True)
    return torch.cat([hidden_states(model, *pair)[0] for pair in pairs])


def gradients(model: PreTrainedModel, states: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    (states.float() * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        difference = (ours[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        assert difference <= tolerance, f"{name}: {difference:.2g}"


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_packed_row_equals_each_sequence_alone(config: Any, lengths: list[int]) -> None:
    model, reference = make_packed(config), make(config, "eager")
    states = hidden_states(model, *row_of(lengths))[0]
    expected = alone(reference, lengths)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, states), gradients(reference, expected))


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_what_packed_attention_cannot_do_stays_with_transformers(lengths: list[int]) -> None:
    model = make(GEMMA2)  # caps its attention scores
    assert not prefer_packed_attention(model)
    assert model.config._attn_implementation == "sdpa"
    states = hidden_states(model, *row_of(lengths))[0]
    expected = alone(model, lengths)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    ours = gradients(model, states)
    assert_same_gradients(ours, gradients(model, expected))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    model = make_packed(ARCHITECTURES[name]).train()
    row = row_of(ROWS["odd"])
    expected = gradients(model, hidden_states(model, *row)[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(gradients(model, hidden_states(model, *row)[0]), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_bf16_autocast_loses_only_bf16_precision(name: str) -> None:
    model, reference = make_packed(ARCHITECTURES[name]), make(ARCHITECTURES[name], "eager")
    with torch.autocast("cpu", torch.bfloat16):
        states = hidden_states(model, *row_of(ROWS["odd"]))[0]
    expected = alone(reference, ROWS["odd"])
    assert (states - expected).norm() <= 0.03 * expected.norm()
    assert_same_gradients(gradients(model, states), gradients(reference, expected), tolerance=0.05)


class LargestOutput(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        sizes = [output.untyped_storage().nbytes() for output in outputs if isinstance(output, Tensor)]
        self.size = max([self.size, *sizes])
        return result


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_nothing_of_tokens_squared_is_made(name: str) -> None:
    lengths = [700, 48, 300, 1000]
    squared = sum(lengths) ** 2  # bytes of even a mask of one byte an entry

    def largest(model: PreTrainedModel) -> int:
        watch = LargestOutput()  # type: ignore[no-untyped-call]
        with watch:
            hidden_states(model, *row_of(lengths)).sum().backward()
        return watch.size

    config = copy.deepcopy(ARCHITECTURES[name])
    assert largest(make(config)) >= squared
    if name == "mistral":
        config.sliding_window = 1000
    assert largest(make_packed(config)) < squared


def test_an_exported_model_knows_nothing_of_packed_attention(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "student", make_model(seed=2))
    model = load_model(folder, device="cpu", packed=True)
    assert model.config._attn_implementation == PACKED_SEQUENCES
    model.save_pretrained(tmp_path / "export")
    assert PACKED_SEQUENCES not in (tmp_path / "export" / "config.json").read_text(encoding="utf-8")
    assert "attn" not in " ".join(json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8")))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.config._attn_implementation == "sdpa"
    row = row_of(ROWS["odd"])
    torch.testing.assert_close(hidden_states(exported, *row), hidden_states(model, *row), rtol=1e-5, atol=1e-5)


def test_packed_attention_is_used_only_where_asked_for_and_nothing_else_was(tmp_path: Path) -> None:
    folder = save_model(tmp_path, make_model(seed=2))
    assert load_model(folder, device="cpu").config._attn_implementation == "sdpa"
    chosen = load_model(folder, device="cpu", attn_implementation="eager", packed=True)
    assert chosen.config._attn_implementation == "eager"


def test_padded_and_cached_calls_stay_as_they_were() -> None:
    plain, packed = make(ARCHITECTURES["mistral"]), make_packed(ARCHITECTURES["mistral"])
    ids = row_of([24])[0].view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    generated, expected = packed.generate(ids, **options), plain.generate(ids, **options)  # type: ignore[operator]
    assert torch.equal(generated, expected)
    torch.testing.assert_close(packed(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


def test_a_packed_call_without_the_row_is_isolated_too() -> None:
    model = make_packed(ARCHITECTURES["llama"])
    ids, positions = row_of(ROWS["odd"])
    states = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(states, hidden_states(model, ids, positions), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED_SEQUENCES])
def test_models_that_isolate_pass_the_check(attention: str) -> None:
    check_head(make(ARCHITECTURES["llama"], attention))


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2),
        # No positions reach its masks.
        GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
        Qwen3NextConfig(
            **SIZES,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ],
    ids=["mamba", "gpt_oss", "alibi", "linear_attention"],
)
def test_a_model_that_cannot_take_a_row_gets_padded_batches(config: Any) -> None:
    model, reference = make(config), make(config, "eager")
    prefer_packed_attention(model)
    with pytest.raises(ModelError, match=rf"{type(model).__name__}.*see each other.*attn_implementation"):
        check_isolation(model)
    pad_rows_if_needed(model)
    check_head(model)
    states, expected = hidden_states(model, *row_of(ROWS["odd"]))[0], alone(reference, ROWS["odd"])
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, states), gradients(reference, expected))


def test_a_model_that_can_take_a_row_gets_it() -> None:
    model = make_packed(ARCHITECTURES["llama"])
    pad_rows_if_needed(model)
    assert not pads_rows(model)


@pytest.mark.parametrize(
    ("options", "what"), [({"softcap": 30.0}, "softcap"), ({"s_aux": torch.zeros(4)}, "s_aux"), ({}, "later tokens")]
)
def test_an_attention_it_cannot_do_is_refused(options: dict[str, Any], what: str) -> None:
    states = torch.zeros(1, 4, 3, 8)
    row = PackedRow.of(torch.arange(3)[None])
    with pytest.raises(ModelError, match=what):
        packed_attention(torch.nn.Identity(), states, states, states, None, is_causal=False, packed_row=row, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_mask": torch.ones(1, 3)},
        {"attention_mask": None, "use_vmap": True},
        {"attention_mask": None, "allow_is_bidirectional_skip": True},
        {"attention_mask": None, "allow_is_causal_skip": False},
    ],
    ids=["padding", "own_mask", "bidirectional", "needed"],
)
def test_a_mask_that_it_would_leave_out_is_refused(options: dict[str, Any]) -> None:
    model = make_packed(ARCHITECTURES["llama"])
    with packed_row(model, torch.arange(3)[None]), pytest.raises(ModelError, match="mask of the model's own"):
        packed_mask(config=model.config, **options)


def test_a_window_that_no_layer_applies_is_refused() -> None:
    model = make_packed(ARCHITECTURES["llama"])
    with pytest.raises(ModelError, match="within 7 tokens"), packed_row(model, torch.arange(3)[None]):
        packed_mask(config=model.config, attention_mask=None, local_size=WINDOW)


def test_sequences_are_read_off_the_positions() -> None:
    row = PackedRow.of(row_of([3, 1, 1, 4])[1])
    assert row.starts.tolist() == [0, 3, 4, 5, 9]
    assert row.starts.dtype == torch.int32
    assert row.lengths.tolist() == [3, 1, 1, 4]
    assert row.longest == 4


def test_little_of_a_group_is_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 3000).astype(np.int64) + 1
    groups = length_groups(lengths)
    assert sorted(np.concatenate(groups).tolist()) == list(range(3000))
    assert all(lengths[rows].min() >= 0.8 * lengths[rows].max() for rows in groups)
    assert len(groups) < 60


def test_the_varlen_kernel_takes_our_call() -> None:
    # No kernel runs on the meta device: this checks names, shapes and dtypes of the call and of its backward.
    def states(heads: int) -> Tensor:
        return torch.empty(9, heads, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)

    row = PackedRow(torch.empty(5, dtype=torch.int32, device="meta"), np.array([3, 1, 1, 4]))
    query, key, value = states(4), states(2), states(2)
    output = _varlen(query, key, value, row, 0.25, 2, 0.0)
    assert output.shape == query.shape
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("packed", [False, True])
def test_a_cap_on_attention_scores_is_never_left_out(tmp_path: Path, packed: bool) -> None:
    """transformers' default for Gemma 2, sdpa, ignores the cap."""
    config = copy.deepcopy(GEMMA2)
    config.attn_logit_softcapping = 1.0
    make(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", packed=packed)
    states = hidden_states(model, *row_of(ROWS["odd"]))[0]
    expected = alone(make(config, "eager"), ROWS["odd"])
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, alone(make(config, "sdpa"), ROWS["odd"]), atol=1e-2)
