"""What one model says of a shard's responses, with and without their prompts, and both models' words as a table."""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedModel

from schemas.config import ScoreConfig
from schemas.tables import score_schema
from tasks.language_model.control_tokens import TokenIds
from tasks.language_model.prefill import Prefill, TokensDone, prefill
from tasks.language_model.ragged import Ragged
from tasks.score.ifd import ifd, mean_nll


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


class Prefiller(Protocol):
    """Scores responses after their contexts with one model."""

    def __call__(
        self,
        context: Ragged,
        response: Ragged,
        *,
        top_k: int,
        topk_rows: NDArray[np.bool_],
        shared_vocab: int,
        on_tokens: TokensDone | None,
    ) -> Prefill:
        """See ``tasks.language_model.prefill.prefill``."""
        ...


def local_prefill(model: PreTrainedModel, settings: ScoreConfig) -> Prefiller:
    """Return what scores with a model of this process, by packed passes."""
    return partial(prefill, model, batch_tokens=settings.batch_tokens, logits_chunk=settings.logits_chunk)


def score_rollouts(
    prefiller: Prefiller,
    prompts: Ragged,
    responses: Ragged,
    bare: TokenIds,
    *,
    top_k: int,
    shared_vocab: int,
    sampled: NDArray[np.float32] | None = None,
    on_tokens: TokensDone | None = None,
) -> Scored:
    """Score responses with and without their prompts.

    Args:
        prefiller: Scores them.
        prompts: int32 token rows.
        responses: int32 token rows, as many.
        bare: int32 tokens that stand before a response when its prompt is left out; may be empty.
        top_k: Targets to take at each response position after the prompt; 0 for none.
        shared_vocab: Ids at or above this are padding of the vocabulary and no targets.
        sampled: Log-probability of each flat response token after its prompt, where it is known already: then only the
            responses without their prompts are passed through the model.
        on_tokens: Told the tokens as they are done.
    """
    contexts, texts = Ragged.repeat(bare, len(responses)), responses
    if sampled is None:
        contexts, texts = Ragged.concat([prompts, contexts]), Ragged.concat([responses, responses])
    found = prefiller(
        contexts,
        texts,
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
