"""How a run looks in a terminal: live bars while stages work, plain lines where there is no terminal, tables after."""

import time
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import Any, Protocol, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows.progress import Rate, StageListener, describe
from flows.rl_summary import RLSummary, accuracy_table, curve_table, rl_files
from flows.states import StageState
from flows.summary import (
    RunSummary,
    TextTable,
    display_place,
    held_out_tables,
    run_files,
    samples_table,
)
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.untrusted_text import one_line, visible
from tasks.report.text import duration_text

LINE_SECONDS = 10.0
"""Least time between two plain progress lines of a stage."""


class Display(StageListener, Protocol):
    """A listener that owns a part of the screen while it is entered."""

    def __enter__(self) -> Self:
        """Take the screen."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the screen back, whatever happened."""


def make_display(console: Console) -> Display:
    """Return live bars for a terminal, plain lines for anything else."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def _result(manifest: Manifest) -> str:
    counters = manifest.counters
    rows = sum(record.rows or 0 for record in manifest.outputs)
    parts = [duration_text(counters["seconds"])]
    if rows:
        parts.append(f"{rows:,} rows")
    if "tokens" in counters:
        parts.append(f"{counters['tokens']:,} tokens, {counters['tokens_per_second']:,.0f}/s")
    return ", ".join(parts)


def _warnings(manifest: Manifest, up_to_date: bool) -> list[str]:
    return [] if up_to_date else list(manifest.counters.get("warnings", []))


class LiveDisplay:
    """One bar per stage, with rate and elapsed time; a finished stage becomes a line."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[StageKey, TaskID] = {}
        self._rates: dict[StageKey, Rate] = {}

    def __enter__(self) -> "LiveDisplay":
        self._progress.start()
        self._waiting = self._progress.add_task("starting Prefect", total=None, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, key: StageKey) -> None:
        """Show a bar that does not know its length yet."""
        self._progress.update(self._waiting, visible=False)
        self._rates[key] = Rate()
        self._tasks[key] = self._progress.add_task(key.label, total=None, detail="starting")

    def progressed(self, key: StageKey, done: int, total: int, unit: str) -> None:
        """Move the stage's bar."""
        detail = one_line(describe(done, total, unit, self._rates[key](done, unit)))
        self._progress.update(self._tasks[key], completed=done, total=total or None, detail=detail)

    def finished(self, key: StageKey, manifest: Manifest, *, up_to_date: bool) -> None:
        """Replace the bar by a line."""
        self._progress.update(self._waiting, visible=False)
        if key in self._tasks:
            self._progress.remove_task(self._tasks.pop(key))
        what = Text("up to date", style="dim") if up_to_date else Text(_result(manifest))
        self._progress.console.print(Text.assemble(("✓ ", "green"), (f"{key.label}  ", "bold"), what))
        for warning in _warnings(manifest, up_to_date):
            self._progress.console.print(Text.assemble(("! ", "yellow"), f"{key.label}: {visible(warning)}"))

    def failed(self, key: StageKey) -> None:
        """Replace the bar by a line."""
        if key in self._tasks:
            self._progress.remove_task(self._tasks.pop(key))
        self._progress.console.print(Text.assemble(("✗ ", "red"), (key.label, "bold")))


class PlainDisplay:
    """A line when a stage starts and ends, and one every ``LINE_SECONDS`` in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rates: dict[StageKey, Rate] = {}
        self._last: dict[StageKey, float] = {}

    def __enter__(self) -> "PlainDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def _line(self, text: str) -> None:
        self._console.print(Text(visible(text)), soft_wrap=True)

    def started(self, key: StageKey) -> None:
        """Print that the stage starts."""
        self._rates[key], self._last[key] = Rate(), time.monotonic()
        self._line(f"{key.label}: starting")

    def progressed(self, key: StageKey, done: int, total: int, unit: str) -> None:
        """Print how far the stage is, now and then."""
        rate = self._rates[key](done, unit)
        if time.monotonic() - self._last[key] >= LINE_SECONDS:
            self._last[key] = time.monotonic()
            self._line(f"{key.label}: {describe(done, total, unit, rate)}")

    def finished(self, key: StageKey, manifest: Manifest, *, up_to_date: bool) -> None:
        """Print what the stage came to."""
        self._line(f"{key.label}: {'up to date' if up_to_date else 'done in ' + _result(manifest)}")
        for warning in _warnings(manifest, up_to_date):
            self._line(f"{key.label}: warning: {warning}")

    def failed(self, key: StageKey) -> None:
        """Print that the stage stopped before its end."""
        self._line(f"{key.label}: did not finish")


def make_table(title: str, titles: list[str], numeric: Collection[str] = ()) -> Table:
    """Return an empty table of this project's look; the columns in ``numeric`` are aligned to the right."""
    table = Table(
        title=Text(one_line(title)), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in titles:
        table.add_column(name, justify="right" if name in numeric else "left")
    return table


def print_summary(console: Console, summary: RunSummary) -> None:
    """Print the tables of rounds and where the files are."""
    _print_tables(console, (*held_out_tables(summary), samples_table(summary)))
    print_pairs(console, run_files(summary))


def print_rl_summary(console: Console, summary: RLSummary) -> None:
    """Print accuracy before and after, the reward curve, what it cost and where the files are."""
    _print_tables(console, (accuracy_table(summary), curve_table(summary)))
    print_pairs(console, rl_files(summary))


def _print_tables(console: Console, tables: Iterable[TextTable]) -> None:
    for title, titles, rows in tables:
        table = make_table(title, titles, set(titles) - {"round", "why", "model", "steps"})
        for row in rows:
            table.add_row(*(Text(one_line(cell)) for cell in row))
        console.print(table)


def print_pairs(console: Console, pairs: list[tuple[str, str]]) -> None:
    """Print names and values in two columns, values whole so that they can be copied."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        console.print(Text(f"{one_line(name):<{width}}  {one_line(value)}"), soft_wrap=True)


def short_text(value: Any, length: int = 60) -> str:
    """Return a table cell's value, long lists and texts cut with their length named.

    >>> short_text([1, 2, 3, 4, 5, 6, 7]), short_text(None)
    ('[1, 2, 3, 4, …] (7)', 'null')
    """
    if value is None:
        return "null"
    if isinstance(value, list):
        inner = ", ".join(short_text(entry, length) for entry in value[:4])
        text = f"[{inner}, …] ({len(value)})" if len(value) > 4 else f"[{inner}]"
        return text if len(text) <= 2 * length else f"{text[: 2 * length]}… ({len(value)})"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = one_line(str(value).replace("\n", "⏎"))
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def print_states(console: Console, store: RunStore, states: dict[StageKey, StageState]) -> None:
    """Print how every stage stands."""
    styles = {StageState.COMPLETE: "green", StageState.OUTDATED: "yellow", StageState.UNFINISHED: "cyan"}
    numeric = ("time", "tokens/s")
    table = make_table(display_place(store), ["stage", "state", *numeric], numeric)
    for key, state in states.items():
        manifest = store.manifest(key)
        counters = {} if manifest is None else manifest.counters
        table.add_row(
            key.label,
            Text(state, style=styles.get(state, "dim")),
            duration_text(counters["seconds"]) if "seconds" in counters else "",
            f"{counters['tokens_per_second']:,.0f}" if "tokens_per_second" in counters else "",
        )
    console.print(table)
