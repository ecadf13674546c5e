"""A model's own responses to the held-out prompts, checked."""

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from schemas.stage_key import WARMUP
from schemas.tables import EVALUATE_RESPONSES
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.evaluate.means import repetition
from tasks.graph import PROMPTS
from tasks.language_model.chat import end_ids
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef, start_model
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import SamplingSettings, open_engine
from tasks.rollout.prompts import fitting_prompts, of_split
from tasks.rollout.shards import Group, Shard, rollout_table, sampled
from tasks.stage import StageJob
from tasks.verification import verify


class HeldOut:
    """The held-out prompts as every model is asked them.

    With the student's chat template, as in training, and no longer than both models take.

    Args:
        job: The stage; counts prompts that do not fit.
        teacher: The teacher.

    Raises:
        PromptError: a prompt leaves no room for a reply and `prompts.too_long` is `error`.
    """

    def __init__(self, job: StageJob, teacher: ModelRef) -> None:
        config = job.config
        student = start_model(job.store, config, WARMUP)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            student.path, trust_remote_code=student.trust_remote_code
        )
        self.context = min(teacher.context, student.context)
        table = job.store.read_table(PROMPTS, PROMPTS_TABLE)
        self.prompts: pa.Table
        self.tokens: Ragged
        self.prompts, self.tokens = fitting_prompts(job, of_split(table, "held_out"), self.tokenizer, self.context)


def own_responses(job: StageJob, held_out: HeldOut, model: ModelRef, name: str, round_index: int) -> pa.Table:
    """Let a model answer the held-out prompts, and check what it says.

    A sample's seed depends on its prompt alone, so that models, and rounds, meet the same luck.

    Args:
        job: The stage; told of every response.
        held_out: What is asked.
        model: Who answers; loaded here, and freed.
        name: Value of the column `model`.
        round_index: Value of the column `round`.

    Returns:
        Table EVALUATE_RESPONSES, the responses to one prompt next to each other.

    Raises:
        ModelError: the engine is not installed, or the model cannot be loaded.
    """
    config, settings = job.config.generate, job.config.evaluate
    limit = settings.max_new_tokens or config.max_new_tokens
    sampling = SamplingSettings(
        temperature=settings.temperature,
        top_p=1.0,
        max_new_tokens=limit,
        context=held_out.context,
        end_ids=tuple(end_ids(held_out.tokenizer, model.path)),
        vocab_size=min(len(held_out.tokenizer), model.shared_vocab),
    )
    engine = open_engine(model, config, longest_sequence(held_out.tokens.lengths, held_out.context, limit))
    group = Group(
        prompt_ids=held_out.prompts.column("prompt_id"),
        tokens=held_out.tokens,
        respond=sampled(engine, sampling),
        policy_version=model.version,
        policy_step=model.step,
        round=WARMUP,
        prefix=name,
        samples_per_prompt=settings.samples_per_prompt,
    )
    count, step = len(group.prompt_ids), config.shard_prompts
    shards = (
        group.shard(number, start, min(start + step, count), job.config.seed)
        for number, start in enumerate(range(0, count, step))
    )
    done = 0

    def finished(more: int) -> None:
        nonlocal done
        done += more
        job.progress(done, count * settings.samples_per_prompt, f"responses of the {name}")

    try:
        parts: dict[int, pa.Table] = {}
        for shard, rollouts in group.respond(shards, finished):
            table = rollout_table(group, shard, rollouts, held_out.tokenizer)
            parts[shard.number] = _checked(table, held_out, shard, name, round_index)
    finally:
        engine.close()
    return pa.concat_tables([parts[number] for number in sorted(parts)])


def _checked(table: pa.Table, held_out: HeldOut, shard: Shard, name: str, round_index: int) -> pa.Table:
    start, stop = shard.rows
    rows = np.repeat(np.arange(start, stop), table.num_rows // (stop - start))
    scores = verify(held_out.prompts.take(rows), table.column("response").to_pylist())
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
            "repetition": [repetition(row) for row in responses.rows(0, table.num_rows)],
        },
        schema=EVALUATE_RESPONSES.columns,
    )
