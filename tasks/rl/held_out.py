"""One model's answers to the held-out prompts, checked."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from transformers import AutoConfig, PreTrainedTokenizerBase

from schemas.config import GenerateConfig, RLConfig
from schemas.errors import PromptError
from schemas.stage_key import WARMUP
from schemas.tables import EVALUATE_METRICS, EVALUATE_RESPONSES, METRICS_FILE, RESPONSES_FILE
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.evaluate.means import metrics_table, response_means
from tasks.evaluate.responses import HeldOut, Sampling, own_responses
from tasks.graph import PROMPTS
from tasks.language_model.chat import require_chat_template
from tasks.language_model.context_limit import context_limit
from tasks.language_model.fingerprint import folder_fingerprint
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.sources import ModelRef
from tasks.rl.reward import require_verifiable
from tasks.rollout.prompts import encode_messages, of_split
from tasks.stage import StageJob


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
    asked = HeldOut(prompts, tokens, tokenizer, model.context)
    table = own_responses(asked, model, name, WARMUP, sampling_of(config), job.progress)
    store.write_table(store.path(job.key, RESPONSES_FILE), table, EVALUATE_RESPONSES)
    metrics = metrics_table({name: response_means(table)}, WARMUP)
    store.write_table(store.path(job.key, METRICS_FILE), metrics, EVALUATE_METRICS)
    job.counters |= {
        "prompts": prompts.num_rows,
        "prompts_left_out": held_out.num_rows - prompts.num_rows,
        "samples": table.num_rows,
        "tokens": pc.sum(table.column("response_tokens")).as_py(),
    }


def _model(config: RLConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> ModelRef:
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    return ModelRef(
        path=str(folder),
        version=folder_fingerprint(folder, None)[:16],
        step=0,
        context=context_limit(settings, str(folder)),
        shared_vocab=len(tokenizer),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def sampling_of(config: RLConfig) -> Sampling:
    """Return how held-out prompts are answered: as `evaluate` says, by default with as many tokens as training."""
    own = config.evaluate
    return Sampling(
        engine=GenerateConfig(engine=own.engine, batch_size=own.batch_size),
        temperature=own.temperature,
        samples_per_prompt=own.samples_per_prompt,
        max_new_tokens=own.max_new_tokens or config.grpo.max_new_tokens,
        seed=config.seed,
    )
