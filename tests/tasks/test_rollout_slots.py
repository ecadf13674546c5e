"""Decoding in slots: refilled, grown and compacted, it draws what a loop without any cache draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tasks.language_model.sources import ModelRef
from tasks.rollout import slots
from tasks.rollout.engine import LazyEngine, Requests, Responses, SamplingSettings
from tasks.rollout.sampling import choose_tokens
from tasks.rollout.seeds import sample_seed, uniforms
from tasks.rollout.slot_cache import fits_slots, grouped_attention
from tasks.rollout.slots import SlotDecoder
from tasks.rollout.static_batches import BatchDecoder
from tasks.rollout.transformers_engine import TransformersEngine
from tests.tiny_models import make_tokenizer

ENDS = (2, *range(3, 15))
LENGTHS = (3, 40, 1, 6, 90, 9, 2, 5, 17, 1, 12, 8)
SHAPE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def requests(seed: int = 0) -> Requests:
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(3, 259, length).astype(np.int32) for length in LENGTHS]
    return Requests(prompts, np.array([sample_seed(seed, 0, f"p{index}", 0) for index in range(len(prompts))]))


def settings(
    *, temperature: float = 1.3, top_p: float = 1.0, max_new_tokens: int = 30, context: int = 110
) -> SamplingSettings:
    return SamplingSettings(temperature, top_p, max_new_tokens, context, ENDS, 259)


def make_model(kind: str = "llama", **shape: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **SHAPE | shape)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def decode(model: PreTrainedModel, count: int, wanted: SamplingSettings, asked: Requests | None = None) -> Responses:
    return SlotDecoder(model, count).decode(asked or requests(), wanted, lambda n: None)


@torch.inference_mode()
def drawn_without_a_cache(model: PreTrainedModel, asked: Requests, wanted: SamplingSettings) -> list[list[int]]:
    responses = []
    for prompt, seed in zip(asked.prompts, asked.seeds, strict=True):
        draws = torch.from_numpy(uniforms(int(seed), wanted.max_new_tokens))
        ids = prompt.tolist()
        while len(ids) < wanted.context and len(ids) - len(prompt) < wanted.max_new_tokens:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1:].float()
            chosen = choose_tokens(
                logits,
                draws[len(ids) - len(prompt)][None],
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                vocab_size=wanted.vocab_size,
            )
            ids.append(int(chosen))
            if ids[-1] in wanted.end_ids:
                break
        responses.append(ids[len(prompt) :])
    return responses


def rows_of(rollouts: Responses) -> list[list[int]]:
    return [row.tolist() for row in rollouts.rows()]


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-no-groups": {"num_key_value_heads": 4},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_a_loop_without_a_cache(name: str) -> None:
    model = make_model(name.partition("-")[0], **ARCHITECTURES[name])
    assert fits_slots(model, 110)
    expected = drawn_without_a_cache(model, requests(), settings())
    assert {len(response) == 30 for response in expected} == {True, False}
    assert rows_of(decode(model, 4, settings())) == expected


@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.3, 1.0), (1.6, 0.8), (0.0, 1.0)])
def test_any_number_of_slots_draws_what_static_batches_draw(count: int, temperature: float, top_p: float) -> None:
    wanted = settings(temperature=temperature, top_p=top_p)
    expected = BatchDecoder(make_model(), 4).decode(requests(), wanted, lambda n: None)
    found = decode(make_model(), count, wanted)
    assert found.response_ids.max() < 259
    assert np.array_equal(found.offsets, expected.offsets)
    assert np.array_equal(found.response_ids, expected.response_ids)
    assert np.array_equal(found.finish_reason, expected.finish_reason)
    assert np.allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_slots_that_wait_for_each_other_to_be_filled_change_nothing() -> None:
    generator = np.random.default_rng(5)
    prompts = [generator.integers(3, 259, length).astype(np.int32) for length in generator.integers(1, 13, 90)]
    asked = Requests(prompts, np.arange(90))
    decoder = SlotDecoder(make_model(), 48)
    found = decoder.decode(asked, settings(), lambda n: None)
    assert rows_of(found) == rows_of(decode(make_model(), 7, settings(), asked))
    assert 0.85 < decoder.rows_live / decoder.rows_stepped < 1


def test_prompts_prefilled_in_several_passes_and_grown_caches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(make_model(), 6, settings(temperature=0, max_new_tokens=100, context=200))
    assert np.diff(expected.offsets).max() == 100
    monkeypatch.setattr(slots, "_PREFILL_TOKENS", 50)
    monkeypatch.setattr(slots, "_CAPACITY_STEP", 1)
    found = decode(make_model(), 6, settings(temperature=0, max_new_tokens=100, context=200))
    assert rows_of(found) == rows_of(expected)
    assert np.allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_responses_end_at_their_limit_the_end_of_the_context_or_an_end_token() -> None:
    rollouts = decode(make_model(), 4, settings(max_new_tokens=20, context=92))
    reasons = set()
    for prompt, row, reason in zip(requests().prompts, rollouts.rows(), rollouts.finish_reason, strict=True):
        stopped = row[-1] in ENDS
        assert not np.isin(row[:-1], ENDS).any()
        assert reason == ("stop" if stopped else "length")
        assert stopped or len(row) == min(20, 92 - len(prompt))
        reasons.add((str(reason), len(prompt) > 72))
    assert {("stop", False), ("length", False), ("length", True)} <= reasons


def test_a_response_of_one_token_frees_its_slot_in_the_prefill() -> None:
    asked = requests()
    whole = decode(make_model(), 3, settings())
    found = SlotDecoder(make_model(), 3)
    reports: list[int] = []
    single = found.decode(asked, settings(max_new_tokens=1), reports.append)
    assert single.response_ids.tolist() == [row[0] for row in rows_of(whole)]
    assert reports == [3] * 4
    assert found.rows_stepped == 0


def test_every_response_is_reported_once_and_free_slots_leave_the_batch() -> None:
    decoder, reports = SlotDecoder(make_model(), 4), list[int]()
    rollouts = decoder.decode(requests(), settings(), reports.append)
    lengths = np.diff(rollouts.offsets)
    assert sum(reports) == len(LENGTHS)
    # The first token of each comes with its prefill.
    assert decoder.rows_live == lengths.sum() - len(LENGTHS)
    # One slot comes free at a time and is filled before the next step; the last responses leave one by one.
    assert decoder.rows_stepped == decoder.rows_live
    batches = BatchDecoder(make_model(), 4)
    batches.decode(requests(), settings(), reports.append)
    assert batches.rows_live == lengths.sum()
    assert batches.rows_live / batches.rows_stepped < 0.9


def test_a_shard_has_the_same_bytes_whatever_was_sampled_before(tmp_path: Path) -> None:
    shards = [requests(0), requests(1), Requests(requests(2).prompts[:2], requests(2).seeds[:2])]
    engine = engine_of(tmp_path, make_model())
    first = dict(engine.generate(shards, settings(), lambda n: None))
    last = dict(engine_of(tmp_path, None).generate(shards[1:], settings(), lambda n: None))
    for number in (0, 1):
        assert first[number + 1].response_ids.tobytes() == last[number].response_ids.tobytes()
        assert first[number + 1].logprobs.tobytes() == last[number].logprobs.tobytes()


def engine_of(folder: Path, model: PreTrainedModel | None, longest: int = 110) -> TransformersEngine:
    if model is not None:
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return TransformersEngine(ModelRef(str(folder), "v", 0, 256, 259, device="cpu"), 4, longest)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("gemma2", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_a_sliding_window_is_decoded_in_batches_unless_it_covers_every_sequence(
    tmp_path: Path, kind: str, shape: dict[str, Any]
) -> None:
    narrow = make_model(kind, **shape)
    expected = drawn_without_a_cache(narrow, requests(), settings())
    engine = engine_of(tmp_path, narrow)
    ((_, found),) = engine.generate([requests()], settings(), lambda n: None)
    assert engine.counters()["decoding"] == "batches"
    assert rows_of(found) == expected
    assert not fits_slots(narrow, 17)
    if kind != "gemma2":  # caps its scores, too
        wide = make_model(kind, **shape | {"sliding_window": 110})
        assert fits_slots(wide, 110)
        few = Requests(requests().prompts[:5], requests().seeds[:5])
        assert rows_of(decode(wide, 2, settings(), few)) == drawn_without_a_cache(wide, few, settings())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("mamba", {"state_size": 4, "num_hidden_layers": 2}), ("bloom", {"n_head": 4, "n_layer": 2})],
)
def test_a_model_that_keeps_more_than_keys_and_values_is_decoded_in_batches(kind: str, shape: dict[str, Any]) -> None:
    assert not fits_slots(make_model(kind, **shape), 110)


def test_an_attention_that_was_asked_for_as_it_is_stays() -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    assert not fits_slots(model, 110)


def test_grouped_attention_is_attention_over_repeated_keys() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    mask = torch.arange(11) <= torch.tensor([[0], [4], [10]])
    output, _ = grouped_attention(torch.nn.Module(), query, key, value, mask[:, None, None], scaling=0.3)
    scores = 0.3 * query.double() @ key.double().repeat_interleave(3, dim=1).transpose(2, 3)
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    expected = (weights @ value.double().repeat_interleave(3, dim=1)).transpose(1, 2)
    assert torch.allclose(output.double(), expected, atol=1e-6)


def test_counters_say_how_it_decoded_even_after_the_engine_is_closed(tmp_path: Path) -> None:
    engine = LazyEngine(lambda: engine_of(tmp_path, make_model()))
    assert list(engine.generate([], settings(), lambda n: None)) == []
    assert engine.counters() == {"load_seconds": 0.0, "tokens_per_second": 0.0}
    assert [number for number, _ in engine.generate([requests()] * 2, settings(), lambda n: None)] == [0, 1]
    engine.close()
    counters = engine.counters()
    assert counters["decoding"] == "slots"
    assert counters["slot_use"] == 1.0
    assert counters["tokens_per_second"] != 0
