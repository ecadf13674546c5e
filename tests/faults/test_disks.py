"""Disks that fill up, and places that cannot be written to."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from schemas.errors import StorageError
from schemas.local_files import storage_error, storage_errors
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.graph import loop
from tasks.stage import execute
from tests.run_fixtures import make_config
from tests.test_loop import run_loop, smoke_config, tables

ROOT = Path(__file__).parents[2]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse every byte beyond ``size`` of a file, as a full disk does: half-way through a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Else Python leaves half of what it compiles of a module that is first imported here, and cannot import it again.
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = writes_bytecode


def test_every_stage_survives_a_disk_that_takes_no_more(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    config = smoke_config(tmp_path / "full", teacher_dir, student_dir, "rounds=1")
    store = RunStore.create(config)
    for key in loop(config):
        with largest_file(600), pytest.raises(StorageError, match="larger than") as refused:
            execute(store, config, key)
        assert "continues" in str(refused.value)
        assert store.manifest(key) is None
        # A thread of torch or Arrow may hold its file a moment longer; the next start clears what a crash leaves.
        assert not [path for path in store.path(key).rglob(".tmp-*") if path.is_file()]
        execute(store, config, key)
    whole, _ = run_loop(smoke_config(tmp_path / "whole", teacher_dir, student_dir, "rounds=1"))
    assert tables(store) == tables(whole)


def test_a_model_that_does_not_fit_leaves_nothing_under_its_name(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    config = smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1")
    key = StageKey("export", WARMUP)
    store = RunStore.create(config)
    for earlier in loop(config)[: loop(config).index(key)]:
        execute(store, config, earlier)
    with largest_file(20_000), pytest.raises(StorageError):
        execute(store, config, key)
    assert [path.name for path in store.path(key).iterdir()] == [".partial.json"]


FULL = """
import sys
from pathlib import Path
from schemas import local_files
from schemas.local_files import storage_errors
with storage_errors("the run"), local_files.writing_file(Path(sys.argv[1]) / "part-00000.parquet") as temporary:
    temporary.write_bytes(bytes(4 << 20))
"""


def test_a_disk_without_space_is_named_and_nothing_stays(tmp_path: Path) -> None:
    # A disk of one megabyte in a namespace of its own; /dev/full where the system allows no such namespace.
    script = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} && {sys.executable} -c '{FULL}' {tmp_path}; ls -A {tmp_path}"
    if shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
        assert "StorageError" in done.stderr
        assert "no space is left on the disk" in done.stderr
        assert done.stdout == ""
    with pytest.raises(StorageError, match="no space is left"), storage_errors("runs/x"):
        Path("/dev/full").write_bytes(b"x")


GC = """
import sys
from pathlib import Path
from flows.cli import app
from schemas.run_store import RunStore
from tests.run_fixtures import make_config
folder = Path(sys.argv[1])
store = RunStore.create(make_config(folder))
with store.lock.held():
    pass
(folder / "test" / "superseded").mkdir()
(folder / "test" / "superseded" / "earlier").write_bytes(bytes(1 << 16))
try:
    (folder / "filler").write_bytes(bytes(1 << 20))
except OSError as error:
    print(error.strerror)
app(["gc", str(store.folder)])
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="the system allows no namespace in which to mount a small disk",
)
def test_what_frees_space_starts_on_a_disk_without_any(tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o size=256k tmpfs {tmp_path} && {sys.executable} -c '{GC}' {tmp_path}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout
    assert "1 files, 65.5 kB: deleted" in done.stdout


def test_a_lock_that_cannot_name_its_holder_for_another_reason_says_so(tmp_path: Path) -> None:
    store = RunStore.create(make_config(tmp_path))
    with largest_file(0), pytest.raises(StorageError, match=r"larger than.*continues"), store.lock.held():
        pass


@pytest.mark.parametrize("root", ["/sys", "/proc", __file__])
def test_a_place_that_is_read_only_is_refused_before_anything_runs(root: str) -> None:
    # The kernel's own file systems let nobody make folders, root included.
    store = RunStore.at(make_config(Path(root)))
    with pytest.raises(StorageError, match=rf"{root}/test: ") as refused, store.lock.held():
        pass
    assert refused.value.exit_code == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/part"), "runs/x/part: no space is left"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "the stage: the disk is read-only"),
        (PermissionError(errno.EACCES, "denied", "runs/x"), "runs/x: this user may not write there"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space is left"),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), "no space is left"),
    ],
)
def test_what_libraries_say_of_a_disk_is_understood(error: Exception, words: str) -> None:
    found = storage_error(error, "the stage")
    assert found is not None
    assert words in str(found)


@pytest.mark.parametrize("error", [ValueError("[errno 99]"), FileNotFoundError(errno.ENOENT, "gone"), KeyError("x")])
def test_other_errors_are_not_taken_for_a_full_disk(error: Exception) -> None:
    assert storage_error(error, "the stage") is None
