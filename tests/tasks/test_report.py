"""What the report counts, against counts made the plain way from the same tables."""

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from markdown_it import MarkdownIt

from schemas.config import StudentConfig, parse_config
from schemas.errors import ArtifactError
from schemas.run_store import REPORT_NAME, RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import FILTER, GENERATE, TRAIN_METRICS, ZONES, TableSchema, pack_schema, score_schema
from tasks.comparison.intervals import Interval, crossed_interval
from tasks.report import run_report, write_report
from tasks.report.drawing import Scale, around
from tasks.report.evaluation import Metric, change_text, metrics_of, shown_names, told_apart
from tasks.report.findings import RunFindings, read_findings
from tasks.report.histograms import Grid, Values
from tasks.report.images import figures_markdown, image_svg
from tasks.report.ledger import DELTA_IFD, IFD
from tasks.report.outcome_plots import metric_figure, rate_figures
from tasks.report.page import level, sections_of
from tasks.report.sample_plots import ifd_figure
from tasks.report.samples import SHOWN_SAMPLES, read_samples, samples_to_read
from tasks.report.stages import StageCost, mean_rate
from tasks.report.training import curves_of
from tasks.report.training_plots import training_figures
from tests.report_runs import TOP_K, WORDS, metric, synthetic_run, write_metrics
from tests.run_fixtures import make_config, make_store

HOSTILE = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202egnp\x1b[2J"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return synthetic_run(tmp_path_factory.mktemp("report"), 3000)


@pytest.fixture(scope="module")
def findings(store: RunStore) -> RunFindings:
    return read_findings(store)


def column(store: RunStore, key: StageKey, schema: TableSchema, name: str) -> Values:
    return np.asarray(store.read_table(key, schema, [name]).column(name), np.float64)


def test_the_ledger_is_counted_by_zone_and_reason(store: RunStore, findings: RunFindings) -> None:
    for ledger in findings.ledgers:
        table = store.read_table(StageKey("filter", ledger.round), FILTER)
        assert ledger.samples == table.num_rows == ledger.delta_ifd.sum()
        assert (ledger.low, ledger.high) == pytest.approx((0.0, 0.8))
        for place, zone in enumerate(ZONES):
            of_zone = table.filter(pc.equal(table.column("zone"), zone))
            assert ledger.zone(zone) == of_zone.num_rows == ledger.delta_ifd[place].sum()
            values = of_zone.column("delta_ifd").to_numpy().astype(np.float64)
            edges = np.linspace(DELTA_IFD.low, DELTA_IFD.high, DELTA_IFD.bins + 1)
            expected, _ = np.histogram(np.clip(values, -7.999, 7.999), edges)
            # Values on an edge may fall to either side of it.
            assert np.abs(np.cumsum(ledger.delta_ifd[place] - expected)).max() <= 2
        assert ledger.kept == pc.sum(table.column("keep")).as_py()
        reasons = {row["values"]: row["counts"] for row in pc.value_counts(table.column("reason")).to_pylist()}
        assert ledger.reasons == reasons
        assert next(iter(ledger.reasons)) == "kept"


def test_ifd_is_counted_in_both_directions(store: RunStore, findings: RunFindings) -> None:
    schema = score_schema(TOP_K, "float16")
    student = column(store, StageKey("score", 1), schema, "student_ifd")
    teacher = column(store, StageKey("score", 1), schema, "teacher_ifd")
    edges = np.linspace(IFD.low, IFD.high, IFD.bins + 1)
    expected, _, _ = np.histogram2d(np.clip(student, 0, 7.999), np.clip(teacher, 0, 7.999), [edges, edges])
    assert findings.ifd[1].sum() == expected.sum()
    assert np.abs(findings.ifd[1] - expected).sum() <= 6


def test_an_ifd_that_is_off_the_drawing_is_told_of(findings: RunFindings) -> None:
    cells = np.zeros((IFD.bins, IFD.bins), np.int64)
    cells[40, 50] = 3
    assert "above 8" not in ifd_figure(findings.ledgers[0], cells).caption
    cells[40, -1] = 1
    assert "above 8 is shown, and counts in means, as 8" in ifd_figure(findings.ledgers[0], cells).caption


def test_a_window_keeps_every_count_and_has_an_edge_on_the_bound() -> None:
    grid = Grid(-8.0, 8.0, 3200)
    values = np.random.default_rng(0).normal(0.3, 0.7, 5000)
    counts = grid.count(values)
    window = grid.window(counts, 48, (0.0, 0.8))
    assert window.sum(counts).sum() == 5000
    assert window.bins <= 50
    assert np.abs(window.edges).min() < 1e-9
    # A bound that lies nowhere near the samples does not stretch the drawing.
    assert grid.window(counts, 48, (7.5,)).edges[-1] < 6
    inside = slice(1, window.bins - 1)
    expected, _ = np.histogram(values, window.edges)
    assert np.abs(window.sum(counts)[inside] - expected[inside]).max() <= 2


def test_curves_are_token_weighted_means(store: RunStore) -> None:
    table = store.read_table(StageKey("train", 1), TRAIN_METRICS)
    curves = curves_of(table, 1)
    values = {name: table.column(name).to_numpy() for name in ("loss", "response_tokens", "step", "learning_rate")}
    starts = [int(np.flatnonzero(values["step"] == step)[0]) for step in curves.values["step"]]
    first = 0
    for place, last in enumerate(starts):
        rows = slice(first, last + 1)
        expected = np.average(values["loss"][rows], weights=values["response_tokens"][rows])
        assert curves.values["loss"][place] == pytest.approx(expected)
        assert curves.values["learning_rate"][place] == values["learning_rate"][last]
        first = last + 1
    assert first == table.num_rows == curves.steps
    assert len(curves.values["step"]) <= 240
    place = table.schema.get_field_index("kd")
    warmup = table.slice(0, 3).set_column(place, "kd", pa.nulls(3, pa.float64()))
    assert np.isnan(curves_of(warmup, WARMUP).values["kd"]).all()


def test_a_policy_kl_measured_at_some_steps_is_one_line_of_these() -> None:
    rows = 30
    kl = [0.01 * (step + 1) if step % 10 == 9 else None for step in range(rows)]
    columns: dict[str, Any] = {name: np.linspace(1.0, 2.0, rows) for name in ("loss", "ce", "kd", "learning_rate")}
    columns |= {"step": np.arange(1, rows + 1), "response_tokens": np.full(rows, 7), "policy_kl": kl}
    curves = curves_of(pa.table(columns), 0)
    assert curves.most_policy_kl == pytest.approx(0.3)
    figure = next(figure for figure in training_figures([curves], 0.1) if figure.key == "policy-kl")
    assert [row[0] for row in figure.rows] == ["10", "20", "30"]
    (line,) = re.findall(r'<path d="([^"]*)" class="line', str(figure.svg))
    assert (line.count("M"), line.count("L")) == (1, 2)
    # A round shorter than the way to its second measurement.
    alone = curves_of(pa.table(columns).slice(0, 12), 0)
    figure = next(figure for figure in training_figures([alone], 0.1) if figure.key == "policy-kl")
    assert re.findall(r'<path d="([^"]*)" class="(line[^"]*)"', str(figure.svg))[0][1] == "line dot line-kd"
    unmeasured = curves_of(pa.table(columns | {"policy_kl": pa.nulls(rows, pa.float64())}), 0)
    assert [figure.key for figure in training_figures([unmeasured], 0.1)] == ["loss", "learning-rate"]


def test_packs_are_counted(store: RunStore, findings: RunFindings) -> None:
    assert [fill.round for fill in findings.packs] == [WARMUP, 0, 1]
    for fill in findings.packs:
        schema = pack_schema(None if fill.round == WARMUP else TOP_K)
        lengths = store.read_table(StageKey("pack", fill.round), schema, ["seq_lengths"]).column("seq_lengths")
        fills = [sum(row) / 4096 for row in lengths.to_pylist()]
        assert (fill.packs, fill.sequences) == (24, 24 * 16)
        assert (fill.least, fill.fill) == pytest.approx((min(fills), np.mean(fills)))
        # Some are a little less full than counts as full.
        assert 0 < fill.full == sum(each >= 0.95 for each in fills) < sum(each >= 0.94 for each in fills)


def test_samples_of_every_zone_with_both_models_probabilities(store: RunStore) -> None:
    table = store.read_table(StageKey("generate", 0), GENERATE)
    scores = store.read_table(StageKey("score", 0), score_schema(TOP_K, "float16"))
    ids = table.column("sample_id").to_pylist()
    shown = read_samples(store, store.config, 0)
    assert [sample.zone for sample in shown] == [zone for zone in ZONES for _ in range(SHOWN_SAMPLES)]
    for sample in shown:
        row = ids.index(sample.sample_id)
        tokens = table.column("response_ids")[row].as_py()
        assert [token.text for token in sample.tokens] == [WORDS[token] for token in tokens]
        logprobs = table.column("sampled_logprobs")[row].as_py()
        assert [token.student for token in sample.tokens] == pytest.approx(np.exp(logprobs))
        top, top_logprobs = (scores.column(f"teacher_topk_{what}")[row].as_py() for what in ("ids", "logprobs"))
        for token, wanted, names, values in zip(sample.tokens, tokens, top, top_logprobs, strict=True):
            if wanted in names:
                assert token.teacher == pytest.approx(float(np.exp(float(values[names.index(wanted)]))))
            else:
                assert token.teacher is None
                assert token.teacher_least == pytest.approx(float(np.exp(float(values[-1]))))
    assert any(token.teacher is None for sample in shown for token in sample.tokens)
    assert samples_to_read(store, store.config, [0, 1]) == {0: shown, 1: read_samples(store, store.config, 1)}


@pytest.mark.parametrize(
    ("policy", "said"),
    [("teacher", "sampled by the teacher, 000000000000"), ("answers", "the prompts&#39; own answers")],
)
def test_what_the_student_did_not_sample_is_not_said_to_be_its_own(tmp_path: Path, policy: str, said: str) -> None:
    store = synthetic_run(tmp_path, 40, rounds=1, done=1, policy=policy)
    shown = read_samples(store, store.config, 0)
    assert {token.student for sample in shown for token in sample.tokens} == {None}
    page = run_report(store)
    assert said in page
    assert "response, teacher probability" in page
    for wrong in ("response, student probability", "the student that sampled it", "sampled by policy"):
        assert wrong not in page


def test_metrics_are_of_a_model_and_finite() -> None:
    rows = [metric(0, "accuracy", 0.5, 0.01), metric(-1, "accuracy", 0.9, 0.01, "teacher")]
    assert [found.model for found in metrics_of(pa.Table.from_pylist(rows))] == ["student", "teacher"]
    assert metrics_of(pa.Table.from_pylist([metric(0, "accuracy", float("nan"), 0.1)])) == []
    named = [Metric(name, "student", 0, 1.0, 0.1, 5) for name in ("zebra", "top1_agreement", "accuracy")]
    assert shown_names(named) == ["accuracy", "top1_agreement", "zebra"]


def test_the_report_says_what_cannot_be_told_from_noise() -> None:
    first, last = Metric("accuracy", "student", -1, 0.5, 0.03, 90), Metric("accuracy", "student", 1, 0.52, 0.04, 90)
    assert told_apart(first, last) == pytest.approx(1.96 * 0.05)
    said = change_text([first, last])
    assert "within noise" in said
    assert "Differences below 9.8 points cannot be told from noise here (unpaired, at 95 %)" in said
    assert "2 points cannot" in said
    sure = Metric("accuracy", "student", 1, 0.6, 0.001, 90)
    assert "beyond noise" in change_text([Metric("accuracy", "student", 0, 0.5, 0.001, 90), sure])
    # Where both models fail at the same prompts, less is noise.
    said = change_text([first, last], Interval(0.02, 0.005, 0.035))
    assert "beyond noise. Differences below 1.5 points cannot be told from noise here (prompt by prompt" in said
    assert "2 points cannot" not in said
    # Of few prompts the interval ends at 1, which is no sign of less noise: this one reaches below 0.
    found = crossed_interval(np.array([[1.0, 1.0, 1.0, 0.0]]))
    assert found.low < 0 < found.high == 1
    said = change_text([Metric("accuracy", "student", index, 0.75 * index, 0.25, 4) for index in (0, 1)], found)
    assert "+0.7500: within noise. Differences below 79.6 points" in said
    # A benchmark without a standard error says nothing of noise.
    unknown = [Metric("lm_eval/bleu", "student", index, 0.1 * index, 0.0, 90) for index in (0, 1)]
    assert (
        change_text(unknown, span=" over the rounds")
        == "Change over the rounds +0.1000; how much is noise is not known."
    )


def test_a_runs_accuracy_is_compared_prompt_by_prompt(findings: RunFindings) -> None:
    change = findings.accuracy_change
    assert change is not None
    accuracies = [metric.value for metric in findings.metrics if (metric.name, metric.model) == ("accuracy", "student")]
    assert change.mean == pytest.approx(accuracies[-1] - accuracies[0], abs=1 / 500)
    # What was right stays right: a share of the prompts changed.
    half = 1.9647 * math.sqrt(change.mean * (1 - change.mean) / 499)
    assert (change.high - change.low) / 2 == pytest.approx(half, rel=1e-3)
    figure = next(f for s in sections_of(findings) for f in s.figures if f.key == "metric-accuracy")
    assert "beyond noise" in figure.caption
    assert "prompt by prompt" in figure.caption


def test_levels_of_one_height_have_names_of_their_own_height(findings: RunFindings) -> None:
    models = [Metric("truncation_rate", model, -1, 0.0, 0.0, 9) for model in ("student", "teacher", "start")]
    figure = metric_figure(
        "truncation_rate", [*models, Metric("truncation_rate", "student", 0, 0.0, 0.0, 9)], findings.config
    )
    names = [text for text in ElementTree.fromstring(str(figure.svg)).iter() if text.get("class") == "note"]
    assert sorted(name.text or "" for name in names) == ["teacher", "untouched student"]
    assert abs(float(names[0].get("y", 0)) - float(names[1].get("y", 0))) >= 15
    assert figure.caption == "No change over the rounds."


def test_a_pruned_student_is_named_by_its_layers(tmp_path: Path) -> None:
    store = synthetic_run(tmp_path, 40, rounds=1, done=1)
    pruned = store.config.model_copy(update={"student": StudentConfig(init="prune", keep_layers=[0, 3])})
    store.record_config(pruned)
    assert f"of {pruned.teacher.model} into 2 of its layers: 1 round" in run_report(store)


def test_scales_and_ticks() -> None:
    scale = Scale(0.0, 10.0, 100.0, 200.0)
    assert (scale(5.0), scale(-1.0), scale(11.0)) == (150.0, 100.0, 200.0)
    assert Scale(0.0, 1.0, 0.0, 1.0).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(1.0, 1000.0, 0.0, 300.0, log=True)(10.0) == pytest.approx(100.0)
    assert Scale(1.0, 1000.0, 0.0, 1.0, log=True).ticks() == pytest.approx([1, 10, 100, 1000])
    low, high = around(np.array([2.0, 2.0, np.nan]))
    assert low < 2 < high
    assert around(np.array([0.0, 0.0]), zero=True) == pytest.approx((0.0, 1.06))
    assert around(np.array([])) == pytest.approx((-0.06, 1.06))
    assert [level(p) for p in (0.0, 0.02, 0.5, 0.96)] == [0, 1, 4, 6]


def test_the_page_is_small_repeats_and_needs_nothing_else(store: RunStore) -> None:
    page = run_report(store)
    assert page == run_report(store)
    assert len(page.encode()) < 1_500_000
    assert "<script" not in page
    # The only addresses are names of XML's own, and the page's icon, which it carries.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert re.findall(r'(?:src|href)="(?!#|data:image/svg)', page) == []


def test_every_drawing_is_well_formed_and_named(findings: RunFindings) -> None:
    sections = sections_of(findings)
    drawn = [figure for section in sections for figure in section.figures]
    assert len({figure.key for figure in drawn}) == len(drawn)
    keys = {figure.key for figure in drawn}
    assert {"delta-ifd-0", "delta-ifd-1", "ifd-0", "reasons", "pack-fill", "loss", "policy-kl", "learning-rate"} <= keys
    assert {"metric-kl-teacher-student", "metric-accuracy", "time", "rates", "bytes"} <= keys
    for figure in drawn:
        svg = ElementTree.fromstring(str(figure.svg))
        assert svg.get("aria-label") == figure.title
        assert svg[0].tag.endswith("title")
        assert all(len(row) == len(figure.header) for row in figure.rows), figure.key
        assert "nan" not in str(figure.svg)
        ElementTree.fromstring(image_svg(figure))


def test_a_rate_is_of_the_time_that_went_into_the_tokens() -> None:
    """An evaluation samples too, and every stage loads models: its seconds are more than its tokens took."""
    stages = [
        StageCost(StageKey("evaluate", index), True, seconds=100.0, tokens=tokens, tokens_per_second=rate)
        for index, (tokens, rate) in enumerate([(4000, 800.0), (2000, 100.0)])
    ]
    assert mean_rate(stages) == pytest.approx(6000 / 25)
    assert rate_figures(stages)[0].rows == [["evaluate", "240/s"]]
    # All shards were there already.
    assert mean_rate([StageCost(StageKey("generate", 0), True, seconds=2.0, tokens=90, tokens_per_second=0.0)]) is None


def test_the_budget_is_drawn(findings: RunFindings) -> None:
    policy_kl = next(f for s in sections_of(findings) for f in s.figures if f.key == "policy-kl")
    assert "budget 0.1" in policy_kl.svg
    assert ("budget", "budget") in policy_kl.legend


def test_markdown_shows_the_same_numbers_and_no_markup_of_ours(store: RunStore, findings: RunFindings) -> None:
    sections = sections_of(findings)
    text = figures_markdown("a|b <i>", sections)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<i>" not in html
    assert html.count("<table>") == sum(len(section.figures) for section in sections)
    reasons = next(f for s in sections for f in s.figures if f.key == "reasons")
    assert all(f"<td>{cell}</td>" in html for cell in reasons.rows[0])


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    store = synthetic_run(tmp_path, 40, prompt=HOSTILE, rounds=1, done=1)
    write_metrics(store, StageKey("evaluate", 0), [metric(0, HOSTILE, 1.0, 0.1)])
    page = run_report(store)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("</style>") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    for figure in (figure for section in sections_of(read_findings(store)) for figure in section.figures):
        ElementTree.fromstring(image_svg(figure))


def test_a_run_whose_settings_changed_shows_what_still_is_of_them(tmp_path: Path) -> None:
    store = synthetic_run(tmp_path, 60)
    score = store.finished(StageKey("score", 0))
    store.finish(StageKey("score", 0), score.model_copy(update={"config": {"score": {"top_k": TOP_K}}}))
    assert [ledger.round for ledger in read_findings(store).ledgers] == [0, 1]
    store.record_config(parse_config(store.config.model_dump(mode="json") | {"score": {"top_k": TOP_K + 1}}))
    findings = read_findings(store)
    assert findings.ledgers == []
    assert [stage.key.label for stage in findings.stages if stage.finished and stage.key.round == 0] == [
        "round 0 · generate"
    ]
    assert "stages done" in run_report(store)


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    page = run_report(store)
    assert "0 of" in page
    assert "not yet" in page
    half = synthetic_run(tmp_path, 60, rounds=3, done=1)
    page = run_report(half)
    assert "stages done" in page
    assert 'id="figure-delta-ifd-0"' in page
    assert 'id="figure-delta-ifd-1"' not in page


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no run\.json"):
        run_report(RunStore(tmp_path / "nowhere"))


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    store = synthetic_run(tmp_path, 40, rounds=1, done=1)
    store.table_files(StageKey("filter", 0))[0].write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"round=000/stage=filter/part-00000\.parquet"):
        run_report(store)
    assert not store.has_report()


def test_the_report_lies_at_the_runs_root(tmp_path: Path) -> None:
    store = synthetic_run(tmp_path, 40, rounds=1, done=1)
    assert not store.has_report()
    assert write_report(store) == f"{store.url}/{REPORT_NAME}"
    assert store.has_report()
    assert (store.folder / REPORT_NAME).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not list(store.folder.glob(".tmp-*"))
