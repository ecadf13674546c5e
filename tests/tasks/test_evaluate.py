"""Evaluation on held-out prompts: means against plain references, and the stages on real tiny models."""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from schemas.config import DevicesConfig
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import (
    AGREEMENT_METRICS,
    EVALUATE_METRICS,
    EVALUATE_RESPONSES,
    GENERATE,
    METRICS_FILE,
    PROMPTS,
    RESPONSES_FILE,
    pack_schema,
)
from tasks.evaluate.agreement import compare_with_teacher, keep_states
from tasks.evaluate.means import grouped_mean, repetition, response_means
from tasks.evaluate.resolution import detectable_difference, noisiest_accuracy, prompts_needed
from tasks.evaluate.responses import Sampling
from tasks.evaluate.stage import held_out_references
from tasks.graph import BASELINE, REFERENCE, loop
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import result_model
from tasks.prompts.messages import prompt_id
from tasks.stage import StageJob, execute
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table, rollout_table, split_rows
from tests.test_loop import run_loop, smoke_config
from tests.tiny_models import make_model


def evaluated(store: RunStore, key: StageKey) -> dict[tuple[str, str], dict[str, Any]]:
    table = store.read_part(store.path(key, METRICS_FILE), EVALUATE_METRICS)
    return {(row["model"], row["metric"]): row for row in table.to_pylist()}


def responses_of(store: RunStore, key: StageKey) -> pa.Table:
    return store.read_part(store.path(key, RESPONSES_FILE), EVALUATE_RESPONSES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path) -> RunStore:
    """A finished run of one round on prompts with answers, two sampled responses to each held-out prompt."""
    root = tmp_path_factory.mktemp("evaluated")
    path = root / "asks.jsonl"
    rows = [{"prompt": f"What is {n} + {n}?", **({"answer": str(2 * n)} if n % 3 else {})} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = [
        f"prompts.sources=[{{type: jsonl, path: {path}}}]",
        "rounds=1",
        "evaluate.temperature=1",
        "evaluate.samples_per_prompt=2",
        "generate.shard_prompts=4",
    ]
    return run_loop(smoke_config(root, teacher_dir, student_dir, *settings))[0]


def test_a_grouped_mean_is_the_ratio_estimator() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.normal(size=offsets[-1])
    groups = [values[a:b] for a, b in pairwise(offsets) if b > a]
    mean = sum(float(g.sum()) for g in groups) / sum(len(g) for g in groups)
    squares = sum((float(g.sum()) - mean * len(g)) ** 2 for g in groups)
    stderr = math.sqrt(len(groups) / (len(groups) - 1) * squares) / len(values)
    found = grouped_mean(values, offsets)
    assert found.value == pytest.approx(mean)
    assert found.stderr == pytest.approx(stderr)
    assert found.n == len(values)
    # Groups of one: the plain standard error of a mean.
    plain = grouped_mean(values, np.arange(len(values) + 1))
    assert plain.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))


@pytest.mark.parametrize(("batch_tokens", "logits_chunk"), [(16, 2), (4096, 512)])
def test_agreement_is_that_of_float64_one_sequence_at_a_time(
    tmp_path: Path, batch_tokens: int, logits_chunk: int
) -> None:
    """The teacher's five further rows of vocabulary, likely ones, are no tokens."""
    teacher, student = make_model(seed=1, layers=3, vocab_size=264, tie=False), make_model(seed=2)
    with torch.no_grad():
        teacher.lm_head.weight[259:] *= 9
    rng = np.random.default_rng(4)
    prompts, responses = (
        Ragged.from_rows([rng.integers(3, 259, size).astype(np.int32) for size in sizes])
        for sizes in ((4, 1, 9, 3), (5, 7, 0, 1))
    )
    passed: list[int] = []
    kept = keep_states(student, prompts, responses, tmp_path, batch_tokens, passed.append)
    found = compare_with_teacher(
        teacher,
        kept,
        prompts,
        responses,
        batch_tokens=batch_tokens,
        logits_chunk=logits_chunk,
        on_tokens=passed.append,
    )
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in AGREEMENT_METRICS}
    for prompt, response in zip(prompts.rows(), responses.rows(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            p, q = (
                copy.deepcopy(model).double()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :259]
                for model in (teacher, student)
            )
        p, q = p.softmax(-1), q.softmax(-1)
        expected["kl_teacher_student"].append((p * (p / q).log()).sum(-1))
        expected["kl_student_teacher"].append((q * (q / p).log()).sum(-1))
        expected["top1_agreement"].append((p.argmax(-1) == q.argmax(-1)).double())
    assert list(found) == list(expected)
    for name, values in expected.items():
        mean = grouped_mean(torch.cat(values).numpy(), responses.offsets)
        assert (found[name].value, found[name].stderr) == pytest.approx((mean.value, mean.stderr), rel=1e-4), name
        assert found[name].n == 13
    assert found["kl_teacher_student"].value != pytest.approx(found["kl_student_teacher"].value, rel=1e-2)
    assert sum(passed) == 2 * (17 + 13)


def test_repetition_counts_four_grams_again() -> None:
    rng = np.random.default_rng(1)
    for length in (0, 3, 4, 5, 40, 300):
        tokens = rng.integers(0, 3, length).astype(np.int32)
        grams = [tuple(tokens[i : i + 4]) for i in range(length - 3)]
        expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
        assert repetition(tokens) == pytest.approx(expected)


def test_response_means_count_what_is_checked() -> None:
    table = pa.table(
        {
            "model": ["student"] * 6,
            "round": pa.array([0] * 6, pa.int32()),
            "prompt_id": ["a", "a", "b", "b", "c", "c"],
            "sample_index": pa.array([0, 1] * 3, pa.int32()),
            "response": [""] * 6,
            "response_tokens": pa.array([1, 3, 5, 7, 9, 11], pa.int32()),
            "finish_reason": ["stop", "length", "stop", "stop", "length", "length"],
            "score": [1.0, 0.5, None, None, 1.0, 1.0],
            "repetition": [0.0, 0.5, 0.0, 0.0, 0.0, 0.25],
        },
        schema=EVALUATE_RESPONSES.columns,
    )
    found = response_means(table)
    # Part of a point is not right; prompts "a" and "c" have means 1/2 and 1.
    assert (found["accuracy"].value, found["accuracy"].n) == (0.75, 4)
    assert found["accuracy"].stderr == pytest.approx(np.std([0.5, 1.0], ddof=1) / math.sqrt(2))
    assert (found["response_tokens"].value, found["truncation_rate"].value) == (6.0, 0.5)
    assert (found["repetition"].value, found["repetition"].n) == (0.125, 6)
    unchecked = table.set_column(7, "score", pa.nulls(6, pa.float64()))
    assert "accuracy" not in response_means(unchecked)


def test_the_detectable_difference_is_where_the_interval_begins_to_leave_out_zero() -> None:
    rng = np.random.default_rng(2)
    accuracy, prompts = 0.4, 500
    difference = detectable_difference(accuracy, prompts)
    # Two models that are equally good differ by more than that in one comparison of twenty.
    pairs = rng.binomial(prompts, accuracy, (200_000, 2)) / prompts
    assert np.mean(np.abs(pairs[:, 0] - pairs[:, 1]) > difference) == pytest.approx(0.05, abs=0.01)
    needed = prompts_needed(accuracy, prompts)
    assert detectable_difference(accuracy, needed) == pytest.approx(0.02, rel=0.01)
    assert detectable_difference(0.0, 32) > 0.02


@pytest.mark.parametrize(("accuracy", "prompts"), [(0.0, 32), (1.0, 500), (0.4, 500), (0.97, 7)])
def test_resolution_follows_the_formula_and_one_half_is_the_hardest(accuracy: float, prompts: int) -> None:
    z = 1.959963984540054
    p = (accuracy * prompts + z**2 / 2) / (prompts + z**2)
    assert detectable_difference(accuracy, prompts) == pytest.approx(z * math.sqrt(2 * p * (1 - p) / prompts))
    assert prompts_needed(accuracy, prompts, 0.05) == math.ceil(2 * p * (1 - p) * (z / 0.05) ** 2)
    assert detectable_difference(accuracy, prompts) <= detectable_difference(0.5, prompts)


def test_what_teacher_and_start_promise_holds_for_every_student_between_them() -> None:
    rng = np.random.default_rng(3)
    for low, high in np.sort(rng.random((50, 2)), axis=1):
        promised = detectable_difference(noisiest_accuracy([high, low]), 100)
        assert promised == pytest.approx(
            max(detectable_difference(float(p), 100) for p in np.linspace(low, high, 2001)), rel=1e-4
        )


def test_the_baseline_has_teacher_and_start_and_a_round_its_student(run: RunStore) -> None:
    own = {"accuracy", "response_tokens", "truncation_rate", "repetition"}
    kl = {"kl_teacher_student", "kl_student_teacher", "top1_agreement"}
    baseline = evaluated(run, BASELINE)
    assert {metric for model, metric in baseline if model == "teacher"} == own
    assert {metric for model, metric in baseline if model == "start"} == own | kl
    for index in (WARMUP, 0):
        found = evaluated(run, StageKey("evaluate", index))
        assert set(found) == {("student", metric) for metric in own | kl}
        assert {row["round"] for row in found.values()} == {index}
    # The warm-up moved the student, so its distance from the teacher is another.
    start = baseline["start", "kl_teacher_student"]["value"]
    assert evaluated(run, StageKey("evaluate", WARMUP))["student", "kl_teacher_student"]["value"] != start


def test_beside_sampling_the_student_is_evaluated_where_it_trained(run: RunStore) -> None:
    devices = DevicesConfig(sampler="cuda:0", trainer="cuda:1")
    for overlap, device in ((False, "cuda:0"), (True, "cuda:1")):
        config = run.config.model_copy(update={"devices": devices, "overlap": overlap})
        assert result_model(run, config, 0).device == device


def test_every_held_out_prompt_is_answered_and_only_what_has_an_answer_is_checked(run: RunStore) -> None:
    prompts = run.read_table(StageKey("prompts"), PROMPTS).to_pylist()
    held_out = {row["prompt_id"]: row["answer"] for row in prompts if row["split"] == "held_out"}
    assert None in held_out.values()
    for key, models in ((BASELINE, ("teacher", "start")), (StageKey("evaluate", 0), ("student",))):
        rows = responses_of(run, key).to_pylist()
        for model in models:
            own = [row for row in rows if row["model"] == model]
            assert [(row["prompt_id"], row["sample_index"]) for row in own] == [
                (p, i) for p in held_out for i in (0, 1)
            ]
        assert all((row["score"] is None) == (held_out[row["prompt_id"]] is None) for row in rows)
        assert len({row["response"] for row in rows}) > len(held_out)
        checked = [row for row in rows if row["score"] is not None and row["model"] == models[0]]
        assert evaluated(run, key)[models[0], "accuracy"]["n"] == len(checked)


def test_few_prompts_say_what_they_cannot_tell(run: RunStore) -> None:
    counters = run.finished(BASELINE).counters
    assert counters["verified_prompts"] < 6
    assert counters["prompts_for_two_points"] > 1000
    (warning,) = counters["warnings"]
    assert "cannot be told from noise" in warning
    assert "warnings" not in run.finished(StageKey("evaluate", 0)).counters


def test_held_out_prompts_reach_no_training_data(run: RunStore) -> None:
    prompts = run.read_table(StageKey("prompts"), PROMPTS).to_pylist()
    held_out = {row["prompt_id"] for row in prompts if row["split"] == "held_out"}
    texts = [row["messages"][-1]["content"] for row in prompts if row["split"] == "held_out"]
    assert {prompt_id(row["messages"]) for row in prompts if row["split"] == "train"}.isdisjoint(held_out)
    generated = run.read_table(StageKey("generate", 0), GENERATE)
    assert held_out.isdisjoint(generated.column("prompt_id").to_pylist())
    tokenizer = _tokenizer(run)
    packs = {StageKey("pack", WARMUP): pack_schema(None), StageKey("pack", 0): pack_schema(5)}
    for key, schema in packs.items():
        table = run.read_table(key, schema, ["input_ids", "sample_ids"])
        named = [name.split("-")[1] for row in table.column("sample_ids").to_pylist() for name in row]
        assert named
        assert held_out.isdisjoint(named)
        words = " ".join(tokenizer.batch_decode(table.column("input_ids").to_pylist()))
        # What can be found so: the text of a train prompt.
        assert "What is" in words
        assert not [text for text in texts if text in words]


def _tokenizer(run: RunStore) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run.path(StageKey("export", 0), "model"))


def test_a_split_that_overlaps_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    both = pa.concat_tables([prompts_table({"a": "train", "b": "train"}), prompts_table({"b": "held_out"})])
    with pytest.raises(ArtifactError, match="prompt_id"):
        finish_stage(store, StageKey("prompts"), PROMPTS, [both])


def test_a_warm_ups_references_are_not_read(tmp_path: Path) -> None:
    """There may be millions of them; the held-out ones come first."""
    config = make_config(tmp_path)
    store = make_store(tmp_path, config)
    splits = dict.fromkeys("abc", "train") | dict.fromkeys("xyz", "held_out")
    finish_stage(store, StageKey("prompts"), PROMPTS, split_rows(prompts_table(splits), 2))
    names, prompts = ["z", "x", "y", "a", "b", "c"], [[1], [2, 2], [3], [4], [5], [6]]
    references = rollout_table(prompts, [[9], [8], [7, 7], [6], [5], [4]], prompt_names=names)
    files = [references.slice(0, 2), references.slice(2, 1), references.slice(3, 1), references.slice(4, 2)]
    finish_stage(store, REFERENCE, GENERATE, files)
    store.part(REFERENCE, 3).write_bytes(b"damaged")
    found = held_out_references(StageJob(store, config, StageKey("evaluate", 0)))
    assert [[row.tolist() for row in rows.rows()] for rows in found] == [[[1], [2, 2], [3]], [[9], [8], [7, 7]]]


def test_references_without_a_held_out_one_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    store = make_store(tmp_path, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train", "x": "held_out"})])
    finish_stage(store, REFERENCE, GENERATE, [rollout_table([[1]], [[2]], prompt_names=["a"])])
    with pytest.raises(ArtifactError, match="no held-out responses"):
        held_out_references(StageJob(store, config, StageKey("evaluate", 0)))


def test_models_answer_as_the_config_says(tmp_path: Path) -> None:
    """The servers of the student hold another round's snapshot, and those of the teacher the teacher."""
    served = {
        engine: {"engine": "server", "server": {"urls": [f"http://{engine}"]}} for engine in ("student", "teacher")
    }
    sections: dict[str, Any] = {"generate": served["student"] | {"max_new_tokens": 11}, "score": served["teacher"]}
    own = {"temperature": 0.5, "samples_per_prompt": 3}
    for limit, expected in ((None, 11), (7, 7)):
        config = make_config(tmp_path, seed=8, evaluate={**own, "max_new_tokens": limit}, **sections)
        student, teacher = (Sampling.of(config, teacher=asked) for asked in (False, True))
        assert (student.engine.engine, teacher.engine.engine) == ("transformers", "server")
        assert teacher.engine.server.urls == ["http://teacher"]
        for found in (student, teacher):
            assert (found.temperature, found.samples_per_prompt, found.max_new_tokens) == (0.5, 3, expected)
            assert found.seed == 8


@pytest.mark.parametrize("generate", [True, False])
def test_without_a_warm_up_the_student_is_evaluated_once(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, generate: bool
) -> None:
    """And without responses there is agreement only."""
    settings = ("warmup=null", f"evaluate.generate={str(generate).lower()}", "evaluate.temperature=1")
    config = smoke_config(tmp_path, teacher_dir, student_dir, *settings)
    store, start = RunStore.create(config), StageKey("evaluate", WARMUP)
    for key in loop(config)[:5]:
        execute(store, config, key)
    assert store.finished(BASELINE).counters["tokens"] > 0
    assert "tokens" not in store.finished(start).counters
    baseline, found = evaluated(store, BASELINE), evaluated(store, start)
    assert {model for model, _ in found} == {"student"}
    assert {metric: row["value"] for (_, metric), row in found.items()} == {
        metric: row["value"] for (model, metric), row in baseline.items() if model == "start"
    }
    if generate:
        asked, answered = (responses_of(store, key).to_pylist() for key in (BASELINE, start))
        assert answered == [row | {"model": "student"} for row in asked if row["model"] == "start"] != []
    else:
        assert {metric for _, metric in found} == set(AGREEMENT_METRICS)
        assert not any(store.path(key, RESPONSES_FILE).exists() for key in (BASELINE, start))
