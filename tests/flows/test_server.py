"""Both deployments against a real Prefect server and worker, as README tells users to do it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tests.flows.conftest import CONFIGS, FinishedRun, write_smoke_config

pytestmark = pytest.mark.server

PREFECT = [sys.executable, "-m", "prefect"]
CHECKOUT = CONFIGS.parent


class Server:
    """A Prefect server on a free port with both flows deployed and a worker."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        self.api = f"http://127.0.0.1:{port}/api"
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": self.api,
            "PREFECT_LOGGING_LEVEL": "INFO",
            "NO_COLOR": "1",
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self.start("server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui")
        deadline = time.monotonic() + 180
        while not self._healthy():
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.5)

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def start(self, *arguments: str) -> None:
        """Start a command that stays until ``stop``."""
        log = (self.folder / f"{arguments[0]}.log").open("wb")
        self._processes.append(
            subprocess.Popen([*PREFECT, *arguments], stdout=log, stderr=log, cwd=CHECKOUT, env=self.environment)
        )

    def stop(self) -> None:
        """End what ``start`` started, the newest first."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, *arguments: str) -> str:
        """Run a command that ends, and return what it printed."""
        done = subprocess.run(
            [*PREFECT, *arguments], capture_output=True, text=True, cwd=CHECKOUT, env=self.environment, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr + (self.folder / "worker.log").read_text()
        return done.stdout

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.call("work-pool", "create", "local", "--type", "process")
        server.call("deploy", "--all", "--no-prompt")
        server.start("worker", "start", "--pool", "local", "--type", "process")
        yield server
    finally:
        server.stop()


def test_npd_round_runs_as_a_deployment(server: Server, tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    config = write_smoke_config(tmp_path, teacher_dir, student_dir)
    overrides = json.dumps(["rounds=1", "train.epochs_per_round=1"])
    server.call(
        "deployment", "run", "npd-round/local", "-p", f"config={config}", "-p", f"overrides={overrides}", "--watch"
    )
    flow_run = server.flow_run("npd-round")
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["name"] == "smoke"
    assert flow_run["parameters"]["config"] == str(config)
    assert RunStore(tmp_path / "runs" / "smoke").config.train.epochs_per_round == 1

    task_runs = server.task_runs(flow_run)
    assert [run["name"] for run in task_runs] == [
        "prompts",
        "models",
        "reference",
        *(f"warm-up · {stage}" for stage in ("pack", "train", "export", "evaluate")),
        *(f"round 0 · {stage}" for stage in ("generate", "score", "filter", "pack", "train", "export", "evaluate")),
    ]
    assert {run["state_type"] for run in task_runs} == {"COMPLETED"}
    assert "npd" in flow_run["tags"]

    artifacts = {artifact["key"]: artifact for artifact in server.find("artifacts")}
    score = artifacts["smoke-round-0-score-progress"]
    assert score["type"] == "progress"
    assert score["data"] == 100.0
    assert score["description"].startswith("round 0 · score: done in")
    for name in ("warm-up", "round-0"):
        rows = json.loads(artifacts[f"smoke-{name}-table"]["data"])
        assert any(row["what"] == "kl_teacher_student" and row["value"] > 0 for row in rows)
        assert "KL(teacher‖student)" in artifacts[f"smoke-{name}-summary"]["data"]
    kept = [row for row in json.loads(artifacts["smoke-round-0-table"]["data"]) if row["what"] == "kept"]
    assert kept[0]["value"] > 0


def test_npd_stage_runs_as_a_deployment(server: Server, finished_run: FinishedRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run.folder, tmp_path / "copy"))
    before = RunStore(folder).finished(StageKey("evaluate", 0))
    parameters = [f"run={folder}", "stage=evaluate", "round=0"]
    server.call("deployment", "run", "npd-stage/local", *(part for p in parameters for part in ("-p", p)), "--watch")
    flow_run = server.flow_run("npd-stage")
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["name"] == "copy · round 0 · evaluate"
    assert [run["name"] for run in server.task_runs(flow_run)] == ["round 0 · evaluate"]
    after = RunStore(folder).finished(StageKey("evaluate", 0))
    assert after.started > before.started
    assert after.outputs == before.outputs
