"""Files below one URL of an object store, through fsspec.

Nothing here is a rename: an object appears whole when its upload ends, a folder appears file by file. What belongs
together is complete when the manifest says so.
"""

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from schemas import local_files
from schemas.errors import ConfigError, StorageError

TRIES = 5
"""How often a call is made before the object store counts as out of reach."""

FIRST_WAIT_SECONDS = 0.5
"""Wait before the second try; doubled for each further one."""

_OURS = (FileNotFoundError, FileExistsError, PermissionError, ValueError, TypeError, NotImplementedError, ImportError)

_logger = logging.getLogger(__name__)
T = TypeVar("T")


def is_url(place: str) -> bool:
    """Say whether ``place`` names an object store and not a local folder.

    >>> is_url("s3://bucket/runs"), is_url("runs"), is_url("file:///runs")
    (True, False, False)
    """
    return "://" in place and not place.startswith(("file://", "local://"))


def check_place(place: str) -> None:
    """Check that a run's place carries no credentials: it is recorded, logged and shown.

    Raises:
        ConfigError: it does; does not repeat them.
    """
    if "://" not in place:
        return
    parts = urlsplit(place)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "root: a URL with credentials or options in it would be written into every record; give "
            f"`{parts.scheme}://BUCKET/FOLDER` and set them in the environment (for S3: AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )


def cache_folder(url: str) -> Path:
    """Return where the local working copy of the run at ``url`` lies.

    Below NPD_CACHE if that is set, else below the user's cache folder.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    base = os.environ.get("NPD_CACHE", caches / "npd")
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return Path(base).absolute() / f"{url.rstrip('/').rsplit('/', 1)[-1]}-{name}"


class ObjectStore:
    """Objects by name below ``url``.

    Calls that fail because the world does are made again, ``TRIES`` times in all, each with a line in the log.

    Raises:
        ConfigError: there is no fsspec driver for the URL.
        StorageError: from every call: the store is out of reach, or refuses; from those that write or list: there is no
            such bucket.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            # A driver kept from before would not see that the environment names another server or key now.
            filesystem, root = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"root: {url}: {error}. For s3:// install the extra `s3`") from None
        self._filesystem: Any = filesystem
        self._conditional = "s3" in filesystem.protocol
        """Whether the store can be asked to write an object only if it is as it was."""
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """Return an object's bytes; None if there is none."""
        try:
            data: bytes = self._call("read", name, lambda: self._filesystem.cat_file(self._full(name)))
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write an object, whole or not at all."""
        self._in_bucket("write", name, lambda: self._filesystem.pipe_file(self._full(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one; return whether it was written."""
        try:
            self._in_bucket("write", name, lambda: self._filesystem.pipe_file(self._full(name), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, replaceable: Callable[[bytes], bool], data: bytes) -> bool:
        """Write an object if what it holds is ``replaceable``; return whether it holds ``data`` now.

        On S3 the write is conditional, so nobody else's can come in between. Other stores have no such call through
        fsspec, nor has an S3 server that does not know the header: there the bytes are looked at, then written.
        """

        def replaced() -> bool:
            # Asked first: bytes that are replaceable afterwards were there then, since nobody writes the same twice.
            condition = self._unchanged(name)
            found = self._filesystem.cat_file(self._full(name))
            # A call whose answer was lost is made again.
            if found != data and replaceable(found):
                self._write_if(condition, name, data)
                return True
            return bool(found == data)

        try:
            return self._call("write", name, replaced)
        except FileNotFoundError:
            return False

    def _unchanged(self, name: str) -> dict[str, str]:
        if not self._conditional:
            return {}
        return {"IfMatch": self._filesystem.info(self._full(name))["ETag"]}

    def _write_if(self, condition: dict[str, str], name: str, data: bytes) -> None:
        try:
            self._filesystem.pipe_file(self._full(name), data, **condition)
        except OSError as error:
            # The next try goes without.
            self._conditional = self._conditional and error.errno != errno.ENOSYS
            raise

    def upload(self, path: Path, name: str) -> None:
        """Write a local file as an object, whole or not at all.

        Raises:
            FileNotFoundError: there is no such file.
        """
        # First: a missing file says nothing of the bucket.
        path.stat()
        self._in_bucket("write", name, lambda: self._filesystem.put_file(str(path), self._full(name)))

    def download(self, name: str, path: Path) -> None:
        """Copy an object into a local file.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: this machine's disk is full, too.
        """
        try:
            self._call("read", name, lambda: self._filesystem.get_file(self._full(name), str(path)))
        except OSError as error:
            if error.errno in local_files.FULL and (full := local_files.storage_error(error, str(path))):
                raise full from error
            raise

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the objects below ``prefix`` with their bytes, in the order of their names."""
        found = self._in_bucket(
            "list", prefix, lambda: self._filesystem.find(self._full(prefix), withdirs=False, detail=True)
        )
        start = len(self._root) + 1
        return {name[start:]: int(entry["size"]) for name, entry in sorted(found.items())}

    def delete(self, name: str) -> None:
        """Delete an object if it is there."""
        try:
            self._call("delete", name, lambda: self._filesystem.rm_file(self._full(name)))
        except FileNotFoundError:
            return

    def copy(self, name: str, target: str) -> None:
        """Copy an object inside the store."""
        self._in_bucket("copy", name, lambda: self._filesystem.cp_file(self._full(name), self._full(target)))

    def _full(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _in_bucket(self, what: str, name: str, call: Callable[[], T]) -> T:
        """Make a call that, copies aside, misses nothing but the bucket."""
        try:
            return self._call(what, name, call)
        except FileNotFoundError as error:
            raise StorageError(
                f"{self.url}/{name}: cannot {what}: {_words(error)}. Create the bucket if it is not there, or set "
                "`root` to one that is; then run the same command again"
            ) from error

    def _call(self, what: str, name: str, call: Callable[[], T]) -> T:
        wait = FIRST_WAIT_SECONDS
        for attempt in range(1, TRIES + 1):
            try:
                return call()
            except PermissionError as error:
                raise StorageError(f"{self.url}/{name}: cannot {what}: access denied: {_words(error)}") from error
            except _OURS:
                raise
            except Exception as error:  # drivers raise their libraries' own classes
                if isinstance(error, OSError) and error.errno in local_files.FULL:
                    # No further try makes room on this machine.
                    raise
                if attempt == TRIES:
                    raise StorageError(
                        f"{self.url}/{name}: cannot {what} after {TRIES} tries: {_words(error)}. Once the store is "
                        "back, the same command continues"
                    ) from error
                _logger.warning("%s/%s: %s failed (try %d of %d): %s", self.url, name, what, attempt, TRIES, error)
                time.sleep(wait)
                wait *= 2
        raise AssertionError("the loop returns or raises")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
