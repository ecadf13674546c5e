"""How audits look in a terminal: what a verification covered and found, a sample's life, how two runs differ."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from flows.display import LINE_SECONDS
from schemas.untrusted_text import one_line
from tasks.audit.diff import RunDifference, StageDifference
from tasks.audit.findings import Report
from tasks.audit.trace import Life
from tasks.report.text import bytes_text

_TEXT_LENGTH = 300
_SHOWN_FILES = 3


class WatchLine:
    """Shows what a verification is at: one moving line in a terminal, else a line every ``LINE_SECONDS``.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = console.status("") if console.is_terminal else None
        self._last = time.monotonic()

    def __enter__(self) -> "WatchLine":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        """Show how far it is."""
        amount = f"{bytes_text(done)} of {bytes_text(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
        text = Text(one_line(f"{what}: {amount}" if total else what))
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._console.print(text, soft_wrap=True)


def print_report(console: Console, place: str, report: Report, *, all_breaks: bool) -> None:
    """Print what a verification covered, what is not there, and the first broken link (or all of them)."""
    covered = report.coverage
    _line(
        console,
        f"{place}: {covered.files:,} files ({bytes_text(covered.bytes)}) hashed, {covered.rows:,} table rows read, "
        f"{covered.joins:,} links followed, {covered.tokens:,} packed tokens traced back to their samples",
    )
    for note in report.notes:
        _line(console, f"note: {note}")
    for what in report.unchecked:
        _line(console, f"not checked: {what}")
    if report.unfinished:
        _line(console, f"not there: {', '.join(report.unfinished)}")
    if report.holds:
        _line(console, "everything that is there holds" if report.unfinished else "everything holds", "green")
        return
    shown = report.breaks if all_breaks else report.breaks[:1]
    for number, entry in enumerate(shown):
        _line(console, f"{'first broken link' if number == 0 else 'broken'}: {entry}", "red")
    rest = len(report.breaks) - len(shown)
    if rest:
        _line(console, f"and {rest:,} further broken {'link' if rest == 1 else 'links'}; --all lists them")


def report_dict(report: Report) -> dict[str, Any]:
    """Return a report as JSON values."""
    return {
        "holds": report.holds,
        "breaks": [{"where": entry.where, "what": entry.what, "more_rows": entry.more} for entry in report.breaks],
        "notes": report.notes,
        "unchecked": report.unchecked,
        "unfinished": report.unfinished,
        "coverage": vars(report.coverage),
    }


def print_life(console: Console, life: Life) -> None:
    """Print a sample's life section by section; long texts and lists are cut."""
    for title, section in life.items():
        _line(console, title, "bold")
        width = max(len(name) for name in section)
        for name, value in section.items():
            _line(console, f"  {name:<{width}}  {_value(name, value)}")


def _value(name: str, value: Any) -> str:
    if name == "teacher_top_k":
        return "; ".join(f"{e['id']} {e['text']!r} {e['probability']:.4f} ({e['logprob']:.4f})" for e in value)
    if name == "messages":
        return _cut(" | ".join(f"{m['role']}: {m['content']}" for m in value))
    if name == "response_token_texts":
        return _cut(" ".join(repr(text) for text in value))
    if isinstance(value, list):
        return _cut(", ".join(_value("", entry) for entry in value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]}… ({len(text):,} characters)"


def print_difference(console: Console, left: str, right: str, found: RunDifference) -> None:
    """Print which settings, packages and stages of two runs differ, and which are equal."""
    _line(console, f"left: {left}")
    _line(console, f"right: {right}")
    minor = "settings that say only where, in what portions or how visibly work runs"
    for title, placement in (("settings", False), (minor, True)):
        settings = [setting for setting in found.settings if setting.placement is placement]
        if settings or not placement:
            _line(console, f"{title}{'' if settings else ': equal'}", "bold")
        for setting in settings:
            _line(console, f"  {setting.key}: {_value('', setting.left)} | {_value('', setting.right)}")
    _line(console, f"packages{'' if found.packages else ': equal'}", "bold")
    for name, (old, new) in found.packages.items():
        _line(console, f"  {name}: {old or 'none'} | {new or 'none'}")
    _line(console, "stages", "bold")
    for stage in found.stages:
        _print_stage(console, stage)
    _line(console, "the runs are equal" if found.equal else "the runs differ", "green" if found.equal else "red")


def _print_stage(console: Console, stage: StageDifference) -> None:
    amounts = f"{_pair(*stage.rows)} rows, {_pair(*stage.bytes)} bytes"
    _line(console, f"  {stage.stage}: {stage.state.replace(' only', ' run only')}; {amounts}")
    for file in stage.files[:_SHOWN_FILES]:
        if file.left is None or file.right is None:
            what = f"{'right' if file.left is None else 'left'} run only"
        else:
            what = f"sha256 {file.left['sha256'][:12]}… | {file.right['sha256'][:12]}…"
        at = "first at " if file.first and file.first.startswith("row ") else ""
        _line(console, f"    {file.path}: {what}" + (f"; {at}{file.first}" if file.first else ""))
    if len(stage.files) > _SHOWN_FILES:
        _line(console, f"    and {len(stage.files) - _SHOWN_FILES:,} further files")


def _pair(left: int, right: int) -> str:
    return f"{left:,}" if left == right else f"{left:,} | {right:,}"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(one_line(text), style=style), soft_wrap=True)
