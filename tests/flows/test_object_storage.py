"""A run in an object store, through the command line, against a real S3 server."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
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

        def npd(*arguments: str) -> str:
            """Call a command that runs stages, as users do: in a process of its own."""
            done = subprocess.run(
                [sys.executable, "-m", "flows.cli", *arguments],
                capture_output=True,
                text=True,
                cwd=CONFIGS.parent,
                env=dict(os.environ),
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        def look(*arguments: str, code: int = 0) -> str:
            """Call a command that starts nothing."""
            result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
            assert result.exit_code == code, result.output
            return result.output

        output = npd("run", str(config))
        assert f"{place}/report.html" in output
        first = RunStore(place).finished(StageKey("evaluate", 0))

        # Another machine: nothing of the run on its disk.
        shutil.rmtree(tmp_path / "cache")
        assert "round=000/stage=score" in look("inspect", place)
        look("verify", place)
        assert look("report", place).strip() == f"{place}/report.html"

        output = npd("rerun", place, "--stage", "filter", "--round", "0", "--set", "filter.max_delta_ifd=0.5")
        assert "finished stages that read it: round 0 · pack" in output
        assert "out of date now: round 0 · pack" in output
        assert "round 0 · score: up to date" in npd("run", place)
        assert RunStore(place).finished(StageKey("evaluate", 0)).fingerprint != first.fingerprint
        assert "superseded/round=000/stage=filter" in look("gc", place, "--dry-run")
        look("gc", place)
        assert "0 files" in look("gc", place)
        look("verify", place)

        # A copy of all objects in a folder is the run, too.
        objects = RunStore(place).objects
        assert objects is not None
        for name in objects.sizes():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            objects.download(name, tmp_path / "copy" / name)
        assert "everything holds" in look("verify", str(tmp_path / "copy"))

        # One flipped byte in the bucket is found.
        table = RunStore(place).table_files(StageKey("score", 0))[0]
        name = RunStore(place).relative(table)
        data = bytearray(RunStore(place).fetch(table).read_bytes())
        data[len(data) // 2] ^= 1
        table.write_bytes(data)
        mirror = RunStore(place).mirror
        assert mirror is not None
        mirror.upload(table)
        assert name in look("verify", place, code=1)
