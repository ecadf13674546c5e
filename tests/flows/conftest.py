import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def write_smoke_config(folder: Path, teacher: Path, student: Path, **changes: Any) -> Path:
    """Write configs/smoke.yaml into ``folder`` with tiny models, few prompts, and ``changes`` to its top level."""
    values = yaml.safe_load((CONFIGS / "smoke.yaml").read_text(encoding="utf-8"))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n} twice."}) + "\n" for n in range(14)), encoding="utf-8")
    values |= {
        "root": str(folder / "runs"),
        "teacher": {"model": str(teacher)},
        "student": {"model": str(student)},
        "prompts": {"sources": [{"type": "jsonl", "path": str(prompts)}], "held_out": 4},
    }
    path = folder / "smoke.yaml"
    path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
    return path


class FinishedRun(NamedTuple):
    """A whole run made by the command line.

    Args:
        config: Path of its config.
        folder: The run's folder.
        output: What the command printed.
        heavy: Those of torch, transformers and vllm that the command's own process had loaded in the end.
    """

    config: Path
    folder: Path
    output: str
    heavy: list[str]


_RUN_AND_REPORT = """
import sys
from flows.cli import app
try:
    app(["run", sys.argv[1]])
except SystemExit as end:
    print("HEAVY", [name for name in ("torch", "transformers", "vllm") if name in sys.modules])
    raise
"""


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path, prefect_home: Path
) -> FinishedRun:
    """Run two rounds without a warm-up, without a Prefect server. Tests that change the run take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_smoke_config(folder, teacher_dir, student_dir, warmup=None)
    command = [sys.executable, "-c", _RUN_AND_REPORT, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    output, _, heavy = done.stdout.rpartition("HEAVY ")
    return FinishedRun(config, folder / "runs" / "smoke", output, json.loads(heavy.replace("'", '"')))
