"""Exact sampling by inverse CDF, as parts that `transformers.generate` runs in its own loop."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from tasks.rollout.engine import Finished
from tasks.rollout.seeds import uniforms


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
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)


class SeededSampling(LogitsProcessor):
    """Leaves only the drawn token possible, so that greedy search takes it; records its log-probability.

    Args:
        seeds: One per row of the batch.
        limits: Tokens that each row may have at most.
        temperature: See choose_tokens.
        top_p: See choose_tokens.
        vocab_size: See choose_tokens.
        device: Where the logits are.
    """

    def __init__(
        self,
        seeds: NDArray[np.int64],
        limits: NDArray[np.int64],
        *,
        temperature: float,
        top_p: float,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        draws = np.zeros((int(limits.max()), len(seeds)))
        if temperature > 0:
            for row, (seed, limit) in enumerate(zip(seeds, limits, strict=True)):
                draws[:limit, row] = uniforms(int(seed), int(limit))
        self._draws = torch.from_numpy(draws).to(device)
        self._temperature = temperature
        self._top_p = top_p
        self._vocab_size = vocab_size
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` [rows, vocabulary] with minus infinity for all but the drawn token of each row."""
        # A backend may run one step past the last before it notices the end; that step is cut off afterwards.
        draws = self._draws[min(len(self._logprobs), len(self._draws) - 1)]
        scores = scores.float()
        chosen = choose_tokens(
            scores, draws, temperature=self._temperature, top_p=self._top_p, vocab_size=self._vocab_size
        )[:, None]
        self._logprobs.append((scores.gather(-1, chosen) - scores.logsumexp(dim=-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    def logprobs(self) -> NDArray[np.float32]:
        """Return the log-probabilities of the drawn tokens at temperature 1 over the full vocabulary [rows, steps]."""
        return cast(NDArray[np.float32], torch.stack(self._logprobs, dim=1).cpu().numpy())


class ResponseLimits(StoppingCriteria):
    """Ends each row at its end token or its own limit, and tells how many rows ended.

    Args:
        limits: Tokens that each row may have at most.
        prompt_width: Columns before the responses.
        end_ids: Tokens that end a response.
        device: Where the tokens are.
        finished: Called with how many more rows have ended.
    """

    def __init__(
        self,
        limits: NDArray[np.int64],
        prompt_width: int,
        end_ids: tuple[int, ...],
        device: torch.device,
        finished: Finished,
    ) -> None:
        self._limits = torch.from_numpy(limits).to(device)
        self._prompt_width = prompt_width
        # `generate` pads rows that have ended only if some criterion has this attribute.
        self.eos_token_id = torch.tensor(end_ids, device=device)
        self._done = torch.zeros(len(limits), dtype=torch.bool, device=device)
        self._finished = finished
        self._reported = 0

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Return [rows] bool: which rows have ended."""
        at_limit = input_ids.shape[1] - self._prompt_width >= self._limits
        self._done |= torch.isin(input_ids[:, -1], self.eos_token_id) | at_limit
        count = int(self._done.sum())
        if count > self._reported:
            self._finished(count - self._reported)
            self._reported = count
        return self._done
