"""Which machines generate and score a round, where more than this one may."""

from pydantic import Field

from schemas.config.base import Section


class RayConfig(Section):
    """Stages generate and score on Ray: actors, each with a model of its own, take one shard after another (needs the
    extra `ray`). `null`: both run in this machine's one process."""

    address: str | None = Field(default=None, min_length=1)
    """Cluster to join, from one of its machines: `auto` or `HOST:6379`. null: one on this machine, for as long as the
    stage runs."""

    actors: int = Field(ge=1)
    """Models at work at a time. What finds no room waits for it."""

    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs of an actor; it sees no others. null: one where the cluster has any, else none."""

    cpus_per_actor: int = Field(default=1, ge=1)
    """CPU cores of an actor, and its threads. Equal bytes on a CPU need equal threads: without Ray,
    `devices.cpu_threads`."""

    restarts: int = Field(default=3, ge=0)
    """How often an actor that died, or whose machine did, is started again before the stage fails."""
