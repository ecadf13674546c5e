"""From a training checkpoint to a model folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from schemas.errors import ArtifactError
from schemas.stage_key import WARMUP, StageKey
from tasks.export.card import model_card
from tasks.language_model.chat import end_ids
from tasks.language_model.loading import load_model, load_tokenizer
from tasks.language_model.sources import ModelRef, exported_folder, start_model
from tasks.stage import StageJob

_CHECKPOINT = "checkpoint"


def export_student(job: StageJob) -> None:
    """See ``tasks.export.run``."""
    store, config = job.store, job.config
    train = StageKey("train", job.round)
    trained, record = store.finished(train), store.record()
    if record is None:
        raise ArtifactError(f"{store.folder}: run.json is missing")
    target = exported_folder(store, job.key)
    step = 0 if job.round == WARMUP else int(trained.counters["policy_step"])
    job.progress(0, 1, "models")
    if not target.is_dir():
        start = start_model(store, config, job.round)
        model = trained_model(store.path(train, _CHECKPOINT), start).to(getattr(torch, config.export.dtype))
        model.config.use_cache = True
        tokenizer = load_tokenizer(start.path, trust_remote_code=start.trust_remote_code)
        # Greedy and nothing else: sampling settings are for whoever deploys to choose.
        model.generation_config = GenerationConfig(
            eos_token_id=end_ids(tokenizer, start.path),
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        temporary = store.temporary_folder(target)
        model.save_pretrained(temporary, max_shard_size=config.export.max_shard_size.replace(" ", ""))
        tokenizer.save_pretrained(temporary)
        card = model_card(
            config,
            job.key,
            run_id=record.run_id,
            config_hash=record.config_hash,
            step=step,
            inputs=trained.fingerprint,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        store.publish_folder(temporary, target)
    job.progress(1, 1, "models")
    job.counters |= {"policy_step": step}


def trained_model(checkpoint: Path, start: ModelRef) -> PreTrainedModel:
    """Load a checkpoint's weights in float32, adapters merged into the model they were trained on."""
    if (checkpoint / "adapter_config.json").is_file():
        from peft import PeftModel

        base = load_model(start.path, dtype="float32", device="cpu", trust_remote_code=start.trust_remote_code)
        merged: PreTrainedModel = PeftModel.from_pretrained(base, checkpoint).merge_and_unload()
        return merged
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=start.trust_remote_code
    )
    return model
