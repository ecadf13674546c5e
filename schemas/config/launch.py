"""How many processes train the student, and on which machines."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.config.base import Section


class LaunchConfig(Section):
    """Training on several GPUs or machines: `accelerate launch` starts a process for each of them.

    The method does not change: an optimizer step has `packs_per_step` packs whatever the number of processes, each of
    which takes its share of them. One process in all is started without a launcher.
    """

    processes: int = Field(default=1, ge=1)
    """Processes on each machine. On a machine with GPUs: one per GPU, taken in order (`CUDA_VISIBLE_DEVICES` says
    which); `devices.trainer` then only says GPU or CPU."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: each process holds weights, gradients and optimizer state. `fsdp2`: they are divided among the processes,
    which gather a layer's weights while they need them: less memory, more traffic."""

    machines: int = Field(default=1, ge=1)
    """Machines that train. Each runs as many `processes` and sees the run's folder, and models, under the same paths.
    This one, where the run runs, is the first; `npd join` lets each of the others take part."""

    main_address: str | None = Field(default=None, min_length=1)
    """Name or address of this machine, by which the others reach it; needed with several `machines`."""

    main_port: int = Field(default=29500, ge=1, lt=2**16)
    """TCP port of `main_address` where the processes of several machines meet. On one machine any free port is
    taken."""

    options: list[str] = Field(default=[])
    """Further options of `accelerate launch`, as they are: `[--config_file, accelerate.yaml]`, `[--gpu_ids, '2,3']`.
    `NCCL_*`, `GLOO_*` and the rest of the environment reach every process as they are, too."""

    @property
    def world_size(self) -> int:
        """Processes that train, on all machines together."""
        return self.processes * self.machines

    @model_validator(mode="after")
    def _machines_find_each_other(self) -> "LaunchConfig":
        if self.machines > 1 and self.main_address is None:
            raise ValueError("`machines` above 1 needs `main_address`, by which the other machines reach this one")
        return self
