"""What an audit remembers of a rollout table once its tokens are gone: ids, lengths, and a digest per sample."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.audit.digests import Int64, UInt64, text_digests


@dataclass(frozen=True)
class PromptIndex:
    """The prompts table: ids (strings [prompts]) and which are held out (bool [prompts])."""

    ids: pa.ChunkedArray
    held_out: NDArray[np.bool_]

    @cached_property
    def _sorted(self) -> tuple[UInt64, Int64]:
        """Digests of all ids, ascending, and the row of each."""
        digests = text_digests(self.ids)
        order = np.argsort(digests, kind="stable")
        return digests[order], order

    def rows(self, prompt_ids: pa.ChunkedArray) -> Int64:
        """Return the row of each id, -1 where there is none; int64.

        Asked shard by shard: unlike ``locate_rows`` it does not go through all prompts each time.
        """
        known, order = self._sorted
        if not known.size:
            return np.full(len(prompt_ids), -1, np.int64)
        wanted = text_digests(prompt_ids)
        places = np.minimum(np.searchsorted(known, wanted), known.size - 1)
        rows: Int64 = np.where(known[places] == wanted, order[places], -1)
        return rows

    def in_split(self, prompt_ids: pa.ChunkedArray, *, held_out: bool) -> NDArray[np.bool_]:
        """Say of each id whether it is a prompt of the table, held out or not; bool."""
        places = self.rows(prompt_ids)
        found: NDArray[np.bool_] = (places >= 0) & (self.held_out[places] == held_out)
        return found


@dataclass
class RolloutIndex:
    """A rollout table, row by row.

    Args:
        sample_ids: Strings [samples].
        held_out: bool [samples]; whether the prompt is held out.
        prompt_tokens: int64 [samples].
        response_tokens: int64 [samples].
        policy_step: int64 [samples].
        nll: float64 [samples]; mean negative log-likelihood under the sampler, nats per token, NaN without a token.
        digest: uint64 [samples]; of what packs take over: the tokens, and later the targets.
    """

    sample_ids: pa.ChunkedArray
    held_out: NDArray[np.bool_]
    prompt_tokens: Int64
    response_tokens: Int64
    policy_step: Int64
    nll: NDArray[np.float64]
    digest: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.sample_ids)


def locate_rows(wanted: pa.ChunkedArray, present: pa.ChunkedArray) -> Int64:
    """Return the row of each ``wanted`` id among ``present``, -1 where there is none; int64 [wanted]."""
    rows: Int64 = pc.index_in(wanted, value_set=present).fill_null(-1).to_numpy().astype(np.int64)
    return rows
