"""Files of a run in an object store, held against their manifests."""

import errno
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import StorageError
from schemas.manifest import FileRecord
from schemas.object_store import ObjectStore
from schemas.run_store import RunStore
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.audit.stored_files import StoredFiles
from tasks.graph import PROMPTS
from tests.run_fixtures import finish_stage, make_config, prompts_table


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """A run in an object store, on the machine that made it."""
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    store = RunStore.create(make_config(tmp_path).model_copy(update={"root": f"memory:/{tmp_path}"}))
    finish_stage(store, PROMPTS, PROMPTS_TABLE, [prompts_table({"a": "train"})])
    return store


def damage(store: RunStore) -> str | None:
    (record,) = store.finished(PROMPTS).outputs
    files = StoredFiles(store)
    return files.damage(record, files.sizes())


def test_the_working_copy_stays_while_objects_are_verified(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, download = store.part(PROMPTS, 0), ObjectStore.download
    before = copy.stat()
    there: list[bool] = []

    def watching(*arguments: Any) -> None:
        there.append(copy.is_file())
        download(*arguments)

    monkeypatch.setattr(ObjectStore, "download", watching)
    assert damage(store) is None
    assert there == [True]
    assert copy.stat().st_ino == before.st_ino


def test_what_lies_in_the_store_is_hashed_and_not_the_working_copy(store: RunStore) -> None:
    copy = store.part(PROMPTS, 0)
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    assert store.objects is not None
    store.objects.write(store.relative(copy), bytes(data))
    assert damage(store) == "its bytes are not those the manifest recorded (sha256)"


def test_a_file_that_is_not_here_comes_to_stay(store: RunStore) -> None:
    copy = store.part(PROMPTS, 0)
    data = copy.read_bytes()
    copy.unlink()
    assert damage(RunStore(store.url)) is None
    assert copy.read_bytes() == data


def test_an_object_that_goes_meanwhile_is_missing(store: RunStore) -> None:
    record: FileRecord
    (record,) = store.finished(PROMPTS).outputs
    files = StoredFiles(store)
    sizes = files.sizes()
    assert store.objects is not None
    store.objects.delete(record.path)
    assert files.damage(record, sizes) == "missing"


def test_objects_are_downloaded_beside_the_working_copy_and_leave_nothing(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, places = ObjectStore.download, []

    def watching(objects: ObjectStore, name: str, path: Path) -> None:
        places.append(path)
        download(objects, name, path)

    monkeypatch.setattr(ObjectStore, "download", watching)
    before = sorted(store.folder.rglob("*"))
    assert damage(store) is None
    assert [store.folder in path.parents for path in places] == [True]
    assert sorted(store.folder.rglob("*")) == before


@pytest.mark.parametrize("is_here", [True, False])
def test_another_process_that_clears_up_on_this_machine_makes_nothing_missing(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    if not is_here:
        store.part(PROMPTS, 0).unlink()
    download, other = ObjectStore.download, RunStore(store.url)

    def meanwhile(objects: ObjectStore, name: str, path: Path) -> None:
        download(objects, name, path)
        # As `npd gc` does.
        with other.lock.held():
            other.drop_superseded()

    monkeypatch.setattr(ObjectStore, "download", meanwhile)
    assert damage(RunStore(store.url)) is None


@pytest.mark.parametrize("is_here", [True, False])
def test_a_full_disk_is_told_of_and_breaks_no_file(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    if not is_here:
        store.part(PROMPTS, 0).unlink()
    reader = RunStore(store.url)
    assert reader.objects is not None
    tries = []

    def full(name: str, path: str) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reader.objects._filesystem, "get_file", full)
    with pytest.raises(StorageError, match=rf"{store.folder}.*no space is left on the disk"):
        damage(reader)
    assert len(tries) == 1
