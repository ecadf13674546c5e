"""Shards on Ray: actors that keep their model from shard to shard, on this machine or on a cluster.

The pool is `ray.util.ActorPool`: it gives a shard to whichever actor is free. An actor that dies is started again by
Ray, which then gives it the same shard; nothing else is lost, because every finished shard is a file of the run.

Why not one of the layers above:
    prefect-ray runs stateless tasks: a model would be loaded for every shard (Ray ends the worker of a task with a GPU
    after each), and every worker would have to reach Prefect's server.
    Ray Data (`map_batches` with an actor pool) moves rows as blocks through its object store. Here rows must not move:
    actors write the files themselves. Tried on 2.60, it recovers from a lost node as the pool does, takes longer to
    start, tries a shard that kills its actor for ever unless told otherwise by options it is about to drop, and hangs
    where its own read tasks find no core beside the actors.
"""

import importlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from schemas.config import RayConfig, parse_config
from schemas.errors import ArtifactError, ConfigError, StageError
from schemas.local_files import remove_temporaries, storage_errors
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.packages import require_ray
from tasks.process import limit_threads, out_of_memory_hint
from tasks.stage import StageJob

T = TypeVar("T")
R = TypeVar("R")

_OBJECT_STORE_BYTES = 256 * 2**20
"""For a local cluster: what travels is one shard's prompts to each actor, and counts back."""


@dataclass(frozen=True)
class RunPlace:
    """A stage at work, as an actor finds it from its own machine.

    Args:
        url: The run's folder or URL.
        config: Its config as JSON values.
        stage: Name of the stage.
        round: Its round.
        fingerprint: What the stage at work computes.
    """

    url: str
    config: dict[str, Any]
    stage: str
    round: int | None
    fingerprint: str

    @classmethod
    def of(cls, job: StageJob) -> "RunPlace":
        """Return the place of ``job``, which must have begun."""
        fingerprint = job.store.fingerprint_at_work(job.key)
        return cls(job.store.url, job.config.model_dump(mode="json"), job.key.stage, job.key.round, str(fingerprint))

    def job(self) -> StageJob:
        """Open the run."""
        return StageJob(RunStore(self.url), parse_config(self.config), StageKey(self.stage, self.round))

    def require_shared(self, job: StageJob) -> None:
        """Check that ``job`` is the stage at work and no other, of this run and no copy.

        Raises:
            ArtifactError: this machine does not see the stage's files.
        """
        if job.store.fingerprint_at_work(job.key) != self.fingerprint:
            raise ArtifactError(
                f"{self.url}: an actor of `ray` on machine {socket.gethostname()} does not see stage `{job.key.label}` "
                "at work. Set `root` to what all machines of the cluster share: an s3:// URL or a network folder"
            )


class ShardActor:
    """Does shards in a Ray worker; makes what does them at the first.

    Args:
        place: The stage.
        make: Makes what does shards, from the stage as this machine sees it.
        threads: CPU threads to use.
    """

    def __init__(self, place: RunPlace, make: Callable[[StageJob], Callable[[Any], Any]], threads: int) -> None:
        limit_threads(threads)
        self._place, self._make = place, make
        self._job = place.job()
        self._work: Callable[[Any], Any] | None = None

    def run(self, shard: Any) -> Any:
        """Do one shard."""
        # Before every shard: an actor that outlived its stage must not write into the next one's folder.
        self._place.require_shared(self._job)
        with storage_errors(f"{self._place.url}: stage `{self._job.key.label}`"), self._job.store.lock.stage_at_work():
            if self._work is None:
                self._work = self._make(self._job)
            return self._work(shard)


class Cluster:
    """A Ray cluster that this process has joined.

    Args:
        ray: The library.
        settings: How many actors, and what each takes.
    """

    def __init__(self, ray: ModuleType, settings: RayConfig) -> None:
        self._ray: Any = ray
        self._settings = settings
        there = self._ray.cluster_resources()
        gpus = settings.gpus_per_actor
        self._gpus = float(there.get("GPU", 0) > 0) if gpus is None else gpus
        for kind, wanted in (("GPU", self._gpus), ("CPU", settings.cpus_per_actor)):
            if there.get(kind, 0) < wanted:
                raise ConfigError(
                    f"ray: an actor takes {wanted:g} {kind}(s), the cluster has {there.get(kind, 0):g}: lower "
                    f"`ray.{kind.lower()}s_per_actor`, or start nodes that have them"
                )

    def map(self, job: StageJob, make: Callable[[StageJob], Callable[[T], R]], shards: Iterable[T]) -> Iterator[R]:
        """Do ``shards`` by actors, each of which keeps what ``make`` made; taken only as actors are free.

        Args:
            job: The stage.
            make: See ShardActor; it and what it makes must pickle by name.
            shards: What to do. One whose actor died is done again, so doing it twice must be as doing it once.

        Yields:
            What came of each, in the order in which they end.

        Raises:
            NPDError: what doing a shard raised, as the same class.
            StageError: an actor died too often.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        settings, place = self._settings, RunPlace.of(job)
        actor = self._ray.remote(
            num_cpus=settings.cpus_per_actor,
            num_gpus=self._gpus,
            max_restarts=settings.restarts,
            # For as long as the actor may be started again: a machine that dies fails several tries in a second.
            max_task_retries=-1,
        )(ShardActor)
        waiting = iter(shards)
        first = list(islice(waiting, settings.actors))
        pool = ActorPool([actor.remote(place, make, settings.cpus_per_actor) for _ in first])

        def submit(few: Iterable[T]) -> None:
            for shard in few:
                pool.submit(lambda actor, shard: actor.run.remote(shard), shard)

        submit(first)
        while pool.has_next():
            try:
                done = pool.get_next_unordered()
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                raise StageError(
                    f"stage `{job.key.label}`: an actor of `ray` died, with `ray.restarts: {settings.restarts}`. Most "
                    f"likely its machine ran out of memory: {out_of_memory_hint(job.key)}. Ray says: {error}"
                ) from error
            submit(islice(waiting, 1))
            # With nothing left to do its place is free for an actor that waits for one, its own machine being gone.
            while pool.has_free():
                pool.pop_idle()
            yield done
        remove_temporaries(job.store.path(job.key))


@contextmanager
def joined(settings: RayConfig) -> Iterator[Cluster]:
    """Join the cluster that ``settings`` name, or start one on this machine that ends with the context or the process.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be joined, or has no room for an actor.
    """
    # Before the import, which reads it.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    require_ray()
    ray: Any = importlib.import_module("ray")
    if settings.address is None:
        # Else its workers give way to whatever else runs on the machine, unlike a stage of one process.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=settings.actors * settings.cpus_per_actor,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    else:
        try:
            ray.init(address=settings.address)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            # What was joined half would be in the way of the next try.
            ray.shutdown()
            raise ConfigError(f"ray.address: {settings.address}: cannot be joined: {error}") from error
    try:
        yield Cluster(ray, settings)
    finally:
        ray.shutdown()


def require_arrived(store: RunStore, path: Path) -> Path:
    """Return a file that an actor wrote, once it is on this machine.

    Raises:
        StageError: it is not there.
    """
    if not store.receive(path).is_file():
        raise StageError(
            f"{store.relative(path)}: an actor of `ray` has written it, and it is not at {store.url}: `root` must be a "
            "place that all machines of the cluster share"
        )
    return path
