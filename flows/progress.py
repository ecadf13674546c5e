"""Who hears how far a stage is: the terminal's display, and Prefect's progress artifacts."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from schemas.config import RunSettings
from schemas.manifest import Manifest
from schemas.stage_key import StageKey

if TYPE_CHECKING:
    from uuid import UUID

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

ARTIFACT_SECONDS = 2.0
"""Least time between two updates of a progress artifact."""

ARTIFACT_SHARE = 0.01
"""Of a stage's time so far: also the least time between two updates. Prefect's server keeps an event of each for a
week, and a stage may take days."""

AWAY_SECONDS = 30.0
"""How long a server that did not answer is left alone."""


class StageListener(Protocol):
    """Hears what happens to the stages of a run, in the thread that runs the flow."""

    def started(self, key: StageKey) -> None:
        """A stage begins to work."""

    def progressed(self, key: StageKey, done: int, total: int, unit: str) -> None:
        """A stage has done ``done`` of ``total`` units."""

    def finished(self, key: StageKey, manifest: Manifest, *, up_to_date: bool) -> None:
        """A stage is complete; ``up_to_date``: it was so before."""

    def failed(self, key: StageKey) -> None:
        """A stage could not finish; its error follows as an exception."""


_LISTENER: ContextVar[StageListener | None] = ContextVar("npd_stage_listener", default=None)


@contextmanager
def listening(listener: StageListener) -> Iterator[None]:
    """Tell ``listener`` about the stages that flows run inside this context."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def current_listener() -> StageListener | None:
    """Return the listener that ``listening`` set, if any."""
    return _LISTENER.get()


class Rate:
    """Units a second since the first count, so that what a resumed stage found done is not counted as speed."""

    def __init__(self) -> None:
        self._unit: str | None = None
        self._first_done, self._first_time = 0, 0.0

    def __call__(self, done: int, unit: str) -> float | None:
        """Return units a second up to ``done``; None until there is something to measure."""
        now = time.monotonic()
        if unit != self._unit:
            self._unit, self._first_done, self._first_time = unit, done, now
            return None
        seconds = now - self._first_time
        return (done - self._first_done) / seconds if seconds > 0 and done > self._first_done else None


def describe(done: int, total: int, unit: str, rate: float | None) -> str:
    """Return progress in words.

    >>> describe(32, 64, "samples", 4.0)
    '32/64 samples, 4.0/s'
    """
    return f"{done:,}/{total:,} {unit}" + (f", {rate:,.1f}/s" if rate is not None else "")


def artifact_key(*parts: str) -> str:
    """Return a Prefect artifact key: lowercase letters, digits and dashes.

    >>> artifact_key("Quick_start", "round 1 · score")
    'quick-start-round-1-score'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class ProgressArtifact:
    """The progress artifact of one stage's task run; moves at most every ``ARTIFACT_SECONDS``, in a long stage less.

    A server that cannot be reached costs people the sight of the bar, not the run its hours of work: it is asked once
    an update, and then left alone for ``AWAY_SECONDS``.
    """

    def __init__(self, config: RunSettings, key: StageKey, logger: Logger) -> None:
        self._key, self._logger = key, logger
        self._artifact_key = artifact_key(config.name, key.label, "progress")
        self._artifact: UUID | None = None
        self._rate = Rate()
        self._begun, self._last = time.monotonic(), 0.0
        self._publish(0.0, f"{key.label}: starting")

    def progressed(self, done: int, total: int, unit: str) -> None:
        """Move the bar, if it is time to."""
        rate, now = self._rate(done, unit), time.monotonic()
        if now - self._last >= max(ARTIFACT_SECONDS, ARTIFACT_SHARE * (now - self._begun)):
            percent = 100.0 * min(done, total) / total if total > 0 else 0.0
            self._publish(percent, f"{self._key.label}: {describe(done, total, unit, rate)}")

    def finished(self, manifest: Manifest) -> None:
        """Fill the bar."""
        counters = manifest.counters
        tokens = f", {counters['tokens']:,} tokens" if "tokens" in counters else ""
        self._publish(100.0, f"{self._key.label}: done in {counters['seconds']:.1f} s{tokens}")

    def _publish(self, progress: float, description: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        self._last = time.monotonic()
        # The stage waits meanwhile: its events are read in this thread.
        with _asking_once(), if_server_answers(self._logger) as asked:
            if self._artifact is None:
                # Typed as if it could be awaited, which it is only inside an event loop.
                self._artifact = cast("UUID", create_progress_artifact(progress, self._artifact_key, description))
            else:
                update_progress_artifact(self._artifact, progress, description=description)
        if not asked.answered:
            self._last += AWAY_SECONDS


def _asking_once() -> AbstractContextManager[Any]:
    """Let Prefect's client try every request once."""
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import PREFECT_API_URL

    return SettingsContext(profile=get_settings_context().profile, settings=_without_retries(PREFECT_API_URL.value()))


@lru_cache(maxsize=1)
def _without_retries(api: str | None) -> Any:
    """Return the settings of this process, which speaks to one server; making them takes longer than a request."""
    from prefect.context import get_settings_context
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

    return get_settings_context().settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 0})


class Asked:
    """Whether Prefect's server answered."""

    answered = True


@contextmanager
def if_server_answers(logger: Logger) -> Iterator[Asked]:
    """Do without Prefect's server if it does not answer: warn, and go on.

    What is shown there is also in the run's own files.
    """
    import httpx
    from prefect.exceptions import PrefectException

    asked = Asked()
    try:
        yield asked
    except (httpx.HTTPError, PrefectException) as error:
        asked.answered = False
        logger.warning("Prefect's server does not answer; the run goes on without it: %s", error or type(error))
