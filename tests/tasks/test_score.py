import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.config import RunConfig, ScoreConfig
from schemas.errors import ArtifactError, ModelError, StageError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, score_schema
from tasks.language_model.chat import reply_header
from tasks.language_model.prefill import Prefill, gap_tolerance, prefill
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import policy_model
from tasks.score import scoring
from tasks.score.check import checked_rows
from tasks.score.ifd import ifd, mean_nll
from tasks.score.scoring import local_prefill, score_rollouts, score_table
from tasks.stage import execute
from tasks.stage_clock import CLOCK_NAME
from tests.run_fixtures import finish_stage
from tests.tasks.rollout_runs import make_run
from tests.tiny_models import make_model, make_tokenizer

EOS = 2
TOP_K = 7
SCORE, SAMPLES = StageKey("score", 0), StageKey("generate", 0)


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
        score_rollouts(local_prefill(model, settings), prompts, responses, bare, top_k=TOP_K, shared_vocab=259)
        for model in (student, teacher)
    )
    ids = pa.array([f"s{i}" for i in range(len(prompts))])
    table = score_schema(TOP_K, "float32").validate(
        score_table(ids, responses, by_student.nll, by_teacher, settings), "test"
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
        local_prefill(teacher, settings), prompts, responses, np.array([0], np.int32), top_k=TOP_K, shared_vocab=259
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


@pytest.mark.parametrize("context", ["header", "nothing"])
def test_known_logprobs_replace_the_pass_after_the_prompt(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], rollouts: tuple[Ragged, Ragged], context: str
) -> None:
    student, _ = models
    prompts, responses = rollouts
    bare = reply_header(make_tokenizer()) if context == "header" else np.array([], np.int32)
    settings = ScoreConfig(batch_tokens=64)
    options: dict[str, Any] = {"top_k": 0, "shared_vocab": 259}
    passed: list[int] = []
    whole = score_rollouts(local_prefill(student, settings), prompts, responses, bare, **options)
    known = score_rollouts(
        local_prefill(student, settings),
        prompts,
        responses,
        bare,
        **options,
        sampled=whole.conditional.logprobs,
        on_tokens=passed.append,
    )
    np.testing.assert_array_equal(known.nll.conditional, whole.nll.conditional)
    np.testing.assert_allclose(known.nll.unconditional, whole.nll.unconditional, atol=1e-5)
    assert sum(passed) == len(responses.values) + len(bare) * len(responses)


def test_sequences_of_one_batch_do_not_see_each_other(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], rollouts: tuple[Ragged, Ragged]
) -> None:
    """Change one sequence; the scores of the others, packed with it in one row, stay exactly as they were."""
    student, _ = models
    prompts, responses = rollouts
    settings, bare = ScoreConfig(batch_tokens=4096), np.array([0], np.int32)
    before = score_rollouts(local_prefill(student, settings), prompts, responses, bare, top_k=0, shared_vocab=259)
    changed = responses.values.copy()
    low, high = responses.offsets[5], responses.offsets[6]
    changed[low:high] = (changed[low:high] + 17) % 200 + 5
    after = score_rollouts(
        local_prefill(student, settings), prompts, Ragged(changed, responses.offsets), bare, top_k=0, shared_vocab=259
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


def score_config(config: RunConfig, **score: Any) -> RunConfig:
    return config.model_copy(update={"score": config.score.model_copy(update=score)})


@pytest.fixture(scope="module")
def sampled_run(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path
) -> tuple[RunStore, RunConfig]:
    """A run whose samples are there: 14 in three files, five shards to score."""
    store, config = make_run(
        tmp_path_factory.mktemp("sampled"),
        teacher_dir,
        student_dir,
        generate={"samples_per_prompt": 2},
        score={"top_k": 5, "shard_samples": 4, "batch_tokens": 128},
    )
    execute(store, config, SAMPLES)
    return store, config


@pytest.fixture
def run(sampled_run: tuple[RunStore, RunConfig], tmp_path: Path) -> tuple[RunStore, RunConfig]:
    """A copy of the run that a test may change."""
    store, config = sampled_run
    return RunStore(shutil.copytree(store.folder, tmp_path / "run")), config


def read_scores(store: RunStore, config: RunConfig) -> pa.Table:
    return store.read_table(SCORE, score_schema(config.score.top_k, config.score.topk_dtype))


def change_sampled(store: RunStore, change: Callable[[list[float]], list[Any]], sample: str | None = None) -> None:
    """Write the generate table again with ``change(logprobs)`` of one sample's or of all log-probabilities."""
    tables = [store.read_part(path, GENERATE) for path in store.table_files(SAMPLES)]
    for index, table in enumerate(tables):
        columns = (table[name].to_pylist() for name in ("sample_id", "sampled_logprobs"))
        rows = [change(row) if sample in (None, name) else row for name, row in zip(*columns, strict=True)]
        place = table.column_names.index("sampled_logprobs")
        tables[index] = table.set_column(place, "sampled_logprobs", pa.array(rows, pa.list_(pa.float32())))
    finish_stage(store, SAMPLES, GENERATE, tables)


def test_the_samplers_logprobs_are_used_and_checked(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    manifest = execute(store, config, SCORE)
    assert sorted(path.name for path in store.path(SCORE).iterdir()) == [
        "manifest.json",
        *(f"part-0000{index}.parquet" for index in range(5)),
    ]
    assert manifest.counters["sampled_logprob_gap"] < 1e-4
    scores = read_scores(store, config)
    rollouts = store.read_table(SAMPLES, GENERATE)
    assert scores["sample_id"].to_pylist() == rollouts["sample_id"].to_pylist()
    means = [-np.mean(row, dtype=np.float64) for row in rollouts["sampled_logprobs"].to_pylist()]
    np.testing.assert_allclose(scores["student_nll"].to_numpy(), means, rtol=1e-6)

    again = score_config(config, student_logprobs="prefill")
    prefilled = execute(store, again, SCORE)
    assert "sampled_logprob_gap" not in prefilled.counters
    other = read_scores(store, again)
    for name in ("student_nll", "student_nll_uncond", "teacher_nll", "delta_ifd"):
        np.testing.assert_allclose(other[name].to_numpy(), scores[name].to_numpy(), atol=1e-4)
    assert other["teacher_topk_ids"].equals(scores["teacher_topk_ids"])
    # Fewer samples are checked than computed again: what the student reads after prompts is the difference.
    tokens = sum(len(p) + len(r) for p, r in zip(*(rollouts[c].to_pylist() for c in ("prompt_ids", "response_ids"))))
    unchecked = execute(store, score_config(config, check_samples=0, shard_samples=5), SCORE)
    assert prefilled.counters["tokens"] - unchecked.counters["tokens"] == tokens
    # All 14 samples are checked where 16 may be.
    assert manifest.counters["tokens"] == prefilled.counters["tokens"]


def test_logprobs_of_another_policy_are_refused_and_computed_on_request(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    change_sampled(store, lambda row: [value - 0.5 for value in row])
    with pytest.raises(
        StageError, match=r"0\.5 nats per token.*r000-p00-000.*score\.student_logprobs: prefill"
    ) as caught:
        execute(store, config, SCORE)
    assert policy_model(store, config, 0).version in str(caught.value)
    assert "`transformers`" in str(caught.value)
    assert store.manifest(SCORE) is None
    assert not list(store.path(SCORE).glob("*.parquet"))
    again = score_config(config, student_logprobs="prefill")
    execute(store, again, SCORE)
    rollouts = store.read_table(SAMPLES, GENERATE, ["sampled_logprobs"])
    means = [-np.mean(row) - 0.5 for row in rollouts["sampled_logprobs"].to_pylist()]
    np.testing.assert_allclose(read_scores(store, again)["student_nll"].to_numpy(), means, atol=1e-4)


def test_one_wrong_sample_is_named(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    change_sampled(store, lambda row: [value - 3.0 for value in row], "r000-p04-001")
    with pytest.raises(StageError, match=r"first is r000-p04-001 \(3 nats\)"):
        execute(store, config, SCORE)


@pytest.mark.parametrize("missing", [float("nan"), float("-inf")])
def test_missing_logprobs_name_the_sample(run: tuple[RunStore, RunConfig], missing: float) -> None:
    store, config = run
    change_sampled(store, lambda row: [*row[:-1], missing], "r000-p04-001")
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet: sample r000-p04-001: `sampled_logprobs`.*prefill"):
        execute(store, config, SCORE)
    execute(store, score_config(config, student_logprobs="prefill"), SCORE)


@pytest.mark.parametrize("mode", ["sampled", "prefill"])
@pytest.mark.parametrize("half_done", ["student-00000.parquet", "student-00001.parquet", "part-00000.parquet"])
def test_a_stage_continues_in_the_middle_of_either_pass_with_the_same_bytes(
    run: tuple[RunStore, RunConfig], mode: Literal["sampled", "prefill"], half_done: str
) -> None:
    store, config = run
    config = score_config(config, student_logprobs=mode)
    whole = execute(store, config, SCORE)
    expected = {path.name: path.read_bytes() for path in store.table_files(SCORE)}
    store.supersede(SCORE)

    def stop(done: int, total: int, unit: str) -> None:
        if store.path(SCORE, half_done).is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(store, config, SCORE, stop)
    kept = {path.name: path.stat().st_mtime_ns for path in store.path(SCORE).glob("*.parquet")}
    assert half_done in kept
    assert len([name for name in kept if name.startswith("part")]) == (half_done == "part-00000.parquet")
    reported: list[tuple[int, int]] = []

    def watch(done: int, total: int, unit: str) -> None:
        reported.append((done, total))
        for name, written in kept.items():
            assert store.path(SCORE, name).stat().st_mtime_ns == written

    store.path(SCORE, CLOCK_NAME).write_text("1e6")
    manifest = execute(store, config, SCORE, watch)
    assert manifest.counters["tokens_per_second"] > 1
    assert {path.name: path.read_bytes() for path in store.table_files(SCORE)} == expected
    assert manifest.counters.get("sampled_logprob_gap") == whole.counters.get("sampled_logprob_gap")
    done, total = reported[-1]
    assert done == total == manifest.counters["tokens"] < whole.counters["tokens"]


def test_progress_counts_the_tokens_of_both_models(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    reported: list[tuple[int, int]] = []
    execute(store, config, SCORE, lambda done, total, unit: reported.append((done, total)))
    done = [done for done, _ in reported]
    assert done == sorted(set(done))
    assert {total for _, total in reported} == {done[-1]}


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_model_that_overflows_is_named_with_the_first_sample(
    run: tuple[RunStore, RunConfig], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    store, config = run
    passes = iter(range(10))

    def overflowing(*arguments: Any, **options: Any) -> Prefill:
        found = prefill(*arguments, **options)
        # Five shards by each model, the student first: the last token of the second shard's last sample.
        if next(passes) == {"student": 1, "teacher": 6}[model]:
            found.logprobs[-1] = -np.inf
        return found

    monkeypatch.setattr(scoring, "prefill", overflowing)
    sample = store.read_table(SAMPLES, GENERATE)["sample_id"][5].as_py()
    with pytest.raises(
        StageError, match=rf"the {model} gave a non-finite .* for 1 sample.*is {sample}\..*`{model}\.dtype: float32`"
    ):
        execute(store, config, SCORE)


def test_more_targets_than_tokens_are_refused(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    with pytest.raises(ModelError, match=r"score\.top_k: 260: .* 259 tokens"):
        execute(store, score_config(config, top_k=260), SCORE)


def test_checked_rows_are_spread_over_the_round() -> None:
    rows = checked_rows(1_000, 16, [1, 0])
    assert np.array_equal(rows // 62.5, np.arange(16))
    assert np.array_equal(rows, checked_rows(1_000, 16, [1, 0]))
    assert not np.array_equal(rows, checked_rows(1_000, 16, [1, 1]))
    assert checked_rows(17, 16, [5, 3]).tolist() == sorted(set(checked_rows(17, 16, [5, 3]).tolist()))
    assert checked_rows(5, 16, [0, 0]).tolist() == [0, 1, 2, 3, 4]
    assert len(checked_rows(5, 0, [0, 0])) == len(checked_rows(0, 16, [0, 0])) == 0


def test_tolerance_leaves_room_for_16_bit_logits() -> None:
    """Rounding the logits of a wide vocabulary to bfloat16 stays well inside; another policy's would not be."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 5_000, generator=generator) * 6
    exact = logits.log_softmax(-1)
    rounded = logits.bfloat16().float().log_softmax(-1)
    tokens = torch.multinomial(exact.exp(), 1, generator=generator)
    gap = float((exact - rounded).gather(1, tokens).abs().mean())
    assert gap < gap_tolerance(torch.bfloat16) / 3
    assert gap > gap_tolerance(torch.float32) / 3
