"""Scoring a round shard by shard: student first, then teacher, then the table."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from schemas.config import ScoreConfig
from schemas.errors import ModelError, StageError
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, score_schema
from tasks.language_model.chat import TokenIds, reply_header
from tasks.language_model.head import check_head
from tasks.language_model.loading import load_ref, load_tokenizer
from tasks.language_model.prefill import Prefill, TokensDone, prefill
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef, policy_model, teacher_model
from tasks.score.ifd import ifd, mean_nll
from tasks.stage import StageJob


@dataclass(frozen=True)
class Shard:
    """One part of the round's rollouts.

    Args:
        path: Where its scores go.
        source: File of the rollouts.
        start: First row in the file.
        rows: Rows to score.
    """

    path: Path
    source: Path
    start: int
    rows: int


@dataclass(frozen=True)
class Rollouts:
    """The samples of a shard: ids (strings), and int32 token rows of prompts and responses."""

    sample_ids: pa.Array
    prompts: Ragged
    responses: Ragged


@dataclass(frozen=True)
class Scored:
    """What one model says of a shard.

    Args:
        conditional: Prefill after the prompt, with the top-k targets if asked for.
        nll: s(y|x) per sample, nats per token, NaN where nothing could be scored.
        nll_uncond: s(y), over the same tokens.
    """

    conditional: Prefill
    nll: NDArray[np.float64]
    nll_uncond: NDArray[np.float64]


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
    on_tokens: TokensDone | None = None,
) -> Scored:
    """Score responses with and without their prompts.

    Args:
        model: A causal language model in eval mode.
        prompts: int32 token rows.
        responses: int32 token rows, as many.
        bare: int32 tokens that stand before a response when its prompt is left out; may be empty.
        settings: Batch sizes.
        top_k: Targets to take at each response position of the conditional pass; 0 for none.
        shared_vocab: Ids at or above this are padding of the vocabulary and no targets.
        on_tokens: Told the tokens of each pass.
    """
    passes = [
        prefill(
            model,
            context,
            responses,
            batch_tokens=settings.batch_tokens,
            logits_chunk=settings.logits_chunk,
            top_k=k,
            shared_vocab=shared_vocab,
            on_tokens=on_tokens,
        )
        for context, k in ((prompts, top_k), (Ragged.repeat(bare, len(responses)), 0))
    ]
    # Both means run over the same tokens: those that both passes predict.
    scored = np.ones(len(responses.values), bool)
    if len(bare) == 0:
        scored[responses.offsets[:-1][responses.lengths > 0]] = False
    nll, nll_uncond = (mean_nll(Ragged(p.logprobs, responses.offsets), scored) for p in passes)
    return Scored(passes[0], nll, nll_uncond)


def score_table(
    sample_ids: pa.Array, responses: Ragged, student: Scored, teacher: Scored, settings: ScoreConfig
) -> pa.Table:
    """Join both models' scores into the score table."""
    student_ifd = ifd(student.nll, student.nll_uncond, settings.ifd_form)
    teacher_ifd = ifd(teacher.nll, teacher.nll_uncond, settings.ifd_form)
    schema = score_schema(settings.top_k, settings.topk_dtype).columns
    scalars = {
        "student_nll": student.nll,
        "student_nll_uncond": student.nll_uncond,
        "teacher_nll": teacher.nll,
        "teacher_nll_uncond": teacher.nll_uncond,
        "student_ifd": student_ifd,
        "teacher_ifd": teacher_ifd,
        "delta_ifd": teacher_ifd - student_ifd,
    }
    unscored = np.isnan(student.nll)
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


def plan_shards(job: StageJob) -> list[Shard]:
    """Cut the rollout files into shards of at most ``score.shard_samples`` rows."""
    store, source = job.store, StageKey("generate", job.round)
    size = job.config.score.shard_samples
    shards: list[Shard] = []
    for record in store.finished(source).outputs:
        for start in range(0, record.rows or 0, size):
            path = store.part(job.key, len(shards))
            shards.append(Shard(path, store.folder / record.path, start, min(size, (record.rows or 0) - start)))
    return shards


def score_round(job: StageJob) -> None:
    """Score every shard that is not there yet: all of them by the student, then all by the teacher."""
    store, settings = job.store, job.config.score
    student, teacher = policy_model(store, job.config, job.round), teacher_model(store, job.config)
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    header = reply_header(tokenizer) if settings.context == "header" else None
    bare = unconditional_context(settings.context, header, tokenizer.bos_token_id)

    shards = plan_shards(job)
    pending = [(shard, _read(job, shard)) for shard in shards if not shard.path.is_file()]
    passes = 2 * sum(
        len(read.prompts.values) + 2 * len(read.responses.values) + len(bare) * len(read.responses)
        for _, read in pending
    )
    done = 0

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, passes, "tokens")

    rollouts = [read for _, read in pending]
    # The whole round by the student first, so that its memory is free again when the teacher is loaded.
    by_student = list(_score_all("student", student, rollouts, bare, settings, 0, on_tokens))
    by_teacher = _score_all("teacher", teacher, rollouts, bare, settings, settings.top_k, on_tokens)
    schema = score_schema(settings.top_k, settings.topk_dtype)
    for (shard, read), learned, taught in zip(pending, by_student, by_teacher, strict=True):
        table = score_table(read.sample_ids, read.responses, learned, taught, settings)
        store.write_table(shard.path, table, schema, row_group_rows=128)
    job.counters |= {"samples": sum(shard.rows for shard in shards), "tokens": done}


def _score_all(
    name: str,
    ref: ModelRef,
    rollouts: list[Rollouts],
    bare: TokenIds,
    settings: ScoreConfig,
    top_k: int,
    on_tokens: TokensDone,
) -> Iterator[Scored]:
    """Score one shard after another with one model, which is loaded at the first and released after the last."""
    if not rollouts:
        return
    model = load_ref(ref)
    check_head(model)
    for read in rollouts:
        scored = score_rollouts(
            model,
            read.prompts,
            read.responses,
            bare,
            settings,
            top_k=top_k,
            shared_vocab=ref.shared_vocab,
            on_tokens=on_tokens,
        )
        _require_finite(name, read.sample_ids, scored, read.responses, bare)
        yield scored
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _read(job: StageJob, shard: Shard) -> Rollouts:
    table = job.store.read_part(shard.source, GENERATE, ["sample_id", "prompt_ids", "response_ids"])
    table = table.slice(shard.start, shard.rows).combine_chunks()
    return Rollouts(
        table.column("sample_id").combine_chunks(),
        Ragged.from_arrow(table.column("prompt_ids")),
        Ragged.from_arrow(table.column("response_ids")),
    )


def _require_finite(name: str, ids: pa.Array, scored: Scored, responses: Ragged, bare: TokenIds) -> None:
    expected = responses.lengths > (1 if len(bare) == 0 else 0)
    bad = expected & ~(np.isfinite(scored.nll) & np.isfinite(scored.nll_uncond))
    if bad.any():
        first = ids[int(np.flatnonzero(bad)[0])].as_py()
        raise StageError(
            f"score: the {name} gave a non-finite log-probability for {int(bad.sum())} sample(s), the first is "
            f"{first}. Its weights are damaged or overflow in their dtype; try `{name}.dtype: float32`."
        )
