"""Which prompts are taken and which are held out: drawn from the seed and each prompt's own content."""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from schemas.errors import PromptError

Ids = npt.NDArray[np.uint64]


def ids_of(prompt_ids: list[str]) -> Ids:
    """Return prompt ids, which are 16 hex digits, as numbers; uint64 [prompts]."""
    return np.fromiter((int(name, 16) for name in prompt_ids), np.uint64, len(prompt_ids))


def drawn_order(prompt_ids: Iterable[str], seed: int) -> npt.NDArray[np.int64]:
    """Return the places of prompts in the order of the first 64 bits of sha256(seed:prompt_id).

    A prompt's rank among any set of others depends on the seed and the contents only, so neither the order of
    sources nor `limit` moves a prompt that stays from one split to the other without need.

    Args:
        prompt_ids: Distinct prompts.
        seed: The run's seed.

    Returns:
        int64 indices into ``prompt_ids``, one each.
    """
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in prompt_ids)
    drawn = np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64)
    return np.argsort(drawn, kind="stable").astype(np.int64)


def draw_splits(
    ids: Ids, *, seed: int, held_out: int, limit: int | None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Draw ``limit`` of the prompts (None: all), and ``held_out`` of those for evaluation.

    Both take the first of one drawn order, so a changed ``limit`` leaves the held-out prompts as they are.

    Args:
        ids: Distinct prompts, as ``ids_of`` gives them.
        seed: The run's seed.
        held_out: Prompts for evaluation.
        limit: Prompts in all.

    Returns:
        Two bool masks over ``ids``: taken at all, and held out.

    Raises:
        PromptError: no prompt is left for training.
    """
    order = drawn_order((f"{number:016x}" for number in ids.flat), seed)[:limit]
    if len(order) <= held_out:
        raise PromptError(
            f"prompts.held_out: {held_out} of {len(order)} distinct prompts leaves nothing to train on; "
            "lower it or add prompts"
        )
    taken, evaluated = np.zeros(ids.size, dtype=bool), np.zeros(ids.size, dtype=bool)
    taken[order] = True
    evaluated[order[:held_out]] = True
    return taken, evaluated
