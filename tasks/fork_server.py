"""Imports the heavy libraries once and forks a process for every stage: `python -m tasks.fork_server SOCKET [MODULE]`.

Importing torch, transformers and TRL takes seconds; a forked copy of this process has them at once, and gives all its
memory back when its stage is done. Started and spoken to by `flows.stage_process`.

Requests come over a Unix socket as one byte with three file descriptors: the job's stdin, its event pipe, its log.
Answers are JSON lines: `{"pid": n}` for a started process, `{"pid": n, "code": c}` when it has ended (c as
`subprocess.Popen.returncode`). The end of the socket ends this process; stages notice on their own stdin.
"""

import functools
import gc
import importlib
import importlib.metadata
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from tasks.collector import collector_paused
from tasks.quick_exit import QuickExit

HEAVY = (
    "tasks.models.stage",
    "tasks.rollout.transformers_engine",
    "tasks.score.stage",
    "tasks.train.stage",
    "tasks.export.stage",
    "tasks.evaluate.stage",
    "transformers.models.auto.modeling_auto",
)
"""What stages import; vLLM is not among them, since it reads its settings from the environment when imported."""


def import_heavy(more: Sequence[str] = ()) -> None:
    """Import what stages import, and the modules ``more``, to fork afterwards."""
    # transformers and TRL each go through all packages there are.
    importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)
    try:
        with collector_paused():
            for module in (*HEAVY, *more):
                importlib.import_module(module)
            _use_once()
    finally:
        # What is there now stays shared between the processes: the collector must not write to it.
        gc.freeze()


class StageRequest(NamedTuple):
    """File descriptors of a process to start."""

    stdin: int
    events: int
    log: int


def _use_once() -> None:
    """Let libraries make what they make at their first use, which every stage would do again for itself."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from schemas.tables import PROMPTS

    get_checkpoint_conversion_mapping("llama")
    PROMPTS.validate(PROMPTS.columns.empty_table(), "nowhere")


def serve(channel: socket.socket) -> StageRequest | None:
    """Start processes until the socket ends.

    Returns:
        None in the server when the socket has ended; in a forked process, what it was started for.
    """
    waking, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(waking, selectors.EVENT_READ)
        while True:
            for ready, _ in selector.select():
                if ready.fileobj is not channel:
                    os.read(waking, 4096)
                    _report_ended(channel)
                    continue
                request = _receive(channel)
                if request is None:
                    return None
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    return request
                for descriptor in request:
                    os.close(descriptor)
                _send(channel, {"pid": child})


def _receive(channel: socket.socket) -> StageRequest | None:
    data, descriptors, _, _ = socket.recv_fds(channel, 1, 3)
    return StageRequest(*descriptors) if data else None


def _report_ended(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(channel, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _send(channel: socket.socket, answer: dict[str, int]) -> None:
    channel.sendall(json.dumps(answer).encode() + b"\n")


def _run_stage(request: StageRequest) -> int:
    """Run the job, in a session and with standard streams of its own; return the exit code."""
    os.setsid()
    for descriptor, standard in ((request.stdin, 0), (request.log, 1), (request.log, 2)):
        os.dup2(descriptor, standard)
    os.close(request.stdin)
    os.close(request.log)
    if _gpu_was_in_use():
        # Something imported (bitsandbytes does, where peft finds it) has spoken to the GPU, which a fork cannot share.
        os.set_inheritable(request.events, True)
        os.execv(
            sys.executable, [sys.executable, "-P", "-X", "faulthandler", "-m", "tasks.process", str(request.events)]
        )
    from tasks.process import run_job

    return run_job(request.events)


def _gpu_was_in_use() -> bool:
    """Say whether CUDA was at work in the process that this one is a fork of; it can then not be used here."""
    torch = sys.modules.get("torch")
    # Not `is_initialized`, which a fork always denies.
    return torch is not None and bool(torch.cuda._is_in_bad_fork())


def main() -> int:
    """Import, then serve; a forked process runs its stage instead."""
    # Ctrl-C is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Counting GPUs must not initialise CUDA, which would not survive the fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    channel = socket.socket(fileno=int(sys.argv[1]))
    # A package that is missing or broken fails the stage that needs it, with the error in its log, not this process.
    with suppress(Exception):
        import_heavy(sys.argv[2:])
    request = serve(channel)
    channel.close()
    return 0 if request is None else _run_stage(request)


if __name__ == "__main__":
    # Else the libraries are taken apart, in every stage's process, when it is done.
    leaving = QuickExit()
    leaving.code = main()
