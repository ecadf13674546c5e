"""Packed prefill: log-probabilities of given responses, and the most likely tokens at each of their positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tasks.language_model.head import OutputHead, hidden_states, input_device
from tasks.language_model.ragged import Ragged, offsets_of

TokensDone = Callable[[int], None]


@dataclass(frozen=True)
class PrefillBatch:
    """Sequences packed into one row.

    Args:
        rows: Which of the given sequences, in packed order.
        input_ids: int64 [1, tokens].
        position_ids: int64 [1, tokens], restarting at 0 with each sequence.
        states_at: Positions whose hidden state predicts a response token, int64 [predicted].
        targets: Index into the flat responses of each predicted token, int64 [predicted].
    """

    rows: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    states_at: NDArray[np.int64]
    targets: NDArray[np.int64]


def plan_batches(lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Group sequences, longest first, into batches of at most ``budget`` tokens (one sequence may exceed it alone).

    >>> [batch.tolist() for batch in plan_batches(np.array([3, 5, 2, 4]), 7)]
    [[1], [3, 0], [2]]
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start, used = [], 0, 0
    for position, length in enumerate(lengths[order]):
        if position > start and used + length > budget:
            batches.append(order[start:position])
            start, used = position, 0
        used += int(length)
    if start < len(order):
        batches.append(order[start:])
    return batches


def flat_positions(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the flat indices of ``rows``, row after row.

    >>> flat_positions(np.array([0, 2, 5]), np.array([1, 0])).tolist()
    [2, 3, 4, 0, 1]
    """
    lengths = np.diff(offsets)[rows]
    starts = offsets[rows]
    return np.arange(lengths.sum()) + np.repeat(starts - offsets_of(lengths)[:-1], lengths)


def prefill_batches(context: Ragged, response: Ragged, budget: int) -> Iterator[PrefillBatch]:
    """Pack ``context + response`` sequences into rows of about ``budget`` tokens.

    A response token without any token before it (empty context) is predicted by nothing and has no target.
    """
    for rows in plan_batches(context.lengths + response.lengths, budget):
        context_lengths, response_lengths = context.lengths[rows], response.lengths[rows]
        lengths = context_lengths + response_lengths
        starts = offsets_of(lengths)[:-1]
        total = int(lengths.sum())
        positions = np.arange(total) - np.repeat(starts, lengths)
        in_response = positions >= np.repeat(context_lengths, lengths)
        input_ids = np.empty(total, np.int64)
        input_ids[~in_response] = context.values[flat_positions(context.offsets, rows)]
        flat_response = flat_positions(response.offsets, rows)
        input_ids[in_response] = response.values[flat_response]
        places = np.flatnonzero(in_response)
        predicted = positions[places] > 0
        yield PrefillBatch(rows, input_ids[None], positions[None], places[predicted] - 1, flat_response[predicted])


@dataclass(frozen=True)
class Prefill:
    """Log-probabilities in nats at temperature 1 over the full vocabulary, one entry per flat response token.

    Args:
        logprobs: float32 [tokens], of the response token; NaN where nothing predicts it.
        topk_ids: int32 [tokens, k], most likely first; empty with k = 0.
        topk_logprobs: float32 [tokens, k].
    """

    logprobs: NDArray[np.float32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    context: Ragged,
    response: Ragged,
    *,
    batch_tokens: int,
    logits_chunk: int,
    top_k: int = 0,
    shared_vocab: int | None = None,
    on_tokens: TokensDone | None = None,
) -> Prefill:
    """Score responses after their contexts in packed passes.

    Args:
        model: The causal language model, in eval mode.
        context: int32 token rows before each response; rows may be empty.
        response: int32 token rows to score, as many as ``context``.
        batch_tokens: Tokens in one packed forward pass.
        logits_chunk: Positions projected onto the vocabulary at a time.
        top_k: Most likely next tokens to return at each position.
        shared_vocab: Only ids below this may appear among the top k (padded vocabulary rows are no tokens).
        on_tokens: Called with the number of tokens after each pass.
    """
    head = OutputHead.of(model)
    device = input_device(model)
    tokens = len(response.values)
    logprobs = np.full(tokens, np.nan, np.float32)
    topk_ids = np.zeros((tokens, top_k), np.int32)
    topk_logprobs = np.full((tokens, top_k), -np.inf, np.float32)
    for batch in prefill_batches(context, response, batch_tokens):
        states = hidden_states(
            model,
            torch.from_numpy(batch.input_ids).to(device),
            torch.from_numpy(batch.position_ids).to(device),
        )[0]
        for start in range(0, len(batch.targets), logits_chunk):
            places = batch.states_at[start : start + logits_chunk]
            targets = batch.targets[start : start + logits_chunk]
            scores = head.logits(states[torch.from_numpy(places).to(device)]).log_softmax(-1)
            labels = torch.from_numpy(response.values[targets].astype(np.int64)).to(device)
            logprobs[targets] = scores.gather(1, labels[:, None])[:, 0].cpu().numpy()
            if top_k:
                values, ids = most_likely(scores, top_k, shared_vocab)
                topk_ids[targets] = ids.cpu().numpy()
                topk_logprobs[targets] = values.cpu().numpy()
        if on_tokens is not None:
            on_tokens(batch.input_ids.size)
    return Prefill(logprobs, topk_ids, topk_logprobs)


def most_likely(logprobs: Tensor, top_k: int, shared_vocab: int | None) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` largest log-probabilities [n, k] and their ids, most likely first."""
    scored = logprobs if shared_vocab is None else logprobs[:, :shared_vocab]
    values, ids = scored.topk(top_k, dim=-1)
    return values, ids
