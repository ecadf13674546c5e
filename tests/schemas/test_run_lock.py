import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from schemas.errors import RunLockedError, StorageError
from schemas.object_store import ObjectStore
from schemas.run_lock import LOCK_NAME, StoreLease, local_lock, stage_at_work
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tests.faults.object_server import ObjectServer
from tests.run_fixtures import finish_stage, make_config

HOLD = """
import sys, time
from pathlib import Path
from schemas.run_lock import {what}
with {what}({arguments}):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path, what: str) -> subprocess.Popen[str]:
    """Return a process that holds a lock."""
    arguments = f"Path({str(folder)!r}), 'place'" if what == "local_lock" else f"Path({str(folder)!r})"
    code = HOLD.format(what=what, arguments=arguments)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_refused_with_the_holder_named(tmp_path: Path) -> None:
    holder = hold(tmp_path, "local_lock")
    try:
        with pytest.raises(RunLockedError) as refused, local_lock(tmp_path, "runs/x"):
            pass
        assert f"process {holder.pid} on {socket.gethostname()}" in str(refused.value)
        assert str(refused.value).startswith("runs/x: ")
        assert refused.value.exit_code == 2
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_left_by_a_dead_process_does_not_block(tmp_path: Path) -> None:
    holder = hold(tmp_path, "local_lock")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).read_text() != ""
    with local_lock(tmp_path, "runs/x"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK_NAME).read_text() == ""


def test_a_new_holder_waits_for_stages_that_a_dead_flow_left(tmp_path: Path) -> None:
    orphan = hold(tmp_path, "stage_at_work")
    ending = threading.Event()

    def end() -> None:
        ending.set()
        orphan.kill()

    threading.Timer(0.3, end).start()
    with local_lock(tmp_path, "runs/x"):
        assert ending.is_set()
    orphan.wait()


def test_stages_of_one_run_work_side_by_side(tmp_path: Path) -> None:
    with local_lock(tmp_path, "runs/x"), stage_at_work(tmp_path), stage_at_work(tmp_path):
        pass


def test_locks_are_taken_where_the_system_wants_files_open_for_what_they_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def flock_on_nfs(file: IO[str], operation: int) -> None:
        """NFSv4 locks ranges of bytes instead: shared ones need a file that can be read, others one to write to."""
        opened = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if opened == (os.O_WRONLY if operation & fcntl.LOCK_SH else os.O_RDONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_on_nfs)
    with local_lock(tmp_path, "runs/x"), stage_at_work(tmp_path):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server, server.reachable():
        yield server


def objects(server: ObjectServer, name: str) -> ObjectStore:
    return ObjectStore(f"{server.bucket}/{name}")


SHORT = 0.5
"""Seconds after which a lease that nobody renews is taken over."""


def lease(store: ObjectStore, *, seconds: float = 30) -> StoreLease:
    """Return a lease that is renewed often, and long enough that no load of the machine makes it lapse."""
    return StoreLease(store, lease=seconds, renew=0.2)


def wait_until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_in_an_object_store_too_the_second_is_refused(server: ObjectServer) -> None:
    store = objects(server, "second")
    with lease(store).held():
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on"), lease(store).held():
            pass
        assert store.read(LOCK_NAME) is not None
    assert store.read(LOCK_NAME) is None


def test_a_lease_that_nobody_renews_is_taken_over(server: ObjectServer) -> None:
    store = objects(server, "dead")
    left = {"host": "another", "pid": 1, "command": "npd", "since": "then", "token": "t"}
    store.write(LOCK_NAME, json.dumps(left).encode())
    begun = time.monotonic()
    with lease(store, seconds=SHORT).held():
        assert time.monotonic() - begun >= SHORT
        assert str(os.getpid()) in (store.read(LOCK_NAME) or b"").decode()


@pytest.fixture(scope="module")
def left_by_a_dead_process(server: ObjectServer) -> dict[str, Any]:
    """What the lock says that a process of this machine, now dead, has taken and not given back."""
    store = objects(server, "left")
    code = (
        "import os, sys; from schemas.object_store import ObjectStore; from schemas.run_lock import StoreLease;"
        "held = StoreLease(ObjectStore(sys.argv[1])).held(); held.__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, store.url], check=True)
    found: dict[str, Any] = json.loads(store.read(LOCK_NAME) or b"")
    return found


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_at_once(
    server: ObjectServer, left_by_a_dead_process: dict[str, Any]
) -> None:
    store = objects(server, "gone")
    store.write(LOCK_NAME, json.dumps(left_by_a_dead_process).encode())
    with StoreLease(store, lease=3600, renew=0.2).held():
        pass
    assert store.read(LOCK_NAME) is None


@pytest.mark.parametrize("name", ["boot", "pid_namespace"])
@pytest.mark.parametrize("value", [None, "another"])
def test_a_process_that_this_one_could_not_see_is_not_taken_for_dead(
    server: ObjectServer, left_by_a_dead_process: dict[str, Any], name: str, value: str | None
) -> None:
    store = objects(server, f"unseen-{name}-{value}")
    # Containers that share their host's network share its name, and none of its processes.
    left = left_by_a_dead_process | {name: value}
    store.write(LOCK_NAME, json.dumps(left).encode())
    begun = time.monotonic()
    with lease(store, seconds=SHORT).held():
        assert time.monotonic() - begun >= SHORT


def test_a_holder_learns_that_its_lease_was_taken(server: ObjectServer) -> None:
    store = objects(server, "taken")
    mine = lease(store)
    with mine.held():
        store.write(LOCK_NAME, b"somebody else's")
        assert wait_until(mine.is_lost)
    assert store.read(LOCK_NAME) == b"somebody else's"


def test_a_renewal_that_comes_late_overwrites_nobody(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = objects(server, "late"), objects(server, "late")
    mine = lease(store)
    with mine.held():
        read = store._filesystem.cat_file

        def read_then_lose(path: str) -> bytes:
            found: bytes = read(path)
            other.write(LOCK_NAME, b"somebody else's")
            return found

        monkeypatch.setattr(store._filesystem, "cat_file", read_then_lose)
        assert wait_until(mine.is_lost)
    assert other.read(LOCK_NAME) == b"somebody else's"


def test_a_store_that_is_away_for_less_than_the_lease_costs_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore("memory://away/runs/x")
    tries = 0

    def away(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise StorageError("away")

    mine = lease(store)
    with mine.held():
        with monkeypatch.context() as patch:
            patch.setattr(store, "replace", away)
            assert wait_until(lambda: tries == 3)
        before = store.read(LOCK_NAME)
        assert wait_until(lambda: store.read(LOCK_NAME) != before)
        assert not mine.is_lost()


def test_a_store_that_is_away_at_the_end_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ObjectStore("memory://gone/runs/x")

    def away(name: str) -> None:
        raise StorageError("the store is away")

    def interrupted() -> None:
        with lease(store).held():
            monkeypatch.setattr(store, "read", away)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "the store is away" in caplog.text


def test_a_lock_is_lost_before_another_process_may_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore("memory://late/runs/x")
    hanging = threading.Event()

    def hang(*_: object) -> None:
        hanging.wait(60)

    # The first renewal hangs; the lease then counts as lost 1.5 seconds before another process may take it.
    mine = StoreLease(store, lease=3.2, renew=1.5)
    begun = time.monotonic()
    with mine.held():
        monkeypatch.setattr(store, "replace", hang)
        assert wait_until(mine.is_lost)
        assert time.monotonic() - begun < 3.2
        hanging.set()


def test_no_stage_is_finished_once_the_lock_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    store = RunStore.create(make_config(tmp_path).model_copy(update={"root": f"memory:/{tmp_path}"}))
    key = StageKey("prompts")
    with store.lock.held():
        manifest = finish_stage(store, key, PROMPTS, [])
        child = RunStore(store.url)
        child.lock.follow(store.lock.token)
        child.finish(key, manifest)
        store.supersede(key)
        assert store.objects is not None
        store.objects.write(LOCK_NAME, b"somebody else's")
        for each in (store, child):
            with pytest.raises(RunLockedError, match="another process has taken it"):
                each.finish(key, manifest)
        assert store.manifest(key) is None
