"""How a comparison looks while it runs: how many runs are done, what is at work, and how long it will take."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from schemas.stage_key import StageKey
from schemas.untrusted_text import visible
from tasks.report.text import duration_text


class RunsListener(Protocol):
    """Hears what happens to the runs of a comparison, from several threads."""

    def planned(self, total: int) -> None:
        """So many runs there will be."""

    def started(self, label: str) -> None:
        """A run begins to work."""

    def at_stage(self, label: str, key: StageKey) -> None:
        """A run has come to a stage."""

    def finished(self, label: str, *, up_to_date: bool) -> None:
        """A run is complete; ``up_to_date``: it was so before."""

    def failed(self, label: str, message: str) -> None:
        """A run could not finish."""


_LISTENER: ContextVar[RunsListener | None] = ContextVar("npd_runs_listener", default=None)


@contextmanager
def listening_to_runs(listener: RunsListener) -> Iterator[None]:
    """Tell ``listener`` about the runs of comparisons inside this context."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def current_runs_listener() -> RunsListener | None:
    """Return the listener that ``listening_to_runs`` set, if any."""
    return _LISTENER.get()


class RunsDisplay:
    """A line for each run that has ended; below, in a terminal, what is at work.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._total = self._done = self._made = 0
        self._started: dict[str, float] = {}
        self._stages: dict[str, str] = {}
        self._live = Live(console=console, get_renderable=self._at_work, transient=True, refresh_per_second=2)

    def __enter__(self) -> Self:
        """Take the screen."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the screen back, whatever happened."""
        self._live.stop()

    def planned(self, total: int) -> None:
        """See RunsListener."""
        self._total = total

    def started(self, label: str) -> None:
        """See RunsListener."""
        with self._lock:
            self._started[label] = time.monotonic()

    def at_stage(self, label: str, key: StageKey) -> None:
        """See RunsListener."""
        self._stages[label] = key.label

    def finished(self, label: str, *, up_to_date: bool) -> None:
        """See RunsListener."""
        with self._lock:
            self._done += 1
            self._made += not up_to_date
            seconds = time.monotonic() - self._started.pop(label, time.monotonic())
            what = "up to date" if up_to_date else f"done in {duration_text(seconds)}"
            self._print(f"{label}: {what} ({self._progress()})")

    def failed(self, label: str, message: str) -> None:
        """See RunsListener."""
        with self._lock:
            self._done += 1
            self._started.pop(label, None)
            self._print(f"{label}: failed: {visible(message)}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _progress(self) -> str:
        elapsed = time.monotonic() - self._begun
        text = f"{self._done}/{self._total} runs, {duration_text(elapsed)}"
        left = self._total - self._done
        if self._made and left > 0:
            text += f", about {duration_text(elapsed / self._made * left)} left"
        return text

    def _at_work(self) -> Text:
        lines = [f"  {label}: {self._stages.get(label, 'starting')}" for label in list(self._started)]
        return Text("\n".join([self._progress(), *lines]), style="dim")
