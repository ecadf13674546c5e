"""The embedded engine: a transformers model that decodes in slots where its attention allows it."""

from collections.abc import Iterable, Iterator

from tasks.collector import free_memory
from tasks.language_model.loading import load_ref
from tasks.language_model.sources import ModelRef
from tasks.rollout.engine import Finished, Requests, Responses, SamplingSettings
from tasks.rollout.slot_cache import fits_slots
from tasks.rollout.slots import SlotDecoder
from tasks.rollout.static_batches import BatchDecoder


class TransformersEngine:
    """Decodes shard after shard, ``batch_size`` sequences at a time.

    A shard starts from an empty batch, so that its bytes depend on it alone: one that is sampled again by a resumed
    stage is the same file.

    Args:
        model: What to sample from; it is loaded here.
        batch_size: Sequences decoded at a time.
        longest_sequence: No prompt with its response will be longer, in tokens.
    """

    def __init__(self, model: ModelRef, batch_size: int, longest_sequence: int) -> None:
        loaded = load_ref(model)
        self._decoder: SlotDecoder | BatchDecoder = (
            SlotDecoder(loaded, batch_size)
            if fits_slots(loaded, longest_sequence)
            else BatchDecoder(loaded, batch_size)
        )

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        """See Engine."""
        for number, shard in enumerate(requests):
            yield number, self._decoder.decode(shard, settings, finished)

    def counters(self) -> dict[str, float | str]:
        """Return how it decodes, and the share of the rows computed in decoding steps that held a live sequence."""
        decoder = self._decoder
        return {
            "decoding": "slots" if isinstance(decoder, SlotDecoder) else "batches",
            "slot_use": round(decoder.rows_live / decoder.rows_stepped, 4) if decoder.rows_stepped else 1.0,
        }

    def close(self) -> None:
        """See Engine."""
        del self._decoder
        free_memory()
