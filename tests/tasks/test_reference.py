from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import PromptError
from schemas.stage_key import WARMUP
from schemas.tables import GENERATE
from tasks import reference
from tasks.graph import REFERENCE
from tasks.language_model.loading import load_model, load_tokenizer
from tasks.stage import StageJob, execute
from tests.tasks.rollout_runs import HELD_OUT, TRAIN, make_run

HELD_OUT_IDS = [f"p{index:02d}" for index in range(TRAIN, TRAIN + HELD_OUT)]
TRAIN_IDS = [f"p{index:02d}" for index in range(TRAIN)]


def rows_of(root: Path, teacher_dir: Path, student_dir: Path, **sections: Any) -> list[dict[str, Any]]:
    store, config = make_run(root, teacher_dir, student_dir, **sections)
    execute(store, config, REFERENCE)
    rows: list[dict[str, Any]] = store.read_table(REFERENCE, GENERATE).to_pylist()
    return rows


def test_without_a_warmup_the_teacher_answers_held_out_prompts(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    rows = rows_of(tmp_path, teacher_dir, student_dir, evaluate={"max_new_tokens": 9})
    assert [row["prompt_id"] for row in rows] == HELD_OUT_IDS
    for row in rows:
        assert row["sample_id"] == f"ref-{row['prompt_id']}-000"
        assert (row["round"], row["policy_version"], row["policy_step"]) == (WARMUP, "teacher-weights", 0)
        assert len(row["response_ids"]) == 9 or row["finish_reason"] == "stop"
        assert len(row["response_ids"]) <= 9


def test_the_responses_are_the_teachers_own(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    import torch

    teacher = load_model(teacher_dir, device="cpu")
    for row in rows_of(tmp_path, teacher_dir, student_dir):
        with torch.inference_mode():
            logits = teacher(torch.tensor([row["prompt_ids"] + row["response_ids"]]), use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
        chosen = expected.gather(-1, torch.tensor(row["response_ids"])[:, None]).squeeze(-1)
        assert np.allclose(row["sampled_logprobs"], chosen.numpy(), atol=1e-4)


def test_the_warmup_takes_the_first_train_prompts_with_its_own_settings(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    warmup = {"prompts": 4, "temperature": 0.0, "max_new_tokens": 3}
    first = rows_of(tmp_path / "a", teacher_dir, student_dir, warmup=warmup)
    other = rows_of(tmp_path / "b", teacher_dir, student_dir, warmup=warmup, seed=99)
    assert [row["prompt_id"] for row in first] == HELD_OUT_IDS + TRAIN_IDS[:4]
    assert all(len(row["response_ids"]) <= 3 for row in first[HELD_OUT:])
    assert max(len(row["response_ids"]) for row in first[:HELD_OUT]) > 3
    # Greedy warm-up responses do not depend on the seed; held-out ones, sampled at temperature 1, do.
    assert [row["response_ids"] for row in first[HELD_OUT:]] == [row["response_ids"] for row in other[HELD_OUT:]]
    assert [row["response_ids"] for row in first[:HELD_OUT]] != [row["response_ids"] for row in other[:HELD_OUT]]


def test_answers_are_taken_as_they_are(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    rows = rows_of(tmp_path, teacher_dir, student_dir, warmup={"responses": "answers"})
    tokenizer = load_tokenizer(student_dir)
    assert [row["prompt_id"] for row in rows] == HELD_OUT_IDS + TRAIN_IDS
    for index, row in enumerate(rows[HELD_OUT:]):
        expected = tokenizer(f"answer {index}", add_special_tokens=False)["input_ids"]
        assert row["response_ids"] == [*expected, tokenizer.eos_token_id]
        assert row["response"] == f"answer {index}"
        assert (row["policy_version"], row["finish_reason"]) == ("answers", "stop")
        assert np.isnan(row["sampled_logprobs"]).all()
    assert np.isfinite(rows[0]["sampled_logprobs"]).all()


def test_a_missing_answer_is_named_before_any_model_loads(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(reference, "open_engine", refuse)
    store, config = make_run(tmp_path, teacher_dir, student_dir, answers=False, warmup={"responses": "answers"})
    with pytest.raises(PromptError, match=r"prompts\.jsonl: row 3: no answer.*1 of 7.*responses: teacher"):
        execute(store, config, REFERENCE)


def test_an_answer_beyond_the_context_is_an_error_or_left_out(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    warmup = {"responses": "answers"}
    whole = rows_of(tmp_path / "whole", teacher_dir, student_dir, warmup=warmup)
    context = max(len(row["prompt_ids"]) for row in whole) + 1
    fitting = [
        row["prompt_id"] for row in whole[HELD_OUT:] if len(row["prompt_ids"]) + len(row["response_ids"]) <= context
    ]
    assert 0 < len(fitting) < TRAIN
    store, config = make_run(tmp_path / "error", teacher_dir, student_dir, context=context, warmup=warmup)
    with pytest.raises(PromptError, match=rf"row {len(fitting) + 1}: the prompt has \d+ tokens and its answer 9"):
        execute(store, config, REFERENCE)
    dropping = {"context": context, "warmup": warmup, "prompts": {"too_long": "drop"}}
    store, config = make_run(tmp_path / "drop", teacher_dir, student_dir, **dropping)  # type: ignore[arg-type]
    manifest = execute(store, config, REFERENCE)
    rows = store.read_table(REFERENCE, GENERATE).to_pylist()
    assert [row["prompt_id"] for row in rows] == HELD_OUT_IDS + fitting
    assert manifest.counters["dropped_prompts"] == TRAIN - len(fitting)


def test_a_lost_shard_alone_is_written_again(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir, warmup={}, generate={"shard_prompts": 2})
    store.begin(REFERENCE, "fingerprint")
    first, second = StageJob(store, config, REFERENCE), StageJob(store, config, REFERENCE)
    reference.run(first)
    written = store.outputs(REFERENCE)
    assert len(written) == 2 + 4
    store.part(REFERENCE, 3).unlink()
    reference.run(second)
    assert store.outputs(REFERENCE) == written
    assert second.counters["shards_kept"] == 5
    assert second.counters["tokens"] == first.counters["tokens"]
