"""From a training checkpoint to a model folder."""

from pathlib import Path

from transformers import PreTrainedModel

from schemas.errors import ArtifactError
from schemas.manifest import Manifest, RunRecord, hash_file
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import TRAIN_METRICS
from tasks.export.card import Lineage, student_card
from tasks.graph import PROMPTS, sampled_round
from tasks.language_model.loading import load_model, load_tokenizer
from tasks.language_model.model_folder import write_model_folder
from tasks.language_model.sources import (
    ModelRef,
    exported_folder,
    policy_version,
    resolved_models,
    start_model,
    weights_version,
)
from tasks.language_model.weights import has_adapters, load_weights, merge_adapters
from tasks.stage import StageJob


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
        model = trained_model(store.fetch(store.checkpoint(train)), start)
        tokenizer = load_tokenizer(start.path, trust_remote_code=start.trust_remote_code)
        with store.writing_folder(target) as temporary:
            write_model_folder(temporary, model, tokenizer, start.path, config.export)
            card = student_card(config, job.key, _lineage(job, record, trained, temporary))
            (temporary / "README.md").write_text(card, encoding="utf-8")
    job.progress(1, 1, "models")
    job.counters |= {"policy_step": step}


def _lineage(job: StageJob, record: RunRecord, trained: Manifest, weights: Path) -> Lineage:
    store, config = job.store, job.config
    sampled = sampled_round(config, job.round)
    on_policy = job.round != WARMUP and config.train.on_policy is not None
    metrics = store.read_table(StageKey("train", job.round), TRAIN_METRICS)
    return Lineage(
        run_id=record.run_id,
        config_hash=record.config_hash,
        version=weights_version((path.name, hash_file(path)) for path in sorted(weights.glob("*.safetensors"))),
        teacher_version=resolved_models(store).teacher_version,
        sampled_by=None if sampled == WARMUP or on_policy else policy_version(store, config, sampled),
        prompts=store.finished(PROMPTS).outputs_fingerprint,
        packs=None if on_policy else store.finished(StageKey("pack", sampled)).outputs_fingerprint,
        training=trained.fingerprint,
        metrics=metrics.slice(metrics.num_rows - 1).to_pylist()[0] if metrics.num_rows else {},
    )


def trained_model(checkpoint: Path, start: ModelRef) -> PreTrainedModel:
    """Load a checkpoint's weights in float32, adapters merged into the model they were trained on.

    Raises:
        ArtifactError: a file of the checkpoint is missing or damaged.
    """
    model = load_model(start.path, dtype="float32", device="cpu", trust_remote_code=start.trust_remote_code)
    if has_adapters(checkpoint):
        return merge_adapters(model, checkpoint)
    load_weights(model, checkpoint)
    return model
