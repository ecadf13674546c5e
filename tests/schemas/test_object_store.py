import errno
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import schemas.object_store
from schemas.errors import ConfigError, StorageError
from schemas.object_store import TRIES, ObjectStore, cache_folder, check_place, is_url
from tests.faults.object_server import ObjectServer


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server, server.reachable():
        yield server


def test_objects_are_written_listed_copied_and_deleted(server: ObjectServer, tmp_path: Path) -> None:
    objects = ObjectStore(f"{server.bucket}/a run")
    objects.write("round=000/x.json", b"123")
    (tmp_path / "file").write_bytes(b"from a file")
    objects.upload(tmp_path / "file", "round=000/stage=score/part-00000.parquet")
    assert objects.read("round=000/x.json") == b"123"
    assert objects.read("nothing") is None
    assert objects.sizes("round=000/stage=score") == {"round=000/stage=score/part-00000.parquet": 11}
    # A name is no prefix of its neighbours.
    assert objects.sizes("round=00") == {}
    objects.copy("round=000/x.json", "elsewhere/x.json")
    objects.delete("round=000/x.json")
    objects.delete("round=000/x.json")
    assert list(objects.sizes()) == ["elsewhere/x.json", "round=000/stage=score/part-00000.parquet"]
    objects.download("elsewhere/x.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"123"
    with pytest.raises(FileNotFoundError):
        objects.download("nothing", tmp_path / "none")


def test_a_bucket_that_is_not_there_is_named_with_what_to_do(server: ObjectServer, tmp_path: Path) -> None:
    objects = ObjectStore("s3://no-such-bucket/runs/x")
    (tmp_path / "file").write_bytes(b"1")
    calls: list[Callable[[], object]] = [
        lambda: objects.write("a", b"1"),
        lambda: objects.create("a", b"1"),
        lambda: objects.upload(tmp_path / "file", "a"),
        lambda: objects.copy("a", "b"),
        lambda: objects.sizes(),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"s3://no-such-bucket/runs/x.*does not exist.*Create the bucket"):
            call()
    # What may be missing elsewhere is missing here.
    assert objects.read("a") is None
    objects.delete("a")
    with pytest.raises(FileNotFoundError):
        objects.download("a", tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        objects.upload(tmp_path / "nowhere", "a")


def test_only_one_of_many_creates_an_object(server: ObjectServer) -> None:
    objects = ObjectStore(f"{server.bucket}/race")
    won: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: won.append(n) if objects.create("lock", str(n).encode()) else None)
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert objects.read("lock") == str(won[0]).encode()


@pytest.fixture(params=["s3", "memory"])
def either_store(request: pytest.FixtureRequest, server: ObjectServer) -> ObjectStore:
    return ObjectStore(f"{server.bucket}/replaced" if request.param == "s3" else "memory://replaced")


def test_an_object_is_replaced_if_it_is_as_it_must_be(either_store: ObjectStore) -> None:
    either_store.delete("lock")
    assert not either_store.replace("lock", lambda found: True, b"new")
    either_store.write("lock", b"old")
    assert not either_store.replace("lock", lambda found: found == b"older", b"new")
    assert either_store.read("lock") == b"old"
    assert either_store.replace("lock", lambda found: found == b"old", b"new")
    assert either_store.read("lock") == b"new"
    # As when the answer to the first call was lost.
    assert either_store.replace("lock", lambda found: found == b"old", b"new")


@pytest.mark.usefixtures("impatient")
def test_nobody_comes_in_between_on_s3(server: ObjectServer) -> None:
    mine, other = (ObjectStore(f"{server.bucket}/between") for _ in range(2))
    mine.write("lock", b"old")

    def meanwhile(found: bytes) -> bool:
        if found == b"old":
            assert other.replace("lock", lambda seen: seen == found, b"other's")
        return found == b"old"

    assert not mine.replace("lock", meanwhile, b"mine")
    assert other.read("lock") == b"other's"


@pytest.mark.usefixtures("impatient")
def test_an_s3_server_without_conditional_writes_is_written_to_without(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = ObjectStore(f"{server.bucket}/plain")
    objects.write("lock", b"old")
    write, refused = objects._filesystem.pipe_file, []

    def plain(path: str, data: bytes, **conditions: str) -> None:
        if conditions:
            refused.append(conditions)
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        write(path, data)

    monkeypatch.setattr(objects._filesystem, "pipe_file", plain)
    for new in (b"new", b"newer"):
        assert objects.replace("lock", lambda found: True, new)
        assert objects.read("lock") == new
    assert len(refused) == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas.object_store, "FIRST_WAIT_SECONDS", 0.01)


class Broken:
    """A file system whose calls fail so often."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error = failures, error

    def cat_file(self, name: str) -> bytes:
        self.failures -= 1
        if self.failures >= 0:
            raise self.error
        return b"back"


@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_is_asked_again_with_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    objects = ObjectStore("memory://runs/x")
    objects._filesystem = Broken(TRIES - 1, ConnectionResetError("reset"))
    with caplog.at_level(logging.WARNING):
        assert objects.read("a") == b"back"
    assert [record.getMessage() for record in caplog.records] == [
        f"memory://runs/x/a: read failed (try {n} of {TRIES}): reset" for n in range(1, TRIES)
    ]


@pytest.mark.usefixtures("impatient")
def test_a_store_that_stays_away_is_an_error_that_says_so() -> None:
    objects = ObjectStore("memory://runs/x")
    objects._filesystem = Broken(TRIES, TimeoutError("late"))
    with pytest.raises(StorageError, match=rf"memory://runs/x/a: cannot read after {TRIES} tries: TimeoutError: late"):
        objects.read("a")


def test_a_refusal_is_not_tried_again() -> None:
    objects = ObjectStore("memory://runs/x")
    objects._filesystem = broken = Broken(1, PermissionError("Access Denied"))
    with pytest.raises(StorageError, match="access denied"):
        objects.read("a")
    assert broken.failures == 0


@pytest.mark.parametrize("place", ["s3://key:secret@bucket/x", "s3://bucket/x?token=secret", "gs://bucket/x#secret"])
def test_credentials_in_a_place_are_refused_unread(place: str) -> None:
    with pytest.raises(ConfigError, match="environment") as refused:
        check_place(place)
    assert "secret@" not in str(refused.value)
    assert "token=" not in str(refused.value)
    assert "#secret" not in str(refused.value)


def test_places_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert is_url("s3://bucket/runs")
    assert not is_url("runs")
    assert not is_url("file:///runs")
    monkeypatch.setenv("NPD_CACHE", str(tmp_path))
    assert cache_folder("s3://a/x").parent == tmp_path
    assert cache_folder("s3://a/x") != cache_folder("s3://b/x")
    assert cache_folder("s3://a/x/") == cache_folder("s3://a/x")
