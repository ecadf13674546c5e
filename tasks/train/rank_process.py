"""One of the processes that train together: `accelerate launch ... -m tasks.train.rank`; see `tasks.train.launch`.

On the machine of the stage it gets its job over a socket whose end ends it; on other machines from the first process.
"""

import os
import signal
import socket
import threading
import traceback
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from schemas.config import RunConfig, parse_settings
from schemas.errors import NPDError
from schemas.local_files import storage_errors
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.collector import collector_paused
from tasks.process import EventWriter, Job, describe_failure
from tasks.stage import StageJob, no_progress
from tasks.train.launch import LINK

_JOB = "npd/job"
_JOIN_SECONDS = 600


class StageLink:
    """The connection to the stage that this process trains for.

    Args:
        address: The Unix socket where the stage listens.
        rank: Which of the processes this is, from 0.
    """

    def __init__(self, address: str, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self.events = EventWriter(os.dup(self._socket.fileno()))
        self.events.send({"event": "rank", "rank": rank})

    def job_line(self) -> bytes:
        """Return what to do; from then on this process ends when its stage does."""
        with self._socket.makefile("rb") as reading:
            line = reading.readline()
        threading.Thread(target=self._end_with_stage, daemon=True).start()
        return line

    def _end_with_stage(self) -> None:
        with suppress(ConnectionResetError):
            while self._socket.recv(4096):
                continue
        # The launcher has given it a session of its own.
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def main() -> int:
    """Train as one of several processes; return the exit code."""
    rank, size, local_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    link = StageLink(os.environ[LINK], rank) if LINK in os.environ else None
    line = None if link is None else link.job_line()
    if size > local_size:
        line = _shared(line, rank)
    assert line is not None, "only on other machines there is no link"
    job = Job.from_line(line)
    key = StageKey(*job.keys[0])
    try:
        _train(job, key, link)
    except Exception as error:  # the boundary of the process: every error must reach the stage
        if link is not None:
            link.events.send(describe_failure(error, key, job.log) | {"typed": isinstance(error, NPDError)})
        # Last: a disk that is full takes no traceback either.
        traceback.print_exc()
        return 1
    if link is not None:
        link.events.send({"event": "done"})
    dist.destroy_process_group()
    return 0


def _train(job: Job, key: StageKey, link: StageLink | None) -> None:
    with collector_paused():
        from tasks.train.optimize import optimize
        from tasks.train.plan import plan_round

    store, config = RunStore(job.place), parse_settings(job.config)
    assert isinstance(config, RunConfig)
    first = int(os.environ["RANK"]) == 0
    stage = StageJob(store, config, key, link.events.progress if link is not None and first else no_progress)
    with storage_errors(f"{store.url}: stage `{key.label}`"), store.lock.stage_at_work():
        optimize(stage, plan_round(stage))


def _shared(line: bytes | None, rank: int) -> bytes:
    """Return what the first process was told, in every process."""
    # Where the processes will meet to train, too.
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS)))
    if rank == 0:
        assert line is not None
        store.set(_JOB, line.decode())
        return line
    received: bytes = store.get(_JOB)
    return received
