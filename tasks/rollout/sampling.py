"""Exact sampling by inverse CDF."""

import torch
from torch import Tensor


def choose_tokens(logits: Tensor, draws: Tensor, *, temperature: float, top_p: float, vocab_size: int) -> Tensor:
    """Draw one token per row by inverse CDF.

    The token is the first whose cumulative probability exceeds the row's uniform number, ids in ascending order:
    softmax in float32, cumulative sum in float64.

    Args:
        logits: [rows, vocabulary] float32.
        draws: [rows] float64, uniform in [0, 1).
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Smallest set of most likely tokens that reaches this probability; 1 keeps all (Holtzman et al. 2020).
        vocab_size: Ids from here on are never drawn.

    Returns:
        [rows] int64 token ids.
    """
    logits = logits[:, :vocab_size]
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Shifting by the maximum first keeps a tiny temperature from overflowing.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.double().cumsum(dim=-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.where(before < top_p, 0.0))
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # Rounding up to the total itself would point past the last token.
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    # Where a logit is NaN the search ends there too; the log-probability of what is drawn then tells of it.
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1).clamp(max=logits.shape[1] - 1)


def logprobs_of(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probabilities [rows] of ``chosen`` [rows] at temperature 1 over all of ``logits`` [rows, n]."""
    return logits.gather(-1, chosen[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
