import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tests.flows.conftest import CONFIGS, write_smoke_config
from tests.flows.test_cli import invoke
from tests.test_loop import run_loop, tables

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_api")]

COMMAND = [sys.executable, "-m", "flows.cli", "run"]
GENERATE_1 = StageKey("generate", 1)


def overlap_config(folder: Path, teacher: Path, student: Path, name: str, **changes: object) -> Path:
    return write_smoke_config(
        folder, teacher, student, name=name, overlap=True, warmup=None, devices={"cpu_threads": 1}, **changes
    )


def test_a_round_is_sampled_while_the_one_before_trains_and_its_tables_are_the_same(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    config = overlap_config(tmp_path, teacher_dir, student_dir, "overlap")
    done = subprocess.run([*COMMAND, str(config)], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    store = RunStore.open(tmp_path / "runs" / "overlap")
    sampled, trained = store.finished(GENERATE_1), store.finished(StageKey("train", 0))
    assert sampled.started < trained.finished

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = store.config.model_copy(update={"name": "one-by-one"})
        alone, _ = run_loop(other)
    finally:
        torch.set_num_threads(threads)
    assert tables(alone) == tables(store)


def test_an_interrupt_ends_both_stages_and_the_run_continues(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    # Enough to sample that the second round is still at it when the interrupt comes.
    changes = {
        "generate": {"max_new_tokens": 160, "batch_size": 1, "shard_prompts": 2},
        "evaluate": {"generate": False},
    }
    config = overlap_config(tmp_path, teacher_dir, student_dir, "stopped", **changes)
    process = subprocess.Popen([*COMMAND, str(config)], stdout=subprocess.PIPE, text=True, cwd=CONFIGS.parent)
    store = RunStore(tmp_path / "runs" / "stopped")
    log = store.log(GENERATE_1)
    while not (log.is_file() and list(store.path(GENERATE_1).glob("part-*.parquet"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    child = int(log.read_text().split(" · process ")[1].split()[0])
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert store.manifest(GENERATE_1) is None

    kept = {path.name: path.stat().st_mtime_ns for path in store.path(GENERATE_1).glob("part-*.parquet")}
    code, output = invoke("run", str(config))
    assert code == 0, output
    for name, written in kept.items():
        assert store.path(GENERATE_1, name).stat().st_mtime_ns == written
