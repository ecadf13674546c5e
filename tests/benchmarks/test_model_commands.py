"""The benchmarks that train, score and sample run at a tiny size; and what their numbers rest on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.end_to_end import EVERY_EPOCH, HERE
from benchmarks.end_to_end_sides import note_generation
from benchmarks.loss import TRL, Problem, Result, chunk_name, distance, draw, full_kl, here, naive
from benchmarks.loss import check as check_values
from benchmarks.random_models import SHAPES, make_model
from benchmarks.random_packs import draw_top_k, pack_table
from benchmarks.train_step import Setting, layouts, sft_trainer, student
from benchmarks.utilisation import forward_flops, peak_flops, sequence_lengths
from schemas.tables import FILLER_ID, IGNORE_LABEL, pack_schema
from tests.benchmarks.test_commands import check, in_children, run_quickly


@in_children
@pytest.mark.parametrize("name", ["loss", "scoring", "train_step"])
def test_a_benchmark_of_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quickly(name, tmp_path)
    check(result, capsys.readouterr().out, name)
    assert name == "loss" or any(row["bar"] is not None for row in result["rows"])


def test_utilisation_is_told_where_the_peak_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quickly("utilisation", tmp_path)
    check(result, capsys.readouterr().out, "utilisation")
    assert not any("MFU" in row["what"] for row in result["rows"])
    result = run_quickly("utilisation", tmp_path, "--peak-tflops", "2")
    values = {row["what"]: row["median"] for row in result["rows"]}
    assert values["train, micro: MFU"] == pytest.approx(100 * values["train, micro: work"] / 2)


@pytest.mark.e2e
def test_end_to_end_counts_what_each_side_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quickly("end_to_end", tmp_path, "--epochs", "4", "--rounds", "2")
    check(result, capsys.readouterr().out, "end_to_end")
    values = {row["what"]: row["median"] for row in result["rows"]}
    for side in (EVERY_EPOCH, "DistillationTrainer", "GKDTrainer"):
        assert values[f"{side}: generated"] == values[f"{side}: trained on"]
        # 4 prompts, 4 epochs, at most 6 tokens; random models may end a response early.
        assert 0.7 * 96 <= values[f"{side}: generated"] <= 96
    assert values[f"{HERE}: trained on"] == 2 * values[f"{HERE}: generated"]
    assert {values[f"{side}: optimizer"] for side in (HERE, EVERY_EPOCH, "DistillationTrainer", "GKDTrainer")} == {8}


@pytest.mark.e2e
def test_end_to_end_asks_for_a_schedule_that_comes_out_even(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no multiple of --rounds 3"):
        run_quickly("end_to_end", tmp_path, "--rounds", "3")
    with pytest.raises(ValueError, match="drop the last batch"):
        run_quickly("end_to_end", tmp_path, "--prompts", "5")


@in_children
@pytest.mark.engine
def test_scoring_beside_vllm(tmp_path: Path) -> None:
    result = run_quickly("scoring", tmp_path, "--vllm")
    values = {row["what"]: row["median"] for row in result["rows"]}
    assert values["tokens/s over those of vLLM"] == pytest.approx(values["here"] / values["vLLM"])


def problem(**changes: Any) -> Problem:
    values: dict[str, Any] = {
        "tokens": 9,
        "hidden": 8,
        "vocab": 40,
        "top_k": 4,
        "dtype": "float32",
        "device": "cpu",
        "kd_form": "tail",
    }
    return Problem(**(values | changes))


@pytest.mark.parametrize("kd_form", ["truncated", "tail", "renormalized"])
def test_the_naive_loss_is_the_fused_one(kd_form: Any) -> None:
    inputs = draw(problem(kd_form=kd_form))
    assert distance(here(inputs, problem(kd_form=kd_form), 4)(), naive(inputs, problem(kd_form=kd_form))()) < 1e-5


def test_a_side_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_values(problem(), chunk_name(4))

    def halved(*arguments: Any) -> Any:
        loss, states, weight = naive(*arguments)()
        return lambda: Result(loss, states / 2, weight)

    monkeypatch.setattr("benchmarks.loss.here", lambda inputs, few, chunk, kernel: halved(inputs, few))
    with pytest.raises(ValueError, match="differs from the naive loss"):
        check_values(problem(), chunk_name(4))


def test_every_side_here_agrees_with_full_logits() -> None:
    for dtype in ("float32", "bfloat16"):
        for name in (chunk_name(4), TRL):
            check_values(problem(dtype=dtype, tokens=64, vocab=300), name)


def test_the_loss_of_dense_teachers_vanishes_where_the_student_is_the_teacher() -> None:
    inputs = draw(problem())
    same = inputs._replace(teacher_states=inputs.states.detach(), teacher_weight=inputs.weight.detach())
    assert abs(full_kl(same, 0.0, 1.0)().loss.item()) < 1e-6
    assert full_kl(inputs, 0.0, 1.0)().loss.item() > 0.1


def test_top_k_targets_are_different_tokens_and_leave_a_tail() -> None:
    targets = draw_top_k(50, 259, 10)
    assert all(len(set(row)) == 10 for row in targets.ids.tolist())
    assert targets.ids.max() < 259
    assert np.exp(targets.logprobs).sum(1) == pytest.approx(0.9)
    assert (np.diff(targets.logprobs, axis=1) <= 0).all()


def test_packs_meet_their_schema_and_layouts_hold_as_many_tokens() -> None:
    short, long = layouts(128, 32)
    assert short.lengths.sum() == long.lengths.sum() == 128
    table = pack_schema(4).validate(pack_table(2, short.lengths, 259, 4), "drawn")
    labels = np.array(table.column("labels").to_pylist())
    ids = np.array(table.column("teacher_topk_ids").to_pylist())
    assert ((labels == IGNORE_LABEL) == (ids == FILLER_ID).all(-1)).all()
    assert (labels[:, 0] == IGNORE_LABEL).all()


def test_sft_trainer_isolates_the_sequences_of_a_row(tmp_path: Path) -> None:
    lengths = np.array([20, 12])
    setting = Setting("micro", 2, "cpu", "fp32", packs_per_step=1, steps=1, warmup=0)
    trainer = sft_trainer(student(setting), setting, lengths, tmp_path)
    (batch,) = trainer.get_train_dataloader()
    assert batch["position_ids"].tolist() == [[*range(20), *range(12)]]

    def second_sequence() -> torch.Tensor:
        with torch.no_grad():
            return trainer.model(**batch, use_cache=False, fused_lm_head=True).log_probs[0, 20:]  # type: ignore[no-any-return]

    before = second_sequence()
    batch["input_ids"][0, :20] = 5
    assert torch.allclose(second_sequence(), before, atol=1e-6)


def test_generated_tokens_are_counted_up_to_the_end() -> None:
    class Model:
        def generate(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[9, 9, 4, 2, 0, 0], [9, 9, 4, 5, 6, 7]])

    model = Model()
    calls = note_generation(model, end_id=2)
    model.generate(input_ids=torch.zeros(2, 2))
    assert [call.tokens for call in calls] == [2 + 4]


def test_forward_flops_are_those_of_the_matrices_and_of_causal_attention() -> None:
    shape = SHAPES["micro"]
    model: LlamaForCausalLM = make_model(shape)
    layers = [w for name, w in model.named_parameters() if "layers" in name and w.ndim == 2]
    matrices = sum(weight.numel() for weight in layers)
    norms = 32 * (2 * shape.layers + 1)
    flops = forward_flops(model, np.array([3, 1]), 2)
    pairs = (1 + 2 + 3) + 1
    assert flops == 2 * 4 * (matrices + norms) + 2 * 2 * 259 * 32 + 4 * shape.layers * 32 * pairs


def test_peaks_and_lengths() -> None:
    assert peak_flops("cpu", None) is None
    assert peak_flops("cpu", 2.0) == 2e12
    lengths = sequence_lengths(16_384, 1_024)
    assert 0.95 * 16_384 <= lengths.sum() <= 16_384
    assert lengths.min() == 256
