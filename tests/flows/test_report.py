"""`npd report` as users call it, and the report that a run writes at its end."""

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from schemas.run_store import REPORT_NAME, RunStore
from schemas.stage_key import StageKey
from tasks.audit.verify import verify
from tests.flows.conftest import FinishedRun

RUNNER = CliRunner()


@pytest.fixture
def copied(finished_run: FinishedRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.folder, tmp_path / "copy"))


def invoke(*arguments: object) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


def test_a_run_ends_with_its_report_and_says_where(finished_run: FinishedRun) -> None:
    page = (finished_run.folder / REPORT_NAME).read_text(encoding="utf-8")
    assert "finished" in page
    assert 'id="figure-metric-kl-teacher-student"' in page
    assert 'id="figure-delta-ifd-1"' in page
    assert re.search(rf"^report +\S*{REPORT_NAME}$", finished_run.output, re.MULTILINE)


def test_verify_knows_the_report(copied: Path) -> None:
    report = verify(RunStore.open(copied))
    assert report.holds
    assert not [note for note in report.notes if REPORT_NAME in note]


def test_the_command_writes_the_same_page_again(copied: Path) -> None:
    before = (copied / REPORT_NAME).read_bytes()
    (copied / REPORT_NAME).unlink()
    code, output = invoke(copied)
    assert code == 0, output
    assert output.strip() == str(copied / REPORT_NAME)
    assert (copied / REPORT_NAME).read_bytes() == before


def test_the_page_goes_where_it_is_wanted(copied: Path, tmp_path: Path) -> None:
    before = (copied / REPORT_NAME).read_bytes()
    (copied / REPORT_NAME).unlink()
    wanted = tmp_path / "elsewhere" / "page.html"
    code, output = invoke(copied, "--output", wanted)
    assert (code, output.strip()) == (0, str(wanted))
    assert wanted.read_bytes() == before
    assert not (copied / REPORT_NAME).exists()
    code, output = invoke(copied, "--output", tmp_path)
    assert (code, "is a directory" in output) == (2, True)


def test_a_run_cut_short_has_a_report(copied: Path) -> None:
    store = RunStore.open(copied)
    for stage in ("evaluate", "export", "train", "pack"):
        store.remove(store.path(StageKey(stage, 1)))
    code, output = invoke(copied)
    assert code == 0, output
    page = (copied / REPORT_NAME).read_text(encoding="utf-8")
    assert "stages done" in page
    assert 'id="figure-delta-ifd-1"' in page


def test_without_a_run_it_is_bad_input(tmp_path: Path) -> None:
    code, output = invoke(tmp_path)
    assert code == 2
    assert "no run here" in output
    assert not list(tmp_path.iterdir())
