"""A Prefect server that goes away in mid-run, and comes back or does not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from schemas.config import load_config
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.graph import loop
from tasks.stage import execute
from tests.flows.conftest import CONFIGS, write_smoke_config
from tests.flows.prefect_server import Server

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("outage")]


def start_run(server: Server, config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=CONFIGS.parent,
        env=server.environment | {"PYTHONUNBUFFERED": "1"},
    )


def read_until(process: subprocess.Popen[str], words: str) -> list[str]:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return seen
    raise AssertionError("".join(seen))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        yield server
    finally:
        server.stop()


def test_a_server_that_comes_back_sees_the_run_end(
    server: Server, tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    process = start_run(server, write_smoke_config(tmp_path, teacher_dir, student_dir, rounds=1, warmup=None))
    read_until(process, "round 0 · train: starting")
    server.die()
    # A whole stage without a server.
    read_until(process, "round 0 · export: done")
    server.begin()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert RunStore(tmp_path / "runs" / "smoke").finished(StageKey("evaluate", 0))
    assert server.flow_run("npd-round")["state_type"] == "COMPLETED"


@pytest.mark.usefixtures("prefect_api")
def test_a_server_that_stays_away_costs_no_work(
    server: Server, tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    config = write_smoke_config(tmp_path, teacher_dir, student_dir, rounds=1, warmup=None)
    settings = load_config(config)
    store = RunStore.create(settings)
    for key in loop(settings)[:-1]:
        execute(store, settings, key)
    # No second try instead of five: the test need not wait for all of Prefect's patience.
    server.environment["PREFECT_CLIENT_MAX_RETRIES"] = "0"
    process = start_run(server, config)
    read_until(process, "round 0 · evaluate: starting")
    server.die()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "Prefect's server" in output
    assert "Traceback" not in output
    # Every stage is done: with a server again there is nothing left to do.
    assert store.finished(StageKey("evaluate", 0))
    again = CliRunner().invoke(app, ["run", str(config)])
    assert again.exit_code == 0, again.output
    assert "round 0 · evaluate: up to date" in again.output
