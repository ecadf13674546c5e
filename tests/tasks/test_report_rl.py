"""The report of an RL run, against the same tables read the plain way."""

from pathlib import Path

import numpy as np
import pytest

from schemas.config import RLConfig
from schemas.rl_tables import RL_METRICS
from schemas.run_store import REPORT_NAME, RunStore
from tasks.graph import PROMPTS
from tasks.report import run_report, write_report
from tasks.report.drawing import Figure
from tasks.report.rl_findings import RLFindings, read_rl_findings
from tasks.report.rl_page import rl_report_html, rl_sections_of
from tasks.rl.graph import BASELINE, RL
from tests.report_rl_runs import synthetic_rl_run


def read(store: RunStore) -> RLFindings:
    config = store.settings
    assert isinstance(config, RLConfig)
    return read_rl_findings(store, config)


def figures_of(store: RunStore) -> dict[str, Figure]:
    return {figure.key: figure for section in rl_sections_of(read(store)) for figure in section.figures}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return synthetic_rl_run(tmp_path_factory.mktemp("rl"), steps=301)


def test_held_out_prompts_are_told_apart_by_what_became_of_them(store: RunStore) -> None:
    answers = read(store).answers
    assert answers is not None
    assert answers.became_right.to_pylist() == ["p92", "p93", "p94"]
    assert answers.became_wrong.to_pylist() == ["p91"]
    assert answers.stayed_right.to_pylist() == ["p90"]
    assert answers.stayed_wrong.to_pylist() == ["p95"]
    assert figures_of(store)["answers"].rows == [
        ["became right", "3"],
        ["became wrong", "1"],
        ["stayed right", "1"],
        ["stayed wrong", "1"],
    ]


def test_prompts_whose_answer_changed_are_there_to_read(store: RunStore) -> None:
    changed = [prompt for prompt in read(store).shown if prompt.kind.startswith("became")]
    assert {prompt.prompt_id: prompt.kind for prompt in changed} == {
        "p92": "became right",
        "p93": "became right",
        "p94": "became right",
        "p91": "became wrong",
    }
    for prompt in changed:
        assert prompt.prompt == [("user", "What is 12 + 30?")]
        assert [(response.title, response.text) for response in prompt.responses] == [
            ("before", "42 by start"),
            ("after", "42 by rl"),
        ]


def test_the_first_and_the_last_step_show_their_best_and_worst_response(store: RunStore) -> None:
    learned = [prompt for prompt in read(store).shown if prompt.kind.startswith("step")]
    assert [(prompt.kind, prompt.prompt_id) for prompt in learned] == [
        ("step 1", "p2"),
        ("step 1", "p3"),
        ("step 301", "p2"),
        ("step 301", "p3"),
    ]
    best, worst = learned[0].responses
    assert (best.title, best.reward, best.text) == ("highest reward", 1.0, "42 in step 1, 2")
    assert (worst.title, worst.reward) == ("lowest reward", 0.0)
    assert [response.title for response in learned[1].responses] == ["all rewards alike"]


def test_a_point_of_a_curve_is_the_mean_of_its_steps(store: RunStore) -> None:
    curves = read(store).curves
    assert curves is not None
    table = store.read_part(store.path(RL, "metrics.parquet"), RL_METRICS)
    rewards, first = table.column("reward").to_numpy(), 0
    for last, found in zip(curves["step"].astype(int), curves["reward"], strict=True):
        assert found == pytest.approx(rewards[first:last].mean())
        first = last
    assert first == table.num_rows
    assert len(curves["step"]) <= 240


def test_what_was_not_measured_is_not_drawn(store: RunStore) -> None:
    keys = set(figures_of(store))
    assert {"metric-accuracy", "curve-reward", "curve-entropy", "curve-truncation-rate", "time"} <= keys
    # Equal to the reward, and without `grpo.beta` nobody measures the KL.
    assert not keys & {"curve-score", "curve-kl", "curve-clip-ratio"}


def test_steps_that_sample_nothing_break_no_line(tmp_path: Path) -> None:
    figures = figures_of(synthetic_rl_run(tmp_path, steps=40, sampled_every=2))
    assert len(figures["curve-reward"].rows) == 20
    assert len(figures["curve-entropy"].rows) == 40
    # One stroke a path: the line and its running mean.
    svg = figures["curve-reward"].svg
    assert svg.count("M") == svg.count("<path") == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_few_steps_is_drawn(tmp_path: Path, steps: int) -> None:
    store = synthetic_rl_run(tmp_path, steps=steps)
    page = rl_report_html(read(store))
    assert 'id="figure-curve-reward"' in page
    learned = [prompt.kind for prompt in read(store).shown if prompt.kind.startswith("step")]
    assert learned == [f"step {step}" for step in range(1, steps + 1) for _ in range(2)]


def test_a_run_cut_short_has_a_report_of_what_is_there(tmp_path: Path) -> None:
    page = run_report(synthetic_rl_run(tmp_path, done=(PROMPTS, BASELINE)))
    assert "2 of 4 stages done" in page
    assert 'id="figure-metric-accuracy"' in page
    assert "figure-curve-reward" not in page


def test_the_page_is_written_into_the_run(store: RunStore) -> None:
    assert write_report(store) == f"{store.url}/{REPORT_NAME}"
    page = (store.folder / REPORT_NAME).read_text(encoding="utf-8")
    assert "finished" in page
    assert "before 33.3 %" in page
    assert np.all([f'id="figure-{key}"' in page for key in figures_of(store)])
