"""Instruction-following difficulty and its difference between teacher and student."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.language_model.ragged import Ragged

IfdForm = Literal["loss_ratio", "ppl_ratio"]


def mean_nll(logprobs: Ragged, scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean negative log-likelihood of each response, nats per token.

    s(y) = -(1/N) sum_t log p(y_t), over the tokens that ``scored`` (flat, bool) marks; NaN where it marks none.
    """
    weights = scored.astype(np.float64)
    terms = np.where(scored, logprobs.values.astype(np.float64), 0.0)
    sums = np.add.reduceat(np.append(terms, 0.0), logprobs.offsets[:-1]) if len(logprobs) else np.empty(0)
    counts = np.add.reduceat(np.append(weights, 0.0), logprobs.offsets[:-1]) if len(logprobs) else np.empty(0)
    empty = logprobs.lengths == 0
    sums, counts = np.where(empty, 0.0, sums), np.where(empty, 0.0, counts)
    # The sign is taken last so that certain tokens give 0, not -0.
    means: NDArray[np.float64] = np.divide(0.0 - sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


def ifd(conditional: NDArray[np.float64], unconditional: NDArray[np.float64], form: IfdForm) -> NDArray[np.float64]:
    """Return IFD_M(x, y) from mean negative log-likelihoods in nats.

    `loss_ratio`: s(y|x) / s(y) (Li et al. 2023, arXiv 2308.12032). `ppl_ratio`: exp(s(y|x) - s(y)), the ratio of
    perplexities (Superfiltering, arXiv 2402.00530).
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if form == "loss_ratio":
            return np.divide(conditional, unconditional)
        return np.asarray(np.exp(conditional - unconditional))
