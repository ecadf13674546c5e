"""Stages on a real Ray cluster of this machine: the bytes of one process, whatever dies."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from schemas.config import RunConfig
from schemas.errors import ArtifactError, ConfigError, ModelError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.ray_actors import RunPlace
from tasks.stage import StageJob, execute
from tests.run_fixtures import make_config
from tests.tasks.rollout_runs import TRAIN, make_run

GENERATE, SCORE = StageKey("generate", 0), StageKey("score", 0)
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two cores, which stages join."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    started = Cluster(initialize_head=True, head_node_args=node)
    yield started.address
    started.shutdown()


def actors() -> list[psutil.Process]:
    """Return the processes of actors, whatever they do."""
    return [p for p in psutil.process_iter(["cmdline"]) if "ray::ShardActor" in " ".join(p.info["cmdline"] or [])]


def outputs(store: RunStore, key: StageKey) -> list[tuple[str, str]]:
    return [(record.path, record.sha256) for record in store.finished(key).outputs]


def on_ray(config: RunConfig, address: str | None) -> RunConfig:
    return RunConfig.model_validate(config.model_dump() | {"ray": {"address": address, "actors": 2}})


def test_x(tmp_path, teacher_dir, student_dir, cluster):
    sections: dict[str, Any] = {"generate": {"shard_prompts": 1, "samples_per_prompt": 3, "max_new_tokens": 300}, "score": {"shard_samples": 2}}
    store, config = make_run(tmp_path / "one", teacher_dir, student_dir, **sections)
    alone = [execute(store, config, key) for key in (GENERATE, SCORE)]
    store2, config2 = make_run(tmp_path / "many", teacher_dir, student_dir, **sections)
    config2 = on_ray(config2, cluster)
    import time
    t=time.time()
    a = execute(store2, config2, GENERATE, lambda *p: print(time.time()-t, *p)); print(time.time()-t, a.counters)
    b = execute(store2, config2, SCORE, lambda *p: print(time.time()-t, *p)); print(time.time()-t, b.counters)
    for key in (GENERATE, SCORE): assert outputs(store, key) == outputs(store2, key)
