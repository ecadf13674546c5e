"""A model's trained tensors in safetensors files, read back bit for bit: no file here can hold code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from schemas.errors import ArtifactError

MODEL_NAME = "model.safetensors"
ADAPTERS_NAME = "adapter_model.safetensors"
ADAPTERS_CONFIG_NAME = "adapter_config.json"


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return all of a model's weights by name, or its adapters if it has such; see ``whole``."""
    return whole(_tensors(model))


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors that are divided among processes (FSDP2); every process must call this.

    Returns:
        Tensors that were whole as they are; the gathered ones, on the CPU, in the first process only.
    """
    gathered = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            gathered[name] = tensor
            continue
        full = tensor.full_tensor()
        if tensor.device_mesh.get_rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a copy of a whole tensor, divided among processes as ``other`` is."""
    if not isinstance(other, DTensor):
        return tensor.clone()
    # Every process reads the same file, so none has to send.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None).clone()


def save_weights(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what ``whole_weights(model)`` returned; adapters with their settings, as `peft` names them."""
    if isinstance(model, PreTrainedModel):
        write_tensors(folder / MODEL_NAME, tensors)
        return
    settings = model.peft_config["default"].to_dict()  # type: ignore[union-attr, index]
    # Where the model lay on this machine says nothing elsewhere.
    settings["base_model_name_or_path"] = None
    write_tensors(folder / ADAPTERS_NAME, tensors)
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
    (folder / ADAPTERS_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy what ``save_weights`` wrote into a model of the same architecture.

    Raises:
        ArtifactError: the file is missing or damaged, or holds other tensors than the model.
    """
    path = folder / (MODEL_NAME if isinstance(model, PreTrainedModel) else ADAPTERS_NAME)
    own, saved = _tensors(model), read_tensors(path)
    for name in sorted(own.keys() | saved.keys()):
        ours, theirs = (None if t is None else (tuple(t.shape), t.dtype) for t in (own.get(name), saved.get(name)))
        if ours != theirs:
            raise ArtifactError(f"{path}: tensor `{name}` is {theirs}, the model's is {ours}; run its stage again")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def has_adapters(folder: Path) -> bool:
    """Say whether ``folder`` holds adapters, not a whole model."""
    return (folder / ADAPTERS_NAME).is_file()


def merge_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return ``base`` with the adapters of ``folder`` merged into its weights.

    Raises:
        ArtifactError: a file is missing or damaged, or the adapters are another model's.
    """
    from peft import PeftConfig, get_peft_model

    settings = PeftConfig.from_peft_type(**read_json(folder / ADAPTERS_CONFIG_NAME))  # type: ignore[no-untyped-call]
    model: Any = get_peft_model(base, settings)
    load_weights(model, folder)
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, each with its own storage."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors onto the CPU.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run its stage again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file: {error}; run its stage again") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run its stage again") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable JSON file: {error}; run its stage again") from None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that make the model, or its adapters; of those that are one (tied weights), the first."""
    # The parameters themselves: of a divided one, a process's part may be empty and lie nowhere.
    found = model.state_dict(keep_vars=True)
    if not isinstance(model, PreTrainedModel):
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(model, found, save_embedding_layers=False)
    places: set[int | tuple[int, int]] = set()
    distinct = {}
    for name, tensor in found.items():
        place = id(tensor) if isinstance(tensor, DTensor) else (tensor.data_ptr(), tensor.numel())
        if place not in places:
            places.add(place)
            distinct[name] = tensor.detach()
    return distinct
