"""The files of stage score: of each shard the student's part, then the score table; and the check of the sampler."""

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from schemas.errors import StageError
from schemas.tables import SCORE_CHECK, SCORE_STUDENT, score_schema
from tasks.language_model.control_tokens import TokenIds
from tasks.language_model.prefill import TokensDone
from tasks.language_model.sources import ModelRef
from tasks.score.check import check_sampler
from tasks.score.scoring import MeanNll, Prefiller, local_prefill, score_rollouts, score_table
from tasks.score.shards import Samples, ScoreShard
from tasks.stage import StageJob

CHECK_NAME = "check.parquet"
"""How far the sampler's log-probabilities were from the student's, until the stage ends."""


def has_sampled_logprobs(job: StageJob) -> bool:
    """Say whether the student's log-probabilities came with its samples: others' responses have none of it."""
    return job.config.score.student_logprobs == "sampled" and job.config.generate.policy == "student"


def write_check(job: StageJob, ref: ModelRef, model: PreTrainedModel, read: Samples, on_tokens: TokensDone) -> None:
    """Check the sampler's log-probabilities of ``read`` against the student's and write how far they differ."""
    gaps = check_sampler(job, ref, model, read, on_tokens)
    job.store.write_table(job.store.path(job.key, CHECK_NAME), gaps, SCORE_CHECK)


def write_student(
    job: StageJob,
    ref: ModelRef,
    model: PreTrainedModel,
    shard: ScoreShard,
    read: Samples,
    bare: TokenIds,
    on_tokens: TokensDone,
) -> None:
    """Write the student's part of a shard."""
    scored = score_rollouts(
        local_prefill(model, job.config.score),
        read.prompts,
        read.responses,
        bare,
        top_k=0,
        shared_vocab=ref.shared_vocab,
        sampled=read.sampled.values if has_sampled_logprobs(job) else None,
        on_tokens=on_tokens,
    )
    _require_finite("student", read, scored.nll, bare)
    columns = {"nll": scored.nll.conditional, "nll_uncond": scored.nll.unconditional}
    table = pa.table({name: pa.array(values, mask=np.isnan(values)) for name, values in columns.items()})
    job.store.write_table(shard.student, table, SCORE_STUDENT)


def write_scores(
    job: StageJob,
    ref: ModelRef,
    teacher: Prefiller,
    shard: ScoreShard,
    read: Samples,
    bare: TokenIds,
    on_tokens: TokensDone,
) -> None:
    """Write the score table of a shard: what the teacher says of it, and what the student said."""
    store, settings = job.store, job.config.score
    scored = score_rollouts(
        teacher,
        read.prompts,
        read.responses,
        bare,
        top_k=settings.top_k,
        shared_vocab=ref.shared_vocab,
        on_tokens=on_tokens,
    )
    _require_finite("teacher", read, scored.nll, bare)
    by_student = store.read_part(shard.student, SCORE_STUDENT)
    student = MeanNll(*(by_student.column(name).to_numpy() for name in ("nll", "nll_uncond")))
    table = score_table(read.sample_ids, read.responses, student, scored, settings)
    store.write_table(shard.path, table, score_schema(settings.top_k, settings.topk_dtype), row_group_rows=128)


def _require_finite(name: str, read: Samples, nll: MeanNll, bare: TokenIds) -> None:
    expected = read.responses.lengths > (1 if len(bare) == 0 else 0)
    bad = expected & ~(np.isfinite(nll.conditional) & np.isfinite(nll.unconditional))
    if bad.any():
        first = read.sample_ids[int(np.flatnonzero(bad)[0])].as_py()
        raise StageError(
            f"score: the {name} gave a non-finite log-probability for {int(bad.sum())} sample(s), the first is "
            f"{first}. Its weights are damaged or overflow in their dtype; try `{name}.dtype: float32`."
        )
