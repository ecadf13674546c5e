"""The engine elsewhere: vLLM servers that serve the model, asked over HTTP."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from schemas.config import ServersConfig
from schemas.errors import StageError
from tasks.language_model.sources import ModelRef
from tasks.model_servers.api import Body, Choice, reading_answer
from tasks.model_servers.completions import PLAIN_SAMPLING, RETURN_SAMPLED, logprobs_in
from tasks.model_servers.self_test import make_probe
from tasks.model_servers.served import ServedModel
from tasks.rollout.context import response_limits
from tasks.rollout.engine import Finished, Requests, Responses, SamplingSettings, TokenIds
from tasks.rollout.open_shard import OpenShard

_NEVER = -100
"""Added to the logit of a padding row, the lowest that a server takes."""


class ServerEngine:
    """Samples from servers, as many requests at a time as they hold.

    Each request carries its prompt as tokens and its own seed, so that a response does not depend on which server gave
    it, nor on when.

    Args:
        model: What to sample from; it is loaded here for the servers' test, and freed.
        servers: Where it is served.
        longest_sequence: No prompt with its response will be longer, in tokens.
        earlier: What the servers may still serve by mistake: weights so near that rounding alone could hide them.

    Raises:
        ModelError: a server serves something else, or none answers.
    """

    def __init__(
        self, model: ModelRef, servers: ServersConfig, longest_sequence: int, earlier: ModelRef | None = None
    ) -> None:
        text = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).get_text_config()
        self._vocab_rows: int = text.vocab_size
        probe = make_probe(model, servers, sequence_tokens=longest_sequence, top_k=0, earlier=earlier)
        self._served = ServedModel(servers, probe)

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        """See Engine. All shards together are one queue, and shards end as they may."""
        shards: dict[int, OpenShard] = {}

        def bodies() -> Iterator[tuple[tuple[int, int, int], Body]]:
            for number, shard in enumerate(requests):
                shards[number] = OpenShard(len(shard.prompts))
                limits = response_limits(shard.lengths, settings.context, settings.max_new_tokens).tolist()
                for place, (prompt, limit) in enumerate(zip(shard.prompts, limits, strict=True)):
                    body = self._body(prompt, int(shard.seeds[place]), limit, settings)
                    yield (number, place, limit), body

        for (number, place, limit), choice in self._served.answers(bodies()):
            shards[number].put(place, *_response(choice, limit, settings))
            finished(1)
            if shards[number].is_done:
                yield number, shards.pop(number).rollouts(settings.end_ids)

    def counters(self) -> dict[str, float | str]:
        """See Engine."""
        return self._served.counters()

    def close(self) -> None:
        """See Engine."""
        self._served.close()

    def _body(self, prompt: TokenIds, seed: int, limit: int, settings: SamplingSettings) -> Body:
        padding_rows = dict.fromkeys(map(str, range(settings.vocab_size, self._vocab_rows)), _NEVER)
        return {
            **PLAIN_SAMPLING,
            **RETURN_SAMPLED,
            "prompt": prompt.tolist(),
            "seed": seed,
            "max_tokens": limit,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "stop_token_ids": list(settings.end_ids),
            "logit_bias": padding_rows or None,
        }


def _response(choice: Choice, limit: int, settings: SamplingSettings) -> tuple[TokenIds, NDArray[np.float32]]:
    """Return a response's tokens and their log-probabilities.

    Raises:
        ModelError: the answer has another form than vLLM's.
        StageError: it ended neither with an end token nor at its limit, or has a token that is none.
    """
    with reading_answer(choice.url):
        tokens = np.asarray(choice.fields["token_ids"], np.int32)
        logprobs = logprobs_in(np.asarray(choice.fields["logprobs"]["token_logprobs"], np.float32))
        if tokens.shape != logprobs.shape or tokens.min(initial=0) < 0:
            raise ValueError(f"{tokens.size} tokens with {logprobs.size} log-probabilities, or an id below 0")
    if len(tokens) != limit and (len(tokens) == 0 or tokens[-1] not in settings.end_ids):
        raise StageError(
            f"{choice.url}: a response of {len(tokens)} tokens ended before its limit of {limit} without an end token; "
            "the server adds limits or stop tokens of its own: start it with `--generation-config vllm`"
        )
    if len(tokens) > limit or np.isin(tokens[:-1], settings.end_ids).any():
        raise StageError(
            f"{choice.url}: a response of {len(tokens)} tokens went on beyond its limit of {limit}, or beyond an end "
            "token: the server ignores `max_tokens` or `stop_token_ids`; is it vLLM's own?"
        )
    if tokens.max() >= settings.vocab_size:
        raise StageError(
            f"{choice.url}: sampled id {tokens.max()}, a padding row of the vocabulary; the model is sure of something "
            "that is no token, or the server ignores `logit_bias`"
        )
    return tokens, logprobs
