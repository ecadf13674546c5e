from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.config import FilterConfig, Quantile
from schemas.errors import ArtifactError, StageError
from schemas.stage_key import StageKey
from schemas.tables import FILTER, GENERATE, score_schema
from tasks.filter import NO_SCORES, applied_bounds, ledger
from tasks.stage import StageJob, execute
from tests.run_fixtures import (
    finish_stage,
    make_config,
    make_store,
    random_sequences,
    rollout_table,
    score_table,
    split_rows,
)

GENERATE_KEY, SCORE_KEY, FILTER_KEY = StageKey("generate", 0), StageKey("score", 0), StageKey("filter", 0)


def _ledger(
    delta_ifd: list[float | None], tokens: list[int], bounds: tuple[float, float], max_tokens: int = 100
) -> list[dict[str, Any]]:
    ids = pa.chunked_array([[f"s{i}" for i in range(len(tokens))]])
    low, high = (np.float32(bound) for bound in bounds)
    values = pa.array(delta_ifd, pa.float32())
    rows: list[dict[str, Any]] = ledger(
        ids, values, np.array(tokens), (low, high), max_tokens, np.arange(len(tokens))
    ).to_pylist()
    return rows


def _round(
    tmp_path: Path, delta_ifd: list[float | None], *, score_rows: int = 7, **sections: Any
) -> tuple[StageJob, pa.Table, pa.Table]:
    """Write generate and score, in other shards than each other."""
    config = make_config(tmp_path, score={"top_k": 3}, **sections)
    store = make_store(tmp_path, config)
    rng = np.random.default_rng(3)
    prompts, responses = random_sequences(rng, len(delta_ifd))
    rollouts = rollout_table(prompts, responses)
    scores = score_table(rollouts, delta_ifd, top_k=3)
    finish_stage(store, GENERATE_KEY, GENERATE, split_rows(rollouts, 5))
    finish_stage(store, SCORE_KEY, score_schema(3, "float16"), split_rows(scores, score_rows))
    return StageJob(store, config, FILTER_KEY), rollouts, scores


def test_ledger_names_zone_and_reason_of_every_sample() -> None:
    rows = _ledger(
        [0.3, -0.1, 0.9, 0.3, None, float("inf"), float("nan"), float("-inf"), -0.2, None],
        [100, 10, 10, 101, 10, 10, 10, 10, 101, 101],
        (0.0, 0.8),
    )
    assert [(row["zone"], row["reason"]) for row in rows] == [
        ("learnable", "kept"),
        ("degenerate", "below_min_delta_ifd"),
        ("cognitive_disconnect", "above_max_delta_ifd"),
        ("learnable", "too_long_for_pack"),
        (None, "not_scorable"),
        (None, "non_finite_delta_ifd"),
        (None, "non_finite_delta_ifd"),
        (None, "non_finite_delta_ifd"),
        ("degenerate", "below_min_delta_ifd"),
        (None, "not_scorable"),
    ]
    assert [row["keep"] for row in rows] == [True] + [False] * 9
    assert rows[4]["delta_ifd"] is None
    assert [row["sample_id"] for row in rows] == [f"s{i}" for i in range(10)]


def test_bounds_are_inclusive_in_the_precision_of_the_ledger() -> None:
    # 0.8 is no float32: compared in float64, the float32 nearest to it would be above the bound.
    above = float(np.nextafter(np.float32(0.8), np.float32(1)))
    below = float(np.nextafter(np.float32(0), np.float32(-1)))
    rows = _ledger([0.8, above, 0.0, -0.0, below], [1] * 5, (0.0, 0.8))
    assert [row["keep"] for row in rows] == [True, False, True, True, False]
    for row in rows:
        assert row["keep"] == (row["min_delta_ifd"] <= row["delta_ifd"] <= row["max_delta_ifd"])


def test_no_bounds_keep_every_finite_sample() -> None:
    delta_ifd = [-5.0, 7.0, None, float("inf")]
    bounds = applied_bounds(NO_SCORES, FilterConfig(min_delta_ifd=None, max_delta_ifd=None))
    assert [float(bound) for bound in bounds] == [float("-inf"), float("inf")]
    rows = _ledger(delta_ifd, [1] * 4, (float(bounds[0]), float(bounds[1])))
    assert [row["keep"] for row in rows] == [True, True, False, False]


def test_quantile_is_taken_over_finite_values_only() -> None:
    delta_ifd = np.array([np.nan, np.inf, -np.inf, *np.linspace(1, -1, 21)], np.float32)
    low, high = applied_bounds(
        delta_ifd, FilterConfig(min_delta_ifd=Quantile(quantile=0.1), max_delta_ifd=Quantile(quantile=1.0))
    )
    assert low == np.float32(-0.8)
    assert high == np.float32(1.0)
    assert low.dtype == np.float32


def test_ledger_covers_every_scored_sample_in_score_order_and_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    delta_ifd: list[float | None] = [None, *rng.uniform(-0.5, 1.3, 39).tolist()]
    job, rollouts, scores = _round(tmp_path, delta_ifd, pack={"max_tokens": 30}, generate={"max_new_tokens": 30})
    manifest = execute(job.store, job.config, FILTER_KEY)
    table = job.store.read_table(FILTER_KEY, FILTER)
    assert table.column("sample_id").equals(scores.column("sample_id"))
    assert table.column("delta_ifd").equals(scores.column("delta_ifd"))
    assert [record.rows for record in manifest.outputs] == [7, 7, 7, 7, 7, 5]

    tokens = {row["sample_id"]: len(row["prompt_ids"]) + len(row["response_ids"]) for row in rollouts.to_pylist()}
    seen = set()
    for row in table.to_pylist():
        value, length = row["delta_ifd"], tokens[row["sample_id"]]
        expected = (
            "not_scorable"
            if value is None
            else "below_min_delta_ifd"
            if value < 0
            else "above_max_delta_ifd"
            if value > np.float32(0.8)
            else "too_long_for_pack"
            if length > 30
            else "kept"
        )
        assert row["reason"] == expected
        assert row["keep"] == (expected == "kept")
        seen.add(expected)
    assert seen == {"not_scorable", "below_min_delta_ifd", "above_max_delta_ifd", "too_long_for_pack", "kept"}
    reasons = table.column("reason").to_pylist()
    counters = manifest.counters
    assert counters["samples"] == 40
    assert counters["kept"] == reasons.count("kept")
    assert counters["dropped"] == {reason: reasons.count(reason) for reason in counters["dropped"]}
    assert counters["kept"] + sum(counters["dropped"].values()) == 40
    assert sum(counters["zones"].values()) == 39
    assert counters["kept_tokens"] == sum(tokens[row["sample_id"]] for row in table.to_pylist() if row["keep"])
    assert (counters["min_delta_ifd"], counters["max_delta_ifd"]) == (0.0, pytest.approx(0.8))


def test_missing_bound_is_infinite_in_the_ledger(tmp_path: Path) -> None:
    job, _, _ = _round(tmp_path, [0.1, -3.0, 9.0], filter={"min_delta_ifd": None, "max_delta_ifd": 1.0})
    manifest = execute(job.store, job.config, FILTER_KEY)
    table = job.store.read_table(FILTER_KEY, FILTER)
    assert table.column("min_delta_ifd").to_pylist() == [float("-inf")] * 3
    assert table.column("keep").to_pylist() == [True, True, False]
    assert manifest.counters["min_delta_ifd"] is None


@pytest.mark.parametrize("bounds", [(0.2, None), (None, 0.7), (0.2, 0.7)])
def test_a_bound_that_is_a_quantile_is_that_of_the_whole_round(
    tmp_path: Path, bounds: tuple[float | None, float | None]
) -> None:
    """Of all shards, each of which has another distribution."""
    values = np.sort(np.random.default_rng(6).normal(size=20)).astype(np.float32)
    names = ("min_delta_ifd", "max_delta_ifd")
    quantiles = {name: None if share is None else {"quantile": share} for name, share in zip(names, bounds)}
    job, _, _ = _round(tmp_path, [None, *values.tolist()], filter=quantiles)
    counters = execute(job.store, job.config, FILTER_KEY).counters
    for name, share in zip(names, bounds, strict=True):
        expected = None if share is None else np.float32(np.quantile(values.astype(np.float64), share))
        assert counters[name] == expected
    low, high = (np.quantile(values, share) if share else None for share in bounds)
    kept = [(low is None or value >= low) and (high is None or value <= high) for value in values]
    assert job.store.read_table(FILTER_KEY, FILTER).column("keep").to_pylist() == [False, *kept]


def test_nothing_kept_stops_the_round_and_names_the_bounds(tmp_path: Path) -> None:
    job, _, _ = _round(tmp_path, [-0.4, -0.2, 3.5, None, 0.5], filter={"max_delta_ifd": 0.4})
    with pytest.raises(StageError) as error:
        execute(job.store, job.config, FILTER_KEY)
    message = str(error.value)
    assert "none of 5 samples is kept" in message
    assert "2 below the lower bound 0" in message
    assert "2 above the upper bound 0.4" in message
    assert "min -0.4, median 0.15, max 3.5" in message
    for key in ("filter.min_delta_ifd", "filter.max_delta_ifd"):
        assert key in message
    assert "pack.max_tokens" not in message
    assert not list(job.store.path(FILTER_KEY).glob("*.parquet"))
    assert job.store.manifest(FILTER_KEY) is None


def test_everything_too_long_names_the_pack_setting(tmp_path: Path) -> None:
    config = make_config(tmp_path, score={"top_k": 3}, pack={"max_tokens": 16}, generate={"max_new_tokens": 16})
    store = make_store(tmp_path, config)
    rollouts = rollout_table([[1] * 10] * 3, [[2] * 7] * 3)
    finish_stage(store, GENERATE_KEY, GENERATE, [rollouts])
    finish_stage(store, SCORE_KEY, score_schema(3, "float16"), [score_table(rollouts, [0.1] * 3, top_k=3)])
    with pytest.raises(StageError, match=r"3 longer than 16 tokens.*raise `pack.max_tokens`"):
        execute(store, config, FILTER_KEY)


def test_quantile_without_a_finite_value_still_explains_itself(tmp_path: Path) -> None:
    job, _, _ = _round(tmp_path, [None, None], filter={"max_delta_ifd": {"quantile": 0.9}})
    with pytest.raises(StageError, match=r"2 with no scorable response token. no delta-IFD is finite"):
        execute(job.store, job.config, FILTER_KEY)


@pytest.mark.parametrize("shares", [[0.0], [0.1, 0.37], [0.5, 1.0]])
def test_a_quantile_is_numpys_of_all_finite_values(shares: list[float]) -> None:
    values = np.random.default_rng(2).normal(size=997).astype(np.float32)
    for share in shares:
        _, high = applied_bounds(values, FilterConfig(min_delta_ifd=None, max_delta_ifd=Quantile(quantile=share)))
        assert high == np.float32(np.quantile(values.astype(np.float64), share))


def _fewer(table: pa.Table) -> pa.Table:
    return table.slice(0, table.num_rows - 1)


def _swapped(table: pa.Table) -> pa.Table:
    return table.take([0, 1, 2, 3, 4, 5, 6, 7, 9, 8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_fewer, r"round 0 · generate: row 9 holds no sample, where round 0 · score holds `r0-00009`"),
        (_swapped, r"round 0 · generate: row 8 holds `r0-00009`, where round 0 · score holds `r0-00008`"),
    ],
)
def test_tables_of_other_samples_than_each_other_are_an_error(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    job, rollouts, _ = _round(tmp_path, [0.1] * 10)
    finish_stage(job.store, GENERATE_KEY, GENERATE, split_rows(change(rollouts), 4))
    with pytest.raises(ArtifactError, match=message):
        execute(job.store, job.config, FILTER_KEY)


def test_a_sample_that_was_never_scored_is_an_error(tmp_path: Path) -> None:
    job, _, scores = _round(tmp_path, [0.1] * 10)
    finish_stage(job.store, SCORE_KEY, score_schema(3, "float16"), split_rows(_fewer(scores), 4))
    with pytest.raises(ArtifactError, match=r"generate: row 9 holds `r0-00009`, where round 0 · score holds no sample"):
        execute(job.store, job.config, FILTER_KEY)


def test_the_ledger_does_not_depend_on_the_rollouts_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    delta_ifd: list[float | None] = [None, *rng.uniform(-0.5, 1.3, 39).tolist()]
    digests = []
    for rows in (3, 40):
        job, rollouts, _ = _round(tmp_path / str(rows), delta_ifd)
        finish_stage(job.store, GENERATE_KEY, GENERATE, split_rows(rollouts, rows))
        digests.append([record.sha256 for record in execute(job.store, job.config, FILTER_KEY).outputs])
    assert digests[0] == digests[1]
