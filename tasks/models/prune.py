"""A smaller student by keeping some of a model's layers."""

import copy

from torch import nn
from transformers import PreTrainedModel

from schemas.errors import ModelError


def layers_to_keep(keep: int | list[int], layers: int) -> list[int]:
    """Return which of ``layers`` layers to keep: those listed, or a count spread evenly, first and last included.

    >>> layers_to_keep(4, 10)
    [0, 3, 6, 9]

    Raises:
        ModelError: more layers are asked for than there are.
    """
    if isinstance(keep, list):
        if keep[-1] >= layers:
            raise ModelError(f"student.keep_layers: layer {keep[-1]} is not there; layers are 0 to {layers - 1}")
        return keep
    if keep > layers:
        raise ModelError(f"student.keep_layers: {keep} layers asked for, the model has {layers}")
    if keep == 1:
        return [0]
    return [round(index * (layers - 1) / (keep - 1)) for index in range(keep)]


def prune_layers(model: PreTrainedModel, keep: int | list[int]) -> PreTrainedModel:
    """Return ``model`` with only some of its decoder layers; the weights of those are untouched.

    Raises:
        ModelError: the model keeps its layers in no list named ``layers``, or has too few.
    """
    base = model.base_model
    stack = getattr(base, "layers", None)
    if not isinstance(stack, nn.ModuleList):
        raise ModelError(f"student.init: {type(model).__name__} has no `layers` list, so it cannot be pruned")
    kept = layers_to_keep(keep, len(stack))
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = [text.layer_types[index] for index in kept]
    base.layers = nn.ModuleList([stack[index] for index in kept])
    for position, layer in enumerate(base.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 (torch types attributes as tensors)
    model.config = config
    setattr(base, "config", config)  # noqa: B010
    return model
