"""Causal attention over packed rows that costs what their sequences cost: no [tokens x tokens] mask is made.

Registered with transformers as the attention implementation ``packed_sequences``. On a GPU in half precision it is one
varlen flash kernel a layer. Elsewhere sequences of similar length are padded right into one batch: under causal
attention no token sees the padding behind it, so that needs no mask either.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from schemas.errors import ModelError
from tasks.language_model.ragged import offsets_of

PACKED_SEQUENCES = "packed_sequences"

# Sequences share a batch while the shortest has at least this part of the longest's tokens.
_FILL = 0.8
# torch 2.11 has no such option: there each query head is given its own copy of the key head.
_VARLEN_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class LengthGroup:
    """Sequences of similar length, as one batch.

    Args:
        length: Tokens of the longest.
        index: Position in the row of each batch entry, int64 [sequences * length]; behind a sequence's end its last
            token is repeated. None: the row as it lies.
    """

    length: int
    index: Tensor | None

    def rows(self, values: Tensor) -> Tensor:
        """Return values [tokens, ...] as [sequences, length, ...]."""
        taken = values if self.index is None else values.index_select(0, self.index)
        return taken.view(-1, self.length, *values.shape[1:])

    def batch(self, states: Tensor) -> Tensor:
        """Return states [tokens, heads, width] as [sequences, heads, length, width]."""
        return self.rows(states).transpose(1, 2)


@dataclass
class PackedRow:
    """Where the sequences of a packed row lie, found once for all layers.

    Args:
        starts: Offsets of the sequences and the number of tokens, int32 [sequences + 1], on the model's device.
        lengths: Tokens of each sequence.
        unserved_windows: Sliding windows that the model has asked a mask for and no attention layer has named yet.
    """

    starts: Tensor
    lengths: NDArray[np.int64]
    unserved_windows: set[int] = field(default_factory=set)
    _bands: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _elsewhere: dict[torch.device, "PackedRow"] = field(default_factory=dict)

    @classmethod
    def of(cls, position_ids: Tensor) -> "PackedRow":
        """Read a row's sequences off its position ids [1, tokens]; waits for their device once."""
        (positions,) = position_ids
        new = torch.ones_like(positions, dtype=torch.bool)
        new[1:] = positions.diff() != 1
        starts = functional.pad(new.nonzero()[:, 0], (0, 1), value=len(positions)).int()
        return cls(starts, np.diff(starts.cpu().numpy().astype(np.int64)))

    def at(self, device: torch.device) -> "PackedRow":
        """Return the row for layers on ``device``: a model's may lie on several."""
        if device == self.starts.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = PackedRow(self.starts.to(device), self.lengths, self.unserved_windows)
        return self._elsewhere[device]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @cached_property
    def layout(self) -> tuple[list[LengthGroup], Tensor | None]:
        """The row's groups, and where in them, one after another, each token lies: int64 [tokens]; None: in order."""
        if (self.lengths == self.lengths[0]).all():
            return [LengthGroup(int(self.lengths[0]), None)], None
        starts, device = offsets_of(self.lengths), self.starts.device
        groups, places, size = [], np.empty(starts[-1], np.int64), 0
        for rows in length_groups(self.lengths):
            lengths = self.lengths[rows, None]
            steps = np.arange(lengths[0, 0])
            index = (starts[rows, None] + np.minimum(steps, lengths - 1)).ravel()
            real = np.flatnonzero(steps < lengths)
            places[index[real]] = size + real
            groups.append(LengthGroup(len(steps), torch.from_numpy(index).to(device)))
            size += len(index)
        return groups, torch.from_numpy(places).to(device)

    def band(self, length: int, window: int) -> Tensor:
        """Return which of ``length`` tokens sees which under a causal sliding window, bool [length, length]."""
        if (length, window) not in self._bands:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.starts.device)
            self._bands[length, window] = seen.tril().triu(1 - window)
        return self._bands[length, window]


def length_groups(lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Group sequences by length, longest first: each has at least ``_FILL`` of its group's longest.

    >>> [rows.tolist() for rows in length_groups(np.array([3, 10, 1, 8, 3]))]
    [[1, 3], [0, 4], [2]]
    """
    order = np.argsort(-lengths, kind="stable")
    falling = -lengths[order]
    groups, start = [], 0
    while start < len(order):
        stop = int(np.searchsorted(falling, _FILL * falling[start], side="right"))
        groups.append(order[start:stop])
        start = stop
    return groups


# The mask function is told nothing of the row; what the attention layers need goes to them as a keyword, because
# gradient checkpointing calls them again after the forward has ended.
_ROW: ContextVar[PackedRow | None] = ContextVar("packed_row", default=None)


@contextmanager
def packed_row(model: PreTrainedModel, position_ids: Tensor) -> Iterator[dict[str, Any]]:
    """Yield the keywords that a forward over one packed row needs; none for a model with another implementation.

    Args:
        model: The language model that is about to be called.
        position_ids: int64 [1, tokens], restarting with each sequence.

    Raises:
        ModelError: the model does something to its attention that this implementation would leave out.
    """
    if model.config.get_text_config()._attn_implementation != PACKED_SEQUENCES:
        yield {}
        return
    row = PackedRow.of(position_ids)
    token = _ROW.set(row)
    try:
        yield {"packed_row": row}
    finally:
        _ROW.reset(token)
    if row.unserved_windows:
        raise _unsupported(model, f"attend within {min(row.unserved_windows)} tokens: no layer passes it a window")


def packed_mask(**options: Any) -> Tensor | None:
    """Return no mask for a packed row, and sdpa's for any other call (padding, a cache).

    Raises:
        ModelError: the row's mask is more than causal attention and a sliding window within each sequence.
    """
    row = _ROW.get()
    if row is None:
        return sdpa_mask(**options)
    # For one sequence alone, plain causal attention is always told that it may do without a mask.
    needed = len(row.lengths) == 1 and not options.get("allow_is_causal_skip", True)
    own = options.get("use_vmap") or "allow_is_bidirectional_skip" in options
    if options.get("attention_mask") is not None or needed or own:
        raise _unsupported(options.get("config"), "apply a mask of the model's own")
    if options.get("local_size") is not None:
        row.unserved_windows.add(options["local_size"])
    return None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed_row: PackedRow | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence of a packed row; without ``packed_row`` as sdpa does.

    Args:
        module: The attention layer.
        query: [1, heads, tokens, width].
        key: [1, key heads, tokens, width].
        value: [1, key heads, tokens, value width].
        attention_mask: None for a packed row.
        dropout: On the attention weights.
        scaling: On the scores; None: one over the root of the width.
        sliding_window: Tokens each token sees, itself included; None: its whole sequence so far.
        is_causal: None: as the layer says.
        packed_row: From ``packed_row``.
        options: Whatever else the architecture passes.

    Returns:
        States [1, tokens, heads, value width], and no attention weights.

    Raises:
        ModelError: the layer asks for what neither kernel does.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise _unsupported(module, f"apply `{name}`")
    packed_row = None if packed_row is None else packed_row.at(query.device)
    if packed_row is None:
        if _ROW.get() is not None:
            raise _unsupported(module, "find the sequences: they do not reach the attention layers")
        states, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return states, None
    if attention_mask is not None or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _unsupported(module, "attend to later tokens or apply a mask of the model's own")
    if sliding_window is not None:
        packed_row.unserved_windows.discard(sliding_window)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    width = value.shape[-1]
    if width < query.shape[-1]:  # the fast kernels want one width
        value = functional.pad(value, (0, query.shape[-1] - width))
    window = sliding_window if sliding_window is not None and sliding_window < packed_row.longest else None
    attend = _varlen if dropout == 0 and _varlen_takes(query, key, value) else _grouped
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(query, key, value, packed_row, scaling, window, dropout)[None, ..., :width], None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None, window: int | None, _: float
) -> Tensor:
    options: dict[str, Any] = {"enable_gqa": True} if _VARLEN_SHARES_HEADS else {}
    if not _VARLEN_SHARES_HEADS:
        key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    states = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        row.starts,
        row.starts,
        row.longest,
        row.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # tokens seen before the token itself
        **options,
    )
    assert isinstance(states, Tensor)  # no auxiliary output was asked for
    return states


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None, window: int | None, dropout: float
) -> Tensor:
    if query.is_cuda:  # where kernels other than flash do not share key heads, and fall back to [length x length]
        key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    groups, places = row.layout
    outputs = []
    for group in groups:
        band = None if window is None or window >= group.length else row.band(group.length, window)
        states = functional.scaled_dot_product_attention(
            group.batch(query),
            group.batch(key),
            group.batch(value),
            attn_mask=band,
            dropout_p=dropout,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        outputs.append(states.transpose(1, 2).flatten(0, 1))
    return outputs[0] if places is None else torch.cat(outputs).index_select(0, places)


def _repeat_heads(query: Tensor, states: Tensor) -> Tensor:
    """Return ``states`` [tokens, key heads, width] with a head for each of the query's."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def _varlen_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= _widest_head(query.device)
    )


@cache
def _widest_head(device: torch.device) -> int:
    """Return the widest head that flash attention takes forward and backward on this GPU; 0: it has no such kernel."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return 0
    return 256 if capability in ((8, 0), (9, 0), (10, 0)) else 192


def _unsupported(asker: object, what: str) -> ModelError:
    return ModelError(
        f"{type(asker).__name__}: attention `{PACKED_SEQUENCES}` cannot {what}; "
        "set `attn_implementation` to one of transformers' own (`sdpa`, `eager`)"
    )


AttentionInterface.register(PACKED_SEQUENCES, packed_attention)
AttentionMaskInterface.register(PACKED_SEQUENCES, packed_mask)
