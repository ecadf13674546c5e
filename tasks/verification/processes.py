"""Processes that score untrusted responses; one that hangs or dies costs the response it had, nothing else."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

from schemas.errors import StageError
from tasks.cores import available_cores

Kind = Literal["math", "reasoning_gym"]

WALL_SECONDS = 60.0
"""Wait for one score before its process is ended. The limit of processor time in ``worker`` comes first for whatever
computes; this one is for what sleeps."""

END_SECONDS = 1.0
"""Wait for a process that has closed its end to be gone."""

START_SECONDS = 300.0
"""Wait for a process to import its verifiers."""

REQUESTS_A_PROCESS = 128
"""Fewer requests than this are not worth another process."""

_PACKAGES = {"math": ("math_verify", "math-verify"), "reasoning_gym": ("reasoning_gym", "reasoning-gym")}
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL")

_idle: dict[str, list["_Worker"]] = {"math": [], "reasoning_gym": []}
_lock = threading.Lock()


def scores(kind: Kind, requests: Sequence[dict[str, Any]]) -> list[float]:
    """Return the score of each request, NaN for those with nothing to check against; see ``worker`` for the requests.

    Processes stay for the next call, as long as this one lives.

    Raises:
        StageError: the package that ``kind`` needs is not installed, or cannot be loaded.
    """
    module, package = _PACKAGES[kind]
    if find_spec(module) is None:
        raise StageError(f"answers cannot be checked: the package `{package}` is not installed; pip install {package}")
    count = max(1, min(available_cores(), -(-len(requests) // REQUESTS_A_PROCESS)))
    parts = [requests[len(requests) * i // count : len(requests) * (i + 1) // count] for i in range(count)]
    with ThreadPoolExecutor(count) as threads:
        return [score for part in threads.map(lambda part: _part_scores(kind, part), parts) for score in part]


def _part_scores(kind: Kind, requests: Sequence[dict[str, Any]]) -> list[float]:
    with _lock:
        worker = _idle[kind].pop() if _idle[kind] else _Worker(kind)
    found = [worker.score(request) for request in requests]
    with _lock:
        _idle[kind].append(worker)
    return found


class _Worker:
    """One process, started again whenever a response ended it."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def score(self, request: dict[str, Any]) -> float:
        """Return the score of one request: 0.0 where it ends its process or outlasts it.

        A process that was killed is no verdict: the system does that to whatever is large where memory runs out. Its
        own limits end it otherwise. One that is killed twice at the same request is.
        """
        for _ in range(2):
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            self._send(request)
            answer = self._answer(WALL_SECONDS)
            if answer is not None:
                return float("nan") if answer["score"] is None else float(answer["score"])
            if not self._was_killed():
                break
        self.close()
        return 0.0

    def _was_killed(self) -> bool:
        """Say whether the process has been killed by another, not by the system for its limit of processor time."""
        assert self._process is not None
        try:
            return self._process.wait(END_SECONDS) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return False

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _start(self) -> None:
        program = Path(__file__).with_name("worker.py")
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with tempfile.TemporaryFile() as messages:
            # -P keeps the folder of worker.py, with its module names, off the program's import path.
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", str(program), self._kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=environment,
                cwd=tempfile.gettempdir(),
            )
            self._owner = os.getpid()
            if self._answer(START_SECONDS) is None:
                self.close()
                messages.seek(0)
                last = (messages.read().decode(errors="replace").strip().splitlines() or ["it ended"])[-1]
                raise StageError(f"answers cannot be checked: the verifier `{self._kind}` does not start: {last}")

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._pipe("stdin").write(json.dumps(request).encode() + b"\n")
            self._pipe("stdin").flush()
        except BrokenPipeError:
            # It ended, and has no answer either.
            return

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the next line; None if the process ended or is not done after ``seconds``."""
        stdout = self._pipe("stdout")
        # Not `select.select`, which takes no descriptor above 1023: servers' connections may have the lower ones.
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return answer

    def _pipe(self, name: Literal["stdin", "stdout"]) -> IO[bytes]:
        assert self._process is not None
        pipe: IO[bytes] | None = getattr(self._process, name)
        assert pipe is not None
        return pipe
