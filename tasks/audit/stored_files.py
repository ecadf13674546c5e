"""Every file that lies in a run, by name: what the manifests are held against."""

from pathlib import Path

from schemas.local_files import scratch_folder, storage_errors
from schemas.manifest import FileRecord, hash_file
from schemas.mirror import FOLDER_MARK
from schemas.run_store import RunStore


class StoredFiles:
    """Names and bytes of a run's files, in a folder or an object store.

    Args:
        store: The run.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._objects = store.objects

    def sizes(self) -> dict[str, int]:
        """Return every file's size in bytes, by its name below the run."""
        if self._objects is not None:
            found = self._objects.sizes()
        else:
            paths = (path for path in self._store.folder.rglob("*") if path.is_symlink() or not path.is_dir())
            found = {self._store.relative(path): path.lstat().st_size for path in paths}
        # In a folder, too: it may have been copied from an object store.
        return {name: size for name, size in sorted(found.items()) if FOLDER_MARK not in name}

    def damage(self, record: FileRecord, sizes: dict[str, int]) -> str | None:
        """Return how a file differs from what a manifest recorded of it; None if it does not.

        An object of a store is downloaded anew, so that what is hashed is what lies there; not over the working copy,
        which a run on this machine may be reading.

        Raises:
            ArtifactError: a download has other bytes than recorded.
            StorageError: a download finds no place on this machine's disk, or the object store is out of reach.
        """
        path = self._store.folder / record.path
        if record.path not in sizes:
            return "missing"
        if self._store.folder.resolve() not in path.resolve().parents:
            return "leads out of the run's folder"
        if sizes[record.path] != record.bytes:
            return f"has {sizes[record.path]:,} bytes, the manifest recorded {record.bytes:,}"
        try:
            found = self._hash_to_stay(path) if self._objects is not None else self.hash(record.path)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return None if found == record.sha256 else "its bytes are not those the manifest recorded (sha256)"

    def read(self, name: str) -> bytes:
        """Return a small file's bytes.

        Raises:
            FileNotFoundError: it is not there.
            ArtifactError: it cannot be read.
        """
        data = self._store.read(name)
        if data is None:
            raise FileNotFoundError(f"{self._store.url}/{name}")
        return data

    def hash(self, name: str) -> str:
        """Return the sha256 of a file where the run lies.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: as ``damage``.
        """
        if self._objects is None:
            return hash_file(self._store.folder / name)
        # Beside the working copy: a model may be larger than the system's folder for temporary files.
        with storage_errors(str(self._store.folder)), scratch_folder(self._store.folder) as folder:
            self._objects.download(name, folder / "object")
            return hash_file(folder / "object")

    def _hash_to_stay(self, path: Path) -> str:
        """Return the sha256 of an object; tables are read next, so one that is not here yet may as well stay."""
        if path.is_file():
            return self.hash(self._store.relative(path))
        with storage_errors(str(self._store.folder)):
            return hash_file(self._store.fetch(path))
