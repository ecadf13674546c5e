"""Decoding with slots: a row that ends gives its place to the next prompt, and no row waits for another."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tasks.language_model.head import OutputHead, body_of, input_device
from tasks.rollout.context import response_limits
from tasks.rollout.engine import Finished, Requests, Responses, SamplingSettings
from tasks.rollout.open_shard import OpenShard
from tasks.rollout.sampling import choose_tokens, logprobs_of
from tasks.rollout.seeds import uniforms
from tasks.rollout.slot_cache import ATTENTION, SlotCache

_PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, in one pass; a longer prompt has a pass of its own."""
_CAPACITY_STEP = 64
_VISIBLE_STEP = 16
"""Attention kernels want lengths that are multiples of 8 or 16; the mask hides what is too much."""


class SlotDecoder:
    """Decodes shards by continuous batching, sampling each row with its own seed.

    transformers' own `generate_batch` is no choice here: it has one seed for all and draws in the order in which its
    scheduler happens to run, so a sample would depend on its neighbours.

    Args:
        model: A causal language model that `fits_slots`; its attention becomes `grouped_attention`.
        slots: Sequences decoded at a time.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        model.set_attn_implementation(ATTENTION)
        self._model = model
        self._head = OutputHead.of(model)
        self._slots = slots
        self.rows_stepped = 0
        """Slots of all decoding steps together."""
        self.rows_live = 0
        """Those of them that held a sequence still going."""

    @torch.inference_mode()
    def decode(self, requests: Requests, settings: SamplingSettings, finished: Finished) -> Responses:
        """Answer one shard.

        Prompts wait in a queue, longest first: what does not fit into memory fails early. Free slots are filled from
        it by one prefill of several prompts; once it is empty, slots that came free are taken out of the batch.
        """
        shard = _Decoding(self._model, self._head, requests, settings, finished, self._slots)
        while True:
            if shard.wants_prompts():
                for newcomers in shard.newcomers():
                    shard.prefill(newcomers)
            elif shard.live.any():
                shard.compact()
                self.rows_stepped += len(shard.live)
                self.rows_live += int(shard.live.sum())
                shard.step()
            else:
                return shard.rollouts()


class _Decoding:
    """The state of one shard's decoding: of each slot, on the host what plans the next pass, on the device the rest.

    Args:
        model: See SlotDecoder.
        head: Its output head.
        requests: The shard.
        settings: How to sample.
        finished: Told of every response.
        slots: Sequences at a time, at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: OutputHead,
        requests: Requests,
        settings: SamplingSettings,
        finished: Finished,
        slots: int,
    ) -> None:
        self._model, self._head, self._requests, self._settings = model, head, requests, settings
        self._finished = finished
        self._device = input_device(model)
        self._lengths = requests.lengths
        self._limits = response_limits(self._lengths, settings.context, settings.max_new_tokens)
        self._queue = np.argsort(-self._lengths, kind="stable")
        self._answers = OpenShard(len(self._lengths))
        self._longest = int((self._lengths + self._limits).max())
        slots, limit = min(slots, len(self._queue)), int(self._limits.max())
        # A prefill costs about as much as a step for the others, so a few slots wait for each other.
        self._refill = max(1, slots // 16)
        # Which sample a slot holds, whether it goes on, the tokens it has in the cache and the tokens drawn for it.
        self._sample = np.zeros(slots, np.int64)
        self.live = np.zeros(slots, np.bool_)
        self._cached = np.zeros(slots, np.int64)
        self._drawn = np.zeros(slots, np.int64)
        # The same on the device, where a free slot stays at its last token and draws it again; and what was drawn.
        self._all = torch.arange(slots, device=self._device)
        self._going = self._zeros(slots, dtype=torch.bool)
        self._positions = self._zeros(slots)
        self._counts = self._zeros(slots)
        self._last = self._zeros(slots)
        self._ends_at = self._zeros(slots)
        self._draws = self._zeros(slots, limit, dtype=torch.float64)
        self._tokens = self._zeros(slots, limit, dtype=torch.int32)
        self._token_logprobs = self._zeros(slots, limit, dtype=torch.float32)
        self._end_ids = torch.tensor(settings.end_ids, device=self._device)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._cache = SlotCache(layers, slots, self._capacity(int(self._lengths.max()) + _CAPACITY_STEP))

    def wants_prompts(self) -> bool:
        """Say whether enough slots are free for the prompts that wait."""
        free = len(self.live) - int(self.live.sum())
        return len(self._queue) > 0 and free >= self._refill

    def newcomers(self) -> Iterator[NDArray[np.int64]]:
        """Take the next samples off the queue, in batches of at most `_PREFILL_TOKENS` padded tokens."""
        free = len(self.live) - int(self.live.sum())
        taken, self._queue = np.split(self._queue, [free])
        while len(taken):
            batch, taken = np.split(taken, [max(1, _PREFILL_TOKENS // int(self._lengths[taken[0]]))])
            yield batch

    def prefill(self, samples: NDArray[np.int64]) -> None:
        """Put ``samples``, the longest first, into free slots and draw their first tokens."""
        slots = np.flatnonzero(~self.live)[: len(samples)]
        lengths, limits = self._lengths[samples], self._limits[samples]
        width = int(lengths[0])
        # Right padding comes after all that is real, where causal attention does not look.
        padded = np.full((len(samples), width), self._settings.end_ids[0], np.int64)
        padded[np.arange(width) < lengths[:, None]] = np.concatenate([self._requests.prompts[i] for i in samples])
        rows = self._tensor(slots)
        self._cache.prefill_into(rows)
        hidden = self._forward(
            self._tensor(padded), torch.arange(width, device=self._device).expand(len(samples), -1), None
        )
        if self._settings.temperature > 0:
            draws = np.zeros((len(samples), self._draws.shape[1]))
            for row, (seed, limit) in enumerate(zip(self._requests.seeds[samples], limits, strict=True)):
                draws[row, :limit] = uniforms(int(seed), int(limit))
            self._draws[rows] = self._tensor(draws)
        self._positions[rows] = self._tensor(lengths)
        self._counts[rows] = 0
        self._ends_at[rows] = self._tensor(limits)
        self._going[rows] = True
        self._sample[slots], self._cached[slots], self._drawn[slots], self.live[slots] = samples, lengths, 0, True
        self._draw(slots, rows, hidden[self._all[: len(samples)], self._tensor(lengths) - 1])

    def compact(self) -> None:
        """Once nothing waits, take free slots out of the batch, a quarter of it or more at a time."""
        live = np.flatnonzero(self.live)
        if len(self._queue) or 4 * len(live) > 3 * len(self.live):
            return
        kept = self._tensor(live)
        self._cache.rearrange(kept, self._cache.capacity)
        self._all = self._all[: len(live)]
        for name in ("_going", "_positions", "_counts", "_last", "_ends_at", "_draws", "_tokens", "_token_logprobs"):
            setattr(self, name, getattr(self, name).index_select(0, kept))
        self._sample, self._cached, self._drawn = self._sample[live], self._cached[live], self._drawn[live]
        self.live = self.live[live]

    def step(self) -> None:
        """Draw one more token for every slot."""
        needed = int(self._cached[self.live].max()) + 1
        if needed > self._cache.capacity:
            # Half as much again each time: copies stay rare, and little is held that is never used.
            self._cache.rearrange(None, self._capacity(max(needed, self._cache.capacity * 3 // 2)))
        visible = min(_rounded(needed, _VISIBLE_STEP), self._cache.capacity)
        mask = torch.arange(visible, device=self._device) <= self._positions[:, None]
        self._cache.append_at(self._all, self._positions, visible)
        hidden = self._forward(self._last[:, None], self._positions[:, None], mask[:, None, None])
        self._draw(np.arange(len(self.live)), self._all, hidden[:, 0])
        self._positions += self._going
        self._cached[self.live] += 1

    def rollouts(self) -> Responses:
        """Return the shard's responses."""
        return self._answers.rollouts(self._settings.end_ids)

    def _draw(self, slots: NDArray[np.int64], rows: Tensor, hidden: Tensor) -> None:
        """Draw the next token of ``slots`` from their last states [slots, width]; free those that end."""
        settings = self._settings
        logits = self._head.logits(hidden)
        at = self._counts[rows]
        chosen = choose_tokens(
            logits,
            self._draws[rows, at],
            temperature=settings.temperature,
            top_p=settings.top_p,
            vocab_size=settings.vocab_size,
        )
        self._tokens[rows, at] = chosen.to(torch.int32)
        self._token_logprobs[rows, at] = logprobs_of(logits, chosen)
        self._last[rows] = chosen
        going = self._going[rows] & ~torch.isin(chosen, self._end_ids) & (at + 1 < self._ends_at[rows])
        self._going[rows] = going
        self._counts[rows] = at + going
        before = slots[self.live[slots]]
        self._drawn[before] += 1
        # The one wait for the device in a pass.
        self.live[slots] = going.cpu().numpy()
        ended = before[~self.live[before]]
        if len(ended):
            self._collect(ended)

    def _collect(self, slots: NDArray[np.int64]) -> None:
        """Copy what was drawn for slots that ended to the host."""
        rows, longest = self._tensor(slots), int(self._drawn[slots].max())
        tokens = self._tokens[rows, :longest].cpu().numpy()
        logprobs = self._token_logprobs[rows, :longest].cpu().numpy()
        for row, (sample, count) in enumerate(zip(self._sample[slots], self._drawn[slots], strict=True)):
            # Copies, so that a padded block does not stay in memory for the sake of its rows.
            self._answers.put(int(sample), tokens[row, :count].copy(), logprobs[row, :count].copy())
        self._finished(len(slots))

    def _forward(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        states: Tensor = body_of(self._model)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return states

    def _capacity(self, tokens: int) -> int:
        """Return ``tokens`` rounded up, but no more than the longest sequence can use."""
        return min(_rounded(tokens, _CAPACITY_STEP), _rounded(self._longest, _VISIBLE_STEP))

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)


def _rounded(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
