"""One process at a time on a run: who holds it, and how long after its death it is held."""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from schemas.errors import RunLockedError, StorageError
from schemas.local_files import open_to_append, remove_temporaries, storage_error, storage_errors
from schemas.object_store import ObjectStore

LOCK_NAME = "run.lock"
"""Name of the lock in a run's folder. A file that stays; whether it is held is the system's knowledge, not its text."""

STAGES_LOCK_NAME = "stages.lock"
"""Held by the processes of stages, which may outlive their flow by a moment."""

LEASE_SECONDS = 60.0
"""An object store's lock that nobody has renewed for so long was left by a process that died."""

RENEW_SECONDS = 15.0
"""How often the holder renews it."""

ORPHAN_SECONDS = 30.0
"""How long a new holder waits for the stages of a flow that died to end."""

_POLL_SECONDS = 0.2

_logger = logging.getLogger(__name__)


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        **_process_ids(),
        "pid": os.getpid(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:3]])[:200],
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "token": uuid.uuid4().hex,
    }


def _process_ids() -> dict[str, str | None]:
    """Return where this process's id is its own: a boot of a machine, and a namespace there; None where nobody tells.

    The host's name does not say: containers may share it and see none of each other's processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return {"boot": None, "pid_namespace": None}
    return {"boot": boot, "pid_namespace": namespace}


def _refusal(place: str, text: bytes | str) -> RunLockedError:
    try:
        found: dict[str, Any] = json.loads(text)
        who = f"process {found['pid']} on {found['host']} (`{found['command']}`, since {found['since']})"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return RunLockedError(f"{place}: {who} works on this run. Wait for it or end it; nothing was changed")


@contextmanager
def local_lock(folder: Path, place: str) -> Iterator[None]:
    """Hold a run in a local folder. The system lets go when this process ends, however it ends.

    Raises:
        RunLockedError: another process holds it, or a stage that one left behind does not end.
        StorageError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open_to_append(folder / LOCK_NAME)
    except OSError as error:
        raise _unwritable(place, error) from error
    with opened as file:
        try:
            _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(place, file.read()) from None
        _name_holder(file, json.dumps(_holder()), place)
        try:
            _wait_for_orphans(folder, place)
            yield
        finally:
            _name_holder(file, "", place)


def _flock(file: FileIO, operation: int) -> None:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _logger.warning("%s: this disk has no locks: nothing keeps a second process off the run", file.name)


def _name_holder(file: FileIO, text: str, place: str) -> None:
    try:
        # Not through the file's buffer: what does not fit would be tried again when it is closed.
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), text.encode())
    except OSError as error:
        # The system holds the lock, whatever the text; and what frees space has to start on a full disk.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise _unwritable(place, error) from error


def _unwritable(place: str, error: OSError) -> StorageError:
    return storage_error(error, place) or StorageError(f"{place}: cannot be written to: {error.strerror}")


def _wait_for_orphans(folder: Path, place: str) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    with storage_errors(place), open_to_append(folder / STAGES_LOCK_NAME) as file:
        while True:
            try:
                _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunLockedError(
                        f"{place}: a stage of a flow that has ended still runs here. End it, then start again"
                    ) from None
            time.sleep(_POLL_SECONDS)


@contextmanager
def stage_at_work(folder: Path) -> Iterator[None]:
    """Say that a stage works in a run's folder; several may at once."""
    folder.mkdir(parents=True, exist_ok=True)
    # Readable: NFSv4 gives a shared lock on no other file.
    with open_to_append(folder / STAGES_LOCK_NAME) as file:
        _flock(file, fcntl.LOCK_SH)
        yield


class StoreLease:
    """A lock in an object store: an object that its holder keeps renewing.

    A challenger watches it: unchanged for ``LEASE_SECONDS`` it was left by a process that died; at once if that process
    is known to be gone, which only one of its machine and PID namespace can tell. Clocks are not compared. On S3 nobody
    renews a lock, or takes it over, that has just become another's (``ObjectStore.replace``).
    """

    def __init__(self, objects: ObjectStore, *, lease: float = LEASE_SECONDS, renew: float = RENEW_SECONDS) -> None:
        self._objects, self._lease, self._renew = objects, lease, renew
        self._holder = _holder()
        self._ended, self._lost = threading.Event(), threading.Event()
        self._renewed = time.monotonic()

    @property
    def token(self) -> str:
        """What the lock's text has of this holder alone."""
        token: str = self._holder["token"]
        return token

    def is_lost(self) -> bool:
        """Say whether another process has taken the lock, or soon may: this one must not write any more."""
        # By the clock too: a call to a store that is away may hang for longer than the lease has left.
        return self._lost.is_set() or time.monotonic() - self._renewed > self._lease - self._renew

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock.

        Raises:
            RunLockedError: another process holds it.
        """
        self._take()
        thread = threading.Thread(target=self._keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._give_back()

    def _give_back(self) -> None:
        try:
            if self._is_ours(self._objects.read(LOCK_NAME)):
                self._objects.delete(LOCK_NAME)
        except StorageError as error:
            # What the run came to matters more, and a lock that nobody renews lapses.
            _logger.warning("%s. The lock of this run lapses by itself, in %g seconds", error, self._lease)

    def _take(self) -> None:
        if self._create():
            return
        seen = self._objects.read(LOCK_NAME)
        if seen is not None and not _died_here(seen):
            deadline = time.monotonic() + self._lease
            while time.monotonic() < deadline:
                time.sleep(min(self._renew, self._lease) / 5)
                now = self._objects.read(LOCK_NAME)
                if now is None:
                    break
                if now != seen:
                    raise _refusal(self._objects.url, now)
        taken = seen is not None and self._replace(lambda found: found == seen)
        if not taken and not self._create():
            raise _refusal(self._objects.url, self._objects.read(LOCK_NAME) or b"")

    def _create(self) -> bool:
        self._renewed = time.monotonic()
        return self._objects.create(LOCK_NAME, self._text())

    def _keep(self) -> None:
        wait = self._renew
        while not self._ended.wait(wait):
            try:
                self._write_again()
                wait = self._renew
            except StorageError as error:
                _logger.warning("%s", error)
                wait = self._renew / 5
            if self.is_lost():
                self._lost.set()
                return

    def _write_again(self) -> None:
        if not self._replace(lambda found: self._is_ours(found) and not self.is_lost()):
            self._lost.set()

    def _replace(self, replaceable: Callable[[bytes], bool]) -> bool:
        begun = time.monotonic()
        if not self._objects.replace(LOCK_NAME, replaceable, self._text()):
            return False
        self._renewed = begun
        return True

    def _text(self) -> bytes:
        return json.dumps(self._holder | {"renewed": time.time_ns()}).encode()

    def _is_ours(self, text: bytes | None) -> bool:
        return text is not None and self.token.encode() in text


def _died_here(text: bytes) -> bool:
    """Say whether a lock was left by a process that is known to be dead; where nobody can know, the lock lapses."""
    here = _process_ids()
    try:
        found = json.loads(text)
        there, pid = {name: found[name] for name in here}, int(found["pid"])
    except (ValueError, KeyError, TypeError):
        return False
    # macOS tells neither, and two of its machines may have one name: there a dead holder blocks for a lease's length.
    if there != here or None in here.values():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError) as error:
        return isinstance(error, ProcessLookupError)
    return False


class RunLock:
    """The lock of one run, wherever it lies.

    Args:
        folder: The run's folder, or its working copy.
        place: The run's name for people.
        objects: Where it lies, if that is an object store.
    """

    def __init__(self, folder: Path, place: str, objects: ObjectStore | None) -> None:
        self._folder, self._place, self._objects = folder, place, objects
        self._lease: StoreLease | None = None
        self.token: str | None = None
        """Tells this hold on an object store's run from others', for processes that ``follow`` it; None elsewhere."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run, so that no other process changes it meanwhile; clear what one that died was writing at its top.

        Raises:
            RunLockedError: another process holds it; names it.
            StorageError: the place cannot be written to.
        """
        with local_lock(self._folder, self._place):
            # Of run.json; a stage clears its own folder when it begins.
            remove_temporaries(self._folder, deep=False)
            if self._objects is None:
                yield
                return
            lease = StoreLease(self._objects)
            with lease.held():
                self._lease, self.token = lease, lease.token
                try:
                    yield
                finally:
                    self._lease = self.token = None

    def follow(self, token: str | None) -> None:
        """Work on a run that this process's parent holds, by the ``token`` of its lock."""
        self.token = token

    def require(self) -> None:
        """Check that the lock, once taken, is still this process's, as far as it has heard; costs nothing.

        Raises:
            RunLockedError: somebody else has taken it, or soon may.
        """
        if self._lease is not None and self._lease.is_lost():
            raise self._lost()

    def confirm(self) -> None:
        """Check by a look at the lock that it is still this process's, or its parent's; in a folder the system knows.

        Raises:
            RunLockedError: somebody else has taken it, or soon may.
        """
        self.require()
        if self._objects is not None and self.token is not None:
            text = self._objects.read(LOCK_NAME)
            if text is None or self.token.encode() not in text:
                raise self._lost()

    def _lost(self) -> RunLockedError:
        return RunLockedError(
            f"{self._place}: the lock could not be renewed, or another process has taken it; this one stops here. Once "
            "no other works on the run, the same command continues it"
        )

    def stage_at_work(self) -> AbstractContextManager[None]:
        """Say that this process runs a stage; a new holder of the lock waits for it to end."""
        return stage_at_work(self._folder)
