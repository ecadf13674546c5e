"""A model's own responses to the held-out prompts, checked."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from schemas.config import GenerateConfig, RunConfig
from schemas.stage_key import WARMUP
from schemas.tables import EVALUATE_RESPONSES
from tasks.evaluate.means import repetition
from tasks.language_model.chat import end_ids
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef, start_model
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import SamplingSettings, open_engine
from tasks.rollout.prompts import Asked, ask
from tasks.rollout.shards import Group, RolloutShard, Span, rollout_table, sampled
from tasks.stage import Progress, StageJob
from tasks.verification import verify


@dataclass(frozen=True)
class HeldOut:
    """Prompts as every model is asked them.

    Args:
        prompts: Rows of table prompts; needs no messages.
        tokens: Each of them, up to where the reply begins.
        tokenizer: Whose tokens these are.
        context: Longest sequence, in tokens.
    """

    prompts: pa.Table
    tokens: Ragged
    tokenizer: PreTrainedTokenizerBase
    context: int


@dataclass(frozen=True)
class Sampling:
    """How models answer.

    Args:
        engine: The engine and its settings.
        temperature: 0 is greedy.
        samples_per_prompt: Responses to each prompt.
        max_new_tokens: Longest response.
        seed: The run's.
    """

    engine: GenerateConfig
    temperature: float
    samples_per_prompt: int
    max_new_tokens: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig, *, teacher: bool) -> "Sampling":
        """Return how the teacher, or a student, of a distillation run answers."""
        own = config.evaluate
        limit = own.max_new_tokens or config.generate.max_new_tokens
        engine = config.teacher_sampling if teacher else config.local_sampling
        return cls(engine, own.temperature, own.samples_per_prompt, limit, config.seed)


def held_out_prompts(job: StageJob, teacher: ModelRef) -> HeldOut:
    """Return the held-out prompts with the student's chat template, as in training, no longer than both models take.

    Args:
        job: The stage; counts prompts that do not fit.
        teacher: The teacher.

    Raises:
        PromptError: a prompt leaves no room for a reply and `prompts.too_long` is `error`.
    """
    student = start_model(job.store, job.config, WARMUP)
    tokenizer = load_tokenizer(student.path, trust_remote_code=student.trust_remote_code)
    context = min(teacher.context, student.context)
    prompts = pa.concat_tables(ask(job, "held_out", tokenizer, context).read())
    tokens = Ragged.from_arrow(prompts.column("tokens"))
    return HeldOut(prompts.drop_columns("tokens"), tokens, tokenizer, context)


def own_responses(
    held_out: HeldOut, model: ModelRef, name: str, round_index: int, sampling: Sampling, progress: Progress
) -> pa.Table:
    """Let a model answer the held-out prompts, and check what it says.

    A sample's seed depends on its prompt alone, so that models, and rounds, meet the same luck.

    Args:
        held_out: What is asked.
        model: Who answers; loaded here, and freed.
        name: Value of the column `model`.
        round_index: Value of the column `round`.
        sampling: How.
        progress: Told of every response.

    Returns:
        Table EVALUATE_RESPONSES, the responses to one prompt next to each other.

    Raises:
        ModelError: the engine is not installed, or the model cannot be loaded.
    """
    limit = sampling.max_new_tokens
    settings = SamplingSettings(
        temperature=sampling.temperature,
        top_p=1.0,
        max_new_tokens=limit,
        context=held_out.context,
        end_ids=tuple(end_ids(held_out.tokenizer, model.path)),
        vocab_size=min(len(held_out.tokenizer), model.shared_vocab),
    )
    asked = Asked.of(held_out.prompts, held_out.tokens)
    engine = open_engine(model, sampling.engine, longest_sequence(asked.longest, held_out.context, limit))
    group = Group(
        prompts=asked,
        respond=sampled(engine, settings),
        policy_version=model.version,
        policy_step=model.step,
        round=WARMUP,
        samples_per_prompt=sampling.samples_per_prompt,
    )
    count, step = asked.count, sampling.engine.shard_prompts
    spans = [Span(number, start, min(start + step, count)) for number, start in enumerate(range(0, count, step))]
    done = 0

    def finished(more: int) -> None:
        nonlocal done
        done += more
        progress(done, count * sampling.samples_per_prompt, f"responses of the {name}")

    try:
        parts: dict[int, pa.Table] = {}
        for shard, rollouts in group.respond(group.shards(spans, sampling.seed), finished):
            table = rollout_table(group, shard, rollouts, held_out.tokenizer)
            parts[shard.number] = _checked(table, shard, name, round_index)
    finally:
        engine.close()
    return pa.concat_tables([parts[number] for number in sorted(parts)])


def _checked(table: pa.Table, shard: RolloutShard, name: str, round_index: int) -> pa.Table:
    count = shard.prompts.num_rows
    rows = np.repeat(np.arange(count), table.num_rows // count)
    scores = verify(shard.prompts.take(rows), table.column("response").to_pylist())
    responses = Ragged.from_arrow(table.column("response_ids"))
    return pa.table(
        {
            "model": [name] * table.num_rows,
            "round": np.full(table.num_rows, round_index, np.int32),
            "prompt_id": table.column("prompt_id"),
            "sample_index": table.column("sample_index"),
            "response": table.column("response"),
            "response_tokens": responses.lengths.astype(np.int32),
            "finish_reason": table.column("finish_reason"),
            "score": pa.array(scores, mask=np.isnan(scores)),
            "repetition": [repetition(row) for row in responses.rows()],
        },
        schema=EVALUATE_RESPONSES.columns,
    )
