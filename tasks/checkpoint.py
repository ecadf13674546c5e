"""What training continues from: weights, optimizer, schedule, step and log, random numbers. Nothing is pickled."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from schemas.errors import ArtifactError
from schemas.manifest import hash_files
from tasks.language_model.weights import (
    like,
    load_weights,
    read_json,
    read_tensors,
    save_weights,
    whole,
    whole_weights,
    write_tensors,
)
from tasks.stage import StageJob

CheckpointFolder = Callable[[int], AbstractContextManager[Path]]
"""Given the optimizer step, an empty folder that becomes the step's checkpoint when the context ends without error."""

_INDEX = "checkpoint.json"
_VERSION = 1
_OPTIMIZER, _OPTIMIZER_TENSORS = "optimizer.json", "optimizer.safetensors"
_SCHEDULER, _RANDOM = "scheduler.json", "rng.json"
_RUNNING = "checkpoints"


class PlainCheckpoints(Trainer):
    """A trainer whose checkpoints are those of ``write_checkpoint``.

    transformers' own hold pickles; these methods replace all that training calls to write or read one.
    """

    checkpoint_folder: CheckpointFolder | None = None
    """Where to keep checkpoints; None: keep none."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.checkpoint_folder is None:
            return
        assert self.model is not None
        contents = CheckpointContents.gather(self.model, self.optimizer, self.args.device)
        if self.args.should_save:
            with self.checkpoint_folder(self.state.global_step) as folder:
                write_checkpoint(folder, self.model, contents, self.lr_scheduler, self.state)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        restored: tuple[int, int] = super()._init_training_state(max_steps, *args)
        # How often to save is this config's, not the checkpoint's.
        self.state.compute_steps(self.args, max_steps)
        return restored

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        assert target is not None
        load_weights(target, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_optimizer(Path(checkpoint), self.optimizer)
            restore_scheduler(Path(checkpoint), self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: bf16 needs no gradient scaling."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(Path(checkpoint), self.args.device, self.args.process_index)


@dataclasses.dataclass(frozen=True)
class CheckpointContents:
    """What may be divided among the processes that train, gathered in the first of them.

    Nothing in it says how many processes there were: any number can go on from it.

    Args:
        weights: As ``whole_weights`` gives them.
        optimizer: Tensors of the optimizer's state, named `state.INDEX.NAME`.
        optimizer_values: Its other values, as JSON.
        random: States of the generators of random numbers, as JSON; of further processes under `ranks`.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    optimizer_values: dict[str, Any]
    random: dict[str, Any]

    @classmethod
    def gather(cls, model: nn.Module, optimizer: Any, device: torch.device) -> "CheckpointContents":
        """Gather; every process must call this, and the first has the result.

        Args:
            model: The student, or its adapters.
            optimizer: A torch optimizer, or accelerate's wrapper of one.
            device: Where it trains, whose random numbers are kept beside the CPU's.
        """
        values = optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        scalars = {}
        for index, entries in values["state"].items():
            tensors |= {f"state.{index}.{name}": v for name, v in entries.items() if isinstance(v, Tensor)}
            scalars[index] = {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
        others = {"state": scalars, "param_groups": values["param_groups"]}
        return cls(whole_weights(model), whole(tensors), others, _random_states(device))


def write_checkpoint(
    folder: Path, model: nn.Module, contents: CheckpointContents, scheduler: Any, state: TrainerState
) -> None:
    """Fill an empty folder; the same training state gives the same bytes.

    Args:
        folder: Where to.
        model: The student, or its adapters.
        contents: What was gathered of it.
        scheduler: A torch scheduler.
        state: The trainer's step and log.
    """
    save_weights(model, contents.weights, folder)
    write_tensors(folder / _OPTIMIZER_TENSORS, contents.optimizer)
    _write_json(folder / _OPTIMIZER, contents.optimizer_values)
    _write_json(folder / _SCHEDULER, scheduler.state_dict())
    _write_json(folder / _RANDOM, contents.random)
    # How often to save changes no result, so it leaves no trace in one.
    unsaid: Any = {"save_steps": None}
    dataclasses.replace(state, **unsaid).save_to_json(str(folder / TRAINER_STATE_NAME))
    files = sorted(folder.iterdir())
    hashes = dict(zip((file.name for file in files), hash_files(files), strict=True))
    _write_json(folder / _INDEX, {"version": _VERSION, "step": state.global_step, "sha256": hashes})


def checkpoint_step(folder: Path) -> int:
    """Return the optimizer step of a checkpoint.

    Raises:
        ArtifactError: it has no readable index, or another version of this project wrote it.
    """
    return int(_index(folder)["step"])


def read_state(folder: Path) -> TrainerState:
    """Return a checkpoint's step and log, once every byte of the checkpoint is found as it was written.

    Raises:
        ArtifactError: a file is missing or damaged; names it.
    """
    index = _index(folder)
    files = [folder / name for name in index["sha256"]]
    for file in files:
        if not file.is_file():
            raise ArtifactError(f"{file}: missing; {_remedy(folder)}")
    for file, found in zip(files, hash_files(files), strict=True):
        if found != index["sha256"][file.name]:
            raise ArtifactError(f"{file}: its bytes are not those that were written; {_remedy(folder)}")
    state: TrainerState = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    if state.global_step != index["step"]:
        raise ArtifactError(f"{folder / _INDEX}: names another step than {TRAINER_STATE_NAME}; {_remedy(folder)}")
    return state


def restore_optimizer(folder: Path, optimizer: Any) -> None:
    """Give an optimizer of the same parameters its state back."""
    values = read_json(folder / _OPTIMIZER)
    state: dict[int, dict[str, Any]] = {int(index): scalars for index, scalars in values["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in read_tensors(folder / _OPTIMIZER_TENSORS).items():
        _, index, name = key.split(".", 2)
        parameter = parameters[int(index)]
        # A copy: what was read may be the file itself, mapped into memory, and optimizers write in place.
        state[int(index)][name] = like(tensor, parameter) if tensor.shape == parameter.shape else tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def restore_scheduler(folder: Path, scheduler: Any) -> None:
    """Give a scheduler its step count and rates back."""
    scheduler.load_state_dict(read_json(folder / _SCHEDULER))


def restore_random(folder: Path, device: torch.device, rank: int = 0) -> None:
    """Let all generators of random numbers continue where they were.

    Where fewer processes trained than now, the new ones get numbers of their own, the same each time.
    """
    state = read_json(folder / _RANDOM)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    legacy = state["numpy"]
    np.random.set_state(legacy | {"state": legacy["state"] | {"key": np.array(legacy["state"]["key"], np.uint32)}})
    others = state.get("ranks", [])
    if 0 < rank <= len(others):
        state = others[rank - 1]
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)
    if rank > len(others):
        torch.manual_seed(int(torch.randint(2**62, (rank,))[-1]))


@contextmanager
def keep_checkpoint(job: StageJob[Any], step: int) -> Iterator[Path]:
    """Give an empty folder that becomes the checkpoint of ``step``, in place of the one before."""
    folder = job.store.path(job.key, _RUNNING, f"checkpoint-{step}")
    with job.store.writing_folder(folder) as temporary:
        yield temporary
    for other in folder.parent.iterdir():
        if other != folder:
            job.store.remove(other)


def newest_checkpoint(job: StageJob[Any]) -> Path | None:
    """Return the stage's newest checkpoint, finished stage or not; None if it has none."""
    running = job.store.path(job.key, _RUNNING).glob("checkpoint-*")
    steps = {int(folder.name.removeprefix("checkpoint-")): folder for folder in running}
    last = job.store.checkpoint(job.key)
    if last.is_dir():
        steps[checkpoint_step(last)] = last
    return steps[max(steps)] if steps else None


def name_last_checkpoint(job: StageJob[Any]) -> None:
    """Give the newest checkpoint its lasting name and drop the others."""
    newest, last = newest_checkpoint(job), job.store.checkpoint(job.key)
    assert newest is not None, "the last step is always saved"
    if newest != last:
        job.store.remove(last)
        job.store.move(newest, last)
    job.store.remove(job.store.path(job.key, _RUNNING))


def _random_states(device: torch.device) -> dict[str, Any]:
    legacy: Any = np.random.get_state(legacy=False)
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    first, *others = (
        {name: rank.numpy().tobytes().hex() for name, rank in zip(states, ranks, strict=True)}
        for ranks in zip(*(_of_all_ranks(state, device) for state in states.values()), strict=True)
    )
    return {
        "python": random.getstate(),
        "numpy": legacy | {"state": legacy["state"] | {"key": legacy["state"]["key"].tolist()}},
        **first,
        **({"ranks": others} if others else {}),
    }


def _of_all_ranks(state: Tensor, device: torch.device) -> list[Tensor]:
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    sent = state.to(device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(received, sent)
    return [each.cpu() for each in received]


def _bytes(digits: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)


def _index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] == _VERSION and isinstance(index["step"], int) and isinstance(index["sha256"], dict):
            return dict(index)
        problem = f"of version {index['version']}, not {_VERSION}"
    except (OSError, ValueError, KeyError, TypeError):
        problem = "missing or damaged, or the checkpoint is of an older version of this project"
    raise ArtifactError(f"{path}: {problem}; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"delete {folder} and run the same command again: training goes on from the checkpoint before, or anew"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True) + "\n", encoding="utf-8")
