"""The teacher elsewhere: prefill by vLLM servers, asked over HTTP for `prompt_logprobs`."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from schemas.config import ServersConfig
from schemas.errors import StageError
from tasks.language_model.control_tokens import TokenIds
from tasks.language_model.prefill import Prefill, TokensDone
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef
from tasks.model_servers.api import Body, reading_answer
from tasks.model_servers.completions import likely_tokens, scoring_body, token_logprobs
from tasks.model_servers.self_test import make_probe
from tasks.model_servers.served import ServedModel


class ServedPrefill:
    """Scores responses as ``tasks.language_model.prefill`` does, a request for each.

    Args:
        model: The teacher.
        servers: Where it is served.
        longest_sequence: No context with its response will be longer, in tokens.
        top_k: Most likely tokens that will be asked for.

    Raises:
        ModelError: a server serves something else, gives out fewer log-probabilities than asked for, or none answers.
    """

    def __init__(self, model: ModelRef, servers: ServersConfig, longest_sequence: int, top_k: int) -> None:
        text = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).get_text_config()
        self._padding_rows = max(0, int(text.vocab_size) - model.shared_vocab)
        self._more = 0
        # A server samples one token after what it scores.
        probe = make_probe(model, servers, sequence_tokens=longest_sequence + 1, top_k=top_k)
        self._served = ServedModel(servers, probe)

    def __call__(
        self,
        context: Ragged,
        response: Ragged,
        *,
        top_k: int,
        topk_rows: NDArray[np.bool_],
        shared_vocab: int,
        on_tokens: TokensDone | None,
    ) -> Prefill:
        """Score responses after their contexts; arguments and result as those of ``prefill``.

        Raises:
            ModelError: a server refuses a request, or answers something else; where padding of the vocabulary is among
                the most likely, more of them are asked for than ``top_k``, which may be more than its `--max-logprobs`.
            StageError: no server is left.
        """
        wanted = np.repeat(topk_rows & (top_k > 0), response.lengths)
        topk_places = np.cumsum(wanted) - 1
        logprobs = np.full(len(wanted), np.nan, np.float32)
        topk_ids = np.zeros((int(wanted.sum()), top_k), np.int32)
        topk_logprobs = np.full(topk_ids.shape, -np.inf, np.float32)
        missing = np.flatnonzero((response.lengths > 0) & (context.lengths + response.lengths > 1))
        while len(missing):
            asked, short = top_k + self._more, []
            for row, choice in self._served.answers(_bodies(context, response, missing, asked * topk_rows)):
                tokens, start = _sequence(context, response, row), max(1, len(context[row]))
                stop = int(response.offsets[row + 1])
                first = stop - (len(tokens) - start)
                with reading_answer(choice.url):
                    answer = choice.fields["prompt_logprobs"]
                    logprobs[first:stop] = token_logprobs(answer, tokens, start)
                if wanted[first]:
                    with reading_answer(choice.url):
                        found = likely_tokens(answer, start, asked=asked, top_k=top_k, shared_vocab=shared_vocab)
                    if found is None:
                        short.append(row)
                        continue
                    places = topk_places[first:stop]
                    topk_ids[places], topk_logprobs[places] = found
                if on_tokens is not None:
                    on_tokens(len(tokens))
            if short and self._more >= self._padding_rows:
                raise StageError(f"{choice.url}: asked for {asked} most likely tokens, it gave fewer")
            if short:
                # Padding of the vocabulary is among the most likely: ask for more.
                self._more = min(self._padding_rows, 2 * self._more + top_k)
            missing = np.array(short, np.int64)
        return Prefill(logprobs, topk_ids, topk_logprobs)

    def counters(self) -> dict[str, float | str]:
        """Return what is counted of the servers."""
        return self._served.counters()

    def close(self) -> None:
        """End all connections."""
        self._served.close()


def _bodies(
    context: Ragged, response: Ragged, rows: NDArray[np.int64], asked: NDArray[np.int64]
) -> Iterator[tuple[int, Body]]:
    for row in rows.tolist():
        yield row, scoring_body(_sequence(context, response, row), int(asked[row]))


def _sequence(context: Ragged, response: Ragged, row: int) -> TokenIds:
    return np.concatenate([context[row], response[row]])
