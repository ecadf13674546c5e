"""Scoring a round shard by shard: the student, then the teacher and the table."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedModel

from schemas.config import ScoreConfig
from schemas.errors import ModelError, StageError
from schemas.tables import SCORE_CHECK, SCORE_STUDENT, score_schema
from tasks.language_model.chat import reply_header
from tasks.language_model.control_tokens import TokenIds
from tasks.language_model.head import check_head
from tasks.language_model.loading import free_memory, load_ref, load_tokenizer
from tasks.language_model.prefill import Prefill, TokensDone, prefill
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef, policy_model, teacher_model
from tasks.language_model.tensor_parallel import prefill_model
from tasks.score.check import check_sampler, checked_rows, mean_gap, require_sampled
from tasks.score.ifd import ifd, mean_nll
from tasks.score.shards import Rollouts, Shard, plan_shards, read_rows, read_shards
from tasks.stage import StageJob


@dataclass(frozen=True)
class MeanNll:
    """Mean negative log-likelihoods per sample, float64, nats per token, NaN where nothing could be scored.

    Args:
        conditional: s(y|x).
        unconditional: s(y), over the same tokens.
    """

    conditional: NDArray[np.float64]
    unconditional: NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """What one model says of a shard.

    Args:
        nll: Of each response.
        conditional: Of each token after the prompt, with the top-k targets if asked for.
    """

    nll: MeanNll
    conditional: Prefill


def unconditional_context(context: str, header: TokenIds | None, bos_id: int | None) -> TokenIds:
    """Return the tokens before a response whose prompt is left out; empty for `bos` without a BOS token."""
    if context == "header":
        if header is None:
            raise ModelError("score.context: `header` needs a chat template")
        return header
    return np.asarray([] if bos_id is None else [bos_id], dtype=np.int32)


def score_rollouts(
    model: PreTrainedModel,
    prompts: Ragged,
    responses: Ragged,
    bare: TokenIds,
    settings: ScoreConfig,
    *,
    top_k: int,
    shared_vocab: int,
    sampled: NDArray[np.float32] | None = None,
    on_tokens: TokensDone | None = None,
) -> Scored:
    """Score responses with and without their prompts, both in the same packed passes.

    Args:
        model: A causal language model in eval mode.
        prompts: int32 token rows.
        responses: int32 token rows, as many.
        bare: int32 tokens that stand before a response when its prompt is left out; may be empty.
        settings: Batch sizes.
        top_k: Targets to take at each response position after the prompt; 0 for none.
        shared_vocab: Ids at or above this are padding of the vocabulary and no targets.
        sampled: Log-probability of each flat response token after its prompt, where it is known already: then only the
            responses without their prompts are passed through the model.
        on_tokens: Told the tokens of each pass.
    """
    contexts, texts = Ragged.repeat(bare, len(responses)), responses
    if sampled is None:
        contexts, texts = Ragged.concat([prompts, contexts]), Ragged.concat([responses, responses])
    found = prefill(
        model,
        contexts,
        texts,
        batch_tokens=settings.batch_tokens,
        logits_chunk=settings.logits_chunk,
        top_k=top_k,
        topk_rows=np.arange(len(texts)) < len(texts) - len(responses),
        shared_vocab=shared_vocab,
        on_tokens=on_tokens,
    )
    after_prompt, alone = np.split(found.logprobs, [len(texts.values) - len(responses.values)])
    if sampled is not None:
        # Rounding may leave a certain token a little above 0.
        after_prompt = np.minimum(sampled, 0.0)
    # Both means run over the same tokens: those that have one before them in either text.
    scored = np.ones(len(responses.values), bool)
    if len(bare) == 0:
        scored[responses.offsets[:-1][responses.lengths > 0]] = False
    means = (mean_nll(Ragged(logprobs, responses.offsets), scored) for logprobs in (after_prompt, alone))
    return Scored(MeanNll(*means), Prefill(after_prompt, found.topk_ids, found.topk_logprobs))


def score_table(
    sample_ids: pa.Array, responses: Ragged, student: MeanNll, teacher: Scored, settings: ScoreConfig
) -> pa.Table:
    """Join both models' scores into the score table."""
    student_ifd = ifd(student.conditional, student.unconditional, settings.ifd_form)
    teacher_ifd = ifd(teacher.nll.conditional, teacher.nll.unconditional, settings.ifd_form)
    schema = score_schema(settings.top_k, settings.topk_dtype).columns
    scalars = {
        "student_nll": student.conditional,
        "student_nll_uncond": student.unconditional,
        "teacher_nll": teacher.nll.conditional,
        "teacher_nll_uncond": teacher.nll.unconditional,
        "student_ifd": student_ifd,
        "teacher_ifd": teacher_ifd,
        "delta_ifd": teacher_ifd - student_ifd,
    }
    unscored = np.isnan(student.conditional)
    columns: dict[str, pa.Array] = {
        "sample_id": sample_ids,
        "response_tokens": pa.array(responses.lengths.astype(np.int32)),
        **{name: pa.array(values.astype(np.float32), mask=unscored) for name, values in scalars.items()},
        "teacher_topk_ids": _targets(teacher.conditional.topk_ids, responses, schema.field("teacher_topk_ids").type),
        "teacher_topk_logprobs": _targets(
            teacher.conditional.topk_logprobs, responses, schema.field("teacher_topk_logprobs").type
        ),
    }
    return pa.table(columns, schema=schema)


def _targets(values: NDArray[np.generic], responses: Ragged, kind: pa.ListType) -> pa.ListArray:
    fixed = kind.value_type
    flat = pa.array(values.reshape(-1).astype(fixed.value_type.to_pandas_dtype()), type=fixed.value_type)
    lists = pa.FixedSizeListArray.from_arrays(flat, type=fixed)
    return pa.ListArray.from_arrays(pa.array(responses.offsets.astype(np.int32)), lists)


def score_round(job: StageJob) -> None:
    """Score every shard that is not there yet: all of them by the student, then all by the teacher."""
    store, settings = job.store, job.config.score
    student, teacher = policy_model(store, job.config, job.round), teacher_model(store, job.config)
    if settings.top_k > teacher.shared_vocab:
        raise ModelError(f"score.top_k: {settings.top_k}: teacher and student share {teacher.shared_vocab} tokens only")
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    header = reply_header(tokenizer) if settings.context == "header" else None
    bare = unconditional_context(settings.context, header, tokenizer.bos_token_id)

    shards = plan_shards(job)
    untaught = [shard for shard in shards if not shard.path.is_file()]
    unlearned = [shard for shard in untaught if not shard.student.is_file()]
    checks = store.path(job.key, "check.parquet")
    checked = None
    if unlearned and _has_sampled_logprobs(job) and settings.check_samples and not checks.is_file():
        rows = checked_rows(sum(s.rows for s in shards), settings.check_samples, [job.config.seed, job.round])
        checked = read_rows(job, shards, rows)
    total = _tokens_to_score(job, untaught, bare) + (checked.tokens if checked is not None else 0)
    done = 0

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, total, "tokens")

    # The whole round by the student first, so that its memory is free again when the teacher is loaded.
    if unlearned:
        _score_by_student(job, student, unlearned, checked, bare, on_tokens)
        free_memory()
    if untaught:
        _score_by_teacher(job, teacher, untaught, bare, on_tokens)
        free_memory()
    job.counters |= {"samples": sum(shard.rows for shard in shards), "tokens": done}
    if checks.is_file():
        job.counters["sampled_logprob_gap"] = mean_gap(store.read_part(checks, SCORE_CHECK))
    for path in (*(shard.student for shard in shards), checks):
        store.remove(path)


def _has_sampled_logprobs(job: StageJob) -> bool:
    """Say whether the student's log-probabilities came with its samples: others' responses have none of it."""
    return job.config.score.student_logprobs == "sampled" and job.config.generate.policy == "student"


def _tokens_to_score(job: StageJob, untaught: list[Shard], bare: TokenIds) -> int:
    """Count the tokens of both models' passes; check what the sampler left before any model is loaded."""
    total = 0
    for shard, read in read_shards(job, untaught):
        unconditional = len(bare) * shard.rows + len(read.responses.values)
        total += read.tokens + unconditional
        if shard.student.is_file():
            continue
        total += unconditional
        if _has_sampled_logprobs(job):
            require_sampled(read, job.store.relative(shard.source))
        else:
            total += read.tokens
    return total


def _score_by_student(
    job: StageJob, ref: ModelRef, shards: list[Shard], checked: Rollouts | None, bare: TokenIds, on_tokens: TokensDone
) -> None:
    """Write the student's part of each shard."""
    store, settings = job.store, job.config.score
    model = _load(ref)
    if checked is not None:
        gaps = check_sampler(job, ref, model, checked, on_tokens)
        store.write_table(store.path(job.key, "check.parquet"), gaps, SCORE_CHECK)
    for shard, read in read_shards(job, shards):
        scored = score_rollouts(
            model,
            read.prompts,
            read.responses,
            bare,
            settings,
            top_k=0,
            shared_vocab=ref.shared_vocab,
            sampled=read.sampled.values if _has_sampled_logprobs(job) else None,
            on_tokens=on_tokens,
        )
        _require_finite("student", read, scored.nll, bare)
        columns = {"nll": scored.nll.conditional, "nll_uncond": scored.nll.unconditional}
        table = pa.table({name: pa.array(values, mask=np.isnan(values)) for name, values in columns.items()})
        store.write_table(shard.student, table, SCORE_STUDENT)


def _score_by_teacher(job: StageJob, ref: ModelRef, shards: list[Shard], bare: TokenIds, on_tokens: TokensDone) -> None:
    """Write the score table of each shard, with what the student said of it."""
    store, settings = job.store, job.config.score
    schema = score_schema(settings.top_k, settings.topk_dtype)
    with prefill_model(ref) as model:
        for shard, read in read_shards(job, shards):
            scored = score_rollouts(
                model,
                read.prompts,
                read.responses,
                bare,
                settings,
                top_k=settings.top_k,
                shared_vocab=ref.shared_vocab,
                on_tokens=on_tokens,
            )
            _require_finite("teacher", read, scored.nll, bare)
            by_student = store.read_part(shard.student, SCORE_STUDENT)
            student = MeanNll(*(by_student.column(name).to_numpy() for name in ("nll", "nll_uncond")))
            table = score_table(read.sample_ids, read.responses, student, scored, settings)
            store.write_table(shard.path, table, schema, row_group_rows=128)


def _load(ref: ModelRef) -> PreTrainedModel:
    model = load_ref(ref, packed=True)
    check_head(model)
    return model


def _require_finite(name: str, read: Rollouts, nll: MeanNll, bare: TokenIds) -> None:
    expected = read.responses.lengths > (1 if len(bare) == 0 else 0)
    bad = expected & ~(np.isfinite(nll.conditional) & np.isfinite(nll.unconditional))
    if bad.any():
        first = read.sample_ids[int(np.flatnonzero(bad)[0])].as_py()
        raise StageError(
            f"score: the {name} gave a non-finite log-probability for {int(bad.sum())} sample(s), the first is "
            f"{first}. Its weights are damaged or overflow in their dtype; try `{name}.dtype: float32`."
        )
