"""Runs that are ended from outside, through the command line: what the exit code says, and that they go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.run_lock import LOCK_NAME
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tests.flows.conftest import CONFIGS, write_smoke_config
from tests.flows.test_cli import invoke

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-m", "flows.cli"]


def start(config: Path) -> subprocess.Popen[str]:
    # With a Prefect server of its own, which ends with it.
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return subprocess.Popen(
        [*COMMAND, "run", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=CONFIGS.parent,
        start_new_session=True,
        env=environment | {"PYTHONUNBUFFERED": "1"},
    )


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError("".join(seen))


@pytest.mark.usefixtures("prefect_api")
def test_one_process_at_a_time_and_sigterm_and_sigkill_leave_a_run_that_goes_on(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    config = write_smoke_config(tmp_path, teacher_dir, student_dir, rounds=1, warmup=None)
    store = RunStore(tmp_path / "runs" / "smoke")

    first = start(config)
    wait_for(first, "models: starting")
    # It holds the run for as long as this process, the second, needs to find that out.
    first.send_signal(signal.SIGSTOP)
    code, refusal = invoke("run", str(config))
    first.send_signal(signal.SIGCONT)
    assert code == 2, refusal
    assert f"process {first.pid} on " in refusal
    assert "Traceback" not in refusal

    first.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM, output
    assert time.monotonic() - begun < 30
    assert "Traceback" not in output
    assert store.manifest(StageKey("prompts")) is not None

    third = start(config)
    wait_for(third, "round 0 · generate: starting")
    # Nothing can be done about this one, not even giving the lock back.
    third.kill()
    # The pipe ends once the last process has: the stage's and Prefect's temporary server follow by themselves.
    third.communicate(timeout=60)
    assert (store.folder / LOCK_NAME).read_text() != ""

    code, output = invoke("run", str(config))
    assert code == 0, output
    assert "models: up to date" in output
    assert "round 0 · evaluate: done" in output
    code, output = invoke("verify", str(store.folder))
    assert code == 0, output
