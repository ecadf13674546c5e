"""Temporary names: what a living process writes stays, what a dead one left goes."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from schemas.local_files import leftovers, remove_temporaries, scratch_folder, writing_file, writing_folder

Writing = Callable[[Path], AbstractContextManager[Path]]

WRITINGS = [
    pytest.param(lambda folder: writing_file(folder / "file"), id="file"),
    pytest.param(lambda folder: writing_folder(folder / "folder"), id="folder"),
    pytest.param(scratch_folder, id="scratch"),
]


@pytest.mark.parametrize("writing", WRITINGS)
def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path, writing: Writing) -> None:
    with writing(tmp_path / "below") as temporary:
        if temporary.is_file():
            temporary.write_bytes(b"half")
        remove_temporaries(tmp_path)
        assert temporary.exists()
        assert leftovers(tmp_path) == []
    assert not temporary.exists()


@pytest.mark.parametrize("name", ["writing_file", "writing_folder", "scratch_folder"])
def test_what_a_dead_process_left_goes(tmp_path: Path, name: str) -> None:
    code = (
        f"import os, sys; from pathlib import Path; from schemas.local_files import {name};"
        f"writing = {name}(Path(sys.argv[1])); writing.__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "name")], check=True, env=dict(os.environ))
    (left,) = leftovers(tmp_path)
    remove_temporaries(tmp_path)
    assert not left.exists()


def test_a_file_is_made_with_the_rights_that_the_user_gives_files(tmp_path: Path) -> None:
    with writing_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"whole")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_disk_that_flushes_no_folders_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SMB's and VirtualBox's shared folders; what a file's flush reports counts there too."""
    fsync = os.fsync
    refused = [stat.S_ISDIR]

    def shared_folder(descriptor: int) -> None:
        if any(is_kind(os.fstat(descriptor).st_mode) for is_kind in refused):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", shared_folder)
    with writing_folder(tmp_path / "folder") as temporary:
        (temporary / "below").mkdir()
    assert (tmp_path / "folder" / "below").is_dir()
    refused.append(stat.S_ISREG)
    with pytest.raises(OSError, match="Invalid argument"), writing_file(tmp_path / "file"):
        pass
