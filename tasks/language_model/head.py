"""From hidden states to log-probabilities, a chunk of positions at a time: [tokens x vocabulary] never exists."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.errors import ModelError
from tasks.language_model.packed_attention import PackedRow, packed_row

_logger = logging.getLogger(__name__)

# Two sequences in one row, to see whether the second sees the first.
_PROBE_LENGTHS = (6, 5)
_PADS_ROWS = "npd_pads_rows"


@dataclass(frozen=True)
class OutputHead:
    """A causal language model's output projection and what its architecture does to the logits after it.

    Args:
        projection: The linear output embedding.
        scale: Factor on the logits.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None: they stay.
    """

    projection: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OutputHead":
        """Read the head off a model.

        Raises:
            ModelError: the model has no linear output embedding.
        """
        projection: nn.Module | None = model.get_output_embeddings()
        if projection is None or not hasattr(projection, "weight"):
            raise ModelError(f"{type(model).__name__} has no linear output head; only such models can be distilled")
        config = model.config.get_text_config()
        multiplier = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        divisor = getattr(config, "logits_scaling", None)
        if config.model_type == "hyperclovax":  # it multiplies by what Granite divides by
            multiplier, divisor = divisor, None
        scale = multiplier if multiplier is not None else (1.0 if divisor is None else 1.0 / divisor)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(projection, float(scale), softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [n, vocabulary] of hidden states [n, width]."""
        return self.narrow_logits(hidden).float()

    def narrow_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, vocabulary] in the projection's own dtype, float32 where anything is done to them after it.

        In bfloat16 they take half the memory of float32, and are the same numbers.
        """
        logits: Tensor = self.projection(hidden)
        if self.scale != 1.0:
            logits = logits.float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits.float() / self.softcap)
        return logits


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's token ids must be on: where it embeds them."""
    return module_device(model.get_input_embeddings())


def module_device(module: nn.Module) -> torch.device:
    """Return the device that a module with a weight computes on, wherever the weight waits until then."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.device


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that makes the hidden states which its head turns into logits.

    Raises:
        ModelError: it has none of its own.
    """
    # Llama 4's text model names its body after the one of the model that sees images, too.
    body: nn.Module | None = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if body is None:
        raise ModelError(f"{type(model).__name__} has no body apart from its head; it cannot be distilled")
    return body


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the last hidden states [1, tokens, width] of packed sequences that do not see each other.

    ``position_ids`` restart at 0 with each sequence. transformers isolates the sequences from them only without a
    cache and without an attention mask; `packed_sequences` attention does so without a mask matrix. A model that
    ``pads_rows`` gets the sequences as padded batches instead. The states lie on the device of the model's last layer.
    """
    if pads_rows(model):
        return _padded_states(model, input_ids, position_ids)
    with packed_row(model, position_ids) as options:
        output = body_of(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
    states: Tensor = output.last_hidden_state
    return states


def _padded_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Pass sequences of similar length as batches, padded right: no causal layer sees what comes behind a token."""
    groups, places = PackedRow.of(position_ids).layout
    batches = [body_of(model)(input_ids=group.rows(input_ids[0]), use_cache=False) for group in groups]
    states = torch.cat([batch.last_hidden_state.flatten(0, 1) for batch in batches])
    return (states if places is None else states.index_select(0, places.to(states.device)))[None]


def pads_rows(model: PreTrainedModel) -> bool:
    """Say whether ``hidden_states`` gives a model the sequences of a row as padded batches."""
    return bool(getattr(model, _PADS_ROWS, False))


@torch.no_grad()
def pad_rows_if_needed(model: PreTrainedModel) -> None:
    """Let ``hidden_states`` pad a row's sequences if the model cannot keep them apart in one row.

    Layers that carry a state from token to token cannot (Mamba, linear attention, short convolutions), nor models that
    take no positions (ALiBi), nor layers that cut a sequence where the row, not the sequence, has so many tokens.
    """
    chunked = "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    # The probe is shorter than a chunk.
    if chunked or not agree(*probe_states(model), rounding(model)):
        _logger.warning("%s: its sequences pass as padded batches, not packed into one row", type(model).__name__)
        setattr(model, _PADS_ROWS, True)


def probe_states(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the hidden states [tokens, width] of two short sequences packed in one row, and of each alone."""
    device, vocab = input_device(model), model.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + sum(_PROBE_LENGTHS), device=device)[None] % vocab
    positions = torch.cat([torch.arange(length, device=device) for length in _PROBE_LENGTHS])[None]
    pairs = zip(ids.split(_PROBE_LENGTHS, dim=1), positions.split(_PROBE_LENGTHS, dim=1), strict=True)
    alone = torch.cat([hidden_states(model, *pair)[0] for pair in pairs])
    return hidden_states(model, ids, positions)[0], alone


def agree(states: Tensor, others: Tensor, tolerance: float) -> bool:
    """Say whether the norm of the difference of hidden states is at most ``tolerance`` times their norm."""
    states, others = states.float(), others.float()
    return bool((states - others).norm() <= tolerance * others.norm())


def rounding(model: PreTrainedModel) -> float:
    """Return how far two ways to the same hidden states may be apart by rounding, as the share that ``agree`` takes.

    Under autocast that is its type's rounding, whatever the weights are stored in. A leak between sequences changes a
    tenth and more. LLM.int8 rounds by what else is in the batch, which moved a random model's states by three
    hundredths.
    """
    device = input_device(model).type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return 1e-2 if dtype.itemsize >= 4 and not getattr(model, "is_quantized", False) else 5e-2


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check that ``OutputHead`` reproduces the model's own logits, so that an unknown architecture cannot score wrong.

    What is checked is how the model computes here and now, in autocast's type under autocast.

    Raises:
        ModelError: the logits differ, or are not finite, or packed sequences see each other.
    """
    device = input_device(model)
    ids = torch.arange(1, 6, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(5, device=device)[None]
    states, own = _own_logits(model, ids, positions)
    # Of the very states that the model's own head was given: two passes need not round alike, and what they round
    # differently a head makes many times larger in some logits.
    ours = OutputHead.of(model).logits(states).to(own.device)
    if not torch.isfinite(own).all():
        raise ModelError(
            f"{model.name_or_path}: its logits are not finite: the weights are damaged or overflow in their dtype "
            f"({model.dtype}); try `dtype: float32`"
        )
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"{type(model).__name__} transforms its logits in a way this project does not know "
            f"(largest difference {(own - ours).abs().max().item():.3g}); it cannot be distilled yet"
        )
    body = hidden_states(model, ids, positions)[0]
    if not agree(body, states.to(body.device), rounding(model)):
        raise ModelError(
            f"{type(model).__name__} makes its logits of other hidden states than its body returns; it cannot be "
            "distilled yet"
        )
    check_isolation(model)


def _own_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states [tokens, width] that reach a model's output head in a pass of its own over one packed row, and
    what comes out: float32 logits [tokens, vocabulary]."""
    given: list[Tensor] = []
    projection = OutputHead.of(model).projection
    with (
        projection.register_forward_pre_hook(lambda module, args: given.append(args[0])),
        packed_row(model, position_ids) as options,
    ):
        output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
    if len(given) != 1:
        raise ModelError(f"{type(model).__name__} does not make its logits by its output head; it cannot be distilled")
    (states,) = given
    return states.reshape(-1, states.shape[-1]), output.logits[0].float()


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Check that packed sequences do not see each other, whatever the model's layers and its attention implementation.

    Raises:
        ModelError: they do, though ``pad_rows_if_needed`` may have looked, or padding behind a token changes its state.
    """
    if not agree(*probe_states(model), rounding(model)):
        attention = model.config.get_text_config()._attn_implementation
        raise ModelError(
            f"{type(model).__name__}: packed sequences see each other, or what pads them, with attention `{attention}`"
            "; try `attn_implementation: eager`. If that does not help, the model is not causal: it cannot be distilled"
        )
