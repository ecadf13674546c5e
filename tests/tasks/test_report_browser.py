"""The report in a real headless Chromium: drawn, quiet, self-contained, readable on a phone and in the dark."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from schemas.comparison_tables import COMPARISON
from schemas.stage_key import StageKey
from tasks.report import run_report
from tasks.report.comparison import comparison_html
from tests.browser import Browser, chromium
from tests.report_rl_runs import synthetic_rl_run
from tests.report_runs import WORDS, metric, synthetic_run, write_metrics

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("browser")]

SAMPLES = 100_000
HOSTILE = (
    "</style></title><script>window.owned = 1</script>\"'><img src=http://127.0.0.1:9/x onerror='window.owned = 2'>"
    "<svg onload='window.owned = 3'>\u202egnp.exe\u2066"
)
SEEN = HOSTILE.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066")

WIDE = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, nav, svg') && "
WIDE += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
SIZES = "[...document.querySelectorAll('figure > svg.drawing')].map(e => { const b = e.getBoundingClientRect(); "
SIZES += "return [e.getAttribute('aria-label'), b.width, b.height, e.querySelectorAll('rect, path, circle').length] })"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two rounds of 100,000 samples."""
    folder = tmp_path_factory.mktemp("large")
    path = folder / "report.html"
    path.write_text(run_report(synthetic_run(folder, SAMPLES)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run whose prompts, tokens and metrics want to be more than text."""
    folder = tmp_path_factory.mktemp("hostile")
    store = synthetic_run(
        folder, 60, prompt=HOSTILE, words=[f"{HOSTILE}{place}" for place in range(len(WORDS))], rounds=1, done=1
    )
    metrics = [metric(0, "kl_teacher_student", 0.9, 0.1), metric(0, HOSTILE, 1.0, 0.1)]
    write_metrics(store, StageKey("evaluate", 0), metrics)
    path = folder / "report.html"
    path.write_text(run_report(store), encoding="utf-8")
    return path


def check(browser: Browser, page: Path) -> None:
    """Check what holds for every page: nothing in the console, nothing asked for but the page, all figures drawn."""
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
    sizes = browser.value(SIZES)
    assert all(width > 150 and height > 30 and marks > 0 for _, width, height, marks in sizes), sizes
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value(WIDE) == []


def test_a_hundred_thousand_samples_are_drawn(browser: Browser, large: Path) -> None:
    browser.open(large)
    assert browser.value("document.readyState") == "complete"
    check(browser, large)
    names = [name for name, *_ in browser.value(SIZES)]
    for wanted in ("Δ-IFD, round 0", "Δ-IFD, round 1", "Student IFD against teacher IFD, round 0", "Pack fill"):
        assert wanted in names
    for wanted in ("Kept and dropped, by reason", "Loss and its parts", "Learning rate", "Time by stage"):
        assert wanted in names
    # What is to be laid out does not grow with the samples.
    assert browser.value("document.querySelectorAll('*').length") < 12_000
    assert browser.value("document.querySelectorAll('.sample').length") == 18
    assert f"{SAMPLES:,} samples" in browser.value("document.querySelector('#figure-delta-ifd-0').textContent")


def test_the_zones_have_their_colours_everywhere(browser: Browser, large: Path) -> None:
    browser.open(large)
    fill = "getComputedStyle(document.querySelector('{}')).fill"
    for zone in ("learnable", "degenerate", "cognitive-disconnect"):
        colours = {
            browser.value(fill.format(f"#figure-{place} rect.zone-{zone}"))
            for place in ("delta-ifd-0", "delta-ifd-1", "reasons")
        }
        chip = f"getComputedStyle(document.querySelector('.sample.zone-{zone} .chip')).backgroundColor"
        assert colours == {browser.value(chip)}


def test_it_fits_a_phone(browser: Browser, large: Path) -> None:
    browser.open(large, width=390, height=844)
    assert browser.value("innerWidth") == 390
    check(browser, large)
    # Opened, too: tables scroll inside their cards.
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    check_width = browser.value("[document.documentElement.scrollWidth, innerWidth]")
    assert check_width[0] <= check_width[1]
    assert browser.value(WIDE) == []


def test_the_dark_is_dark(browser: Browser, large: Path) -> None:
    colours = {}
    for dark in (False, True):
        browser.open(large, dark=dark)
        check(browser, large)
        colours[dark] = [
            browser.value("getComputedStyle(document.body).backgroundColor"),
            browser.value("getComputedStyle(document.body).color"),
            browser.value("getComputedStyle(document.querySelector('.card')).backgroundColor"),
            browser.value("getComputedStyle(document.querySelector('svg text')).fill"),
            browser.value("getComputedStyle(document.querySelector('rect.zone-learnable')).fill"),
        ]
    assert not set(colours[False]) & set(colours[True])
    assert lightness(colours[False][0]) > 200 > 60 > lightness(colours[True][0])


def lightness(colour: str) -> float:
    """Return the mean of an `rgb(r, g, b)`."""
    parts = [float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    return sum(parts) / 3


def test_hostile_text_stays_text(browser: Browser, hostile: Path) -> None:
    browser.open(hostile)
    check(browser, hostile)
    assert browser.value("window.owned === undefined")
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.querySelector('main .message').textContent").endswith(SEEN)
    assert browser.value("document.querySelector('main .tokens i').textContent").startswith(SEEN)
    assert SEEN in browser.value("document.querySelector('#outcome').textContent")
    assert browser.value("document.images.length") == 0
    assert browser.value("document.title") == "synthetic"


def test_a_run_that_is_not_finished(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(run_report(synthetic_run(tmp_path, 200, rounds=3, done=1)), encoding="utf-8")
    browser.open(page)
    check(browser, page)
    names = [name for name, *_ in browser.value(SIZES)]
    assert "Δ-IFD, round 0" in names
    assert "Δ-IFD, round 1" not in names
    assert "stages done" in browser.value("document.querySelector('.badge').textContent")
    assert browser.value("document.querySelectorAll('.link.todo').length") == 14


def test_an_rl_run(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(run_report(synthetic_rl_run(tmp_path, prompt=HOSTILE, response=HOSTILE)), encoding="utf-8")
    for width, dark in ((1280, False), (390, True)):
        browser.open(page, width=width, dark=dark)
        check(browser, page)
        browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
        assert browser.value(WIDE) == []
    names = [name for name, *_ in browser.value(SIZES)]
    for wanted in ("Verified accuracy", "Held-out prompts by what became of them", "Reward", "Time by stage"):
        assert wanted in names
    assert browser.value("document.querySelectorAll('.sample').length") == 8
    assert browser.value("document.querySelector('main .message').textContent").endswith(SEEN)
    assert browser.value("document.querySelector('main .pair .message').textContent") == f"{SEEN} by start"
    assert browser.value("window.owned === undefined")
    assert browser.value("document.scripts.length + document.images.length") == 0


def test_a_comparison(browser: Browser, tmp_path: Path) -> None:
    rows = [
        dict.fromkeys(COMPARISON.columns.names)
        | {"method": name, "title": name, "role": role, "accuracy": 0.5 + 0.1 * place, "seconds": 30.0 * 3**place}
        for place, (name, role) in enumerate([("SFT", "baseline"), ("NPD", "npd"), (HOSTILE, "ablation")])
    ]
    page = tmp_path / "comparison.html"
    table = pa.Table.from_pylist(rows, COMPARISON.columns)
    page.write_text(comparison_html(table, "NPD against others"), encoding="utf-8")
    for width in (1280, 390):
        browser.open(page, width=width)
        check(browser, page)
    assert browser.value("document.querySelectorAll('#figure-time circle').length") == 3
    assert browser.value("document.querySelectorAll('#table tbody tr').length") == 3
    assert browser.value("window.owned === undefined")
