import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.process import run_in_process
from flows.stage_process import ForkServer, fork_server
from schemas.errors import StageError
from tasks.graph import PROMPTS
from tests.flows.test_process import child_of, endless_config, is_running, prompts_config, wait_until_gone
from tests.run_fixtures import make_store


def server_pid(server: ForkServer) -> int:
    return server._process.pid


def test_one_server_starts_every_stage_and_another_follows_if_it_dies(tmp_path: Path) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    run_in_process(store, config, PROMPTS)
    first = fork_server()
    run_in_process(store, config, PROMPTS)
    assert fork_server() is first
    os.kill(server_pid(first), signal.SIGKILL)
    assert wait_until_gone(server_pid(first))
    assert run_in_process(store, config, PROMPTS) == store.manifest(PROMPTS)
    assert fork_server() is not first


def test_a_stage_outlives_its_server_and_still_ends_with_its_parents_wish(tmp_path: Path) -> None:
    """The server is killed in mid-stage: the stage is not lost without a word, and can still be ended."""
    config = endless_config(tmp_path)
    store = make_store(tmp_path, config)
    server = fork_server()

    def kill_server_then_stop(done: int, total: int, unit: str) -> None:
        os.kill(server_pid(server), signal.SIGKILL)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(store, config, PROMPTS, kill_server_then_stop)
    assert wait_until_gone(server_pid(server))


def test_a_dead_server_is_an_error_not_a_hang(tmp_path: Path) -> None:
    server = ForkServer()
    os.kill(server_pid(server), signal.SIGKILL)
    assert wait_until_gone(server_pid(server))
    with (tmp_path / "log").open("wb") as log, pytest.raises(StageError, match="has died"):
        server.start(log.fileno(), log.fileno())


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'libtorch.so: not found' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with (tmp_path / "log").open("wb") as log, pytest.raises(StageError, match=r"It said: libtorch\.so: not found"):
        ForkServer().start(log.fileno(), log.fileno())


def test_modules_in_the_working_directory_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tasks", "flows", "schemas"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "log").open("wb") as log:
        reading, writing = os.pipe()
        server = ForkServer()
        process = server.start(writing, log.fileno())
        os.close(writing)
        process.end(0.0)
        os.close(reading)
    assert server.is_running


def test_the_server_ends_with_its_parent() -> None:
    server = ForkServer()
    pid = server_pid(server)
    server._channel.close()
    deadline = time.monotonic() + 60
    while server._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_the_first_check_of_a_table_imports_nothing_that_the_server_has_not() -> None:
    program = """
import sys
from tasks.fork_server import import_heavy
from schemas.tables import GENERATE
import_heavy()
before = set(sys.modules)
GENERATE.validate(GENERATE.columns.empty_table(), "here")
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_fork_of_a_server_that_has_used_a_gpu_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA does not survive a fork: it imports again. The module that the server imports lets torch say so."""
    (tmp_path / "gpu_at_work.py").write_text(
        "import torch\ntorch.cuda._initialized = True\ntorch.cuda._is_in_bad_fork = lambda: True\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    server = ForkServer(("gpu_at_work",))
    monkeypatch.setattr("flows.stage_process.fork_server", lambda: server)
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    commands: set[bytes] = set()

    def look(done: int, total: int, unit: str) -> None:
        commands.add(Path(f"/proc/{child_of(store)}/cmdline").read_bytes())

    assert run_in_process(store, config, PROMPTS, look) == store.manifest(PROMPTS)
    assert [command.split(b"\0")[-3] for command in commands] == [b"tasks.process"]
