"""A run on disk that no model made: tables of as many samples as wanted, drawn so that every figure has a shape."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.manifest import record_bytes
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import (
    EVALUATE_METRICS,
    EVALUATE_RESPONSES,
    FILTER,
    GENERATE,
    PROMPTS,
    RESPONSES_FILE,
    SCORES,
    TRAIN_METRICS,
    ZONES,
    pack_schema,
    score_schema,
    targets_type,
)
from tasks.graph import BASELINE, MODELS
from tests.run_fixtures import finish_stage, make_config, make_store, split_rows

TOP_K = 5
WORDS = (
    "Let ",
    "us ",
    "add ",
    "the ",
    "numbers: ",
    "12 ",
    "+ ",
    "30 ",
    "= ",
    "42",
    ".\n",
    "So ",
    "that ",
    "is ",
    "it.",
)
LOW, HIGH = 0.0, 0.8
PROMPTS_ANSWERED = 500
"""Held-out prompts of each evaluation."""


def synthetic_run(
    root: Path,
    samples: int,
    *,
    prompt: str = "What is 12 + 30?",
    words: Sequence[str] = WORDS,
    rounds: int = 2,
    done: int = 2,
    policy: str = "student",
) -> RunStore:
    """Write a run with a warm-up of which ``done`` of ``rounds`` rounds have finished.

    Args:
        root: Where.
        samples: Samples of each round.
        prompt: What every prompt says.
        words: Texts of the tokens, as many as WORDS.
        rounds: Rounds of its config.
        done: Rounds that have finished.
        policy: Who answered the prompts, by its config.
    """
    changes: dict[str, Any] = {"rounds": rounds, "warmup": {}, "score": {"top_k": TOP_K}, "pack": {"max_tokens": 4096}}
    config = make_config(root, name="synthetic", generate={"max_new_tokens": 256, "policy": policy}, **changes)
    store = make_store(root, config)
    write_tokenizer(store, words)
    start = [metric(WARMUP, "accuracy", 0.11, 0.01, "start"), metric(WARMUP, "kl_teacher_student", 2.6, 0.05, "start")]
    write_metrics(store, BASELINE, [metric(WARMUP, "accuracy", 0.93, 0.01, "teacher"), *start])
    finish_stage(store, StageKey("prompts"), PROMPTS, split_rows(prompts(samples, prompt), 16384), seconds=0.4)
    train(store, WARMUP, 0)
    export(store, WARMUP)
    evaluate(store, WARMUP)
    for index in range(done):
        sample(store, index, samples)
        train(store, index, index * 400)
        export(store, index)
        evaluate(store, index)
    return store


def write_tokenizer(store: RunStore, words: Sequence[str]) -> None:
    """Write the tokenizer of the models stage: token i is the i-th of ``words``."""
    from tokenizers import Tokenizer, models

    folder = store.path(MODELS, "student")
    folder.mkdir(parents=True)
    Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)})).save(str(folder / "tokenizer.json"))
    complete(store, MODELS)


def complete(store: RunStore, key: StageKey) -> None:
    """Complete a stage with the files that lie in its folder; the reference stage, of no row, is finished with it."""
    manifest = finish_stage(store, StageKey("reference"), GENERATE, [], **counters(9000, 12.0))
    update = {"stage": key.stage, "round": key.round, "outputs": store.outputs(key), "counters": {"seconds": 3.0}}
    store.write_bytes(store.path(key, "manifest.json"), record_bytes(manifest.model_copy(update=update)))


def export(store: RunStore, index: int) -> None:
    """Write an export without weights."""
    key = StageKey("export", index)
    store.write_bytes(store.path(key, "model", "config.json"), b"{}")
    complete(store, key)


def repeated(text: str, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array([text])).cast(pa.string())


def numbered(prefix: str, count: int) -> pa.Array:
    return pa.array(np.char.add(prefix, np.arange(count).astype(str)))


def lists(values: NDArray[Any], offsets: NDArray[np.int32]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def prompts(count: int, text: str) -> pa.Table:
    message = pa.array([[{"role": "user", "content": text}]], PROMPTS.columns.field("messages").type)
    return pa.table(
        {
            "prompt_id": numbered("p", count),
            "messages": message.take(pa.array(np.zeros(count, np.int32))),
            "answer": pa.nulls(count, pa.string()),
            "verification": pa.nulls(count, pa.string()),
            "source": repeated("test", count),
            "source_row": np.arange(count) + 1,
            "split": repeated("train", count),
        },
        schema=PROMPTS.columns,
    )


def sample(store: RunStore, index: int, count: int) -> None:
    """Write a round's generate, score, filter and pack tables."""
    rng = np.random.default_rng(index)
    lengths = rng.integers(8, 21, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = int(offsets[-1])
    ids = rng.integers(0, len(WORDS), tokens, dtype=np.int32)
    logprobs = (-rng.exponential(0.8, tokens)).astype(np.float32)
    names = numbered(f"s{index}-", count)
    generate = pa.table(
        {
            "sample_id": names,
            "prompt_id": numbered("p", count),
            "sample_index": np.zeros(count, np.int32),
            "round": np.full(count, index, np.int32),
            "policy_version": repeated(f"{index:064x}", count),
            "policy_step": np.full(count, index * 400, np.int64),
            "prompt_ids": lists(ids[:count], np.arange(count + 1, dtype=np.int32)),
            "response_ids": lists(ids, offsets),
            "response": repeated("42", count),
            "finish_reason": repeated("stop", count),
            "sampled_logprobs": lists(logprobs, offsets),
            "seed": np.arange(count),
        },
        schema=GENERATE.columns,
    )
    rows = max(count // 8, 1)
    finish_stage(store, StageKey("generate", index), GENERATE, split_rows(generate, rows), **counters(tokens, 41.0))

    student = rng.normal(0.62 + 0.04 * index, 0.11, count).clip(0.05)
    delta = rng.normal(0.22 - 0.05 * index, 0.2, count) + (rng.random(count) < 0.06) * rng.exponential(0.9, count)
    finish_stage(
        store,
        StageKey("score", index),
        score_schema(TOP_K, "float16"),
        split_rows(scores(names, lengths, ids, student, delta, rng), rows),
        **counters(tokens, 17.0),
    )
    learnable, low = (delta >= LOW) & (delta <= HIGH), delta < LOW
    too_long = learnable & (rng.random(count) < 0.02)
    zone = np.where(learnable, ZONES[0], np.where(low, ZONES[1], ZONES[2]))
    reason = np.where(low, "below_min_delta_ifd", np.where(learnable, "kept", "above_max_delta_ifd"))
    ledger = pa.table(
        {
            "sample_id": names,
            "delta_ifd": delta.astype(np.float32),
            "zone": zone,
            "keep": learnable & ~too_long,
            "reason": np.where(too_long, "too_long_for_pack", reason),
            "min_delta_ifd": np.full(count, LOW, np.float32),
            "max_delta_ifd": np.full(count, HIGH, np.float32),
            "policy_lag": np.zeros(count, np.int64),
        },
        schema=FILTER.columns,
    )
    finish_stage(store, StageKey("filter", index), FILTER, split_rows(ledger, rows), seconds=0.3)
    pack(store, index, rng)


def scores(
    names: pa.Array,
    lengths: NDArray[np.int64],
    ids: NDArray[np.int32],
    student: NDArray[np.float64],
    delta: NDArray[np.float64],
    rng: np.random.Generator,
) -> pa.Table:
    """Return a score table in which about two thirds of all response tokens are among the teacher's top k."""
    tokens = len(ids)
    top = rng.integers(0, len(WORDS), (tokens, TOP_K), dtype=np.int32)
    top[:, 0] = np.where(rng.random(tokens) < 0.5, ids, top[:, 0])
    shares = rng.dirichlet(np.full(TOP_K + 1, 0.5), tokens)[:, :TOP_K].clip(1e-4)
    logprobs = np.log(np.flip(np.sort(shares, axis=1), axis=1))
    ids_type, logprobs_type = targets_type(TOP_K, "float16")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = {
        "student_ifd": student,
        "teacher_ifd": student + delta,
        "delta_ifd": delta,
        "student_nll": np.full(len(names), 0.8),
        "student_nll_uncond": np.full(len(names), 1.3),
        "teacher_nll": np.full(len(names), 1.0),
        "teacher_nll_uncond": np.full(len(names), 1.4),
    }

    def targets(values: NDArray[Any], dtype: pa.DataType) -> pa.Array:
        inner = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), TOP_K)
        return pa.ListArray.from_arrays(offsets, inner).cast(dtype)

    return pa.table(
        {
            "sample_id": names,
            "response_tokens": lengths.astype(np.int32),
            **{name: columns[name].astype(np.float32) for name in SCORES},
            "teacher_topk_ids": targets(top, ids_type),
            "teacher_topk_logprobs": targets(logprobs.astype(np.float16), logprobs_type),
        },
        schema=score_schema(TOP_K, "float16").columns,
    )


def pack(store: RunStore, index: int, rng: np.random.Generator) -> None:
    """Write 24 packs without a token: only how long their sequences are counts here."""
    packs, each = 24, 16
    lengths = rng.integers(230, 257, packs * each, dtype=np.int32)
    schema = pack_schema(None) if index == WARMUP else pack_schema(TOP_K)
    columns: dict[str, Any] = {
        "pack_id": np.arange(packs),
        "seq_lengths": lists(lengths, np.arange(0, packs * each + 1, each, dtype=np.int32)),
        "sample_ids": pa.ListArray.from_arrays(
            pa.array(np.arange(0, packs * each + 1, each, dtype=np.int32)), numbered("x", packs * each)
        ),
    }
    empty = {field.name: pa.array([[]] * packs, field.type) for field in schema.columns if field.name not in columns}
    table = pa.table(columns | empty).select(schema.columns.names)
    finish_stage(store, StageKey("pack", index), schema, [table], **counters(int(lengths.sum()), 0.8))


def train(store: RunStore, index: int, start: int, steps: int = 400) -> None:
    """Write 400 optimizer steps of a falling loss and a rising policy KL; the warm-up's packs too."""
    rng = np.random.default_rng(90 + index)
    step = np.arange(1, steps + 1)
    kd = 0.35 * np.exp(-(start + step) / 350) + 0.12 + rng.normal(0, 0.012, steps)
    ce = 0.9 * np.exp(-(start + step) / 500) + 1.1 + rng.normal(0, 0.03, steps)
    table = pa.table(
        {
            "step": start + step,
            "epoch": (start + step) / 80,
            "round": np.full(steps, index, np.int32),
            "loss": 0.1 * ce + 0.9 * kd if index != WARMUP else ce,
            "ce": ce,
            "kd": kd if index != WARMUP else pa.nulls(steps, pa.float64()),
            "learning_rate": 5.5e-6 + 4.5e-6 * np.cos(np.pi * (start + step) / 800),
            "grad_norm": np.ones(steps),
            "response_tokens": rng.integers(2000, 4000, steps),
            "tokens_per_second": pa.nulls(steps, pa.float64()),
            "policy_kl": 0.085 * (step / steps) ** 0.6 + rng.normal(0, 0.003, steps)
            if index != WARMUP
            else pa.nulls(steps, pa.float64()),
            "policy_lag": step,
        },
        schema=TRAIN_METRICS.columns,
    )
    if index == WARMUP:
        pack(store, index, rng)
    store.begin(StageKey("train", index), "test")
    warnings = [] if index == WARMUP else ["the student is near its budget"]
    finish_stage(store, StageKey("train", index), TRAIN_METRICS, [table], **counters(98_000, 55.0), warnings=warnings)


def evaluate(store: RunStore, index: int) -> None:
    """Write held-out metrics that get better, and responses of that accuracy: what is right stays so."""
    better = 1.4 * 0.62 ** (index + 1)
    accuracy = 0.88 - 0.35 * better
    rows = [
        metric(index, "kl_teacher_student", better, 0.03),
        metric(index, "kl_student_teacher", 1.3 * better, 0.05),
        metric(index, "top1_agreement", 0.85 - 0.3 * better, 0.008),
        metric(index, "accuracy", accuracy, 0.012),
    ]
    write_metrics(store, StageKey("evaluate", index), rows)
    responses = {
        "model": ["student"] * PROMPTS_ANSWERED,
        "round": [index] * PROMPTS_ANSWERED,
        "prompt_id": [f"p{place}" for place in range(PROMPTS_ANSWERED)],
        "sample_index": [0] * PROMPTS_ANSWERED,
        "response": ["42"] * PROMPTS_ANSWERED,
        "response_tokens": [1] * PROMPTS_ANSWERED,
        "finish_reason": ["stop"] * PROMPTS_ANSWERED,
        "score": [float(place < accuracy * PROMPTS_ANSWERED) for place in range(PROMPTS_ANSWERED)],
        "repetition": [0.0] * PROMPTS_ANSWERED,
    }
    table = pa.table(responses, schema=EVALUATE_RESPONSES.columns)
    store.write_table(store.path(StageKey("evaluate", index), RESPONSES_FILE), table, EVALUATE_RESPONSES)


def metric(index: int, name: str, value: float, stderr: float, model: str = "student") -> dict[str, Any]:
    row = {"round": index, "metric": name, "value": value, "stderr": stderr, "model": model}
    return row | {"n": PROMPTS_ANSWERED}


def write_metrics(store: RunStore, key: StageKey, rows: Sequence[dict[str, Any]]) -> None:
    """Write the metrics of a stage that evaluates."""
    table = pa.Table.from_pylist(list(rows), EVALUATE_METRICS.columns)
    finish_stage(store, key, EVALUATE_METRICS, [table], **counters(4000, 9.0))


def counters(tokens: int, seconds: float) -> dict[str, Any]:
    rate = round(tokens / seconds, 1)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": rate, "peak_memory_bytes": 3 * 10**9}
