"""Running a flow for the command line: Prefect's settings, a server, and a clean end by signals."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from schemas.errors import OrchestrationError
from tasks.collector import collector_paused

ended_by: list[int] = []
"""The signal that asked this process to end, if one has."""


def run_flow(load: Callable[[], Callable[[], object]], verbose: bool) -> None:
    """Run a flow, with a server of Prefect's own if none is set.

    Args:
        load: Imports it, which takes about as long as the server needs, and returns what calls it.
        verbose: Show Prefect's own log too.

    Raises:
        OrchestrationError: Prefect's server cannot be reached.
    """
    # Prefect reads these when it is imported. Its console log would tell every error a second time, as a traceback.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "NOTSET" if verbose else "CRITICAL")
    # On a busy machine the temporary server can take longer than Prefect's usual limit.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    from flows.server import start_temporary_server

    answer_signals()
    with collector_paused():
        server = start_temporary_server()
        flow = load()
        import httpx
        from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

    if server is not None:
        server.wait(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    try:
        flow()
    except Exception as error:
        _end_if_asked(error)
        if not isinstance(error, httpx.HTTPError):
            raise
        raise OrchestrationError(
            f"Prefect's server cannot be reached: {type(error).__name__}: {error}. What the run has done stands; "
            "the same command continues it once the server is back, or without PREFECT_API_URL"
        ) from error


def _end_if_asked(error: Exception) -> None:
    """End by SIGTERM where it came inside of a library that made an error of its own of it.

    During a flow Prefect answers SIGTERM by raising, and hands it on to us only if what it raised comes through:
    pydantic's serializer, for one, raises something else from it.
    """
    from prefect.exceptions import TerminationSignal

    link: BaseException | None = error
    while link is not None:
        if isinstance(link, TerminationSignal):
            _end(link.signal, None)
        link = link.__cause__ or link.__context__


def answer_signals() -> None:
    """Let whoever ends the command by SIGTERM (a scheduler) get the same clean end as with Ctrl-C."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    ended_by.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
