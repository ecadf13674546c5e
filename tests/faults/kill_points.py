"""Kills this process at chosen points of writing a run: SIGKILL, as a machine that loses its power would.

A point is a file, folder or object, and how far its writing has come. `arm` replaces the few functions through which
everything in a run is written, so that code under test runs unchanged up to the very bytes.
"""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from schemas import local_files
from schemas.object_store import ObjectStore


class Point(NamedTuple):
    """One point.

    Args:
        name: What is written, by its final name.
        phase: How far: `before` anything of it is written, `half` of its bytes are, it is `written` but has no name
            yet, `named`; for a rename or a removal `before`, `half` (removals), `named`.
    """

    name: str
    phase: str


Reached = Callable[[Point], bool]
"""Told of every point that is reached; answers whether to die there."""


def die() -> None:
    """End this process as nothing can catch."""
    os.kill(os.getpid(), signal.SIGKILL)


def halve(path: Path) -> None:
    """Leave of a file the first half of its bytes; of a folder half of its files, the last of them cut in two."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kept = (len(files) + 1) // 2
    for file in files[kept:]:
        file.unlink()
    if files:
        os.truncate(files[kept - 1], files[kept - 1].stat().st_size // 2)


def arm_local_files(folder: Path, reached: Reached) -> None:
    """Report every point of writing below ``folder``, and die where ``reached`` says so."""
    publishers = {name: getattr(local_files, name) for name in ("publish_file", "publish_folder")}
    temporary, move, remove = local_files._temporary, local_files.move, local_files.remove

    def at(path: Path, phase: str) -> bool:
        # Names of temporary files are random; one a folder is enough.
        name = re.sub(r"\.tmp-\w+", ".tmp-*", path.relative_to(folder).as_posix())
        return reached(Point(name, phase))

    def temporary_then(path: Path) -> Path:
        if at(path, "before"):
            die()
        return temporary(path)

    def publish(name: str) -> Callable[[Path, Path], None]:
        def publish_then(written: Path, path: Path) -> None:
            if at(path, "half"):
                halve(written)
                die()
            if at(path, "written"):
                die()
            publishers[name](written, path)
            if at(path, "named"):
                die()

        return publish_then

    def move_then(path: Path, target: Path) -> None:
        if at(target, "before"):
            die()
        move(path, target)
        if at(target, "named"):
            die()

    def remove_then(path: Path) -> None:
        if path.exists():
            if at(path, "before its removal"):
                die()
            if path.is_dir() and at(path, "half of its removal"):
                halve(path)
                die()
        remove(path)

    replacements: dict[str, Callable[..., Any]] = {
        "_temporary": temporary_then,
        "move": move_then,
        "remove": remove_then,
        **{name: publish(name) for name in publishers},
    }
    for name, replacement in replacements.items():
        setattr(local_files, name, replacement)


def arm_object_store(reached: Reached) -> None:
    """Report every point of writing to an object store, and die where ``reached`` says so."""
    upload, write, copy, delete = ObjectStore.upload, ObjectStore.write, ObjectStore.copy, ObjectStore.delete

    def begin_multipart_upload(store: ObjectStore, name: str, data: bytes) -> None:
        bucket, _, key = store._full(name).partition("/")
        filesystem = store._filesystem
        begun = filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        filesystem.call_s3(
            "upload_part", Bucket=bucket, Key=key, PartNumber=1, UploadId=begun["UploadId"], Body=data[: len(data) // 2]
        )

    def upload_then(store: ObjectStore, path: Path, name: str) -> None:
        if reached(Point(name, "before")):
            die()
        if reached(Point(name, "half")):
            begin_multipart_upload(store, name, path.read_bytes())
            die()
        upload(store, path, name)
        if reached(Point(name, "named")):
            die()

    def write_then(store: ObjectStore, name: str, data: bytes) -> None:
        if reached(Point(name, "before")):
            die()
        write(store, name, data)
        if reached(Point(name, "named")):
            die()

    def copy_then(store: ObjectStore, name: str, target: str) -> None:
        if reached(Point(target, "before")):
            die()
        copy(store, name, target)
        if reached(Point(target, "named")):
            die()

    def delete_then(store: ObjectStore, name: str) -> None:
        if reached(Point(name, "before its removal")):
            die()
        delete(store, name)
        if reached(Point(name, "removed")):
            die()

    replacements: dict[str, Callable[..., None]] = {
        "upload": upload_then,
        "write": write_then,
        "copy": copy_then,
        "delete": delete_then,
    }
    for name, replacement in replacements.items():
        setattr(ObjectStore, name, replacement)
