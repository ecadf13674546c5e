"""Files of a run wherever they lie, by their paths alone; `schemas.run_store` says what they mean."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from schemas import local_files
from schemas.errors import ArtifactError
from schemas.mirror import Mirror
from schemas.object_store import ObjectStore, cache_folder, check_place, is_url
from schemas.run_lock import RunLock


class RunFiles:
    """A local folder, or the prefix of an object store with a local working copy.

    Code works on local paths: those of the run itself, or of the working copy, whose files are uploaded as they get
    their names, and downloaded and hashed when they are first read.

    Args:
        place: A folder, or any URL that fsspec knows.

    Raises:
        ConfigError: the URL carries credentials, or nothing installed can open it.
    """

    def __init__(self, place: str | Path) -> None:
        text = str(place)
        check_place(text)
        self.objects: ObjectStore | None = None
        """The run itself, where it lies in an object store."""
        if is_url(text):
            self.url = text.rstrip("/")
            self.folder = cache_folder(self.url)
            self.objects = ObjectStore(self.url)
        else:
            self.folder = Path(unquote(urlsplit(text).path) if "://" in text else text).absolute()
            self.url = str(self.folder)
        self.mirror: Mirror | None = None if self.objects is None else Mirror(self.objects, self.folder)
        self.lock = RunLock(self.folder, self.url, self.objects)

    def relative(self, path: Path) -> str:
        """Return ``path`` as manifests name it."""
        return path.relative_to(self.folder).as_posix()

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write a file, whole or not at all."""
        with local_files.writing_file(path) as temporary:
            temporary.write_bytes(data)
        self.upload(path)

    def write_copy(self, path: Path, source: Path) -> None:
        """Write a copy of the file ``source``, whole or not at all; it is never in memory as a whole."""
        with local_files.writing_file(path) as temporary:
            shutil.copyfile(source, temporary)
        self.upload(path)

    @contextmanager
    def writing_folder(self, path: Path) -> Iterator[Path]:
        """Give an empty folder to fill; it gets its name when the context ends without an error."""
        with local_files.writing_folder(path) as temporary:
            yield temporary
        if self.mirror is not None:
            self.mirror.upload_folder(path)

    def move(self, path: Path, target: Path) -> None:
        """Rename a file or folder of the run. In an object store manifests go first, and complete nothing."""
        if self.mirror is not None:
            self.mirror.move(self.relative(path), self.relative(target))
            local_files.remove(target)
            if not path.exists():
                return
        local_files.move(path, target)

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the run if it is there."""
        if self.mirror is not None:
            self.mirror.remove(self.relative(path))
        local_files.remove(path)

    def upload(self, path: Path) -> None:
        """Put a local file under its name where the run lies in an object store; elsewhere it is there already."""
        if self.mirror is not None:
            self.mirror.upload(path)

    def continue_file(self, path: Path) -> None:
        """Before more is appended to a file: make it hold what other machines have appended and uploaded."""
        if self.mirror is not None:
            self.mirror.continue_file(path)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of one small file as it is now, None where there is none.

        Raises:
            ArtifactError: it is there and cannot be read.
        """
        if self.objects is not None:
            return self.objects.read(name)
        path = self.folder / name
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error}") from None
