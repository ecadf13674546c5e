"""A real Prefect server, for tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.flows.conftest import CONFIGS

PREFECT = [sys.executable, "-m", "prefect"]
CHECKOUT = CONFIGS.parent
_CALL_EACH = """
import json, sys
from prefect.cli import app
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        app()
    except SystemExit as end:
        if end.code:
            raise
"""


class Server:
    """A Prefect server on a free port, and what else is started beside it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.folder = folder
        self.api = f"http://127.0.0.1:{self._port}/api"
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": self.api,
            "PREFECT_LOGGING_LEVEL": "INFO",
            # A worker asks for work every ten seconds by itself.
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "NO_COLOR": "1",
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self.begin()

    def begin(self) -> None:
        """Start the server, with what its database holds."""
        self.start("server", "start", "--host", "127.0.0.1", "--port", str(self._port), "--no-ui")
        deadline = time.monotonic() + 180
        while not self._healthy():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.5)

    def die(self) -> None:
        """End the server as a crash would; nothing else must have been started."""
        assert len(self._processes) == 1
        self.stop()

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def start(self, *arguments: str) -> None:
        """Start a command that stays until ``stop``."""
        log = (self.folder / f"{arguments[0]}.log").open("wb")
        self._processes.append(
            subprocess.Popen(
                [*PREFECT, *arguments],
                stdout=log,
                stderr=log,
                cwd=CHECKOUT,
                env=self.environment,
                start_new_session=True,
            )
        )

    def stop(self) -> None:
        """End what ``start`` started, the newest first, with all its processes: a worker asked kindly takes long."""
        while self._processes:
            process = self._processes.pop()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def call(self, *arguments: str) -> str:
        """Run a command that ends, and return what it printed."""
        done = subprocess.run(
            [*PREFECT, *arguments], capture_output=True, text=True, cwd=CHECKOUT, env=self.environment, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr + (self.folder / "worker.log").read_text()
        return done.stdout

    def call_each(self, commands: list[list[str]]) -> None:
        """Run commands that end, one after another in one process, which imports Prefect once."""
        done = subprocess.run(
            [sys.executable, "-c", _CALL_EACH, json.dumps(commands)],
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
            env=self.environment,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def send(self, where: str, values: Any) -> Any:
        """Give the server's API something, and return what it answers."""
        response = httpx.post(f"{self.api}/{where}", json=values, timeout=60)
        response.raise_for_status()
        return response.json() if response.content else None

    def run(self, deployment: str, **parameters: Any) -> None:
        """Let the worker run a deployment, and wait until it has."""
        with temporary_settings({PREFECT_API_URL: self.api}):
            run_deployment(deployment, parameters=parameters, poll_interval=1)

    def find(self, what: str, **filters: Any) -> list[dict[str, Any]]:
        """Return what the server's API finds."""
        response = httpx.post(f"{self.api}/{what}/filter", json=filters, timeout=60)
        response.raise_for_status()
        found: list[dict[str, Any]] = response.json()
        return found

    def flow_run(self, flow: str) -> dict[str, Any]:
        """Return the one run there is of a flow."""
        (run,) = self.find("flow_runs", flows={"name": {"any_": [flow]}})
        return run

    def task_runs(self, flow_run: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the task runs of a flow run in the order they started; the server learns of them a little later."""
        deadline = time.monotonic() + 60
        while True:
            runs = self.find("task_runs", task_runs={"flow_run_id": {"any_": [flow_run["id"]]}})
            if all(run["state_type"] == "COMPLETED" for run in runs) or time.monotonic() > deadline:
                return sorted(runs, key=lambda run: str(run["start_time"]))
            time.sleep(1)
