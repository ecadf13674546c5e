"""Stages generate and score on a real Ray cluster of this machine: the bytes of one process, whatever dies."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest

from flows.process import run_in_process
from schemas.config import RunConfig
from schemas.errors import ArtifactError, ConfigError, ModelError, StageError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import SCORE_STUDENT, score_schema
from tasks.ray_actors import RunPlace, joined, require_arrived
from tasks.score.on_ray import ShardScorer
from tasks.score.shards import plan_shards
from tasks.stage import StageJob, execute
from tests.faults.object_server import ObjectServer
from tests.tasks.rollout_runs import TRAIN, make_run

GENERATE, SCORE = StageKey("generate", 0), StageKey("score", 0)
SECONDS = 120.0
OBJECT_STORE_BYTES = 100 * 2**20
SECTIONS: dict[str, Any] = {
    # Long enough that an actor is at work on the next shard when one is reported.
    "generate": {"shard_prompts": 1, "samples_per_prompt": 3, "max_new_tokens": 300},
    "score": {"shard_samples": 2},
    "devices": {"cpu_threads": 1},
}

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two cores, which stages join."""
    with started(cores=2) as running:
        yield running.address


@contextmanager
def started(cores: int) -> Iterator[Any]:
    """Start a cluster of one node."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    # A node counts as lost once it has not answered five times: by itself Ray asks every three seconds.
    node |= {"_system_config": {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}}
    running = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield running
    finally:
        running.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path) -> RunStore:
    """The round of one process."""
    store, config = make_run(tmp_path_factory.mktemp("alone"), teacher_dir, student_dir, **SECTIONS)
    for key in (GENERATE, SCORE):
        execute(store, config, key)
    return store


def on_ray(config: RunConfig, address: str | None, **settings: Any) -> RunConfig:
    """Return ``config`` with two actors on the cluster at ``address``, and further ``settings`` of `ray`."""
    return RunConfig.model_validate(config.model_dump() | {"ray": {"address": address, "actors": 2} | settings})


def actors() -> list[psutil.Process]:
    """Return the actors' processes: children of the cluster's, which is this process's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # One of Ray's that is just ending has no command line any more.
        with suppress(psutil.NoSuchProcess):
            if "ray::ShardActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def parts(store: RunStore, key: StageKey) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.path(key).glob("part-*")}


def outputs(store: RunStore, key: StageKey) -> list[tuple[str, str]]:
    return [(record.path, record.sha256) for record in store.finished(key).outputs]


def test_actors_write_the_bytes_of_one_process_though_one_is_killed(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, cluster: str, alone: RunStore
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir, **SECTIONS)
    config = on_ray(config, cluster)
    finished: dict[str, int] = {}
    seen: list[int] = []

    def kill_one_at_the_first_shard(done: int, total: int, unit: str) -> None:
        if not seen:
            finished.update(parts(store, GENERATE))
            os.kill(actors()[0].pid, signal.SIGKILL)
        seen.append(done)

    sampled = execute(store, config, GENERATE, kill_one_at_the_first_shard)
    assert seen == list(range(3, 3 * TRAIN + 1, 3))
    assert 0 < len(finished) < TRAIN
    assert finished.items() <= parts(store, GENERATE).items()
    scored = execute(store, config, SCORE)
    for key, manifest in ((GENERATE, sampled), (SCORE, scored)):
        assert outputs(store, key) == outputs(alone, key)
        expected = alone.finished(key)
        assert manifest.fingerprint == expected.fingerprint
        for name in ("samples", "tokens", "stop", "shards", "sampled_logprob_gap"):
            assert manifest.counters.get(name) == expected.counters.get(name)


def test_a_node_that_is_lost_costs_what_its_actor_was_at(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, alone: RunStore
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir, **SECTIONS)
    finished: dict[str, int] = {}
    with started(cores=1) as running:
        node = running.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)

        def lose_the_node(done: int, total: int, unit: str) -> None:
            if not finished:
                finished.update(parts(store, GENERATE))
                running.remove_node(node, allow_graceful=False)

        execute(store, on_ray(config, running.address), GENERATE, lose_the_node)
    assert 0 < len(finished) < TRAIN
    assert finished.items() <= parts(store, GENERATE).items()
    assert outputs(store, GENERATE) == outputs(alone, GENERATE)


def test_a_killed_stage_takes_its_cluster_along_and_is_continued_without_ray(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, alone: RunStore
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir, **SECTIONS)
    started: list[psutil.Process] = []

    def kill_the_stage(done: int, total: int, unit: str) -> None:
        if not started:
            stage = psutil.Process(int(store.log(GENERATE).read_text().split(" · process ")[1].split()[0]))
            started.extend(stage.children(recursive=True))
            stage.kill()

    with pytest.raises(StageError, match=r"killed \(signal 9\)"):
        run_in_process(store, on_ray(config, None), GENERATE, kill_the_stage)
    assert len(started) >= 4
    _, alive = psutil.wait_procs(started, timeout=SECONDS)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    kept = parts(store, GENERATE)
    manifest = execute(store, config, GENERATE)
    assert manifest.counters["shards_kept"] == len(kept) > 0
    assert kept.items() <= parts(store, GENERATE).items()
    assert outputs(store, GENERATE) == outputs(alone, GENERATE)


def test_what_an_actor_finds_wrong_is_raised_as_the_same_class(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, cluster: str
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir, **SECTIONS)
    (store.path(StageKey("models"), "student") / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights") as caught:
        execute(store, on_ray(config, cluster, actors=1), GENERATE)
    assert type(caught.value) is ModelError
    assert store.manifest(GENERATE) is None


def test_a_shard_that_kills_every_actor_fails_the_stage_with_what_to_lower(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, cluster: str
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir)
    store.begin(GENERATE, "at work")
    config = on_ray(config, cluster, actors=1, restarts=1)
    assert config.ray is not None

    def make(job: StageJob) -> Callable[[int], int]:
        def work(shard: int) -> int:
            if shard == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return shard

        return work

    with (
        pytest.raises(
            StageError, match=r"an actor of `ray` died, with `ray\.restarts: 1`.*lower `generate\.batch_size`"
        ),
        joined(config.ray) as joined_cluster,
    ):
        list(joined_cluster.map(StageJob(store, config, GENERATE), make, range(3)))


def test_an_actor_that_finds_no_room_is_an_error_not_a_wait(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, cluster: str
) -> None:
    _, config = make_run(tmp_path, teacher_dir, student_dir)
    for settings, message in (
        ({"gpus_per_actor": 1}, r"takes 1 GPU\(s\), the cluster has 0: lower `ray\.gpus_per_actor`"),
        ({"cpus_per_actor": 3}, r"takes 3 CPU\(s\), the cluster has 2: lower `ray\.cpus_per_actor`"),
    ):
        ray = on_ray(config, cluster, **settings).ray
        assert ray is not None
        with pytest.raises(ConfigError, match=message), joined(ray):
            raise AssertionError("joined")


def test_ray_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"`ray` needs Ray.*-e '\.\[ray\]'"):
        execute(store, on_ray(config, None), GENERATE)


def test_a_machine_that_does_not_share_the_run_says_so(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = make_run(tmp_path / "here", teacher_dir, student_dir)
    store.begin(GENERATE, "at work")
    place = RunPlace.of(StageJob(store, config, GENERATE))
    place.require_shared(place.job())
    # A copy of the run, made before the stage began.
    elsewhere, _ = make_run(tmp_path / "there", teacher_dir, student_dir)
    with pytest.raises(ArtifactError, match=r"does not see stage `round 0 · generate` at work.*Set `root`"):
        place.require_shared(StageJob(elsewhere, config, GENERATE))


def test_machines_that_share_a_bucket_and_no_disk_hand_shards_on(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectServer() as server, server.reachable():

        def machine(name: str) -> None:
            monkeypatch.setenv("NPD_CACHE", str(tmp_path / name))

        machine("driver")
        store, config = make_run(f"{server.bucket}/runs", teacher_dir, student_dir)
        execute(store, config, GENERATE)
        earlier = config.model_copy(update={"score": config.score.model_copy(update={"context": "bos"})})

        def by_actor(name: str, config: RunConfig, by: Literal["student", "teacher"]) -> RunStore:
            job = StageJob(store, config, SCORE)
            machine(name)
            there = RunPlace.of(job).job()
            RunPlace.of(job).require_shared(there)
            assert ShardScorer(there, by=by)(0) > 0
            assert there.store.folder != store.folder
            return there.store

        # An attempt at other settings leaves its files on the disk of the machine that wrote them.
        store.begin(SCORE, "of other settings")
        by_actor("second", earlier, "student")
        store.begin(SCORE, "at work")
        first = by_actor("first", config, "student")
        by_actor("second", config, "teacher")
        job = StageJob(store, config, SCORE)
        shard = plan_shards(job)[0]
        assert not shard.path.exists()
        assert require_arrived(store, shard.path).is_file()
        by_student = first.read_part(first.folder / store.relative(shard.student), SCORE_STUDENT)
        scores = store.read_part(shard.path, score_schema(config.score.top_k, config.score.topk_dtype))
        expected = by_student.column("nll_uncond").to_numpy().astype(np.float32)
        assert np.array_equal(scores.column("student_nll_uncond").to_numpy(), expected)
        with pytest.raises(ArtifactError, match=r"part-00001\.parquet: missing"):
            require_arrived(store, plan_shards(job)[1].path)
