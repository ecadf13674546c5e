"""The deployments against a real Prefect server and worker, as README tells users to do it."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import yaml
from docker.types import HostConfig
from prefect.client.orchestration import PrefectClient
from prefect.settings.models.flows import FlowsSettings
from prefect_docker.worker import DockerWorkerJobConfiguration

from flows.stage_tasks import TASKS
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tests.flows.conftest import FinishedRun, write_smoke_config
from tests.flows.prefect_server import CHECKOUT, Server
from tests.tasks.rl_runs import checked_prompts, rl_values, source_store

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("finished_run")]


def documented_commands() -> list[list[str]]:
    """Return the commands by which prefect.yaml says to make work pools, the automation and deployments."""
    lines = (CHECKOUT / "prefect.yaml").read_text(encoding="utf-8").splitlines()
    told = [line.removeprefix("#   prefect ").split() for line in lines if line.startswith("#   prefect ")]
    return [command for command in told if command[0] in ("work-pool", "automation", "deploy")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.call_each(documented_commands())
        server.start("worker", "start", "--pool", "local", "--limit", "1")
        yield server
    finally:
        server.stop()


def test_every_deployment_has_its_pool_and_no_two_runs_share_a_gpu(server: Server) -> None:
    pools = {pool["name"]: pool for pool in server.find("work_pools")}
    assert {name: pool["type"] for name, pool in pools.items()} == {
        "local": "process",
        "gpu": "docker",
        "ray": "process",
    }
    assert (pools["gpu"]["concurrency_limit"], pools["ray"]["concurrency_limit"]) == (1, 1)
    flows = {flow["id"]: flow["name"] for flow in server.find("flows")}
    found = {(flows[each["flow_id"]], each["name"]): each for each in server.find("deployments")}
    everywhere = {(f"npd-{what}", where) for what in ("round", "stage", "rl", "compare") for where in ("local", "gpu")}
    assert set(found) == everywhere | {("npd-round", "ray"), ("npd-stage", "ray")}
    assert all(each["work_pool_name"] == where for (_, where), each in found.items())
    for (_, where), each in found.items():
        # A flow run under such a limit is ended by a server that was started anew: it has forgotten who holds it.
        assert each["global_concurrency_limit"] is None
        (step,) = each["pull_steps"]
        folder = step["prefect.deployments.steps.set_working_directory"]["directory"]
        assert folder == (str(CHECKOUT) if where == "local" else "/opt/npd")
    assert found["npd-round", "ray"]["parameters"]["overrides"] == ["ray.address=auto", "ray.actors=4"]


def test_forms_offer_what_there_is_and_the_server_refuses_the_rest(server: Server) -> None:
    flows = {flow["id"]: flow["name"] for flow in server.find("flows")}
    forms = {flows[each["flow_id"]]: each for each in server.find("deployments") if each["name"] == "local"}
    stage = forms["npd-stage"]["parameter_openapi_schema"]["properties"]
    assert stage["stage"]["enum"] == [*TASKS, "rl"]
    assert "Which stage" in stage["stage"]["description"]
    assert all(each["enforce_parameter_schema"] for each in forms.values())
    for flow, parameters in (
        ("npd-stage", {"run": "runs/x", "stage": "scoring"}),
        ("npd-stage", {"run": "runs/x", "stage": "score", "round": -2}),
        ("npd-compare", {"config": "x.yaml", "workers": 0}),
    ):
        deployment = forms[flow]["id"]
        url = f"{server.api}/deployments/{deployment}/create_flow_run"
        refused = httpx.post(url, json={"parameters": parameters}, timeout=60)
        assert refused.status_code == 409, refused.text
        assert "Validation failed" in refused.text


def test_a_flow_run_that_nobody_hears_of_any_more_is_marked_as_crashed(server: Server) -> None:
    (made,) = server.find("automations")
    assert made["enabled"]
    told = yaml.safe_load((CHECKOUT / "deploy" / "dead-runs.yaml").read_text(encoding="utf-8"))
    beat = FlowsSettings().heartbeat_frequency
    assert beat is not None
    assert told["trigger"]["within"] >= 5 * beat
    told["trigger"]["within"] = 10
    impatient = server.folder / "dead-runs.yaml"
    impatient.write_text(yaml.safe_dump(told | {"name": "impatient"}), encoding="utf-8")
    server.call("automation", "create", "--from-file", str(impatient))

    flow = server.send("flows/", {"name": "silent"})["id"]
    run = server.send("flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
    }
    server.send("events", [event])
    deadline = time.monotonic() + 120
    while server.flow_run("silent")["state_type"] == "RUNNING" and time.monotonic() < deadline:
        time.sleep(1)
    # Flow runs of other tests live too, and tell so every three minutes.
    server.call("automation", "delete", "impatient")
    state = server.flow_run("silent")["state"]
    assert state["type"] == "CRASHED"
    assert "goes on where it stopped" in state["message"]


def test_a_gpu_deployment_asks_docker_for_the_image_and_all_gpus(server: Server) -> None:
    """What Prefect's worker would give to Docker, which is not here to run it."""
    (pool,) = (pool for pool in server.find("work_pools") if pool["name"] == "gpu")
    (gpu, *_) = (each for each in server.find("deployments") if each["name"] == "gpu")

    async def configured() -> DockerWorkerJobConfiguration:
        async with PrefectClient(server.api) as client:
            return await DockerWorkerJobConfiguration.from_template_and_values(
                pool["base_job_template"], gpu["job_variables"], client=client
            )

    job = asyncio.run(configured())
    assert job.image == "near-policy-distillation:gpu"
    assert job.volumes == ["npd-runs:/opt/npd/runs", "npd-cache:/home/npd/.cache"]
    host = HostConfig(version="1.50", **(job.container_create_kwargs or {}))
    assert host["ShmSize"] == 16 * 2**30
    assert host["Init"] is True
    (devices,) = host["DeviceRequests"]
    assert (devices["Driver"], devices["Count"], devices["Capabilities"]) == ("nvidia", -1, [["gpu"]])


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
        "baseline",
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
    for name in ("delta-ifd-0", "loss", "time", "metric-kl-teacher-student"):
        figure = artifacts[f"smoke-figure-{name}"]
        assert figure["type"] == "image"
        assert figure["data"].startswith("data:image/svg+xml;base64,")
    assert "| Δ-IFD |" in artifacts["smoke-round-0-figures"]["data"]
    kept = [row for row in json.loads(artifacts["smoke-round-0-table"]["data"]) if row["what"] == "kept"]
    assert kept[0]["value"] > 0


def test_npd_stage_runs_as_a_deployment(server: Server, finished_run: FinishedRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run.folder, tmp_path / "copy"))
    before = RunStore(folder).finished(StageKey("evaluate", 0))
    server.run("npd-stage/local", run=str(folder), stage="evaluate", round=0)
    flow_run = server.flow_run("npd-stage")
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["name"] == "copy · round 0 · evaluate"
    assert [run["name"] for run in server.task_runs(flow_run)] == ["round 0 · evaluate"]
    after = RunStore(folder).finished(StageKey("evaluate", 0))
    assert after.started > before.started
    assert after.outputs == before.outputs


def test_npd_rl_runs_as_a_deployment(server: Server, tmp_path: Path, student_dir: Path) -> None:
    source = source_store(tmp_path / "source", student_dir, checked_prompts())
    config = tmp_path / "rl.yaml"
    config.write_text(yaml.safe_dump(rl_values(tmp_path / "runs", source.folder)), encoding="utf-8")
    server.run("npd-rl/local", config=str(config), overrides=["grpo.steps=2"])
    flow_run = server.flow_run("npd-rl")
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["name"] == "rl"
    assert [run["name"] for run in server.task_runs(flow_run)] == ["prompts", "baseline", "rl", "evaluate"]
    artifacts = {artifact["key"]: artifact for artifact in server.find("artifacts")}
    assert artifacts["rl-rl-progress"]["description"].startswith("rl: done in")
    rows = json.loads(artifacts["rl-rl-table"]["data"])
    assert [row["what"] for row in rows if "accuracy" in row["what"]] == ["before: accuracy", "after: accuracy"]
    assert "Held-out prompts" in artifacts["rl-rl-summary"]["data"]
    assert (tmp_path / "runs" / "rl" / "rl" / "model" / "model.safetensors").is_file()
