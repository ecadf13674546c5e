import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.table import Table
from typer.testing import CliRunner

from flows.cli import app
from flows.display import LiveDisplay, PlainDisplay, make_table, print_summary, short_text
from flows.inspection import print_stage, print_tree
from flows.summary import round_rows, summarize, summary_markdown
from flows.terminal import Terminal
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_METRICS, PROMPTS
from tests.flows.conftest import CONFIGS
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table

TITLE, CLEAR, MARKUP, TURNED = "\x1b]0;owned\x07", "\x1b[2J\x9b2J", "[red]loud[/red] :skull: [/]", "\u202egpj.exe"
HOSTILE = f"{TITLE}{CLEAR}{MARKUP}{TURNED}\r"
SEEN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b2J[red]loud[/red] :skull: [/]\\u202egpj.exe\\r"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> bool:
    return UNSEEN.search(text) is None


def page(**settings: Any) -> Terminal:
    return Terminal(file=io.StringIO(), width=400, **settings)


def printed(terminal: Terminal) -> str:
    file = terminal.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run in a folder of a hostile name, with a hostile prompt, metric, source and warning."""
    config = make_config(tmp_path)
    store = make_store(tmp_path, config)
    rows = prompts_table({"a": "train", "b": "held_out"}).to_pylist()
    rows[0] |= {"messages": [{"role": "user", "content": HOSTILE}], "source": HOSTILE, "answer": f"{HOSTILE}\nnext"}
    finish_stage(store, StageKey("prompts"), PROMPTS, [pa.Table.from_pylist(rows, PROMPTS.columns)])
    metrics = [{"round": 0, "metric": f"kl{HOSTILE}", "value": 1.0, "n": 9, "stderr": 0.1, "model": "student"}]
    table = pa.Table.from_pylist(metrics, schema=EVALUATE_METRICS.columns)
    finish_stage(store, StageKey("evaluate", 0), EVALUATE_METRICS, [table])
    return RunStore.open(store.folder.rename(tmp_path / f"{TITLE}[red]x"))


def test_a_terminal_shows_what_would_steer_it() -> None:
    terminal = page()
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    terminal.print(HOSTILE)
    terminal.print(table)
    assert harmless(printed(terminal))
    assert printed(terminal).count("\\x1b[2J\\x9b2J[red]loud[/red] :skull") == 4


def test_colours_of_our_own_still_reach_a_terminal() -> None:
    terminal = page(force_terminal=True, color_system="truecolor")
    table = make_table(HOSTILE, ["name"])
    table.add_row(HOSTILE)
    terminal.print(table, style="bold")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed(terminal))
    assert plain != printed(terminal)
    assert harmless(plain)


def test_inspect_shows_hostile_rows_and_counters_as_text(store: RunStore) -> None:
    terminal = page()
    print_stage(terminal, store, StageKey("prompts"), 2)
    print_tree(terminal, store)
    output = printed(terminal)
    assert harmless(output)
    assert SEEN[:50] in output
    assert "\\x1b]0;owned\\x07[red]x" in output


def test_cells_are_cut_by_what_is_shown() -> None:
    assert short_text("\x1b" * 30).startswith("\\x1b\\x1b")
    assert harmless(short_text([HOSTILE, HOSTILE]))


@pytest.mark.parametrize("arguments", [["status"], ["inspect"], ["inspect", "--stage", "prompts"]])
def test_commands_on_a_run_of_a_hostile_name_print_text(store: RunStore, arguments: list[str]) -> None:
    name, *options = arguments
    result = CliRunner().invoke(app, [name, str(store.folder), *options], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert harmless(result.output)
    assert "\\x1b]0;owned\\x07[red]x" in result.output


def test_an_error_about_a_hostile_file_is_text(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", f"{tmp_path}/{HOSTILE}.yaml"],
        capture_output=True,
        cwd=CONFIGS.parent,
        check=False,
    )
    assert done.returncode == 2
    assert harmless(done.stderr.decode().removesuffix("\n"))
    assert SEEN in done.stderr.decode()


def test_displays_show_warnings_and_counts_as_text(store: RunStore) -> None:
    key = StageKey("prompts")
    manifest: Manifest = store.finished(key).model_copy(update={"counters": {"seconds": 1.0, "warnings": [HOSTILE]}})
    for display in (PlainDisplay(terminal := page()), LiveDisplay(terminal)):
        with display:
            display.started(key)
            display.progressed(key, 1, 2, HOSTILE)
            display.finished(key, manifest, up_to_date=False)
    assert harmless(printed(terminal))
    assert printed(terminal).count(SEEN) >= 2


def test_a_live_bar_reads_no_markup(store: RunStore) -> None:
    terminal = page(force_terminal=True, color_system=None)
    key = StageKey("prompts")
    with LiveDisplay(terminal) as display:
        display.started(key)
        display.progressed(key, 1, 2, "[bold]x[/]\x07 samples")
    assert "1/2 [bold]x[/]\\x07 samples" in printed(terminal)
    assert "\x07" not in printed(terminal)


def test_summaries_for_prefect_are_escaped(store: RunStore) -> None:
    summary = summarize(store, store.config)
    markdown = summary_markdown(summary)
    assert harmless(markdown)
    assert "\\[red\\]loud" in markdown
    assert all(harmless(row["what"]) for row in round_rows(summary, 0))
    terminal = page()
    print_summary(terminal, summary)
    assert harmless(printed(terminal))
    assert "[red]loud[/red]" in printed(terminal)
