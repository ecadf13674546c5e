"""The reward of a response: what the verifier of its prompt says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import PromptError
from schemas.rl_tables import RL_ROLLOUTS
from tasks.verification import verify


def verifiable(prompts: pa.Table) -> NDArray[np.bool_]:
    """Say of each prompt whether a response to it can be checked.

    Args:
        prompts: Rows of table prompts.

    Returns:
        Bool, one a row.
    """
    answers = ["" if answer is None else answer for answer in prompts.column("answer").to_pylist()]
    checkable: NDArray[np.bool_] = ~np.isnan(verify(prompts, answers))
    return checkable


def require_verifiable(prompts: pa.Table, split: str) -> pa.Table:
    """Return the prompts that a response can be checked for.

    Args:
        prompts: Rows of table prompts, all of one split.
        split: Its name, for the error.

    Raises:
        PromptError: there is none; names the sources.
    """
    kept = prompts.filter(pa.array(verifiable(prompts)))
    if kept.num_rows == 0:
        sources = ", ".join(sorted(set(prompts.column("source").to_pylist()))) or "none"
        raise PromptError(
            f"none of the {prompts.num_rows} {split} prompts can be checked, so no response could earn a reward "
            f"(sources: {sources}); give them answers and a verifier, or use reasoning_gym tasks"
        )
    return kept


def rewards(
    scores: NDArray[np.float64], truncated: NDArray[np.bool_], truncation_penalty: float
) -> NDArray[np.float64]:
    """Return the verifier's scores, less the penalty of responses that did not end by themselves.

    >>> rewards(np.array([1.0, 1.0, 0.0]), np.array([False, True, True]), 0.5).tolist()
    [1.0, 0.5, -0.5]
    """
    return scores - truncation_penalty * truncated


class VerifiedReward:
    """TRL's reward function, which keeps every response it was asked about.

    Args:
        prompts: Train rows of table prompts; the dataset's column `row` counts them.
        num_generations: Responses to each prompt, one after another in what TRL asks.
        end_ids: Tokens that end a response.
        truncation_penalty: `grpo.truncation_penalty`.
    """

    def __init__(
        self, prompts: pa.Table, num_generations: int, end_ids: Sequence[int], truncation_penalty: float
    ) -> None:
        self._prompts, self._num_generations = prompts, num_generations
        self._end_ids, self._truncation_penalty = end_ids, truncation_penalty
        self._kept: list[pa.Table] = []

    def __call__(
        self,
        *,
        completions: list[str],
        completion_ids: list[list[int]],
        row: list[int],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **unused: Any,
    ) -> list[float | None]:
        """Return one reward a completion."""
        asked = self._prompts.take(row)
        scores = verify(asked, completions)
        ended = np.isin([ids[-1] if ids else -1 for ids in completion_ids], self._end_ids)
        values = rewards(scores, ~ended, self._truncation_penalty)
        count = len(completions)
        self._kept.append(
            pa.table(
                {
                    "step": np.full(count, trainer_state.global_step + 1, np.int64),
                    "prompt_id": asked.column("prompt_id"),
                    "sample_index": np.arange(count, dtype=np.int32) % self._num_generations,
                    "response": completions,
                    "response_tokens": np.fromiter(map(len, completion_ids), np.int32, count),
                    "finish_reason": pa.array(np.where(ended, "stop", "length").tolist(), pa.string()),
                    "score": scores,
                    "reward": values,
                },
                schema=RL_ROLLOUTS.columns,
            )
        )
        log_metric("score", float(scores.mean()))
        groups = values.reshape(-1, self._num_generations)
        # TRL's own looks at whatever `grpo.scale_rewards` divides by, which may be the whole batch.
        log_metric("equal_rewards", float((groups == groups[:, :1]).all(axis=1).mean()))
        # TRL's own takes a padding token at the end for one.
        log_metric("truncation_rate", float((~ended).mean()))
        found: list[float | None] = values.tolist()
        return found

    def take_rollouts(self) -> pa.Table:
        """Return what was kept since the last call, as table RL_ROLLOUTS, and forget it."""
        kept, self._kept = self._kept, []
        return pa.concat_tables([RL_ROLLOUTS.columns.empty_table(), *kept]).combine_chunks()
