"""Runs a stage in a process of its own, so that its memory comes back and its death fails one stage, not the flow."""

import json
import logging
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flows.stage_process import StageProcess, start_process
from schemas.config import RLConfig, RunConfig, RunSettings
from schemas.errors import RunLockedError, StageError, StorageError, error_by_name
from schemas.local_files import open_to_append, storage_errors
from schemas.manifest import Manifest
from schemas.provenance import now_iso
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.cores import available_cores
from tasks.graph import TRAINING_STAGES, samples
from tasks.process import Job, out_of_memory_hint
from tasks.stage import Progress, no_progress

_CANCELLED: ContextVar[threading.Event | None] = ContextVar("npd_stage_cancelled", default=None)

RUN = StageKey("run")
"""Names the log of a process that runs several stages."""

_POLL_SECONDS = 0.5
_EXIT_SECONDS = 60.0
_TERMINATE_SECONDS = 5.0

_logger = logging.getLogger(__name__)


@contextmanager
def cancelling(cancelled: threading.Event) -> Iterator[None]:
    """End the stages started inside this context, in whatever thread, once ``cancelled`` is set."""
    token = _CANCELLED.set(cancelled)
    try:
        yield
    finally:
        _CANCELLED.reset(token)


@contextmanager
def cancelled_by_errors() -> Iterator[None]:
    """End the stages started inside this context when it is left by an error, Ctrl-C included."""
    cancelled = threading.Event()
    with cancelling(cancelled):
        try:
            yield
        except BaseException:
            cancelled.set()
            raise


def threads_of(config: RunSettings, key: StageKey) -> int | None:
    """Return how many CPU threads a stage's process may use; None: as many as the libraries take.

    With `overlap`, what may run side by side shares the cores whether or not it does so this time: how numbers are
    summed up, and so their last digits, can depend on the number of threads.
    """
    if isinstance(config, RLConfig):
        return config.cpu_threads
    assert isinstance(config, RunConfig)
    if config.devices.cpu_threads is not None or not config.overlap or key.round is None or key.round == WARMUP:
        return config.devices.cpu_threads
    ahead = key.stage in ("generate", "score") and key.round > 0
    beside = key.stage in TRAINING_STAGES and key.round + 1 < config.rounds and samples(config, key.round + 1)
    return max(1, available_cores() // 2) if ahead or beside else None


def run_in_process(
    store: RunStore, config: RunSettings, key: StageKey, on_progress: Progress = no_progress
) -> Manifest:
    """Run a stage in a child process and wait for it.

    The child and whatever it starts form a process group, which is gone when this returns or raises (Ctrl-C included).

    Raises:
        NPDError: what the stage raised, as the same class; for any other error, or a child that died, a StageError
            that names the log; a StageError too if the stage was cancelled.
        RunLockedError: the lock was lost meanwhile.
    """
    named, threads = [(key.stage, key.round)], threads_of(config, key)
    values, lock = config.model_dump(mode="json"), store.lock.token
    job = Job(store.url, values, named, str(store.log(key)), threads, lock=lock)

    def hear(event: dict[str, Any]) -> None:
        on_progress(event["done"], event["total"], event["unit"])

    _run_job(store, job, key, lambda: key, hear)
    return store.finished(key)


def run_stages_in_process(
    store: RunStore,
    config: RunSettings,
    keys: Sequence[StageKey],
    lenders: Sequence[str],
    threads: int | None,
    on_stage: Callable[[StageKey], None],
) -> None:
    """Run several stages of a small run in one child process, one after another, and wait for them.

    Args:
        store: The run, which must be held.
        config: Its config.
        keys: The stages in the order of the loop; those whose result stands are left.
        lenders: Places of runs whose finished stages of equal fingerprints are taken over.
        threads: CPU threads of the process; None: as many as the libraries take.
        on_stage: Told the stage that is at work.

    Raises:
        NPDError: as ``run_in_process``.
    """
    at_work = keys[0]

    def hear(event: dict[str, Any]) -> None:
        nonlocal at_work
        if event["event"] == "stage":
            at_work = StageKey(event["stage"], event["round"])
            on_stage(at_work)

    named = [(key.stage, key.round) for key in keys]
    values, lock = config.model_dump(mode="json"), store.lock.token
    job = Job(store.url, values, named, str(store.log(RUN)), threads, list(lenders), lock)
    _run_job(store, job, RUN, lambda: at_work, hear)


def _run_job(
    store: RunStore, job: Job, log_of: StageKey, at_work: Callable[[], StageKey], hear: Callable[[dict[str, Any]], None]
) -> None:
    log = store.log(log_of)
    with storage_errors(str(log)):
        log.parent.mkdir(parents=True, exist_ok=True)
        store.continue_file(log)
        opened = open_to_append(log)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as events, opened as sink:
        try:
            process = start_process(writing, sink.fileno())
        finally:
            os.close(writing)
        where = f"process {process.pid} · {now_iso()} · {socket.gethostname()}"
        try:
            with storage_errors(str(log)):
                sink.write(f"--- {at_work().label} · {where}\n".encode())
            final = _converse(process, job, events.fileno(), hear, store.lock.require)
            if final is not None:
                process.wait(_EXIT_SECONDS)
        finally:
            process.end(_TERMINATE_SECONDS)
            _keep_log(store, log_of)
    if final is None:
        raise StageError(_describe_death(at_work(), process.code, log))
    if final["event"] == "error":
        raise error_by_name(final["type"])(final["message"])


def _keep_log(store: RunStore, key: StageKey) -> None:
    try:
        # Another process's log may have the name by now.
        store.lock.require()
        store.upload_log(key)
    except (RunLockedError, StorageError) as error:
        # What the stage came to matters more.
        _logger.warning("%s stays on this machine alone: %s", store.log(key), error)


def _converse(
    process: StageProcess,
    job: Job,
    events: int,
    hear: Callable[[dict[str, Any]], None],
    require: Callable[[], None],
) -> dict[str, Any] | None:
    """Send the job and relay what it tells; return the child's last word, None if it died without one."""
    # A child that dies at once is reported by its exit status, not as a broken pipe.
    with suppress(BrokenPipeError):
        _write_all(process.stdin, job.to_line())
    for line in _lines(process, events, require):
        event: dict[str, Any] = json.loads(line)
        if event["event"] in ("error", "done"):
            return event
        hear(event)
    return None


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _lines(process: StageProcess, events: int, require: Callable[[], None]) -> Iterator[bytes]:
    """Yield whole lines until the child has closed the pipe, or has died while others still hold it.

    Args:
        process: The child.
        events: File descriptor of the pipe.
        require: Raises when this process may not go on.
    """
    buffer, cancelled = b"", _CANCELLED.get()
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        while True:
            if cancelled is not None and cancelled.is_set():
                raise StageError("cancelled: the run ended beside it; the same command continues where it stopped")
            require()
            died = process.has_ended()
            if selector.select(0 if died else _POLL_SECONDS):
                chunk = os.read(events, 65536)
                if not chunk:
                    break
                *lines, buffer = (buffer + chunk).split(b"\n")
                yield from lines
            elif died:
                break
    process.wait(_EXIT_SECONDS)


def _describe_death(key: StageKey, code: int | None, log: Path) -> str:
    if code is None:
        return f"stage `{key.label}`: its process was lost before the stage was done. What it printed: {log}"
    if code == -signal.SIGKILL:
        return (
            f"stage `{key.label}` was killed (signal 9), most likely out of memory: {out_of_memory_hint(key)}. "
            f"What it printed: {log}"
        )
    how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exited with code {code}"
    return f"stage `{key.label}`: its process {how} before the stage was done. What it printed: {log}"
