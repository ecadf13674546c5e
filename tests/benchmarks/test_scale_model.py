from dataclasses import replace

import pytest

from benchmarks.scale_model import ROUND_STAGES, WORK, WRITTEN, Line, Observed, Rates, Workload, fit, simulate
from benchmarks.sizing import H200_TOKENS, PAPER, PAPER_HOURS, h200_hours, rates, run_table, simulated

LOAD = Workload(
    prompts=100, rounds=3, prompt_tokens=10, response_tokens=20, samples_per_prompt=2, kept=0.5, epochs_per_round=4
)


def _rates(**seconds: Line) -> Rates:
    nothing = dict.fromkeys(ROUND_STAGES, Line(0.0, 0.0))
    return Rates(nothing | seconds, nothing, between=0.5)


def _observed(load: Workload, known: Rates) -> Observed:
    seconds = {stage: known.seconds[stage].at(WORK[stage](load)) for stage in ROUND_STAGES}
    size = {stage: known.bytes[stage].at(WRITTEN[stage](load)) for stage in ROUND_STAGES}
    return Observed(load, seconds, size, sum(seconds.values()) + known.between)


def test_work_is_counted_as_stages_count_it() -> None:
    assert {stage: WORK[stage](LOAD) for stage in ("prompts", "generate", "score", "filter", "pack", "train")} == {
        "prompts": 100,
        "generate": 4_000,
        "score": 6_000,
        "filter": 200,
        "pack": 3_000,
        "train": 12_000,
    }
    assert (WRITTEN["score"](LOAD), WRITTEN["pack"](LOAD), WRITTEN["train"](LOAD)) == (4_000, 2_000, 0)


def test_rates_of_two_sizes_predict_a_third() -> None:
    seconds = {stage: Line(2.0 + index, 1e-3 * index) for index, stage in enumerate(ROUND_STAGES)}
    # Export and evaluation cost the same at every size.
    seconds |= {stage: Line(3.0, 0.0) for stage in ("export", "evaluate")}
    known = Rates(seconds, {stage: Line(100.0, 0.0) for stage in ROUND_STAGES}, between=1.5)
    found = fit([_observed(replace(LOAD, prompts=size), known) for size in (100, 400)])
    large = replace(LOAD, prompts=1_600)
    predicted, expected = simulate(large, found), _observed(large, known)
    assert predicted.walls == pytest.approx([expected.wall] * 3)
    assert predicted.seconds[0] == pytest.approx(expected.seconds)
    assert predicted.bytes[0] == pytest.approx(expected.bytes)


def test_overlap_hides_the_shorter_of_sampling_and_training() -> None:
    known = _rates(generate=Line(4.0, 0.0), score=Line(1.0, 0.0), pack=Line(2.0, 0.0), train=Line(8.0, 0.0))
    assert simulate(LOAD, known).walls == [15.5, 15.5, 15.5]
    assert simulate(LOAD, known, overlap=True).walls == [15.5, 10.5, 10.5]
    slow = _rates(generate=Line(9.0, 0.0), score=Line(1.0, 0.0), pack=Line(2.0, 0.0), train=Line(8.0, 0.0))
    assert simulate(LOAD, slow, overlap=True).walls == [20.5, 12.5, 12.5]


def test_workers_share_work_but_no_start() -> None:
    known = _rates(generate=Line(10.0, 0.01))
    assert simulate(LOAD, known, workers={"generate": 4}).seconds[0]["generate"] == pytest.approx(10 + 40 / 4)


def test_the_papers_run_costs_what_the_paper_says() -> None:
    found = simulated(PAPER, 1)
    for stage, hours in PAPER_HOURS.items():
        assert sum(seconds[stage] for seconds in found.seconds) / 3600 == pytest.approx(hours)
    assert set(rates().seconds) == {*ROUND_STAGES, "prompts"}


def test_measured_rates_count_every_pass_over_a_sample() -> None:
    load = Workload(prompts=1000, rounds=3, prompt_tokens=40, response_tokens=60, samples_per_prompt=2, kept=0.5)
    hours = h200_hours(load)
    passes = {"teacher": 40 + 60 + 60, "student": 60}
    seconds = sum(3 * 2000 * tokens / H200_TOKENS[model] for model, tokens in passes.items())
    assert hours["score"] == pytest.approx(seconds / 3600)
    assert hours["generate"] == pytest.approx(3 * 2000 * 60 / H200_TOKENS["generate"] / 3600)
    assert hours["train"] == pytest.approx(3 * 5 * 1000 * 100 / H200_TOKENS["train"] / 3600)


def test_a_runs_table_names_every_stage() -> None:
    text = run_table(1e6, 150, 500, 8)
    assert all(f"| {stage} |" in text for stage in ROUND_STAGES)
    assert "1,000,000 prompts, 2 rounds of 5 epochs" in text
