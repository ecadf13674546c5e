"""Are the sampler's log-probabilities those of the student that is scored? A few of them against a prefill."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedModel

from schemas.errors import ArtifactError, StageError
from schemas.tables import SCORE_CHECK
from tasks.language_model.prefill import TokensDone, gap_tolerance, prefill
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef
from tasks.score.shards import Samples
from tasks.stage import StageJob


def checked_rows(samples: int, count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Return ``count`` of ``samples`` rows, ascending: one drawn from each of ``count`` equal stretches.

    >>> checked_rows(3, 16, [1, 0]).tolist()
    [0, 1, 2]
    """
    count = min(samples, count)
    bounds = np.arange(count + 1, dtype=np.int64) * samples // max(count, 1)
    drawn = np.random.default_rng(seed).random(count) * np.diff(bounds)
    return np.asarray(bounds[:-1] + drawn.astype(np.int64))


def require_sampled(read: Samples, name: str) -> None:
    """Check that every response token has a sampled log-probability.

    Raises:
        ArtifactError: one is NaN or infinite; names the file ``name`` and the sample.
    """
    missing = np.flatnonzero(~np.isfinite(read.sampled.values))
    if len(missing):
        sample = int(np.searchsorted(read.sampled.offsets, missing[0], side="right")) - 1
        raise ArtifactError(
            f"{name}: sample {read.sample_ids[sample].as_py()}: `sampled_logprobs` has no number for {len(missing)} "
            "token(s), of this sample or ones after it; set `score.student_logprobs: prefill` to compute them, or "
            "re-run stage `generate`"
        )


def check_sampler(
    job: StageJob, ref: ModelRef, model: PreTrainedModel, read: Samples, on_tokens: TokensDone
) -> pa.Table:
    """Compare the sampler's log-probabilities with a prefill, token by token.

    Args:
        job: The stage.
        ref: The student.
        model: Its weights, in eval mode.
        read: The samples to compare.
        on_tokens: Told the tokens of each pass.

    Returns:
        Mean absolute differences per sample (schema SCORE_CHECK).

    Raises:
        StageError: their token-weighted mean is above ``gap_tolerance``.
    """
    settings = job.config.score
    found = prefill(
        model,
        read.prompts,
        read.responses,
        batch_tokens=settings.batch_tokens,
        logits_chunk=settings.logits_chunk,
        on_tokens=on_tokens,
    )
    differences = Ragged(np.abs(found.logprobs.astype(np.float64) - read.sampled.values), read.responses.offsets)
    gaps = np.array([differences[i].mean() if len(differences[i]) else 0.0 for i in range(len(differences))])
    table = pa.table(
        {
            "sample_id": read.sample_ids,
            "response_tokens": pa.array(differences.lengths.astype(np.int32)),
            "gap": pa.array(gaps),
        },
        schema=SCORE_CHECK.columns,
    )
    gap, tolerance = mean_gap(table), gap_tolerance(model.dtype)
    # Written so that NaN fails.
    if not gap <= tolerance:
        first = int(np.flatnonzero(~(gaps <= tolerance))[0])
        raise StageError(
            f"{job.key.label}: the sampler's log-probabilities are not those of the student: over {len(gaps)} samples "
            f"they differ by {gap:.3g} nats per token from a prefill, where {model.dtype} explains {tolerance}. The "
            f"first is {read.sample_ids[first].as_py()} ({gaps[first]:.3g} nats), sampled by policy "
            f"{read.policy_versions[first].as_py()} with engine `{job.config.generate.engine}`; scored is policy "
            f"{ref.version}. If these are the same, the engine computes in another dtype or adds tokens to the prompt. "
            "Set `score.student_logprobs: prefill` to compute them again, or re-run stage `generate`"
        )
    return table


def mean_gap(table: pa.Table) -> float:
    """Return the token-weighted mean of a SCORE_CHECK table's gaps, nats per token; 0 without a token."""
    tokens = table.column("response_tokens").to_numpy()
    return float(np.dot(table.column("gap").to_numpy(), tokens) / max(int(tokens.sum()), 1))
