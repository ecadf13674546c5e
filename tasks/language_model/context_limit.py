"""The longest sequence that a model takes in a run."""

from typing import Any

from transformers import PreTrainedConfig

from schemas.errors import ModelError

_LONG_ROPE = ("longrope", "su")


def context_limit(config: PreTrainedConfig, name: str) -> int:
    """Return the longest sequence, in tokens, up to which a model's states depend on that sequence alone.

    That is `max_position_embeddings`, beyond which dynamic NTK makes its frequencies anew. Of longrope models it is
    the length they were trained on at first: transformers takes the factors for long texts for all of a batch or
    packed row as soon as one sequence in it is longer, so that the others change with their neighbours.

    Args:
        config: The model's.
        name: What errors call the model.

    Raises:
        ModelError: the config does not say.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is None:
        raise ModelError(f"{name}: its config does not say how long a sequence may be; add `max_position_embeddings`")
    limits = [int(longest)]
    for rope in _rope_parameters(text):
        if rope.get("rope_type", rope.get("type")) in _LONG_ROPE:
            # Phi-3 says it beside its rope parameters, which then counts.
            first = getattr(text, "original_max_position_embeddings", None)
            limits.append(int(first or rope.get("original_max_position_embeddings") or longest))
    return min(limits)


def _rope_parameters(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary parameters of a model, of each kind of its layers where they have their own."""
    # The older name is that of models which bring their own code.
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
