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
    else:
        _reach_server()
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


def _reach_server() -> None:
    """Ask the user's server once, before anything runs.

    Raises:
        OrchestrationError: there is none at the address that is set, or it is of another version.
    """
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch_once()
    # Prefect makes a RuntimeError of whatever it met there.
    except (RuntimeError, ValueError, httpx.HTTPError) as error:
        reason = str(error).rstrip(".") + (f" ({error.__cause__})" if error.__cause__ is not None else "")
        raise OrchestrationError(
            f"Prefect's server cannot be used: {reason}. Start one (`prefect server start`) and set PREFECT_API_URL to "
            "its address, which ends in `/api`; without PREFECT_API_URL the run has a server of its own"
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
