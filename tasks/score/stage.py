"""Scoring a round shard by shard: the student, then the teacher and the table."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from schemas.errors import ModelError
from schemas.tables import SCORE_CHECK
from tasks.collector import free_memory
from tasks.language_model.chat import reply_header
from tasks.language_model.control_tokens import TokenIds
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.prefill import TokensDone
from tasks.language_model.sources import ModelRef, policy_model, resolved_models, teacher_model
from tasks.language_model.tensor_parallel import load_whole, prefill_model
from tasks.score.check import checked_rows, mean_gap, require_sampled
from tasks.score.results import CHECK_NAME, has_sampled_logprobs, write_check, write_scores, write_student
from tasks.score.scoring import Prefiller, local_prefill
from tasks.score.shards import Samples, ScoreShard, plan_shards, read_rows, read_shards
from tasks.stage import StageJob


def score_round(job: StageJob) -> None:
    """Score every shard that is not there yet: all of them by the student, then all by the teacher."""
    store, settings, begun = job.store, job.config.score, time.perf_counter()
    student, shared = policy_model(store, job.config, job.round), resolved_models(store).shared_vocab
    if settings.top_k > shared:
        raise ModelError(f"score.top_k: {settings.top_k}: teacher and student share {shared} tokens only")
    bare = bare_context(job, student)
    shards = plan_shards(job)
    unscored = [shard for shard in shards if not shard.path.is_file()]
    without_student = [shard for shard in unscored if not shard.student.is_file()]
    checks = store.path(job.key, CHECK_NAME)
    checked = None
    if unscored and has_sampled_logprobs(job) and settings.check_samples and not checks.is_file():
        checked = samples_to_check(job, shards)
    total = _tokens_to_score(job, unscored, bare) + (checked.tokens if checked is not None else 0)
    done = 0

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, total, "tokens")

    # Actors fetch the teacher themselves; one on servers has its own machines.
    by_actors = unscored if job.config.ray is not None and settings.engine == "transformers" else []
    # Before the student's pass, which takes long: a teacher that is not there should be told of first.
    teacher = teacher_model(store, job.config) if unscored and not by_actors else None

    # The whole round by the student first, so that its memory is free again when the teacher is loaded.
    if job.config.ray is not None and unscored:
        from tasks.score.on_ray import score_on_ray

        score_on_ray(job, job.config.ray, without_student, by_actors, on_tokens, check=checked is not None)
    elif without_student or checked is not None:
        _score_by_student(job, student, without_student, checked, bare, on_tokens)
        free_memory()
    if teacher is not None:
        _score_by_teacher(job, teacher, unscored, bare, on_tokens)
        free_memory()
    # The tokens are of this attempt, the stage's seconds of all.
    rate = round(done / (time.perf_counter() - begun), 1)
    job.counters |= {"samples": sum(shard.rows for shard in shards), "tokens": done, "tokens_per_second": rate}
    if checks.is_file():
        job.counters["sampled_logprob_gap"] = mean_gap(store.read_part(checks, SCORE_CHECK))
    for path in (*(shard.student for shard in shards), checks):
        store.remove(path)


def bare_context(job: StageJob, student: ModelRef) -> TokenIds:
    """Return the tokens before a response whose prompt is left out; empty for `bos` without a BOS token.

    Raises:
        ModelError: `score.context` is `header`, and the chat template has none.
    """
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    if job.config.score.context == "header":
        return reply_header(tokenizer)
    return np.asarray([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=np.int32)


def samples_to_check(job: StageJob, shards: list[ScoreShard]) -> Samples:
    """Read the samples of the round whose log-probabilities are checked; equal in every process."""
    rows = checked_rows(
        sum(shard.rows for shard in shards), job.config.score.check_samples, [job.config.seed, job.round]
    )
    return read_rows(job, shards, rows)


def _tokens_to_score(job: StageJob, unscored: list[ScoreShard], bare: TokenIds) -> int:
    """Count the tokens of both models' passes; check what the sampler left before any model is loaded."""
    total = 0
    for shard, read in read_shards(job, unscored):
        unconditional = len(bare) * shard.rows + len(read.responses.values)
        total += read.tokens + unconditional
        if shard.student.is_file():
            continue
        total += unconditional
        if has_sampled_logprobs(job):
            require_sampled(read, job.store.relative(shard.source))
        else:
            total += read.tokens
    return total


def _score_by_student(
    job: StageJob,
    ref: ModelRef,
    shards: list[ScoreShard],
    checked: Samples | None,
    bare: TokenIds,
    on_tokens: TokensDone,
) -> None:
    model = load_whole(ref)
    if checked is not None:
        write_check(job, ref, model, checked, on_tokens)
    for shard, read in read_shards(job, shards):
        write_student(job, ref, model, shard, read, bare, on_tokens)


def _score_by_teacher(
    job: StageJob, ref: ModelRef, shards: list[ScoreShard], bare: TokenIds, on_tokens: TokensDone
) -> None:
    with _teacher(job, ref, shards, bare) as teacher:
        for shard, read in read_shards(job, shards):
            write_scores(job, ref, teacher, shard, read, bare, on_tokens)


@contextmanager
def _teacher(job: StageJob, ref: ModelRef, shards: list[ScoreShard], bare: TokenIds) -> Iterator[Prefiller]:
    """Load the teacher, or find it on its servers."""
    settings = job.config.score
    if settings.engine == "transformers":
        with prefill_model(ref) as model:
            yield local_prefill(model, settings)
        return
    from tasks.score.server import ServedPrefill

    longest = max(
        int((np.maximum(read.prompts.lengths, len(bare)) + read.responses.lengths).max())
        for _, read in read_shards(job, shards)
    )
    served = ServedPrefill(ref, settings.server, longest, settings.top_k)
    try:
        yield served
        job.counters |= {"engine": settings.engine} | served.counters()
    finally:
        served.close()
