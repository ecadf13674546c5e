"""A shard whose responses arrive in any order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.rollout.engine import Responses, TokenIds


class OpenShard:
    """Responses of a shard that is not done.

    Args:
        samples: How many responses it has in the end.
    """

    def __init__(self, samples: int) -> None:
        self._rows = [np.empty(0, np.int32)] * samples
        self._logprobs = [np.empty(0, np.float32)] * samples
        self._missing = samples

    @property
    def is_done(self) -> bool:
        """Whether every response has arrived."""
        return self._missing == 0

    def put(self, place: int, tokens: TokenIds, logprobs: NDArray[np.float32]) -> None:
        """Take the response of one sample; each comes once."""
        self._rows[place], self._logprobs[place] = tokens, logprobs
        self._missing -= 1

    def rollouts(self, end_ids: Sequence[int]) -> Responses:
        """Return all responses as columns."""
        return Responses.from_rows(self._rows, self._logprobs, end_ids)
