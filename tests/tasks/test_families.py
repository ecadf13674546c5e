"""Families of models on every fast path, against a plain pass over each sequence alone."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tasks.language_model.head import OutputHead, check_head, hidden_states, pad_rows_if_needed
from tasks.language_model.loading import prefer_packed_attention
from tasks.language_model.prefill import prefill
from tasks.language_model.ragged import Ragged
from tasks.rollout.engine import Requests, SamplingSettings
from tasks.rollout.slot_cache import fits_slots
from tasks.rollout.slots import SlotDecoder
from tasks.rollout.static_batches import BatchDecoder
from tasks.train.loss import Objective, Targets, loss_sums

WINDOW = 16
"""Wider than what a model is looked at with when it is loaded, and narrower than the sequences here."""
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": WINDOW}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "logits_scaling": 2.0,
    },
    "gpt_oss": SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
    # In a row its chunks, and what it scales by position, would count from the row's start.
    "llama4_text": {
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "attention_chunk_size": WINDOW,
        "floor_scale": 64,
    },
    "ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
    "deepseek_v3": LATENT | ROUTED | {"num_key_value_heads": 4, "head_dim": 4, "n_group": 2, "topk_group": 1},
    "glm4_moe": ROUTED,
    "gemma3n_text": SLIDING
    | {"num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2, "num_kv_shared_layers": 2}
    | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
    | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": SLIDING
    | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "global_head_dim": 16},
    "hyperclovax": {"logits_scaling": 2.0},
    "cohere2": SLIDING | {"logit_scale": 0.25},
}
PROMPTS = (3, 30, 1, 6, 25, 9)
RESPONSES = (7, 12, 4, 20, 3, 11)


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **copy.deepcopy(SHAPE | FAMILIES[kind])))
    ready: PreTrainedModel = model.eval()
    return ready


def rows(lengths: tuple[int, ...], seed: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 97, length).astype(np.int32) for length in lengths]


def logprobs_alone(model: PreTrainedModel, prompt: Any, response: Any) -> Tensor:
    """Return float64 log-probabilities [response, vocabulary] of what may follow at each place of the response."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_losses_and_samples_are_those_of_a_plain_pass(kind: str) -> None:
    model, reference = make(kind), make(kind)
    decoder = SlotDecoder(make(kind), 4) if fits_slots(model, 64) else BatchDecoder(make(kind), 6)
    prefer_packed_attention(model)
    pad_rows_if_needed(model)
    check_head(model)
    prompts, responses = rows(PROMPTS, 0), rows(RESPONSES, 1)
    expected = torch.cat([logprobs_alone(reference, *pair) for pair in zip(prompts, responses, strict=True)])
    labels = torch.from_numpy(np.concatenate(responses).astype(np.int64))
    best = expected.topk(5)

    found = prefill(
        model, Ragged.from_rows(prompts), Ragged.from_rows(responses), batch_tokens=90, logits_chunk=16, top_k=5
    )
    scores = expected.gather(1, labels[:, None])
    np.testing.assert_allclose(found.logprobs, scores.detach()[:, 0], atol=2e-5)
    np.testing.assert_allclose(found.topk_logprobs, best.values.detach(), atol=2e-5)

    lengths = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    ends = np.cumsum(lengths)
    places = np.concatenate([np.arange(e - n - 1, e - 1) for e, n in zip(ends, RESPONSES, strict=True)])
    pairs = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    ids = torch.from_numpy(np.concatenate(pairs).astype(np.int64))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    # What one learns from another model's top k: here the one before the last of its own.
    taught = expected.detach().roll(1, 0).topk(4)
    targets = Targets(torch.from_numpy(places), labels, taught.indices, taught.values.float())
    loss = loss_sums(
        hidden_states(model, ids, positions)[0], OutputHead.of(model), targets, Objective(0.9, "truncated", 16)
    ).loss
    kd = (taught.values.exp() * (taught.values - expected.gather(1, taught.indices))).sum()
    plain = 0.9 * kd - 0.1 * scores.sum()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    loss.backward()
    plain.backward()
    ours, theirs = ({n: w.grad for n, w in m.named_parameters() if w.grad is not None} for m in (model, reference))
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 2e-5 * float(gradient.norm()) + 1e-6 * largest, name

    sampled = decoder.decode(
        Requests(prompts, np.zeros(6, np.int64)), SamplingSettings(0.0, 1.0, 6, 64, (2,), 97), lambda count: None
    )
    with torch.no_grad():
        said = torch.cat([logprobs_alone(reference, *pair) for pair in zip(prompts, sampled.rows(), strict=True)])
    assert said.argmax(-1).tolist() == sampled.response_ids.tolist()
    np.testing.assert_allclose(sampled.logprobs, said.max(-1).values, atol=1e-4)
