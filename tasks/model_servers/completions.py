"""What is asked of `/v1/completions`, and its answers as columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.model_servers.api import Body

PromptLogprobs = Sequence[Mapping[str, Any] | None]
"""An answer's `prompt_logprobs`: for each token of the prompt, log-probability and rank of some tokens by their id;
None for the first, which nothing predicts."""

PLAIN_SAMPLING: Body = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
}
"""All that a model's generation config would otherwise say of how it samples and where it ends."""

RETURN_SAMPLED: Body = {"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
"""Asks for the ids and log-probabilities of what was sampled, and of nothing else."""

HIGHEST_LOGPROB = 1e-3
"""Nats. Rounding may leave a certain token a little above 0."""


def scoring_body(tokens: NDArray[np.int32], top_k: int) -> Body:
    """Return a request for the log-probabilities of a prompt's tokens, and of the ``top_k`` most likely at each."""
    # A server samples one token at least.
    return {"prompt": tokens.tolist(), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}


def token_logprobs(answer: PromptLogprobs, tokens: NDArray[np.int32], start: int) -> NDArray[np.float32]:
    """Return the log-probabilities of a prompt's tokens from place ``start``, at least 1, on (float32, nats).

    Raises:
        ValueError: the answer is as long as another prompt, or has something else there than log-probabilities; or
            LookupError, TypeError: it has another form.
    """
    places = zip(answer[start:], tokens[start:].tolist(), strict=True)
    found = (entry[str(token)]["logprob"] for entry, token in places if entry is not None)
    return logprobs_in(np.fromiter(found, np.float32, len(tokens) - start))


def logprobs_in(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return values of an answer that should be log-probabilities.

    Raises:
        ValueError: one is none: it would go into tables, and end training hours later.
    """
    # Written so that NaN fails.
    wrong = values[~(np.isfinite(values) & (values <= HIGHEST_LOGPROB))]
    if len(wrong):
        raise ValueError(f"{wrong[0]} is no log-probability")
    return values


def likely_tokens(
    answer: PromptLogprobs, start: int, *, asked: int, top_k: int, shared_vocab: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    """Return the most likely tokens at each place of a prompt from ``start``, at least 1, on.

    Args:
        answer: What the server said; at each place ``asked`` tokens and the prompt's own, which may be one of them.
        start: First place.
        asked: `prompt_logprobs` of the request.
        top_k: How many to return.
        shared_vocab: Only ids below this count.

    Returns:
        Ids (int32) and log-probabilities (float32, nats), both [places, top_k], most likely first and the lower id
        first among equals; None where some place has fewer.

    Raises:
        ValueError: what is there are no log-probabilities, or no tokens, or one of them twice; or LookupError,
            TypeError: the answer has another form.
    """
    places = [entry for entry in answer[start:] if entry is not None]
    counts = np.fromiter(map(len, places), np.int64, len(places))
    total = int(counts.sum())
    ids = np.fromiter((int(token) for entry in places for token in entry), np.int64, total)
    values = [value for entry in places for value in entry.values()]
    logprobs = np.fromiter((value["logprob"] for value in values), np.float32, total)
    ranks = np.fromiter((value["rank"] for value in values), np.int64, total)
    rows = np.repeat(np.arange(len(places)), counts)
    # The prompt's own token has a rank above `asked` where it is none of the most likely.
    kept = (ranks <= asked) & (ids < shared_vocab)
    rows, ids, logprobs = rows[kept], ids[kept], logprobs[kept]
    found = np.bincount(rows, minlength=len(places))
    if (found < top_k).any():
        return None
    order = np.lexsort((ids, -logprobs, rows))
    starts = np.cumsum(found) - found
    best = order[starts[:, None] + np.arange(top_k)]
    ordered = np.sort(ids[best], axis=1)
    if (ordered < 0).any() or (np.diff(ordered, axis=1) == 0).any():
        raise ValueError("the most likely tokens have an id below 0, or one twice")
    return ids[best].astype(np.int32), logprobs_in(logprobs[best])
