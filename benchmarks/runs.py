"""Runs in a folder of their own: prompts, models and a config, and stages brought to where a benchmark begins."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from flows.process import run_in_process
from schemas.config import RunConfig, load_config, parse_config
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.graph import STAGES
from tasks.stage import current_manifest, execute


class Models(NamedTuple):
    """Folders of a teacher and a student that share a tokenizer."""

    teacher: Path
    student: Path


class Run(NamedTuple):
    """A run: its files and its config."""

    store: RunStore
    config: RunConfig


def write_models(folder: Path, teacher: str, student: str, *, device: str = "cpu") -> Models:
    """Write random models of two of SHAPES: float32 on a CPU, bfloat16 on a GPU."""
    import torch

    from benchmarks.random_models import SHAPES, write_model

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    tokens = min(SHAPES[teacher].vocab, SHAPES[student].vocab)
    paths = [
        write_model(folder / role, SHAPES[shape], tokens=tokens, seed=seed, device=device, dtype=dtype)
        for role, shape, seed in (("teacher", teacher, 1), ("student", student, 2))
    ]
    return Models(*paths)


def write_prompts(path: Path, count: int, *, words: tuple[int, int] = (4, 24), seed: int = 0) -> Path:
    """Write ``count`` distinct prompts of ``words[0]`` to ``words[1]`` made-up words (6 bytes each) as JSONL.

    The first n of more prompts are the n prompts of a smaller count.
    """
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            length = int(rng.integers(words[0], words[1] + 1))
            text = " ".join(letters[word].tobytes().decode() for word in rng.integers(0, 26, (length, 5)))
            file.write(json.dumps({"prompt": f"{number}: {text}"}) + "\n")
    return path


def config_values(
    folder: Path, models: Models, prompts: int, *, device: str = "cpu", held_out: int = 4, **sections: Any
) -> dict[str, Any]:
    """Return the config of a run below ``folder`` as YAML values, its prompts written.

    Args:
        folder: Holds the prompts and, under ``runs/benchmark``, the run.
        models: Teacher and student.
        prompts: Train prompts.
        device: Where all models compute.
        held_out: Prompts for evaluation, beside those.
        sections: Sections of the config, or single values, as in YAML; they replace what is here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = write_prompts(folder / "prompts.jsonl", prompts + held_out)
    values: dict[str, Any] = {
        "name": "benchmark",
        "root": str(folder / "runs"),
        "teacher": {"model": str(models.teacher)},
        "student": {"model": str(models.student)},
        "prompts": {"sources": [{"type": "jsonl", "path": str(path)}], "held_out": held_out},
        "devices": {"sampler": device, "teacher": device, "trainer": device},
        # A random teacher finds nothing in what a random student says: keep it all.
        "filter": {"min_delta_ifd": None, "max_delta_ifd": None},
    }
    return values | sections


def make_run(folder: Path, models: Models, prompts: int, **sections: Any) -> Run:
    """Create a run; the arguments are those of `config_values`."""
    config = parse_config(config_values(folder, models, prompts, **sections))
    return Run(RunStore.create(config), config)


def finish(run: Run, key: StageKey) -> Manifest:
    """Run a stage in this process, and before it every stage it needs, unless their results stand."""
    manifest = current_manifest(*run, key) if run.store.manifest(key) is not None else None
    if manifest is not None:
        return manifest
    for needed in STAGES[key.stage].inputs(run.config, key):
        finish(run, needed)
    return execute(*run, key)


def run_apart(run: Run, key: StageKey) -> Manifest:
    """Run a stage again from its start, in a process of its own; its manifest tells its time and its peak memory."""
    run.store.supersede(key)
    return run_in_process(*run, key)


def run_command(values: dict[str, Any], prefect_home: Path, *overrides: str) -> Run:
    """Run `npd run` on a config in a process of its own, from nothing to its end, and return the run.

    Args:
        values: The config as YAML values.
        prefect_home: Folder of Prefect's database, for the server that the command starts where `PREFECT_API_URL`
            names none.
        overrides: Given with `--set`.

    Raises:
        RuntimeError: the command failed; holds what it printed.
    """
    path = Path(values["root"]).with_name("config.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    changes = [argument for override in overrides for argument in ("--set", override)]
    command = [sys.executable, "-m", "flows.cli", "run", str(path), *changes]
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    config = load_config(path, overrides)
    return Run(RunStore.open(Path(config.root) / config.name), config)


def span(manifests: Iterable[Manifest]) -> float:
    """Return the seconds from the first start to the last end of some stages."""
    manifests = list(manifests)
    start = min(datetime.fromisoformat(manifest.started) for manifest in manifests)
    return (max(datetime.fromisoformat(manifest.finished) for manifest in manifests) - start).total_seconds()
