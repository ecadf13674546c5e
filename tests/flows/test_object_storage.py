"""A run in an object store, through the command line, against a real S3 server."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.stage_process import ForkServer
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tests.faults.object_server import ObjectServer
from tests.flows.conftest import CONFIGS, write_smoke_config


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_a_whole_run_lives_in_a_bucket(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectServer() as server, server.reachable():
        monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
        place = f"{server.bucket}/runs/smoke"
        root = {"rounds": 1, "warmup": None, "root": f"{server.bucket}/runs"}
        config = write_smoke_config(tmp_path, teacher_dir, student_dir, **root)

        # Stages that this process starts must find the server: those of earlier tests know nothing of it.
        fresh: list[ForkServer] = []
        monkeypatch.setattr("flows.stage_process._servers", lambda owner: fresh)

        def npd(*arguments: str, code: int = 0) -> str:
            """Call a command in this process."""
            result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
            assert result.exit_code == code, result.output
            return result.output

        # The first time as users do: in a process of its own.
        command = [sys.executable, "-m", "flows.cli", "run", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, env=dict(os.environ))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{place}/report.html" in done.stdout
        first = RunStore(place).finished(StageKey("evaluate", 0))

        # Another machine: nothing of the run on its disk.
        shutil.rmtree(tmp_path / "cache")
        assert "round=000/stage=score" in npd("inspect", place)
        npd("verify", place)
        assert npd("report", place).strip() == f"{place}/report.html"

        output = npd("rerun", place, "--stage", "filter", "--round", "0", "--set", "filter.max_delta_ifd=0.5")
        assert "finished stages that read it: round 0 · pack" in output
        assert "out of date now: round 0 · pack" in output
        assert "round 0 · score: up to date" in npd("run", place)
        assert RunStore(place).finished(StageKey("evaluate", 0)).fingerprint != first.fingerprint
        assert "superseded/round=000/stage=filter" in npd("gc", place, "--dry-run")
        npd("gc", place)
        assert "0 files" in npd("gc", place)
        npd("verify", place)

        # A copy of all objects in a folder is the run, too.
        objects = RunStore(place).objects
        assert objects is not None
        for name in objects.sizes():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            objects.download(name, tmp_path / "copy" / name)
        assert "everything holds" in npd("verify", str(tmp_path / "copy"))

        # One flipped byte in the bucket is found.
        table = RunStore(place).table_files(StageKey("score", 0))[0]
        name = RunStore(place).relative(table)
        data = bytearray(RunStore(place).fetch(table).read_bytes())
        data[len(data) // 2] ^= 1
        table.write_bytes(data)
        mirror = RunStore(place).mirror
        assert mirror is not None
        mirror.upload(table)
        assert name in npd("verify", place, code=1)
        for each in fresh:
            each._channel.close()
