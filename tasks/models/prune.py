"""A smaller student by keeping some of a model's layers."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from schemas.errors import ModelError
from tasks.language_model.head import agree, input_device

_OF_EACH_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of a config that have one entry a layer."""


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
    for name in _OF_EACH_LAYER:
        if getattr(text, name, None) is not None:
            setattr(text, name, [getattr(text, name)[index] for index in kept])
    base.layers = nn.ModuleList([stack[index] for index in kept])
    for position, layer in enumerate(base.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 (torch types attributes as tensors)
    model.config = config
    setattr(base, "config", config)  # noqa: B010
    return model


@torch.no_grad()
def require_same_model(pruned: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Check that a pruned model is still the same once it has been written and ``loaded`` again.

    Raises:
        ModelError: it is another: its config tells by a layer's number what the layer is made of.
    """
    ids = torch.arange(1, 12, device=input_device(pruned))[None] % pruned.config.get_text_config().vocab_size
    ours, theirs = (model.eval()(input_ids=ids, use_cache=False).logits[0] for model in (pruned, loaded))
    # Written so that NaN fails.
    if not agree(ours, theirs, 1e-2):
        raise ModelError(
            f"student.init: {type(pruned).__name__} without some of its layers is another model once it is loaded: its "
            "config tells layers apart by their numbers; set `student.init: pretrained` and a smaller model"
        )
