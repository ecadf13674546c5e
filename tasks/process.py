"""One stage, or all of a small run's, in a process of its own, started by `flows.process`.

Usually a fork of `tasks.fork_server`; also `python -m tasks.process EVENTS_FD`. The first line of stdin is the job as
JSON. Events leave as JSON lines through a file descriptor of their own, so that stdout and stderr stay free for what
libraries print. Stdin stays open for as long as the parent lives: its end ends this process and everything it started.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple

from schemas.config import RunConfig, parse_settings
from schemas.errors import NPDError, StageError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.collector import free_memory
from tasks.stage import execute, settle

EVENT_SECONDS = 0.1
"""Least time between two progress events of one unit; the last one of a unit always goes out."""

_LARGE_TEACHER = ", or set `teacher.device_map`; or, from the start again, `teacher.quantization`"

MEMORY_SETTINGS = {
    "models": "nothing can be lowered here: choose a smaller model, or give the machine more memory",
    "reference": "lower `generate.batch_size` (vLLM: `generate.vllm.gpu_memory_utilization`)" + _LARGE_TEACHER,
    "generate": "lower `generate.batch_size` (vLLM: `generate.vllm.gpu_memory_utilization`, "
    "`generate.vllm.max_num_seqs`); or, from the start again, `generate.max_new_tokens`",
    "score": "lower `score.batch_tokens` or `score.logits_chunk`" + _LARGE_TEACHER,
    "train": "lower `train.loss_chunk`, keep `train.gradient_checkpointing: true`; or, from the start again, lower "
    "`pack.max_tokens` or set `train.lora`",
    "export": "set `export.dtype: bfloat16`, or give the machine more memory",
    "baseline": "lower `evaluate.batch_tokens` or `generate.batch_size` (of an RL run: `evaluate.batch_size`)",
    "evaluate": "lower `evaluate.batch_tokens` or `generate.batch_size`" + _LARGE_TEACHER,
    "rl": "keep `grpo.gradient_checkpointing: true`; or, from the start again, lower `grpo.sequences_per_batch` or "
    "`grpo.max_new_tokens`",
}
"""What to change where a stage's memory runs out; first what the stage goes on with from its finished files."""


class Job(NamedTuple):
    """What the parent asks for.

    Args:
        place: The run's folder or URL.
        config: The resolved config as JSON values.
        keys: Stage name and round of each stage, in order.
        log: Where this process's stdout and stderr go, for error messages.
        threads: CPU threads to use; None: the libraries' own choice.
        lenders: Places of runs whose results of equal fingerprints are taken over; a stage whose own result stands is
            then not run either. None: every stage runs.
        lock: Token of the parent's hold on the run, if that lies in an object store.
    """

    place: str
    config: dict[str, Any]
    keys: list[tuple[str, int | None]]
    log: str
    threads: int | None = None
    lenders: list[str] | None = None
    lock: str | None = None

    def to_line(self) -> bytes:
        """Return the job as the line the child reads."""
        return json.dumps(self._asdict()).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Job":
        """Parse what ``to_line`` wrote."""
        values = json.loads(line)
        return cls(keys=[(stage, round_index) for stage, round_index in values.pop("keys")], **values)


def out_of_memory_hint(key: StageKey) -> str:
    """Return what to lower when stage ``key`` runs out of memory."""
    if key.stage == "train" and key.round == WARMUP:
        return MEMORY_SETTINGS["train"].replace("train.", "warmup.").replace(" or set `warmup.lora`", "")
    if key.round is None and key.stage == "evaluate":
        return "lower `evaluate.batch_size`"
    return MEMORY_SETTINGS.get(key.stage, "give the machine more memory")


def describe_failure(error: Exception, key: StageKey, log: str) -> dict[str, str]:
    """Return the error event for ``error``: a typed error as it is, any other as a StageError that names the log."""
    if isinstance(error, NPDError):
        return {"event": "error", "type": type(error).__name__, "message": str(error)}
    last = traceback.format_exception_only(error)[-1].strip()
    # torch.OutOfMemoryError by name: this module must not import torch.
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    hint = f" {out_of_memory_hint(key)}." if memory else ""
    message = f"stage `{key.label}` failed: {last}.{hint} Traceback: {log}"
    return {"event": "error", "type": StageError.__name__, "message": message}


class EventWriter:
    """Writes events to ``descriptor``, one JSON object a line."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()
        self._last_unit, self._last_time = "", 0.0

    def send(self, event: dict[str, Any]) -> None:
        """Write one event."""
        with self._lock:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()

    def progress(self, done: int, total: int, unit: str) -> None:
        """Write a progress event, unless one of the same unit has just gone out and more will follow."""
        now = time.monotonic()
        if unit == self._last_unit and done < total and now - self._last_time < EVENT_SECONDS:
            return
        self._last_unit, self._last_time = unit, now
        self.send({"event": "progress", "done": int(done), "total": int(total), "unit": unit})


def run_job(events_descriptor: int) -> int:
    """Run the job on stdin; return the exit code.

    Args:
        events_descriptor: File descriptor that events go to.
    """
    events = EventWriter(events_descriptor)
    stdin = _claim_stdin()
    job = Job.from_line(_read_line(stdin))
    threading.Thread(target=_end_with_parent, args=(stdin,), daemon=True).start()
    key = StageKey(*job.keys[0])
    if job.threads is not None:
        limit_threads(job.threads)
    try:
        store, config = RunStore(job.place), parse_settings(job.config)
        store.lock.follow(job.lock)
        if isinstance(config, RunConfig) and config.train.on_policy is not None:
            # What it imports takes longer than a small run trains, and is no part of the stage's time.
            importlib.import_module("tasks.train.on_policy")
        lenders = None if job.lenders is None else [RunStore(place) for place in job.lenders]
        for key in (StageKey(*named) for named in job.keys):
            if lenders is None:
                execute(store, config, key, events.progress)
            else:
                events.send({"event": "stage", "stage": key.stage, "round": key.round})
                settle(store, config, key, lenders, events.progress)
                free_memory()
    except Exception as error:  # the boundary of the process: every error must reach the parent
        # First: a disk that is full takes no traceback either.
        events.send(describe_failure(error, key, job.log))
        traceback.print_exc()
        return 1
    events.send({"event": "done"})
    return 0


def limit_threads(threads: int) -> None:
    """Let this process's libraries use so many CPU threads."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    # vLLM on a CPU would otherwise bind its threads to every core of the machine.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _claim_stdin() -> int:
    """Move stdin to a descriptor that no child inherits; libraries see an empty stdin."""
    stdin = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return stdin


def _read_line(descriptor: int) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = os.read(descriptor, 1)
        if not chunk:
            raise SystemExit("tasks.process: stdin ended before the job; it is started by the flow, not by hand")
        line += chunk
    return bytes(line)


def _end_with_parent(stdin: int) -> None:
    while os.read(stdin, 4096):
        continue
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(run_job(int(sys.argv[1])))
