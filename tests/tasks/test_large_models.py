"""Teachers that do not fit: rounded to 8 or 4 bits, spread over memory and disk, never beside the student."""

import dataclasses
import gc
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaModel

from schemas.config import RunConfig
from schemas.errors import ModelError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import GENERATE, PROMPTS, TRAIN_METRICS, score_schema
from tasks.graph import BASELINE, MODELS, REFERENCE
from tasks.language_model.head import OutputHead, check_head, hidden_states, probe_states
from tasks.language_model.loading import load_model, load_ref
from tasks.language_model.packed_attention import PackedRow
from tasks.language_model.prefill import Prefill, prefill
from tasks.language_model.sources import Spread, policy_model, teacher_model
from tasks.stage import Progress, execute, no_progress
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table
from tests.tasks.rollout_runs import make_run
from tests.tasks.test_prefill import random_rows
from tests.tiny_models import make_model, save_model

SCORE, SAMPLES = StageKey("score", 0), StageKey("generate", 0)
TOP_K = 5


def prefilled(model: Any) -> Prefill:
    check_head(model)
    context, response = random_rows(2, [4, 9, 0, 3, 1, 20]), random_rows(3, [6, 1, 5, 0, 12, 8])
    return prefill(model, context, response, batch_tokens=40, logits_chunk=5, top_k=TOP_K, shared_vocab=259)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("limit", ["1KiB", "120KiB"])
def test_layers_head_and_embedding_on_disk_change_no_bit(tmp_path: Path, tie: bool, limit: str) -> None:
    """With the lower limit all of the model waits on disk, with the higher a part."""
    folder = save_model(tmp_path, make_model(seed=1, layers=4, vocab_size=264, tie=tie))
    plain = prefilled(load_model(folder, packed=True))
    model: Any = load_model(folder, packed=True, spread=Spread("auto", {"cpu": limit}))
    places = list(model.hf_device_map.values())
    assert "disk" in places
    assert ("cpu" in places) == (limit != "1KiB")
    assert model.lm_head.weight.is_meta or (tie and limit != "1KiB")
    found = prefilled(model)
    for field in dataclasses.fields(Prefill):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(plain, field.name))


def test_layers_on_another_device_find_the_packed_row_there() -> None:
    """The device that holds no data stands for a second GPU."""
    row = PackedRow.of(torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]))
    row.unserved_windows.add(2)
    there = row.at(torch.device("meta"))
    groups, places = there.layout
    assert places is not None
    tensors = [there.starts, there.band(5, 2), places, *(group.index for group in groups)]
    assert all(tensor is not None and tensor.is_meta for tensor in tensors)
    there.unserved_windows.discard(2)
    assert not row.unserved_windows
    assert row.at(torch.device("meta")) is there
    assert row.at(torch.device("cpu")) is row


@pytest.fixture(scope="module")
def sampled_run(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path
) -> tuple[RunStore, RunConfig]:
    """A run whose samples are there."""
    score = {"top_k": TOP_K, "topk_dtype": "float32", "batch_tokens": 128}
    store, config = make_run(tmp_path_factory.mktemp("sampled"), teacher_dir, student_dir, score=score)
    execute(store, config, SAMPLES)
    return store, config


def scores(store: RunStore, config: RunConfig, progress: Progress = no_progress, **teacher: Any) -> pa.Table:
    changed = config.model_copy(update={"teacher": config.teacher.model_copy(update=teacher)})
    store.supersede(SCORE)
    execute(store, changed, SCORE, progress)
    return store.read_table(SCORE, score_schema(TOP_K, "float32"))


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.05), ("int4", 0.4)])
def test_a_rounded_teacher_scores_nearly_the_same(
    sampled_run: tuple[RunStore, RunConfig], quantization: str, bound: float
) -> None:
    """Nats per token; a random model has nothing redundant, so rounding moves it more than a trained one."""
    store, config = sampled_run
    whole = scores(store, config)
    rounded = scores(store, config, quantization=quantization)
    assert rounded["student_nll"].equals(whole["student_nll"])
    gaps = [
        np.abs(rounded[f"teacher_{name}"].to_numpy() - whole[f"teacher_{name}"].to_numpy())
        for name in ("nll", "nll_uncond")
    ]
    assert all(0 < gap.mean() < bound for gap in gaps)
    logprobs = np.concatenate([np.reshape(row, (-1, TOP_K)) for row in rounded["teacher_topk_logprobs"].to_pylist()])
    ids = np.concatenate([np.reshape(row, (-1, TOP_K)) for row in rounded["teacher_topk_ids"].to_pylist()])
    assert (np.diff(logprobs) <= 0).all()
    assert (np.exp(logprobs).sum(1) <= 1 + 1e-5).all()
    assert ((ids >= 0) & (ids < 259)).all()
    assert all(len(set(row)) == TOP_K for row in ids.tolist())


def test_two_processes_share_the_teacher(sampled_run: tuple[RunStore, RunConfig]) -> None:
    store, config = sampled_run
    whole, shared = scores(store, config), scores(store, config, tensor_parallel=2)
    assert shared["teacher_topk_ids"].equals(whole["teacher_topk_ids"])
    for name in ("teacher_nll", "teacher_nll_uncond"):
        np.testing.assert_allclose(shared[name].to_numpy(), whole[name].to_numpy(), atol=1e-5)
    assert not multiprocessing.active_children()
    assert not torch.distributed.is_initialized()
    assert "RANK" not in os.environ


def test_a_rank_that_dies_is_told(sampled_run: tuple[RunStore, RunConfig]) -> None:
    store, config = sampled_run

    def kill(done: int, total: int, unit: str) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(ModelError, match=r"teacher\.tensor_parallel: rank 1 failed: .*SIGKILL"):
        scores(store, config, kill, tensor_parallel=2)
    assert not multiprocessing.active_children()


def test_heads_that_cannot_be_shared_are_told(sampled_run: tuple[RunStore, RunConfig]) -> None:
    store, config = sampled_run
    with pytest.raises(ModelError, match=r"tensor_parallel: 3 does not divide the teacher's num_attention_heads, 4"):
        scores(store, config, tensor_parallel=3)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_all_linear_layers_but_the_head_are_rounded(teacher_dir: Path, quantization: Any) -> None:
    model = load_model(teacher_dir, quantization=quantization)
    assert type(OutputHead.of(model).projection) is nn.Linear
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert kept == ["lm_head"]
    stored = {parameter.dtype for name, parameter in model.named_parameters() if name.endswith("proj.weight")}
    assert stored == {torch.int8 if quantization == "int8" else torch.uint8}


def test_four_bits_are_multiplied_in_the_type_asked_for_on_every_cpu(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with AVX512-BF16, where bitsandbytes has a kernel of its own for bfloat16."""
    import bitsandbytes.nn.modules

    states = []
    for found in (False, True):
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda found=found: found)
        model = load_model(teacher_dir, dtype="float32", quantization="int4")
        with torch.no_grad():
            states.append(probe_states(model)[0])
    assert torch.equal(*states)


def test_the_teacher_that_is_scored_is_the_one_that_samples(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    """vLLM cannot read it, so that `transformers` samples from it; a spread one too."""

    def responses(name: str, teacher: dict[str, Any], engine: str) -> list[Any]:
        store, config = make_run(
            tmp_path / name, teacher_dir, student_dir, teacher=teacher, generate={"engine": engine}
        )
        assert execute(store, config, REFERENCE).counters["engine"] == "transformers"
        found: list[Any] = store.read_table(REFERENCE, GENERATE)["response_ids"].to_pylist()
        return found

    whole = responses("whole", {}, "transformers")
    assert responses("spread", {"device_map": "auto", "max_memory": {"cpu": "120KiB"}}, "transformers") == whole
    assert responses("rounded", {"quantization": "int4"}, "vllm") != whole


@contextmanager
def loaded_together() -> Iterator[set[frozenset[int]]]:
    """Collect, each time a model runs that has not run before, the layer counts of all models then in memory."""
    seen: set[frozenset[int]] = set()
    ran: set[int] = set()

    def look(module: nn.Module, _: object) -> None:
        if isinstance(module, LlamaModel) and id(module) not in ran:
            ran.add(id(module))
            alive = (other for other in gc.get_objects() if isinstance(other, LlamaModel))
            seen.add(frozenset(other.config.num_hidden_layers for other in alive))

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def test_teacher_and_student_are_never_in_memory_together(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    """The teacher has four layers and the student two."""
    store, config = make_run(tmp_path, teacher_dir, student_dir)
    with loaded_together() as seen:
        for key in (REFERENCE, BASELINE, StageKey("evaluate", WARMUP), SAMPLES, SCORE):
            execute(store, config, key)
    assert seen == {frozenset({4}), frozenset({2})}
    with loaded_together() as seen:
        both = [load_ref(ref) for ref in (teacher_model(store, config), policy_model(store, config, 0))]
        for model in both:
            hidden_states(model, torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))
    assert seen == {frozenset({2, 4})}


def test_on_policy_training_takes_a_teacher_that_waits_on_disk(tmp_path: Path, teacher_dir: Path) -> None:
    """TRL holds both models at once; a teacher that is spread takes no room beside the student."""
    student = save_model(tmp_path / "student", make_model(seed=2, vocab_size=264))
    train = {"on_policy": {"prompts_per_step": 4}, "steps_per_round": 1, "precision": "fp32"}
    losses = []
    for name, teacher in (("whole", {}), ("spread", {"device_map": "auto", "max_memory": {"cpu": "120KiB"}})):
        store, config = make_run(tmp_path / name, teacher_dir, student, teacher=teacher, rounds=1, train=train)
        execute(store, config, StageKey("train", 0))
        path = store.path(StageKey("train", 0), "metrics.parquet")
        losses.append(store.read_part(path, TRAIN_METRICS)["loss"].to_pylist())
    assert losses[0] == losses[1]


def resolve(tmp_path: Path, teacher: dict[str, Any], student: dict[str, Any]) -> None:
    config = make_config(tmp_path, teacher=teacher, student=student)
    store = make_store(tmp_path, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"what is one": "train", "b": "held_out"})])
    execute(store, config, MODELS)


@pytest.fixture(scope="module")
def rounded_dir(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """The teacher, stored in 4 bits."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("rounded")
    load_model(teacher_dir, quantization="int4").save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(folder)
    return folder


def test_a_teacher_stored_quantized_loads_as_it_is(
    tmp_path: Path, rounded_dir: Path, teacher_dir: Path, student_dir: Path
) -> None:
    resolve(tmp_path, {"model": str(rounded_dir)}, {"model": str(student_dir)})
    with torch.no_grad():
        stored, made = (
            probe_states(m)[0] for m in (load_model(rounded_dir), load_model(teacher_dir, quantization="int4"))
        )
    assert torch.equal(stored, made)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({"quantization": "int8"}, {"model": "student"}, r"teacher\.quantization: `int8`: .*stored quantized"),
        ({}, {"model": "rounded"}, r"student\.model: its weights are stored quantized \(bitsandbytes\)"),
        ({}, {"init": "prune", "keep_layers": 2}, r"teacher\.model: its weights are stored quantized"),
    ],
)
def test_quantized_weights_are_refused_where_they_cannot_be_used(
    tmp_path: Path, rounded_dir: Path, student_dir: Path, teacher: dict[str, Any], student: dict[str, Any], message: str
) -> None:
    folders = {"student": str(student_dir), "rounded": str(rounded_dir)}
    student = {name: folders.get(value, value) if name == "model" else value for name, value in student.items()}
    with pytest.raises(ModelError, match=message):
        resolve(tmp_path, {"model": str(rounded_dir)} | teacher, student)


def test_a_quantization_that_cannot_be_read_here_is_named(tmp_path: Path, student_dir: Path) -> None:
    """GPTQ's reader is no dependency of this project."""
    teacher = make_model(seed=1)
    teacher.config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    folder = save_model(tmp_path / "gptq", teacher)
    with pytest.raises(ModelError, match=r"teacher\.model: its weights are stored quantized \(gptq\): "):
        resolve(tmp_path, {"model": str(folder)}, {"model": str(student_dir)})
