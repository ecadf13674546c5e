"""What an engine is given and what it returns, whichever engine it is."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from schemas.config import GenerateConfig
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef

TokenIds = NDArray[np.int32]
Finished = Callable[[int], None]
"""Called while responses are sampled, with how many more are finished."""


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Only the most likely tokens that together reach this probability can be drawn; 1 keeps all.
        max_new_tokens: Longest response, in tokens, where the context does not end it earlier.
        context: Longest prompt and response together, in tokens.
        end_ids: Tokens that end a response, and belong to it.
        vocab_size: Only ids below this can be drawn: rows above are padding of the vocabulary.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    context: int
    end_ids: tuple[int, ...]
    vocab_size: int


@dataclass(frozen=True)
class Requests:
    """What one shard asks for, one response a row.

    Args:
        prompts: Tokens of each prompt.
        seeds: Seed of each response (int64).
    """

    prompts: Sequence[TokenIds]
    seeds: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt (int64)."""
        return np.fromiter(map(len, self.prompts), np.int64, len(self.prompts))


@dataclass(frozen=True)
class Responses:
    """Responses as columns.

    Args:
        response_ids: Tokens of all responses, one after another (int32); the end token included where one was drawn.
        offsets: Response i is ``response_ids[offsets[i]:offsets[i + 1]]`` (int64).
        logprobs: Log-probability of each token under the model at temperature 1, over the full vocabulary (float32,
            nats). NaN where nothing was sampled.
        finish_reason: "stop" where an end token was drawn, else "length".
    """

    response_ids: TokenIds
    offsets: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finish_reason: NDArray[np.str_]

    @classmethod
    def from_rows(
        cls, rows: Sequence[TokenIds], logprobs: Sequence[NDArray[np.float32]], end_ids: Sequence[int]
    ) -> "Responses":
        """Join single responses, none of them empty, into columns."""
        responses = Ragged.from_rows(rows)
        ended = np.isin(responses.values[responses.offsets[1:] - 1], end_ids)
        return cls(
            response_ids=responses.values.astype(np.int32),
            offsets=responses.offsets,
            logprobs=np.concatenate([*logprobs, np.empty(0, np.float32)]).astype(np.float32),
            finish_reason=np.where(ended, "stop", "length"),
        )

    def row(self, index: int) -> TokenIds:
        """Return the tokens of one response."""
        return self.response_ids[self.offsets[index] : self.offsets[index + 1]]

    def rows(self) -> list[TokenIds]:
        """Return views of all responses."""
        return [self.row(index) for index in range(len(self.offsets) - 1)]


class Engine(Protocol):
    """Samples responses from one model, loaded once."""

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        """Sample one response per prompt; it depends on its own prompt and seed alone, not on its neighbours.

        Args:
            requests: One a shard; taken only as far as the engine has use for, so it may make them as it goes.
            settings: How responses are drawn.
            finished: Told of every response.

        Yields:
            Number of a shard in ``requests`` and its responses, in any order, as soon as the shard's last is done.
        """
        ...

    def counters(self) -> dict[str, float | str]:
        """Return what the engine counts over all its calls, for the stage's manifest."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def engine_name(model: ModelRef, config: GenerateConfig) -> str:
    """Return the engine that samples from ``model``: the config's, unless vLLM cannot read its weights.

    vLLM reads bitsandbytes no more (0.32), and no other of its kinds of rounding gives the weights that are scored.
    """
    return "transformers" if config.engine == "vllm" and model.quantization is not None else config.engine


def open_engine(
    model: ModelRef, config: GenerateConfig, longest_sequence: int, earlier: ModelRef | None = None
) -> Engine:
    """Load ``model`` into its engine; see ``engine_name``.

    Args:
        model: What to sample from.
        config: The engine and its options.
        longest_sequence: No prompt with its response will be longer, in tokens.
        earlier: What its servers may still serve by mistake, if it has servers.

    Raises:
        ModelError: the engine is not installed, cannot use the model's device, or has a server that serves another
            model.
    """
    engine = engine_name(model, config)
    if engine == "vllm":
        from tasks.rollout.vllm_process import open_vllm

        return open_vllm(model, config.vllm, longest_sequence)
    if engine == "server":
        from tasks.rollout.server_engine import ServerEngine

        return ServerEngine(model, config.server, longest_sequence, earlier)
    from tasks.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(model, config.batch_size, longest_sequence)


class LazyEngine:
    """An engine that is loaded by the first shard that needs it, so that finished shards cost no load.

    Args:
        opener: Loads it.
    """

    def __init__(self, opener: Callable[[], Engine]) -> None:
        self._opener = opener
        self._engine: Engine | None = None
        self._own: dict[str, float | str] = {}
        self._tokens = 0
        self._seconds = self._load_seconds = 0.0

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        """See Engine."""
        waiting = iter(requests)
        first = next(waiting, None)
        if first is None:
            return
        clock = time.perf_counter()
        if self._engine is None:
            self._engine = self._opener()
            self._load_seconds = time.perf_counter() - clock
            clock += self._load_seconds
        for number, rollouts in self._engine.generate(chain([first], waiting), settings, finished):
            self._seconds += time.perf_counter() - clock
            self._tokens += len(rollouts.response_ids)
            self._own = self._engine.counters()
            yield number, rollouts
            # What the caller does with a shard is not the engine's time.
            clock = time.perf_counter()

    def counters(self) -> dict[str, float | str]:
        """Return seconds to load, response tokens per second since (0: nothing was sampled), and the engine's own."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return {"load_seconds": round(self._load_seconds, 3), "tokens_per_second": round(rate, 1)} | self._own

    def close(self) -> None:
        """Free the model if it was loaded."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
