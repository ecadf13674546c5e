"""Writing to a local disk so that a name stands for a whole file or folder, or for nothing."""

import errno
import fcntl
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from schemas.errors import StorageError

TEMPORARY = ".tmp-"
"""How names begin under which something is still being written."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The system's numbers for a disk, quota or file that takes no more."""

_WHY = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this disk or process may write",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.EIO: "the disk failed to read or write",
    errno.ELOOP: "is a link, and what it leads to is not this run's",
}
_REMEDY = {
    errno.ELOOP: "Remove the link, then run the same command again",
    errno.ENOSPC: "Free some (`npd gc RUN` drops earlier results), then run the same command again: it continues",
    errno.EDQUOT: "Free some (`npd gc RUN` drops earlier results), then run the same command again: it continues",
}
_FOREIGN_ERRNO = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)


def storage_error(error: BaseException, where: str) -> StorageError | None:
    """Return ``error`` as a StorageError if a disk that cannot be written to is its reason, else None.

    Args:
        error: Of the operating system; or of a library that tells of one in its text, as safetensors does.
        where: What was being written, where the error names no file.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _FOREIGN_ERRNO.search(str(error))):
        number = int(found[1] or found[2])
    if number not in _WHY:
        return None
    name = error.filename if isinstance(error, OSError) and error.filename else where
    remedy = _REMEDY.get(number, "Make the place writable, then run the same command again: it continues")
    return StorageError(f"{name}: {_WHY[number]}. {remedy}")


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Raise errors of a disk that cannot be written to as StorageError; see ``storage_error``."""
    try:
        yield
    except Exception as error:
        known = storage_error(error, where)
        if known is None:
            raise
        raise known from error


def open_to_append(path: Path) -> io.FileIO:
    """Open a file to read and to append to, made if need be, but never through a link: that is another's file.

    Raises:
        OSError: it cannot be opened, or is a link (ELOOP).
    """

    def not_through_links(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "a+b", buffering=0, opener=not_through_links)


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write a file under; it becomes ``path`` when the context ends without an error."""
    temporary = _temporary(path)
    try:
        with _at_work(temporary, os.O_CREAT):
            yield temporary
            publish_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder to fill; it becomes ``path`` when the context ends without an error."""
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        with _at_work(temporary):
            yield temporary
            publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside ``folder`` that is gone when the context ends."""
    temporary = _temporary(folder / "scratch")
    temporary.mkdir()
    try:
        with _at_work(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_file(temporary: Path, path: Path) -> None:
    """Give a written file its name, once its bytes are on the disk."""
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a filled folder its name, once its bytes are on the disk; what had the name before goes."""
    for entry in temporary.rglob("*"):
        _sync(entry)
    _sync(temporary)
    remove(path)
    temporary.rename(path)
    _sync(path.parent)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder on one disk; ``target`` must not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    for folder in (target.parent, path.parent):
        _sync(folder)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leftovers(folder: Path, *, deep: bool = True) -> list[Path]:
    """Return what a process that died was still writing in ``folder``, or also (``deep``) below it.

    What a living process writes is none: `npd verify` and `npd report` write beside a run that others work on.
    """
    found = folder.glob(f"{'**/' if deep else ''}{TEMPORARY}*")
    return [path for path in sorted(found) if not _is_at_work(path)]


def remove_temporaries(folder: Path, *, deep: bool = True) -> None:
    """Remove what ``leftovers`` returns."""
    for leftover in leftovers(folder, deep=deep):
        remove(leftover)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"


@contextmanager
def _at_work(temporary: Path, flags: int = 0) -> Iterator[None]:
    """Hold a temporary file or folder; the system lets go when this process ends, however it ends."""
    descriptor = os.open(temporary, os.O_RDONLY | flags, 0o666)
    try:
        # Where a disk has no locks, whoever clears up takes it for a leftover.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _is_at_work(temporary: Path) -> bool:
    """Say whether a living process holds a temporary file or folder."""
    try:
        # NFS gives a lock that excludes others on no file that cannot be written to.
        descriptor = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and shared folders (SMB, VirtualBox, virtiofs) may have no such call for a folder.
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
