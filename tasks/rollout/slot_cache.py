"""Keys and values of sequences in slots, each with a length of its own, and the attention that reads them."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "grouped_sdpa"
"""What `grouped_attention` is called in a model's config."""


def fits_slots(model: PreTrainedModel, longest_sequence: int) -> bool:
    """Say whether ``model`` can decode over a SlotCache: every layer sees the whole sequence and keeps nothing else,
    and all lie on one device.

    Args:
        model: A causal language model.
        longest_sequence: In tokens; a sliding window no shorter than this is no window.
    """
    config = model.config.get_text_config(decoder=True)
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return False
    if model._is_stateful or not model._supports_attention_backend or not model._supports_sdpa:
        return False
    # Kernels that cap the scores, or were asked for as they are written, are not replaced.
    if config._attn_implementation == "eager" or getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    # Sparse, recurrent and compressed layers have classes of their own; layers that share a cache are left out.
    layers = DynamicCache(config=config).layers
    whole = (
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest_sequence)
        for layer in layers
    )
    return len(layers) == config.num_hidden_layers and all(whole)


class _Cursor:
    """Where the next forward pass writes, shared by all layers; ``positions`` is None in a prefill."""

    rows: Tensor
    positions: Tensor | None = None
    visible: int = 0


class SlotLayer(DynamicLayer):
    """One layer's keys and values, [slots, heads, capacity, width], written in place.

    Args:
        slots: Sequences held.
        capacity: Tokens of each.
        cursor: Where the next pass writes.
    """

    def __init__(self, slots: int, capacity: int, cursor: _Cursor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape = slots, capacity
        self._cursor = cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, once heads, width, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        slots, capacity = self._shape
        # Zeros: what is not written yet takes part in attention with weight 0, which must not meet a NaN.
        self.keys = key_states.new_zeros(slots, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states [rows, heads, tokens, width]; return those that the pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        at = self._cursor
        if at.positions is None:
            width = key_states.shape[2]
            self.keys[at.rows, :, :width] = key_states
            self.values[at.rows, :, :width] = value_states
            return key_states, value_states
        self.keys[at.rows, :, at.positions] = key_states.squeeze(2)
        self.values[at.rows, :, at.positions] = value_states.squeeze(2)
        return self.keys[:, :, : at.visible], self.values[:, :, : at.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a pass attends to, and the first of them."""
        return (query_length if self._cursor.positions is None else self._cursor.visible), 0

    def get_seq_length(self) -> int:
        """Return 0: every pass brings its own positions."""
        return 0

    def rearrange(self, slots: Tensor | None, capacity: int) -> None:
        """Keep only ``slots`` (None: all) and make room for ``capacity`` tokens."""
        assert self.keys is not None
        assert self.values is not None
        self.keys = _rearranged(self.keys, slots, capacity)
        self.values = _rearranged(self.values, slots, capacity)


class SlotCache(Cache):
    """Every layer's SlotLayer.

    Args:
        layers: How many.
        slots: Sequences held.
        capacity: Tokens of each, at first.
    """

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self._cursor = _Cursor()
        self.capacity = capacity
        super().__init__(layers=[SlotLayer(slots, capacity, self._cursor) for _ in range(layers)])

    def prefill_into(self, slots: Tensor) -> None:
        """Let the next pass write sequences from their first token on into ``slots`` [rows]."""
        self._cursor.rows, self._cursor.positions = slots, None

    def append_at(self, slots: Tensor, positions: Tensor, visible: int) -> None:
        """Let the next pass write one token a slot, at its ``positions`` [slots], and attend to ``visible`` tokens."""
        self._cursor.rows, self._cursor.positions, self._cursor.visible = slots, positions, visible

    def rearrange(self, slots: Tensor | None, capacity: int) -> None:
        """Keep only ``slots`` (None: all) and make room for ``capacity`` tokens; one layer at a time is held twice."""
        self.capacity = capacity
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.rearrange(slots, capacity)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `sdpa` does, without a copy of the keys and values for each query head that shares them.

    With a mask, transformers' `sdpa` repeats the whole cache for grouped queries at each token. One new token a
    sequence leaves the place of the query's length free, and the heads of a group go there.

    Args:
        module: The attention layer.
        query: [rows, query heads, tokens, width].
        key: [rows, key heads, keys, width].
        value: [rows, key heads, keys, width].
        attention_mask: Bool [rows, 1, 1, keys] with one token a row; None: causal.
        scaling: Factor on the scores.
        kwargs: What other kernels take.

    Returns:
        [rows, tokens, query heads, width], and no weights.
    """
    if attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads = query.shape[:2]
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], query.shape[3])
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(ATTENTION, grouped_attention)


def _rearranged(states: Tensor, slots: Tensor | None, capacity: int) -> Tensor:
    if slots is not None:
        states = states.index_select(0, slots)
    held = states.shape[2]
    if capacity == held:
        return states
    larger = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
    larger[:, :, :held] = states
    return larger
