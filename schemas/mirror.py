"""A local working copy of a run that lies in an object store."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from schemas import local_files
from schemas.errors import ArtifactError
from schemas.manifest import MANIFEST_NAME, FileRecord, hash_file
from schemas.object_store import ObjectStore
from schemas.stage_key import StageKey
from schemas.untrusted_text import readable

FOLDER_MARK = ".whole-"
"""An empty object beside a folder says that what lies in the folder is whole."""


class Mirror:
    """Keeps a local folder and an object store in step: files go up as they get their names, and down to be read.

    Args:
        objects: The run's objects.
        folder: The working copy.
    """

    def __init__(self, objects: ObjectStore, folder: Path) -> None:
        self.objects, self.folder = objects, folder
        self._known: dict[str, str] = {}

    def upload(self, path: Path) -> None:
        """Upload a file under its name."""
        self.objects.upload(path, self._name(path))

    def upload_table(self, path: Path) -> None:
        """Upload a file that is whole by itself, in a folder of its stage too: there it lies among others like it."""
        name = self._name(path)
        key, folder = StageKey.of_file(name), name.rpartition("/")[0]
        if key is not None and folder != key.folder:
            self.objects.write(self._mark(folder), b"")
        self.upload(path)

    def upload_folder(self, path: Path) -> None:
        """Upload a folder, and last the mark that it is whole."""
        self.objects.delete(self._mark(self._name(path)))
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            self.upload(file)
        self.objects.write(self._mark(self._name(path)), b"")

    def continue_file(self, path: Path) -> None:
        """Let a file that machines append to begin with what lies in the store; what only this one has follows."""
        there, here = self.objects.read(self._name(path)), path.read_bytes() if path.is_file() else b""
        if there is None or here.startswith(there):
            return
        pairs = zip(there, here, strict=False)
        shared = next((place for place, (one, other) in enumerate(pairs) if one != other), len(here))
        with local_files.writing_file(path) as temporary:
            temporary.write_bytes(there + here[shared:])

    def fetch(self, record: FileRecord) -> None:
        """Download what a manifest names, unless the working copy has it.

        Raises:
            ArtifactError: it is missing, or has other bytes.
        """
        path = self.folder / record.path
        if self._known.get(record.path) == record.sha256 and path.is_file():
            return
        if not (path.is_file() and path.stat().st_size == record.bytes and hash_file(path) == record.sha256):
            self.download(record.path, record)
        self._known[record.path] = record.sha256

    def fetch_all(self, name: str, records: Sequence[FileRecord]) -> None:
        """Download all that a manifest names of a file or folder; see ``fetch``. What else lies in the folder goes."""
        for record in records:
            self.fetch(record)
        named = {record.path for record in records}
        # Of an earlier result, and would be read with it: weights and adapters are found by their names.
        for path in (self.folder / name).rglob("*"):
            if path.is_file() and self._name(path) not in named and not path.name.startswith(local_files.TEMPORARY):
                local_files.remove(path)

    def download(self, name: str, record: FileRecord | None = None) -> None:
        """Download a file: as ``record`` says that it is, or whatever a manifest says of it.

        Raises:
            ArtifactError: it is missing, or has other bytes; or its name, which whoever may write there has chosen,
                leads out of the working copy.
        """
        if ".." in name.split("/"):
            raise ArtifactError(f"{self.objects.url}/{readable(name)}: no run writes such an object; delete it")
        try:
            with local_files.writing_file(self.folder / name) as temporary:
                self.objects.download(name, temporary)
                # Before it gets its name: others may read the file that has it.
                if record is not None and hash_file(temporary) != record.sha256:
                    raise ArtifactError(
                        f"{self.objects.url}/{name}: its bytes are not those the manifest recorded; run its stage again"
                    )
        except FileNotFoundError:
            raise ArtifactError(f"{self.objects.url}/{name}: missing; run its stage again") from None

    def restore(self, prefix: str) -> None:
        """Make the working copy of an unfinished stage hold its finished files and whole folders, and nothing else."""
        local_files.remove(self.folder / prefix)
        names = list(self.objects.sizes(prefix))
        whole = {self._folder_of(name) for name in names if FOLDER_MARK in name}
        for name in names:
            if FOLDER_MARK in name:
                continue
            inside = name.removeprefix(f"{prefix}/")
            # Without a mark, a file in a folder is one of those that were there when a process died.
            parents = ["/".join(name.split("/")[:depth]) for depth in range(1, name.count("/") + 1)]
            if "/" not in inside or any(parent in whole for parent in parents):
                self.download(name)

    def sizes_of(self, records: Iterable[FileRecord]) -> dict[str, int]:
        """Return the bytes of those objects that exist, by name; one listing per folder of a stage."""
        prefixes = {record.path.rsplit("/", 1)[0] for record in records}
        outer = {p for p in prefixes if not any(p.startswith(f"{other}/") for other in prefixes)}
        return {name: size for prefix in sorted(outer) for name, size in self.objects.sizes(prefix).items()}

    def move(self, name: str, target: str) -> None:
        """Move an object, or all below a name: copied, manifests deleted first, then the rest."""
        names = self._below(name)
        for each in names:
            self.objects.copy(each, target + each.removeprefix(name))
        if (mark := self._mark(name)) in self.objects.sizes(name.rsplit("/", 1)[0]):
            self.objects.write(self._mark(target), b"")
            self.objects.delete(mark)
        self._delete(names)

    def remove(self, name: str) -> None:
        """Delete an object, or all below a name; what says that it is whole goes first."""
        self.objects.delete(self._mark(name))
        self._delete(self._below(name))

    def _below(self, name: str) -> list[str]:
        return [found for found in self.objects.sizes(name) if found == name or found.startswith(f"{name}/")]

    def _delete(self, names: list[str]) -> None:
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST_NAME}")):
            self.objects.delete(name)
            self._known.pop(name, None)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @staticmethod
    def _mark(name: str) -> str:
        parent, _, last = name.rpartition("/")
        return f"{parent}/{FOLDER_MARK}{last}" if parent else f"{FOLDER_MARK}{last}"

    @staticmethod
    def _folder_of(mark: str) -> str:
        return mark.replace(FOLDER_MARK, "", 1)
