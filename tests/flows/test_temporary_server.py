"""Prefect's temporary server: it comes up, it goes with the process that started it, and it says why it cannot."""

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from flows.server import TemporaryServer
from schemas.errors import OrchestrationError
from tests.flows.conftest import CONFIGS

pytestmark = pytest.mark.server

AUTH = "test:planted"

_START = """
import os
from flows.server import start_temporary_server
from prefect.settings import PREFECT_API_URL
server = start_temporary_server()
server.wait(180)
assert PREFECT_API_URL.value() == server.api
print(server.api, os.environ["PREFECT_API_AUTH_STRING"], flush=True)
input()
"""


def answers(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def test_it_answers_its_process_alone_ends_with_it_and_tells_nobody(
    prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_SERVER_ANALYTICS_ENABLED", raising=False)
    command = [sys.executable, "-c", _START]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CONFIGS.parent
    ) as process:
        assert process.stdout is not None
        api, auth = process.stdout.readline().split()
        assert answers(api)
        assert httpx.post(f"{api}/flow_runs/filter", json={}).status_code == httpx.codes.UNAUTHORIZED
        settings = httpx.get(f"{api}/admin/settings", auth=httpx.BasicAuth(*auth.split(":"))).json()
        assert settings["server"]["analytics_enabled"] is False
        process.kill()
    deadline = time.monotonic() + 60
    while answers(api):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_several_come_up_at_once_where_there_is_no_database_yet(
    prefect_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    servers = [TemporaryServer(AUTH) for _ in range(3)]
    try:
        for server in servers:
            server.wait(180)
            assert answers(server.api)
    finally:
        for server in servers:
            server.stop()


def test_one_that_cannot_come_up_is_told(prefect_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/file/prefect.db")
    server = TemporaryServer(AUTH)
    try:
        with pytest.raises(OrchestrationError, match=r"ended as it came up \(exit code 3\).*prefect server start"):
            server.wait(180)
    finally:
        server.stop()
