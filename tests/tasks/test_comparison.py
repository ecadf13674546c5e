"""What a comparison makes of its runs: rates, intervals, differences, and the table."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.comparison_tables import COMPARISON, COMPARISON_RUNS
from schemas.config import ComparisonConfig
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_METRICS, EVALUATE_RESPONSES, GENERATE, TRAIN_METRICS
from tasks.comparison.intervals import crossed_interval, t_quantile
from tasks.comparison.landmarks import Landmark
from tasks.comparison.outcome import Outcome, Scores, read_outcome, read_scores, step_prompts, validation_prompts
from tasks.comparison.table import (
    MethodRuns,
    best_rate,
    comparison_markdown,
    comparison_table,
    difference,
    runs_table,
)
from tasks.graph import loop
from tests.run_fixtures import finish_stage, make_config, make_store, rollout_table, split_rows

PROMPTS = tuple(f"p{index:02d}" for index in range(20))


def outcome(values: Any, *, kl: float = 1.0, seconds: float = 1.0) -> Outcome:
    return Outcome(Scores(PROMPTS, np.asarray(values, float)), kl, 0.1, None, seconds, 100, 10)


# Each has a digit of its own, so that a sum tells which of them are in it.
SECONDS = {
    "prompts": 1,
    "models": 10,
    "reference": 100,
    "baseline": 1_000,
    "generate": 10_000,
    "score": 100_000,
    "filter": 1_000_000,
    "pack": 10_000_000,
    "train": 100_000_000,
    "export": 1_000_000_000,
    "evaluate": 10_000_000_000,
}


def finished_run(tmp_path: Path, trained_tokens: tuple[int, int] = (240, 360), **sections: Any) -> RunStore:
    """A run of two rounds whose stages are finished, with the tables that a comparison reads.

    Round 0 has three samples of 5, 7 and 8 tokens; rounds 0 and 1 end after optimizer steps 2 and 6, and the second
    takes twice the time of the first. Held-out KL falls, and policy KL rises within a round.
    """
    config = make_config(tmp_path, rounds=2, **sections)
    store = make_store(tmp_path, config)
    samples = rollout_table([[1] * 2, [1] * 1, [1] * 4], [[1] * 3, [1] * 6, [1] * 4])
    for key in loop(config):
        index = key.round or 0
        counters: dict[str, Any] = {"seconds": SECONDS[key.stage] * (2 if index == 1 else 1)}
        schema, shards = GENERATE, split_rows(samples, 2) if index == 0 else [samples.slice(0, 1)]
        if key.stage == "generate":
            counters["tokens"] = 13
        elif key.stage == "train":
            counters |= {"tokens": trained_tokens[index], "policy_step": (2, 6)[index]}
            step: dict[str, Any] = {"epoch": 1.0, "round": index, "loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0}
            steps = [
                step | {"step": number, "response_tokens": 1, "policy_kl": policy_kl}
                for number, policy_kl in enumerate((0.25 + index, 0.5 + index, None))
            ]
            schema, shards = TRAIN_METRICS, [pa.Table.from_pylist(steps, schema=TRAIN_METRICS.columns)]
        elif key.stage == "evaluate":
            row: dict[str, Any] = {"round": key.round, "model": "student", "metric": "kl_teacher_student", "n": 9}
            row |= {"value": 5.0 - 2 * (key.round or 0), "stderr": 0.125}
            schema, shards = EVALUATE_METRICS, [pa.Table.from_pylist([row], schema=EVALUATE_METRICS.columns)]
        else:
            shards = []
        finish_stage(store, key, schema, shards, **counters)
        if key.stage == "evaluate":
            responses = EVALUATE_RESPONSES.columns.empty_table()
            store.write_table(store.path(key, "responses.parquet"), responses, EVALUATE_RESPONSES)
    return store


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062047), (2, 4.3026527), (4, 2.7764451), (30, 2.0422725), (399, 1.9659273)]
)
def test_t_quantiles_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-6)


def test_a_fractional_degree_of_freedom_gives_the_probability_back() -> None:
    freedom = 2.5
    quantile = t_quantile(0.9, freedom)
    # The density itself, integrated by the midpoint rule.
    width = quantile / 200_000
    places = (np.arange(200_000) + 0.5) * width
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    inside = (constant * (1 + places**2 / freedom) ** (-(freedom + 1) / 2)).sum() * width
    assert inside == pytest.approx(0.4, abs=1e-8)


def test_one_seed_has_the_t_interval_of_its_prompts() -> None:
    values = np.random.default_rng(0).random((1, 30))
    found = crossed_interval(values, share=True)
    half = 2.0452296 * values.std(ddof=1) / math.sqrt(30)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-6)


def test_variance_is_that_of_the_two_way_analysis() -> None:
    random = np.random.default_rng(1)
    values = 0.3 * random.normal(size=(4, 1)) + 0.2 * random.normal(size=(1, 25)) + 0.1 * random.normal(size=(4, 25))
    values /= 10
    mean = values.mean()
    # Sums of squares by loops, as textbooks have them.
    of_seeds = sum(25 * (values[s].mean() - mean) ** 2 for s in range(4)) / 3
    of_prompts = sum(4 * (values[:, p].mean() - mean) ** 2 for p in range(25)) / 24
    rest = 0.0
    for s in range(4):
        for p in range(25):
            rest += (values[s, p] - values[s].mean() - values[:, p].mean() + mean) ** 2
    rest /= 3 * 24
    assert min(of_seeds, of_prompts) > rest
    variance = (of_seeds + of_prompts - rest) / 100
    freedom = variance**2 / ((of_seeds / 100) ** 2 / 3 + (of_prompts / 100) ** 2 / 24 + (rest / 100) ** 2 / 72)
    half = t_quantile(0.975, freedom) * math.sqrt(variance)
    found = crossed_interval(values)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-9)


@pytest.mark.parametrize(
    ("of_seeds", "of_prompts", "mean_square", "quantile"),
    [
        # Mean squares of seeds, prompts, residuals: 0.16, 0.01, 0.03. Of seeds alone, with 2 degrees of freedom.
        (0.2, 0.05, 0.16, 4.3026527),
        # 0.01, 0.16, 0.03: of prompts alone, with 3.
        (0.05, 0.2, 0.16, 3.1824463),
        # 0.01, 0.01, 0.03: neither shows above the residuals, which are all there is, with 6.
        (0.05, 0.05, 0.03, 2.4469119),
    ],
)
def test_a_component_that_does_not_show_above_the_residuals_counts_nothing(
    of_seeds: float, of_prompts: float, mean_square: float, quantile: float
) -> None:
    # Sums of squares 8 of_seeds^2, 12 of_prompts^2 and 8 * 0.15^2, over 2, 3 and 6: the three parts are orthogonal.
    values = (
        0.1
        + of_seeds * np.array([[-1.0], [0.0], [1.0]])
        + of_prompts * np.array([[1.0, 1.0, -1.0, -1.0]])
        + 0.15 * np.array([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    )
    half = quantile * math.sqrt(mean_square / 12)
    found = crossed_interval(values)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), rel=1e-6)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(2)
    draws, held = 400, 0
    for _ in range(draws):
        values = (
            0.05 * random.normal(size=(5, 1)) + 0.2 * random.normal(size=(1, 40)) + 0.2 * random.normal(size=(5, 40))
        )
        found = crossed_interval(values / 4)
        held += found.low <= 0.0 <= found.high
    # 95 % of 400 is 380, with a standard error of 4.4.
    assert 362 <= held <= 396


def test_equal_values_still_have_an_interval() -> None:
    every = crossed_interval(np.ones((3, 50)), share=True)
    assert (every.mean, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(1 - 3.8414588 / 53.8414588)
    none = crossed_interval(np.zeros((2, 50)))
    assert none.low == pytest.approx(-3.8414588 / 53.8414588)
    assert none.high == -none.low
    # One of three responses to each prompt is right.
    thirds = crossed_interval(np.full((1, 50), 1 / 3), share=True)
    assert thirds.high - thirds.low == pytest.approx(2 * 3.8414588 / 53.8414588)


def test_validation_prompts_are_a_share_that_does_not_depend_on_order() -> None:
    chosen = validation_prompts(PROMPTS, 0.3)
    assert len(chosen) == 6
    assert validation_prompts(PROMPTS[::-1], 0.3) == chosen


def test_the_rate_is_chosen_on_validation_prompts_alone_and_ties_by_kl() -> None:
    validation = frozenset(PROMPTS[:5])
    good_there = outcome([1] * 5 + [0] * 15)
    good_elsewhere = outcome([0] * 5 + [1] * 15)
    assert best_rate({1e-3: good_elsewhere, 1e-4: good_there}, validation) == 1e-4
    tied = {1e-3: outcome([1] * 20, kl=0.5), 1e-4: outcome([1] * 5 + [0] * 15, kl=0.4)}
    assert best_rate(tied, validation) == 1e-4
    diverged = {1e-3: outcome([0] * 20, kl=math.nan), 1e-4: outcome([0] * 20, kl=3.0)}
    assert best_rate(diverged, validation) == 1e-4


def test_a_difference_is_paired_by_seed_and_prompt() -> None:
    random = np.random.default_rng(3)
    left = {s: outcome(random.integers(0, 2, 20)) for s in range(3)}
    right = {s: outcome(random.integers(0, 2, 20)) for s in range(1, 4)}
    validation = frozenset(PROMPTS[:4])
    found = difference(left, right, validation)
    assert found is not None
    paired = np.stack([left[s].scores.values[4:] - right[s].scores.values[4:] for s in (1, 2)])
    assert found == crossed_interval(paired)
    assert difference({0: left[0]}, {5: right[1]}, validation) is None


def test_the_tables_hold_every_method_and_run() -> None:
    comparison = ComparisonConfig.model_validate(
        {
            "name": "c",
            "run": "run.yaml",
            "seeds": [0, 1],
            "methods": {
                "npd": {"role": "npd", "title": "N|PD"},
                "sft": {"role": "baseline"},
                "late": {"role": "baseline"},
            },
        }
    )
    validation = frozenset(PROMPTS[:4])
    npd = {s: outcome([1] * 4 + [1] * (12 + s) + [0] * (4 - s), kl=0.5 + s, seconds=2.0 + s) for s in (0, 1)}
    npd[1] = replace(npd[1], policy_kl=0.25)
    sft = {0: outcome([0] * 4 + [1] * 8 + [0] * 8, seconds=5.0)}
    runs = {
        "npd": MethodRuns(1e-3, npd, {(1e-3, 0): npd[0], (1e-3, 1): npd[1], (1e-4, 0): outcome([0] * 20)}),
        "sft": MethodRuns(1e-4, sft, {(1e-4, 0): sft[0]}, {0: Scores(PROMPTS, np.repeat([0.0, 1.0], [8, 12]))}),
    }
    teacher = Landmark("teacher", "teacher", "teacher", Scores(PROMPTS, np.ones(20)))
    table = COMPARISON.validate(comparison_table(comparison, runs, [teacher], validation), "comparison")
    rows = {row["method"]: row for row in table.to_pylist()}
    assert list(rows) == ["teacher", "npd", "sft"]
    assert rows["npd"]["accuracy"] == pytest.approx((12 + 13) / 32)
    assert rows["npd"]["seconds"] == 2.5
    assert (rows["npd"]["seconds_min"], rows["npd"]["seconds_max"], rows["npd"]["seeds"]) == (2.0, 3.0, 2)
    assert rows["npd"]["kl_teacher_student"] == 1.0
    assert rows["npd"]["kl_stderr"] == pytest.approx(math.sqrt(0.5 / 2 + 0.01))
    assert rows["npd"]["difference"] is None
    assert rows["sft"]["difference"] == pytest.approx(12 / 16 - 8 / 16)
    assert rows["sft"]["seconds_ratio"] == 2.0
    assert rows["teacher"]["seconds"] is None
    after = crossed_interval(np.repeat([0.0, 1.0], [4, 12])[None], share=True)
    assert (rows["sft"]["rl_accuracy"], rows["sft"]["rl_low"], rows["sft"]["rl_high"]) == (0.75, after.low, after.high)
    assert rows["npd"]["rl_accuracy"] is None
    found = COMPARISON_RUNS.validate(runs_table(comparison, runs, validation), "runs").to_pylist()
    assert [(row["method"], row["learning_rate"], row["seed"], row["chosen"]) for row in found] == [
        ("npd", 1e-4, 0, False),
        ("npd", 1e-3, 0, True),
        ("npd", 1e-3, 1, True),
        ("sft", 1e-4, 0, True),
    ]
    assert found[1]["validation_accuracy"] == 1.0
    assert [row["rl_accuracy"] for row in found] == [None, None, None, 0.75]
    markdown = comparison_markdown(table)
    cells = [line.count(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    assert len(cells) == 4
    assert len(set(cells)) == 1
    assert "after GRPO, %" in markdown
    ends = {name: tuple(100 * rows["sft"][f"{name}_{end}"] for end in ("low", "high")) for name in ("accuracy", "rl")}
    ends["difference"] = tuple(100 * rows["sft"][f"difference_{end}"] for end in ("low", "high"))
    low_and_high = {name: f"({low:.1f} to {high:.1f})" for name, (low, high) in ends.items()}
    told = [cell.strip() for cell in next(row for row in markdown.splitlines() if "| sft |" in row).split("|")[1:-1]]
    assert told == [
        "sft",
        f"50.0 {low_and_high['accuracy']}",
        f"+25.0 {low_and_high['difference']}",
        "1.0000 ± 0.1000",
        "",
        "5.0",
        "2.00",
        "100",
        "10",
        "0.0001",
        "1",
        f"75.0 {low_and_high['rl']}",
    ]
    assert "| **N\\|PD** | 78.1 (" in markdown
    assert " | 1.0000 ± 0.5099 | 0.2500 | 2.5 (2.0 to 3.0) | 1.00 | " in markdown
    without = runs | {"sft": MethodRuns(1e-4, sft, {(1e-4, 0): sft[0]})}
    assert "after GRPO" not in comparison_markdown(comparison_table(comparison, without, [teacher], validation))


def test_a_part_of_a_score_is_no_right_response(tmp_path: Path) -> None:
    store, key = make_store(tmp_path, make_config(tmp_path)), StageKey("evaluate", 0)
    scores = [1.0, 0.5, 0.01, None, 1.0, 1.0]
    rows = [
        {
            "model": "start" if place == 4 else "student",
            "round": 0,
            "prompt_id": f"p{place // 2}",
            "sample_index": place % 2,
            "response": "x",
            "response_tokens": 1,
            "finish_reason": "stop",
            "score": score,
            "repetition": 0.0,
        }
        for place, score in enumerate(scores)
    ]
    table = pa.Table.from_pylist(rows, schema=EVALUATE_RESPONSES.columns)
    store.write_table(store.path(key, "responses.parquet"), table, EVALUATE_RESPONSES)
    found = read_scores(store, key, "student")
    assert (found.prompt_ids, found.values.tolist()) == (("p0", "p1", "p2"), [0.5, 0.0, 1.0])


@pytest.mark.parametrize(
    ("tokens", "prompts"),
    [
        # 600 tokens over 6 steps, 20 tokens over 3 samples: 100 / (20 / 3).
        ((240, 360), 15),
        # Half a token a step: not even one sample.
        ((2, 1), 1),
    ],
)
def test_a_step_is_measured_in_samples_of_the_mean_length(
    tmp_path: Path, tokens: tuple[int, int], prompts: int
) -> None:
    store = finished_run(tmp_path, tokens)
    assert step_prompts(store, store.config) == prompts


@pytest.mark.parametrize(("policy", "generated"), [("student", 26), ("answers", 0)])
def test_an_outcome_is_that_of_the_last_round(tmp_path: Path, policy: str, generated: int) -> None:
    store = finished_run(tmp_path, generate={"policy": policy})
    found = read_outcome(store, store.config)
    assert (found.kl_teacher_student, found.kl_stderr, found.policy_kl) == (3.0, 0.125, 1.5)
    assert (found.steps, found.generated_tokens) == (6, generated)


UNFILTERED = {"min_delta_ifd": None, "max_delta_ifd": None}


@pytest.mark.parametrize(
    ("kd_weight", "bounds", "seconds"),
    [
        (1.0, {}, 3_333_330_000),
        (1.0, UNFILTERED, 3_333_330_000),
        # Hard labels alone, but samples are dropped by their scores.
        (0.0, {}, 3_333_330_000),
        (0.0, UNFILTERED | {"min_delta_ifd": 0.0}, 3_333_330_000),
        (0.0, UNFILTERED | {"max_delta_ifd": 0.8}, 3_333_330_000),
        # Nothing reads the scores: a method that does without them is not charged for them.
        (0.0, UNFILTERED, 3_333_030_000),
    ],
)
def test_a_methods_time_is_that_of_the_stages_it_needs(
    tmp_path: Path, kd_weight: float, bounds: dict[str, Any], seconds: int
) -> None:
    store = finished_run(tmp_path, train={"kd_weight": kd_weight}, filter=bounds)
    assert read_outcome(store, store.config).seconds == seconds
