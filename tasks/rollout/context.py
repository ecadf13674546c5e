"""Which prompts leave room for a reply in the models' context."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import PromptError


def prompts_that_fit(
    lengths: NDArray[np.int32],
    context: int,
    *,
    too_long: Literal["error", "drop"],
    source_of: Callable[[int], tuple[str, int]],
    reply_lengths: NDArray[np.int32] | None = None,
) -> NDArray[np.bool_]:
    """Say which prompts leave room for a reply of at least one token.

    Args:
        lengths: Tokens of each prompt, up to where the reply begins.
        context: Longest sequence, in tokens, that both models take.
        too_long: `prompts.too_long`.
        source_of: Tells a prompt's source and its row there, for the error.
        reply_lengths: Tokens of each prompt's reply, where it is known already; None: one token must fit.

    Returns:
        Bool, one per prompt: whether it fits. All true unless ``too_long`` is `drop`.

    Raises:
        PromptError: a prompt does not fit and ``too_long`` is `error`; names the first one's source and row.
    """
    needed = lengths + (1 if reply_lengths is None else reply_lengths)
    fits: NDArray[np.bool_] = needed <= context
    if too_long == "drop" or fits.all():
        return fits
    first = int(np.argmin(fits))
    source, row = source_of(first)
    size = f"the prompt has {lengths[first]} tokens"
    if reply_lengths is not None:
        size += f" and its answer {reply_lengths[first]}"
    others = int((~fits).sum()) - 1
    raise PromptError(
        f"{source}: row {row}: {size}, which does not fit into the models' context of {context} tokens with a reply"
        f"{f' ({others} more like it)' if others else ''}. Shorten it, choose models with a longer context, or set "
        "`prompts.too_long: drop` to leave such prompts out"
    )


def response_limits(lengths: NDArray[np.int64], context: int, max_new_tokens: int) -> NDArray[np.int64]:
    """Return how many tokens each response may have: ``max_new_tokens``, or what the context leaves.

    >>> response_limits(np.array([3, 8]), context=10, max_new_tokens=5)
    array([5, 2])
    """
    return np.minimum(max_new_tokens, context - lengths)


def longest_sequence(longest_prompt: int, context: int, max_new_tokens: int) -> int:
    """Return the most tokens that a prompt and its response can have together.

    >>> longest_sequence(3, context=10, max_new_tokens=5), longest_sequence(8, context=10, max_new_tokens=5)
    (8, 10)
    """
    return min(longest_prompt + max_new_tokens, context)


def source_in(prompts: pa.Table) -> Callable[[int], tuple[str, int]]:
    """Return what tells the source of a row of table PROMPTS, and its row there."""
    return lambda row: (prompts.column("source")[row].as_py(), prompts.column("source_row")[row].as_py())
