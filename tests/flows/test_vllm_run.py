"""A whole round with the real vLLM engine, each stage in its own forked process, as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT

import numpy as np
import pytest

from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, score_schema
from tests.flows.conftest import CONFIGS, write_smoke_config
from tests.flows.test_cli import invoke
from tests.tiny_models import make_model, save_model

# vLLM's attention on a CPU takes heads of 32 and more.
WIDTH = 128


def stage_process(log: Path) -> int:
    """Return the process of a stage once its log names it."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8") if log.is_file() else ""
        if found := re.search(r"process (\d+) ", text):
            return int(found[1])
        time.sleep(0.1)
    raise AssertionError(f"{log}: no process")


@pytest.mark.engine
@pytest.mark.usefixtures("prefect_api")
def test_a_round_sampled_by_vllm_agrees_with_the_scoring_pass(tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", make_model(seed=1, layers=3, hidden=WIDTH))
    student = save_model(tmp_path / "student", make_model(seed=2, hidden=WIDTH))
    generate = {"engine": "vllm", "max_new_tokens": 12, "shard_prompts": 6}
    # Every stage that samples takes its time to import vLLM: here the teacher's references and the round's samples.
    changes = {"rounds": 1, "warmup": None, "generate": generate, "evaluate": {"generate": False}}
    config = write_smoke_config(tmp_path, teacher, student, **changes)
    command = [sys.executable, "-m", "flows.cli", "run", str(config)]
    log = tmp_path / "runs" / "smoke" / "logs" / "round-0-generate.log"
    with subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, cwd=CONFIGS.parent) as process:
        # Its process dies while the engine starts, as one does that finds too little memory.
        os.kill(stage_process(log), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "`round 0 · generate` was killed (signal 9), most likely out of memory" in output
    assert "generate.vllm.gpu_memory_utilization" in output
    assert "Traceback" not in output

    code, output = invoke("run", str(config))
    assert code == 0, output
    assert "models: up to date" in output

    store = RunStore.open(tmp_path / "runs" / "smoke")
    settings = store.config.score
    scores = store.read_table(StageKey("score", 0), score_schema(settings.top_k, settings.topk_dtype))
    nll = dict(zip(scores["sample_id"].to_pylist(), scores["student_nll"].to_pylist(), strict=True))
    rollouts = store.read_table(StageKey("generate", 0), GENERATE).to_pylist()
    assert len(rollouts) == 10
    assert store.finished(StageKey("generate", 0)).counters["engine"] == "vllm"
    for row in rollouts:
        # Float32 in two engines with different kernels.
        assert -np.mean(row["sampled_logprobs"]) == pytest.approx(nll[row["sample_id"]], abs=1e-3)
