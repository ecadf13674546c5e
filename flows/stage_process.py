"""Processes for stages, from a server that has the heavy libraries imported already (`tasks.fork_server`)."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any

from schemas.errors import StageError
from schemas.untrusted_text import readable

_POLL_SECONDS = 0.05
_LAST_SECONDS, _LAST_BYTES = 1.0, 2000


class ForkServer:
    """The server's other end. Its process ends with this one.

    Args:
        modules: What it imports beside the stages' libraries.
    """

    def __init__(self, modules: tuple[str, ...] = ()) -> None:
        self._channel, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._buffer = b""
        self._codes: dict[int, int] = {}
        self._started: list[int] = []
        self._ended = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the server)
        with theirs:
            self._process = subprocess.Popen(
                # A `tasks.py` in the working directory is not ours.
                [sys.executable, "-P", "-X", "faulthandler", "-m", "tasks.fork_server", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the server can still start processes."""
        return not self._ended and self._process.poll() is None

    def start(self, events: int, log: int) -> "StageProcess":
        """Start a process of `tasks.process`.

        Args:
            events: File descriptor for its events; the caller closes its own copy.
            log: File descriptor for its stdout and stderr.

        Raises:
            StageError: the server is gone.
        """
        reading, writing = os.pipe()
        try:
            pid = None
            with self._lock, suppress(BrokenPipeError):
                socket.send_fds(self._channel, [b"+"], [reading, events, log])
                while not self._started and not self._ended:
                    self._receive(block=True)
                # While the lock is held: another thread would take it for the answer to its own request.
                pid = self._started.pop(0) if self._started else None
            if pid is None:
                # A process that is just dying may still look alive to its parent.
                self._ended = True
                os.close(writing)
                raise StageError(f"the server that starts stages has died; run again{self._last_words()}")
            return StageProcess(self, pid, writing)
        finally:
            os.close(reading)

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_SECONDS)
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _LAST_BYTES))
        words = readable(self._errors.read().decode(errors="replace").strip())
        return f". It said: {words}" if words else ""

    def code(self, pid: int) -> int | None:
        """Return how a started process ended, None while it has not (or nobody can tell any more)."""
        with self._lock:
            self._receive(block=False)
            return self._codes.get(pid)

    def listen(self, seconds: float) -> None:
        """Wait until the server may have something to say, at most so long."""
        if self._ended:
            time.sleep(seconds)
        else:
            select.select([self._channel], [], [], seconds)

    def _receive(self, *, block: bool) -> None:
        try:
            data = self._channel.recv(4096, 0 if block else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        self._ended = self._ended or not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            answer: dict[str, Any] = json.loads(line)
            if "code" in answer:
                self._codes[answer["pid"]] = answer["code"]
            else:
                # The system may have given a new process the number of one that ended long ago.
                self._codes.pop(answer["pid"], None)
                self._started.append(answer["pid"])


class StageProcess:
    """A started process: the leader of its own process group.

    Args:
        server: Who started it.
        pid: Its process id.
        stdin: File descriptor of its stdin; it ends when this is closed.
    """

    def __init__(self, server: ForkServer, pid: int, stdin: int) -> None:
        self._server, self.pid, self.stdin = server, pid, stdin
        self.code: int | None = None

    def has_ended(self) -> bool:
        """Say whether it has ended; ``code`` then tells how (None if its server died before it could say)."""
        if self.code is None:
            self.code = self._server.code(self.pid)
        return self.code is not None or (not self._server.is_running and not self._exists())

    def wait(self, seconds: float) -> bool:
        """Wait for its end, at most so long; return whether it has ended."""
        deadline = time.monotonic() + seconds
        while not (ended := self.has_ended()) and time.monotonic() < deadline:
            self._server.listen(_POLL_SECONDS)
        return ended

    def end(self, seconds: float) -> None:
        """End it if it still runs, gently for so long, and whatever is left of its group; close its stdin."""
        if not self.has_ended():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            self.wait(seconds)
        # macOS answers EPERM for a group of which only a zombie is left.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(seconds)
        os.close(self.stdin)

    def _exists(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


@lru_cache(maxsize=1)
def _servers(owner: int) -> list[ForkServer]:
    """Return the list that holds the server of process ``owner``; a fork of it has a list of its own."""
    return []


def start_process(events: int, log: int) -> StageProcess:
    """Start a process from this process's server; see ``ForkServer.start``. A dead server is replaced once."""
    try:
        return fork_server().start(events, log)
    except StageError:
        return fork_server().start(events, log)


def fork_server(modules: tuple[str, ...] = ()) -> ForkServer:
    """Return this process's server, starting one if there is none; it imports while this process goes on.

    Args:
        modules: What a server that is started now imports beside the stages' libraries.
    """
    servers = _servers(os.getpid())
    if not servers or not servers[0].is_running:
        servers[:] = [ForkServer(modules)]
    return servers[0]
