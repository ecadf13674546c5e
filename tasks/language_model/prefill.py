"""Packed prefill: log-probabilities of given responses, and the most likely tokens at each of their positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tasks.language_model.head import OutputHead, hidden_states, input_device, module_device
from tasks.language_model.ragged import Ragged, offsets_of
from tasks.language_model.triton_kernels import missing_for_triton

TokensDone = Callable[[int], None]

_BLOCK = 64
"""Neighbouring ids whose largest logit decides whether they are searched for the top k."""

_LAST_ID = 0xFFFFFFFF


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


def gap_tolerance(dtype: torch.dtype) -> float:
    """Return the largest mean absolute difference that rounding explains, nats per token.

    float32: 1e-2; another order of summation gives about 1e-5. 16 bits: 0.15; bfloat16 logits of 16 to 32 are multiples
    of 1/8, which alone makes 0.03 on average, and decoding and prefilling kernels differ by about as much again.
    """
    return 1e-2 if dtype == torch.float32 else 0.15


def plan_batches(lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Group sequences, longest first, into batches of at most ``budget`` tokens (one sequence may exceed it alone).

    The shortest sequences fill what is left of each batch.

    >>> [batch.tolist() for batch in plan_batches(np.array([3, 5, 2, 4]), 7)]
    [[1, 2], [3, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order].tolist()
    batches, first, last = [], 0, len(order)
    while first < last:
        longest, shortest, room = first, last, budget
        while first < last and (first == longest or ordered[first] <= room):
            room -= ordered[first]
            first += 1
        while last > first and ordered[last - 1] <= room:
            last -= 1
            room -= ordered[last]
        batches.append(np.concatenate([order[longest:first], order[last:shortest]]))
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
    """Log-probabilities in nats at temperature 1 over the full vocabulary.

    Args:
        logprobs: float32 [tokens], of each flat response token; NaN where nothing predicts it.
        topk_ids: int32 [wanted, k], one entry per flat token of the rows whose top k were wanted, most likely first and
            the lower id first among equals; empty with k = 0.
        topk_logprobs: float32 [wanted, k].
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
    topk_rows: NDArray[np.bool_] | None = None,
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
        topk_rows: Bool, one per row: where they are wanted; None: everywhere.
        shared_vocab: Only ids below this may appear among the top k (padded vocabulary rows are no tokens).
        on_tokens: Called with the number of tokens after each pass.
    """
    head = OutputHead.of(model)
    device, head_device = input_device(model), module_device(head.projection)
    score_chunk = _score_chunk if missing_for_triton(head_device) is not None else _score_chunk_by_kernel
    wanted = np.ones(len(response), bool) if topk_rows is None else topk_rows
    wanted = np.repeat(wanted & (top_k > 0), response.lengths)
    topk_places = np.cumsum(wanted) - 1
    logprobs = np.full(len(wanted), np.nan, np.float32)
    topk_ids = np.zeros((int(wanted.sum()), top_k), np.int32)
    topk_logprobs = np.full(topk_ids.shape, -np.inf, np.float32)
    for batch in prefill_batches(context, response, batch_tokens):
        # Positions whose top k are wanted come first, so that those of a chunk are a slice of its logits.
        order = np.argsort(~wanted[batch.targets], kind="stable")
        targets = batch.targets[order]
        topk_targets = topk_places[targets[wanted[targets]]]
        states = hidden_states(
            model,
            torch.from_numpy(batch.input_ids).to(device),
            torch.from_numpy(batch.position_ids).to(device),
        )[0]
        states_at = torch.from_numpy(batch.states_at[order]).to(states.device)
        labels = torch.from_numpy(response.values[targets].astype(np.int64)).to(head_device)
        chunks = [
            score_chunk(
                head.narrow_logits(states[states_at[start : start + logits_chunk]]),
                labels[start : start + logits_chunk],
                top_k,
                max(0, len(topk_targets) - start),
                shared_vocab,
            )
            for start in range(0, len(targets), logits_chunk)
        ]
        if chunks:
            found, values, ids = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
            logprobs[targets] = found
            topk_logprobs[topk_targets] = values
            topk_ids[topk_targets] = ids
        if on_tokens is not None:
            on_tokens(batch.input_ids.size)
    return Prefill(logprobs, topk_ids, topk_logprobs)


def _score_chunk(
    logits: Tensor, labels: Tensor, top_k: int, topk_rows: int, shared_vocab: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of ``labels`` [n], and values and ids of the top k of the first ``topk_rows`` [m, k].

    log p = (z - max z) - log(sum exp(z - max z)), in float32. Overwrites float32 ``logits`` [n, vocabulary]: they are
    the largest tensor of a pass, and this keeps them the only one of their size.
    """
    logits = logits.float()
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, labels[:, None]) - largest
    values, ids = most_likely(logits[:topk_rows, :shared_vocab], top_k)
    values -= largest[:topk_rows]
    log_sum = logits.sub_(largest).exp_().sum(-1, keepdim=True).log_()
    return (chosen - log_sum)[:, 0], values - log_sum[:topk_rows], ids


def _score_chunk_by_kernel(
    logits: Tensor, labels: Tensor, top_k: int, topk_rows: int, shared_vocab: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``_score_chunk`` does, reading each logit once, in the dtype it has."""
    from tasks.language_model.prefill_triton import reduce

    vocabulary = logits.shape[1]
    shared_vocab = vocabulary if shared_vocab is None else min(shared_vocab, vocabulary)
    largest, log_sum, maxima = reduce(logits, _BLOCK, shared_vocab)
    chosen = logits.gather(1, labels[:, None]).float() - largest
    values, ids = _search(logits[:topk_rows, :shared_vocab], maxima[:topk_rows], top_k)
    return (chosen - log_sum)[:, 0], values - largest[:topk_rows] - log_sum[:topk_rows], ids


def most_likely(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` largest of float32 ``logits`` [n, vocabulary] and their ids (int32), both [n, k].

    The largest come first, and the lower id first among equals, on every device. Exact, in one pass over the logits:
    the k largest lie in the k blocks of neighbouring ids whose maxima are largest, and only those are searched.
    """
    vocabulary = logits.shape[1]
    whole = vocabulary // _BLOCK * _BLOCK
    maxima = logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(-1)
    if whole < vocabulary:
        maxima = torch.cat([maxima, logits[:, whole:].amax(-1, keepdim=True)], 1)
    return _search(logits, maxima, top_k)


def _search(logits: Tensor, maxima: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return float32 values and int32 ids of the ``top_k`` largest, given the maxima of all blocks [n, blocks]."""
    vocabulary = logits.shape[1]
    blocks = torch.arange(maxima.shape[1], device=logits.device)
    kept = _ids_of(_rank_keys(maxima, blocks).topk(min(top_k, len(blocks)), sorted=False).values)
    ids = (kept[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    keys = _rank_keys(logits.gather(1, ids.clamp(max=vocabulary - 1)).float(), ids)
    # The last block may reach past the vocabulary.
    keys.masked_fill_(ids >= vocabulary, torch.iinfo(torch.int64).min)
    best = _ids_of(keys.topk(top_k).values)
    return logits.gather(1, best).float(), best.to(torch.int32)


def _rank_keys(values: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys that order float32 ``values`` upwards and, among equals, their ``ids`` downwards."""
    # Read as integers, positive floats ascend and negative ones descend; + 0.0 makes -0.0 equal to 0.0.
    bits = (values + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LAST_ID - ids)


def _ids_of(keys: Tensor) -> Tensor:
    return _LAST_ID - (keys & _LAST_ID)
