"""Evaluating one exported student."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import ArtifactError, StageError
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_METRICS, GENERATE, PROMPTS
from tasks.evaluate.agreement import Mean, compare_models
from tasks.language_model.head import check_head
from tasks.language_model.loading import load_ref
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import result_model, teacher_model
from tasks.stage import StageJob

_LOGITS_CHUNK = 512


def evaluate_student(job: StageJob) -> None:
    """See ``tasks.evaluate.run``."""
    store, config = job.store, job.config
    prompts, responses = held_out_references(job)
    teacher = load_ref(teacher_model(store, config), packed=True)
    student = load_ref(result_model(store, config, job.round), packed=True)
    check_head(teacher)
    check_head(student)
    total, done = len(prompts.values) + len(responses.values), 0

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, total, "tokens")

    metrics = compare_models(
        teacher,
        student,
        prompts,
        responses,
        batch_tokens=config.evaluate.batch_tokens,
        logits_chunk=_LOGITS_CHUNK,
        on_tokens=on_tokens,
    )
    for name, mean in metrics.items():
        if not np.isfinite(mean.value):
            raise StageError(f"evaluate: {name} is not finite; the student's weights of round {job.round} are damaged")
    store.write_table(store.path(job.key, "metrics.parquet"), metrics_table(metrics, job.round), EVALUATE_METRICS)
    job.counters |= {"tokens": done, "held_out_responses": len(responses)}


def held_out_references(job: StageJob) -> tuple[Ragged, Ragged]:
    """Return prompts and teacher responses of the held-out split.

    Raises:
        ArtifactError: the reference table has none.
    """
    store = job.store
    held_out = store.read_table(StageKey("prompts"), PROMPTS, ["prompt_id", "split"])
    ids = held_out.filter(pc.equal(held_out["split"], "held_out")).column("prompt_id")
    table = store.read_table(StageKey("reference"), GENERATE, ["prompt_id", "prompt_ids", "response_ids"])
    table = table.filter(pc.is_in(table["prompt_id"], value_set=ids.combine_chunks())).combine_chunks()
    if table.num_rows == 0:
        raise ArtifactError("reference: no held-out responses to evaluate on; re-run stage `reference`")
    return Ragged.from_arrow(table["prompt_ids"]), Ragged.from_arrow(table["response_ids"])


def metrics_table(metrics: dict[str, Mean], round_index: int) -> pa.Table:
    """Return the evaluate metrics table; ``n`` counts response tokens."""
    return pa.table(
        {
            "round": [round_index] * len(metrics),
            "metric": list(metrics),
            "value": [mean.value for mean in metrics.values()],
            "n": [mean.tokens for mean in metrics.values()],
            "stderr": [mean.stderr for mean in metrics.values()],
        },
        schema=EVALUATE_METRICS.columns,
    )
