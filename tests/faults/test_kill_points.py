"""A run that is killed at every point of writing ends with the same bytes as one that nothing interrupted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from schemas.config import load_config
from schemas.run_store import RunStore
from tests.faults.object_server import ObjectServer
from tests.test_loop import run_loop

ROOT = Path(__file__).parents[2]
STAGES = {"prompts", "models", "reference", "baseline"}
STAGES |= {"generate", "score", "filter", "pack", "train", "export", "evaluate"}
SAVE_EVERY_STEPS = 2
Record = Callable[[str, object], None]


def write_config(folder: Path, root: str, teacher: Path, student: Path, **changes: Any) -> Path:
    """Write a config of few prompts in several shards, one thread, and a checkpoint every second step."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text(encoding="utf-8"))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n} twice."}) + "\n" for n in range(12)), encoding="utf-8")
    values |= {
        "root": root,
        "teacher": {"model": str(teacher)},
        "student": {"model": str(student)},
        "prompts": {"sources": [{"type": "jsonl", "path": str(prompts)}], "held_out": 2},
        "devices": {"cpu_threads": 1},
    }
    values["generate"]["shard_prompts"] = 5
    values["score"]["shard_samples"] = 5
    values["pack"] = {"max_tokens": 64, "shard_bins": 5}
    # Three checkpoints each: one within an epoch, one across its end, the last.
    values["warmup"] |= {"save_every_steps": SAVE_EVERY_STEPS, "packs_per_step": 3, "epochs": 2}
    values["train"] |= {"save_every_steps": SAVE_EVERY_STEPS, "packs_per_step": 3}
    path = folder / f"{Path(root).name}.yaml"
    path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
    return path


def run_harness(config: Path, *options: str, **environment: str) -> dict[str, Any]:
    """Run the harness in a process of its own, which has computed nothing before it forks; return its report."""
    command = [sys.executable, "-m", "tests.faults.harness", str(config), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def results(store: RunStore) -> dict[str, bytes]:
    """Return every table and every weight of a run that its manifests name."""
    names = [r.path for key in store.stages() for r in store.finished(key).outputs]
    wanted = [name for name in names if name.endswith((".parquet", ".safetensors"))]
    return {name: store.fetch(store.folder / name).read_bytes() for name in sorted(wanted)}


def uninterrupted(folder: Path, teacher: Path, student: Path, **changes: Any) -> dict[str, bytes]:
    """Return what a run ends with that nothing interrupts, in this process."""
    folder.mkdir()
    config = load_config(write_config(folder, str(folder / "runs"), teacher, student, **changes))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return results(run_loop(config)[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_killed_at_every_point_of_every_stage(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, record_property: Record
) -> None:
    report = run_harness(write_config(tmp_path, str(tmp_path / "runs"), teacher_dir, student_dir, rounds=1))
    record_property("kill points on a disk", report)
    assert report["total"] >= 60
    assert report["points"].keys() >= STAGES
    assert report["repeated"]["files"] <= 1
    assert report["repeated"]["steps"] <= SAVE_EVERY_STEPS
    assert not list(tmp_path.rglob(".tmp-*"))
    whole = uninterrupted(tmp_path / "whole", teacher_dir, student_dir, rounds=1)
    assert results(RunStore(tmp_path / "runs" / "smoke")) == whole


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_killed_at_points_of_an_object_store(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, record_property: Record
) -> None:
    changes: dict[str, Any] = {"rounds": 1, "warmup": None}
    with ObjectServer() as server:
        config = write_config(tmp_path, f"{server.bucket}/killed", teacher_dir, student_dir, **changes)
        environment = server.environment | {"NPD_CACHE": str(tmp_path / "cache")}
        # Each costs a new machine's downloads. All were died at when this was written; `--every 1` does so again.
        report = run_harness(config, "--fresh-cache", "--every", "12", **environment)
        with server.reachable(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("NPD_CACHE", str(tmp_path / "other-cache"))
            found = results(RunStore(f"{server.bucket}/killed/smoke"))
    record_property("kill points in an object store, each start on a new machine", report)
    assert report["total"] >= 25
    assert report["points"].keys() >= STAGES
    assert report["repeated"]["files"] <= 1
    assert report["repeated"]["steps"] <= SAVE_EVERY_STEPS
    assert found == uninterrupted(tmp_path / "whole", teacher_dir, student_dir, **changes)
