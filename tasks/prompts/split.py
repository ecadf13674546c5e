"""Which prompts are taken and which are held out: drawn from the seed and each prompt's own content."""

import hashlib

import numpy as np
import numpy.typing as npt

from schemas.errors import PromptError


def drawn_order(prompt_ids: list[str], seed: int) -> npt.NDArray[np.int64]:
    """Return the places of ``prompt_ids`` in the order of sha256(seed:prompt_id).

    A prompt's rank among any set of others depends on the seed and the contents only, so neither the order of
    sources nor `limit` moves a prompt that stays from one split to the other without need.

    Returns:
        int64 indices into ``prompt_ids``, one each.
    """
    digests = np.array([hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in prompt_ids], dtype="S64")
    return np.argsort(digests, kind="stable").astype(np.int64)


def draw_splits(
    prompt_ids: list[str], *, seed: int, held_out: int, limit: int | None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Draw ``limit`` of the prompts (None: all), and ``held_out`` of those for evaluation.

    Both take the first of one drawn order, so a changed ``limit`` leaves the held-out prompts as they are.

    Args:
        prompt_ids: Distinct prompts.
        seed: The run's seed.
        held_out: Prompts for evaluation.
        limit: Prompts in all.

    Returns:
        Two bool masks over ``prompt_ids``: taken at all, and held out.

    Raises:
        PromptError: no prompt is left for training.
    """
    order = drawn_order(prompt_ids, seed)[:limit]
    if len(order) <= held_out:
        raise PromptError(
            f"prompts.held_out: {held_out} of {len(order)} distinct prompts leaves nothing to train on; "
            "lower it or add prompts"
        )
    taken, evaluated = np.zeros(len(prompt_ids), dtype=bool), np.zeros(len(prompt_ids), dtype=bool)
    taken[order] = True
    evaluated[order[:held_out]] = True
    return taken, evaluated
