import copy
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.config import ScoreConfig
from schemas.tables import score_schema
from tasks.language_model.chat import reply_header
from tasks.language_model.ragged import Ragged
from tasks.score.ifd import ifd, mean_nll
from tasks.score.stage import score_rollouts, score_table
from tests.tiny_models import make_model, make_tokenizer

EOS = 2
TOP_K = 7


def reference_logprobs(model: LlamaForCausalLM, context: list[int], response: list[int]) -> list[torch.Tensor]:
    """Log-softmax rows that predict each response token, one sequence alone, in float64."""
    if not response:
        return []
    ids = torch.tensor([context + response], dtype=torch.long)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=ids, use_cache=False).logits[0]
    rows = logits.log_softmax(-1)
    return [rows[len(context) + t - 1] for t in range(len(response)) if len(context) + t > 0]


def reference_scores(
    model: LlamaForCausalLM, prompt: list[int], bare: list[int], response: list[int]
) -> tuple[float, float]:
    conditional = [row[token] for row, token in zip(reference_logprobs(model, prompt, response), response, strict=True)]
    unconditional_rows = reference_logprobs(model, bare, response)
    skipped = len(response) - len(unconditional_rows)
    unconditional = [row[token] for row, token in zip(unconditional_rows, response[skipped:], strict=True)]
    conditional = conditional[skipped:]
    if not conditional:
        return float("nan"), float("nan")
    return -float(torch.stack(conditional).mean()), -float(torch.stack(unconditional).mean())


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    return make_model(seed=11, layers=2), make_model(seed=12, layers=3, vocab_size=264)


@pytest.fixture(scope="module")
def rollouts() -> tuple[Ragged, Ragged]:
    """Odd lengths, with and without EOS, an empty and several one-token responses."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 259, size).astype(np.int32) for size in (5, 17, 1, 9, 3, 31, 2, 8)]
    sizes = (7, 1, 13, 0, 1, 29, 4, 2)
    responses = [generator.integers(3, 259, size).astype(np.int32) for size in sizes]
    for index in (0, 2, 4):
        responses[index][-1] = EOS
    return Ragged.from_rows(prompts), Ragged.from_rows(responses)


@pytest.mark.parametrize("context", ["header", "bos", "nothing"])
@pytest.mark.parametrize("form", ["loss_ratio", "ppl_ratio"])
@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_delta_ifd_matches_float64_one_sequence_at_a_time(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM],
    rollouts: tuple[Ragged, Ragged],
    context: str,
    form: Literal["loss_ratio", "ppl_ratio"],
    batch_tokens: int,
) -> None:
    student, teacher = models
    prompts, responses = rollouts
    bare = {
        "header": reply_header(make_tokenizer()),
        "bos": np.array([0], np.int32),
        "nothing": np.array([], np.int32),  # `bos` with a tokenizer that has none
    }[context]
    settings = ScoreConfig(top_k=TOP_K, ifd_form=form, batch_tokens=batch_tokens, logits_chunk=5, topk_dtype="float32")
    by_student, by_teacher = (
        score_rollouts(model, prompts, responses, bare, settings, top_k=TOP_K, shared_vocab=259)
        for model in (student, teacher)
    )
    ids = pa.array([f"s{i}" for i in range(len(prompts))])
    table = score_schema(TOP_K, "float32").validate(
        score_table(ids, responses, by_student, by_teacher, settings), "test"
    )
    rows = table.to_pylist()
    for index, row in enumerate(rows):
        prompt, response = prompts[index].tolist(), responses[index].tolist()
        expected: dict[str, float] = {}
        for name, model in (("student", student), ("teacher", teacher)):
            conditional, unconditional = reference_scores(model, prompt, bare.tolist(), response)
            ratio = conditional / unconditional if form == "loss_ratio" else float(np.exp(conditional - unconditional))
            expected |= {f"{name}_nll": conditional, f"{name}_nll_uncond": unconditional, f"{name}_ifd": ratio}
        expected["delta_ifd"] = expected["teacher_ifd"] - expected["student_ifd"]
        assert row["response_tokens"] == len(response)
        for name, value in expected.items():
            if np.isnan(value):
                assert row[name] is None, name
            else:
                assert row[name] == pytest.approx(value, abs=1e-4), (index, name)


def test_targets_are_the_teachers_top_k_at_each_response_position(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], rollouts: tuple[Ragged, Ragged]
) -> None:
    """Over the full vocabulary, most likely first, aligned with the token they predict; padding rows are no tokens."""
    _, teacher = models
    prompts, responses = rollouts
    settings = ScoreConfig(top_k=TOP_K, batch_tokens=64, logits_chunk=3)
    scored = score_rollouts(
        teacher, prompts, responses, np.array([0], np.int32), settings, top_k=TOP_K, shared_vocab=259
    )
    for index in range(len(prompts)):
        rows = reference_logprobs(teacher, prompts[index].tolist(), responses[index].tolist())
        start = int(responses.offsets[index])
        for position, row in enumerate(rows):
            values, ids = row[:259].topk(TOP_K)
            assert scored.conditional.topk_ids[start + position].tolist() == ids.tolist()
            np.testing.assert_allclose(scored.conditional.topk_logprobs[start + position], values.numpy(), atol=1e-4)
            assert scored.conditional.logprobs[start + position] == pytest.approx(
                float(row[responses[index][position]]), abs=1e-4
            )


def test_shifting_the_targets_by_one_row_is_noticed(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], rollouts: tuple[Ragged, Ragged]
) -> None:
    _, teacher = models
    prompts, responses = rollouts
    scored = score_rollouts(
        teacher, prompts, responses, np.array([0], np.int32), ScoreConfig(top_k=1), top_k=1, shared_vocab=259
    )
    rows = reference_logprobs(teacher, prompts[5].tolist(), responses[5].tolist())
    start = int(responses.offsets[5])
    expected = [int(row[:259].argmax()) for row in rows]
    found = scored.conditional.topk_ids[:, 0]
    assert found[start : start + len(rows)].tolist() == expected
    assert found[start + 1 : start + len(rows) + 1].tolist() != expected


def test_sequences_of_one_batch_do_not_see_each_other(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], rollouts: tuple[Ragged, Ragged]
) -> None:
    """Change one sequence; the scores of the others, packed with it in one row, stay exactly as they were."""
    student, _ = models
    prompts, responses = rollouts
    settings, bare = ScoreConfig(batch_tokens=4096), np.array([0], np.int32)
    before = score_rollouts(student, prompts, responses, bare, settings, top_k=0, shared_vocab=259)
    changed = responses.values.copy()
    low, high = responses.offsets[5], responses.offsets[6]
    changed[low:high] = (changed[low:high] + 17) % 200 + 5
    after = score_rollouts(
        student, prompts, Ragged(changed, responses.offsets), bare, settings, top_k=0, shared_vocab=259
    )
    others = np.ones(len(changed), bool)
    others[low:high] = False
    np.testing.assert_array_equal(before.conditional.logprobs[others], after.conditional.logprobs[others])
    assert not np.allclose(before.conditional.logprobs[~others], after.conditional.logprobs[~others])


def test_mean_nll_of_empty_and_edge_rows() -> None:
    logprobs = Ragged(np.array([-1.0, -3.0, -2.0], np.float32), np.array([0, 0, 2, 2, 3, 3]))
    values = mean_nll(logprobs, np.array([True, True, True]))
    np.testing.assert_array_equal(values, [np.nan, 2.0, np.nan, 2.0, np.nan])
    values = mean_nll(logprobs, np.array([False, True, False]))
    np.testing.assert_array_equal(values, [np.nan, 3.0, np.nan, np.nan, np.nan])


def test_ifd_forms() -> None:
    conditional, unconditional = np.array([1.0, 2.0]), np.array([2.0, 1.0])
    np.testing.assert_allclose(ifd(conditional, unconditional, "loss_ratio"), [0.5, 2.0])
    np.testing.assert_allclose(ifd(conditional, unconditional, "ppl_ratio"), [np.exp(-1), np.e])
