"""One model's answers to the held-out prompts, checked."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedTokenizerBase

from schemas.config import GenerateConfig, RLConfig
from schemas.errors import PromptError
from schemas.rl_tables import RL_EVALUATE_METRICS, RL_EVALUATE_RESPONSES
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import PROMPTS
from tasks.language_model.chat import end_ids, require_chat_template
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef
from tasks.models.fingerprint import folder_fingerprint
from tasks.rl.reward import require_verifiable
from tasks.rollout.context import longest_sequence
from tasks.rollout.engine import Requests, Rollouts, SamplingSettings, open_engine
from tasks.rollout.prompts import encode_messages, of_split
from tasks.rollout.seeds import sample_seed
from tasks.stage import StageJob
from tasks.verification import verify

_ROUND = 0
"""A seed's round, of which RL has one."""


def evaluate_model(job: StageJob[RLConfig], folder: Path, name: str) -> None:
    """Sample, check and write `metrics.parquet` and `responses.parquet`.

    Args:
        job: Stage baseline or evaluate.
        folder: The model.
        name: How the tables call it.

    Raises:
        PromptError: no held-out prompt can be checked, or leaves room for a response.
    """
    store, config = job.store, job.config
    tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    require_chat_template(tokenizer, "model")
    held_out = of_split(store.read_table(PROMPTS, PROMPTS_TABLE), "held_out")
    prompts = require_verifiable(held_out, "held-out")
    tokens = encode_messages(tokenizer, prompts.column("messages"))
    model = _model(config, folder, tokenizer)
    fits = tokens.lengths < model.context
    if not fits.any():
        raise PromptError(
            f"none of the {prompts.num_rows} held-out prompts leaves room for a response in the model's context of "
            f"{model.context} tokens"
        )
    prompts, tokens = prompts.filter(pa.array(fits)), tokens.filter(fits)
    rollouts = _sampled(job, model, tokens, prompts.column("prompt_id").to_pylist(), tokenizer)
    table = responses_table(prompts, rollouts, tokenizer, config.evaluate.samples_per_prompt, name)
    store.write_table(store.path(job.key, "responses.parquet"), table, RL_EVALUATE_RESPONSES)
    metrics = metrics_table(table, config.evaluate.samples_per_prompt)
    store.write_table(store.path(job.key, "metrics.parquet"), metrics, RL_EVALUATE_METRICS)
    job.counters |= {
        "prompts": prompts.num_rows,
        "prompts_left_out": held_out.num_rows - prompts.num_rows,
        "samples": table.num_rows,
        "tokens": len(rollouts.response_ids),
    }


def _model(config: RLConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> ModelRef:
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    return ModelRef(
        path=str(folder),
        version=folder_fingerprint(folder, None)[:16],
        step=0,
        context=int(settings.get_text_config().max_position_embeddings),
        shared_vocab=len(tokenizer),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _sampled(
    job: StageJob[RLConfig],
    model: ModelRef,
    tokens: Ragged,
    prompt_ids: list[str],
    tokenizer: PreTrainedTokenizerBase,
) -> Rollouts:
    """Return ``samples_per_prompt`` responses to each prompt, one prompt's after another's."""
    config, settings = job.config, job.config.evaluate
    limit = settings.max_new_tokens or config.grpo.max_new_tokens
    samples = settings.samples_per_prompt
    sampling = SamplingSettings(
        temperature=settings.temperature,
        top_p=1.0,
        max_new_tokens=limit,
        context=model.context,
        end_ids=tuple(end_ids(tokenizer, model.path)),
        vocab_size=len(tokenizer),
    )
    seeds = [sample_seed(config.seed, _ROUND, prompt_id, index) for prompt_id in prompt_ids for index in range(samples)]
    rows = [row for row in tokens.rows(0, len(tokens)) for _ in range(samples)]
    done = 0

    def finished(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, len(rows), "samples")

    engine = open_engine(
        model,
        GenerateConfig(engine=settings.engine, batch_size=settings.batch_size),
        longest_sequence(tokens.lengths, model.context, limit),
    )
    try:
        ((_, rollouts),) = engine.generate([Requests(rows, np.array(seeds, np.int64))], sampling, finished)
    finally:
        engine.close()
    return rollouts


def responses_table(
    prompts: pa.Table, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, samples: int, name: str
) -> pa.Table:
    """Return checked responses as table RL_EVALUATE_RESPONSES.

    Args:
        prompts: Rows of table prompts.
        rollouts: ``samples`` responses to each, one prompt's after another's.
        tokenizer: Turns them into text.
        samples: Responses to each prompt.
        name: Of the model.
    """
    asked = prompts.take(np.repeat(np.arange(prompts.num_rows), samples))
    rows: Any = rollouts.rows()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return pa.table(
        {
            "model": [name] * len(texts),
            "prompt_id": asked.column("prompt_id"),
            "sample_index": np.tile(np.arange(samples, dtype=np.int32), prompts.num_rows),
            "response": texts,
            "response_tokens": np.diff(rollouts.offsets).astype(np.int32),
            "finish_reason": pa.array(rollouts.finish_reason.tolist(), pa.string()),
            "score": verify(asked, texts),
        },
        schema=RL_EVALUATE_RESPONSES.columns,
    )


def mean_over_prompts(values: NDArray[np.float64], samples: int) -> tuple[float, float]:
    """Return the mean and its standard error, prompts as the independent units.

    >>> mean_over_prompts(np.array([1.0, 0.0, 1.0, 1.0]), samples=2)
    (0.75, 0.25)

    Args:
        values: float64 [prompts x samples], a prompt's samples one after another.
        samples: Of each prompt.

    Returns:
        Mean of the prompts' means, and their standard deviation (n - 1) over the root of n; 0 for one prompt.
    """
    means = values.reshape(-1, samples).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else 0.0
    return float(means.mean()), float(error)


def metrics_table(responses: pa.Table, samples: int) -> pa.Table:
    """Return accuracy, length and truncation of one model's responses as table RL_EVALUATE_METRICS."""
    values = {
        "accuracy": responses.column("score").to_numpy(),
        "response_tokens": responses.column("response_tokens").to_numpy().astype(np.float64),
        "truncation_rate": np.equal(responses.column("finish_reason").to_pylist(), "length").astype(np.float64),
    }
    means = [mean_over_prompts(column, samples) for column in values.values()]
    return pa.table(
        {
            "model": [responses.column("model")[0].as_py()] * len(values),
            "metric": list(values),
            "value": [mean for mean, _ in means],
            "n": [responses.num_rows // samples] * len(values),
            "stderr": [error for _, error in means],
        },
        schema=RL_EVALUATE_METRICS.columns,
    )
