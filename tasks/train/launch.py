"""Starts the processes that train together, with `accelerate launch`, and hears how they fare."""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from schemas.config import LaunchConfig
from schemas.errors import StageError, error_by_name
from schemas.local_files import open_to_append
from tasks.cores import available_cores
from tasks.process import Job, out_of_memory_hint
from tasks.stage import Progress, StageJob

LINK = "NPD_TRAIN_LINK"
"""Environment variable with the Unix socket by which a process that trains speaks to its stage."""

_POLL_SECONDS = 0.2
_SAME_MOMENT_SECONDS = 0.1
"""How much later than its neighbour's complaint a death may be heard of; the launcher takes longer to end others."""
_TERMINATE_SECONDS = 40.0
_MODULE = "tasks.train.rank"


def train_on_ranks(job: StageJob) -> None:
    """Train what is left of a round in several processes; they are gone when this returns or raises.

    Raises:
        NPDError: what a process raised, as the same class; for any other error, or a process that died, a StageError
            that names the process and the log.
    """
    log = job.store.log(job.key)
    log.parent.mkdir(parents=True, exist_ok=True)
    launch, key = job.config.train.launch, job.key
    order = Job(job.store.url, job.config.model_dump(mode="json"), [(key.stage, key.round)], str(log))
    with _listening() as (server, address), open_to_append(log) as sink, Ranks(server, order, job.progress) as ranks:
        launcher = subprocess.Popen(
            launch_command(launch, machine=0),
            env=rank_environment(job.config.devices.trainer) | {LINK: address},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
        try:
            while launcher.poll() is None:
                ranks.hear(_POLL_SECONDS)
            while ranks.hear(0):
                continue
        finally:
            end_launcher(launcher)
        if launcher.returncode != 0:
            raise ranks.failure(launcher.returncode, job, log)


def launch_command(launch: LaunchConfig, machine: int) -> list[str]:
    """Return the command that starts the processes of one machine.

    Args:
        launch: How many there are, and where.
        machine: Which of the machines this one is, from 0.
    """
    several = launch.machines > 1
    return [
        *[sys.executable, "-P", "-m", "accelerate.commands.launch"],
        # Its name for torchrun, on whatever device: which one is said to every process by its config.
        "--multi_gpu",
        *["--num_processes", str(launch.world_size)],
        *["--num_machines", str(launch.machines)],
        *["--machine_rank", str(machine)],
        *(["--same_network", "--main_process_ip", str(launch.main_address)] if several else []),
        *["--main_process_port", str(launch.main_port if several else 0)],
        *["--num_cpu_threads_per_process", str(max(1, _cores() // launch.processes))],
        *["--mixed_precision", "no", "--dynamo_backend", "no"],
        *launch.options,
        *["-m", _MODULE],
    ]


def rank_environment(device: str | None) -> dict[str, str]:
    """Return the environment of processes that train: this one's, without GPUs where ``device`` is the CPU."""
    # A `tasks.py` in the working directory is not ours.
    return os.environ | {"PYTHONSAFEPATH": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def end_launcher(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher, if it still runs; it ends its processes."""
    if launcher.poll() is None:
        launcher.terminate()
    try:
        launcher.wait(_TERMINATE_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()


class Ranks:
    """The processes of this machine, as seen from their stage.

    Each connects to a socket and is told what to do; what it says comes back as the events of `tasks.process`. The
    first of them to end without a word, or with an error, is the one that the others fail after.

    Args:
        server: Where they connect.
        order: What they are told.
        on_progress: Told how far they are.
    """

    def __init__(self, server: socket.socket, order: Job, on_progress: Progress) -> None:
        self._server, self._order, self._on_progress = server, order, on_progress
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._buffers: dict[socket.socket, bytes] = {}
        self._names: dict[socket.socket, int] = {}
        self._ends: list[tuple[int, dict[str, Any] | None]] = []
        """Process and its last word, in the order they ended; None: it had none."""

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        # A process whose stage is gone ends itself.
        for connection in self._buffers:
            connection.close()
        self._selector.close()

    def hear(self, seconds: float) -> bool:
        """Wait for what processes say, at most so long, and take it in; return whether there was anything."""
        heard, last_words = self._take_in(seconds)
        if last_words:
            # Those that died in the same moment come first: their neighbours may notice before the news gets here.
            until = time.monotonic() + _SAME_MOMENT_SECONDS
            while (left := until - time.monotonic()) > 0:
                last_words += self._take_in(left)[1]
        self._ends += last_words
        return heard

    def _take_in(self, seconds: float) -> tuple[bool, list[tuple[int, dict[str, Any]]]]:
        """Wait at most so long for events; return whether there were any, and the last words among them."""
        ready = [key.fileobj for key, _ in self._selector.select(seconds)]
        last_words: list[tuple[int, dict[str, Any]]] = []
        for connection in ready:
            assert isinstance(connection, socket.socket)
            if connection is self._server:
                self._welcome()
                continue
            for event in self._events(connection):
                if event["event"] == "rank":
                    self._names[connection] = event["rank"]
                elif event["event"] == "progress":
                    self._on_progress(event["done"], event["total"], event["unit"])
                else:
                    last_words.append((self._names.pop(connection), event))
        return bool(ready), last_words

    def failure(self, code: int, job: StageJob, log: Path) -> Exception:
        """Return the error to raise once the launcher has failed with ``code``."""
        size, told = job.config.train.launch.world_size, f"What it printed: {log}"
        for _, event in self._ends:
            if event is not None and event.get("typed"):
                return error_by_name(event["type"])(event["message"])
        for rank, event in self._ends:
            if event is None:
                return StageError(
                    f"stage `{job.key.label}`: process {rank} of {size} (from 0) died before the stage was done. If it "
                    f"was killed for memory: {out_of_memory_hint(job.key)}, or set `train.launch.strategy: fsdp2`. "
                    f"{told}"
                )
            if event["event"] == "error":
                return StageError(f"{event['message']} (process {rank} of {size}, from 0)")
        return StageError(
            f"stage `{job.key.label}`: `accelerate launch` exited with code {code} and no process of this machine had "
            f"anything to say. {told}"
        )

    def _welcome(self) -> None:
        connection, _ = self._server.accept()
        connection.sendall(self._order.to_line())
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _events(self, connection: socket.socket) -> Iterator[dict[str, Any]]:
        try:
            data = connection.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            if connection in self._names:
                self._ends.append((self._names.pop(connection), None))
            return
        *lines, self._buffers[connection] = (self._buffers[connection] + data).split(b"\n")
        yield from map(json.loads, lines)


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, str]]:
    # Not in the run's folder: the path of a Unix socket must be short.
    with tempfile.TemporaryDirectory(prefix="npd-") as folder, socket.socket(socket.AF_UNIX) as server:
        address = str(Path(folder) / "link")
        server.bind(address)
        server.listen()
        yield server, address


def _cores() -> int:
    """Return the CPU cores of this stage: those it was limited to, else the machine's."""
    limit = os.environ.get("OMP_NUM_THREADS")
    return available_cores() if limit is None else int(limit)
