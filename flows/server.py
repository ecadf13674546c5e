"""Prefect's temporary server, for runs without a server of their own: `python -m flows.server SOCKET`.

Prefect would start one itself at its first call, but this process would import the whole server for it, wait for it
before doing anything else, and leave it running if it is killed; and a Ctrl-C, which a terminal sends to every process
of the command, would end it before Prefect has told it how the run ended, which Prefect then tries for minutes. This
one comes up while the run's own libraries are imported, and ends when its stdin does, as it does with its parent.
"""

import atexit
import fcntl
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from schemas.errors import OrchestrationError
from tasks.collector import collector_paused

_READY = b"+"
_STOP_SECONDS = 5.0


class TemporaryServer:
    """A server on a free port of this machine, which ends with this process.

    Args:
        auth: `NAME:PASSWORD` that requests must bring, since other users of the machine, and pages in a browser, reach
            it too.
    """

    def __init__(self, auth: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.api = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                # What lies in the working directory is not imported.
                [sys.executable, "-P", "-m", "flows.server", str(listening.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(listening.fileno(),),
                # Away from the terminal's Ctrl-C.
                start_new_session=True,
                # Prefect's makers are told nothing, unless the user wants it; the rest Prefect sets for its own.
                env={"PREFECT_SERVER_ANALYTICS_ENABLED": "0"}
                | os.environ
                | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
                | {"PREFECT_SERVER_API_AUTH_STRING": auth},
            )
        # Prefect sends its last words at exit too: what was registered last goes first.
        atexit.register(self.stop)

    def wait(self, seconds: float) -> None:
        """Wait until it answers.

        Raises:
            OrchestrationError: it ended, or took longer than ``seconds``.
        """
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise OrchestrationError(
                f"Prefect's temporary server did not come up within {seconds:.0f} s; set "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS higher, or start a server of your own "
                "(`prefect server start`) and set PREFECT_API_URL to it"
            )
        if not self._process.stdout.read(len(_READY)):
            raise OrchestrationError(
                f"Prefect's temporary server ended as it came up (exit code {self._process.wait()}); its error is "
                "above. Or start a server of your own (`prefect server start`) and set PREFECT_API_URL to it"
            )

    def stop(self) -> None:
        """End it, and wait until it has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_temporary_server() -> TemporaryServer | None:
    """Start a server and make it the one Prefect speaks to; None where the user has set one, or wants none."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

    if PREFECT_API_URL.value() or not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        return None
    auth = f"npd:{secrets.token_urlsafe()}"
    server = TemporaryServer(auth)
    os.environ |= {"PREFECT_API_URL": server.api, "PREFECT_API_AUTH_STRING": auth}
    refresh_global_settings_context()
    return server


def _end_with_stdin() -> None:
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _alone() -> Iterator[None]:
    """Wait for others that come up: two that bring one database up to date at a time fail."""
    from prefect.settings import PREFECT_HOME

    home = PREFECT_HOME.value()
    with ExitStack() as held:
        # Where no file can be made, or locked, there is nothing to wait for.
        with suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((home / "npd-server.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Serve on the socket that the first argument names until stdin ends; say on stdout when it is up."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    # Prefect goes on importing until it is up.
    importing = ExitStack()
    importing.enter_context(collector_paused())
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            with _alone():
                await super().startup(sockets=sockets)
            importing.close()
            os.write(1, _READY)

    listening = socket.socket(fileno=int(sys.argv[1]))
    app = "prefect.server.api.server:create_app"
    Server(uvicorn.Config(app, factory=True, log_level="error", lifespan="on")).run(sockets=[listening])


if __name__ == "__main__":
    main()
