import io
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from flows.display import print_summary
from flows.summary import (
    RunSummary,
    held_out_tables,
    round_label,
    round_rows,
    samples_table,
    summarize,
    summary_markdown,
)
from schemas.config import RunConfig
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import EVALUATE_METRICS, FILTER, score_schema
from schemas.tables import PROMPTS as PROMPTS_TABLE
from schemas.untrusted_text import escape_markdown
from tasks.graph import PROMPTS
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table, rollout_table, score_table


def evaluate_table(index: int, kl: float, *models: str) -> pa.Table:
    rows = [
        {"round": index, "metric": metric, "value": value, "n": 90, "stderr": 0.01, "model": model}
        for model in models or ("student",)
        for metric, value in {"kl_teacher_student": kl, "response_tokens": 90.25, "rouge|2": 0.5}.items()
        if model != "teacher" or metric == "response_tokens"
    ]
    return pa.Table.from_pylist(rows, schema=EVALUATE_METRICS.columns)


def filter_table(reasons: list[str]) -> pa.Table:
    rows = [
        {
            "sample_id": f"s{i}",
            "delta_ifd": 0.5,
            "zone": "learnable",
            "keep": reason == "kept",
            "reason": reason,
            "min_delta_ifd": 0.0,
            "max_delta_ifd": 0.8,
            "policy_lag": 0,
        }
        for i, reason in enumerate(reasons)
    ]
    return pa.Table.from_pylist(rows, schema=FILTER.columns)


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunStore, RunConfig]:
    """A run that has finished its warm-up and the first of two rounds."""
    config = make_config(tmp_path, warmup={})
    store = make_store(tmp_path, config)
    counters = {"detectable_difference": 0.25, "verified_prompts": 30, "prompts_for_two_points": 4802}
    table = evaluate_table(WARMUP, 7.0, "teacher", "start")
    finish_stage(store, StageKey("baseline"), EVALUATE_METRICS, [table], **counters)
    finish_stage(store, StageKey("evaluate", WARMUP), EVALUATE_METRICS, [evaluate_table(WARMUP, 2.0)])
    sharper = {"detectable_difference": 0.125, "verified_prompts": 30, "prompts_for_two_points": 1201}
    reasons = ["too_long", "kept", "kept", "above_max_delta_ifd", "above_max_delta_ifd", "kept"]
    ledger = filter_table(reasons)
    finish_stage(store, StageKey("filter", 0), FILTER, [ledger.slice(0, 4), ledger.slice(4)], seconds=61)
    finish_stage(store, StageKey("evaluate", 0), EVALUATE_METRICS, [evaluate_table(0, 1.5)], seconds=30, **sharper)
    return store, config


def summary_of(run: tuple[RunStore, RunConfig]) -> RunSummary:
    return summarize(*run)


def test_rounds_follow_the_warm_up_with_their_metrics_and_reasons(run: tuple[RunStore, RunConfig]) -> None:
    summary = summary_of(run)
    assert [row.label for row in summary.rounds] == ["warm-up", "round 0 (1 of 2)"]
    assert [row.metrics["kl_teacher_student"].value for row in summary.rounds] == [2.0, 1.5]
    first = summary.rounds[1]
    assert list(first.reasons.items()) == [("kept", 3), ("above_max_delta_ifd", 2), ("too_long", 1)]
    assert (first.kept, first.dropped) == (3, 3)
    assert summary.metric_names == ["kl_teacher_student", "response_tokens", "rouge|2"]
    assert summary.baseline["start"]["kl_teacher_student"].value == 7.0
    assert list(summary.baseline["teacher"]) == ["response_tokens"]


def test_models_that_do_not_train_lead_the_tables_they_have_metrics_for(run: tuple[RunStore, RunConfig]) -> None:
    agreement, responses = held_out_tables(summary_of(run))
    assert [row[0] for row in agreement[2]] == ["start", "warm-up", "round 0 (1 of 2)"]
    assert [row[0] for row in responses[2]] == ["teacher", "start", "warm-up", "round 0 (1 of 2)"]
    assert responses[1] == ["round", "tokens"]
    assert (
        "30 verified held-out prompts tell differences in accuracy from 25.0 points on; 2 points take about 4,802"
        in (responses[0])
    )


def test_without_a_warm_up_the_start_is_told_once(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    store = make_store(tmp_path, config)
    finish_stage(store, StageKey("baseline"), EVALUATE_METRICS, [evaluate_table(WARMUP, 7.0, "teacher", "start")])
    labels = [[row[0] for row in rows] for _, _, rows in held_out_tables(summarize(store, config))]
    assert labels == [["start"], ["teacher", "start"]]
    finish_stage(store, StageKey("evaluate", WARMUP), EVALUATE_METRICS, [evaluate_table(WARMUP, 7.0)])
    assert [[row[0] for row in rows] for _, _, rows in held_out_tables(summarize(store, config))] == labels


def test_a_student_with_more_noise_than_the_baseline_decides_what_can_be_told(run: tuple[RunStore, RunConfig]) -> None:
    counters = {"detectable_difference": 0.3, "verified_prompts": 30, "prompts_for_two_points": 6750}
    finish_stage(run[0], StageKey("evaluate", 1), EVALUATE_METRICS, [evaluate_table(1, 1.0)], **counters)
    assert summary_of(run).resolution.endswith("from 30.0 points on; 2 points take about 6,750")


def test_enough_prompts_to_tell_two_points_need_no_more(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    store = make_store(tmp_path, config)
    counters = {"detectable_difference": 0.02, "verified_prompts": 4802, "prompts_for_two_points": 4802}
    finish_stage(store, StageKey("baseline"), EVALUATE_METRICS, [evaluate_table(WARMUP, 1.0, "teacher")], **counters)
    assert summarize(store, config).resolution == (
        "4,802 verified held-out prompts tell differences in accuracy from 2.0 points on"
    )


def test_a_round_takes_the_time_of_its_stages(run: tuple[RunStore, RunConfig]) -> None:
    _, titles, rows = samples_table(summary_of(run))
    assert dict(zip(titles, rows[-1], strict=True)) == {
        "round": "round 0 (1 of 2)",
        "tokens": "",
        "kept": "3",
        "dropped": "3",
        "why": "2 above_max_delta_ifd, 1 too_long",
        "time": "1 min 31 s",
    }


def test_before_the_first_round_there_is_a_warm_up_or_the_start(tmp_path: Path) -> None:
    assert round_label(make_config(tmp_path, warmup={}), WARMUP) == "warm-up"
    assert round_label(make_config(tmp_path), WARMUP) == "start"


def test_every_rendering_shows_the_same_numbers(run: tuple[RunStore, RunConfig]) -> None:
    summary = summary_of(run)
    output = io.StringIO()
    print_summary(Console(file=output, width=200), summary)
    for text in (output.getvalue(), summary_markdown(summary)):
        assert "2.0000 ± 0.0100" in text
        assert "1.5000 ± 0.0100" in text
        assert "90.2500 ± 0.0100" in text
        assert "max" in text
    rows = round_rows(summary, 0)
    assert {"what": "kl_teacher_student", "value": 1.5, "stderr": 0.01, "n": 90} in rows
    assert {"what": "dropped: too_long", "value": 1, "stderr": None, "n": 6} in rows
    assert summary.rounds[1].reasons["kept"] == 3


def test_markdown_tables_keep_their_columns_whatever_the_names_hold(run: tuple[RunStore, RunConfig]) -> None:
    markdown = summary_markdown(summary_of(run))
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        # A cell's own bars are escaped, so unescaped ones count the columns.
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
        assert set(table[1]) == {"|", "-"}
    assert "rouge\\|2" in markdown


def test_text_is_escaped_for_markdown() -> None:
    assert escape_markdown("<b>|x|\n*a*") == "&lt;b&gt;\\|x\\| \\*a\\*"


def test_a_run_that_has_not_begun_has_no_rounds(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    summary = summarize(make_store(tmp_path, config), config)
    assert summary.rounds == []
    assert summary.student is None
    assert "# test" in summary_markdown(summary)


def test_what_other_settings_made_is_not_shown_as_theirs(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    key = StageKey("filter", 0)
    before, manifest = summarize(store, config), store.finished(key)
    store.finish(key, manifest.model_copy(update={"config": {"filter": {"min_delta_ifd": 0.25}}}))
    assert summarize(store, config).rounds[-1].reasons == {}
    # A setting that is no more, of an earlier version, hides nothing.
    store.finish(key, manifest.model_copy(update={"config": {"filter": {"forgotten": 1}}}))
    assert summarize(store, config).rounds == before.rounds


def test_a_run_of_an_earlier_version_is_shown(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    finish_stage(store, PROMPTS, PROMPTS_TABLE, [prompts_table({"a": "train"})])
    made = store.finished(PROMPTS).model_copy(
        update={"config": {"prompts": {"sources": [{"type": "jsonl", "path": "/long/ago.jsonl"}]}}}
    )
    store.finish(PROMPTS, made)
    assert "prompts" in summarize(store, config).seconds
    assert len(summarize(store, config).rounds) == 2


def test_what_was_made_from_other_inputs_is_not_shown(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    key, score = StageKey("filter", 0), StageKey("score", 0)
    schema = score_schema(config.score.top_k, "float16")
    rollouts = rollout_table([[1]] * 2, [[1, 2]] * 2)
    finish_stage(store, score, schema, [score_table(rollouts, [0.1, 0.2], top_k=config.score.top_k)])
    read = store.finished(score).outputs
    store.finish(key, store.finished(key).model_copy(update={"inputs": read}))
    assert summarize(store, config).rounds[-1].reasons
    finish_stage(store, score, schema, [score_table(rollouts, [0.3, 0.4], top_k=config.score.top_k)])
    assert summarize(store, config).rounds[-1].reasons == {}


def test_rounds_after_the_wanted_one_are_not_read(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    store.table_files(StageKey("filter", 0))[1].write_bytes(b"no parquet")
    assert [row.round for row in summarize(store, config, through=WARMUP).rounds] == [WARMUP]


def test_a_damaged_table_is_named(run: tuple[RunStore, RunConfig]) -> None:
    store, config = run
    store.table_files(StageKey("filter", 0))[1].write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match=r"round=000/stage=filter/part-00001\.parquet"):
        summarize(store, config)
