"""What training continues from: weights, optimizer, schedule, step and log, random numbers. Nothing is pickled."""

import dataclasses
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from schemas.errors import ArtifactError
from schemas.manifest import hash_file
from tasks.language_model.weights import read_json, read_tensors, save_weights, write_tensors

CheckpointFolder = Callable[[int], AbstractContextManager[Path]]
"""Given the optimizer step, an empty folder that becomes the step's checkpoint when the context ends without error."""

_INDEX = "checkpoint.json"
_VERSION = 1
_OPTIMIZER, _OPTIMIZER_TENSORS = "optimizer.json", "optimizer.safetensors"
_SCHEDULER, _RANDOM = "scheduler.json", "rng.json"


def write_checkpoint(
    folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, state: TrainerState, device: torch.device
) -> None:
    """Fill an empty folder; the same training state gives the same bytes.

    Args:
        folder: Where to.
        model: The student, or its adapters.
        optimizer: A torch optimizer, or accelerate's wrapper of one.
        scheduler: A torch scheduler.
        state: The trainer's step and log.
        device: Where it trains, whose random numbers are kept beside the CPU's.
    """
    save_weights(model, folder)
    _write_optimizer(folder, optimizer.state_dict())
    _write_json(folder / _SCHEDULER, scheduler.state_dict())
    _write_json(folder / _RANDOM, _random_state(device))
    # How often to save changes no result, so it leaves no trace in one.
    unsaid: Any = {"save_steps": None}
    dataclasses.replace(state, **unsaid).save_to_json(str(folder / TRAINER_STATE_NAME))
    files = sorted(folder.iterdir())
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip((file.name for file in files), pool.map(hash_file, files), strict=True))
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
    with ThreadPoolExecutor() as pool:
        for file, found in zip(files, pool.map(hash_file, files), strict=True):
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
    for key, tensor in read_tensors(folder / _OPTIMIZER_TENSORS).items():
        _, index, name = key.split(".", 2)
        # A copy: what was read may be the file itself, mapped into memory, and optimizers write in place.
        state[int(index)][name] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def restore_scheduler(folder: Path, scheduler: Any) -> None:
    """Give a scheduler its step count and rates back."""
    scheduler.load_state_dict(read_json(folder / _SCHEDULER))


def restore_random(folder: Path, device: torch.device) -> None:
    """Let all generators of random numbers continue where they were."""
    state = read_json(folder / _RANDOM)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    legacy = state["numpy"]
    np.random.set_state(legacy | {"state": legacy["state"] | {"key": np.array(legacy["state"]["key"], np.uint32)}})
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _write_optimizer(folder: Path, values: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    scalars = {}
    for index, entries in values["state"].items():
        tensors |= {f"state.{index}.{name}": v for name, v in entries.items() if isinstance(v, Tensor)}
        scalars[index] = {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
    write_tensors(folder / _OPTIMIZER_TENSORS, tensors)
    _write_json(folder / _OPTIMIZER, {"state": scalars, "param_groups": values["param_groups"]})


def _random_state(device: torch.device) -> dict[str, Any]:
    legacy: Any = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": legacy | {"state": legacy["state"] | {"key": legacy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


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
